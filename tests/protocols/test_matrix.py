from pathlib import Path
from typing import get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from mlx_manager.protocols.matrix import markdown
from mlx_manager.protocols.openai import schema

TABLES = [(schema.ChatRequest, schema.CHAT_FIELDS), (schema.CompletionRequest, schema.COMPLETION_FIELDS)]


def test_the_published_matrix_is_that_of_the_code() -> None:
    published = Path(__file__).parents[2] / "docs" / "api-fields.md"
    assert published.read_text() == markdown(), "run: python -m mlx_manager.protocols.matrix > docs/api-fields.md"


@pytest.mark.parametrize(
    ("params", "rules"), [(chat_create_params, schema.CHAT_FIELDS), (completion_create_params, schema.COMPLETION_FIELDS)]
)
def test_every_field_that_the_sdk_documents_has_a_rule(params: object, rules: dict[str, object]) -> None:
    documented = get_type_hints(params.CompletionCreateParamsBase) | get_type_hints(params.CompletionCreateParamsStreaming)  # type: ignore[attr-defined]
    assert documented.keys() - rules.keys() == set()


@pytest.mark.parametrize(("model", "rules"), TABLES)
def test_what_is_read_is_honoured_and_what_is_honoured_is_read(model: type[schema.Generation], rules: dict[str, schema.Rule]) -> None:
    assert model.model_fields.keys() == {name for name, rule in rules.items() if rule.kind == "honoured"}


@pytest.mark.parametrize(("model", "rules"), TABLES)
def test_every_rule_that_takes_something_away_says_why(model: object, rules: dict[str, schema.Rule]) -> None:
    assert all(rule.note for rule in rules.values() if rule.kind != "honoured")
