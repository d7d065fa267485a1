"""The page at `/`, of the whole application on a real port."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest
from pydantic import SecretStr

from mlx_manager import app
from mlx_manager.api.system import ModelState, ServerStatus
from mlx_manager.api.web import page
from mlx_manager.config import Config
from mlx_manager.inference.entry import State
from tests.api.served import Reply, Served, ask, request, serve

MODELS = Path(__file__).parents[1] / "fixtures" / "models"
KEY = "a-key-of-this-test"


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside of elements that hold code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def hostile_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("<img src=x onerror=alert(1)>", '" autofocus onfocus="alert(1)', "</script><script>alert(1)<"):
        (folder / name.replace("/", "_")).symlink_to(MODELS / "qwen3")
    (folder / "good-one").symlink_to(MODELS / "qwen3")
    return folder


@pytest.fixture(scope="module")
def served(hostile_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    config = Config(models_dir=(hostile_models,), data_dir=tmp_path_factory.mktemp("data"), api_key=None)
    with serve(app.build(config)) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(hostile_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    config = Config(models_dir=(hostile_models,), data_dir=tmp_path_factory.mktemp("data"), api_key=SecretStr(KEY))
    with serve(app.build(config)) as server:
        yield server


def get(served: Served, target: str, **headers: str) -> Reply:
    return ask(served, request(target=target, host=f"localhost:{served.port}", **headers))


def test_it_tells_how_to_connect_an_app_to_this_server(served: Served) -> None:
    reply = get(served, "/")
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    elements = Elements(reply.body.decode())
    assert len(elements.named("h1")) == 1
    assert f"http://localhost:{served.port}/v1" in elements.text
    assert 'model="good-one"' in elements.text
    assert get(served, "/", accept="text/html").headers["cache-control"] == "no-cache"


def test_the_address_is_the_one_that_the_browser_used(served: Served) -> None:
    reply = ask(served, request(host=f"127.0.0.1:{served.port}"))
    assert f"http://127.0.0.1:{served.port}/v1".encode() in reply.body


def test_it_has_nothing_that_its_own_policy_forbids(served: Served) -> None:
    elements = Elements(get(served, "/").body.decode())
    assert not elements.named("style")
    assert all(re.fullmatch(r"/static/page\.js\?v=\w+", script["src"] or "") for script in elements.named("script"))
    for _, attributes in elements.found:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert not any((attributes.get(name) or "").startswith(("http", "//", "javascript:")) for name in ("src", "href"))
    script = get(served, "/static/page.js").body.decode()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|sessionStorage|cookie", script)
    assert not re.search(rb"url\(|@import|https?:", get(served, "/static/page.css").body)


def test_folder_names_are_never_markup(served: Served) -> None:
    html = get(served, "/").body.decode()
    assert "<img" not in html
    assert "alert(1)" not in html  # their names are no model ids: they are listed nowhere


@pytest.mark.parametrize("text", ["<img src=x onerror=alert(1)>", '"><script>alert(1)</script>', "' onfocus='alert(1)", "{{ 7*7 }}"])
def test_what_comes_from_outside_is_text(text: str) -> None:
    model = ModelState(
        id=text, kind="text", architecture=text, context_length=None, size_bytes=1, num_parameters=1, quantization_bits=None,
        state="failed", error=text, load_s=None, num_running=0, num_waiting=0, kv_cache=None,
    )  # fmt: skip
    status = ServerStatus(version="1", draining=False, num_in_flight=0, models=[model])
    elements = Elements(page("http://localhost", status))
    clean = Elements(page("http://localhost", status.model_copy(update={"models": [model.model_copy(update={"id": "a"})]})))
    assert [tag for tag, _ in elements.found] == [tag for tag, _ in clean.found]
    assert [sorted(attributes) for _, attributes in elements.found] == [sorted(attributes) for _, attributes in clean.found]
    (main,) = elements.named("main")
    assert ServerStatus.model_validate_json(main["data-status"] or "") == status
    assert text in elements.text


def test_there_is_a_word_for_every_state_of_a_model(served: Served) -> None:
    words = re.search(r"STATES = \{(.*?)\}", get(served, "/static/page.js?v=1").body.decode(), re.DOTALL)
    assert words is not None
    assert set(re.findall(r"(\w+): \"", words[1])) == set(get_args(State))


@pytest.mark.parametrize(("name", "media_type"), [("page.css", "text/css"), ("page.js", "text/javascript"), ("icon.svg", "image/svg+xml")])
def test_files_have_their_types_and_may_be_kept_for_an_hour(served: Served, name: str, media_type: str) -> None:
    reply = get(served, f"/static/{name}?v=1")
    assert reply.status == 200
    assert reply.headers["content-type"].split(";")[0] == media_type
    assert reply.headers["cache-control"] == "public, max-age=3600"


@pytest.mark.parametrize(
    "target",
    ["/static/", "/static/index.html", "/static/web.py", "/static/../web.py", "/static/%2e%2e/web.py", "/static/..%2fweb.py",
     "/static//etc/passwd", "/static/%2fetc%2fpasswd", "/static/page.css/", "/static/page.css%00.js", "/static/..\\web.py"],
)  # fmt: skip
def test_nothing_else_is_a_file(served: Served, target: str) -> None:
    assert get(served, target).status == 404


def test_with_a_key_the_page_is_public_and_tells_nothing_of_what_runs(guarded: Served) -> None:
    reply = get(guarded, "/")
    assert reply.status == 200
    assert b"good-one" not in reply.body
    assert KEY.encode() not in reply.body
    elements = Elements(reply.body.decode())
    assert "data-status" not in elements.named("main")[0]
    assert "has an API key" in elements.text
    assert get(guarded, "/static/page.js").status == 200
    assert get(guarded, "/api/status").status == 401
    assert get(guarded, "/api/status", authorization=f"Bearer {KEY}").status == 200
    assert get(guarded, "/static/../api/status").status in (401, 404)
