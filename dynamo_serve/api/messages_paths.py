"""What a chat's fields are called in Anthropic's Messages API: faults name what was sent."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from dynamo_serve.errors import RequestError

# A field, as far as its own name goes; behind it there may be more of a path.
FIELD = (
    r"response_format(?:\.json_schema\.schema|\.json_schema)?|(tools\[\d+\])\.function(\.parameters)?"
    r"|messages\[(\d{1,9})\](?:\.\w+)*|tool_choice\.function|reasoning_effort|thinking_token_budget"
    r"|chat_template_kwargs|stop(?=\W|$)"
)
NAMED = re.compile(rf"(?<=')(?:{FIELD})")
PATH = re.compile(rf"^(?:{FIELD})")
NAMES = {
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
    "tool_choice.function": "tool_choice",
    "thinking_token_budget": "thinking.budget_tokens",
    "chat_template_kwargs": "thinking",
    "stop": "stop_sequences",
}
Error = TypeVar("Error", bound=RequestError)


class Paths:
    """`origins` are where the messages of the chat come from. `has_effort`: a chat's effort is
    what the client said of it, and not that it wants no thoughts."""

    def __init__(self, origins: Sequence[str], *, has_effort: bool) -> None:
        self._origins = origins
        self._effort = "output_config.effort" if has_effort else "thinking"

    @contextmanager
    def named(self) -> Generator[None]:
        """What is raised within tells of the client's fields."""
        try:
            yield
        except RequestError as error:
            raise self.renamed(error) from error

    def renamed(self, error: Error) -> Error:
        if error.param is not None:
            error.param = PATH.sub(self._name, error.param)
            error.message = NAMED.sub(self._name, error.message)
        return error

    def _name(self, match: re.Match[str]) -> str:
        tool, parameters, number = match[1], match[2], match[3]
        if tool:
            return f"{tool}.input_schema" if parameters else tool
        if number:  # a message may quote what the client wrote, which can look like a path
            place = int(number)
            return self._origins[place] if place < len(self._origins) else match[0]
        return self._effort if match[0] == "reasoning_effort" else NAMES[match[0]]
