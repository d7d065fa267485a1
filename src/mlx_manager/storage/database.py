"""The main database: one SQLite file, durable once a commit returns, and never opened by guesswork.

A file that is damaged, is not ours or is newer than this program is named and left as it is. Migrations run in one transaction, so
a failure or a kill in the middle of them leaves the database as it was; the backup made before is for the day a migration is wrong.
"""

import asyncio
import logging
import os
import sqlite3
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, event, inspect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, async_sessionmaker, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool
from sqlmodel.ext.asyncio.session import AsyncSession

from mlx_manager.core.errors import NotSaved

MIGRATIONS = Path(__file__).parent / "migrations"
VERSION_TABLE = "alembic_version"

SqliteVersion = tuple[int, int, int]

logger = logging.getLogger(__name__)


class DatabaseUnusable(Exception):
    """The program cannot start with this database, which is left as it is. The text begins with the file's name."""


def has_wal_reset_bug(version: SqliteVersion) -> bool:
    """Whether this SQLite can corrupt a write-ahead log that two connections use (sqlite.org/wal.html#walresetbug)."""
    is_repaired = (3, 44, 6) <= version < (3, 45, 0) or (3, 50, 7) <= version < (3, 51, 0)
    return (3, 7, 0) <= version <= (3, 51, 2) and not is_repaired


def journal_mode(version: SqliteVersion) -> Literal["WAL", "TRUNCATE"]:
    return "TRUNCATE" if has_wal_reset_bug(version) else "WAL"


class Database:
    """One file and the connections to it: opened before anything asks for a session, closed after the last one has ended."""

    def __init__(self, path: Path, *, migrations: Path = MIGRATIONS, sqlite_version: SqliteVersion = sqlite3.sqlite_version_info) -> None:
        self._path = path
        self._migrations = migrations
        self._journal_mode = journal_mode(sqlite_version)
        self._engine = create_async_engine(_url(path))
        self._sessions = async_sessionmaker(self._engine, class_=AsyncSession, expire_on_commit=False)
        event.listen(self._engine.sync_engine, "connect", self._set_pragmas)

    async def open(self) -> None:
        """Check the file and bring it up to date, or make it. Raises DatabaseUnusable."""
        if self._journal_mode == "TRUNCATE":
            logger.warning("this SQLite can corrupt a write-ahead log (fixed in 3.51.3): using the slower rollback journal")
        try:
            await asyncio.to_thread(self._path.parent.mkdir, mode=0o700, parents=True, exist_ok=True)
            await _bring_up_to_date(self._path, ScriptDirectory(str(self._migrations)))
            async with self._engine.connect():  # a connection that cannot be set up fails here, not at the first session
                pass
        except OSError as error:
            raise DatabaseUnusable(f"{self._path}: {error.strerror}") from error
        except DBAPIError as error:
            raise DatabaseUnusable(f"{self._path}: {error.orig}") from error

    async def close(self) -> None:
        await self._engine.dispose()

    def session(self) -> AsyncSession:
        """For `async with`. What was not committed at its end is rolled back; what was survives a kill and a loss of power."""
        return self._sessions()

    @asynccontextmanager
    async def change(self) -> AsyncGenerator[AsyncSession]:
        """A session that is committed at the end of the block, all of it or nothing. Raises `NotSaved` where the file cannot be written."""
        try:
            async with self.session() as session:
                yield session
                await session.commit()
        except OperationalError as error:
            is_full = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            raise NotSaved(str(error.orig), is_full=is_full) from error

    def _set_pragmas(self, connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA busy_timeout=5000")  # first: the next one may have to wait
        cursor.execute(f"PRAGMA journal_mode={self._journal_mode}")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        if sys.platform == "darwin":
            cursor.execute("PRAGMA fullfsync=ON")  # there, fsync does not reach the disk
        cursor.close()


def _url(path: Path) -> URL:
    return URL.create("sqlite+aiosqlite", database=str(path))


async def _bring_up_to_date(path: Path, script: ScriptDirectory) -> None:
    """On a connection that sets no pragma: the file is not written to before it is known to be ours, and foreign keys are off, since
    a table that a migration copies and drops would take the rows that refer to it along. Transactions are our own: the driver's
    would leave changes of tables out."""
    engine = create_async_engine(_url(path), poolclass=NullPool, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        revision = await _examine(connection, path, script)
        head = script.get_current_head()
        if revision == head:
            return
        backup = None if revision is None else await _back_up(connection, path.with_name(f"{path.name}.before-{head}"))
        await connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            await connection.run_sync(_upgrade, script)
        except Exception as error:
            kept = f"nothing of it was kept; a backup is in {backup}" if backup else "nothing of it was kept"
            raise DatabaseUnusable(f"{path}: the migration to {head} failed ({error}): {kept}") from error
        await connection.commit()


async def _examine(connection: AsyncConnection, path: Path, script: ScriptDirectory) -> str | None:
    """The revision of a sound database of ours; None for one that is still empty."""
    problem = (await connection.exec_driver_sql("PRAGMA quick_check(1)")).scalar_one()
    if problem != "ok":
        raise DatabaseUnusable(f"{path}: the database is damaged ({problem}). Move it away, or put a backup in its place")
    tables, revision = await connection.run_sync(_describe)
    if revision is None and tables - {VERSION_TABLE}:
        raise DatabaseUnusable(f"{path}: this database was not made by MLX Manager. Choose another data folder")
    if revision is not None and revision not in {known.revision for known in script.walk_revisions()}:
        raise DatabaseUnusable(f"{path}: this database was made by a newer version of MLX Manager ({revision}). Install that version")
    return revision


def _describe(connection: Connection) -> tuple[set[str], str | None]:
    heads = MigrationContext.configure(connection).get_current_heads()
    return set(inspect(connection).get_table_names()), heads[0] if heads else None


async def _back_up(connection: AsyncConnection, backup: Path) -> Path:
    """A whole copy under its final name, or none. An earlier one was made before the same migration failed: it is replaced."""
    part = backup.with_name(f"{backup.name}.part")
    try:
        await asyncio.to_thread(part.unlink, missing_ok=True)
        await connection.exec_driver_sql("VACUUM INTO ?", (str(part),))
        await asyncio.to_thread(_move_durably, part, backup)
    finally:
        await asyncio.to_thread(part.unlink, missing_ok=True)
    return backup


def _move_durably(source: Path, target: Path) -> None:
    _sync(source)
    source.replace(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _upgrade(connection: Connection, script: ScriptDirectory) -> None:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", script.dir.replace("%", "%%"))
    command.upgrade(config, "head")
    orphans = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if orphans:
        raise ValueError(f"{len(orphans)} rows refer to rows that are gone, the first in table {orphans[0][0]}")
