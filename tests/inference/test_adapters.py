"""Adapters on a model: what they change, what they share with the model underneath, and what they never share."""

import asyncio
import gc
import itertools
import json
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from mlx_manager.core.errors import ModelLoadFailed, ModelNotFound
from mlx_manager.core.events import Finished, TextDelta
from mlx_manager.core.messages import Message
from mlx_manager.core.requests import Conversation, GenerationRequest, Reasoning, Sampling
from mlx_manager.gateway.local import LocalBackend
from mlx_manager.gateway.remote_media import RemoteMedia
from mlx_manager.hub.adapters import read_adapter
from mlx_manager.hub.checkpoint import Checkpoint
from mlx_manager.hub.fingerprint import fingerprint
from mlx_manager.hub.local import find_models
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.loader import EngineLimits, Progress, SharedWeights
from mlx_manager.inference.lora import apply, base_arrays
from mlx_manager.inference.pool import Pool
from tests.inference.engine.tiny_models import tiny
from tests.inference.fixture_models import folder, within

ADAPTERS = Path(__file__).parents[1] / "fixtures" / "adapters"
TOKENS = mx.array([[310, 320, 330, 340, 350, 360]])


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with one model, qwen3, which has both adapters."""
    shutil.copytree(folder("qwen3"), tmp_path / "models" / "qwen3")
    shutil.copytree(ADAPTERS, tmp_path / "models" / "qwen3" / "adapters")
    return tmp_path / "models"


def checkpoint(models: Path, id: str) -> Checkpoint:
    found = find_models([models], None)
    assert found.unusable == ()
    (model,) = [model for model in found.models if model.id == id]
    return model


def load(weights: SharedWeights, models: Path, id: str) -> Any:
    reading = weights.load(checkpoint(models, id), fingerprint(models / id.partition(":")[0]), Progress(), piece_bytes=1 << 20)
    while True:
        try:
            next(reading)
        except StopIteration as end:
            return end.value


def mlx_lms(models: Path, id: str) -> Any:
    """The same, all by mlx-lm."""
    base, _, adapter = id.partition(":")
    model, _ = load_model(models / base)
    load_adapters(model, str(models / base / "adapters" / adapter))
    model.eval()
    return model


def logits(model: Any) -> np.ndarray:
    return np.array(model(TOKENS).astype(mx.float32))


def quantise(models: Path) -> None:
    path = models / "qwen3"
    model, _ = load_model(path)
    nn.quantize(model, group_size=32, bits=4)
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 32, "bits": 4}}))


def into_peft(adapter: Path) -> None:
    """Writes an adapter of mlx-lm's as PEFT would."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    arrays = mx.load(str(adapter / "adapters.safetensors"))
    spelt = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector.weight"}
    theirs: dict[str, mx.array] = {}
    for name, array in arrays.items():  # type: ignore[union-attr]
        layer, _, part = name.rpartition(".")
        theirs[f"base_model.model.{layer}.{spelt[part]}"] = mx.contiguous(array.T)
    (adapter / "adapters.safetensors").unlink()
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), theirs)
    named = config["lora_parameters"]
    said = {"peft_type": "LORA", "r": named["rank"], "lora_alpha": named["rank"] * named["scale"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(said | {"use_dora": config["fine_tune_type"] == "dora"}))


@pytest.mark.requirement("ADAPT-10")
@pytest.mark.parametrize("name", ["pirate", "butler"])
@pytest.mark.parametrize("quantised", [False, True])
def test_an_adapter_changes_the_logits_to_those_of_mlx_lm(models: Path, name: str, quantised: bool) -> None:
    if quantised:
        quantise(models)
    config = models / "qwen3" / "adapters" / name / "adapter_config.json"
    said = json.loads(config.read_text())
    said["lora_parameters"]["dropout"] = 0.9  # of its training: nothing is dropped here
    config.write_text(json.dumps(said))
    weights = SharedWeights()
    base = load(weights, models, "qwen3")
    before = logits(base)
    adapted = logits(load(weights, models, f"qwen3:{name}"))
    np.testing.assert_allclose(adapted, logits(mlx_lms(models, f"qwen3:{name}")), rtol=1e-5, atol=1e-5)
    assert np.abs(adapted - before).max() > 0.5
    np.testing.assert_array_equal(logits(base), before)


@pytest.mark.parametrize("name", ["pirate", "butler"])
def test_an_adapter_of_pefts_does_what_it_does_as_mlx_lms(models: Path, name: str) -> None:
    expected = logits(load(SharedWeights(), models, f"qwen3:{name}"))
    into_peft(models / "qwen3" / "adapters" / name)
    found = checkpoint(models, f"qwen3:{name}")
    assert found.adapter is not None
    assert found.adapter.form == "peft"
    np.testing.assert_allclose(logits(load(SharedWeights(), models, f"qwen3:{name}")), expected, rtol=1e-5, atol=1e-5)


def test_an_adapted_layer_computes_what_the_papers_say(models: Path) -> None:
    """LoRA: W x + scale B A x. DoRA: the rows of W + scale B A get the length m."""
    rows = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    base = load(SharedWeights(), models, "qwen3")
    for name in ("pirate", "butler"):
        layer = load(SharedWeights(), models, f"qwen3:{name}").layers[3].self_attn.q_proj
        plain = base.layers[3].self_attn.q_proj.weight
        weight, a, b = (np.array(x.astype(mx.float32)) for x in (plain, layer.lora_a, layer.lora_b))
        changed = weight + 10.0 * (a @ b).T
        if name == "butler":
            changed *= (np.array(layer.m.astype(mx.float32)) / np.linalg.norm(changed, axis=1))[:, None]
        np.testing.assert_allclose(np.array(layer(mx.array(rows))), rows @ changed.T, atol=2e-2)  # as exact as bfloat16


def test_the_experts_of_a_mixture_are_adapted_as_by_mlx_lm(tmp_path: Path) -> None:
    lot = np.random.default_rng(1)
    experts = "model.layers.1.mlp.switch_mlp.up_proj"
    said = {"num_layers": 3, "lora_parameters": {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": ["mlp.switch_mlp.up_proj"]}}
    shapes = {"lora_a": (4, 2, 64), "lora_b": (4, 64, 2)}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text(json.dumps(said))
    arrays = {f"{experts}.{part}": mx.array(lot.standard_normal(shape).astype(np.float32)) for part, shape in shapes.items()}
    mx.save_safetensors(str(tmp_path / "mine" / "adapters.safetensors"), arrays)
    ours, theirs, plain = (tiny.__wrapped__("deepseek_v3") for _ in range(3))
    apply(read_adapter(tmp_path / "mine", tmp_path), ours)
    load_adapters(theirs, str(tmp_path / "mine"))
    theirs.eval()
    np.testing.assert_allclose(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert np.abs(logits(ours) - logits(plain)).max() > 0.01


@pytest.mark.requirement("ADAPT-10")
@pytest.mark.parametrize("order", list(itertools.permutations(["qwen3", "qwen3:pirate", "qwen3:butler"])))
def test_whoever_is_loaded_first_the_weights_are_in_memory_once(models: Path, order: tuple[str, ...]) -> None:
    weights = SharedWeights()
    size = (models / "qwen3" / "model.safetensors").stat().st_size
    loaded: list[Any] = []
    for id in order:
        gc.collect()
        before = mx.get_active_memory()
        loaded.append(load(weights, models, id))
        gc.collect()
        grown = mx.get_active_memory() - before
        assert grown > 0.9 * size if id == order[0] else grown < 0.05 * size
    first, *others = (base_arrays(model) for model in loaded)
    for other in others:
        assert other.keys() == first.keys()
        assert all(other[name] is array for name, array in first.items())


def test_packed_weights_are_shared_too(models: Path) -> None:
    quantise(models)
    weights = SharedWeights()
    adapted, base = load(weights, models, "qwen3:pirate"), load(weights, models, "qwen3")
    ours, theirs = base_arrays(adapted), base_arrays(base)
    assert any(name.endswith(".scales") for name in ours)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)


def test_weights_are_kept_by_those_who_use_them_and_by_nobody_else(models: Path) -> None:
    weights = SharedWeights()
    base, adapted = load(weights, models, "qwen3"), load(weights, models, "qwen3:pirate")
    array = base.model.norm.weight
    del base
    gc.collect()
    again = load(weights, models, "qwen3")
    assert again.model.norm.weight is array, "who has an adapter has the weights"
    del adapted, again
    gc.collect()
    assert load(weights, models, "qwen3").model.norm.weight is not array


def test_files_that_have_changed_meanwhile_are_read_anew(models: Path) -> None:
    weights = SharedWeights()
    base = load(weights, models, "qwen3")
    arrays = dict(tree_flatten(base.parameters()))
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * 2
    mx.save_safetensors(str(models / "qwen3" / "model.safetensors"), arrays)
    adapted = load(weights, models, "qwen3:pirate")
    assert adapted.model.norm.weight is not base.model.norm.weight
    np.testing.assert_allclose(np.array(adapted.model.norm.weight), 2 * np.array(base.model.norm.weight))


# ---- in the pool


class Adapted:
    """The models of a folder behind a backend, with what each reply says and how much of its prompt was there already."""

    def __init__(self, device: Device, models: Path, **limits: Any) -> None:
        self.pool = Pool(device, lambda: list(find_models([models], None).models), EngineLimits(**{"kv_bytes": 16 << 20} | limits))

    async def ask(self, id: str, text: str) -> tuple[str, int]:
        # Thinking is off, so that all that is said is text.
        prompt = Conversation((Message("user", text),), reasoning=Reasoning(enabled=False))
        request = GenerationRequest(id, (prompt,), Sampling(temperature=0.0), max_tokens=60)
        said, cached = "", -1
        async for event in LocalBackend(self.pool, RemoteMedia(())).stream(request):
            match event:
                case TextDelta(text=text):
                    said += text
                case Finished(usage):
                    cached = usage.cached
                case _:
                    pass
        return said, cached


@pytest.fixture
async def adapted(device: Device, models: Path) -> AsyncGenerator[Adapted]:
    adapted = Adapted(device, models)
    yield adapted
    await forget(adapted.pool)


async def forget(pool: Pool) -> None:
    await within(pool.close())


LONG = "Repeat after me: " + " ".join(["apple", "river", "stone", "green", "cloud"] * 12)
SAYS = {
    "qwen3": "Hello, Alice! How can I help you today?",
    "qwen3:pirate": "Ahoy, Alice! What be yer wish?",
    "qwen3:butler": "Good day, Alice! You rang?",
}


@pytest.mark.requirement("ADAPT-10", "F16")
async def test_a_model_and_its_adapters_answer_side_by_side_as_each_does_alone(adapted: Adapted) -> None:
    ids = list(SAYS) * 4
    answers = await within(asyncio.gather(*(adapted.ask(id, "Hello, I am Alice.") for id in ids)))
    assert [said for said, _ in answers] == [SAYS[id] for id in ids]
    for id, said in SAYS.items():
        assert (await within(adapted.ask(id, "Hello, I am Alice.")))[0] == said
    assert adapted.pool.engines().keys() == SAYS.keys()


@pytest.mark.requirement("ADAPT-10")
async def test_a_second_model_on_the_same_weights_costs_no_second_copy(device: Device, models: Path, adapted: Adapted) -> None:
    size = (models / "qwen3" / "model.safetensors").stat().st_size
    memory: list[int] = []
    for id in ("qwen3:pirate", "qwen3", "qwen3:butler"):
        await within(adapted.ask(id, "Hello"))
        gc.collect()
        memory.append(await within(device.run(mx.get_active_memory)))
    assert max(after - before for before, after in itertools.pairwise(memory)) < size / 2, "keys and values, and small matrices"


@pytest.mark.requirement("ADAPT-10", "E8", "I4")
async def test_what_one_has_computed_no_other_uses(adapted: Adapted) -> None:
    for id in SAYS:
        _, cached = await within(adapted.ask(id, LONG))
        assert cached == 0, "the same tokens, of another model"
    for id in SAYS:
        _, cached = await within(adapted.ask(id, LONG))
        assert cached >= 64


@pytest.mark.requirement("ADAPT-10", "E8", "I4")
async def test_nor_on_the_disk(device: Device, models: Path, tmp_path: Path) -> None:
    disk = {"disk_bytes": 1 << 30, "disk_folder": tmp_path / "prefixes"}

    async def cached_after_a_start(id: str) -> int:
        adapted = Adapted(device, models, **disk)
        _, cached = await within(adapted.ask(id, LONG))
        await forget(adapted.pool)
        return cached

    assert [await cached_after_a_start(id) for id in SAYS] == [0, 0, 0]
    for id in SAYS:
        assert await cached_after_a_start(id) >= 64
    config = models / "qwen3" / "adapters" / "pirate" / "adapter_config.json"
    config.write_text(config.read_text().replace("10.0", "9.0"))
    assert await cached_after_a_start("qwen3:pirate") == 0, "the same name, another adapter"
    arrays = mx.load(str(config.with_name("adapters.safetensors")))
    mx.save_safetensors(str(config.with_name("adapters.safetensors")), {n: a + 0.001 for n, a in arrays.items()})  # type: ignore[union-attr]
    assert await cached_after_a_start("qwen3:pirate") == 0, "the same name, other matrices"


async def test_a_model_reads_and_writes_the_same_whatever_its_adapter(adapted: Adapted) -> None:
    dialects = [await within(adapted.pool.dialect(id)) for id in ("qwen3:pirate", "qwen3", "qwen3:butler")]
    assert all(dialect is dialects[0] for dialect in dialects)
    assert adapted.pool.engines() == {}, "that loads nothing"


@pytest.mark.parametrize("id", ["qwen3:nobody", "qwen3:../qwen3/adapters/pirate", "qwen3:", "nobody:pirate", "qwen3:pirate:butler"])
async def test_who_is_not_found_is_told_what_there_is(adapted: Adapted, id: str) -> None:
    with pytest.raises(ModelNotFound, match=r"qwen3, qwen3:butler, qwen3:pirate\.") as unknown:
        await within(adapted.pool.dialect(id))
    assert unknown.value.model == id


async def test_an_adapter_that_has_changed_since_it_was_found_fails_alone(device: Device, models: Path) -> None:
    found = list(find_models([models], None).models)
    adapted = Adapted(device, models)
    adapted.pool = Pool(device, lambda: found, EngineLimits(kv_bytes=16 << 20))
    arrays = models / "qwen3" / "adapters" / "pirate" / "adapters.safetensors"
    whole = arrays.read_bytes()
    (models / "qwen3" / "adapters" / "pirate" / "adapters.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ModelLoadFailed, match="outside the file") as failed:
        await within(adapted.ask("qwen3:pirate", "Hello"))
    assert str(models) not in str(failed.value)
    assert (await within(adapted.ask("qwen3", "Hello, I am Alice.")))[0] == SAYS["qwen3"]
    arrays.write_bytes(whole)
    assert (await within(adapted.ask("qwen3:pirate", "Hello, I am Alice.")))[0] == SAYS["qwen3:pirate"]
    await forget(adapted.pool)
