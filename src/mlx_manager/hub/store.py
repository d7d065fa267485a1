"""The table of downloads."""

from collections.abc import Sequence

from sqlmodel import Field, col, delete, select

from mlx_manager.storage.database import Database
from mlx_manager.storage.record import Record


class DownloadRecord(Record, table=True):
    """`files` is JSON (`listing.dump`). `validator` is what the host of the file whose etag is `part` calls its version, so that it can
    be asked for the rest of that and of nothing else. `created_ms` is Unix time in milliseconds."""

    __tablename__ = "downloads"  # pyright: ignore[reportAssignmentType] - as SQLModel documents it

    id: str = Field(primary_key=True)
    model: str
    revision: str
    commit: str
    files: str
    state: str
    error: str | None = None
    part: str | None = None
    validator: str | None = None
    created_ms: int


class DownloadStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> Sequence[DownloadRecord]:
        """The oldest first."""
        async with self._database.session() as session:
            return (await session.exec(select(DownloadRecord).order_by(col(DownloadRecord.created_ms), col(DownloadRecord.id)))).all()

    async def put(self, record: DownloadRecord) -> None:
        async with self._database.change() as session:
            await session.merge(record)

    async def remove(self, id: str) -> None:
        async with self._database.change() as session:
            await session.exec(delete(DownloadRecord).where(col(DownloadRecord.id) == id))
