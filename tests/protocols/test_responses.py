"""What happened → what an OpenAI client reads, where a real model would not go."""

import json
import math

from mlx_manager.core.events import Choice, ChoiceFinished, Reply, TextDelta, TokenLogprob, Usage
from mlx_manager.protocols.openai.responses import ChatWriter, CompletionWriter

NEVER = TokenLogprob("a", b"a", -math.inf, (TokenLogprob("b", b"b", -math.inf),))


def test_what_cannot_happen_has_a_log_probability_that_json_can_write() -> None:
    chat = ChatWriter("id", "m", 0, "f", num_choices=1)
    completion = CompletionWriter("id", "m", 0, "f", num_replies=1)
    reply = Reply([Choice(text="a", logprobs=[NEVER], finish=ChoiceFinished("stop"))], Usage())
    for written in (chat.whole(reply), completion.whole(reply), *(frame.data for frame in chat.frames(TextDelta("a", logprobs=(NEVER,))))):
        assert "-9999.0" in json.dumps(written, allow_nan=False)


def test_a_reply_that_says_nothing_has_the_empty_string() -> None:
    whole = ChatWriter("id", "m", 0, "f", num_choices=1).whole(Reply([Choice(finish=ChoiceFinished("stop"))], Usage()))
    assert whole["choices"][0]["message"]["content"] == ""
