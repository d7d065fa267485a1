"""`docs/api-fields.md`: what each field does. `python -m mlx_manager.protocols.matrix > docs/api-fields.md` writes it anew."""

import sys
from collections.abc import Mapping

from mlx_manager.protocols.anthropic.schema import COUNT_FIELDS, MESSAGE_FIELDS
from mlx_manager.protocols.fields import Rule
from mlx_manager.protocols.openai.embeddings import EMBEDDING_FIELDS
from mlx_manager.protocols.openai.rerank import RERANK_FIELDS
from mlx_manager.protocols.openai.schema import CHAT_FIELDS, COMPLETION_FIELDS
from mlx_manager.protocols.openai.tokens import DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from mlx_manager.protocols.responses.schema import RESPONSES_FIELDS

_INTRODUCTION = """\
# Request fields

Nothing is ignored in silence. Every field has one of three classes:

- **honoured**: it does what the API documents;
- **noted**: it is accepted; when it had no effect, its name is in the reply header `x-ignored-fields`;
- **refused**: the reply is a 400 whose `param` names it.

A field that is not listed here is accepted, has no effect, and is named in `x-ignored-fields`. An explicit `null` is the same as
an absent field; `0`, `""`, `false` and `[]` are values. Where a request asks for a profile, what is absent is
that profile's ([profiles.md](profiles.md)).

This page is made from the tables in `src/mlx_manager/protocols`.
"""

_ENDPOINTS: Mapping[str, Mapping[str, Rule]] = {
    "POST /v1/chat/completions": CHAT_FIELDS,
    "POST /v1/completions": COMPLETION_FIELDS,
    "POST /v1/messages": MESSAGE_FIELDS,
    "POST /v1/messages/count_tokens": COUNT_FIELDS,
    "POST /v1/embeddings": EMBEDDING_FIELDS,
    "POST /v1/rerank": RERANK_FIELDS,
    "POST /v1/tokenize": TOKENIZE_FIELDS,
    "POST /v1/detokenize": DETOKENIZE_FIELDS,
    "POST /v1/responses": RESPONSES_FIELDS,
}


def markdown() -> str:
    """The page."""
    return _INTRODUCTION + "".join(_table(endpoint, rules) for endpoint, rules in _ENDPOINTS.items())


def _table(endpoint: str, rules: Mapping[str, Rule]) -> str:
    rows = [f"| `{name}` | {rule.kind} | {rule.note} |" for name, rule in rules.items()]
    return "\n".join(["", f"## `{endpoint}`", "", "| Field | Class | Note |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    sys.stdout.write(markdown())
