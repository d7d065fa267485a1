"""python -m tests.bench.adapters_in_turn: what it costs that a model's adapters are computed one after the other.

The same eight replies at once, by one adapter, by two, four and eight, and by the model alone, in turn in one run.
"""

import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mlx_manager.bench.random_model import SHAPES, write_model
from tests.e2e.serving import Running, serve_process

SHAPE = SHAPES["llama-15m"]
RANK = 8
REPLIES = 8
TOKENS = 64
REPEATS = 7
SPREADS = (0, 1, 2, 4, 8)


def write_adapter(folder: Path, seed: int) -> None:
    """On queries and values, as is usual; what it does means nothing."""
    lot = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    arrays: dict[str, np.ndarray] = {}
    for layer in range(SHAPE.num_layers):
        for name, heads in (("q_proj", SHAPE.num_heads), ("v_proj", SHAPE.num_kv_heads)):
            at = f"model.layers.{layer}.self_attn.{name}"
            arrays[f"{at}.lora_a"] = lot.standard_normal((SHAPE.hidden_size, RANK), np.float32) / 16
            arrays[f"{at}.lora_b"] = lot.standard_normal((RANK, heads * SHAPE.head_dim), np.float32) / 100
    save_file(arrays, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(f'{{"lora_parameters": {{"rank": {RANK}, "scale": 1.0}}}}')


def tokens_per_second(running: Running, spread: int) -> float:
    """Of eight replies at once, by so many adapters."""
    models = [f"base:a{n % spread}" if spread else "base" for n in range(REPLIES)]

    def ask(n: int) -> None:
        body = {"model": models[n], "prompt": f"{n} and {n}", "max_tokens": TOKENS, "temperature": 0}
        with running.http() as http:
            reply = http.post("/v1/completions", json=body).raise_for_status().json()
        assert reply["usage"]["completion_tokens"] == TOKENS

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(REPLIES)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return REPLIES * TOKENS / (time.monotonic() - began)


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        models = Path(made) / "models"
        write_model(SHAPE, models / "base")
        for n in range(max(SPREADS)):
            write_adapter(models / "base" / "adapters" / f"a{n}", n)
        seen: dict[int, list[float]] = {spread: [] for spread in SPREADS}
        with serve_process(Path(made), {"MLX_MANAGER_MODELS_DIR": str(models), "MLX_MANAGER_KV_CACHE_GIB": "0.2"}) as running:
            for repeat in range(REPEATS + 1):
                for spread in SPREADS:
                    rate = tokens_per_second(running, spread)
                    if repeat:  # the first loads
                        seen[spread].append(rate)
    for spread, rates in seen.items():
        print(f"{spread or 'no'} adapters: {statistics.median(rates):.0f} tokens/s ({min(rates):.0f}-{max(rates):.0f})", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
