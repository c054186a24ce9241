"""One table of the request fields that clients are known to send, and what becomes of each.

A field is *supported* (it is in a model of `schema.py`), *bookkeeping* (accepted, without effect
on the answer), or *refused* by name, unless its value asks for what happens anyway. Every other
field is unknown. `null` always means "not given".
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dynamo_serve.errors import UnknownField, UnsupportedField

logger = logging.getLogger(__name__)

Body = Mapping[str, Any]


def never(value: Any, body: Body) -> bool:
    return False


def only(*values: Any) -> Callable[[Any, Body], bool]:
    """Accepts values that change nothing."""
    return lambda value, body: value in values


class Known(NamedTuple):
    """A field of the clients' world that is not in our models.

    `harmless(value, body)` says whether a refused field has a value that changes nothing. `code` is
    that of the refusal, where clients know one.
    """

    status: Literal["bookkeeping", "refused"]
    why: str
    harmless: Callable[[Any, Body], bool] = never
    code: str = UnsupportedField.code


def bookkeeping(why: str) -> Known:
    return Known("bookkeeping", why)


def refused(why: str, harmless: Callable[[Any, Body], bool] = never) -> Known:
    return Known("refused", why, harmless)


COMMON: dict[str, Known] = {
    "user": bookkeeping("names the end user"),
    "metadata": bookkeeping("the caller's own notes"),
    "store": bookkeeping("nothing is stored here"),
    "service_tier": bookkeeping("there is one tier"),
    "safety_identifier": bookkeeping("names the end user"),
    "prompt_cache_retention": bookkeeping("cached prompts stay while there is room"),
    "prompt_cache_options": bookkeeping("equal prompt heads are shared without it"),
    "request_id": bookkeeping("send the header X-Request-Id"),
    "best_of": refused(
        "no choices are thrown away; use n", lambda value, body: value == (body.get("n") or 1)
    ),
    "use_beam_search": refused("there is no beam search", only(False)),
    "length_penalty": refused("there is no beam search", only(1.0)),
    "early_stopping": refused("there is no beam search", only(False)),
    "include_stop_str_in_output": refused("stop strings are always left out", only(False)),
    "skip_special_tokens": refused("special tokens are always left out", only(True)),
    "spaces_between_special_tokens": refused("special tokens are always left out"),
    "truncate_prompt_tokens": refused("prompts are never cut", only(-1)),
    "logits_processors": refused("code from a client is never run", only([])),
    "bad_words": refused("use logit_bias", only([])),
    "allowed_token_ids": refused("use logit_bias"),
    "guided_json": refused("use structured_outputs.json"),
    "guided_regex": refused("use structured_outputs.regex"),
    "guided_choice": refused("use structured_outputs.choice"),
    "guided_grammar": refused("use structured_outputs.grammar"),
    "guided_whitespace_pattern": refused("white space is bounded by the server"),
    "guided_decoding_backend": refused("there is one backend"),
    "moderation": refused("nothing is moderated here"),
}

CHAT: dict[str, Known] = {
    **COMMON,
    "functions": refused("use tools", only([])),
    "function_call": refused("use tool_choice", only("none", "auto")),
    "include_reasoning": refused("thoughts are always told", only(True)),
    "separate_reasoning": refused("thoughts are always told apart", only(True)),
    "stream_reasoning": refused("thoughts are streamed as they come", only(True)),
    "modalities": refused("the answer is text", only(["text"])),
    "audio": refused("the answer is text"),
    "prediction": bookkeeping("could only change the speed"),
    "verbosity": refused("say it in the messages", only("medium")),
    "web_search_options": refused("there is no web search"),
    "echo": refused("messages are not repeated", only(False)),
    "add_generation_prompt": refused("the answer is always a new message", only(True)),
    "continue_final_message": refused("the answer is always a new message", only(False)),
    "add_special_tokens": refused("the chat template places them", only(False)),
    "documents": refused("put them into the messages", only([])),
    "chat_template": refused("the model's own template is used"),
    "thinking": refused("use reasoning_effort, or thinking_token_budget"),
    "mm_processor_kwargs": refused("the input is text"),
}

COMPLETION: dict[str, Known] = {
    **COMMON,
    "suffix": refused("there is no insertion", only("")),
    "add_special_tokens": refused("the tokenizer's own are always added", only(True)),
}

TOKENS: dict[str, Known] = {
    "cache_salt": bookkeeping("nothing is computed that could be cached"),
}

MESSAGE: dict[str, Known] = {
    "function_call": refused("use tool_calls"),
    "audio": refused("messages are text"),
    "refusal": refused("messages are text", only("")),
    "parsed": bookkeeping("what the official client made of the content"),
    "annotations": bookkeeping("a client sends back what an answer carried"),
    "reasoning": refused("use reasoning_content", only("")),
}

CALLED_FUNCTION: dict[str, Known] = {
    "parsed_arguments": bookkeeping("what the official client made of the arguments"),
}

STREAM_OPTIONS: dict[str, Known] = {
    "include_obfuscation": bookkeeping("padding against traffic analysis; none is added"),
    "continuous_usage_stats": refused("usage comes once, at the end", only(False)),
}

RESPONSE_FORMAT: dict[str, Known] = {
    "format": refused("there are no structural tags; use structured_outputs.grammar"),
    "structures": refused("there are no structural tags; use structured_outputs.grammar"),
    "triggers": refused("there are no structural tags; use structured_outputs.grammar"),
}

STRUCTURED_OUTPUTS: dict[str, Known] = {
    "structural_tag": refused("there are no structural tags; use grammar"),
    "whitespace_pattern": refused("white space is bounded by the server"),
    "disable_additional_properties": refused(
        'say "additionalProperties": false in the schema', only(False)
    ),
    "disable_fallback": bookkeeping("there is one backend"),
}


def sift(
    body: Body, model: type[BaseModel], known: Mapping[str, Known], path: str, on_unknown: str
) -> dict[str, Any]:
    """The supported fields of `body`, those at null left out.

    Raises `UnsupportedField` and `UnknownField`; with `on_unknown` "warn" the latter is logged.
    """
    kept: dict[str, Any] = {}
    supported = _supported(model)
    for name, value in body.items():
        if value is None and (name in supported or name in known):
            continue
        if name in supported:
            kept[name] = value
        elif (entry := known.get(name)) is not None:
            if entry.status == "refused" and not entry.harmless(value, body):
                raise _refusal(path + name, entry)
        elif on_unknown == "warn":
            logger.warning("unknown request field %.100r ignored", path + name)
        else:
            near = difflib.get_close_matches(name[:100], supported, n=1, cutoff=0.75)
            hint = f" Did you mean '{path}{near[0]}'?" if near else ""
            message = f"Unknown field '{path}{name[:100]}'.{hint}"
            raise UnknownField(message, param=path + name[:100])
    return kept


def _refusal(path: str, entry: Known) -> UnsupportedField:
    fault = UnsupportedField(f"'{path}' is not supported by this server: {entry.why}.", param=path)
    fault.code = entry.code
    return fault


def _supported(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model by the name that clients give them (`class` is a word of Python's)."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def field_rows(model: type[BaseModel], known: Mapping[str, Known]) -> list[tuple[str, str, str]]:
    """(name, status, remark) of every known field: the table of the reference documentation."""
    rows = [(name, "supported", f.description or "") for name, f in _supported(model).items()]
    return rows + [(name, entry.status, entry.why) for name, entry in known.items()]
