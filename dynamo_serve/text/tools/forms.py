"""The forms of calls that are understood, and which of them a chat template asks for."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from types import MappingProxyType
from typing import NamedTuple

from dynamo_serve.text.tools.calls import Opening
from dynamo_serve.text.tools.readings import fenced, mistral, objects, series, tagged

SHORT_ID = 9  # characters; Mistral's templates refuse others


class Form(NamedTuple):
    """`marks` are tokens that must be seen although a tokenizer may call them special. `signs`
    are what the templates of such models hold."""

    openings: tuple[Opening, ...]
    marks: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    short_ids: bool = False


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "mistral": Form(
            (Opening("[TOOL_CALLS]", mistral),),
            ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
            ("[TOOL_CALLS]",),
            short_ids=True,
        ),
        "llama3": Form(
            (
                Opening("<|python_tag|>", series),
                Opening("{", series, is_part=True, only_first=True),
            ),
            ("<|python_tag|>",),
            ("<|python_tag|>", "dictionary of argument name and its value"),
        ),
        "hermes": Form(
            (Opening("<tool_call>", tagged),),
            ("<tool_call>", "</tool_call>"),
            ("<tool_call>",),
        ),
        "json": Form(
            (
                Opening("{", objects, is_part=True),
                Opening("[", objects, is_part=True),
                Opening("```", fenced),
            ),
        ),
    }
)
# Signs of forms that nobody here reads.
FOREIGN = ("<function=", "<arg_key>", "<|tool_call", "<\uff5ctool", "functools", "<|channel|>")


def form_of(template: str) -> str:
    """The name of the form that a chat template with tools asks for; "" for one that is foreign.

    Without a sign of any it is JSON in the text.
    """
    if any(sign in template for sign in FOREIGN):
        return ""
    known = (name for name, form in FORMS.items() if any(s in template for s in form.signs))
    return next(known, "json")


def call_id(request_id: str, index: int, form: str) -> str:
    """The id of a call: the same whenever it is told again."""
    digest = blake2b(f"{request_id}:{index}".encode(), digest_size=12).hexdigest()
    return digest[:SHORT_ID] if FORMS[form].short_ids else f"call_{digest}"
