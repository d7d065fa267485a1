"""Loading: once for all who wait, told to all when it fails, tried again when it is asked for again."""

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

from mlx_manager.core.errors import Conflict, EngineFault, ModelLoadFailed, ModelNotFound
from mlx_manager.hub.checkpoint import Checkpoint, read
from mlx_manager.hub.local import find_models
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.sequence import SequenceSpec
from mlx_manager.inference.loader import EngineLimits
from mlx_manager.inference.local_model import LocalModel
from mlx_manager.inference.pool import Pool
from tests.inference.fixture_models import GREEDY, folder, receive, within


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with one model, named `tiny`."""
    shutil.copytree(folder("qwen3"), tmp_path / "tiny")
    return tmp_path


def pool_of(device: Device, models: Path) -> Pool:
    return Pool(device, lambda: list(find_models([models], None).models), EngineLimits())


def pool_that_trusts(device: Device, checkpoint: Checkpoint) -> Pool:
    """The catalogue was made before the files went bad."""
    return Pool(device, lambda: [checkpoint], EngineLimits())


async def borrow(pool: Pool) -> LocalModel:
    async with pool.lend("tiny") as model:
        return model


def state(pool: Pool) -> str:
    (status,) = pool.statuses()
    return status.state


def break_weights(models: Path) -> bytes:
    weights = models / "tiny" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    return whole


@pytest.mark.requirement("SRV-02", "P.4")
async def test_eight_cold_requests_load_a_model_once(device: Device, models: Path) -> None:
    pool = pool_of(device, models)
    assert state(pool) == "cold"
    borrowed = await within(asyncio.gather(*(borrow(pool) for _ in range(8))))
    assert len({id(model.engine) for model in borrowed}) == 1
    assert state(pool) == "ready"
    assert list(pool.engines()) == ["tiny"]
    (result,) = await within(receive(borrowed[0].engine, [SequenceSpec((310, 320), 4, GREEDY)]))
    assert len(result.tokens) == 4
    assert pool.statuses()[0].load_s is not None


@pytest.mark.requirement("BUGFIX-06")
async def test_weights_that_cannot_be_read_fail_all_who_wait_and_load_once_repaired(device: Device, models: Path) -> None:
    pool = pool_that_trusts(device, read(models / "tiny", "tiny"))
    whole = break_weights(models)
    failures = await within(asyncio.gather(*(borrow(pool) for _ in range(8)), return_exceptions=True))
    assert {type(failure) for failure in failures} == {ModelLoadFailed}
    (message,) = {str(failure) for failure in failures}
    assert "weights" in message
    assert str(models) not in message, "no path of ours"
    assert state(pool) == "failed"
    assert pool.statuses()[0].error is not None
    assert pool.engines() == {}

    (models / "tiny" / "model.safetensors").write_bytes(whole)
    await within(borrow(pool))
    assert (state(pool), pool.statuses()[0].error) == ("ready", None)


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json"])
async def test_a_tokenizer_or_configuration_that_cannot_be_read_fails_and_is_read_again(device: Device, models: Path, file: str) -> None:
    pool = pool_that_trusts(device, read(models / "tiny", "tiny"))
    path = models / "tiny" / file
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    failures = await within(asyncio.gather(*(pool.dialect("tiny") for _ in range(4)), borrow(pool), return_exceptions=True))
    assert {type(failure) for failure in failures} == {ModelLoadFailed}
    assert state(pool) == "failed"
    path.write_bytes(whole)
    await within(borrow(pool))
    assert state(pool) == "ready"


async def test_waiters_that_leave_harm_nobody(device: Device, models: Path) -> None:
    pool = pool_of(device, models)
    waiters = [asyncio.create_task(borrow(pool)) for _ in range(4)]
    await asyncio.sleep(0)
    assert state(pool) == "loading"
    for waiter in waiters[:3]:
        waiter.cancel()
    assert (await within(waiters[3])).engine is pool.engines()["tiny"]
    assert [waiter.cancelled() for waiter in waiters] == [True, True, True, False]


async def test_a_model_is_loaded_to_its_end_though_all_have_left(device: Device, models: Path) -> None:
    pool = pool_of(device, models)
    waiter = asyncio.create_task(borrow(pool))
    await asyncio.sleep(0)
    waiter.cancel()
    async with asyncio.timeout(20):
        while state(pool) == "loading":  # noqa: ASYNC110 - nobody is left to be told
            await asyncio.sleep(0.01)
    assert state(pool) == "ready"


async def test_a_failure_of_which_nobody_is_left_to_hear_is_remembered(device: Device, models: Path) -> None:
    pool = pool_that_trusts(device, read(models / "tiny", "tiny"))
    break_weights(models)
    waiter = asyncio.create_task(borrow(pool))
    await asyncio.sleep(0)
    waiter.cancel()
    async with asyncio.timeout(20):
        while state(pool) == "loading":  # noqa: ASYNC110 - nobody is left to be told
            await asyncio.sleep(0.01)
    assert state(pool) == "failed"


@pytest.mark.requirement("API-04")
async def test_models_that_are_put_there_or_taken_away_are_noticed(device: Device, models: Path) -> None:
    pool = pool_of(device, models)
    with pytest.raises(ModelNotFound, match="tiny") as unknown:
        await pool.dialect("another")
    assert unknown.value.model == "another"
    shutil.copytree(models / "tiny", models / "another")
    await within(pool.dialect("another"))
    await within(borrow(pool))
    shutil.rmtree(models / "tiny")
    shutil.rmtree(models / "another")
    await pool.refresh()
    assert [status.checkpoint.id for status in pool.statuses()] == ["tiny"], "what is loaded stays"
    await within(borrow(pool))


async def test_a_model_whose_files_are_about_to_go_is_not_loaded(device: Device, models: Path) -> None:
    pool = pool_of(device, models)
    with pool.withheld("tiny"), pytest.raises(Conflict, match="is being deleted"):
        await within(borrow(pool))
    assert state(pool) == "cold"
    await within(borrow(pool))
    with pytest.raises(Conflict, match="unload it first"), pool.withheld("tiny"):
        pass


async def test_what_a_model_reads_and_writes_is_known_without_its_weights(device: Device, models: Path) -> None:
    pool = pool_that_trusts(device, read(models / "tiny", "tiny"))
    (models / "tiny" / "model.safetensors").unlink()
    first, second = await within(asyncio.gather(pool.dialect("tiny"), pool.dialect("tiny")))
    assert first is second
    assert state(pool) == "cold"


async def test_who_waits_for_a_load_is_told_when_the_server_ends(device: Device, models: Path) -> None:
    pool = pool_of(device, models)
    goes_on = threading.Event()

    def hold_up() -> None:
        goes_on.wait(20)

    device.post(hold_up)  # the load has to wait for it
    waiters = [asyncio.create_task(borrow(pool)) for _ in range(2)]
    async with asyncio.timeout(20):
        while state(pool) != "loading":  # noqa: ASYNC110 - it says so by its state alone
            await asyncio.sleep(0.01)
    await asyncio.sleep(0)
    pool.abort(EngineFault("The server is shutting down."))
    pool.abort(EngineFault("The server is shutting down."))
    told = await within(asyncio.gather(*waiters, return_exceptions=True))
    goes_on.set()
    assert [str(error) for error in told] == ["The server is shutting down."] * 2
    assert all(isinstance(error, EngineFault) for error in told)
    async with asyncio.timeout(20):
        while state(pool) != "ready":  # noqa: ASYNC110 - the load went on
            await asyncio.sleep(0.01)
