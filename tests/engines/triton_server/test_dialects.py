"""What is sent to each kind of model, and what is made of its answers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from dynamo_serve.config import ModelSection
from dynamo_serve.core.request import NO_ID, Finish, Sampling
from dynamo_serve.engines.triton_server.dialects import Ask, Piece, triton_dialect
from dynamo_serve.engines.triton_server.faults import Fault, fault_of
from dynamo_serve.engines.triton_server.marks import refused_for
from dynamo_serve.engines.triton_server.stream import Stream
from dynamo_serve.engines.triton_server.tensors import Declared, decode, encode, request_of
from dynamo_serve.errors import EngineStartError
from tests.api.talking import HERMES, MISTRAL

VLLM = {
    **{"text_input": "BYTES", "stream": "BOOL", "sampling_parameters": "BYTES"},
    **{"exclude_input_in_output": "BOOL", "return_finish_reason": "BOOL"},
    "return_num_output_tokens": "BOOL",
}
TENSORS = {
    **{"text_input": "BYTES", "max_tokens": "INT32", "stream": "BOOL", "temperature": "FP32"},
    **{"top_k": "INT32", "runtime_top_p": "FP32", "random_seed": "UINT64", "min_length": "INT32"},
}
SAMPLING = Sampling(temperature=0.5, top_p=0.9, top_k=7, seed=2**63 - 1, repetition_penalty=1.5)


def declared(inputs: dict[str, str], **more: Any) -> Declared:
    plain = {"outputs": {}, "is_batched": False, "is_decoupled": True, "priority_levels": 0}
    return Declared(inputs, **{**plain, **more})


@pytest.mark.parametrize("datatype", ["BOOL", "INT32", "INT64", "UINT64", "FP32", "BYTES"])
def test_values_come_back_as_they_went(datatype: str) -> None:
    value: Any = {"BOOL": True, "FP32": 0.5, "BYTES": "naïve 😀"}.get(datatype, 2**31 - 1)
    (back,) = decode(datatype, encode(datatype, value))
    assert (back.decode() if datatype == "BYTES" else back) == value


def test_a_vllm_model_is_asked_with_one_text_of_parameters() -> None:
    dialect = triton_dialect(declared(VLLM), "auto", "m")
    assert dialect.name == "vllm" and dialect.infers == ()
    ask = Ask("Hi", 5, 2, SAMPLING, ignore_eos=True, stop_token_ids=(3, 9))
    values = dialect.values(ask)
    assert values.keys() == VLLM.keys()
    assert json.loads(str(values["sampling_parameters"])) == {
        **{"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 2**63 - 1},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.5},
        **{"max_tokens": 5, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [3, 9]},
    }


def test_what_an_older_vllm_backend_does_not_tell_is_said_to_be_inferred() -> None:
    old = {"text_input": "BYTES", "stream": "BOOL", "sampling_parameters": "BYTES"}
    dialect = triton_dialect(declared(old), "auto", "m")
    assert dialect.values(Ask("Hi", 5)).keys() == old.keys()
    assert set(dialect.infers) == {"usage", "finish_reason"}


def test_tensors_are_sent_under_the_names_that_the_model_has_and_no_others() -> None:
    dialect = triton_dialect(declared(TENSORS, is_batched=True), "auto", "m")
    values = dialect.values(Ask("Hi", 5, 2, SAMPLING))
    assert values == {
        **{"text_input": "Hi", "max_tokens": 5, "stream": True, "temperature": 0.5, "top_k": 7},
        **{"runtime_top_p": 0.9, "random_seed": 2**63 - 1, "min_length": 2},
    }
    assert {"min_p", "repetition_penalty", "stop_token_ids", "ignore_eos"} <= dialect.refused.keys()
    assert not {"temperature", "top_p", "seed"} & dialect.refused.keys()
    greedy = dialect.values(Ask("Hi", 5, 0, Sampling(temperature=0.0)))
    assert (greedy["temperature"], greedy["top_k"]) == (1.0, 1)


LLMAPI = {
    **{"text_input": "BYTES", "streaming": "BOOL", "sampling_param_max_tokens": "INT32"},
    **{"sampling_param_temperature": "FP32", "sampling_param_top_k": "INT32"},
    **{"sampling_param_seed": "UINT64", "sampling_param_exclude_input_from_output": "BOOL"},
    "return_finish_reason": "BOOL",
}


def test_nobody_is_promised_that_another_server_sets_prompts_apart() -> None:
    own = {"input_ids": "INT32", "request": "BYTES"}
    for inputs in (VLLM, TENSORS, LLMAPI, own):
        assert "cache_salt" in triton_dialect(declared(inputs), "auto", "m").refused


def test_the_llm_api_has_names_of_its_own_and_repeats_what_it_has_said() -> None:
    dialect = triton_dialect(declared(LLMAPI), "auto", "m")
    assert (dialect.name, dialect.infers) == ("llmapi", ("usage",))
    assert dialect.values(Ask("Hi", 5, 0, SAMPLING)) == {
        **{"text_input": "Hi", "streaming": True, "sampling_param_max_tokens": 5},
        **{"sampling_param_temperature": 0.5, "sampling_param_top_k": 7},
        **{"sampling_param_seed": 2**63 - 1, "return_finish_reason": True},
        "sampling_param_exclude_input_from_output": True,
    }
    greedy = dialect.values(Ask("Hi", 5, 0, replace(SAMPLING, temperature=0.0)))
    assert (greedy["sampling_param_temperature"], greedy["sampling_param_top_k"]) == (1.0, 1)
    assert {"top_p", "min_tokens", "repetition_penalty", "logprobs"} <= dialect.refused.keys()
    one = stream()
    for text, finish in ((b"", "None"), (b"na\xc3", "None"), ("naïve".encode(), "stop")):
        outputs = {"text_output": [text], "finish_reason": [finish.encode()]}
        piece = dialect.piece(outputs)
        assert piece is not None
        one.push(piece)
    assert taken(one) == ("naïve", 3, Finish.STOP)
    assert triton_dialect(declared({**LLMAPI, "max_tokens": "INT32"}), "auto", "m").name == "llmapi"


def test_a_server_that_takes_back_what_it_has_said_has_failed() -> None:
    one = stream()
    one.push(Piece(b"hello", 1, is_whole=True))
    with pytest.raises(Fault, match="taken back"):
        one.push(Piece(b"help", 1, is_whole=True))


def test_a_request_has_the_shape_that_the_model_declares() -> None:
    for is_batched, shape in ((False, [1]), (True, [1, 1])):
        about = declared(TENSORS, is_batched=is_batched)
        request = request_of("m", "r", {"max_tokens": 5}, about, {"timeout": 7, "flag": True})
        assert list(request.inputs[0].shape) == shape
        assert request.inputs[0].datatype == "INT32"
        assert request.parameters["timeout"].int64_param == 7
        assert request.parameters["flag"].bool_param is True


@pytest.mark.parametrize(
    ("about", "wanted", "told"),
    [
        (declared(VLLM, is_decoupled=False), "auto", "decoupled: true"),
        (declared(TENSORS, repeats=True), "auto", "accumulate_tokens to false"),
        (declared({"image": "BYTES"}), "auto", "known are"),
        (declared(VLLM), "tensors", "known are"),
    ],
)
def test_a_model_that_cannot_be_asked_is_named(about: Declared, wanted: str, told: str) -> None:
    with pytest.raises(EngineStartError, match=told):
        triton_dialect(about, wanted, "m")


def taken(stream: Stream) -> tuple[str, int, Finish | None]:
    output = stream.take()
    assert output is not None and set(output.token_ids) <= {NO_ID}
    assert len(output.texts) == len(output.token_ids)
    return "".join(output.texts), len(output.texts), output.finish


def stream(max_tokens: int = 10) -> Stream:
    return Stream("s", Ask("Hi", max_tokens), 0, lambda: None)


def test_characters_that_are_cut_are_put_together() -> None:
    one = stream()
    raw = "a😀b".encode()
    for part in (raw[:2], raw[2:4], raw[4:]):
        one.push(Piece(part, 1))
    assert taken(one) == ("a😀b", 3, None)
    one.push(Piece("ü".encode()[:1], 1))
    one.end()
    assert taken(one) == ("\ufffd", 2, Finish.STOP), "half a character is shown at the end"


def test_counts_are_the_servers_and_text_without_one_waits_for_the_next() -> None:
    one = stream()
    one.push(Piece(b"two", 2))
    one.push(Piece(b" more", 0))
    one.push(Piece(b" one", 1, Finish.LENGTH))
    assert taken(one) == ("two more one", 3, Finish.LENGTH)
    assert one.is_over and one.take() is None


@pytest.mark.parametrize(("num_tokens", "finish"), [(3, Finish.LENGTH), (2, Finish.STOP)])
def test_a_finish_that_nobody_tells_is_inferred(num_tokens: int, finish: Finish) -> None:
    one = stream(max_tokens=3)
    for _ in range(num_tokens):
        one.push(Piece(b"x", 1))
    one.end()
    assert taken(one) == ("x" * num_tokens, num_tokens, finish)


def test_a_stream_that_nobody_takes_from_ends() -> None:
    one = stream()
    with pytest.raises(Fault, match="than is taken"):
        for _ in range(10_000):
            one.push(Piece(b"x", 1))


@pytest.mark.parametrize(
    ("message", "kind", "ejects", "elsewhere"),
    [
        ("Stub process 'llm_0_0' is not healthy.", "unavailable", True, True),
        ("Exceeds maximum queue size", "unavailable", False, True),
        ("unexpected shape for input 'x'", "refused", False, False),
        ("CUDA error", "", False, False),
    ],
)
def test_what_a_server_says_tells_who_is_at_fault(
    message: str, kind: str, ejects: bool, elsewhere: bool
) -> None:
    fault = fault_of(message)
    assert (fault.kind, fault.ejects, fault.elsewhere) == (kind, ejects, elsewhere)
    assert message in fault.message


@pytest.mark.parametrize(
    ("piece", "told"),
    [
        (Piece(b"x", 10**9), "1000000000 tokens in one response"),
        (Piece(b"x", -1), "-1 tokens in one response"),
        (Piece(b"", 1, token_ids=(2**40,)), "token ids that are none"),
        (Piece(b"", 1, token_ids=(-1,)), "token ids that are none"),
        (Piece(bytes(1 << 25), 1), "than is taken"),
    ],
)
def test_what_no_sane_server_says_ends_the_request(piece: Piece, told: str) -> None:
    with pytest.raises(Fault, match=told):
        stream().push(piece)


def test_what_nobody_has_taken_can_begin_again_and_a_failure_loses_no_text() -> None:
    one = stream()
    one.push(Piece(b"half \xf0", 1))
    assert one.begin_again() and one.take() is None
    one.push(Piece(b"whole", 1))
    one.fail(Fault("gone", "unavailable"))
    assert taken(one) == ("whole", 1, None)
    assert not one.begin_again()
    last = one.take()
    assert last is not None and (last.finish, last.fault) == (Finish.ERROR, "unavailable")


class Specials:
    """Of a tokenizer, what is asked here: its template, and which texts are special tokens."""

    def __init__(self, template: str, *specials: str) -> None:
        self.template = template
        self.special_ids = frozenset(range(len(specials)))
        self.added_id = {text: i for i, text in enumerate(specials)}.get


@pytest.mark.parametrize(
    ("template", "specials", "is_lost"),
    [
        (MISTRAL, ["[TOOL_CALLS]"], True),
        (MISTRAL, [], False),
        (HERMES, ["[TOOL_CALLS]"], False),
        (HERMES, ["<tool_call>", "</tool_call>"], True),
        (HERMES + "<|python_tag|>", ["<|python_tag|>"], False),  # calls begin with a brace, too
    ],
)
def test_tools_are_refused_where_a_server_leaves_out_what_marks_a_call(
    template: str, specials: list[str], is_lost: bool
) -> None:
    tokenizer: Any = Specials(template, *specials)
    refused = refused_for(tokenizer, ModelSection())
    assert set(refused) == ({"tools"} if is_lost else set())
    assert refused_for(tokenizer, ModelSection(tool_parser="none")) == {}


def test_thoughts_that_cannot_be_told_apart_stop_the_start_and_say_how_to_go_on() -> None:
    tokenizer: Any = Specials(HERMES + "[THINK][/THINK]", "[THINK]", "[/THINK]")
    with pytest.raises(EngineStartError, match=r"\[THINK\] and .* set it to none"):
        refused_for(tokenizer, ModelSection())
    assert refused_for(tokenizer, ModelSection(reasoning_parser="none")) == {}
    unmarked: Any = Specials(HERMES + "<think></think>")
    assert refused_for(unmarked, ModelSection()) == {}
