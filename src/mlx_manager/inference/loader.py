"""Checkpoint folder → model. Runs no code of the checkpoint: neither a model file nor a tokenizer of its own.

transformers and mlx-lm take seconds to import. They are imported where they are used, so that the server listens and the
command line answers before; `import_libraries` does it ahead of the first request.
"""
# ruff: noqa: PLC0415, F401 - see above
# pyright: basic

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_manager.inference.dialect import Dialect
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.scheduler import Scheduler
from mlx_manager.inference.families.detect import detect


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`max_sequences` are decoded together; a step computes at most `prefill_budget` prompt tokens."""

    max_sequences: int = 32
    prefill_budget: int = 512


# Tokens, for a checkpoint that does not say how many it was made for.
DEFAULT_CONTEXT_LENGTH = 32_768


_importing = threading.Lock()  # two threads that import transformers at the same time break it


def import_libraries() -> None:
    """Any thread; whoever comes second waits."""
    with _importing:
        import mlx_lm.utils
        import transformers

        import mlx_manager.inference.engine.runner


def load_dialect(path: Path, context_length: int | None) -> Dialect:
    """Everything but the weights; about half a second. Any thread."""
    import_libraries()
    from transformers import AutoTokenizer

    config = _read_json(path / "config.json")
    text_config = config.get("text_config", config)
    defaults = _read_json(path / "generation_config.json")
    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
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
        vocab_size=text_config["vocab_size"],
        stop_tokens=frozenset(stop),
        defaults=defaults,
    )


def load_engine(path: Path, dialect: Dialect, device: Device, limits: BatchLimits) -> Engine:
    """Reads the weights and makes the engine that runs them. On the device thread."""
    import_libraries()
    from mlx_lm.utils import load_model

    from mlx_manager.inference.engine.runner import Runner

    model, _ = load_model(path, trust_remote_code=False)
    runner = Runner(model, dialect.vocab_size)
    scheduler = Scheduler(max_sequences=limits.max_sequences if runner.can_batch else 1, prefill_budget=limits.prefill_budget)
    engine = Engine(device, runner, scheduler)
    device.attach(engine)
    return engine


def _read_json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
