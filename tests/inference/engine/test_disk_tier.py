"""Real files; what stands in for a broken disk is the operating system's own function, failing."""

import errno
import hashlib
import json
import os
import queue
import random
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from safetensors.numpy import load, save

from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS, Digest
from mlx_manager.inference.engine.disk_tier import PAUSE_S, WRITE_ERRORS_BEFORE_PAUSE, DiskTier, StoredBlock

FINGERPRINT = "5f" * 16
PATIENCE_S = 10.0
LARGE = 1 << 30


def digest(number: int) -> Digest:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def block(number: int, num_bytes: int = 4096, dtype: str = "uint16") -> StoredBlock:
    """Different bytes for different numbers."""
    data = np.random.default_rng(number).integers(0, 256, num_bytes // 2, dtype=np.uint8)
    arrays = {f"{name}.{layer}": data.view(dtype).reshape(2, -1) for layer, name in enumerate(("keys", "values"))}
    return StoredBlock(tuple(range(number, number + BLOCK_TOKENS)), digest(number - 1), arrays)


def same(a: StoredBlock | None, b: StoredBlock) -> bool:
    return (
        a is not None
        and (a.tokens, a.parent, set(a.arrays)) == (b.tokens, b.parent, set(b.arrays))
        and all(
            x.dtype == b.arrays[name].dtype and x.shape == b.arrays[name].shape and x.tobytes() == b.arrays[name].tobytes()
            for name, x in a.arrays.items()
        )
    )


@contextmanager
def tier(folder: Path, **options: Any) -> Iterator[DiskTier]:
    """A running tier, which has looked at what is there."""
    tier = DiskTier(folder, **{"fingerprint": FINGERPRINT, "max_bytes": LARGE, "min_free_bytes": 0} | options)
    tier.start()
    try:
        assert fetch(tier, b"\0" * 16) is None
        yield tier
    finally:
        tier.stop()


def fetch(tier: DiskTier, digest: Digest) -> StoredBlock | None:
    answers: queue.SimpleQueue[StoredBlock | None] = queue.SimpleQueue()
    tier.fetch(digest, answers.put)
    return answers.get(timeout=PATIENCE_S)


@contextmanager
def busy(tier: DiskTier) -> Iterator[None]:
    """The tier's thread is held up, as by a slow disk."""
    is_held, goes_on = threading.Event(), threading.Event()

    def hold(_: StoredBlock | None) -> None:
        is_held.set()
        assert goes_on.wait(PATIENCE_S)

    tier.fetch(b"\0" * 16, hold)
    assert is_held.wait(PATIENCE_S)
    try:
        yield
    finally:
        goes_on.set()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.001)


def put_and_wait(tier: DiskTier, number: int, stored: StoredBlock | None = None) -> None:
    before = tier.counters.written + tier.counters.dropped
    assert tier.put(digest(number), block(number) if stored is None else stored)
    wait_until(lambda: tier.counters.written + tier.counters.dropped > before)


def file_of(folder: Path, number: int) -> Path:
    return folder / FINGERPRINT / f"{digest(number).hex()}.safetensors"


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / FINGERPRINT).iterdir()}


def stored_file(folder: Path, number: int = 1) -> Path:
    """One block's file, left by a tier that has stopped."""
    with tier(folder) as before:
        put_and_wait(before, number)
    return file_of(folder, number)


@contextmanager
def failing(name: str, error: int) -> Iterator[None]:
    """The operating system's function `name` raises `error`, on the tier's thread."""
    real = getattr(os, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == "kv-disk":
            raise OSError(error, os.strerror(error))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, fail)
        yield


# ---- what is kept


@pytest.mark.parametrize("dtype", ["float32", "uint16", "float16"])
def test_a_block_comes_back_as_it_was(tmp_path: Path, dtype: str) -> None:
    with tier(tmp_path) as disk:
        put_and_wait(disk, 1, block(1, dtype=dtype))
        assert same(fetch(disk, digest(1)), block(1, dtype=dtype))
        assert (disk.counters.written, disk.counters.read, disk.counters.blocks) == (1, 1, 1)
        assert disk.counters.bytes == file_of(tmp_path, 1).stat().st_size


