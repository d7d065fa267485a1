"""What a reply says, without what differs from one to the next (ids, times), and whole replies put together from chunks."""

from collections.abc import Iterable
from typing import Any

from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk

Json = dict[str, Any]


def _usage(usage: CompletionUsage) -> Json:
    """Without what depends on who asked before: which tokens of the prompt were there already."""
    counts = usage.model_dump()
    (counts["prompt_tokens_details"] or {}).pop("cached_tokens", None)
    return counts


def said(reply: ChatCompletion) -> Json:
    """Choices and usage. A `content` of null and one of "" are the same: a stream opens with the latter."""
    choices = [c.model_dump(exclude={"message": {"audio", "function_call", "refusal"}}) for c in reply.choices]
    for choice in choices:
        message = choice["message"]
        message["content"] = message["content"] or ""
        message["tool_calls"] = [
            {"name": c["function"]["name"], "arguments": c["function"]["arguments"]} for c in message["tool_calls"] or []
        ]
        message.setdefault("reasoning_content", None)
        del message["annotations"]
    assert reply.usage is not None
    return {"choices": choices, "usage": _usage(reply.usage)}


def collected(chunks: Iterable[ChatCompletionChunk]) -> Json:
    """The same of a stream with `include_usage`, which is checked against the order that clients rely on."""
    all_chunks = list(chunks)
    *before, last = all_chunks
    assert len({(c.id, c.created, c.model, c.object) for c in all_chunks}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert all(c.usage is None and len(c.choices) == 1 for c in before)
    num_choices = len({c.choices[0].index for c in before})
    return {
        "choices": [_choice(i, [c for c in before if c.choices[0].index == i]) for i in range(num_choices)],
        "usage": _usage(last.usage),
    }


def _choice(index: int, chunks: list[ChatCompletionChunk]) -> Json:
    opening, *rest, final = [c.choices[0] for c in chunks]
    assert (opening.delta.role, opening.delta.content) == ("assistant", "")
    assert opening.finish_reason is None
    assert final.delta.model_dump(exclude_none=True) == {}
    assert final.finish_reason is not None
    content, reasoning, calls, logprobs = "", None, list[Json](), list[Json]()
    for choice in rest:
        delta = choice.delta
        assert delta.role is None
        assert choice.finish_reason is None
        content += delta.content or ""
        if (thought := getattr(delta, "reasoning_content", None)) is not None:
            reasoning = (reasoning or "") + thought
        for call in delta.tool_calls or []:
            assert call.function is not None
            if call.id is not None:
                assert call.index == len(calls)
                assert call.function.arguments == ""
                calls.append({"name": call.function.name, "arguments": ""})
            else:
                assert call.function.name is None
                calls[call.index]["arguments"] += call.function.arguments or ""
        if choice.logprobs is not None:
            logprobs += [t.model_dump() for t in choice.logprobs.content or []]
    return {
        "index": index,
        "finish_reason": final.finish_reason,
        "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
        "message": {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls},
    }


def written(reply: Completion) -> Json:
    """Choices and usage of a completion."""
    assert reply.usage is not None
    return {"choices": [c.model_dump() for c in reply.choices], "usage": _usage(reply.usage)}


def collected_completion(chunks: Iterable[Completion]) -> Json:
    all_chunks = list(chunks)
    *before, last = all_chunks
    assert len({(c.id, c.created, c.model, c.object) for c in all_chunks}) == 1
    assert last.choices == []
    assert last.usage is not None
    choices: dict[int, Json] = {}
    for chunk in before:
        assert chunk.usage is None
        (piece,) = chunk.choices
        choice = choices.setdefault(piece.index, {"index": piece.index, "text": "", "finish_reason": None, "logprobs": None})
        assert choice["finish_reason"] is None, "nothing follows the end of a choice"
        choice["text"] += piece.text
        choice["finish_reason"] = piece.finish_reason
        if piece.logprobs is not None:
            logprobs = piece.logprobs.model_dump()
            choice["logprobs"] = logprobs if choice["logprobs"] is None else {k: v + logprobs[k] for k, v in choice["logprobs"].items()}
    return {"choices": [choices[i] for i in sorted(choices)], "usage": _usage(last.usage)}
