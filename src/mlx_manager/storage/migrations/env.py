"""Alembic runs this for every upgrade, on the connection and in the transaction that `Database` hands over. It sets up no logging."""

from alembic import context

from mlx_manager.storage.record import Record

context.configure(connection=context.config.attributes["connection"], target_metadata=Record.metadata, render_as_batch=True)
context.run_migrations()