ARRAYS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.sampled_from(["uint16", "float32", "float16", "uint8", "int64", ">f4", "bool"]).flatmap(
        lambda dtype: st_numpy.arrays(dtype, st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(
    arrays=ARRAYS, tokens=st.lists(st.integers(0, 2**31 - 1), min_size=BLOCK_TOKENS, max_size=BLOCK_TOKENS), parent=st.binary(max_size=16)
)
def test_any_block_comes_back(tmp_path_factory: pytest.TempPathFactory, arrays: Any, tokens: list[int], parent: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    stored = StoredBlock(tuple(tokens), parent, arrays)
    with tier(folder) as disk:
        put_and_wait(disk, 1, stored)
        answer = fetch(disk, digest(1))
    shutil.rmtree(folder)
    little = {name: array.astype(array.dtype.newbyteorder("<")) for name, array in arrays.items()}
    assert same(answer, StoredBlock(stored.tokens, parent, little))


def test_arrays_that_are_not_contiguous_are_stored_by_their_values(tmp_path: Path) -> None:
    whole = np.arange(96, dtype=np.float32).reshape(4, 6, 4)
    views = {"turned": whole.transpose(2, 0, 1), "every second": whole[::2, 1:], "backwards": whole[:, ::-1]}
    with tier(tmp_path) as disk:
        put_and_wait(disk, 1, StoredBlock(block(1).tokens, digest(0), views))
        answer = fetch(disk, digest(1))
    assert answer is not None
    assert all(np.array_equal(answer.arrays[name], view) for name, view in views.items())


def test_a_restart_keeps_blocks(tmp_path: Path) -> None:
    stored_file(tmp_path)
    with tier(tmp_path) as disk:
        assert digest(1) in disk
        assert digest(2) not in disk
        assert (disk.counters.blocks, disk.counters.written) == (1, 0)
        assert same(fetch(disk, digest(1)), block(1))


def test_what_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    with tier(tmp_path) as disk:
        put_and_wait(disk, 1)
        assert not disk.put(digest(1), block(1))
        with busy(disk):
            assert disk.put(digest(2), block(2))
            assert not disk.put(digest(2), block(2))
    assert (disk.counters.written, disk.counters.dropped) == (2, 0)


def test_a_block_put_before_the_files_are_known_is_not_written_again(tmp_path: Path) -> None:
    stored_file(tmp_path)
    disk = DiskTier(tmp_path, fingerprint=FINGERPRINT, max_bytes=LARGE, min_free_bytes=0)
    assert disk.put(digest(1), block(1))
    disk.start()
    disk.stop()
    assert (disk.counters.written, disk.counters.dropped, disk.counters.blocks) == (0, 0, 1)


def test_stop_writes_what_is_queued(tmp_path: Path) -> None:
    with tier(tmp_path) as disk:
        with busy(disk):
            assert all(disk.put(digest(n), block(n)) for n in range(20))
            assert disk.counters.written == 0
        disk.stop()
        assert disk.counters.written == 20
    assert len(files(tmp_path)) == 20


def test_stop_takes_a_bounded_time(tmp_path: Path) -> None:
    now = 0.0
    with tier(tmp_path, clock=lambda: now) as disk:
        with busy(disk):
            assert all(disk.put(digest(n), block(n)) for n in range(5))
            stopping = threading.Thread(target=disk.stop)
            stopping.start()
            wait_until(lambda: not disk.put(digest(9), block(9)))
            now = 1000.0
        stopping.join(PATIENCE_S)
        assert not stopping.is_alive()
    assert (disk.counters.written, disk.counters.dropped) == (0, 6)


def test_every_fetch_is_answered_once_also_around_the_end(tmp_path: Path) -> None:
    stored_file(tmp_path)
    answers: list[StoredBlock | None] = []
    with tier(tmp_path) as disk:
        with busy(disk):
            disk.fetch(digest(1), answers.append)
            stopping = threading.Thread(target=disk.stop)
            stopping.start()
            wait_until(lambda: not disk.put(digest(2), block(2)))
        stopping.join(PATIENCE_S)
        assert answers == [None]
        disk.fetch(digest(1), answers.append)
        assert answers == [None, None]
    never_started = DiskTier(tmp_path, fingerprint=FINGERPRINT, max_bytes=LARGE)
    never_started.fetch(digest(1), answers.append)
    assert never_started.put(digest(3), block(3))
    never_started.stop()
    assert answers == [None, None, None]
    assert never_started.counters.dropped == 1


# ---- order


def test_a_block_that_is_still_to_be_written_is_answered_from_the_queue(tmp_path: Path) -> None:
    answers: list[tuple[StoredBlock | None, int]] = []
    with tier(tmp_path) as disk:
        with busy(disk):
            assert disk.put(digest(1), block(1))
            assert disk.put(digest(2), block(2))
            assert digest(2) in disk
            disk.fetch(digest(2), lambda answer: answers.append((answer, disk.counters.written)))
        wait_until(lambda: disk.counters.written == 2)
    [(answer, num_written)] = answers
    assert same(answer, block(2))
    assert num_written == 0, "reads come before writes"
    assert disk.counters.read == 0


def test_reads_are_answered_in_the_order_they_were_asked_for(tmp_path: Path) -> None:
    answers: list[int] = []
    with tier(tmp_path) as disk:
        with busy(disk):
            for n in range(5):
                disk.fetch(digest(n), lambda _, n=n: answers.append(n))
        assert fetch(disk, digest(9)) is None
    assert answers == [0, 1, 2, 3, 4]


def test_a_full_queue_refuses_and_holds_nobody_up(tmp_path: Path) -> None:
    with tier(tmp_path, max_queued_bytes=10_000) as disk:
        with busy(disk):
            assert [disk.put(digest(n), block(n, 4096)) for n in range(4)] == [True, True, False, False]
            assert digest(2) not in disk
            assert disk.counters.dropped == 2
        wait_until(lambda: disk.counters.written == 2)
        assert disk.put(digest(2), block(2, 4096)), "there is room again"
        assert not disk.put(digest(3), block(3, 12_000)), "it would never fit"


def test_a_callback_that_raises_harms_nobody_else(tmp_path: Path) -> None:
    def fail(_: StoredBlock | None) -> None:
        raise RuntimeError("the caller's own fault")

    with tier(tmp_path) as disk:
        disk.fetch(digest(1), fail)
        put_and_wait(disk, 1)
        assert same(fetch(disk, digest(1)), block(1))


def test_a_block_that_cannot_be_expressed_is_dropped(tmp_path: Path) -> None:
    with tier(tmp_path) as disk:
        put_and_wait(disk, 1, StoredBlock(block(1).tokens, digest(0), {"a": np.array([object()])}))
        assert disk.counters.dropped == 1
        assert digest(1) not in disk
        put_and_wait(disk, 2)
        assert same(fetch(disk, digest(2)), block(2))


# ---- how much


def test_the_least_recently_used_goes_when_there_are_too_many_bytes(tmp_path: Path) -> None:
    size = stored_file(tmp_path / "measure").stat().st_size
    with tier(tmp_path, max_bytes=3 * size + size // 2) as disk:
        for n in (1, 2, 3):
            put_and_wait(disk, n)
        assert fetch(disk, digest(1)) is not None  # a read is a use
        assert not disk.put(digest(2), block(2))  # and so is being evicted from memory again
        put_and_wait(disk, 4)
        assert [digest(n) in disk for n in (1, 2, 3, 4)] == [True, True, False, True]
        assert not file_of(tmp_path, 3).exists()
        assert fetch(disk, digest(3)) is None
        assert (disk.counters.evicted, disk.counters.blocks) == (1, 3)
        assert disk.counters.bytes <= 3 * size + size // 2


def test_what_was_used_last_is_known_after_a_restart(tmp_path: Path) -> None:
    with tier(tmp_path) as disk:
        for n in (1, 2, 3):
            put_and_wait(disk, n)
        assert fetch(disk, digest(1)) is not None
    size = file_of(tmp_path, 1).stat().st_size
    with tier(tmp_path, max_bytes=2 * size + size // 2) as disk:
        assert [digest(n) in disk for n in (1, 2, 3)] == [True, False, True]
        put_and_wait(disk, 4)
        assert [digest(n) in disk for n in (1, 3, 4)] == [True, False, True]


def test_a_block_larger_than_everything_evicts_nothing(tmp_path: Path) -> None:
    with tier(tmp_path, max_bytes=10_000) as disk:
        put_and_wait(disk, 1)
        put_and_wait(disk, 2, block(2, 20_000))
        assert digest(1) in disk
        assert digest(2) not in disk
        assert (disk.counters.dropped, disk.counters.evicted) == (1, 0)


def test_the_volume_is_not_filled(tmp_path: Path) -> None:
    with tier(tmp_path, min_free_bytes=1 << 62) as disk:
        put_and_wait(disk, 1)
        assert digest(1) not in disk
        assert (disk.counters.dropped, disk.counters.io_errors) == (1, 0)
    assert files(tmp_path) == set()


# ---- a disk that fails


@pytest.mark.parametrize(("function", "error"), [("write", errno.ENOSPC), ("replace", errno.EIO), ("open", errno.EMFILE)])
def test_a_write_that_fails_costs_that_block_only(tmp_path: Path, function: str, error: int) -> None:
    with tier(tmp_path) as disk:
        with failing(function, error):
            put_and_wait(disk, 1)
        assert digest(1) not in disk
        assert (disk.counters.dropped, disk.counters.io_errors, disk.counters.blocks) == (1, 1, 0)
        assert files(tmp_path) == set(), "no half of a file stays"
        put_and_wait(disk, 1)
        assert same(fetch(disk, digest(1)), block(1))


def test_a_disk_that_writes_a_little_at_a_time_gets_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:1000]))
    with tier(tmp_path) as disk:
        put_and_wait(disk, 1)
        assert same(fetch(disk, digest(1)), block(1))


def test_after_several_errors_writing_pauses_and_reading_goes_on(tmp_path: Path) -> None:
    now = 0.0
    with tier(tmp_path, clock=lambda: now) as disk:
        put_and_wait(disk, 0)
        with failing("write", errno.ENOSPC):
            with busy(disk):
                assert all(disk.put(digest(n), block(n)) for n in range(1, WRITE_ERRORS_BEFORE_PAUSE + 3))
            wait_until(lambda: disk.counters.dropped == WRITE_ERRORS_BEFORE_PAUSE + 2)
            assert disk.counters.io_errors == WRITE_ERRORS_BEFORE_PAUSE, "the queue is not tried in vain"
            assert not disk.put(digest(9), block(9))
            assert same(fetch(disk, digest(0)), block(0))
            now = PAUSE_S + 1
            put_and_wait(disk, 9)
            assert same(fetch(disk, digest(0)), block(0))
            assert not disk.put(digest(8), block(8)), "still failing: the next pause comes at once"
        now = 2 * PAUSE_S + 2
        put_and_wait(disk, 9)
        assert same(fetch(disk, digest(9)), block(9))


def test_errors_with_successes_in_between_do_not_pause_writing(tmp_path: Path) -> None:
    with tier(tmp_path) as disk:
        for _ in range(2 * WRITE_ERRORS_BEFORE_PAUSE):
            with failing("write", errno.ENOSPC):
                put_and_wait(disk, 1)
            put_and_wait(disk, disk.counters.written + 2)
        assert disk.counters.written == disk.counters.io_errors == 2 * WRITE_ERRORS_BEFORE_PAUSE


def test_a_read_that_fails_is_a_miss_and_the_block_can_be_written_again(tmp_path: Path) -> None:
    with tier(tmp_path) as disk:
        put_and_wait(disk, 1)
        with failing("open", errno.EIO):
            assert fetch(disk, digest(1)) is None
        assert (disk.counters.io_errors, disk.counters.corrupt) == (1, 0)
        put_and_wait(disk, 1)
        assert same(fetch(disk, digest(1)), block(1))


def test_a_cache_folder_that_somebody_empties_fills_again(tmp_path: Path) -> None:
    with tier(tmp_path / "cache") as disk:
        put_and_wait(disk, 1)
        shutil.rmtree(tmp_path / "cache")
        assert fetch(disk, digest(1)) is None
        assert digest(1) not in disk
        put_and_wait(disk, 1)
        assert same(fetch(disk, digest(1)), block(1))
        assert disk.counters.io_errors == 0


def test_a_folder_that_cannot_be_made_makes_everything_a_miss(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with tier(tmp_path / "file") as disk:
        put_and_wait(disk, 1)
        assert fetch(disk, digest(1)) is None
        assert disk.counters.dropped == 1
        assert disk.counters.io_errors > 0


# ---- files that are not what they should be

Damage = Callable[[Path], None]


def rewrite(path: Path, change: Callable[[dict[str, str], dict[str, np.ndarray]], None]) -> None:
    data = path.read_bytes()
    arrays = {name: array.copy() for name, array in load(data).items()}
    metadata: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    change(metadata, arrays)
    path.write_bytes(save(arrays, metadata))


def with_metadata(**values: str) -> Damage:
    return lambda path: rewrite(path, lambda metadata, arrays: metadata.update(values))


def with_header(header: bytes, length: int | None = None) -> Damage:
    return lambda path: path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + b"\0" * 64)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)


def tear(path: Path) -> None:
    """What a power cut leaves: the length is right, the end never came."""
    data = path.read_bytes()
    path.write_bytes(data[:2000] + b"\0" * (len(data) - 2000))


def entry(**values: object) -> Mapping[str, object]:
    return {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]} | values


