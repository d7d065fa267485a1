"""Clips → frames: real files, whatever they say of themselves, and what is none."""

import os
import re
import struct
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Message, Video, content_of
from mlx_manager.core.requests import Conversation, GenerationRequest, Sampling
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.video_reader import MAX_SIDE, frames_of, opencv, spread
from tests.fixtures.clips import clip, shots
from tests.fixtures.make.vision import COLOURS
from tests.inference.fixture_models import attached, within
from tests.inference.test_pictures import LocalModel, TextDelta, encoded, make_engine, painted, spoken

WHERE = "messages[0].content[1].video_url"


def named(picture: Pillow.Image) -> str:
    """The colour that a plain picture is nearest to."""
    colour = np.asarray(picture, np.int32).reshape(-1, 3).mean(axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - colour).sum()))


def seen(data: bytes, num_frames: int = 8) -> list[str]:
    return [named(frame.pixels) for frame in frames_of(Video(data, num_frames, WHERE))]


@pytest.mark.requirement("CHAT-03", "F14")
@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "mp4v"), (".mov", "mp4v"), (".webm", "VP80"), (".webm", "VP90")])
def test_frames_are_spread_evenly_over_clips_of_every_kind(suffix: str, codec: str) -> None:
    data = clip("red", "green", "blue", "yellow", suffix=suffix, codec=codec)
    assert seen(data, 8) == ["red", "red", "green", "green", "blue", "blue", "yellow", "yellow"]
    assert seen(data, 2) == ["green", "yellow"]
    assert seen(data, 4) == ["red", "green", "blue", "yellow"]


def test_of_a_clip_with_few_frames_all_are_shown() -> None:
    assert seen(shots([COLOURS["red"], COLOURS["blue"], COLOURS["green"]], 1, 10.0), 8) == ["red", "blue", "green"]
    assert seen(shots([COLOURS["red"]], 1, 10.0), 8) == ["red"]


