"""Clips over a real socket through the official SDK."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.e2e.replies import collected
from tests.fixtures.clips import clip, data_url, shots
from tests.fixtures.make.vision import COLOURS

MODEL = "qwen2_vl"
QUESTION = "What colors are these images?"


def watched(data: bytes, kind: str = "video/mp4", **options: Any) -> Any:
    part = {"type": "video_url", "video_url": {"url": data_url(data, kind), **options}}
    return [{"role": "user", "content": [{"type": "text", "text": QUESTION}, part]}]


def ask(client: OpenAI, messages: Any, model: str = MODEL, **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=40, **options)


@pytest.mark.requirement("CHAT-03", "F14")
@pytest.mark.parametrize(
    ("kind", "suffix", "codec"),
    [("video/mp4", ".mp4", "mp4v"), ("video/quicktime", ".mov", "mp4v"), ("video/webm;codecs=vp8,opus", ".webm", "VP80")],
)
def test_a_real_clip_gets_an_answer_whole_and_streamed(client: OpenAI, kind: str, suffix: str, codec: str) -> None:
    messages = watched(clip("red", "blue", suffix=suffix, codec=codec), kind, num_frames=2)
    whole = ask(client, messages).choices[0].message.content
    stream = ask(client, messages, stream=True, stream_options={"include_usage": True})
    assert whole == "The first image is red and the second image is blue."
    assert collected(stream)["choices"][0]["message"]["content"] == whole


def test_clips_are_looked_at_side_by_side_and_found_again(client: OpenAI) -> None:
    pairs = [("red", "blue"), ("green", "yellow"), ("cyan", "orange")]
    clips = [watched(clip(*pair), num_frames=2) for pair in pairs]
    with ThreadPoolExecutor(6) as pool:
        answers = [reply.choices[0].message.content for reply in pool.map(lambda messages: ask(client, messages), clips)]
    assert answers == [f"The first image is {a} and the second image is {b}." for a, b in pairs]
    usage = ask(client, clips[0]).usage
    assert usage.prompt_tokens_details.cached_tokens >= 32


def test_usage_counts_the_frames(client: OpenAI) -> None:
    data = clip("red", "blue")
    num_tokens = {n: ask(client, watched(data, **n_frames(n))).usage.prompt_tokens for n in (None, 2, 3, 8, 20)}
    each = num_tokens[3] - num_tokens[2]
    assert each == 2 + 4
    assert num_tokens[8] == num_tokens[None] == num_tokens[2] + 6 * each
    assert num_tokens[20] >= num_tokens[2] + 18 * each


def n_frames(num_frames: int | None) -> dict[str, int]:
    return {} if num_frames is None else {"num_frames": num_frames}


@pytest.mark.requirement("F14")
@pytest.mark.parametrize("stream", [False, True])
def test_a_clip_of_more_than_two_minutes_is_refused_by_its_field(client: OpenAI, stream: bool) -> None:
    with pytest.raises(BadRequestError, match="a video is 120 seconds long at most") as refused:
        ask(client, watched(shots([COLOURS["red"]], 125, 1.0)), stream=stream)
    assert refused.value.param == "messages[0].content[1].video_url"


def test_what_is_no_clip_is_refused_by_its_field(client: OpenAI) -> None:
    for data, kind, message in (
        (b"hello", "video/mp4", "the video could not be read"),
        (clip("red")[:300], "video/mp4", "the video could not be read"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "video/mp4", "the video could not be read"),
        (clip("red"), "application/vnd.apple.mpegurl", "a video is one of video/mp4, video/quicktime, video/webm"),
    ):
        with pytest.raises(BadRequestError, match=message) as refused:
            ask(client, watched(data, kind))
        assert refused.value.param == "messages[0].content[1].video_url"


def test_a_model_that_reads_text_only_says_so(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="This model reads text only: it cannot take the video in") as refused:
        ask(client, watched(b"never looked at"), model="qwen3")
    assert refused.value.param == "messages[0].content[1].video_url"
