"""Fields of a chat under the names of another API: the longest that fits, and only as a name."""

from __future__ import annotations

import pytest

from dynamo_serve.api.names import OWN, Names
from dynamo_serve.api.schema import ChatRequest

NAMES = Names(
    {
        "response_format": "format",
        "response_format.json_schema.schema": "format.schema",
        "tools[].function": "tools[]",
        "tools[].function.parameters": "tools[].input_schema",
        "messages": "input",
    },
    ["system", "input[0].content[1]"],
)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("response_format", "format"),
        ("response_format.type", "format.type"),
        ("response_format.json_schema.schema", "format.schema"),
        ("response_format.json_schema.schema[0].not", "format.schema[0].not"),
        ("response_formats", "response_formats"),
        ("tools[12].function.name", "tools[12].name"),
        ("tools[12].function.parameters.type", "tools[12].input_schema.type"),
        ("tools[12]", "tools[12]"),
        ("tools", "tools"),
        ("messages", "input"),
        ("messages[0].role", "system"),
        ("messages[1].tool_calls", "input[0].content[1]"),
        ("logit_bias.response_format", "logit_bias.response_format"),
        ("", ""),
    ],
)
def test_a_name_is_told_as_the_client_knows_it(path: str, told: str) -> None:
    assert NAMES.of(path) == told
    assert OWN.of(path) == path


def test_a_chat_that_is_changed_keeps_the_names() -> None:
    chat = ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}]})
    other = chat.named(NAMES).model_copy(update={"max_tokens": 5})
    assert (chat.names, other.names) == (OWN, NAMES)
