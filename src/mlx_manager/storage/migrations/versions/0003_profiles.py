"""Profiles and aliases: names that clients ask for; and what models were found to be able to do."""

import sqlalchemy as sa
from alembic import op

revision = "0003_profiles"
down_revision = "0002_downloads"


def upgrade() -> None:
    op.create_table(
        "profile",
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("adapter", sa.String()),
        sa.Column("system_prompt", sa.String()),
        *(
            sa.Column(name, sa.Float())
            for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        ),
        sa.Column("top_k", sa.Integer()),
        sa.Column("seed", sa.BigInteger()),
        sa.Column("max_tokens", sa.Integer()),
        sa.Column("stop", sa.JSON()),
        sa.Column("enable_thinking", sa.Boolean()),
        sa.Column("reasoning_effort", sa.String()),
        sa.Column("thinking_budget", sa.Integer()),
        sa.Column("context_limit", sa.Integer()),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("model", "name", name="pk_profile"),
    )
    op.create_table(
        "alias",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_alias"),
    )
    op.create_table(
        "finding",
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("capability", sa.String(), nullable=False),
        sa.Column("verified", sa.Boolean(), nullable=False),
        sa.Column("detail", sa.String(), nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("found_at", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("model", "capability", name="pk_finding"),
    )
