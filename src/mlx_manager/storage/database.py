"""The main database: one SQLite file, durable once a commit returns, and never opened by guesswork.

A file that is damaged, is not ours or is newer than this program is named and left as it is. Migrations run in one transaction, so
that a failure or a kill in the middle leaves the database as it was; the backup beside it is for the operator's peace of mind.
"""

import asyncio
import logging
import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool
from sqlmodel.ext.asyncio.session import AsyncSession

MIGRATIONS = Path(__file__).parent / "migrations"
VERSION_TABLE = "alembic_version"
BUSY_TIMEOUT_MS = 5_000

logger = logging.getLogger(__name__)

SqliteVersion = tuple[int, int, int]


class DatabaseUnusable(Exception):
    """The program cannot start with this database. Its text names the file and says what to do."""


def has_wal_reset_bug(version: SqliteVersion) -> bool:
    """Whether this SQLite can corrupt a write-ahead log that two connections use (sqlite.org/wal.html#walresetbug)."""
    is_repaired = (3, 44, 6) <= version < (3, 45, 0) or (3, 50, 7) <= version < (3, 51, 0)
    return (3, 7, 0) <= version <= (3, 51, 2) and not is_repaired


def journal_mode(version: SqliteVersion) -> Literal["WAL", "TRUNCATE"]:
    return "TRUNCATE" if has_wal_reset_bug(version) else "WAL"


class Database:
    """One file and the connections to it. Opened before anything asks for a session, closed after the last one."""

    def __init__(self, path: Path, *, migrations: Path = MIGRATIONS, sqlite_version: SqliteVersion = sqlite3.sqlite_version_info[:3]) -> None:
        self.path = path
        self._config = Config()
        self._config.set_main_option("script_location", str(migrations).replace("%", "%%"))
        self._script = ScriptDirectory.from_config(self._config)
        self._journal_mode = journal_mode(sqlite_version)
        self._engine = self._new_engine(self._set_up)
        self._sessions = async_sessionmaker(self._engine, class_=AsyncSession, expire_on_commit=False)

    async def open(self) -> None:
        """Check the file, bring it up to date or make it. Raises DatabaseUnusable."""
        if self._journal_mode == "TRUNCATE":
            logger.warning("SQLite %s has the WAL-reset bug: using the slower rollback journal", sqlite3.sqlite_version)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self._prepare()
            async with self._engine.connect():  # the journal mode is on the file before anybody needs it
                pass
        except OSError as error:
            raise DatabaseUnusable(f"{self.path}: {error.strerror}") from error
        except DBAPIError as error:
            raise DatabaseUnusable(f"{self.path}: {error.orig}") from error

    async def close(self) -> None:
        await self._engine.dispose()

    def session(self) -> AsyncSession:
        """For `async with`: what is not committed in it is rolled back at its end."""
        return self._sessions()

    async def _prepare(self) -> None:
        """On connections of its own: they change no pragma of a file before it is known to be ours."""
        engine = self._new_engine(_control_transactions)
        ...
