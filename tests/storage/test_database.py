import importlib
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

import mlx_manager.app  # noqa: F401 - with it, every table is known
from mlx_manager.storage.database import MIGRATIONS, Database, DatabaseUnusable, has_wal_reset_bug, journal_mode
from mlx_manager.storage.record import Record

HEAD = ScriptDirectory(str(MIGRATIONS)).get_current_head()
WITHOUT_BUG = (3, 53, 0)
WITH_BUG = (3, 51, 2)

PARENTS = """
    op.create_table("parent", sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String))
    op.create_table("child", sa.Column("parent_id", sa.Integer, sa.ForeignKey("parent.id", ondelete="CASCADE", name="fk_child")))
    op.execute("INSERT INTO parent VALUES (1, 'ada')")
    op.execute("INSERT INTO child VALUES (1)")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "mlx-manager.db"


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    """Ours; what comes after them is a test's own."""
    return shutil.copytree(MIGRATIONS, tmp_path / "100% migrations", ignore=shutil.ignore_patterns("__pycache__"))


def add_migration(migrations: Path, revision: str, after: str | None, body: str) -> None:
    lines = [
        "import sqlalchemy as sa",
        "from alembic import op",
        f"revision, down_revision = {revision!r}, {after!r}",
        "def upgrade():",
        body,
    ]
    (migrations / "versions" / f"{revision}.py").write_text("\n".join(lines))


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[Database]:
    database = Database(path, **options)
    try:
        await database.open()
        yield database
    finally:
        await database.close()


async def execute(database: Database, statement: str) -> list[tuple[Any, ...]]:
    async with database.session() as session:
        result = await (await session.connection()).exec_driver_sql(statement)
        rows = [tuple(row) for row in result] if result.returns_rows else []
        await session.commit()
    return rows


async def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DatabaseUnusable) as refused:
        async with opened(path, **options):
            pass
    return str(refused.value)


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def content(path: Path) -> bytes:
    return path.read_bytes()


