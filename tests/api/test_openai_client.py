"""The official client against a real server: what an application would do."""

from __future__ import annotations

import asyncio
from collections.abc import Generator

import openai
import pytest

from dynamo_serve.core.request import Finish
from dynamo_serve.text.tokenizer import Tokenizer
from tests.api.conftest import Stubbed
from tests.api.stub import says
from tests.patience import PATIENCE_S

HELLO = [{"role": "user", "content": "hello"}]


def client_of(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(url: str) -> Generator[openai.OpenAI]:
    with client_of(url) as client:
        yield client


def chat(client: openai.OpenAI, **fields: object) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(model="tiny", messages=HELLO, **fields)  # type: ignore[call-overload,no-any-return]


def streamed(
    client: openai.OpenAI, **fields: object
) -> list[openai.types.chat.ChatCompletionChunk]:
    return list(chat(client, stream=True, **fields))  # type: ignore[arg-type]


def texts(chunks: list[openai.types.chat.ChatCompletionChunk], n: int = 1) -> list[str]:
    return [
        "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == i)
        for i in range(n)
    ]


def test_chat_answers_with_counts(client: openai.OpenAI) -> None:
    answer = chat(client, max_completion_tokens=5)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.system_fingerprint
    assert answer.model == "tiny"


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=20, seed=1)
    chunks = streamed(client, max_tokens=20, seed=1, stream_options={"include_usage": True})
    assert texts(chunks) == [whole.choices[0].message.content]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_choices_come_back_in_order(client: openai.OpenAI) -> None:
    answer = chat(client, n=3, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None and answer.usage.completion_tokens == 12
    chunks = streamed(client, n=3, max_tokens=4)
    assert texts(chunks, 3) == [choice.message.content for choice in answer.choices]


def test_a_second_request_reports_the_cached_prompt(client: openai.OpenAI) -> None:
    prompt = "the stop word is here " * 8
    counts = [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=2).usage for _ in range(2)
    ]
    assert counts[1] is not None and counts[1].prompt_tokens_details is not None
    assert (counts[1].prompt_tokens_details.cached_tokens or 0) >= 16


