"""Checkpoint folder → model. Runs no code of the checkpoint: neither a model file nor a tokenizer of its own.

transformers and mlx-lm take seconds to import. They are imported where they are used, so that the server listens and the
command line answers before; `import_libraries` does it ahead of the first request.
"""
# ruff: noqa: PLC0415, F401 - see above
# pyright: basic

import base64
import gc
import importlib
import json
import logging
import threading
import weakref
from collections.abc import Container, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from mlx_manager.core.messages import Image, Message
from mlx_manager.core.requests import Conversation, GenerationRequest
from mlx_manager.hub.adapters import check_fit
from mlx_manager.hub.checkpoint import EMBEDDING_MODULES, Checkpoint
from mlx_manager.hub.fingerprint import adapter_fingerprint, fingerprint
from mlx_manager.inference import memory
from mlx_manager.inference.blas import give_back_freed_memory
from mlx_manager.inference.dialect import Dialect
from mlx_manager.inference.embedder import Embedder
from mlx_manager.inference.encoder import Encoder
from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS, BlockPool
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.disk_tier import DiskTier
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.pace import Pace
from mlx_manager.inference.engine.prefix import PrefixKeys
from mlx_manager.inference.engine.scheduler import PassCost, Policy, Scheduler
from mlx_manager.inference.families.detect import detect
from mlx_manager.inference.picture_reader import PictureReader
from mlx_manager.inference.text_reader import TextReader

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """`max_sequences` are decoded together. A step computes at most `prefill_budget` prompt tokens, and as many fewer as it takes to stay
    within `step_s` seconds while others decode. `kv_bytes` is the share of a model for keys and values, and `pass_bytes` what a pass over a
    piece of a prompt may take; None: the pool decides for each model. Weights are read in pieces of `piece_bytes`. `ageing_s` of waiting
    are worth a class of priority. `check_every` and `ahead`: see `Engine`; None: unless the device is the CPU. Prefixes that left memory
    are kept in `disk_folder`, up to `disk_bytes` for a model."""

    max_sequences: int = 32
    prefill_budget: int = 2048
    step_s: float = 0.04
    kv_bytes: int | None = None
    pass_bytes: int | None = None
    piece_bytes: int = 256 << 20
    ageing_s: float = 10.0
    check_every: int = 0
    ahead: bool | None = None
    disk_bytes: int = 0
    disk_folder: Path | None = None


Turns = Generator[None, None, T]
"""Work on the device thread that lets others have their turns wherever it yields."""


# Tokens, for a checkpoint that does not say how many it was made for.
DEFAULT_CONTEXT_LENGTH = 32_768


_importing = threading.Lock()  # two threads that import transformers at the same time break it


def import_libraries() -> None:
    """Any thread; whoever comes second waits."""
    with _importing:
        import mlx_lm.utils
        import transformers

        import mlx_manager.inference.engine.runner


def load_dialect(path: Path, context_length: int | None, *, sees: bool = False) -> Dialect:
    """Everything but the weights; about half a second. `sees`: it is a vision model. Any thread."""
    import_libraries()
    from transformers import AutoTokenizer

    config = _read_json(path / "config.json")
    text_config = config.get("text_config", config)
    defaults = _read_json(path / "generation_config.json")
    tokenizer: Any
    pictures = None
    processor = _load_processor(path, config["model_type"]) if sees else None
    if processor is not None:
        tokenizer = processor.tokenizer
        tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
        pictures = PictureReader(processor, vocab_size=text_config.get("vocab_size") or config["vocab_size"])
    else:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    family = detect(config, tokenizer.chat_template)
    vocabulary = tokenizer.get_vocab()
    stop = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    stop |= {vocabulary[t] for t in family.stop_tokens if t in vocabulary}
    for named in (config.get("eos_token_id"), text_config.get("eos_token_id"), defaults.get("eos_token_id")):
        stop |= set(named) if isinstance(named, list) else {named} if named is not None else set()
    return Dialect(
        tokenizer=tokenizer,
        family=family,
        context_length=context_length or DEFAULT_CONTEXT_LENGTH,
        vocab_size=text_config.get("vocab_size") or config["vocab_size"],
        stop_tokens=frozenset(stop),
        defaults=defaults,
        pictures=pictures,
    )


