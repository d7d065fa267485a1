"""What models were found to be able to do: kept until they are asked again."""

from collections.abc import Mapping, Sequence
from typing import cast

from sqlmodel import Field, col, delete, select
from sqlmodel.ext.asyncio.session import AsyncSession

from mlx_manager.core.capabilities import Capability, Finding
from mlx_manager.storage.database import Database
from mlx_manager.storage.record import Record

Found = Mapping[Capability, Finding]


class FindingRecord(Record, table=True):
    """`found_at` is Unix time, in seconds."""

    __tablename__ = "finding"  # pyright: ignore[reportAssignmentType] - as SQLModel wants it

    model: str = Field(primary_key=True)
    capability: str = Field(primary_key=True)
    verified: bool
    detail: str
    fingerprint: str
    found_at: int


class Findings:
    """Owns them, by model."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._found: Mapping[str, Found] = {}

    async def open(self) -> None:
        """The database is open by now."""
        async with self._database.session() as session:
            self._found = await _found(session)

    def of(self, model: str) -> Found:
        """Whatever its files were then."""
        return self._found.get(model, {})

    async def keep(self, model: str, found: Found) -> None:
        """In the place of what was found before. Raises `NotSaved`."""
        async with self._database.change() as session:
            await session.exec(delete(FindingRecord).where(col(FindingRecord.model) == model))
            session.add_all(_records(model, found))
            everything = await _found(session)
        self._found = everything


def _records(model: str, found: Found) -> Sequence[FindingRecord]:
    return [
        FindingRecord(
            model=model, capability=capability, verified=f.verified, detail=f.detail, fingerprint=f.fingerprint, found_at=f.found_at
        )
        for capability, f in found.items()
    ]


async def _found(session: AsyncSession) -> Mapping[str, Found]:
    found: dict[str, dict[Capability, Finding]] = {}
    for r in await session.exec(select(FindingRecord)):
        found.setdefault(r.model, {})[cast(Capability, r.capability)] = Finding(r.verified, r.detail, r.fingerprint, r.found_at)
    return found
