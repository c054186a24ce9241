"""The grammar of an answer that may think and call tools, from all the fields that say what it has
to be."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dynamo_serve.api.grammar import Grammars, of_schema, wished_grammar
from dynamo_serve.api.schema import ChatRequest
from dynamo_serve.api.schema_tools import Tool
from dynamo_serve.api.tools import callable_tools
from dynamo_serve.core.request import Grammar
from dynamo_serve.errors import InvalidRequest, UnsupportedField
from dynamo_serve.text.dialect import Parsing
from dynamo_serve.text.tokenizer import Tokenizer
from dynamo_serve.text.tools.enforce import Marks, Offer, calls_grammar, can_be_free

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
Wish = tuple[Grammar, str]  # and the path of the field that says so


async def chat_grammar(
    body: ChatRequest, parsing: Parsing | None, grammars: Grammars, tokenizer: Tokenizer
) -> Grammar | None:
    """What the answer has to be, checked; None if it may be anything.

    Raises `InvalidRequest` with the path of what is wrong, and `UnsupportedField`.
    """
    if parsing is None or not (parsing.tools or body.response_format or body.structured_outputs):
        return await grammars.of(body)
    wish, is_required = wished_grammar(body), body.tool_choice not in (None, "auto", "none")
    tools = callable_tools(body, body.tools) if parsing.tools else []
    strict = [i for i, tool in enumerate(tools) if tool.function.strict]
    if is_required and wish is not None:
        raise InvalidRequest(
            f"'{wish[1]}' and 'tool_choice' ask for two different answers.", param="tool_choice"
        )
    if wish is None and not (is_required or strict):
        return None
    marks = Marks(tokenizer.added_id)
    held = body.names.of(f"tools[{strict[0]}].function.strict") if strict else ""
    if strict and not (is_required or wish or can_be_free(parsing)):
        raise _unheld(held)
    path = "tool_choice" if is_required else wish[1] if wish else held
    grammars.check_engine(path)
    answer = None if wish is None else _rule(*wish, has_tools=bool(tools))
    offers = await _offers(body, tools, grammars, holds_all=is_required)
    rules = calls_grammar(parsing, offers, marks, is_required=is_required, answer=answer)
    return await grammars.check(Grammar("grammar", rules), path)


def _unheld(path: str) -> UnsupportedField:
    return UnsupportedField(
        f"'{path}' is not supported by this model with tool_choice auto: nothing marks its calls "
        "in the text. Leave it out, or ask for a call with tool_choice.",
        param=path,
    )


async def _offers(
    body: ChatRequest, tools: Sequence[Tool], grammars: Grammars, *, holds_all: bool
) -> list[Offer]:
    """Arguments are held to the schema where a call is required, or the tool is strict."""
    offers = []
    numbers = {tool.function.name: i for i, tool in enumerate(body.tools)}
    for tool in tools:
        function = tool.function
        schema = NO_ARGUMENTS if function.parameters is None else function.parameters
        if not (holds_all or function.strict):
            schema = {"type": "object"}
        path = body.names.of(f"tools[{numbers[function.name]}].function.parameters")
        if schema.get("type", "object") != "object":
            raise InvalidRequest(
                f"'{path}.type': arguments are an object, not {str(schema['type'])[:40]!r}.",
                param=f"{path}.type",
            )
        grammar, _ = of_schema({**schema, "type": "object"}, path)
        await grammars.check(grammar, path)
        offers.append(Offer(function.name, grammar.text))
    return offers


def _rule(grammar: Grammar, path: str, *, has_tools: bool) -> str:
    """A grammar as a rule within another."""
    if grammar.kind == "json_schema" and grammar.text != "false":
        return f"%json {grammar.text}"
    if grammar.kind == "choice":
        return " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
    besides = "'tools'" if has_tools else "a model that thinks first"
    raise UnsupportedField(
        f"'{path}' is not supported together with {besides}: only JSON and choices are.", param=path
    )