def _load_processor(path: Path, architecture: str) -> Any:
    """What turns pictures into arrays, as mlx-vlm has it for this architecture; None if it has none: the model reads text then."""
    from mlx_vlm.utils import MODEL_REMAPPING, load_processor

    name = MODEL_REMAPPING.get(architecture, architecture)
    try:
        with _importing:
            importlib.import_module(f"mlx_vlm.models.{name}")  # it registers a processor of its own
        return load_processor(path, add_detokenizer=False, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - of other people's processors, in ways of their own
        log.warning("%s cannot be shown pictures: %s", path.name, error)
        return None


def load_text_reader(checkpoint: Checkpoint) -> TextReader:
    """All of an embedding or reranking model but its weights. Any thread."""
    import_libraries()
    from transformers import AutoTokenizer

    config = _read_json(checkpoint.path / "config.json")
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    context_length = checkpoint.context_length or DEFAULT_CONTEXT_LENGTH
    if EMBEDDING_MODULES[checkpoint.architecture] == "xlm_roberta":  # it counts its positions from after the padding's
        context_length = min(context_length, config["max_position_embeddings"] - config.get("pad_token_id", 1) - 1)
    reader = TextReader(
        tokenizer=tokenizer,
        context_length=context_length,
        vocab_size=config["vocab_size"],
        dimensions=config["hidden_size"],
        shorter=_shorter(config, _read_json(checkpoint.path / "config_sentence_transformers.json")),
        reads_pairs=checkpoint.kind == "reranker",
    )
    reader.encode([""])  # its settings are made now: later several threads use it
    return reader


def _shorter(config: Mapping[str, Any], pipeline: Mapping[str, Any]) -> Container[int]:
    """To which sizes the vectors of a Matryoshka model can be cut: those that it names, or any where it only says that it is one."""
    for said in (config, pipeline):
        if sizes := said.get("matryoshka_dimensions"):
            return frozenset(sizes)
        if said.get("is_matryoshka") is True:
            return range(1, config["hidden_size"])
    return ()


def load_embedder(checkpoint: Checkpoint, device: Device, limits: EngineLimits) -> tuple[Embedder, int]:
    """Reads the weights of an embedding or reranking model; how many bytes they take. On the device thread."""
    import_libraries()
    encoder = Encoder(checkpoint.path, checkpoint.kind)
    embedder = Embedder(device, encoder, Pace(limits.prefill_budget, limits.step_s))
    device.attach(embedder)
    return embedder, encoder.weight_bytes


@dataclass(slots=True)
class Progress:
    """How much of a model's weights has been read; written on the device thread, read anywhere."""

    read_bytes: int = 0


class SharedWeights:
    """The weights of text models, in memory once for all who are loaded from the same files: a model with an adapter costs what the
    adapter does. Knows them by folder and fingerprint, and keeps none of them there; of what was loaded before it remembers in `caches`,
    by the fingerprints of model and adapter, which cache was proven. Owned by the device thread."""

    def __init__(self) -> None:
        self.caches: dict[tuple[str, str], str] = {}
        self._models: list[tuple[tuple[Path, str], weakref.ref[Any]]] = []

    def load(self, checkpoint: Checkpoint, key: str, progress: Progress, piece_bytes: int) -> Turns[Any]:
        """A model of its own, with its adapter, on weights that are read if nobody has them. Raises `Unusable` for an adapter that does
        not fit any more."""
        from mlx_lm.utils import load_model

        from mlx_manager.inference.lora import apply, base_arrays

        known_as = checkpoint.path, key
        self._models = [entry for entry in self._models if entry[1]() is not None]
        lender = next((model() for name, model in self._models if name == known_as), None)
        model, _ = load_model(checkpoint.path, lazy=True, trust_remote_code=False)
        if lender is not None:
            model.load_weights(list(base_arrays(lender).items()))
        yield from _read_weights(model, progress, piece_bytes)
        if checkpoint.adapter is not None:
            check_fit(checkpoint.adapter, checkpoint)
            apply(checkpoint.adapter, model)
        self._models.append((known_as, weakref.ref(model)))
        return model


def _read_weights(model: Any, progress: Progress, piece_bytes: int) -> Turns[None]:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    piece: list[Any] = []
    num_bytes = 0
    for _, array in cast(list[Any], tree_flatten(model.parameters())):
        piece.append(array)
        num_bytes += array.nbytes
        if num_bytes >= piece_bytes:
            mx.eval(piece)
            progress.read_bytes += num_bytes
            piece, num_bytes = [], 0
            yield
    mx.eval(piece)
    progress.read_bytes += num_bytes


def load_engine(
    checkpoint: Checkpoint, dialect: Dialect, device: Device, limits: EngineLimits, weights: SharedWeights, progress: Progress
) -> Turns[tuple[Engine, int]]:
    """Reads the weights and makes the engine that runs them; how many bytes the weights take, without an adapter's. On the device
    thread."""
    import_libraries()
    key = fingerprint(checkpoint.path)
    adapter_key = "" if checkpoint.adapter is None else adapter_fingerprint(checkpoint.adapter)
    yield
    model = yield from load_weights(checkpoint, key, dialect, weights, progress, limits.piece_bytes)
    yield
    engine = make_engine(
        model,
        device,
        limits,
        vocab_size=dialect.vocab_size,
        model_key=key,
        adapter_key=adapter_key,
        cost=PassCost(*memory.pass_cost(checkpoint.pass_bytes_per_token, checkpoint.num_heads)),
        proven=weights.caches.get((key, adapter_key)),
    )
    weights.caches[key, adapter_key] = engine.cache_state.kind
    device.attach(engine)
    return engine, _weight_bytes(model) - (0 if checkpoint.adapter is None else checkpoint.adapter.size_bytes)


def load_weights(
    checkpoint: Checkpoint, key: str, dialect: Dialect, weights: SharedWeights, progress: Progress, piece_bytes: int
) -> Turns[Any]:
    """The model; one that can be shown pictures as a `PictureModel`. On the device thread."""
    path = checkpoint.path
    if dialect.pictures is not None:
        from mlx_vlm.utils import load_model as load_sighted

        from mlx_manager.inference.engine.picture_model import PictureModel

        model = PictureModel(load_sighted(path, trust_remote_code=False))
        problem = model.self_test(dialect.prepare(_SHOWN).specs[0])
        if problem is None:
            return model
        log.warning("%s cannot be shown pictures: %s", path.name, problem)
    return (yield from weights.load(checkpoint, key, progress, piece_bytes))


# A gray square: 8 x 8 pixels, PNG.
_MOST_TAILS = 64  # of the newest conversations; each takes less than a block
_GRAY = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFElEQVR4nGNsaGhgwAaYsIoOWgkAMBcBkGHHl6YAAAAASUVORK5CYII=")
_SHOWN = GenerationRequest("", (Conversation((Message("user", (Image(_GRAY), "What is this?")),)),), max_tokens=1)


def make_engine(
    model: Any,
    device: Device,
    limits: EngineLimits,
    *,
    vocab_size: int,
    model_key: str,
    adapter_key: str = "",
    cost: PassCost | None = None,
    proven: str | None = None,
) -> Engine:
    """The engine for a loaded model; `proven`: see `choose_cache`. On the device thread."""
    import mlx.core as mx

    from mlx_manager.inference.engine import few_rows, head, paged_attention
    from mlx_manager.inference.engine.lanes import choose_cache, num_blocks_within, state_bytes_within
    from mlx_manager.inference.engine.picture_model import PictureModel
    from mlx_manager.inference.engine.runner import Runner

    backend = paged_attention.backend()
    if backend == "cuda":
        few_rows.install(model)
    kv_bytes = memory.LEAST_KV_BYTES if limits.kv_bytes is None else limits.kv_bytes
    cache = choose_cache(model, kv_bytes, None if backend is None else paged_attention.Kernels(backend), proven)
    num_blocks = num_blocks_within(cache, kv_bytes)
    ahead = mx.default_device() != mx.Device(mx.cpu) if limits.ahead is None else limits.ahead
    policy = Policy(
        cost=cost,
        max_pass_bytes=limits.pass_bytes,
        max_sequences=limits.max_sequences if cache.max_rows is None else min(limits.max_sequences, cache.max_rows),
        ageing_s=limits.ageing_s,
        max_row_tokens=(num_blocks - 1) * BLOCK_TOKENS if cache.pads_rows else None,
        max_scores=memory.SCORE_BYTES // (4 * _num_query_heads(model)),
        needs_states=cache.needs_states,
        whole_pictures=isinstance(model, PictureModel) and model.looks_both_ways,
        samples_prompts=not cache.needs_states and (cache.takes_unread or not ahead) and head.install(model),
        num_tails=min(_MOST_TAILS, num_blocks // 16) if cache.keeps_tails else 0,
    )
    log.info("keys and values: %s, %d blocks of %d tokens", cache.name, num_blocks - 1, BLOCK_TOKENS)
    keys = PrefixKeys(model_key, str(cache.token_bytes), adapter_key)
    scheduler = Scheduler(BlockPool(num_blocks), keys, policy)
    pace = Pace(limits.prefill_budget, limits.step_s)
    disk = None
    if limits.disk_bytes and limits.disk_folder is not None:
        disk = DiskTier(limits.disk_folder, fingerprint=keys.fingerprint, max_bytes=limits.disk_bytes)
        disk.start()
        disk.wait_until_listed(_LISTING_S)  # or the first request, for which the model is loaded, would find nothing
    return Engine(
        device,
        Runner(cache, vocab_size, model if isinstance(model, PictureModel) else None),
        scheduler,
        pace,
        ahead=ahead,
        max_state_bytes=state_bytes_within(cache, kv_bytes),
        disk=disk,
        check_every=limits.check_every,
    )


def _num_query_heads(model: Any) -> int:
    return getattr(getattr(model, "args", None), "num_attention_heads", None) or _MANY_HEADS


_MANY_HEADS = 64
_LISTING_S = 2.0


def _weight_bytes(model: Any) -> int:
    from mlx.utils import tree_flatten

    return sum(cast(Any, array).nbytes for _, array in tree_flatten(model.parameters()))


@dataclass(frozen=True, slots=True)
class Usage:
    """`active` and `cached` of MLX, `available` and `total` of the machine, in bytes."""

    active: int
    cached: int
    available: int
    total: int


# Of what a GPU is good for, and of the memory of a machine without one, which the rest of it needs as well.
_GPU_SHARE = 0.9
_RAM_SHARE = 0.7
_CACHE_SHARE = 16
_MOST_CACHE_BYTES = 2 << 30


def machine_bytes() -> int:
    """What models could have of this machine at most: what Metal recommends, what the card has, or the memory that there is. On the
    device thread."""
    import mlx.core as mx
    import psutil

    total = psutil.virtual_memory().total
    if mx.default_device() == mx.Device(mx.cpu):
        return total
    info = mx.device_info()
    return min(total, int(info.get("max_recommended_working_set_size") or info.get("total_memory") or total))


def machine_limit() -> int:
    """What is theirs if nothing is said. On the device thread."""
    import mlx.core as mx

    return int(machine_bytes() * (_RAM_SHARE if mx.default_device() == mx.Device(mx.cpu) else _GPU_SHARE))


def memory_limit(said: int | float | None) -> int:
    """Bytes, a share of the machine's, or None; what MLX keeps for reuse is held to a small part of it. On the device thread."""
    import mlx.core as mx

    limit = machine_limit() if said is None else int(said * machine_bytes()) if isinstance(said, float) else said
    mx.set_cache_limit(min(_MOST_CACHE_BYTES, limit // _CACHE_SHARE))
    return limit


def memory_in_use() -> Usage:
    """On the device thread."""
    import mlx.core as mx
    import psutil

    machine = psutil.virtual_memory()
    return Usage(mx.get_active_memory(), mx.get_cache_memory(), machine.available, machine.total)


def let_be() -> None:
    """Has the garbage collector leave alone what is there now and will stay: modules, models, tokenizers. Looking through all of it takes
    a tenth of a second and more, in which nobody gets a token."""
    gc.collect(1)
    gc.freeze()


def free() -> None:
    """Gives back what is held for reuse, and what has left but holds itself. On the device thread, where arrays are freed."""
    import mlx.core as mx

    gc.unfreeze()
    gc.collect()
    gc.freeze()
    mx.clear_cache()
    give_back_freed_memory()


def _read_json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
