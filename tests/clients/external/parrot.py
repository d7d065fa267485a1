"""Makes models for agents, whose prompts have tens of thousands of tokens: quick to compute, long in context, with one thing to say.

Its attention adds nothing, so that the last token alone decides what comes next: after any prompt that is a short thought, `SAID`, and
the end of the turn; where a grammar wants something else, the shortest way out of it. One that has a call makes it first, and has its say
once there is a result. The keys and values are computed and kept like any other model's, and these tests are about what of them is found
again. The tokenizer is trained on the sources of this Python, so that prose and code come to about as many tokens as in a large model's.
"""

import json
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import Tokenizer

from tests.e2e.serving import FIXTURE_MODELS
from tests.fixtures.make.tokenizers import Marks, byte_level

CONTEXT = 131072
SAID = "one two three."
_VOCABULARY = 12000
_HIDDEN, _HEAD, _INNER = 64, 32, 64
_SOURCE = FIXTURE_MODELS / "qwen3"
_END, _PAD = "<|im_end|>", "<|endoftext|>"
# The last token of a prompt is "\n", or "\n\n" after an empty thought.
_THINKS = ("\n", "<think>", "Say", "</think>")
_SAYS = ("\n\n", "one", " two", " three", ".", _END)
# What a grammar may ask for, the likeliest first.
_WAYS_OUT = ('"', "}", "]", "0", "{", "[", ":", ",")


def make_parrot(folder: Path, name: str, call: dict[str, Any] | None = None) -> None:
    """`call` is what a tool call of the family says: `{"name": …, "arguments": {…}}`."""
    model = folder / name
    model.mkdir(parents=True)
    # All of a call is one token: no other could follow it twice.
    spelt = None if call is None else f"\n{json.dumps(call)}\n"
    tokenizer = _tokenizer(() if spelt is None else (spelt,))
    tokenizer.save(str(model / "tokenizer.json"))
    follows = dict(pairwise((*_THINKS, *_SAYS) if spelt is None else (*_THINKS, "<tool_call>", spelt, "</tool_call>", _END)))
    follows |= dict(pairwise(_SAYS))
    end, pad = tokenizer.token_to_id(_END), tokenizer.token_to_id(_PAD)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    shape = {
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": _HEAD,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "vocab_size": size,
    }
    ends = {"eos_token_id": [end, pad], "pad_token_id": pad}
    for file, changes in {
        "config.json": shape | ends,
        "generation_config.json": ends,
        "tokenizer_config.json": {"model_max_length": CONTEXT},
    }.items():
        (model / file).write_text(json.dumps(json.loads((_SOURCE / file).read_text()) | changes))
    template = (_SOURCE / "chat_template.jinja").read_text(encoding="utf-8")
    thinks = "{{- '' if think else"
    assert template.count(thinks) == 1
    has_result = "messages | selectattr('role', 'equalto', 'tool') | list"
    (model / "chat_template.jinja").write_text(template.replace(thinks, f"{{{{- '' if think and not ({has_result}) else"))
    mx.save_safetensors(str(model / "model.safetensors"), _weights(tokenizer, size, follows))


def _tokenizer(calls: tuple[str, ...]) -> Tokenizer:
    added = json.loads((_SOURCE / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    marks = Marks(
        special=tuple(t["content"] for t in added if t["special"]),
        plain=(*(t["content"] for t in added if not t["special"]), *calls),
    )
    return byte_level(_texts(), marks, _VOCABULARY)


def _texts() -> Iterator[str]:
    yield "".join((*_THINKS, *_SAYS)) * 1000
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="ignore")


def _weights(tokenizer: Tokenizer, size: int, follows: dict[str, str]) -> dict[str, mx.array]:
    """Direction 0 is that of every token that nothing follows but the end; each other one has a direction of its own."""
    direction_of = mx.zeros(size, dtype=mx.int32)
    head = mx.zeros((size, _HIDDEN))
    head[_id(tokenizer, _END), 0] = 20.0
    for i, (token, following) in enumerate(follows.items(), start=1):
        direction_of[_id(tokenizer, token)] = i
        head[_id(tokenizer, following), i] = 20.0
    for i, token in enumerate(_WAYS_OUT):
        head[_id(tokenizer, token)] = mx.maximum(head[_id(tokenizer, token)], 10.0 - i)
    key = mx.random.key(7)
    layer = "model.layers.0"
    random = {f"{layer}.self_attn.{name}_proj.weight": mx.random.normal((_HEAD, _HIDDEN), key=key) * 0.1 for name in "qkv"}
    weights = random | {
        "model.embed_tokens.weight": mx.eye(_HIDDEN)[direction_of],
        "model.norm.weight": mx.ones(_HIDDEN),
        "lm_head.weight": head,
        f"{layer}.input_layernorm.weight": mx.ones(_HIDDEN),
        f"{layer}.post_attention_layernorm.weight": mx.ones(_HIDDEN),
        f"{layer}.self_attn.q_norm.weight": mx.ones(_HEAD),
        f"{layer}.self_attn.k_norm.weight": mx.ones(_HEAD),
        f"{layer}.self_attn.o_proj.weight": mx.zeros((_HIDDEN, _HEAD)),
        f"{layer}.mlp.gate_proj.weight": mx.zeros((_INNER, _HIDDEN)),
        f"{layer}.mlp.up_proj.weight": mx.zeros((_INNER, _HIDDEN)),
        f"{layer}.mlp.down_proj.weight": mx.zeros((_HIDDEN, _INNER)),
    }
    mx.eval(weights)
    return weights


def _id(tokenizer: Tokenizer, token: str) -> int:
    (found,) = tokenizer.encode(token, add_special_tokens=False).ids
    return found
