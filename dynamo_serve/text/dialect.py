"""How a model marks its thoughts and its calls, as far as its chat template shows it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jinja2

from dynamo_serve.text.parts import Parts
from dynamo_serve.text.thoughts import Tags, Thoughts
from dynamo_serve.text.tools.calls import Calls
from dynamo_serve.text.tools.forms import FORMS, form_of

TAGS: Mapping[str, Tags] = MappingProxyType(
    {
        "think": Tags("<think>", "</think>"),
        "mistral": Tags("[THINK]", "[/THINK]"),
        "seed": Tags("<seed:think>", "</seed:think>"),
        "cohere": Tags("<|START_THINKING|>", "<|END_THINKING|>"),
    }
)
AUTO, NONE = "auto", "none"
# What templates ask about thinking: whether, how much, and in how many tokens.
SWITCHES = ("enable_thinking", "thinking")
EFFORT, BUDGET = "reasoning_effort", "thinking_budget"


class Dialect(NamedTuple):
    """`tools` and `thoughts` name a form and tags, or are "". `variables` are those of the
    template that control thinking."""

    takes_tools: bool = False
    tools: str = ""
    thoughts: str = ""
    variables: frozenset[str] = frozenset()

    @property
    def switch(self) -> str | None:
        """The variable that turns thinking on and off."""
        return next((name for name in SWITCHES if name in self.variables), None)


class Parsing(NamedTuple):
    """How the answers of a request are told apart; plain data. `tools` are named by `names`, one
    call ends the answer if `is_single`. `is_thinking`: the prompt has opened the thoughts."""

    tools: str = ""
    names: tuple[str, ...] = ()
    is_single: bool = False
    thoughts: str = ""
    is_thinking: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """Tokens that have to be seen, also where a tokenizer calls them special."""
        marks = FORMS[self.tools].marks if self.tools else ()
        return marks + (TAGS[self.thoughts] if self.thoughts else ())


def takes_tools(template: str) -> bool:
    """Whether a chat template has a place for tools."""
    return "tools" in names_in(template)


def names_in(template: str) -> frozenset[str]:
    """What the code of a chat template names, and not what its text says."""
    try:
        parts = jinja2.Environment().lex(template)
        return frozenset(value for _, kind, value in parts if kind == "name")
    except jinja2.TemplateSyntaxError:
        return frozenset()


def dialect_of(template: str, tools: str = AUTO, thoughts: str = AUTO) -> Dialect:
    """`tools` and `thoughts` are the operator's choice: the name of one, auto or none."""
    names = names_in(template)
    has_place = "tools" in names
    form = form_of(template) if tools == AUTO else tools
    tags = _tags_of(template) if thoughts == AUTO else thoughts
    return Dialect(
        has_place,
        form if has_place and form != NONE else "",
        tags if tags != NONE else "",
        names & {*SWITCHES, EFFORT, BUDGET},
    )


def _tags_of(template: str) -> str:
    return next((name for name, tags in TAGS.items() if tags.closing in template), "")


def ends_thinking(prompt: str, thoughts: str) -> bool:
    """Whether a prompt ends with the opening tag, so that the answer begins with thoughts."""
    return bool(thoughts) and prompt.rstrip().endswith(TAGS[thoughts].opening)


class Reader:
    """Tells the text of one answer apart as it comes."""

    def __init__(self, parsing: Parsing) -> None:
        self._thoughts: Thoughts | None = None
        self._calls: Calls | None = None
        if parsing.thoughts:
            self._thoughts = Thoughts(TAGS[parsing.thoughts], parsing.is_thinking)
        if parsing.tools:
            openings = FORMS[parsing.tools].openings
            self._calls = Calls(openings, parsing.names, is_single=parsing.is_single)

    @property
    def is_thinking(self) -> bool:
        return self._thoughts is not None and self._thoughts.is_thinking

    @property
    def is_calling(self) -> bool:
        """Whether the answer so far is calls, and all of them whole."""
        return self._calls is not None and self._calls.are_whole

    @property
    def is_done(self) -> bool:
        """Whether nothing that follows would count."""
        return self._calls is not None and self._calls.is_done

    def push(self, text: str, num_tokens: int = 1) -> Parts:
        """What is certain with the text that one token brought; none, if only the end came."""
        was_thinking, thought = self.is_thinking, ""
        if self._thoughts is not None:
            thought, text = self._thoughts.push(text)
        num_thought = num_tokens if was_thinking or self.is_thinking else 0
        if self._calls is None:
            return Parts(text, thought, (), num_thought)
        content, calls = self._calls.push(text)
        return Parts(content, thought, calls, num_thought)

    def flush(self) -> Parts:
        """What was held back, once no more text will come."""
        thought = text = ""
        if self._thoughts is not None:
            thought, text = self._thoughts.flush()
        if self._calls is None:
            return Parts(text, thought)
        content, calls = self._calls.push(text)
        rest, last = self._calls.flush()
        return Parts(content + rest, thought, calls + last)
