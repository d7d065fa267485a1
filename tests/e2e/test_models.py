"""The list of models through the official SDK in its strict mode."""

from pathlib import Path

import pytest
from openai import NotFoundError, OpenAI

from tests.e2e.serving import FIXTURE_MODELS, MODEL, Running, serve_process


def test_every_folder_is_a_model_by_its_name(client: OpenAI) -> None:
    ids = {m.id for m in client.models.list()}
    assert MODEL in ids
    entry = client.models.retrieve(MODEL)
    assert (entry.object, entry.owned_by) == ("model", "local")
    assert entry.created > 0
    assert (entry.model_extra or {})["max_input_tokens"] > 0


def test_the_list_reads_the_same_through_the_other_vendors_sdk(client: OpenAI, server: Running) -> None:
    with server.anthropic() as anthropic:
        entries = list(anthropic.models.list())
        assert [m.id for m in entries] == [m.id for m in client.models.list()]
        assert anthropic.models.retrieve(MODEL).max_input_tokens == 4096
    assert all(m.capabilities is None and m.display_name for m in entries)


def test_a_client_that_traces_its_requests_is_answered(server: Running) -> None:
    with server.http() as http:
        reply = http.get("/v1/models", headers={"traceparent": "00-01a218aab8f6512345678901234567ab-1234567890abcdef-01"})
    assert reply.status_code == 200


def test_an_unknown_model_is_not_found_and_the_reply_says_what_there_is(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match=MODEL) as retrieved:
        client.models.retrieve("nobody/nothing")
    with pytest.raises(NotFoundError, match=MODEL) as asked:
        client.chat.completions.create(model="nobody/nothing", messages=[{"role": "user", "content": "Hello"}])
    assert retrieved.value.code == asked.value.code == "model_not_found"


def test_a_model_of_the_hub_cache_has_a_slash_in_its_name_and_answers(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--small"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / "abc").symlink_to(FIXTURE_MODELS / MODEL)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    with serve_process(tmp_path) as running, running.openai() as client:
        assert "someone/small" in {m.id for m in client.models.list()}
        assert client.models.retrieve("someone/small").owned_by == "someone"
        reply = client.completions.create(model="someone/small", prompt="Hello", max_tokens=1)
        assert reply.model == "someone/small"
