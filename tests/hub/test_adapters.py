"""Adapters on disk: which are offered, with which models, and why others are not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_manager.hub.adapters import check_fit, read_adapter
from mlx_manager.hub.checkpoint import Unusable, layer_shapes, read
from mlx_manager.hub.local import Catalogue, find_models
from tests.hub.folders import BERT, write_adapter, write_base

Q, NORM = "model.layers.0.self_attn.q_proj", "model.norm"
LAYERS: dict[str, tuple[int, ...]] = {Q: (6, 4), NORM: (4,), "model.embed_tokens": (10, 4)}
LORA: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 10.0, "dropout": 0.1}}
DORA = LORA | {"fine_tune_type": "dora"}
A_AND_B = {f"{Q}.lora_a": (4, 2), f"{Q}.lora_b": (2, 6)}
PEFT: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 32,
    "target_modules": ["q_proj"],
    "bias": "none",
}
PEFT_A_AND_B = {f"base_model.model.{Q}.lora_A.weight": (2, 4), f"base_model.model.{Q}.lora_B.weight": (6, 2)}


def reason(tmp_path: Path, config: object, tensors: dict[str, tuple[int, ...]], **options: Any) -> str:
    """Why an adapter is not offered for the model of LAYERS."""
    write_base(tmp_path / "models" / "base", LAYERS)
    write_adapter(tmp_path / "adapters" / "mine", config, tensors, **options)
    found = find_models([tmp_path / "models"], None, [tmp_path / "adapters"])
    assert [model.id for model in found.models] == ["base"]
    (broken,) = found.unusable
    assert (broken.id, broken.is_adapter) == ("*:mine", True)
    return broken.reason


def ids(found: Catalogue) -> list[str]:
    assert found.unusable == ()
    return [model.id for model in found.models]


@pytest.mark.requirement("ADAPT-10")
def test_an_adapter_that_fits_is_a_model_of_its_own(tmp_path: Path) -> None:
    write_base(tmp_path / "models" / "base", LAYERS)
    folder = write_adapter(tmp_path / "adapters" / "mine", LORA, A_AND_B)
    found = find_models([tmp_path / "models"], None, [tmp_path / "adapters"])
    assert ids(found) == ["base", "base:mine"]
    base, adapted = found.models
    assert adapted.adapter is not None
    assert (adapted.base_id, adapted.path, adapted.kind) == ("base", base.path, "text")
    assert (adapted.adapter.name, adapted.adapter.path, adapted.adapter.rank, adapted.adapter.scale) == ("mine", folder.resolve(), 2, 10.0)
    assert adapted.num_parameters - base.num_parameters == adapted.adapter.num_parameters == 4 * 2 + 2 * 6
    assert adapted.size_bytes - base.size_bytes == (folder / "adapters.safetensors").stat().st_size


def test_a_models_own_adapters_are_in_its_folder_and_come_first(tmp_path: Path) -> None:
    base = write_base(tmp_path / "models" / "base", LAYERS)
    write_base(tmp_path / "models" / "twin", LAYERS)
    for folder, rank in ((base / "adapters", 2), (tmp_path / "adapters", 1)):
        shapes: dict[str, tuple[int, ...]] = {f"{Q}.lora_a": (4, rank), f"{Q}.lora_b": (rank, 6)}
        write_adapter(folder / "mine", LORA | {"lora_parameters": {"rank": rank, "scale": 1}}, shapes)
    found = find_models([tmp_path / "models"], None, [tmp_path / "adapters"])
    assert ids(found) == ["base", "base:mine", "twin", "twin:mine"]
    assert [model.adapter.rank for model in found.models if model.adapter] == [2, 1]


def test_an_adapter_is_offered_with_every_model_that_it_fits_or_with_the_one_that_it_names(tmp_path: Path) -> None:
    for name in ("base", "twin"):
        write_base(tmp_path / "models" / name, LAYERS)
    write_base(tmp_path / "models" / "wide", {Q: (6, 8)})
    write_adapter(tmp_path / "adapters" / "anyones", LORA | {"model": "somebody/elsewhere"}, A_AND_B)
    write_adapter(tmp_path / "adapters" / "twins", LORA | {"model": "/home/me/models/Twin/"}, A_AND_B)
    write_adapter(tmp_path / "adapters" / "theirs", PEFT | {"base_model_name_or_path": "org/base"}, PEFT_A_AND_B, peft=True)
    found = find_models([tmp_path / "models"], None, [tmp_path / "adapters"])
    assert ids(found) == ["base", "base:anyones", "base:theirs", "twin", "twin:anyones", "twin:twins", "wide"]


@pytest.mark.parametrize(
    ("config", "tensors", "why"),
    [
        (LORA, {f"{Q}.lora_a": (5, 2), f"{Q}.lora_b": (2, 6)}, "another size in base: lora_a is [5, 2], not [4, 2]"),
        (LORA, {f"{Q}.lora_a": (4, 2), f"{Q}.lora_b": (2, 4)}, "another size in base: lora_b is [2, 4], not [2, 6]"),
        (LORA, {f"{Q}.lora_a": (4, 3), f"{Q}.lora_b": (3, 6)}, "does not have the rank 2"),
        (LORA, A_AND_B | {f"{NORM}.lora_a": (4, 2), f"{NORM}.lora_b": (2, 4)}, "'model.norm' is no linear layer of base"),
        (LORA, {"lm_head.lora_a": (4, 2), "lm_head.lora_b": (2, 6)}, "'lm_head' is no linear layer of base"),
        (LORA, {"model.embed_tokens.lora_a": (10, 2), "model.embed_tokens.lora_b": (2, 4)}, "another size in base"),
        (LORA, {f"{Q}.lora_a": (4, 2)}, "lacks one of its two matrices"),
        (LORA, A_AND_B | {f"{Q}.weight": (6, 4)}, "is nothing that LoRA adds"),
        (LORA, {}, "it has no arrays"),
        (LORA, A_AND_B | {f"{Q}.m": (6,)}, "do not agree whether it is DoRA"),
        (DORA, A_AND_B, "do not agree whether it is DoRA"),
        (DORA, A_AND_B | {f"{Q}.m": (4,)}, "m is [4], not [6]"),
        (LORA | {"fine_tune_type": "full"}, A_AND_B, "it is no LoRA or DoRA adapter (fine_tune_type 'full')"),
        (LORA | {"lora_parameters": {"rank": 2, "alpha": 16}}, A_AND_B, "lora_parameters.scale in its adapter_config.json is no number"),
        (LORA | {"lora_parameters": {"rank": True, "scale": 1}}, A_AND_B, "lora_parameters.rank in its adapter_config.json is no rank"),
        ({"lora_layers": 4}, A_AND_B, "has no lora_parameters"),
        ("[]", A_AND_B, "adapter_config.json is not an object"),
        ("{", A_AND_B, "adapter_config.json is not JSON"),
        ('{"lora_parameters": {"rank": 2, "scale": NaN}}', A_AND_B, "is no number"),
    ],
)
def test_what_does_not_fit_is_not_offered_and_the_reason_is_told(
    tmp_path: Path, config: object, tensors: dict[str, tuple[int, ...]], why: str
) -> None:
    assert why in reason(tmp_path, config, tensors)


def test_arrays_that_are_no_floats_or_no_safetensors_are_refused(tmp_path: Path) -> None:
    assert "has the type I8" in reason(tmp_path / "whole", LORA, A_AND_B, dtype=np.int8)
    write_adapter(tmp_path / "torn" / "mine", LORA, A_AND_B)
    (tmp_path / "torn" / "mine" / "adapters.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(Unusable, match=r"adapters\.safetensors: its header has an impossible length"):
        read_adapter(tmp_path / "torn" / "mine", tmp_path)
    (tmp_path / "torn" / "mine" / "adapters.safetensors").rename(tmp_path / "torn" / "mine" / "adapters.npz")
    with pytest.raises(Unusable, match=r"it has no adapters\.safetensors"):
        read_adapter(tmp_path / "torn" / "mine", tmp_path)


@pytest.mark.parametrize(
    ("more", "scale"),
    [({}, 16.0), ({"use_rslora": True}, 32 / 2**0.5), ({"lora_dropout": 0.1, "rank_pattern": {}, "init_lora_weights": True}, 16.0)],
)
def test_pefts_matrices_are_the_transposed_ones_and_its_scale_is_alpha_by_rank(tmp_path: Path, more: dict[str, Any], scale: float) -> None:
    write_base(tmp_path / "models" / "base", LAYERS)
    write_adapter(tmp_path / "adapters" / "mine", PEFT | more, PEFT_A_AND_B, peft=True)
    found = find_models([tmp_path / "models"], None, [tmp_path / "adapters"])
    assert ids(found) == ["base", "base:mine"]
    adapter = found.models[1].adapter
    assert adapter is not None
    assert (adapter.form, adapter.rank, adapter.scale) == ("peft", 2, pytest.approx(scale))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"peft_type": "IA3"}, "no LoRA adapter"),
        ({"task_type": "SEQ_CLS"}, "another task"),
        ({"bias": "all"}, "changes biases"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
        ({"rank_pattern": {"q_proj": 4}}, "'rank_pattern'"),
        ({"alpha_pattern": {"q_proj": 4}}, "'alpha_pattern'"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out'"),
        ({"layer_replication": [[0, 1]]}, "'layer_replication'"),
        ({"alora_invocation_tokens": [1]}, "'alora_invocation_tokens'"),
        ({"brand_new": 1}, "'brand_new'"),
        ({"init_lora_weights": "pissa"}, "changed weights of its model"),
        ({"r": 4}, "does not have the rank 4"),
        ({"use_dora": True}, "whether it is DoRA"),
    ],
)
def test_what_cannot_be_mapped_exactly_is_refused_by_name(tmp_path: Path, more: dict[str, Any], why: str) -> None:
    assert why in reason(tmp_path, PEFT | more, PEFT_A_AND_B, peft=True)


def test_an_array_of_pefts_that_is_not_a_linear_layers_is_refused(tmp_path: Path) -> None:
    tensors: dict[str, tuple[int, ...]] = PEFT_A_AND_B | {"base_model.model.model.embed_tokens.lora_embedding_A": (2, 10)}
    assert "is nothing that LoRA adds" in reason(tmp_path, PEFT, tensors, peft=True)


def test_packed_weights_have_the_size_that_they_stand_for(tmp_path: Path) -> None:
    other = "model.layers.0.mlp.up_proj"
    config = {"model_type": "llama", "quantization": {"bits": 4, "group_size": 32, other: {"bits": 8, "group_size": 32}}}
    packed = {f"{Q}.scales": np.zeros((6, 2), np.float16), f"{other}.scales": np.zeros((6, 2), np.float16)}
    base = write_base(tmp_path / "base", {Q: (6, 8), other: (6, 16)}, config, **packed)
    assert layer_shapes(base) == {Q: (6, 64), other: (6, 64)}
    tensors: dict[str, tuple[int, ...]] = {
        f"{layer}.{part}": shape for layer in (Q, other) for part, shape in (("lora_a", (64, 2)), ("lora_b", (2, 6)))
    }
    check_fit(read_adapter(write_adapter(tmp_path / "mine", LORA, tensors), tmp_path), read(base, "base"))


def test_the_layers_of_experts_fit_as_mlx_lm_stacks_them(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.switch_mlp.up_proj"
    base = read(write_base(tmp_path / "base", {experts: (3, 6, 4)}), "base")
    check_fit(
        read_adapter(write_adapter(tmp_path / "good", LORA, {f"{experts}.lora_a": (3, 2, 4), f"{experts}.lora_b": (3, 6, 2)}), tmp_path),
        base,
    )
    flat = read_adapter(write_adapter(tmp_path / "bad", LORA, {f"{experts}.lora_a": (4, 2), f"{experts}.lora_b": (2, 6)}), tmp_path)
    with pytest.raises(Unusable, match="another size"):
        check_fit(flat, base)


@pytest.mark.parametrize("config", [BERT, {"model_type": "qwen2_vl", "vision_config": {}}])
def test_models_of_other_kinds_take_no_adapters(tmp_path: Path, config: dict[str, Any]) -> None:
    base = write_base(tmp_path / "models" / "base", LAYERS, config)
    write_adapter(base / "adapters" / "mine", LORA, A_AND_B)
    (broken,) = find_models([tmp_path / "models"], None).unusable
    assert broken.id == "base:mine"
    assert broken.reason.endswith("model; adapters are for text models")


@pytest.mark.requirement("F2")
def test_no_link_leads_out_of_the_folder(tmp_path: Path) -> None:
    write_base(tmp_path / "models" / "base", LAYERS)
    elsewhere = write_adapter(tmp_path / "elsewhere" / "mine", LORA, A_AND_B)
    inside = write_adapter(tmp_path / "adapters" / "inside", LORA, A_AND_B)
    (tmp_path / "adapters" / "folder").symlink_to(elsewhere)
    (tmp_path / "adapters" / "circle").symlink_to(tmp_path / "adapters" / "circle")
    (tmp_path / "adapters" / "alias").symlink_to(inside)
    for name, linked in (("file", "adapters.safetensors"), ("config", "adapter_config.json")):
        folder = write_adapter(tmp_path / "adapters" / name, LORA, A_AND_B)
        (folder / linked).unlink()
        (folder / linked).symlink_to(elsewhere / linked)
    found = find_models([tmp_path / "models"], None, [tmp_path / "adapters"])
    assert [model.id for model in found.models] == ["base", "base:alias", "base:inside"]
    assert {broken.id: broken.reason for broken in found.unusable} == {
        "*:folder": "folder is a link that leads out of the folder",
        "*:file": "adapters.safetensors is a link that leads out of the folder",
        "*:config": "adapter_config.json is a link that leads out of the folder",
    }


@pytest.mark.requirement("F2")
def test_a_models_adapters_may_be_links_within_its_download_and_nowhere_else(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--base"
    snapshot = write_base(repository / "snapshots" / "abc", LAYERS)
    blobs = write_adapter(repository / "blobs" / "mine", LORA, A_AND_B)
    (snapshot / "adapters" / "mine").mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / "adapters" / "mine" / file.name).symlink_to(file)
    (snapshot / "adapters" / "theirs").symlink_to(write_adapter(tmp_path / "theirs", LORA, A_AND_B))
    found = find_models([], tmp_path / "hub")
    assert [model.id for model in found.models] == ["org/base", "org/base:mine"]
    assert [broken.id for broken in found.unusable] == ["org/base:theirs"]


@pytest.mark.parametrize("name", ["a b", "a:b", "-a", "a..b", "é"])
def test_names_that_are_no_ids_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unusable, match="its name may hold"):
        read_adapter(write_adapter(tmp_path / name, LORA, A_AND_B), tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rank", "scale", "bits"]), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["peft_type", "fine_tune_type", "lora_parameters", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "task_type", "model", "more"]


@given(st.dictionaries(st.sampled_from(KEYS), JSON), st.sampled_from([LORA, PEFT, {}]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_configuration_does_more_than_to_be_refused(tmp_path: Path, said: dict[str, Any], otherwise: dict[str, Any]) -> None:
    folder = tmp_path / "mine"
    if not folder.exists():
        write_adapter(folder, {}, A_AND_B)
        write_adapter(tmp_path / "theirs", {}, PEFT_A_AND_B, peft=True)
        (tmp_path / "theirs" / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(otherwise | said))
    try:
        adapter = read_adapter(folder, tmp_path)
    except Unusable:
        return
    assert adapter.rank == 2
