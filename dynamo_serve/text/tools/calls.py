"""Finds calls of tools in text that arrives in pieces, whatever the form they are written in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from typing import NamedTuple

from dynamo_serve.text.parts import CallPart, merged
from dynamo_serve.text.thoughts import possible_start

# Takes characters one by one; ends with the last one of the calls it reads.
Reading = Generator[None, str, None]


class NotACall(Exception):
    """What was read is no call, or no more of one: it is content."""


class Enough(Exception):
    """One call was asked for, and it is whole."""


class Opening(NamedTuple):
    """What calls begin with, and how they go on behind it. `is_part`: they are read from the mark
    on. `only_first`: it counts at the beginning of the answer only."""

    mark: str
    reading: Callable[[Desk], Reading]
    is_part: bool = False
    only_first: bool = False


class Desk:
    """Where a reading puts down what it has understood.

    A call begins when its name is known and its arguments have begun: until then all of it may
    still turn out to be content. `raw` is the text that is neither certain nor thrown away.
    """

    def __init__(self, names: Collection[str], is_single: bool) -> None:
        self.names = names
        self.raw: list[str] = []
        self.parts: list[CallPart] = []
        self.num_begun = self.num_whole = 0
        self.is_closing = False  # a call is whole, and what is missing says nothing
        self._is_single = is_single

    def begin(self, name: str) -> None:
        """Raises `NotACall` for a tool that was not offered."""
        if name not in self.names:
            raise NotACall
        self.raw.clear()
        self.is_closing = False
        self.parts.append(CallPart(self.num_begun, name, ""))
        self.num_begun += 1

    def piece(self, text: str) -> None:
        self.raw.clear()
        self.parts.append(CallPart(self.num_begun - 1, None, text))

    def whole(self) -> None:
        """The call is complete but for what closes it."""
        self.raw.clear()
        self.num_whole += 1
        self.is_closing = True
        if self._is_single:
            raise Enough


class Calls:
    """Tells calls from content. `names` are the tools offered, anything else is content.

    Nothing but space next to a call and the marks around it is ever lost: what only looks like a
    call comes out as content, and of one that breaks off in its arguments the rest does. Which
    text goes where does not depend on how it is cut into pieces.
    """

    def __init__(
        self, openings: tuple[Opening, ...], names: Collection[str], *, is_single: bool = False
    ) -> None:
        self._openings = openings
        self._desk = Desk(names, is_single)
        self._reading: Reading | None = None
        self._held = ""  # the beginning of a mark, perhaps, and space before it
        self._content: list[str] = []
        self._has_content = False
        self.is_done = False  # one call was asked for, and it is whole

    @property
    def are_whole(self) -> bool:
        """Whether there are calls, and each of them is complete."""
        return 0 < self._desk.num_begun == self._desk.num_whole

    def push(self, text: str) -> tuple[str, tuple[CallPart, ...]]:
        """The content and the calls that are certain now."""
        while text and not self.is_done:
            text = self._seek(text) if self._reading is None else self._read(text)
        return self._taken()

    def flush(self) -> tuple[str, tuple[CallPart, ...]]:
        """What was held back, once no more text will come."""
        desk = self._desk
        held = self._held + "".join(desk.raw)
        is_space_after_call = desk.num_begun and held.isspace()
        if not (self.is_done or desk.is_closing or is_space_after_call):
            self._content.append(held)
        self._held, self._reading = "", None
        desk.raw.clear()
        return self._taken()

    def _taken(self) -> tuple[str, tuple[CallPart, ...]]:
        content, calls = "".join(self._content), merged(self._desk.parts)
        self._content.clear()
        self._desk.parts.clear()
        return content, calls

    def _seek(self, text: str) -> str:
        """Pass content on up to the mark of a call, and return what comes behind it."""
        text = self._held + text
        allowed = [o for o in self._openings if not (o.only_first and self._is_late(text, o))]
        found = [(text.find(o.mark), -len(o.mark), i) for i, o in enumerate(allowed)]
        if found := [entry for entry in found if entry[0] >= 0]:
            at, _, i = min(found)
            return self._open(allowed[i], text, at)
        kept = text[: possible_start(text, tuple(o.mark for o in allowed))].rstrip()
        self._held = text[len(kept) :]
        self._pass_on(kept)
        return ""

    def _is_late(self, text: str, opening: Opening) -> bool:
        """Whether something else than space comes before the mark."""
        if self._has_content or self._desk.num_begun:
            return True
        bare = text.lstrip()
        return not (bare.startswith(opening.mark) or opening.mark.startswith(bare))

    def _open(self, opening: Opening, text: str, at: int) -> str:
        kept = text[:at].rstrip()
        self._pass_on(kept)
        end = at + len(opening.mark)
        self._held = ""
        self._desk.is_closing = False
        self._desk.raw = list(text[len(kept) : end])
        self._reading = opening.reading(self._desk)
        next(self._reading)
        if opening.is_part:
            for char in opening.mark:
                self._reading.send(char)
        return text[end:]

    def _read(self, text: str) -> str:
        """Hand characters to the reading until it has ended; return what comes behind them."""
        assert self._reading is not None
        send, raw = self._reading.send, self._desk.raw
        for at, char in enumerate(text):
            raw.append(char)
            try:
                send(char)
            except NotACall:
                raw.pop()
                self._give_up()
                return text[at:]
            except StopIteration:
                self._reading = None
                raw.clear()
                self._desk.is_closing = False
                return text[at + 1 :]
            except Enough:
                self.is_done = True
                return ""
        return ""

    def _give_up(self) -> None:
        """What was read is content, but for space, which may stand before another call."""
        raw, self._reading = "".join(self._desk.raw), None
        self._desk.raw.clear()
        self._desk.is_closing = False
        if raw.isspace():
            self._held = raw
        else:
            self._pass_on(raw)

    def _pass_on(self, text: str) -> None:
        if text:
            self._content.append(text)
            self._has_content = self._has_content or not text.isspace()
