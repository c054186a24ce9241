"""What a client calls the fields of a chat, which it may have asked for in another API's words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

FIELD = re.compile(r"(\w+)(?:\[(\d+)\])?(.*)", re.ASCII | re.DOTALL)


class Names(NamedTuple):
    """`fields` are those that have another name there, "tools[].function" for that of any tool.
    `origins` are where each message of the chat comes from, if not from a field like it.

    Whoever refuses a field puts its name, as the client knows it, into the message: a message that
    is made already is never looked through, for it may quote what looks like a field and is none.
    """

    fields: Mapping[str, str] = MappingProxyType({})
    origins: Sequence[str] = ()

    def of(self, path: str) -> str:
        """The client's name for what is `path` in the chat; what is behind a name stays."""
        match = FIELD.fullmatch(path)
        if match is None:
            return path
        field, number, inner = match.groups()
        if number is not None and field == "messages" and self.origins:
            return self.origins[int(number)]
        general = path if number is None else f"{field}[]{inner}"
        for name in sorted(self.fields, key=len, reverse=True):
            behind = general.removeprefix(name)
            if general.startswith(name) and behind[:1] in ("", ".", "["):
                return self.fields[name].replace("[]", f"[{number}]") + behind
        return path

    def in_message(self, number: int, inner: str) -> str:
        """The client's name for what is `inner` in a message."""
        return self.of(f"messages[{number}].{inner}")


OWN = Names()
