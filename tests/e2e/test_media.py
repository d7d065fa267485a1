"""Clips, and pictures that a request only names, over a real socket through the official SDKs."""

import base64
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from anthropic import Anthropic
from anthropic import BadRequestError as BadMessage
from openai import BadRequestError, NotFoundError, OpenAI

from tests.e2e.replies import collected
from tests.e2e.serving import Running, serve_process
from tests.e2e.test_pictures import encoded
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


# ---- pictures that a request only names


class Gallery(ThreadingHTTPServer):
    """Pictures by their colour; `asked` are the paths that were asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Picture)
        self.asked: list[str] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class _Picture(BaseHTTPRequestHandler):
    server: Gallery

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name, _, kind = self.path.strip("/").partition(".")
        if name == "moved":
            self.send_response(302)
            self.send_header("location", self.server.url("red.png"))
            self.end_headers()
            return
        body = b"<html>No picture" if name == "page" else base64.b64decode(encoded(name, kind.upper()))
        self.send_response(200)
        self.send_header("content-type", "text/html" if kind == "webp" else "image/png")  # believed by nobody
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def opened() -> Iterator[Gallery]:
    with Gallery() as gallery:
        thread = Thread(target=gallery.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield gallery
        finally:
            gallery.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def gallery() -> Iterator[Gallery]:
    with opened() as gallery:
        yield gallery


@pytest.fixture(scope="module")
def fetching(tmp_path_factory: pytest.TempPathFactory, gallery: Gallery) -> Iterator[Running]:
    settings = {
        "MLX_MANAGER_REMOTE_MEDIA_HOSTS": f"*,localhost:{gallery.server_port},127.0.0.1:{gallery.server_port}",
        "MLX_MANAGER_REMOTE_MEDIA_HTTP": "1",
        "MLX_MANAGER_LOG_LEVEL": "debug",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        "NO_PROXY": "",
        "no_proxy": "",
    }
    with serve_process(tmp_path_factory.mktemp("fetching"), settings) as running:
        yield running


def linked(*urls: str, text: str = "What color is this image?") -> Any:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def message(client: Anthropic, url: str, model: str = MODEL) -> Any:
    content: Any = [{"type": "image", "source": {"type": "url", "url": url}}, {"type": "text", "text": "What color is this image?"}]
    return client.messages.create(
        model=model, max_tokens=40, extra_body={"temperature": 0}, messages=[{"role": "user", "content": content}]
    )


def response(client: OpenAI, url: str, model: str = MODEL) -> Any:
    content: Any = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": "What color is this image?"},
    ]
    return client.responses.create(model=model, temperature=0, max_output_tokens=40, input=[{"role": "user", "content": content}])


@pytest.mark.requirement("M2")
def test_a_picture_that_is_only_named_is_fetched_in_every_protocol(fetching: Running, gallery: Gallery) -> None:
    gallery.asked.clear()
    with fetching.openai() as client, fetching.anthropic() as anthropic, fetching.http() as http:
        assert ask(client, linked(gallery.url("green.png"))).choices[0].message.content == "The image is green."
        stream = ask(client, linked(gallery.url("blue.webp")), stream=True, stream_options={"include_usage": True})
        assert collected(stream)["choices"][0]["message"]["content"] == "The image is blue."
        two = linked(gallery.url("red.jpeg"), gallery.url("blue.gif"), text=QUESTION)
        assert ask(client, two).choices[0].message.content == "The first image is red and the second image is blue."
        (block,) = message(anthropic, gallery.url("yellow.png")).content
        assert block.text == "The image is yellow."
        made = response(client, gallery.url("red.png"))
        assert made.output_text == "The image is red."
        follow = client.responses.create(model=MODEL, previous_response_id=made.id, input="And now?", max_output_tokens=5)
        assert follow.usage is not None
        assert made.usage is not None
        assert follow.usage.input_tokens > made.usage.input_tokens
        counted = {
            "model": MODEL,
            "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": gallery.url("red.png")}}]}],
        }
        assert http.post("/v1/messages/count_tokens", json=counted).json()["input_tokens"] > 4
        body = {"model": MODEL, "input": [{"role": "user", "content": [{"type": "input_image", "image_url": gallery.url("red.png")}]}]}
        assert http.post("/v1/responses/input_tokens", json=body).json()["input_tokens"] > 4
        assert (
            http.post("/api/prefix/explain", json={"model": MODEL, "messages": linked(gallery.url("red.png"))}).json()["prompt_tokens"] > 4
        )
    assert gallery.asked == [f"/{p}" for p in ("green.png", "blue.webp")] + gallery.asked[2:4] + ["/yellow.png"] + ["/red.png"] * 5
    assert set(gallery.asked[2:4]) == {"/red.jpeg", "/blue.gif"}
    assert "green.png" not in fetching.log, "addresses may be secrets"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "words"), [("moved", "redirects are not followed"), ("page.png", "the picture could not be read")])
def test_what_cannot_be_had_is_named_with_a_status(fetching: Running, gallery: Gallery, path: str, words: str, stream: bool) -> None:
    with fetching.openai() as client, pytest.raises(BadRequestError, match=words) as refused:
        ask(client, linked(gallery.url("red.png"), gallery.url(path)), stream=stream)
    assert (refused.value.param, refused.value.code) == ("messages[0].content[1].image_url", "invalid_value")


@pytest.mark.requirement("M1")
def test_hosts_that_are_not_public_are_not_connected_to(fetching: Running) -> None:
    with opened() as canary, fetching.openai() as client, fetching.anthropic() as anthropic:
        port = canary.server_port
        for url in (
            canary.url(""),
            f"http://localhost:{port}/",
            f"http://127.1:{port}/",
            f"http://[::ffff:7f00:1]:{port}/",
            f"http://u@127.0.0.1:{port}/",
        ):
            with pytest.raises(BadRequestError) as refused:
                ask(client, linked(url))
            assert refused.value.param == "messages[0].content[0].image_url"
            with pytest.raises(BadRequestError) as refused:
                response(client, url)
            assert (refused.value.param, refused.value.code) == ("input[0].content[0].image_url", "invalid_value")
            with pytest.raises(BadMessage, match=r"messages\[0\]\.content\[0\]\.source\.url"):
                message(anthropic, url)
        assert canary.asked == []


def test_a_listed_name_is_not_enough_if_it_leads_here(fetching: Running, gallery: Gallery) -> None:
    gallery.asked.clear()
    with fetching.openai() as client, pytest.raises(BadRequestError, match="its host cannot be reached from here"):
        ask(client, linked(f"http://localhost:{gallery.server_port}/red.png"))
    assert gallery.asked == []


def test_nothing_is_fetched_for_a_model_that_could_not_look_at_it_nor_for_none(fetching: Running, gallery: Gallery) -> None:
    gallery.asked.clear()
    with fetching.openai() as client:
        with pytest.raises(BadRequestError, match="text only"):
            ask(client, linked(gallery.url("red.png")), model="qwen3")
        with pytest.raises(NotFoundError):
            ask(client, linked(gallery.url("red.png")), model="nobody")
    assert gallery.asked == []


@pytest.mark.requirement("M1")
def test_a_text_is_never_searched_for_addresses(fetching: Running, gallery: Gallery) -> None:
    gallery.asked.clear()
    url = gallery.url("red.png")
    with fetching.openai() as client:
        for text in (url, f"![red]({url})", f"<img src='{url}'>"):
            assert ask(client, [{"role": "user", "content": text}]).choices
    assert gallery.asked == []


@pytest.mark.requirement("M1")
def test_by_default_nothing_is_fetched(client: OpenAI, server: Running, gallery: Gallery) -> None:
    gallery.asked.clear()
    words = "pictures are taken from 'data:' URLs only; this server fetches none"
    with server.anthropic() as anthropic:
        for url in (gallery.url("red.png"), "https://example.com/a.png", "http://169.254.169.254/latest/meta-data"):
            for model in (MODEL, "qwen3"):
                with pytest.raises(BadRequestError, match=words) as refused:
                    ask(client, linked(url), model=model)
                assert refused.value.param == "messages[0].content[0].image_url"
                with pytest.raises(BadRequestError, match=words) as refused:
                    response(client, url, model)
                assert (refused.value.param, refused.value.code) == ("input[0].content[0].image_url", "invalid_value")
                with pytest.raises(BadMessage, match=words):
                    message(anthropic, url, model)
    assert gallery.asked == []


@pytest.mark.requirement("M3")
def test_a_path_says_nothing_of_what_is_there(client: OpenAI) -> None:
    spelt = [
        "/etc/passwd",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "file://localhost/etc/passwd",
        "../../etc/passwd",
        "~/x",
        "C:\\x",
        "\\\\h\\x",
    ]
    spelt += ["file:///nothing/here", "/nothing/here", "data:/etc/passwd", os.devnull]
    messages = set[str]()
    for url in spelt:
        with pytest.raises(BadRequestError) as refused:
            ask(client, linked(url))
        messages.add(refused.value.message)
    assert len(messages) == 1


@pytest.mark.requirement("M3")
def test_what_a_picture_is_follows_from_its_bytes(client: OpenAI) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        for said in ("png", "jpeg", "webp", "gif"):
            url = f"data:image/{said};base64,{encoded('green', kind)}"
            assert ask(client, linked(url)).choices[0].message.content == "The image is green."
    for data in (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50), b"%PDF-1.7", b"BM" + bytes(60)):
        with pytest.raises(BadRequestError, match="the picture could not be read") as refused:
            ask(client, linked(f"data:image/png;base64,{base64.b64encode(data).decode()}"))
        assert refused.value.param == "messages[0].content[0].image_url"
    with pytest.raises(BadRequestError, match="a picture is one of image/png, image/jpeg, image/webp, image/gif"):
        ask(client, linked("data:image/svg+xml;base64,PHN2Zy8+"))


def test_a_request_has_so_many_pictures_and_no_more(client: OpenAI) -> None:
    url = f"data:image/png;base64,{encoded('green')}"
    assert ask(client, linked(*[url] * 32)).usage.prompt_tokens > 32 * 4
    with pytest.raises(BadRequestError, match="a request has 32 pictures at most") as refused:
        ask(client, linked(*[url] * 33))
    assert refused.value.param == "messages[0].content[32].image_url"