def read(path: Path, statement: str) -> list[tuple[Any, ...]]:
    """With another program's eyes."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


async def test_a_fresh_database_is_made_in_a_folder_for_its_owner_only(path: Path) -> None:
    async with opened(path) as database:
        assert await execute(database, "SELECT * FROM alembic_version") == [(HEAD,)]
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in path.parent.iterdir()] == [path.name]


async def test_a_reopened_database_has_what_was_committed(path: Path) -> None:
    async with opened(path) as database:
        await execute(database, "CREATE TABLE scratch (name TEXT)")
        await execute(database, "INSERT INTO scratch VALUES ('ada')")
        async with database.session() as session:
            await (await session.connection()).exec_driver_sql("INSERT INTO scratch VALUES ('never committed')")
    async with opened(path) as database:
        assert await execute(database, "SELECT * FROM scratch") == [("ada",)]
    assert not list(path.parent.glob("*.before-*"))


async def test_an_empty_file_becomes_a_database(path: Path) -> None:
    write(path, b"")
    async with opened(path) as database:
        assert await execute(database, "SELECT * FROM alembic_version") == [(HEAD,)]


@pytest.mark.parametrize(
    ("sqlite_version", "mode"), [(WITHOUT_BUG, "wal"), (WITH_BUG, "truncate")], ids=["without the WAL bug", "with the WAL bug"]
)
async def test_every_connection_is_set_up_for_durability(path: Path, sqlite_version: tuple[int, int, int], mode: str) -> None:
    async with opened(path, sqlite_version=sqlite_version) as database, database.session() as first, database.session() as second:
        for session in (first, second):
            connection = await session.connection()
            pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "fullfsync")
            values = [(await connection.exec_driver_sql(f"PRAGMA {pragma}")).scalar_one() for pragma in pragmas]
            assert values == [mode, 2, 1, 5000, int(sys.platform == "darwin")]


async def test_a_database_leaves_the_write_ahead_log_when_sqlite_has_the_bug(path: Path) -> None:
    async with opened(path, sqlite_version=WITHOUT_BUG) as database:
        await execute(database, "CREATE TABLE scratch (name TEXT)")
    async with opened(path, sqlite_version=WITH_BUG) as database:
        assert await execute(database, "PRAGMA journal_mode") == [("truncate",)]
        assert await execute(database, "SELECT * FROM scratch") == []


@pytest.mark.parametrize(
    ("version", "has_bug"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 0), True),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 0), False),
    ],
)
def test_the_wal_reset_bug_is_known_by_version(version: tuple[int, int, int], has_bug: bool) -> None:
    assert has_wal_reset_bug(version) == has_bug
    assert journal_mode(version) == ("TRUNCATE" if has_bug else "WAL")


async def test_a_row_must_refer_to_one_that_exists(path: Path, migrations: Path) -> None:
    add_migration(migrations, "9999_parents", HEAD, PARENTS)
    async with opened(path, migrations=migrations) as database:
        with pytest.raises(IntegrityError):
            await execute(database, "INSERT INTO child VALUES (7)")


async def test_a_file_that_is_no_database_is_named_and_left_alone(path: Path) -> None:
    write(path, b"dear diary, " * 1000)
    assert await refusal(path) == f"{path}: file is not a database"
    assert content(path) == b"dear diary, " * 1000


@pytest.mark.parametrize("damage", ["garbage inside", "truncated"])
async def test_a_damaged_database_is_named_and_left_alone(path: Path, damage: str) -> None:
    async with opened(path) as database:
        await execute(database, "CREATE TABLE scratch (filler TEXT)")
        for _ in range(20):
            await execute(database, "INSERT INTO scratch VALUES (hex(randomblob(4000)))")
    whole = content(path)
    half = len(whole) // 2
    damaged = whole[:half] + (b"\xa5" * 4096 + whole[half + 4096 :] if damage == "garbage inside" else b"")
    write(path, damaged)
    assert (await refusal(path)).startswith(f"{path}: ")
    assert content(path) == damaged


async def test_another_programs_database_is_never_taken_over(path: Path) -> None:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    before = content(path)
    assert "not made by MLX Manager" in await refusal(path)
    assert content(path) == before


async def test_a_newer_versions_database_is_left_alone(path: Path, migrations: Path) -> None:
    add_migration(migrations, "9999_parents", HEAD, PARENTS)
    async with opened(path, migrations=migrations):
        pass
    before = content(path)
    assert "newer version of MLX Manager (9999_parents)" in await refusal(path)
    assert content(path) == before


async def test_a_locked_database_is_said_to_be_locked(path: Path) -> None:
    async with opened(path):
        pass
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    try:
        assert await refusal(path) == f"{path}: database is locked"
    finally:
        other.close()


async def test_a_write_ahead_log_in_use_that_must_be_left_is_said_to_be_locked(path: Path) -> None:
    async with opened(path, sqlite_version=WITHOUT_BUG):
        other = sqlite3.connect(path)
        other.execute("BEGIN")
        other.execute("SELECT * FROM alembic_version").fetchall()
    try:
        assert await refusal(path, sqlite_version=WITH_BUG) == f"{path}: database is locked"
    finally:
        other.close()


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "data" / "mlx-manager.db"
    assert await refusal(path) == f"{path}: Not a directory"


async def test_a_migration_is_preceded_by_a_backup(path: Path, migrations: Path) -> None:
    async with opened(path, migrations=migrations) as database:
        await execute(database, "CREATE TABLE scratch AS SELECT 'ada' AS name")
    add_migration(migrations, "9999_more", HEAD, "    op.add_column('scratch', sa.Column('born', sa.Integer))")
    async with opened(path, migrations=migrations) as database:
        assert await execute(database, "SELECT name, born FROM scratch") == [("ada", None)]
    backup = path.with_name("mlx-manager.db.before-9999_more")
    assert read(backup, "SELECT * FROM scratch") == [("ada",)]
    assert read(backup, "SELECT * FROM alembic_version") == [(HEAD,)]
    assert {file.name for file in path.parent.iterdir()} == {path.name, backup.name}


async def test_a_failed_migration_leaves_everything_as_it_was(path: Path, migrations: Path) -> None:
    add_migration(migrations, "9999_parents", HEAD, PARENTS)
    async with opened(path, migrations=migrations):
        pass
    add_migration(migrations, "0003_drops", "9999_parents", "    op.drop_table('child')")
    add_migration(migrations, "0004_fails", "0003_drops", "    op.execute('DELETE FROM parent')\n    op.execute('nonsense')")
    for _ in range(2):
        message = await refusal(path, migrations=migrations)
        assert message.startswith(f"{path}: the migration to 0004_fails failed")
        assert "mlx-manager.db.before-0004_fails" in message
        assert read(path, "SELECT * FROM alembic_version") == [("9999_parents",)]
        assert read(path, "SELECT * FROM parent JOIN child") == [(1, "ada", 1)]
        assert read(path.with_name("mlx-manager.db.before-0004_fails"), "SELECT * FROM parent JOIN child") == [(1, "ada", 1)]
    add_migration(migrations, "0004_fails", "0003_drops", "    op.execute('DELETE FROM parent')")
    async with opened(path, migrations=migrations) as database:
        assert await execute(database, "SELECT * FROM alembic_version") == [("0004_fails",)]


async def test_a_failed_first_migration_leaves_nothing_behind_that_blocks_the_next(path: Path, migrations: Path) -> None:
    add_migration(migrations, "9999_fails", HEAD, PARENTS + "    op.execute('nonsense')")
    assert "nothing of it was kept" in await refusal(path, migrations=migrations)
    async with opened(path) as database:
        assert await execute(database, "SELECT * FROM alembic_version") == [(HEAD,)]


async def test_a_table_can_be_copied_and_dropped_without_its_children(path: Path, migrations: Path) -> None:
    add_migration(migrations, "9999_parents", HEAD, PARENTS)
    copy = "    with op.batch_alter_table('parent', recreate='always') as table:\n        table.drop_column('name')"
    add_migration(migrations, "0003_copies", "9999_parents", copy)
    async with opened(path, migrations=migrations) as database:
        assert await execute(database, "SELECT * FROM parent") == [(1,)]
        assert await execute(database, "SELECT * FROM child") == [(1,)]


async def test_a_migration_that_orphans_rows_fails(path: Path, migrations: Path) -> None:
    add_migration(migrations, "9999_parents", HEAD, PARENTS)
    async with opened(path, migrations=migrations):
        pass
    add_migration(migrations, "0003_orphans", "9999_parents", "    op.execute('DELETE FROM parent')")
    assert "1 rows refer to rows that are gone, the first in table child" in await refusal(path, migrations=migrations)
    assert read(path, "SELECT * FROM parent") == [(1, "ada")]


async def test_migrations_leave_logging_alone(path: Path) -> None:
    before = (logging.root.level, logging.root.handlers[:], logging.getLogger("alembic").level, logging.getLogger("sqlalchemy").level)
    ours = logging.getLogger("mlx_manager.storage")
    async with opened(path):
        pass
    after = (logging.root.level, logging.root.handlers[:], logging.getLogger("alembic").level, logging.getLogger("sqlalchemy").level)
    assert after == before
    assert not ours.disabled


async def test_the_migrations_make_what_the_records_say(path: Path) -> None:
    importlib.import_module("mlx_manager.app")  # all records there are

    def differences(connection: Connection) -> list[Any]:
        return compare_metadata(MigrationContext.configure(connection), Record.metadata)

    async with opened(path) as database, database.session() as session:
        assert await (await session.connection()).run_sync(differences) == []


def write_and_be_killed(path: Path, sqlite_version: str, num_rows: int) -> set[int]:
    """Numbers of the rows whose commits returned; the kill falls somewhere in the next write."""
    command = [sys.executable, "-m", "tests.storage.writer", str(path), sqlite_version]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(num_rows)]
        writer.kill()
        lines += writer.stdout.readlines()
    return {int(line) for line in lines if line.endswith(b"\n")}


@pytest.mark.parametrize("sqlite_version", ["3.53.0", "3.51.2"], ids=["wal", "truncate"])
async def test_what_was_acknowledged_survives_a_kill(path: Path, sqlite_version: str) -> None:
    dice = random.Random(20)
    acknowledged: set[int] = set()
    for _ in range(5):
        num_rows = dice.randint(1, 40)
        written = write_and_be_killed(path, sqlite_version, num_rows)
        assert len(written) >= num_rows
        acknowledged |= written
        async with opened(path) as database:
            assert await execute(database, "PRAGMA integrity_check") == [("ok",)]
            assert {number for (number,) in await execute(database, "SELECT number FROM scratch")} >= acknowledged


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_folder_that_may_not_be_written_is_named(path: Path) -> None:
    path.parent.mkdir(mode=0o500)
    assert (await refusal(path)).startswith(f"{path}: ")
