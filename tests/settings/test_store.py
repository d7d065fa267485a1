"""Profiles, aliases and findings in a real database: changed, refused, and as they were if a change could not be saved."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.core.capabilities import Finding
from mlx_manager.core.errors import Conflict, NotFound, NotSaved
from mlx_manager.core.requests import GenerationRequest, RawPrompt, Reasoning, Sampling
from mlx_manager.settings.findings import Findings
from mlx_manager.settings.names import Alias, Names, Resolved
from mlx_manager.settings.profiles import Profile
from mlx_manager.settings.store import Register
from mlx_manager.storage.database import Database

HERE = frozenset({"m", "m:adapter", "other"})


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(tmp_path / "mlx-manager.db")
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def register(database: Database) -> Register:
    return await opened(database)


async def opened(database: Database) -> Register:
    register = Register(database)
    await register.open()
    return register


async def test_what_is_read_again_is_what_was_written(database: Database, register: Register) -> None:
    full = Profile(
        "m", "full", "a\nb", "adapter", "", Sampling(0.0, 0.5, 0, 0.0, 1.0, -2.0, 2.0, -(2**63)), 7, (), Reasoning(False, "none", 0), 9
    )
    empty = Profile("other", "empty")
    for profile in (full, empty):
        assert await register.add_profile(profile, HERE) == profile
    await register.add_alias(Alias("a/b:c", "m:full"), HERE)
    again = await opened(database)
    assert again.names == register.names == Names({"m:full": full, "other:empty": empty}, {"a/b:c": Alias("a/b:c", "m:full")})


async def test_a_snapshot_does_not_change(register: Register) -> None:
    before = register.names
    await register.add_alias(Alias("gpt-4o", "m"), HERE)
    assert before.resolve("gpt-4o") == Resolved("gpt-4o")
    assert register.names.resolve("gpt-4o") == Resolved("m")


async def test_of_many_changes_at_once_of_one_version_one_is_made(register: Register) -> None:
    await register.add_profile(Profile("m", "p"), HERE)
    edits = [register.change_profile(Profile("m", "p", description=str(n), version=1), HERE) for n in range(8)]
    results = await asyncio.gather(*edits, return_exceptions=True)
    (made,) = [result for result in results if isinstance(result, Profile)]
    assert register.profile("m:p") == made
    assert made.version == 2
    assert sum(isinstance(result, Conflict) for result in results) == 7
    with pytest.raises(Conflict):
        await register.remove_profile("m:p", 1)
    await register.remove_profile("m:p", 2)
    with pytest.raises(NotFound):
        register.profile("m:p")


async def test_a_name_is_free_again_once_it_is_deleted(register: Register) -> None:
    await register.add_alias(Alias("a", "m"), HERE)
    await register.change_alias(Alias("a", "other", 1), HERE)
    await register.remove_alias("a")
    assert await register.add_alias(Alias("a", "m"), HERE) == Alias("a", "m", 1)


async def test_a_change_that_cannot_be_saved_is_told_and_changes_nothing(tmp_path: Path, database: Database, register: Register) -> None:
    await register.add_profile(Profile("m", "p"), HERE)
    before = register.names
    async with database.session() as session:
        pages = (await (await session.connection()).exec_driver_sql("PRAGMA page_count")).scalar_one()
    full = Database(tmp_path / "mlx-manager.db")  # which may take no page more than it has
    limited = Register(full)
    await limited.open()
    async with full.session() as session:
        await (await session.connection()).exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(NotSaved, match="full") as refused:
        await limited.add_profile(Profile("m", "large", system_prompt="x" * 1_000_000), HERE)
    assert refused.value.is_full
    assert limited.names == before
    await limited.add_alias(Alias("small", "m"), HERE)
    await full.close()
    other = sqlite3.connect(tmp_path / "mlx-manager.db", timeout=0)
    other.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(NotSaved, match="locked") as locked:
            await register.add_profile(Profile("m", "q"), HERE)
    finally:
        other.close()
    assert not locked.value.is_full
    assert register.names == before
    await register.add_profile(Profile("m", "q"), HERE)


async def test_findings_are_replaced_as_a_whole_and_survive(database: Database) -> None:
    findings = Findings(database)
    await findings.open()
    assert findings.of("m") == {}
    seen, not_seen = Finding(True, "it did", "abc", 1), Finding(False, "it did not", "abc", 1)
    await findings.keep("m", {"tools": seen, "vision": not_seen})
    await findings.keep("other", {"tools": not_seen})
    await findings.keep("m", {"tools": not_seen, "thinking": seen})
    again = Findings(database)
    await again.open()
    for kept in (findings, again):
        assert kept.of("m") == {"tools": not_seen, "thinking": seen}
        assert kept.of("other") == {"tools": not_seen}


@given(st.dictionaries(st.sampled_from("abcd"), st.sampled_from("abcdem"), max_size=4), st.sampled_from("abcdem"))
def test_an_alias_is_followed_once_and_never_in_circles(aliases: dict[str, str], asked: str) -> None:
    names = Names({}, {name: Alias(name, target) for name, target in aliases.items()})
    assert names.resolve(asked) == Resolved(aliases.get(asked, asked))
    assert names.served(GenerationRequest(asked, (RawPrompt("x"),))).model == aliases.get(asked, asked)
