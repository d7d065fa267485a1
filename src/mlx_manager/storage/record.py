"""What a row is made of."""

from sqlalchemy import MetaData
from sqlmodel import SQLModel


class Record(SQLModel):
    """Base of every table in the main database: `class UserRecord(Record, table=True)`.

    The metadata is ours alone, so that another library's tables never reach a migration, and every constraint has a name, since
    SQLite's tables are changed by copying them and a constraint without a name cannot be changed afterwards.
    """

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
