"""Arguments of a call reach the client while the model writes them, from each family's own spelling, over a real socket."""

import json
from typing import Any

import pytest
from openai import OpenAI

from tests.fixtures.prompts import PROMPTS

CALLING = [
    (model, name)
    for model, prompts in PROMPTS.items()
    for name, prompt in prompts.items()
    if prompt.calls and prompt.tools and prompt.ends and "tool_calls" not in str(prompt.messages)
]


@pytest.mark.requirement("ADAPT-07")
@pytest.mark.parametrize(("model", "name"), CALLING, ids=[f"{m} {n}" for m, n in CALLING])
def test_arguments_stream_and_join_to_the_same_json_as_the_whole_reply(client: OpenAI, model: str, name: str) -> None:
    prompt = PROMPTS[model][name]
    request: Any = {"model": model, "messages": prompt.messages, "tools": prompt.tools, "temperature": 0, "max_tokens": 400}
    request["extra_body"] = {"chat_template_kwargs": prompt.template_kwargs}
    whole = client.chat.completions.create(**request).choices[0].message
    pieces: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(**request, stream=True):
        for call in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
            assert call.function is not None
            pieces.setdefault(call.index, []).append(call.function.arguments or "")
    expected = [call.function.arguments for call in whole.tool_calls or [] if call.type == "function"]
    assert ["".join(pieces[index]) for index in sorted(pieces)] == expected
    assert [json.loads(arguments) for arguments in expected] == [arguments for _, arguments in prompt.calls]
    if model != "gemma3_text":  # Python calls are read when they have ended
        assert all(len([piece for piece in each if piece]) > 1 for each in pieces.values())
