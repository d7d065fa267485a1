"""A model of the pool: how it reads, and what of it is in memory. Says what is, and decides nothing."""

import asyncio
from typing import Generic, Literal, TypeVar

from mlx_manager.hub.checkpoint import Checkpoint
from mlx_manager.inference.dialect import Dialect
from mlx_manager.inference.embedder import Embedder, LocalEmbedder
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.sequence import URGENCY
from mlx_manager.inference.loader import (
    EngineLimits,
    Progress,
    SharedWeights,
    Turns,
    load_dialect,
    load_embedder,
    load_engine,
    load_text_reader,
)
from mlx_manager.inference.local_model import LocalModel
from mlx_manager.inference.memory import Need, NoRoom
from mlx_manager.inference.text_reader import TextReader

State = Literal["cold", "queued", "loading", "ready", "unloading", "failed"]
Phase = Literal["queued", "evicting", "loading"]

R = TypeVar("R")
M = TypeVar("M", bound=LocalModel | LocalEmbedder)


class Hot(Generic[M]):
    """A model in memory and how many have it now. It is None once it is on its way out."""

    def __init__(self, model: M, need: Need) -> None:
        self.model: M | None = model
        self.need = need
        self.num_lent = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def worker(self) -> "Engine | Embedder | None":
        match self.model:
            case LocalModel(engine=engine):
                return engine
            case LocalEmbedder(embedder=embedder):
                return embedder
            case None:
                return None


class Entry(Generic[R, M]):
    """A model: how it reads, which is known before its weights are, and the model itself."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.reads_like: Entry[R, M] = self  # a model with an adapter like the one without
        self.reading: asyncio.Task[R] | None = None
        self.loading: asyncio.Task[None] | None = None
        self.phase: Phase | None = None  # of the load
        self.progress = Progress()
        self.reserved: Need | None = None  # for the load
        self.no_room: NoRoom | None = None  # why it has to wait
        self.hot: Hot[M] | None = None
        self.leaving: Hot[M] | None = None
        self.leaver: asyncio.Task[None] | None = None
        self.num_wanting = 0  # who wait for a load
        self.urgency = URGENCY["low"]  # the greatest of theirs
        self.pinned = False
        self.keep_alive_s: float | Literal["default"] | None = "default"
        self.last_used = 0.0
        self.num_uses = 0
        self.error: str | None = None
        self.load_s: float | None = None

    @property
    def state(self) -> State:
        if self.hot is not None:
            return "ready"
        if self.loading is not None:
            return "queued" if self.phase == "queued" else "loading"
        if self.leaving is not None:
            return "unloading"
        return "failed" if self.error is not None else "cold"

    @property
    def is_idle(self) -> bool:
        """Loaded, and nobody has it or waits for it."""
        return self.hot is not None and self.hot.num_lent == 0 and self.num_wanting == 0

    @property
    def is_going(self) -> bool:
        """On its way out of memory: before any load that begins from now on it is gone."""
        return self.leaving is not None and self.leaving.num_lent == 0

    @property
    def held(self) -> Need | None:
        """The memory that it takes, or has been promised."""
        hot = self.hot if self.hot is not None else self.leaving
        return self.reserved if hot is None else hot.need

    def read(self) -> R:
        """Any thread."""
        raise NotImplementedError

    def load(self, reader: R, device: Device, limits: EngineLimits, weights: SharedWeights) -> Turns[tuple[M, int]]:
        """The model, and the bytes of its weights without an adapter's. On the device thread."""
        raise NotImplementedError


class TextEntry(Entry[Dialect, LocalModel]):
    """A model that writes; a vision model is shown pictures as well."""

    def read(self) -> Dialect:
        return load_dialect(self.checkpoint.path, self.checkpoint.context_length, sees=self.checkpoint.kind == "vision")

    def load(self, reader: Dialect, device: Device, limits: EngineLimits, weights: SharedWeights) -> Turns[tuple[LocalModel, int]]:
        engine, weight_bytes = yield from load_engine(self.checkpoint, reader, device, limits, weights, self.progress)
        return LocalModel(reader, engine), weight_bytes


class EmbeddingEntry(Entry[TextReader, LocalEmbedder]):
    def read(self) -> TextReader:
        return load_text_reader(self.checkpoint)

    def load(self, reader: TextReader, device: Device, limits: EngineLimits, weights: SharedWeights) -> Turns[tuple[LocalEmbedder, int]]:
        yield
        embedder, weight_bytes = load_embedder(self.checkpoint, device, limits)
        return LocalEmbedder(reader, embedder), weight_bytes


AnyEntry = TextEntry | EmbeddingEntry
ENTRIES: dict[str, type[AnyEntry]] = {
    "text": TextEntry,
    "embedding": EmbeddingEntry,
    "reranker": EmbeddingEntry,
    "vision": TextEntry,
}
