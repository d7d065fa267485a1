"""The beginning: a database of ours, with nothing in it yet."""

revision = "0001_baseline"
down_revision = None


def upgrade() -> None:
    pass
