"""What a profile makes of a request: whatever the client said stays, and the rest is the profile's."""

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.core.messages import Message
from mlx_manager.core.requests import Conversation, GenerationRequest, RawPrompt, Reasoning, Sampling
from mlx_manager.protocols.anthropic.requests import read_count_tokens, read_messages
from mlx_manager.protocols.openai.requests import read_chat, read_completion
from mlx_manager.protocols.responses.requests import read_responses
from mlx_manager.protocols.wire import Json
from mlx_manager.settings.profiles import Profile, applied
from tests.protocols.test_one_meaning import SEAL, Nothing, sent

ABSENT = object()
HELLO = {"role": "user", "content": "Hello"}
# Each of a client's optional fields that a profile may stand in for, falsy values first.
SAMPLING: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 0.5, 1],
    "top_p": [0, 0.0, 0.9],
    "top_k": [0, 40],
    "min_p": [0, 0.0, 0.1],
    "presence_penalty": [0, -2, 0.5],
    "frequency_penalty": [0, 0.0, 1],
    "repetition_penalty": [0.5, 1],
    "seed": [0, -1, 7],
}
STOPS: list[Any] = [[], "x", ["a", "b"]]
TEXTS = ["", "Be kind."]


def or_nothing(values: list[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from([ABSENT, None, *values])


def bodies(**more: list[Any]) -> st.SearchStrategy[Json]:
    """Each field with a value, a falsy one, null, or left out."""
    given = st.fixed_dictionaries({name: or_nothing(values) for name, values in (SAMPLING | more).items()})
    return given.map(lambda body: {name: value for name, value in body.items() if value is not ABSENT})


def profiles() -> st.SearchStrategy[Profile]:
    sampling = st.fixed_dictionaries({name: st.sampled_from([None, *values]) for name, values in SAMPLING.items()})
    return st.builds(
        Profile,
        model=st.just("m"),
        name=st.just("p"),
        adapter=st.sampled_from([None, "a"]),
        system_prompt=st.sampled_from([None, *TEXTS]),
        sampling=sampling.map(lambda named: Sampling(**named)),
        max_tokens=st.sampled_from([None, 1, 9]),
        stop=st.sampled_from([None, (), ("p",)]),
        reasoning=reasonings(),
        context_limit=st.sampled_from([None, 64]),
    )


def reasonings() -> st.SearchStrategy[Reasoning]:
    return st.builds(
        Reasoning, st.sampled_from([None, False, True]), st.sampled_from([None, "none", "low", "high"]), st.sampled_from([None, 0, 5])
    )


def either(body: Json, field: str, otherwise: Any) -> Any:
    return otherwise if body.get(field) is None else body[field]


def as_stop(value: Any) -> Any:
    return value if value is None or isinstance(value, tuple) else (value,) if isinstance(value, str) else tuple(value)


def check(request: GenerationRequest, body: Json, profile: Profile, *, limit: str, stop: str) -> None:
    served = applied(request, profile)
    assert served.model == ("m:a" if profile.adapter else "m")
    for field in fields(Sampling):
        if field.name in SAMPLING:
            assert getattr(served.sampling, field.name) == either(body, field.name, getattr(profile.sampling, field.name)), field.name
    assert served.max_tokens == either(body, limit, profile.max_tokens)
    assert served.stop == as_stop(either(body, stop, profile.stop))
    assert served.context_limit == profile.context_limit
    untouched = ("model", "prompts", "sampling", "max_tokens", "stop", "context_limit")
    for field in fields(GenerationRequest):
        assert field.name in untouched or getattr(served, field.name) == getattr(request, field.name)
    assert applied(served, replace(profile, adapter=None, model=served.model)) == served  # twice is once


def system_texts(request: GenerationRequest) -> list[str]:
    (prompt,) = request.prompts
    assert isinstance(prompt, Conversation)
    return [message.text for message in prompt.messages if message.role == "system"]


@pytest.mark.requirement("A2", "K3")
@given(bodies(max_tokens=[1, 5], stop=STOPS), or_nothing(TEXTS), profiles())
def test_every_field_of_a_chat(body: Json, system: Any, profile: Profile) -> None:
    messages = [HELLO] if system is ABSENT or system is None else [{"role": "system", "content": system}, HELLO]
    request = read_chat(sent({**body, "model": "m:p", "messages": messages})).request
    check(request, body, profile, limit="max_tokens", stop="stop")
    wanted = profile.system_prompt if len(messages) == 1 else system
    assert system_texts(applied(request, profile)) == ([] if wanted is None else [wanted])


@pytest.mark.requirement("A2", "K3")
@given(bodies(max_tokens=[1, 5], stop=STOPS), profiles())
def test_every_field_of_a_completion(body: Json, profile: Profile) -> None:
    request = read_completion(sent({**body, "model": "m:p", "prompt": "Hello"})).request
    check(request, body, profile, limit="max_tokens", stop="stop")
    assert applied(request, profile).prompts == (RawPrompt("Hello"),)


@pytest.mark.requirement("A2", "K3")
@given(bodies(stop_sequences=[[], ["a"]], system=["", [], "Be kind.", [{"type": "text", "text": "Be kind."}]]), profiles())
def test_every_field_of_a_message(body: Json, profile: Profile) -> None:
    whole = {**body, "model": "m:p", "max_tokens": 5, "messages": [HELLO]}
    request = read_messages(sent(whole), SEAL).request
    check(request, whole, profile, limit="max_tokens", stop="stop_sequences")
    of_client = {None: [], "": [""], "Be kind.": ["Be kind."]}
    if body.get("system") is None:
        assert system_texts(applied(request, profile)) == ([] if profile.system_prompt is None else [profile.system_prompt])
    elif isinstance(body["system"], str):
        assert system_texts(applied(request, profile)) == of_client[body["system"]]
    else:
        assert system_texts(applied(request, profile)) == ["Be kind."] * len(body["system"])
    counted = read_count_tokens(sent({name: whole[name] for name in ("model", "messages", "system") if name in whole}), SEAL).request
    assert applied(counted, profile).prompts == applied(request, profile).prompts


@pytest.mark.requirement("A2", "K3")
@given(bodies(max_output_tokens=[1, 5], stop=STOPS, instructions=TEXTS), profiles())
def test_every_field_of_a_response(body: Json, profile: Profile) -> None:
    request = read_responses(sent({**body, "model": "m:p", "input": "Hello"}), Nothing(), SEAL).request
    check(request, body, profile, limit="max_output_tokens", stop="stop")
    wanted = either(body, "instructions", profile.system_prompt)
    assert system_texts(applied(request, profile)) == ([] if wanted is None else [wanted])


def thought(said: Reasoning, otherwise: Reasoning) -> Reasoning:
    asked = GenerationRequest("m:p", (Conversation((Message("user", "Hello"),), reasoning=said),))
    (prompt,) = applied(asked, Profile("m", "p", reasoning=otherwise)).prompts
    assert isinstance(prompt, Conversation)
    return prompt.reasoning


@pytest.mark.requirement("K3")
@given(reasonings(), reasonings())
def test_whether_to_think_is_answered_once(said: Reasoning, otherwise: Reasoning) -> None:
    served = thought(said, otherwise)
    expected = otherwise.wants_thinking if said.wants_thinking is None else said.wants_thinking
    assert served.wants_thinking == expected
    for option in said.given:
        assert getattr(served, option) == getattr(said, option)
    if said.wants_thinking is False:
        assert served == said
    if said.wants_thinking is True:
        assert served.effort != "none" or said.effort == "none"
        assert served.budget != 0 or said.budget == 0


def test_how_much_is_the_profiles_where_only_whether_was_said() -> None:
    assert thought(Reasoning(enabled=True), Reasoning(False, "high", 9)) == Reasoning(True, "high", 9)
    assert thought(Reasoning(effort="low"), Reasoning(None, "high", 9)) == Reasoning(None, "low", 9)


def test_a_system_message_anywhere_is_one() -> None:
    later = Conversation((Message("user", "Hello"), Message("system", "Be brief."), Message("user", "Go on.")))
    assert applied(GenerationRequest("m:p", (later,)), Profile("m", "p", system_prompt="Be kind.")).prompts == (later,)