@given(st.integers(1, 32), st.integers(1, 5000))
def test_the_numbers_of_frames_are_different_in_order_and_inside(wanted: int, length: int) -> None:
    numbers = spread(wanted, length)
    assert len(numbers) == min(wanted, length)
    assert numbers == sorted(set(numbers))
    assert numbers[0] >= 0
    assert numbers[-1] < length
    gaps = [b - a for a, b in pairwise(numbers)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_a_clip_that_does_not_say_how_long_it_is_is_read_to_its_end() -> None:
    """As browsers record them: the length is not known when the header is written."""
    data = clip("red", "blue", suffix=".webm", codec="VP80")
    at = data.index(b"\x44\x89\x88")  # Duration, as a double of 8 bytes
    assert struct.unpack(">d", data[at + 3 : at + 11])[0] == 2000.0
    live = data[:at] + b"\xec\x89" + bytes(9) + data[at + 11 :]  # Void
    assert len(live) == len(data)
    assert seen(live, 4) == ["red", "red", "blue", "blue"]


def test_a_clip_that_ends_before_it_says_is_shown_as_far_as_it_goes() -> None:
    data = clip("red", "blue", suffix=".webm", codec="VP80")
    at = data.index(b"\x44\x89\x88")
    longer = data[: at + 3] + struct.pack(">d", 20_000.0) + data[at + 11 :]
    assert seen(longer, 4) == ["red", "red", "blue", "blue"]


@pytest.mark.requirement("F14")
def test_a_clip_of_more_than_two_minutes_is_refused_by_what_it_says_and_by_what_it_is() -> None:
    assert seen(shots([COLOURS["red"]], 119, 1.0), 1) == ["red"]
    data = shots([COLOURS["red"]], 125, 1.0, suffix=".webm", codec="VP80")
    at = data.index(b"\x44\x89\x88")
    lying = data[: at + 3] + struct.pack(">d", 1_000.0) + data[at + 11 :]
    unsaid = data[:at] + b"\xec\x89" + bytes(9) + data[at + 11 :]
    for too_long in (shots([COLOURS["red"]], 125, 1.0), data, unsaid):
        with pytest.raises(InvalidField) as refused:
            seen(too_long)
        assert refused.value.message == f"Invalid '{WHERE}': a video is 120 seconds long at most."
        assert refused.value.param == WHERE
    assert set(seen(lying)) == {"red"}  # what it says is short is looked at for as long as it says


def test_frames_are_no_larger_than_is_looked_at() -> None:
    (frame,) = frames_of(Video(clip("red", seconds=0.1, size=(1280, 720)), 1, WHERE))
    assert frame.pixels.size == (MAX_SIDE, MAX_SIDE * 720 // 1280)


def test_a_clip_of_huge_frames_is_refused() -> None:
    data = clip("red", seconds=0.1, size=(8000, 3200))
    with pytest.raises(InvalidField, match=r"a frame has 25 million pixels at most, and here it has 25,600,000\.") as refused:
        seen(data)
    assert refused.value.param == WHERE


def test_decoding_has_a_limit_in_time() -> None:
    with pytest.raises(InvalidField, match="decoding it takes more than 0 seconds"):
        frames_of(Video(clip("red"), 8, WHERE), max_decode_s=0)


MP4 = clip("red", "blue")
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        MP4[:40],
        MP4[: len(MP4) // 2],
        b"\0" * 4000,
        MP4[:28] + os.urandom(2000),
        b"\x1aE\xdf\xa3" + os.urandom(2000),
        encoded(painted("red")),
        PLAYLIST,
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"RIFF\x00\x00\x00\x00AVI LIST" + bytes(100),
    ],
)
def test_what_is_no_clip_is_refused_in_our_words(data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidField) as refused:
        seen(data)
    assert refused.value.message == f"Invalid '{WHERE}': the video could not be read."
    assert capfd.readouterr() == ("", "")


def test_ffmpeg_opens_no_format_that_names_other_files(tmp_path: Path) -> None:
    """Even if the first bytes had not given it away."""
    cv2 = opencv()
    (tmp_path / "clip.mp4").write_bytes(MP4)
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{tmp_path / 'clip.mp4'}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    assert cv2.VideoCapture(str(tmp_path / "clip.mp4"), cv2.CAP_FFMPEG).isOpened()
    for name in ("list.m3u8", "list.ffconcat"):
        assert not cv2.VideoCapture(str(tmp_path / name), cv2.CAP_FFMPEG).isOpened()


def test_nothing_of_a_clip_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen(MP4)
    for broken in (MP4[:100], b"\x1aE\xdf\xa3" + bytes(50)):
        with pytest.raises(InvalidField):
            seen(broken)
    assert list(tmp_path.iterdir()) == []


def test_a_clip_is_decoded_once_and_its_frames_are_its_own() -> None:
    reader = spoken().pictures
    assert reader is not None
    video = Video(clip("red", "blue"), 2, WHERE)
    first, second = reader.watch(video)
    (again, _) = reader.watch(Video(video.data, 2, "elsewhere"))
    assert again.pixels is first.pixels
    assert again.where == "elsewhere"
    other, _ = reader.watch(Video(video.data, 3, WHERE))[:2]
    assert len({first.digest, second.digest, other.digest}) == 3
    assert reader.read(first, "<|image_pad|>").names != reader.read(second, "<|image_pad|>").names


def shown(*parts: str | Video) -> GenerationRequest:
    return GenerationRequest("m", (Conversation((Message("user", content_of(parts)),)),), sampling=Sampling(temperature=0.0), max_tokens=40)


def test_a_prompt_says_that_pictures_are_frames() -> None:
    (made,) = spoken().prepare(shown("What is this?", Video(MP4, 3, WHERE))).specs
    assert len(made.pictures) == 3
    text = re.sub("<.*?>", "", spoken().decode(made.prompt))
    assert "user\nWhat is this?Video, 3 frames:\n" in text
    (made,) = spoken().prepare(shown(Video(MP4, 1, WHERE))).specs
    assert "Video, 1 frame:" in spoken().decode(made.prompt)


@pytest.mark.requirement("CHAT-03", "F14")
@pytest.mark.parametrize(("first", "second"), [("red", "blue"), ("green", "yellow"), ("cyan", "orange")])
async def test_a_model_names_the_colours_of_a_real_clip(device: Device, first: str, second: str) -> None:
    prepared = spoken().prepare(shown("What colors are these images?", Video(clip(first, second), 2, WHERE)))
    async with attached(device, make_engine(device)) as engine:

        async def answer() -> str:
            return "".join([e.text async for e in LocalModel(spoken(), engine).generate(prepared) if isinstance(e, TextDelta)])

        assert await within(answer(), 60) == f"The first image is {first} and the second image is {second}."
