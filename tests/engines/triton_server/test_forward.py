"""Our API in front of a real Triton server whose model echoes its prompt word by word."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_serve import cli
from dynamo_serve.config import Config, EngineSection, ModelSection, ServerSection, TritonSection
from dynamo_serve.errors import EngineStartError
from dynamo_serve.metrics import Metrics
from dynamo_serve.service import Service
from dynamo_serve.text.tokenizer import Tokenizer
from scripts.tritonserver import Running
from tests.api.live import MAX_MODEL_LEN, save_model, serving
from tests.conformance.subjects import metric
from tests.patience import PATIENCE_S
from tests.tries import sooner_or_later

Json = dict[str, Any]
TEXT = "hello naïve 😀 world"
WORDS = 4


def settings(server: Running, **triton: Any) -> Config:
    given = {"endpoints": (server.endpoint,), "model": "echo", "connect_timeout_s": PATIENCE_S}
    return Config(
        server=ServerSection(resume_grace_s=2 * PATIENCE_S),
        engine=EngineSection(kind="triton", process=False),
        model=ModelSection(max_model_len=MAX_MODEL_LEN),
        triton=TritonSection(**{**given, **triton}),
    )


@contextlib.contextmanager
def forwarding(
    folder: Path, config: Config, metrics: Metrics | None = None
) -> Generator[httpx.Client]:
    path = save_model(folder)
    service = Service(config, model_path=path)
    with (
        serving(service, Tokenizer.load(path), config, metrics) as url,
        httpx.Client(base_url=url, timeout=PATIENCE_S) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client(triton: Running, tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    with forwarding(tmp_path_factory.mktemp("model"), settings(triton)) as client:
        yield client


@pytest.fixture(scope="module")
def impatient(triton: Running, tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    config = settings(triton, first_token_timeout_s=0.5)
    with forwarding(tmp_path_factory.mktemp("model"), config) as client:
        yield client


@pytest.fixture(scope="module")
def tensors(triton: Running, tmp_path_factory: pytest.TempPathFactory) -> Generator[httpx.Client]:
    config = settings(triton, model="echo_tensors")
    with forwarding(tmp_path_factory.mktemp("model"), config) as client:
        yield client


def complete(client: httpx.Client, prompt: str = TEXT, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 40, **fields}
    return client.post("/v1/completions", json=body)


def events(answer: httpx.Response) -> Iterator[Json]:
    """What a stream brings, less the end mark."""
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def counted(server: Running, outcome: str) -> float:
    for line in server.metrics().splitlines():
        if line.startswith(f'echo_requests_total{{model="echo",outcome="{outcome}"}}'):
            return float(line.rpartition(" ")[2])
    raise AssertionError("the model does not count")


def cancelled(server: Running) -> float:
    """How many were cancelled there, once it has no answer under way."""
    settles(lambda: metric(server, "echo_live", "echo") == 0)
    return counted(server, "cancelled")


def test_an_answer_has_the_text_the_counts_and_the_finish_of_the_server(
    client: httpx.Client,
) -> None:
    body = complete(client).json()
    assert body["choices"][0]["text"] == TEXT
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == WORDS
    assert "inferred" not in body["usage"] and "finish_reason_inferred" not in body["choices"][0]
    body = complete(client, max_tokens=2).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == (
        "hello naïve",
        "length",
    )


def test_a_chat_is_rendered_here_and_streamed_word_by_word(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "say @pause=5 hi"}]
    body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}

    def word_by_word() -> bool | None:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            chunks = list(events(answer))
        deltas = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]]
        # The model's tokenizer would put the first <|im_start|> there, as ours does.
        assert "".join(deltas) == "user\nsay @pause=5 hi<|im_end|>\n<|im_start|>assistant\n"
        assert chunks[-1]["usage"]["completion_tokens"] == 6
        return len(list(filter(None, deltas))) > 1 or None

    assert sooner_or_later(word_by_word, "word by word")


def test_a_stop_string_ends_the_answer_here_and_there(
    client: httpx.Client, triton: Running
) -> None:
    before = cancelled(triton)
    endless: Json = {"max_tokens": 200, "ignore_eos": True}
    body = complete(client, "one two three @pause=250", stop=["ee @"], **endless).json()
    assert body["choices"][0]["text"] == "one two thr"
    assert body["choices"][0]["finish_reason"] == "stop"
    settles(lambda: cancelled(triton) == before + 1)


def settles(holds: Callable[[], bool]) -> None:
    """Waits until something holds that becomes so by itself."""
    give_up = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < give_up, "it never came to hold"


def test_several_choices_are_several_requests(client: httpx.Client) -> None:
    body = complete(client, n=3).json()
    assert [choice["text"] for choice in body["choices"]] == [TEXT] * 3


def test_who_hangs_up_is_cancelled_in_the_server_at_once(
    client: httpx.Client, triton: Running
) -> None:
    """Long before the answer is over, and while the stream could still be gone on with here."""
    prompt = {"prompt": "a b c @pause=1000", "stream": True}
    before = cancelled(triton)
    body = {**prompt, "max_tokens": 200, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        next(events(answer))
    settles(lambda: counted(triton, "cancelled") == before + 1)


def test_who_comes_back_goes_on_behind_what_was_said(client: httpx.Client) -> None:
    prompt = "one two @pause=100 three four"
    body = {"prompt": prompt, "max_tokens": 30, "stream": True}
    events_please = {"Accept": "text/event-stream"}
    with client.stream("POST", "/v1/completions", json=body, headers=events_please) as answer:
        lines = answer.iter_lines()
        last = next(line for line in lines if line.startswith("id: ")).removeprefix("id: ")
        event = json.loads(next(line for line in lines if line).removeprefix("data: "))
    read = event["choices"][0]["text"]
    with client.stream(
        "GET", f"/v1/streams/{last.partition(':')[0]}", headers={"Last-Event-ID": last}
    ) as answer:
        text = "".join(chunk["choices"][0]["text"] for chunk in events(answer))
    # The model is asked to go on behind the prompt and all it had said; an echo repeats both.
    unread, _, _ = text.partition(prompt)
    assert prompt.startswith(read + unread)
    assert text == unread + prompt + read + unread


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"logprobs": 1}, "logprobs"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
    ],
)
def test_what_the_server_cannot_do_is_refused_by_name(
    client: httpx.Client, fields: Json, name: str
) -> None:
    answer = complete(client, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert answer.json()["error"]["code"] == "unsupported_parameter"


def test_a_failure_before_the_first_token_is_a_status_and_later_an_event(
    client: httpx.Client,
) -> None:
    answer = complete(client, "a b c @fail=0")
    assert answer.status_code == 500
    assert "told to fail" in answer.json()["error"]["message"]
    body = {"prompt": "a b c d @fail=2 @pause=20", "max_tokens": 9, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        *chunks, last = events(answer)
    assert "".join(c["choices"][0]["text"] for c in chunks) == "a b"
    assert last["error"]["code"] == "engine_error" and "told to fail" in last["error"]["message"]


def test_prompts_that_are_no_text_are_refused(client: httpx.Client) -> None:
    pieces = [ord("h"), ord("e"), ord("l")]  # ids that no text is cut into
    answer = client.post("/v1/completions", json={"prompt": pieces, "max_tokens": 2})
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert "token ids" in answer.json()["error"]["message"]


def test_silence_ends_with_504_and_the_server_is_told(
    client: httpx.Client, impatient: httpx.Client, triton: Running
) -> None:
    before = cancelled(triton)
    answer = complete(impatient, "hush @mute=1")
    assert answer.status_code == 504
    assert "triton.first_token_timeout_s" in answer.json()["error"]["message"]
    settles(lambda: counted(triton, "cancelled") == before + 1)
    body = {"prompt": "a b @pause=9000", "max_tokens": 9, "deadline_ms": 1000}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["finish_reason"] == (
        "deadline"
    )


def test_a_silent_server_is_ejected_and_back_when_a_canary_has_answered(
    impatient: httpx.Client,
) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: complete(impatient, "hush @mute=1"), range(4)))
    assert {answer.status_code for answer in answers} == {504}
    settles(lambda: complete(impatient).status_code == 200)


def test_tensors_with_cut_characters_and_inferred_ends(tensors: httpx.Client) -> None:
    body = complete(tensors).json()
    assert body["choices"][0]["text"] == TEXT
    assert body["usage"]["completion_tokens"] == WORDS and body["usage"]["inferred"] is True
    assert body["choices"][0]["finish_reason_inferred"] is True
    assert complete(tensors, max_tokens=3).json()["choices"][0]["finish_reason"] == "length"
    answer = complete(tensors, presence_penalty=0.5)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "presence_penalty"


def test_many_streams_at_once_come_out_whole(tensors: httpx.Client, triton: Running) -> None:
    def streamed(prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 40, "stream": True}
        with tensors.stream("POST", "/v1/completions", json=body) as answer:
            return "".join(chunk["choices"][0]["text"] for chunk in events(answer))

    prompts = [f"{i} b c d @pause=2 e f" for i in range(64)]
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(streamed, prompts)) == prompts
    counts = {
        name: float(line.rpartition(" ")[2])
        for line in triton.metrics().splitlines()
        for name in ("nv_inference_count", "nv_inference_exec_count")
        if line.startswith(f'{name}{{model="echo_tensors"')
    }
    assert counts["nv_inference_exec_count"] < counts["nv_inference_count"], "batched there, too"


def test_a_start_without_a_server_or_its_model_says_so(triton: Running, tmp_path: Path) -> None:
    for wrong, told in (
        ({"model": "nobody"}, "no server in triton.endpoints serves the model 'nobody'"),
        ({"endpoints": ("127.0.0.1:9",), "connect_timeout_s": 0.3}, "could be reached"),
        ({"dialect": "tensors"}, "known are"),
    ):
        config = settings(triton, **wrong)
        service = Service(config, model_path=save_model(tmp_path))
        with pytest.raises(EngineStartError, match=told):
            asyncio.run(service.start())


def test_the_engine_tells_what_it_is(client: httpx.Client) -> None:
    facts = client.get("/v1/server").json()["engine"]
    assert facts["dialect"] == "vllm" and facts["triton_model"] == "echo"


def test_check_names_the_dialect_and_what_is_refused(
    triton: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(*endpoints: str) -> tuple[int, str]:
        given = [f"triton.endpoints={','.join(endpoints)}", "triton.model=echo_tensors"]
        given.append("triton.connect_timeout_s=0.3")
        code = cli.main(["triton", "check", *(part for each in given for part in ("--set", each))])
        return code, capsys.readouterr().out

    code, said = check(triton.endpoint)
    assert code == 0
    assert "model echo_tensors, dialect tensors; a token in" in said
    assert "told by the server: nothing; inferred here: token counts, the finish reason" in said
    assert "    presence_penalty: the model on the Triton server has no input for it" in said
    code, said = check(triton.endpoint, "127.0.0.1:9")
    assert code == 1 and "127.0.0.1:9: no Triton server could be reached within 0.3 s" in said
