"""How the models of different backends are asked, and what their answers mean.

Names and shapes are those that the backends publish. Only inputs that a model declares are sent; a
field of a client's request for which there is none is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

from dynamo_serve.core.request import Finish, Sampling
from dynamo_serve.engines.triton_server.tensors import Declared, Value
from dynamo_serve.errors import EngineStartError

NO_INPUT = "the model on the Triton server has no input for it"
TEXT_ONLY = "the Triton server answers with text, not with token ids"
NOT_ASKED = "log probabilities are not asked of the Triton server"
NOT_APART = "it is the Triton server that keeps prompts, and it is not told who may share them"
# Of every dialect whose answers are text.
REFUSED = {
    "return_token_ids": TEXT_ONLY,
    "logprobs": NOT_ASKED,
    "top_logprobs": NOT_ASKED,
    "prompt_logprobs": NOT_ASKED,
    "cache_salt": NOT_APART,
    "logit_bias": "the Triton server counts tokens of its own",
}
FINISHES = {b"stop": Finish.STOP, b"length": Finish.LENGTH}
UNFINISHED = (b"None", b"")


class Ask(NamedTuple):
    """What is wanted of a server: `max_tokens` and `min_tokens` of output from here on.

    Dialects of token ids are given `ids`: of the prompt (`num_prompt`), and of its output so far.
    """

    prompt: str
    max_tokens: int
    min_tokens: int = 0
    sampling: Sampling = Sampling()
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    num_prompt: int = 0
    stop_ids: tuple[int, ...] = ()  # with those that end a text anyway


class Piece(NamedTuple):
    """What one response says, of so many tokens; `prompt_count` are the prompt's, if told. With
    `is_whole` its text is all that has been said so far."""

    text: bytes
    num_tokens: int
    finish: Finish | None = None
    prompt_count: int | None = None
    error: str = ""
    token_ids: tuple[int, ...] = ()
    is_whole: bool = False


class TritonDialect(Protocol):
    """`refused` and `infers` are those of `EngineSpec`."""

    name: str
    takes_ids: bool
    refused: Mapping[str, str]
    infers: tuple[str, ...]

    def values(self, ask: Ask) -> dict[str, Value]:
        """The inputs of a request."""
        ...

    def piece(self, outputs: Mapping[str, Sequence[Any]]) -> Piece | None:
        """What a response says; None if it says nothing."""
        ...


class Vllm:
    """Triton's vLLM backend: one JSON text of sampling parameters."""

    name = "vllm"
    takes_ids = False

    def __init__(self, declared: Declared) -> None:
        self._inputs = declared.inputs
        self.refused: Mapping[str, str] = REFUSED
        told = {"usage": "return_num_output_tokens", "finish_reason": "return_finish_reason"}
        self.infers = tuple(what for what, name in told.items() if name not in declared.inputs)

    def values(self, ask: Ask) -> dict[str, Value]:
        values: dict[str, Value] = {
            "text_input": ask.prompt,
            "sampling_parameters": json.dumps(self._sampling(ask)),
            "stream": True,
            "exclude_input_in_output": True,
            "return_finish_reason": True,
            "return_num_input_tokens": True,
            "return_num_output_tokens": True,
        }
        return {name: value for name, value in values.items() if name in self._inputs}

    def _sampling(self, ask: Ask) -> dict[str, Any]:
        sampling = ask.sampling
        wanted = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "max_tokens": ask.max_tokens,
            "seed": sampling.seed,
        }
        more = {
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "min_tokens": ask.min_tokens,
            "ignore_eos": ask.ignore_eos,
            "stop_token_ids": list(ask.stop_token_ids),
        }
        off = {"repetition_penalty": 1.0}
        return wanted | {name: v for name, v in more.items() if v and v != off.get(name)}

    def piece(self, outputs: Mapping[str, Sequence[Any]]) -> Piece | None:
        if "text_output" not in outputs:
            return None
        finish, error = _finish(outputs)
        count = _first(outputs, "num_output_tokens", 1)
        prompt_count = _first(outputs, "num_input_tokens", None)
        return Piece(_first(outputs, "text_output", b""), count, finish, prompt_count, error)


class Tensors:
    """TensorRT-LLM's `ensemble` and `tensorrt_llm_bls`: a tensor for each sampling parameter, in
    some versions under another name; neither a finish reason nor counts that can be relied on."""

    name = "tensors"
    takes_ids = False
    infers: tuple[str, ...] = ("usage", "finish_reason")
    MAX_TOKENS = "max_tokens"
    YES: tuple[str, ...] = ("stream", "exclude_input_in_output")
    # The field of a client's request, and what the input is called, newer name first.
    INPUTS: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("temperature", ("temperature",)),
        ("top_p", ("top_p", "runtime_top_p")),
        ("top_k", ("top_k", "runtime_top_k")),
        ("min_p", ("min_p",)),
        ("repetition_penalty", ("repetition_penalty",)),
        ("presence_penalty", ("presence_penalty",)),
        ("frequency_penalty", ("frequency_penalty",)),
        ("seed", ("seed", "random_seed")),
        ("min_tokens", ("min_tokens", "min_length")),
    )

    def __init__(self, declared: Declared) -> None:
        self._inputs = declared.inputs
        self._names = {
            field: name
            for field, names in self.INPUTS
            for name in reversed(names)
            if name in declared.inputs
        }
        missing = [field for field, _ in self.INPUTS if field not in self._names]
        self.refused: Mapping[str, str] = {
            **REFUSED,
            **dict.fromkeys([*missing, "ignore_eos", "stop_token_ids"], NO_INPUT),
        }

    def values(self, ask: Ask) -> dict[str, Value]:
        values: dict[str, Value] = {"text_input": ask.prompt, self.MAX_TOKENS: ask.max_tokens}
        values.update({name: True for name in self.YES if name in self._inputs})
        for field, name in self._names.items():
            value = ask.min_tokens if field == "min_tokens" else getattr(ask.sampling, field)
            if value or field in ("temperature", "seed"):
                values[name] = value
        if ask.sampling.temperature == 0 and "top_k" in self._names:
            # Its samplers divide by the temperature; the likeliest of one is the likeliest of all.
            values[self._names["top_k"]] = 1
            values.update(
                {self._names[name]: 1.0 for name in ("temperature",) if name in self._names}
            )
        return values

    def piece(self, outputs: Mapping[str, Sequence[Any]]) -> Piece | None:
        text = _first(outputs, "text_output", None)
        return None if text is None else Piece(text, 1)


