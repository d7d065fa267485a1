"""The text of a PDF stands where the PDF was; one that cannot be read, or only without end, is refused by its field."""

import asyncio
import time

import pytest

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Document, Image, Message
from mlx_manager.core.requests import Conversation, GenerationRequest, RawPrompt
from mlx_manager.gateway.documents import Documents
from tests.fixtures.documents import BOMB, ITS_OWN_PARENT, LONG, PICTURE_ONLY, TOO_MANY_PAGES, WITH_PASSWORD, pdf


@pytest.fixture
def documents() -> Documents:
    return Documents()


def asking(*parts: str | Document | Image) -> GenerationRequest:
    return GenerationRequest("m", (Conversation((Message("system", "Read."), Message("user", tuple(parts)))),))


async def read(documents: Documents, *parts: str | Document | Image) -> object:
    (conversation,) = (await documents.read(asking(*parts))).prompts
    assert isinstance(conversation, Conversation)
    assert conversation.messages[0] == Message("system", "Read.")
    return conversation.messages[1].content


async def test_the_text_of_each_page_stands_where_the_pdf_was(documents: Documents) -> None:
    file = Document(pdf("Grüße (one)\nsecond line", "", "page three"))
    assert await read(documents, "a.pdf:\n", file, " What is it?") == "a.pdf:\nGrüße (one)\nsecond line\n\npage three What is it?"


async def test_pictures_stay_where_they_are(documents: Documents) -> None:
    picture = Image(b"...")
    assert await read(documents, "See ", picture, Document(pdf("text")), "!") == ("See ", picture, "text!")


async def test_a_request_without_any_is_left_alone(documents: Documents) -> None:
    for request in (asking("Hi"), GenerationRequest("m", (RawPrompt("Hi"),))):
        assert await documents.read(request) is request


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (PICTURE_ONLY, "no text"),
        (WITH_PASSWORD, "password"),
        (TOO_MANY_PAGES, "501 pages, and 500 at most"),
        (ITS_OWN_PARENT, "PDF cannot be read"),
        (BOMB, "PDF cannot be read"),
        (b"%PDF-1.7", "damaged"),
        (pdf("cut off")[:200], "damaged"),
        (b"%PDF-1.4\n" + b"[" * 100_000, "damaged"),
    ],
    ids=["picture", "password", "pages", "parent", "bomb", "empty", "cut", "deep"],
)
async def test_one_that_cannot_be_read_is_refused_by_its_field(documents: Documents, data: bytes, why: str) -> None:
    with pytest.raises(InvalidField, match=why) as refused:
        await read(documents, Document(data, "messages[1].content[0].source.data"))
    assert refused.value.param == "messages[1].content[0].source.data"
    assert await read(documents, Document(pdf("the next one"))) == "the next one"


async def test_one_that_takes_too_long_ends_in_time_and_holds_nobody_up() -> None:
    documents = Documents(limit_s=1.0)
    await read(documents, Document(pdf("warm")))
    began = time.monotonic()
    long = asyncio.create_task(read(documents, Document(LONG)))
    await asyncio.sleep(0.2)
    assert await read(documents, Document(pdf("another"))) == "another"
    assert not long.done()
    with pytest.raises(InvalidField, match="takes too long"):
        await long
    assert time.monotonic() - began < 5


async def test_a_file_that_was_read_is_not_read_again(documents: Documents) -> None:
    big = Document(pdf(*["some words in a line\n" * 20] * 100))
    began = time.monotonic()
    first = await read(documents, big)
    took_s = time.monotonic() - began
    began = time.monotonic()
    assert await read(documents, Document(big.data, "elsewhere")) == first
    assert time.monotonic() - began < took_s / 4
