"""Pictures through the engine: what a model says of them is what mlx-vlm makes it say, in any batch, chunk and after any cache hit."""

import asyncio
import io
import random
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm.utils import load_model, load_processor
from PIL import Image as Pillow

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.events import Finished, TextDelta, Usage
from mlx_manager.core.messages import Image, Message, content_of
from mlx_manager.core.requests import Conversation, GenerationRequest, RawPrompt, Sampling
from mlx_manager.inference.dialect import Dialect
from mlx_manager.inference.engine import paged_attention
from mlx_manager.inference.engine.device import Device
from mlx_manager.inference.engine.engine import Engine
from mlx_manager.inference.engine.picture_model import PictureModel
from mlx_manager.inference.engine.scheduler import Chunk
from mlx_manager.inference.engine.sequence import SequenceSpec
from mlx_manager.inference.loader import EngineLimits, load_dialect
from mlx_manager.inference.loader import make_engine as build_engine
from mlx_manager.inference.local_model import LocalModel
from mlx_manager.inference.picture_reader import MAX_FRAMES, MAX_PIXELS, MAX_SIDE, _gif_frames, decoded
from tests.fixtures.make.vision import COLOURS, paint
from tests.inference.fixture_models import attached, folder, receive, within

Part = str | Pillow.Image
NUM_TOKENS = 24


@cache
def spoken() -> Dialect:
    return load_dialect(folder("qwen2_vl"), 4096, sees=True)


@cache
def sighted() -> Any:
    return load_model(folder("qwen2_vl"))


@cache
def processor() -> Any:
    return load_processor(folder("qwen2_vl"), add_detokenizer=False)


def make_engine(device: Device, **limits: Any) -> Engine:
    asked = EngineLimits(**{"check_every": 1, "step_s": 10.0, "kv_bytes": 64 << 20, "ahead": True} | limits)
    return build_engine(PictureModel(sighted()), device, asked, vocab_size=spoken().vocab_size, model_key="qwen2_vl")


