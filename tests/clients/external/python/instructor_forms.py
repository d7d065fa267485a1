"""Instructor, in each of its modes that a server has a say in."""

import os
from typing import Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Tokyo"]
    sky: Literal["clear", "cloudy"]


QUESTION: Any = [{"role": "user", "content": "How is the weather?"}]
openai = OpenAI(base_url=os.environ["SERVER_URL"] + "/v1", api_key="none", max_retries=0)

for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai, mode=mode)
    asked: Any = {"model": "qwen3", "temperature": 0, "max_retries": 0, "response_model": Weather, "messages": QUESTION}
    assert isinstance(client.create(**asked), Weather)
    *_, last = client.create_partial(**asked)
    assert last.city in ("Paris", "Tokyo")
    print(mode.name)  # noqa: T201 - what passed
