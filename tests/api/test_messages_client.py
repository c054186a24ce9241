"""Anthropic's own client, unmodified, against a real server."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import Any, Literal

import anthropic
import pydantic
import pytest
from anthropic.types import message_count_tokens_params, message_create_params, tool_param
from anthropic.types.beta import message_create_params as beta_create_params

from dynamo_serve import bundled
from dynamo_serve.api import messages_fields
from dynamo_serve.api.schema_messages import CountTokensRequest, MessagesRequest, OfferedTool
from dynamo_serve.config import CacheSection, Config, EngineSection, ModelSection
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.live import config, serving
from tests.api.talking import HERMES, THINKING, one_after_another, talking
from tests.api.test_messages import HELLO, THOUGHT, TOOLS
from tests.api.test_tools import PARIS, says_it
from tests.patience import PATIENCE_S

ASKED: Any = {"model": "tiny", "max_tokens": 400, "messages": HELLO}


def client_of(base: str, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=base, api_key=key, max_retries=0)


@pytest.fixture
def client(url: str) -> Generator[anthropic.Anthropic]:
    with client_of(url) as client:
        yield client


def test_a_message_and_its_stream_are_the_same() -> None:
    with talking(THINKING, says_it(THOUGHT)) as (_, base), client_of(base) as client:
        whole = client.messages.create(**ASKED)
        with client.messages.stream(**ASKED) as stream:
            texts = "".join(stream.text_stream)
            final = stream.get_final_message()
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert texts == "Hello." and final.stop_reason == whole.stop_reason == "end_turn"
    assert final.usage.to_dict() == whole.usage.to_dict()
    assert [block.to_dict() for block in final.content] == [b.to_dict() for b in whole.content]
    assert whole.usage.output_tokens_details is not None


def test_counting_is_what_is_counted(client: anthropic.Anthropic) -> None:
    system, messages, tools = "Be brief.", ASKED["messages"], TOOLS[1:]
    counted = client.messages.count_tokens(
        model="tiny", messages=messages, system=system, tools=tools
    )
    answer = client.messages.create(
        model="tiny", messages=messages, system=system, tools=tools, max_tokens=2
    )
    usage = answer.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert answer.stop_reason == "max_tokens" and usage.output_tokens == 2


def said(client: anthropic.Anthropic, messages: list[Any], is_stream: bool) -> Any:
    args: Any = {**ASKED, "messages": messages, "tools": TOOLS}
    if not is_stream:
        return client.messages.create(**args)
    with client.messages.stream(**args) as stream:
        return stream.get_final_message()


@pytest.mark.parametrize("is_stream", [False, True])
def test_two_steps_with_a_tool(is_stream: bool) -> None:
    script = partial(one_after_another, answers=[PARIS, "It is sunny."])
    with talking(HERMES, script) as (service, base), client_of(base) as client:
        messages: list[Any] = [*HELLO]
        for _ in range(2):
            message = said(client, messages, is_stream)
            messages.append({"role": "assistant", "content": message.content})
            uses = [block for block in message.content if block.type == "tool_use"]
            results = [
                {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"} for use in uses
            ]
            if results:
                assert message.stop_reason == "tool_use"
                assert uses[0].input == {"city": "Zürich 😀"}
                messages.append({"role": "user", "content": results})
        assert message.content[0].text == "It is sunny."
        assert message.stop_reason == "end_turn"
        assert service.seen.qsize() == 2


def test_the_beta_of_tool_runners_works() -> None:
    """A loop that the client runs itself, by /v1/messages?beta=true. It asks for the conversation
    to be kept here, and goes on without when it is told that none is."""

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    script = partial(one_after_another, answers=[PARIS, "It is sunny."])
    with talking(HERMES, script) as (service, base), client_of(base) as client:
        runner = client.beta.messages.tool_runner(**ASKED, tools=[get_weather])
        message = runner.until_done()
        first, second = (service.seen.get(timeout=PATIENCE_S) for _ in range(2))
    assert [block.text for block in message.content if block.type == "text"] == ["It is sunny."]
    assert len(second.prompt_ids) > len(first.prompt_ids)


def test_stop_sequences_are_named() -> None:
    with talking(HERMES, says_it("One, two, three")) as (_, base), client_of(base) as client:
        message = client.messages.create(**ASKED, stop_sequences=[" three", ","])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ",")


BOUNDED: Any = {
    "name": "get_weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


HEADERS = {"user_profile_id", "workspace_id", "betas"}  # the client sends these as headers


def test_every_field_of_the_client_is_in_the_table() -> None:
    for kinds in (message_create_params, beta_create_params):
        sent = {
            name
            for kind in (kinds.MessageCreateParamsBase, kinds.MessageCreateParamsStreaming)
            for name in kind.__annotations__
        }
        assert sent - HEADERS <= set(MessagesRequest.model_fields) | set(messages_fields.MESSAGES)
    counted = set(message_count_tokens_params.MessageCountTokensParams.__annotations__)
    known = set(CountTokensRequest.model_fields) | set(messages_fields.COUNT)
    assert counted - HEADERS <= known
    tool = set(tool_param.ToolParam.__annotations__)
    assert tool <= set(OfferedTool.model_fields) | set(messages_fields.OFFERED_TOOL)


class Place(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]  # of a text the client would not send how long it may get
    is_large: bool


@pytest.fixture(scope="module")
def real() -> Generator[anthropic.Anthropic]:
    """The bundled model: its grammars are followed."""
    path = str(bundled.path())
    settings = Config(
        engine=EngineSection(process=False, device="cpu", threads=1),
        model=ModelSection(max_model_len=512),
        cache=CacheSection(num_pages=256),
    )
    service = Service(settings, model_path=path)
    with serving(service, Tokenizer.load(path), settings) as base, client_of(base) as client:
        yield client


def test_an_answer_by_a_schema_is_parsed(real: anthropic.Anthropic) -> None:
    message = real.messages.parse(**ASKED, output_format=Place)
    assert isinstance(message.parsed_output, Place) and message.stop_reason == "end_turn"
    with real.messages.stream(**ASKED, output_format=Place) as stream:
        final = stream.get_final_message()
    assert isinstance(final.parsed_output, Place)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_that_has_to_be_made_is_made(
    real: anthropic.Anthropic, choice: dict[str, Any]
) -> None:
    single: Any = {**choice, "disable_parallel_tool_use": True}
    message = real.messages.create(**ASKED, tools=[BOUNDED], tool_choice=single)
    (use,) = message.content
    assert message.stop_reason == "tool_use" and use.type == "tool_use"
    assert (use.name, list(use.input)) == ("get_weather", ["city"])


def test_a_schema_that_cannot_be_followed_is_named(real: anthropic.Anthropic) -> None:
    schema: Any = {"type": "object", "properties": {"a": {"not": {}}}}
    with pytest.raises(anthropic.BadRequestError) as caught:
        real.messages.create(
            **ASKED, output_config={"format": {"type": "json_schema", "schema": schema}}
        )
    assert "'output_config.format.schema.properties.a.not'" in str(caught.value)
    tool: Any = {"name": "f", "input_schema": schema, "strict": True}
    with pytest.raises(anthropic.BadRequestError) as caught:
        real.messages.create(**ASKED, tools=[tool])
    assert "'tools[0].input_schema.properties.a.not'" in str(caught.value)


def test_faults_are_the_client_s_own(model_folder: str, tokenizer: Tokenizer) -> None:
    settings: Config = config(api_keys=["secret"])
    with serving(Service(settings, model_path=model_folder), tokenizer, settings) as base:
        unknown_key = pytest.raises(anthropic.AuthenticationError)
        with client_of(base, "other") as client, unknown_key as unknown:
            client.messages.create(**ASKED)
        with client_of(base, "secret") as client:
            assert client.messages.create(**{**ASKED, "max_tokens": 2}).usage.output_tokens == 2
            with pytest.raises(anthropic.NotFoundError) as missing:
                client.messages.create(**{**ASKED, "model": "nobody"})
            with pytest.raises(anthropic.BadRequestError) as bad:
                client.messages.create(**ASKED, extra_body={"temperature": 7})
    assert unknown.value.type == "authentication_error"
    assert (missing.value.type, missing.value.error_code) == ("not_found_error", "model_not_found")
    assert bad.value.type == "invalid_request_error" and bad.value.request_id


@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key"])
def test_older_clients_send_their_key_in_a_header_of_its_own(
    model_folder: str, tokenizer: Tokenizer, header: str
) -> None:
    settings: Config = config(api_keys=["secret"])
    value = "secret" if header == "X-Api-Key" else "Bearer secret"
    with serving(Service(settings, model_path=model_folder), tokenizer, settings) as base:
        headers: Any = {"Authorization": anthropic.Omit(), header: value}
        with anthropic.Anthropic(base_url=base, api_key="", default_headers=headers) as client:
            message = client.messages.create(**{**ASKED, "max_tokens": 2})
    assert message.usage.output_tokens == 2