def encoded(picture: Pillow.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def request(*parts: Part) -> GenerationRequest:
    content = content_of([part if isinstance(part, str) else Image(encoded(part), "messages[0]") for part in parts])
    conversation = Conversation((Message("user", content),))
    return GenerationRequest("m", (conversation,), sampling=Sampling(temperature=0.0), max_tokens=NUM_TOKENS)


def spec(*parts: Part, stops: bool = False) -> SequenceSpec:
    """Goes on behind the end of its turn unless it `stops`: more tokens to be wrong in."""
    (made,) = spoken().prepare(request(*parts)).specs
    return made if stops else SequenceSpec(made.prompt, made.max_tokens, made.sampling, pictures=made.pictures)


def reference(*parts: Part) -> list[int]:
    """mlx-vlm's own model, one sequence, whole prompt, by its processor and its cache."""
    from mlx_vlm.models.cache import make_prompt_cache  # noqa: PLC0415

    model = sighted()
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    text = processor().tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    images = [part for part in parts if not isinstance(part, str)]
    given = processor()(text=[text], images=images or None, return_tensors="np")
    arrays = {k: mx.array(v) for k, v in given.items() if k not in ("input_ids", "attention_mask")}
    kept = make_prompt_cache(model.language_model)
    model.language_model._rope_deltas = model.language_model._position_ids = None
    tokens: list[int] = []
    inputs = mx.array(given["input_ids"])
    logits = model(inputs, arrays.pop("pixel_values", None), cache=kept, **arrays).logits
    for _ in range(NUM_TOKENS):
        token = int(mx.argmax(logits[0, -1]).item())
        tokens.append(token)
        logits = model.language_model(mx.array([[token]]), cache=kept).logits
    return tokens


def painted(name: str, seed: int = 0) -> Pillow.Image:
    return paint(random.Random(seed), name)


LONG = "Look at it for a while, and then tell me: what color is this image? " * 3
CASES: list[tuple[Part, ...]] = [
    *((painted(name, i), "What color is this image?") for i, name in enumerate(COLOURS)),
    ("Describe these images.", painted("red"), painted("blue")),
    (painted("green"), LONG, painted("pink"), "Compare these images."),
    (LONG, painted("cyan")),
    ("Hello",),
    (LONG,),
]


@pytest.mark.requirement("SRV-04")
@pytest.mark.parametrize("ahead", [True, False])
async def test_a_batch_of_pictures_and_text_says_what_the_model_says_alone(device: Device, ahead: bool) -> None:
    expected = await device.run(lambda: [reference(*case) for case in CASES])
    async with attached(device, make_engine(device, ahead=ahead)) as engine:
        received = await within(receive(engine, [spec(*case) for case in CASES]), 60)
    assert [r.tokens for r in received] == expected


@pytest.mark.parametrize("budget", [2048, 30])
async def test_text_shares_passes_with_rows_and_pictures_have_their_own_where_blocks_are_attended_to(
    device: Device, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with the kernels in plain MLX."""
    monkeypatch.setattr(paged_attention, "backend", lambda: "cuda")
    monkeypatch.setattr(paged_attention, "Kernels", lambda _: paged_attention.Reference())
    expected = await device.run(lambda: [reference(*case) for case in CASES])
    engine = make_engine(device, prefill_budget=budget)
    assert engine.cache_state.kind == "paged"
    mixed: list[int] = []
    cache: Any = engine._runner.cache  # type: ignore[reportPrivateUsage]
    mix = cache._mix

    def noted(inputs: Any, chunks: list[Chunk]) -> Any:
        assert not any(chunk.sequence.spec.pictures for chunk in chunks)
        mixed.append(len(chunks))
        return mix(inputs, chunks)

    cache._mix = noted
    async with attached(device, engine):
        received = await within(receive(engine, [spec(*case) for case in CASES]), 60)
    assert [r.tokens for r in received] == expected
    assert mixed


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
async def test_a_picture_may_be_cut_by_the_chunks_of_its_prompt(device: Device, budget: int) -> None:
    cases = CASES[11:15]
    expected = await device.run(lambda: [reference(*case) for case in cases])
    async with attached(device, make_engine(device, prefill_budget=budget)) as engine:
        received = await within(receive(engine, [spec(*case) for case in cases]), 60)
    assert [r.tokens for r in received] == expected


async def answer(engine: Engine, *parts: Part) -> tuple[str, Usage]:
    text, usage = "", Usage()
    async for event in LocalModel(spoken(), engine).generate(spoken().prepare(request(*parts))):
        match event:
            case TextDelta(piece):
                text += piece
            case Finished(used):
                usage = used
            case _:
                pass
    return text, usage


async def test_the_prefix_of_a_picture_is_found_again_and_that_of_another_is_not(device: Device) -> None:
    red, blue = painted("red", 1), painted("blue", 1)
    expected = await device.run(lambda: [reference(red, LONG), reference(blue, LONG)])
    async with attached(device, make_engine(device)) as engine:
        (first,) = await within(receive(engine, [spec(red, LONG)]))
        before = engine.counters.cached_tokens
        (other,) = await within(receive(engine, [spec(blue, LONG)]))
        assert engine.counters.cached_tokens - before < 32, "the picture stands in its first block"
        (again,) = await within(receive(engine, [spec(red, LONG)]))
        assert engine.counters.cached_tokens >= before + 64
    assert [first.tokens, other.tokens] == expected
    assert again.tokens == first.tokens


async def test_text_before_a_picture_is_shared_whatever_the_picture_is(device: Device) -> None:
    async with attached(device, make_engine(device)) as engine:
        await within(answer(engine, LONG, painted("red")))
        _, usage = await within(answer(engine, LONG, painted("blue")))
    assert usage.cached >= 64


async def test_a_sequence_that_was_preempted_comes_to_the_same(device: Device) -> None:
    cases = [(painted(name, i), LONG) for i, name in enumerate(list(COLOURS)[:6])]
    expected = await device.run(lambda: [reference(*case) for case in cases])
    specs = [spec(*case) for case in cases]
    small = make_engine(device, kv_bytes=2 * 9 << 16)  # two prompts fit, and their replies do not
    async with attached(device, small) as engine:
        received = await within(asyncio.gather(*(receive(engine, [s]) for s in specs)), 120)
        assert engine.cache_state.num_preemptions > 0
    assert [r.tokens for (r,) in received] == expected


async def test_every_colour_is_named(device: Device) -> None:
    async with attached(device, make_engine(device)) as engine:
        answers = await within(asyncio.gather(*(answer(engine, painted(name, 5), "What color is this image?") for name in COLOURS)), 60)
    right = sum(text == f"The image is {name}." for name, (text, _) in zip(COLOURS, answers, strict=True))
    assert right >= len(COLOURS) - 1


async def test_usage_counts_the_tokens_that_a_picture_takes(device: Device) -> None:
    async with attached(device, make_engine(device)) as engine:
        _, shown = await within(answer(engine, painted("red"), "Hi"))
        _, told = await within(answer(engine, "Hi"))
    marks_and_picture = 2 + 4
    assert shown.prompt == told.prompt + marks_and_picture


# ---- reading


def test_names_follow_from_the_picture_alone_and_lie_beyond_the_vocabulary() -> None:
    reader = spoken().pictures
    assert reader is not None
    red, again, blue = (reader.read(Image(encoded(painted(c))), "<|image_pad|>") for c in ("red", "red", "blue"))
    assert red.names == again.names
    assert not set(red.names) & set(blue.names)
    assert all(spoken().vocab_size <= name < 2**31 for name in red.names)
    assert len(red.names) == len(red.tokens) == 4


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True}), ("GIF", {})])
def test_pictures_of_every_kind_are_read(kind: str, options: dict[str, Any]) -> None:
    red = Pillow.new("RGB", (40, 30), (220, 30, 30))
    read = decoded(Image(encoded(red, kind, **options)))
    assert (read.mode, read.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(read, np.int16) - (220, 30, 30)).max() < 12


def test_what_is_transparent_is_white() -> None:
    assert decoded(Image(encoded(Pillow.new("RGBA", (2, 2), (0, 0, 0, 0))))).getpixel((0, 0)) == (255, 255, 255)


def test_a_large_picture_is_scaled_down() -> None:
    assert decoded(Image(encoded(Pillow.new("RGB", (4100, 100))))).size == (MAX_SIDE, 50)


def test_a_small_file_that_holds_a_huge_picture_is_refused_before_it_is_decoded() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    bomb = encoded(Pillow.new("1", (side, side)))
    assert len(bomb) < 100_000
    with pytest.raises(InvalidField, match="25 million pixels") as refused:
        decoded(Image(bomb, "messages[3].content[1].image_url"))
    assert refused.value.param == "messages[3].content[1].image_url"


def animated(kind: str, num_frames: int) -> bytes:
    frames = [Pillow.new("RGB", (8, 8), (i * 3 % 256, 255 - i, 0)) for i in range(num_frames)]
    return encoded(Pillow.new("RGB", (8, 8), (220, 30, 30)), kind, save_all=True, append_images=frames[1:], duration=20, lossless=True)


@pytest.mark.requirement("M4")
@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animated_picture_the_first_frame_is_shown_if_there_are_not_too_many(kind: str) -> None:
    moving = animated(kind, MAX_FRAMES)
    with Pillow.open(io.BytesIO(moving)) as opened:
        assert getattr(opened, "n_frames", 1) == MAX_FRAMES
    assert np.abs(np.asarray(decoded(Image(moving)), np.int16) - (220, 30, 30)).max() < 12
    with pytest.raises(InvalidField, match="an animated picture has 64 frames at most") as refused:
        decoded(Image(animated(kind, MAX_FRAMES + 1), "messages[0].content[1].image_url"))
    assert refused.value.param == "messages[0].content[1].image_url"


@pytest.mark.parametrize("options", [{}, {"interlace": True}, {"comment": b"x" * 700}, {"loop": 3}, {"transparency": 0, "disposal": 2}])
@pytest.mark.parametrize("num_frames", [1, 2, 40])
def test_the_frames_of_a_gif_are_counted_as_pillow_counts_them(num_frames: int, options: dict[str, Any]) -> None:
    frames = [painted(list(COLOURS)[i % 12], i).resize((70 + i % 3, 60)) for i in range(num_frames)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], **options)
    with Pillow.open(io.BytesIO(data)) as opened:
        assert _gif_frames(data) == getattr(opened, "n_frames", 1)
    for cut in range(13, len(data), max(1, len(data) // 50)):
        assert 0 <= _gif_frames(data[:cut]) <= num_frames


BOMBS_ARE_REFUSED = """
import resource, sys
from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Image
from mlx_manager.inference.picture_reader import decoded

bombs = [open(path, "rb").read() for path in sys.argv[1:]]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for bomb in bombs:
    try:
        decoded(Image(bomb))
    except InvalidField as refused:
        assert "25 million pixels" in refused.message, refused.message
    else:
        raise AssertionError("it was decoded")
unit = 1 if sys.platform == "darwin" else 1024
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
"""


def large_webp(side: int) -> bytes:
    """A small frame on a large canvas."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    def number(value: int) -> bytes:
        return struct.pack("<I", value)[:3]

    small = encoded(Pillow.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    canvas = chunk(b"VP8X", b"\x02\0\0\0" + number(side - 1) * 2) + chunk(b"ANIM", bytes(6))
    return chunk(b"RIFF", b"WEBP" + canvas + chunk(b"ANMF", bytes(6) + number(15) * 2 + bytes(4) + small))


@pytest.mark.requirement("M4")
def test_bombs_of_each_kind_cost_next_to_nothing(tmp_path: Path) -> None:
    side = 13_000
    huge = Pillow.new("L", (side, side))
    bombs = {kind: encoded(huge, kind) for kind in ("PNG", "GIF", "JPEG")} | {"WEBP": large_webp(side)}
    for kind, bomb in bombs.items():
        (tmp_path / kind).write_bytes(bomb)
    done = subprocess.run(
        [sys.executable, "-c", BOMBS_ARE_REFUSED, *(str(tmp_path / kind) for kind in bombs)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 << 20


PNG = encoded(Pillow.new("RGB", (20, 20)))


@pytest.mark.parametrize("data", [b"", b"hello", PNG[:30], PNG[:-20], b"GIF89a", encoded(Pillow.new("RGB", (2, 2)), "BMP"), b"%PDF-1.7"])
def test_what_is_no_picture_is_refused_in_our_words(data: bytes) -> None:
    with pytest.raises(InvalidField) as refused:
        decoded(Image(data, "here"))
    assert refused.value.message == "Invalid 'here': the picture could not be read."


def test_a_shape_that_the_model_cannot_be_shown_is_named() -> None:
    reader = spoken().pictures
    assert reader is not None
    with pytest.raises(InvalidField, match="1 x 900 pixels") as refused:
        reader.read(Image(encoded(Pillow.new("RGB", (1, 900))), "there"), "<|image_pad|>")
    assert refused.value.param == "there"


def test_a_user_who_spells_a_placeholder_shows_no_picture() -> None:
    text = "What is <|vision_start|><|image_pad|><|vision_end|> this?"
    (made,) = spoken().prepare(request(painted("red"), text)).specs
    (placed,) = made.pictures
    pads = [t for t in made.prompt if t == spoken().tokenizer.get_vocab()["<|image_pad|>"]]
    assert not pads
    assert made.prompt[placed.start : placed.start + 4] == placed.picture.names


def test_raw_tokens_cannot_name_a_picture() -> None:
    reader = spoken().pictures
    assert reader is not None
    names = reader.read(Image(encoded(painted("red"))), "<|image_pad|>").names
    with pytest.raises(InvalidField, match="Token ids"):
        spoken().prepare(GenerationRequest("m", (RawPrompt(names),)))
