"""`python -m tests.storage.writer FILE SQLITE_VERSION` writes rows until it is killed, and prints each number once its commit returned."""

import asyncio
import sys
from pathlib import Path

from mlx_manager.storage.database import Database


async def write(path: Path, sqlite_version: tuple[int, int, int]) -> None:
    database = Database(path, sqlite_version=sqlite_version)
    await database.open()
    while True:
        async with database.session() as session:
            connection = await session.connection()
            await connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS scratch (number INTEGER PRIMARY KEY, filler TEXT)")
            added = await connection.exec_driver_sql("INSERT INTO scratch (filler) VALUES (hex(randomblob(4000)))")
            await session.commit()
        print(added.lastrowid, flush=True)  # noqa: T201 - the test reads it


if __name__ == "__main__":
    major, minor, patch = map(int, sys.argv[2].split("."))
    asyncio.run(write(Path(sys.argv[1]), (major, minor, patch)))
