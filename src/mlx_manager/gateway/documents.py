"""PDFs in a request → the same request with the text that is in them."""

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from mlx_manager.confined.process import Confined
from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Content, Document, content_of
from mlx_manager.core.requests import Conversation, GenerationRequest, Prompt
from mlx_manager.gateway import pdf_process

# Of the processor: for one, and for all that a request has.
LIMIT_S, _ALL_S = 10.0, 30.0
_TOO_LONG = "it takes too long, or too much memory, to read"
# At a time, of all requests together.
_NUM_READERS = 2
_MAX_KEPT_CHARS = 16 << 20


class Documents:
    """Keeps what it read lately, by what the file is: the next turn of a conversation sends it again. Owned by the event loop."""

    def __init__(self, *, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._process = Confined(pdf_process, lazy=True)
        self._threads = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="documents")
        self._kept: OrderedDict[bytes, str] = OrderedDict()

    async def read(self, request: GenerationRequest) -> GenerationRequest:
        """Raises `InvalidField`, naming the field of the first that has no text that can be read."""
        texts: dict[Document, str] = {}
        left_s = _ALL_S
        for document in _documents(request):
            if document not in texts:
                began = time.monotonic()
                texts[document] = await self._text(document, min(self._limit_s, left_s))
                left_s -= time.monotonic() - began
        if not texts:
            return request
        return replace(request, prompts=tuple(_with(prompt, texts) for prompt in request.prompts))

    async def _text(self, document: Document, limit_s: float) -> str:
        digest = hashlib.sha256(document.data).digest()
        text = self._kept.get(digest)
        if text is None:
            if limit_s <= 0:
                raise _refused(document, f"the documents of a request may take {_ALL_S:g} seconds together")
            loop = asyncio.get_running_loop()
            said = await loop.run_in_executor(self._threads, self._process.done, document.data, limit_s)
            answer = {"error": _TOO_LONG} if said is None else json.loads(said)
            if "error" in answer:
                raise _refused(document, answer["error"])
            text = str(answer["text"])
        self._kept[digest] = text
        self._kept.move_to_end(digest)
        while sum(map(len, self._kept.values())) > _MAX_KEPT_CHARS:
            self._kept.popitem(last=False)
        return text


def _refused(document: Document, why: str) -> InvalidField:
    return InvalidField(f"Invalid '{document.where}': the PDF cannot be read: {why}.", param=document.where, code="unsupported_value")


def _documents(request: GenerationRequest) -> list[Document]:
    conversations = (prompt for prompt in request.prompts if isinstance(prompt, Conversation))
    contents = (message.content for conversation in conversations for message in conversation.messages)
    return [part for content in contents if not isinstance(content, str) for part in content if isinstance(part, Document)]


def _with(prompt: Prompt, texts: Mapping[Document, str]) -> Prompt:
    if not isinstance(prompt, Conversation):
        return prompt
    return replace(prompt, messages=tuple(replace(m, content=_content(m.content, texts)) for m in prompt.messages))


def _content(content: Content, texts: Mapping[Document, str]) -> Content:
    if isinstance(content, str):
        return content
    return content_of([texts[part] if isinstance(part, Document) else part for part in content])
