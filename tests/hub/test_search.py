"""Searching a Hub on loopback, and looking into what was found: with the detector for models that are here, over real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_manager.core.errors import HubUnavailable
from mlx_manager.hub.characteristics import Characteristics, Filter, emptied_by, fails
from mlx_manager.hub.checkpoint import read
from mlx_manager.hub.client import Hub
from mlx_manager.hub.search import MAX_KEPT, Query, Search
from mlx_manager.inference.families.detect import calls_and_thinks
from tests.hub.hub_server import HubServer, serving_hub

MODELS = Path(__file__).parents[1] / "fixtures" / "models"
ORG = "mlx-community"
EVERYTHING = Query(organisation=None, mlx_only=False)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving_hub() as server:
        yield server


def fill(hub: HubServer, *names: str, **facts: Any) -> None:
    for rank, name in enumerate(names):
        told = {"downloads": 1000 - rank, "likes": rank, "lastModified": f"2026-01-{rank + 1:02}T00:00:00.000Z", "tags": ["mlx"]}
        hub.add(f"{ORG}/{name}", MODELS / name, **told | facts)


@asynccontextmanager
async def searching(hub: HubServer, *, timeout_s: float = 10, token: str | None = None, max_kept: int = MAX_KEPT) -> AsyncIterator[Search]:
    client = Hub(hub.url, timeout_s=timeout_s, token=lambda: token)
    search = Search(client, calls_and_thinks, max_kept=max_kept)
    try:
        yield search
    finally:
        await search.close()
        await client.close()


async def test_a_search_tells_what_the_list_says_in_its_order_and_page_by_page(hub: HubServer) -> None:
    fill(hub, "qwen3", "llama", "mistral")
    hub.add("elsewhere/qwen3", MODELS / "qwen3", downloads=5, tags=["mlx"], gated="manual")
    hub.add(f"{ORG}/other", MODELS / "llama", tags=["pytorch"])
    hub.add(f"{ORG}/bad..name", {})
    async with searching(hub) as search:
        page = await search.find(Query())
        assert [(m.id.partition("/")[2], m.downloads, m.likes, m.is_gated) for m in page.models] == [
            ("qwen3", 1000, 0, False), ("llama", 999, 1, False), ("mistral", 998, 2, False)
        ]  # fmt: skip
        assert page.models[0].updated == 1767225600
        assert (await search.find(Query(sort="likes"))).models[0].id == f"{ORG}/mistral"
        assert [m.id for m in (await search.find(Query("LLA"))).models] == [f"{ORG}/llama"]
        assert [(m.id, m.is_gated) for m in (await search.find(Query(organisation="elsewhere"))).models] == [("elsewhere/qwen3", True)]
        assert len((await search.find(EVERYTHING)).models) == 5
        first = await search.find(Query(limit=2))
        assert first.cursor is not None
        second = await search.find(Query(limit=2, cursor=first.cursor))
        assert ([m.id for m in first.models + second.models], second.cursor) == ([m.id for m in page.models], None)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3_text", "glm4", "qwen2_vl", "tiny_bert"])
async def test_what_a_model_is_does_not_depend_on_whether_it_is_here(hub: HubServer, name: str) -> None:
    fill(hub, name)
    async with searching(hub) as search:
        found = (await search.inspect(f"{ORG}/{name}")).told
    assert found is not None
    here, there = read(MODELS / name, name), found.checkpoint
    for field in ("kind", "architecture", "context_length", "size_bytes", "quantization_bits", "num_parameters", "kv_bytes_per_token"):
        assert getattr(there, field) == getattr(here, field), field
    assert hub.asked("cdn")[0].headers["range"] == "bytes=0-65535"


async def test_tools_and_thinking_are_told_from_the_template(hub: HubServer) -> None:
    fill(hub, "qwen3", "gemma3_text", "qwen2_vl", "tiny_bert")
    async with searching(hub) as search:
        told = {name: (await search.inspect(f"{ORG}/{name}")).told for name in ("qwen3", "gemma3_text", "qwen2_vl", "tiny_bert")}
    assert {name: one.capabilities for name, one in told.items() if one} == {
        "qwen3": ("text", "tools", "thinking"),
        "gemma3_text": ("text", "tools"),
        "qwen2_vl": ("text", "vision"),
        "tiny_bert": ("embedding",),
    }
    qwen = told["qwen3"]
    assert qwen is not None
    assert qwen.download_bytes == sum(len(data) for data in hub.repos[f"{ORG}/qwen3"].files.values())


async def test_a_model_in_several_files_is_told_from_its_index(hub: HubServer) -> None:
    fill(hub, "qwen3")
    files = hub.repos[f"{ORG}/qwen3"].files
    weights = files.pop("model.safetensors")
    files |= {f"model-0000{i}-of-00002.safetensors": weights for i in (1, 2)}
    index = {"metadata": {"total_parameters": 1234}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    async with searching(hub) as search:
        told = (await search.inspect(f"{ORG}/qwen3")).told
    assert told is not None
    assert (told.checkpoint.num_parameters, told.checkpoint.size_bytes) == (1234, 2 * len(weights))
    assert hub.asked("cdn") == []


async def test_a_search_does_not_wait_for_what_it_looks_into(hub: HubServer) -> None:
    fill(hub, "qwen3")
    hub.silent = {"cdn"}
    async with searching(hub, timeout_s=2) as search:
        page = await search.find(Query())
        assert search.known(page.models[0].id) is None
        failed = await search.inspect(page.models[0].id)
        assert (failed.told, failed.reason) == (None, f"The Hub at {hub.url[7:]} cannot be reached: it did not answer in time.")
        hub.silent = set()
        hub.closing.set()
        assert (await search.inspect(page.models[0].id)).told is not None  # a failure is not kept


async def test_what_is_known_is_not_asked_again_until_the_model_changes(hub: HubServer) -> None:
    fill(hub, "qwen3")
    id = f"{ORG}/qwen3"
    async with searching(hub) as search:
        await search.find(Query())
        first, again = await asyncio.gather(search.inspect(id), search.inspect(id))
        assert first is again
        assert len(hub.asked("hub", "/config.json")) == 1
        await search.find(Query())
        assert search.known(id) is first
        hub.repos[id].files["config.json"] = json.dumps({"model_type": "llama"}).encode()
        await search.find(Query())
        assert search.known(id) is None
        told = (await search.inspect(id)).told
        assert told is not None
        assert told.checkpoint.architecture == "llama"


async def test_what_is_kept_has_a_bound(hub: HubServer) -> None:
    for i in range(8):
        hub.add(f"{ORG}/m{i}", {})
    async with searching(hub, max_kept=5) as search:
        for i in range(8):
            await search.inspect(f"{ORG}/m{i}")
        assert [i for i in range(8) if search.known(f"{ORG}/m{i}") is not None] == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "can bring code along ('pytorch_model.bin')"),
        ({"config.json": b'{"model_type": "llama", "auto_map": {}}', "model.safetensors": b"x"}, "auto_map in config.json"),
        ({"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x" * 100}, "its header has an impossible length"),
        ({"../config.json": b"{}"}, "would lie outside its folder"),
    ],
)
async def test_what_could_not_be_used_says_so_before_it_is_downloaded(hub: HubServer, files: dict[str, bytes], reason: str) -> None:
    hub.add(f"{ORG}/bad", files)
    async with searching(hub) as search:
        found = await search.inspect(f"{ORG}/bad")
    assert found.told is None
    assert reason in (found.reason or "")


async def test_a_gated_model_says_what_to_do_and_is_told_of_with_the_token(hub: HubServer) -> None:
    hub.token = "hf_secret"
    fill(hub, "qwen3", gated="auto")
    async with searching(hub) as search:
        await search.find(Query())
        assert "accept them at" in ((await search.inspect(f"{ORG}/qwen3")).reason or "")
    async with searching(hub, token="hf_secret") as search:
        assert (await search.inspect(f"{ORG}/qwen3")).told is not None
    assert not any("hf_secret" in str(one) for one in hub.asked("cdn"))


async def test_a_dead_slow_or_wrong_hub_is_an_error_in_words(hub: HubServer) -> None:
    async with searching(hub, timeout_s=0.5) as search:
        hub.statuses = [("hub", 500, {})]
        with pytest.raises(HubUnavailable, match="answered with status 500"):
            await search.find(Query())
        hub.statuses = [("hub", 429, {"retry-after": "7"})]
        with pytest.raises(HubUnavailable, match="wants fewer requests") as refused:
            await search.find(Query())
        assert refused.value.retry_after_s == 7
        hub.statuses = [("hub", 200, {"content-type": "text/html"})]
        with pytest.raises(HubUnavailable, match="is not the Hub"):
            await search.find(Query())
        hub.statuses = [("hub", 302, {"location": "file:///etc/passwd"})]
        with pytest.raises(HubUnavailable, match="redirects to a place that is not gone to"):
            await search.find(Query())
        hub.statuses = [("hub", 302, {"location": "/api/models"})] * 9
        with pytest.raises(HubUnavailable, match="redirects too often"):
            await search.find(Query())
        hub.statuses = []
        hub.silent = {"hub"}
        with pytest.raises(HubUnavailable, match="did not answer in time"):
            await search.find(Query())


def test_an_address_that_is_none_is_refused() -> None:
    for endpoint in ("", "huggingface.co", "ftp://huggingface.co", "https://user:pass@huggingface.co", "https://x/?y"):
        with pytest.raises(ValueError, match="is not an address"):
            Hub(endpoint)


# ---- filters


def told(name: str) -> Characteristics:
    tools, thinking = {"qwen3": (True, True)}.get(name, (False, False))
    return Characteristics(read(MODELS / name, name), tools, thinking)


def test_each_filter_keeps_what_it_names() -> None:
    qwen, bert = told("qwen3"), told("tiny_bert")
    size = qwen.checkpoint.size_bytes
    for asked, qwen_passes, bert_passes in [
        (Filter(), True, True),
        (Filter(architecture="QWEN3"), True, False),
        (Filter(capability=("tools", "thinking")), True, False),
        (Filter(capability=("embedding",)), False, True),
        (Filter(bits=0), True, True),
        (Filter(bits=4), False, False),
        (Filter(max_bytes=size - 1), False, bert.checkpoint.size_bytes < size),
        (Filter(max_parameters=qwen.checkpoint.num_parameters), True, True),
        (Filter(min_context=1 << 20), False, False),
        (Filter(fits=True), True, True),
        (Filter(fits=False), False, False),
    ]:
        assert (fails(asked, qwen, True) == (), fails(asked, bert, True) == ()) == (qwen_passes, bert_passes), asked


def test_the_filter_that_took_the_last_one_is_named() -> None:
    asked = Filter(architecture="qwen3", capability=("vision",), bits=0)
    failed = [fails(asked, told(name), True) for name in ("qwen3", "llama", "tiny_bert")]
    assert emptied_by(asked, failed) == "capability"  # the architecture left one
    assert emptied_by(Filter(bits=3), [("bits",)]) == "bits"
    assert emptied_by(asked, [*failed, ()]) is None
    assert emptied_by(asked, []) is None