def described(**tensors: Mapping[str, object]) -> Damage:
    metadata = {"format": "1", "fingerprint": FINGERPRINT, "digest": digest(1).hex(), "parent": "", "tokens": "1", "checksum": "0"}
    return with_header(json.dumps({"__metadata__": metadata} | tensors).encode())


CORRUPT: dict[str, Damage] = {
    "empty": lambda path: path.write_bytes(b""),
    "a few bytes": lambda path: path.write_bytes(b"abc"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "torn": tear,
    "one bit": flip_a_bit,
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "much too long": lambda path: os.truncate(path, 1 << 40),
    "a header of 8 EiB": with_header(b"{}", (1 << 63) - 1),
    "no header": with_header(b""),
    "deep nesting": with_header(b"[" * 500_000),
    "a header that is a list": with_header(b"[1]"),
    "a header that is not text": with_header(b"\xff\xfe{}"),
    "elements beyond counting": described(a=entry(shape=[1 << 40, 1 << 40])),
    "more elements than bytes": described(a=entry(shape=[65])),
    "offsets outside": described(a=entry(data_offsets=[0, 1 << 50])),
    "offsets backwards": described(a=entry(data_offsets=[64, 0])),
    "overlapping arrays": described(a=entry(), b=entry()),
    "an unknown type": described(a=entry(dtype="PICKLE")),
    "a type that the caller has not": described(a=entry(dtype="BF16", shape=[32])),
    "another digest": with_metadata(digest=digest(2).hex()),
    "other tokens": with_metadata(tokens=" ".join(["7"] * BLOCK_TOKENS)),
    "too few tokens": with_metadata(tokens="1 2 3"),
    "tokens that are no numbers": with_metadata(tokens=" ".join(["x"] * BLOCK_TOKENS)),
    "another parent": with_metadata(parent=digest(5).hex()),
    "another checksum": with_metadata(checksum="00000000"),
    "no checksum": lambda path: rewrite(path, lambda metadata, arrays: metadata.pop("checksum") and None),
    "an array more": lambda path: rewrite(path, lambda metadata, arrays: arrays.update(c=np.zeros(1))),
    "another shape": lambda path: rewrite(path, lambda metadata, arrays: arrays.update({"keys.0": arrays["keys.0"].reshape(-1)})),
    "another type": lambda path: rewrite(path, lambda metadata, arrays: arrays.update({"keys.0": arrays["keys.0"].view(np.float16)})),
}


def test_a_file_is_what_the_format_of_its_name_says(tmp_path: Path) -> None:
    """It can be read and made with the format's own library; so what the damages below change is what makes a file corrupt."""
    path = stored_file(tmp_path)
    assert same(StoredBlock(block(1).tokens, block(1).parent, load(path.read_bytes())), block(1))
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    rewrite(path, lambda metadata, arrays: None)
    with tier(tmp_path) as disk:
        assert same(fetch(disk, digest(1)), block(1))


@pytest.mark.parametrize("damage", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_corrupt_file_is_a_miss_and_is_deleted(tmp_path: Path, damage: Damage) -> None:
    path = stored_file(tmp_path)
    damage(path)
    with tier(tmp_path) as disk:
        assert fetch(disk, digest(1)) is None
        assert digest(1) not in disk
        assert not path.exists()
        assert (disk.counters.corrupt, disk.counters.blocks, disk.counters.bytes, disk.counters.io_errors) == (1, 0, 0, 0)
        put_and_wait(disk, 1)
        assert same(fetch(disk, digest(1)), block(1))


def test_a_file_under_the_name_of_another_block_is_not_taken_for_it(tmp_path: Path) -> None:
    shutil.copy(stored_file(tmp_path), file_of(tmp_path, 2))
    with tier(tmp_path) as disk:
        assert fetch(disk, digest(2)) is None
        assert not file_of(tmp_path, 2).exists()
        assert same(fetch(disk, digest(1)), block(1))


@pytest.mark.parametrize("num_bytes", [0, 1 << 40])
def test_a_file_of_an_impossible_size_is_never_found_nor_displaces_others(tmp_path: Path, num_bytes: int) -> None:
    stored_file(tmp_path, 2)
    os.truncate(stored_file(tmp_path, 1), num_bytes)
    with tier(tmp_path) as disk:
        assert digest(1) not in disk
        assert digest(2) in disk
        os.truncate(file_of(tmp_path, 2), num_bytes)  # while it runs
        assert fetch(disk, digest(2)) is None
        assert (disk.counters.corrupt, disk.counters.evicted) == (2, 0)


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FOREIGN: dict[str, Damage] = {
    "another format version": with_metadata(format="2"),
    "another fingerprint": with_metadata(fingerprint="00" * 16),
    "somebody else's safetensors": lambda path: path.write_bytes(save({"a": np.zeros(3)})),
    "a link": replace_by_link,
    "a pipe": replace_by_pipe,
}


@pytest.mark.parametrize("damage", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_that_is_not_ours_is_a_miss_and_stays(tmp_path: Path, damage: Damage) -> None:
    path = stored_file(tmp_path)
    damage(path)
    with tier(tmp_path) as disk:
        assert fetch(disk, digest(1)) is None
        assert digest(1) not in disk
        assert os.path.lexists(path)
        assert (disk.counters.corrupt, disk.counters.blocks, disk.counters.io_errors) == (0, 0, 0)
        put_and_wait(disk, 1)  # the name is ours all the same
        assert same(fetch(disk, digest(1)), block(1))
        assert stat.S_ISREG(path.lstat().st_mode)
    if (target := path.with_name("elsewhere")).exists():
        assert target.stat().st_size > 4096, "nothing is written through a link"


def test_another_fingerprint_has_a_folder_of_its_own(tmp_path: Path) -> None:
    path = stored_file(tmp_path)
    with tier(tmp_path, fingerprint="a-b.c") as disk:
        assert digest(1) not in disk
        assert fetch(disk, digest(1)) is None
        put_and_wait(disk, 1, block(2))
    assert path.exists()
    with tier(tmp_path) as disk:
        assert same(fetch(disk, digest(1)), block(1))


@pytest.mark.parametrize("fingerprint", ["", ".", "..", "../x", "a/b", "a\0", ".hidden", "x" * 129])
def test_a_fingerprint_that_is_no_folder_name_is_refused(tmp_path: Path, fingerprint: str) -> None:
    with pytest.raises(ValueError, match="fingerprint"):
        DiskTier(tmp_path, fingerprint=fingerprint, max_bytes=1)


def test_left_overs_of_a_crash_are_removed_and_strangers_stay(tmp_path: Path) -> None:
    home = stored_file(tmp_path).parent
    left_over = home / f"{digest(2).hex()}.k3x_9ab1.tmp"
    strangers = [
        home / name for name in ("notes.txt", "x.tmp", f"{digest(3).hex()}.safetensors.bak", f"{digest(4).hex().upper()}.safetensors")
    ]
    for path in [left_over, *strangers]:
        path.write_bytes(b"123")
    folder = file_of(tmp_path, 5)
    folder.mkdir()
    with tier(tmp_path) as disk:
        assert not left_over.exists()
        assert all(path.exists() for path in strangers)
        assert disk.counters.blocks == 1
        assert fetch(disk, digest(5)) is None
        put_and_wait(disk, 5)
        assert disk.counters.dropped == 1, "a folder is in the way"
    assert folder.is_dir()


def test_a_link_in_the_place_of_our_folder_is_not_followed(tmp_path: Path) -> None:
    stored_file(tmp_path / "real")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / FINGERPRINT).symlink_to(tmp_path / "real" / FINGERPRINT)
    with tier(tmp_path / "cache") as disk:
        assert digest(1) not in disk
        put_and_wait(disk, 2)
        assert disk.counters.dropped == 1
    assert len(files(tmp_path / "real")) == 1


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = stored_file(tmp_path / "deep" / "cache")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path, path.parent, path.parent.parent)] == [0o600, 0o700, 0o700]


