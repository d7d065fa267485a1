"""Rows of tokens → vectors, in small batches, so that everything else that runs on the device has its turns in between."""

import asyncio
import bisect
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mlx_manager.core.errors import EngineFault
from mlx_manager.core.vectors import Embeddings, Ranking
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.pace import Pace
from mlx_manager.inference.text_reader import Prepared, Row, TextReader

log = logging.getLogger(__name__)

MAX_PADDING = 64
"""Columns, of any row: padding is computed for nothing. ModernBERT also needs it so: with a window of 64 to each side, a padding column
further away from its text would see nothing at all, which in float16 is no number."""


class ForwardPass(Protocol):
    """What an `Embedder` needs of an `Encoder`."""

    def wait(self) -> None: ...
    def __call__(self, tokens: np.ndarray, mask: np.ndarray, types: np.ndarray) -> np.ndarray: ...


@dataclass(eq=False, slots=True)
class Job:
    """The rows of one request. `order` has those that are not computed yet, shortest first. Owned by the device thread, but for
    `abandoned`: nobody waits for it any more."""

    rows: Sequence[Row]
    answer: "asyncio.Future[list[np.ndarray]]"
    vectors: list[np.ndarray | None] = field(init=False)
    order: list[int] = field(init=False)
    num_left: int = field(init=False)
    abandoned: bool = False

    def __post_init__(self) -> None:
        self.vectors = [None] * len(self.rows)
        self.num_left = len(self.rows)
        self.order = sorted(range(len(self.rows)), key=self.length)

    def length(self, row: int) -> int:
        return len(self.rows[row].tokens)


def next_batch(jobs: Sequence[Job], budget: int) -> list[tuple[Job, int]]:
    """The longest row of the first job and what goes with it: rows not much shorter, its own first, so many that the padded batch has at
    most `budget` tokens; one row is taken whatever it has. Takes them from the jobs' `order`."""
    first = jobs[0]
    longest = first.length(first.order[-1])
    most = max(1, budget // longest)
    batch: list[tuple[Job, int]] = []
    for job in jobs:
        end = bisect.bisect_right(job.order, longest, key=job.length)
        start = max(bisect.bisect_left(job.order, longest - MAX_PADDING, key=job.length), end - (most - len(batch)))
        batch += [(job, row) for row in job.order[start:end]]
        del job.order[start:end]
    return batch


class Embedder:
    """One model's. `run` and `abort` are for the event loop; the rest belongs to the device thread, which gives it its turns."""

    def __init__(self, device: Device, forward: ForwardPass, pace: Pace) -> None:
        self._device = device
        self._forward = forward
        self._pace = pace
        self._jobs: list[Job] = []
        self._under_way: set[Job] = set()  # the event loop's

    @property
    def num_running(self) -> int:
        """Requests."""
        return len(self._under_way)

    async def run(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """A vector for each row, in their order. Cancelling it frees the rest of its turns. Raises `EngineFault`."""
        job = Job(rows, asyncio.get_running_loop().create_future())
        if not self._device.post(lambda: self._jobs.append(job)):
            raise EngineFault("The server is shutting down.")
        self._under_way.add(job)
        try:
            return await job.answer
        finally:
            job.abandoned = True
            self._under_way.discard(job)

    def abort(self, error: EngineFault) -> None:
        """Ends every request under way with `error`."""
        for job in self._under_way:
            _settle(job, error)

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def step(self) -> None:
        """One batch. The jobs lead in turn."""
        self._jobs = [job for job in self._jobs if not job.abandoned]
        if not self._jobs:
            return
        batch = next_batch(self._jobs, self._pace.budget(num_decoding=1, num_prefilling=0))
        leading = self._jobs.pop(0)
        self._jobs = [job for job in [*self._jobs, leading] if job.order]
        try:
            vectors = self._compute([job.rows[row] for job, row in batch])
        except Exception as error:
            log.exception("a batch of texts failed; the requests that it served are told")
            fault = EngineFault("The engine failed while it was working on this request.")
            fault.__cause__ = error
            for job in {job for job, _ in batch}:
                job.abandoned = True
                self._tell(job, fault)
            return
        for (job, row), vector in zip(batch, vectors, strict=True):
            job.vectors[row] = vector
            job.num_left -= 1
            if job.num_left == 0:
                self._tell(job, None)

    def flush(self) -> None:
        """A turn leaves nothing behind."""

    def close(self) -> None:
        """Nor does it keep anything for the next start."""

    def limit_pass(self, num_tokens: int) -> None:
        """So many tokens a turn at most. From any thread."""

        def limit() -> None:
            self._pace.max_budget = num_tokens

        self._device.post(limit)

    def _compute(self, rows: Sequence[Row]) -> np.ndarray:
        columns = max(len(row.tokens) for row in rows)
        tokens, mask, types = (np.zeros((len(rows), columns), np.int32) for _ in range(3))
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = row.tokens
            mask[i, : len(row.tokens)] = 1
            types[i, : len(row.types)] = row.types
        self._forward.wait()  # or the time of others would be counted
        began = time.monotonic()
        vectors = self._forward(tokens, mask, types)
        self._pace.observe(time.monotonic() - began, num_rows=0, num_prefilled=tokens.size)
        if not np.isfinite(vectors).all():
            raise ArithmeticError("a vector has something in it that is no number")
        return vectors

    def _tell(self, job: Job, error: EngineFault | None) -> None:
        job.answer.get_loop().call_soon_threadsafe(_settle, job, error)


def _settle(job: Job, error: EngineFault | None) -> None:
    if job.answer.done():
        return
    if error is not None:
        job.answer.set_exception(error)
    else:
        job.answer.set_result([vector for vector in job.vectors if vector is not None])


@dataclass(frozen=True, slots=True)
class LocalEmbedder:
    """The path of one request through a loaded model."""

    reader: TextReader
    embedder: Embedder

    async def embed(self, prepared: Prepared) -> Embeddings:
        """Raises `EngineFault`."""
        vectors = await self.embedder.run(prepared.rows)
        return Embeddings(tuple(_little_endian(v, prepared.dimensions) for v in vectors), prepared.prompt_tokens)

    async def rank(self, prepared: Prepared) -> Ranking:
        """A cross-encoder's own scores, else the cosine similarities of query and document. Raises `EngineFault`."""
        vectors = await self.embedder.run(prepared.rows)
        if self.reader.reads_pairs:
            scores = [float(score[0]) for score in vectors]
        else:
            query, *documents = vectors
            scores = [float(np.dot(query, document)) for document in documents]
        return Ranking(tuple(scores), prepared.prompt_tokens)


def _little_endian(vector: "np.ndarray[Any, np.dtype[np.float32]]", dimensions: int | None) -> bytes:
    if dimensions is not None and dimensions < len(vector):
        vector = vector[:dimensions]
        vector = vector / np.maximum(np.linalg.norm(vector), np.float32(1e-12))
    return vector.astype("<f4").tobytes()
