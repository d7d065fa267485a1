"""Downloads: what is fetched from the Hub, so that it goes on after a restart."""

import sqlalchemy as sa
from alembic import op

revision = "0002_downloads"
down_revision = "0001_baseline"


def upgrade() -> None:
    op.create_table(
        "downloads",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("revision", sa.String(), nullable=False),
        sa.Column("commit", sa.String(), nullable=False),
        sa.Column("files", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("part", sa.String(), nullable=True),
        sa.Column("validator", sa.String(), nullable=True),
        sa.Column("created_ms", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_downloads"),
    )