# ---- many at once


def test_two_tiers_on_one_folder_never_give_a_wrong_block(tmp_path: Path) -> None:
    """As two processes do: each knows nothing of the other but its files."""
    size = stored_file(tmp_path / "measure").stat().st_size
    numbers, wrong, num_hits = range(24), [], []

    def hammer(disk: DiskTier, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(150):
            number = dice.choice(numbers)
            if dice.random() < 0.5:
                disk.put(digest(number), block(number))
            elif (answer := fetch(disk, digest(number))) is not None:
                (num_hits if same(answer, block(number)) else wrong).append(number)

    with tier(tmp_path, max_bytes=10 * size) as one, tier(tmp_path, max_bytes=10 * size) as other:
        threads = [threading.Thread(target=hammer, args=(disk, i)) for i, disk in enumerate((one, one, other, other))]
        for thread in threads:
            thread.start()
        for _ in range(5):  # others come and go meanwhile
            with tier(tmp_path, max_bytes=10 * size):
                pass
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(num_hits) > 20
    for disk in (one, other):
        assert disk.counters.corrupt == 0
        assert 0 < disk.counters.blocks <= 10
        assert disk.counters.bytes <= 10 * size
    with tier(tmp_path, max_bytes=10 * size) as disk:
        assert disk.counters.blocks == len(files(tmp_path)) <= 10


def test_one_tier_used_by_many_threads_loses_count_of_nothing(tmp_path: Path) -> None:
    num_accepted, num_refused, num_answers = [], [], []

    def hammer(seed: int) -> None:
        dice = random.Random(seed)
        for i in range(100):
            number = seed * 1000 + i
            (num_accepted if disk.put(digest(number), block(number, 512)) else num_refused).append(number)
            disk.fetch(digest(seed * 1000 + dice.randrange(i + 1)), num_answers.append)

    with tier(tmp_path, max_queued_bytes=20_000) as disk:
        threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: disk.counters.written == len(num_accepted) and len(num_answers) == 600)
    assert disk.counters.dropped == len(num_refused)
    assert disk.counters.blocks == len(num_accepted) == len(files(tmp_path))
    assert disk.counters.bytes == sum(path.stat().st_size for path in (tmp_path / FINGERPRINT).iterdir())
    assert not any(answer is not None and len(answer.arrays) != 2 for answer in num_answers)