class LlmApi(Tensors):
    """TensorRT-LLM's LLM API as a python model: other names, no counts, a finish reason where the
    model declares the input that asks for it, and every response has all of the text so far."""

    name = "llmapi"
    MAX_TOKENS = "sampling_param_max_tokens"
    YES = ("streaming", "sampling_param_exclude_input_from_output", "return_finish_reason")
    INPUTS = tuple((field, (f"sampling_param_{field}",)) for field, _ in Tensors.INPUTS)

    def __init__(self, declared: Declared) -> None:
        super().__init__(declared)
        told = "return_finish_reason" in declared.inputs
        self.infers = ("usage",) if told else Tensors.infers

    def piece(self, outputs: Mapping[str, Sequence[Any]]) -> Piece | None:
        if "text_output" not in outputs:
            return None
        finish, error = _finish(outputs)
        text = _first(outputs, "text_output", b"")
        return Piece(text, 1, finish, error=error, is_whole=True)


class Dserve:
    """Our own engine inside Triton (triton_models/dserve): token ids, and nothing to infer."""

    name = "dserve"
    takes_ids = True
    infers: tuple[str, ...] = ()

    def __init__(self, declared: Declared) -> None:
        names = ("logprobs", "top_logprobs", "prompt_logprobs")
        self.refused: Mapping[str, str] = {
            **dict.fromkeys(names, NOT_ASKED),
            "cache_salt": NOT_APART,
        }

    def values(self, ask: Ask) -> dict[str, Value]:
        num_output = len(ask.ids) - ask.num_prompt
        wishes = {
            "max_tokens": ask.max_tokens + num_output,
            "min_tokens": ask.min_tokens + num_output,
            "num_prompt": ask.num_prompt,
            "stop_ids": ask.stop_ids,
            # A server that is older than this one knows nothing of what is not asked for.
            "sampling": {k: v for k, v in asdict(ask.sampling).items() if k != "prompt_logprobs"},
        }
        return {"input_ids": ask.ids, "request": json.dumps(wishes)}

    def piece(self, outputs: Mapping[str, Sequence[Any]]) -> Piece | None:
        if "token_ids" not in outputs:
            return None
        ids, reason = tuple(outputs["token_ids"]), _first(outputs, "finish_reason", b"")
        return Piece(b"", len(ids), FINISHES.get(reason), token_ids=ids)


def _finish(outputs: Mapping[str, Sequence[Any]]) -> tuple[Finish | None, str]:
    """Why the answer has ended, and the error if that is none of a model's reasons."""
    reason = _first(outputs, "finish_reason", b"")
    finish = FINISHES.get(reason)
    if finish is None and reason not in UNFINISHED:
        return None, f"the Triton server ended the answer: {reason.decode(errors='replace')}"
    return finish, ""


def _first(outputs: Mapping[str, Sequence[Any]], name: str, default: Any) -> Any:
    values = outputs.get(name)
    return values[0] if values else default


KNOWN_BY: dict[type[Vllm] | type[Tensors] | type[Dserve], tuple[str, ...]] = {
    Vllm: ("text_input", "sampling_parameters"),
    LlmApi: ("text_input", "sampling_param_max_tokens"),
    Tensors: ("text_input", "max_tokens"),
    Dserve: ("input_ids", "request"),
}


def triton_dialect(declared: Declared, wanted: str, model: str) -> TritonDialect:
    """Raises `EngineStartError` for a model that is none of those known."""
    if not declared.is_decoupled:
        raise EngineStartError(
            f"triton.model = {model!r}: it answers once for each request; to stream it needs "
            "model_transaction_policy { decoupled: true } in its config.pbtxt or, of the LLM API, "
            "decoupled: true in its model.yaml"
        )
    if declared.repeats:
        raise EngineStartError(
            f"triton.model = {model!r}: its responses repeat what was said before; set "
            "accumulate_tokens to false in its config.pbtxt"
        )
    for kind, inputs in KNOWN_BY.items():
        if wanted in ("auto", kind.name) and all(each in declared.inputs for each in inputs):
            return kind(declared)
    known = "; ".join(f"{kind.name}: {' and '.join(inputs)}" for kind, inputs in KNOWN_BY.items())
    raise EngineStartError(
        f"triton.dialect = {wanted!r}: the model {model!r} has the inputs "
        f"{', '.join(declared.inputs)}; known are {known}"
    )
