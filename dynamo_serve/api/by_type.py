"""Objects in a body that are told apart by their `type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from dynamo_serve.errors import InvalidRequest, UnsupportedField

MAX_SHOWN = 40


class ByType(NamedTuple):
    """The models by type; an object without a type has the `default` one, if there is one, which
    may depend on what else it has. `others` says what is supported, to who sends another type."""

    models: Mapping[str, type[BaseModel]]
    others: str
    default: str | Callable[[Mapping[str, Any]], str] = ""

    def model_of(self, item: Mapping[str, Any], path: str) -> type[BaseModel]:
        """The model that `item` at `path` has to fit. Raises `InvalidRequest` and
        `UnsupportedField`."""
        default = self.default
        kind = item.get("type") or (default if isinstance(default, str) else default(item))
        path = f"{path}.type"
        if not kind:
            raise InvalidRequest(f"'{path}' is required.", param=path)
        if not isinstance(kind, str):
            raise InvalidRequest(f"'{path}' has to be a string.", param=path)
        if kind not in self.models:
            raise UnsupportedField(
                f"'{path}': {kind[:MAX_SHOWN]!r} is not supported here, {self.others}.", param=path
            )
        return self.models[kind]


# A model, or what picks one by what an object says of itself.
Inner = type[BaseModel] | ByType