def test_logprobs_of_a_chat(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = chat(
        client, max_tokens=6, logprobs=True, top_logprobs=2, extra_body={"return_token_ids": True}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    ids = (answer.choices[0].model_extra or {})["token_ids"]
    assert [t.token for t in logprobs.content] == [tokenizer.token_text(i) for i in ids]
    assert all(len(t.top_logprobs) == 2 and t.logprob < 0 for t in logprobs.content)
    prompt_ids = (answer.model_extra or {})["prompt_token_ids"]
    assert answer.usage is not None and len(prompt_ids) == answer.usage.prompt_tokens


def test_streamed_logprobs_add_up_to_the_whole(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=12, logprobs=True).choices[0].logprobs
    chunks = streamed(client, max_tokens=12, logprobs=True)
    parts = [c.logprobs.content or [] for chunk in chunks for c in chunk.choices if c.logprobs]
    assert whole is not None
    assert [t.token for part in parts for t in part] == [t.token for t in whole.content or []]


@pytest.mark.parametrize(
    "prompt", ["hello", ["hello", "world"], [5, 6, 7], [[5, 6, 7], [8, 9]]], ids=repr
)
def test_completions_take_text_and_ids(client: openai.OpenAI, prompt: object) -> None:
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=3, n=2)  # type: ignore[call-overload]
    num_prompts = 2 if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert [choice.index for choice in answer.choices] == list(range(2 * num_prompts))
    assert answer.usage.completion_tokens == 6 * num_prompts


def test_completions_stream(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="hello", max_tokens=9)
    stream = client.completions.create(model="tiny", prompt="hello", max_tokens=9, stream=True)
    assert "".join(c.text for chunk in stream for c in chunk.choices) == whole.choices[0].text


def test_legacy_logprobs_have_the_legacy_shape(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=5, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens and logprobs.token_logprobs and logprobs.text_offset
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 5
    assert logprobs.text_offset[0] == 0
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs or [])


def test_the_seed_of_the_first_choice_is_the_clients(
    stubbed: Stubbed, tokenizer: Tokenizer
) -> None:
    service, base = stubbed(says(tokenizer, "hi"))
    with client_of(base) as client:
        chat(client, seed=77, n=3)
        seeds = [service.seen.get_nowait().sampling.seed for _ in range(3)]
        chat(client, seed=77, n=3)
        assert [service.seen.get_nowait().sampling.seed for _ in range(3)] == seeds
        chat(client)
        chat(client)
        drawn = [service.seen.get_nowait().sampling.seed for _ in range(2)]
    assert seeds[0] == 77
    assert len(set(seeds)) == 3
    assert len(set(drawn)) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_cancels(
    stubbed: Stubbed, tokenizer: Tokenizer, stream: bool
) -> None:
    service, base = stubbed(says(tokenizer, "one two STOP three"))
    with client_of(base) as client:
        if stream:
            chunks = streamed(client, stop=["STOP", "never"])
            text, reason = texts(chunks)[0], chunks[-1].choices[0].finish_reason
        else:
            answer = chat(client, stop="STOP")
            assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == 7
            choice = answer.choices[0]
            text, reason = choice.message.content or "", choice.finish_reason
    assert (text, reason) == ("one two ", "stop")
    assert service.cancelled.get(timeout=PATIENCE_S).startswith("chatcmpl-")


def test_a_stop_token_is_counted_and_named_but_not_shown(
    stubbed: Stubbed, tokenizer: Tokenizer
) -> None:
    _, base = stubbed(says(tokenizer, "hi"))
    with client_of(base) as client:
        answer = chat(client, logprobs=True, extra_body={"return_token_ids": True})
    num_tokens = len(tokenizer.encode("hi")) + 1
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("hi", "stop")
    assert answer.usage is not None and answer.usage.completion_tokens == num_tokens
    assert len((choice.model_extra or {})["token_ids"]) == num_tokens
    assert choice.logprobs is not None and len(choice.logprobs.content or []) == num_tokens - 1
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 7


def test_eos_ends_the_answer_unless_it_is_to_be_ignored(
    stubbed: Stubbed, tokenizer: Tokenizer
) -> None:
    service, base = stubbed(says(tokenizer, "hi"))
    with client_of(base) as client:
        chat(client, extra_body={"stop_token_ids": [9], "min_tokens": 3})
        chat(client, extra_body={"stop_token_ids": [9], "ignore_eos": True})
    first, second = service.seen.get_nowait(), service.seen.get_nowait()
    assert (set(first.stop_ids), first.min_tokens) == ({2, 9}, 3)
    assert (set(second.stop_ids), second.min_tokens) == ({9}, 0)


def test_without_max_tokens_a_chat_may_fill_the_context(
    stubbed: Stubbed, tokenizer: Tokenizer
) -> None:
    service, base = stubbed(says(tokenizer, "hi", finish=Finish.LENGTH))
    with client_of(base) as client:
        assert chat(client).choices[0].finish_reason == "length"
        client.completions.create(model="tiny", prompt="hello")
    request = service.seen.get_nowait()
    assert len(request.prompt_ids) + request.max_tokens == service.spec.max_model_len
    assert service.seen.get_nowait().max_tokens == 16


def test_messages_are_rendered_by_the_template(stubbed: Stubbed, tokenizer: Tokenizer) -> None:
    service, base = stubbed(says(tokenizer, "hi"))
    with client_of(base) as client:
        client.chat.completions.create(
            model="tiny-alias",
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"}] * 2},
            ],
            extra_body={"chat_template_kwargs": {"opening": "So: "}},
        )
    assert tokenizer.decode(service.seen.get_nowait().prompt_ids) == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user(Ann)\naa<|im_end|>\n<|im_start|>assistant\nSo: "
    )


def test_bookkeeping_fields_change_nothing(client: openai.OpenAI) -> None:
    plain = chat(client, max_tokens=4)
    marked = chat(
        client,
        max_tokens=4,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        verbosity="medium",
        top_logprobs=0,
        extra_body={"best_of": 1},
    )
    assert marked.choices[0].message.content == plain.choices[0].message.content


def test_errors_arrive_as_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, modalities=["audio"])
    assert (refused.value.param, refused.value.code) == ("modalities", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("nobody/knows")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        chat(client, max_tokens=100_000)
    assert too_long.value.code == "context_length_exceeded"


def test_models_are_listed_under_every_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-alias"]
    assert client.models.retrieve("tiny-alias").id == "tiny-alias"


def test_many_async_clients_get_the_answer_they_get_alone(url: str, client: openai.OpenAI) -> None:
    alone = [
        client.completions.create(model="tiny", prompt=[i + 3, 9], max_tokens=12).choices[0].text
        for i in range(16)
    ]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as many:

            async def one(i: int) -> str:
                stream = await many.completions.create(
                    model="tiny", prompt=[i + 3, 9], max_tokens=12, stream=True
                )
                return "".join([c.text async for chunk in stream for c in chunk.choices])

            return await asyncio.gather(*map(one, range(16)))

    assert asyncio.run(together()) == alone
