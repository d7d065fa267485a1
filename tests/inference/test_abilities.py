"""What a model's files let guess of what it can do; real templates of others, where they are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_manager.core.capabilities import Abilities, Ability, Finding, with_findings
from mlx_manager.hub.adapters import read_adapter
from mlx_manager.hub.checkpoint import Checkpoint, read
from mlx_manager.hub.fingerprint import files_fingerprint
from mlx_manager.inference.abilities import guess
from mlx_manager.inference.families.detect import FAMILIES
from tests.inference.fixture_models import MODELS, dialect

NOTHING = Abilities(Ability(False), Ability(False), Ability(False), Ability(False))


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return read(shutil.copytree(MODELS / "qwen3", tmp_path / "mine"), "mine")


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "gemma3_text", "glm4"])
def test_the_files_tell_what_the_loaded_tokenizer_tells(family: str) -> None:
    guessed = guess(read(MODELS / family, family))
    theirs = dialect(family).family
    assert theirs.tool_format is not None
    assert guessed == Abilities(
        Ability(True), Ability(theirs.thinks), Ability(theirs.thinks), Ability(False), theirs.tool_format.start, theirs.reasoning_options
    )


@pytest.mark.parametrize(
    ("template", "tools", "thinking"),
    [
        ("{{ messages }}", False, False),
        ("{% if tools %}<tool_call>{% endif %}", True, False),
        ("{% if tools %}[TOOL_CALLS]{% endif %}<think>", True, True),
        ("my_tools <think>", False, True),
        ("{% if tools %}<|channel|>{% endif %}", True, True),
    ],
)
def test_a_template_gives_away_what_it_is_for(model: Checkpoint, template: str, tools: bool, thinking: bool) -> None:
    (model.path / "chat_template.jinja").write_text(template)
    guessed = guess(model)
    assert (guessed.tools, guessed.thinking) == (Ability(tools), Ability(thinking))


def test_a_template_may_stand_in_the_configuration_of_the_tokenizer(model: Checkpoint) -> None:
    before = guess(model)
    text = (model.path / "chat_template.jinja").read_text()
    (model.path / "chat_template.jinja").unlink()
    configuration = json.loads((model.path / "tokenizer_config.json").read_text())
    for written in (text, [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": text}]):
        (model.path / "tokenizer_config.json").write_text(json.dumps(configuration | {"chat_template": written}))
        assert guess(model) == before


def test_what_cannot_be_read_can_do_nothing(model: Checkpoint) -> None:
    (model.path / "chat_template.jinja").unlink()
    assert replace(guess(model), options=()) == NOTHING
    for broken in ('{"chat_template": ["x", 7]}', "[", '{"chat_template": 7}'):
        (model.path / "tokenizer_config.json").write_text(broken)
        assert guess(model) == NOTHING
    shutil.rmtree(model.path)
    assert guess(model) == NOTHING


def test_every_family_is_guessed_from_nothing_but_its_name(model: Checkpoint) -> None:
    (model.path / "chat_template.jinja").unlink()
    for family in FAMILIES:
        for model_type in family.model_types:
            (model.path / "config.json").write_text(json.dumps({"model_type": model_type}))
            assert guess(model).tools == Ability(False)


def test_a_finding_counts_for_the_files_that_it_was_made_with() -> None:
    guessed = replace(NOTHING, thinking=Ability(True))
    found = {"tools": Finding(True, "it called", "these", 5), "thinking": Finding(False, "it did not", "these", 5)}
    assert with_findings(guessed, found, "these") == replace(  # type: ignore[arg-type]
        guessed, tools=Ability(True, "verified", "it called", 5), thinking=Ability(False, "failed", "it did not", 5)
    )
    assert with_findings(guessed, found, "others") == guessed  # type: ignore[arg-type]


def test_a_fingerprint_is_that_of_template_tokenizer_weights_and_adapter(model: Checkpoint) -> None:
    seen = {files_fingerprint(model)}
    assert files_fingerprint(model) in seen
    adapters = shutil.copytree(MODELS.parent / "adapters", model.path / "adapters")
    adapted = [replace(model, adapter=read_adapter(adapters / name, model.path)) for name in ("pirate", "butler")]
    seen |= {files_fingerprint(one) for one in adapted}
    for name in ("chat_template.jinja", "tokenizer.json", "config.json", "model.safetensors"):
        file = model.path / name
        file.write_bytes(file.read_bytes() + b" ")
        seen.add(files_fingerprint(model))
    assert len(seen) == 7
