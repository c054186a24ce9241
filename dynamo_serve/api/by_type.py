"""Objects in a body that are told apart by their `type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from dynamo_serve.errors import InvalidRequest, UnsupportedField


class ByType(NamedTuple):
    """The models by type; an object without a type has the `default` one, if there is one. `others`
    says what is supported, to who sends another type."""

    models: Mapping[str, type[BaseModel]]
    others: str
    default: str = ""


# A model, or what picks one by what an object says of itself, and by its path.
Inner = type[BaseModel] | ByType | Callable[[dict[str, Any], str], type[BaseModel]]


def model_of(inner: Inner, item: dict[str, Any], path: str) -> type[BaseModel]:
    """The model that `item` at `path` has to fit. Raises `InvalidRequest`, `UnsupportedField`."""
    if isinstance(inner, type):
        return inner
    if not isinstance(inner, ByType):
        return inner(item, path)
    kind = item.get("type") or inner.default
    if not kind:
        raise InvalidRequest(f"'{path}.type' is required.", param=f"{path}.type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"'{path}.type' has to be a string.", param=f"{path}.type")
    if kind not in inner.models:
        raise UnsupportedField(
            f"'{path}.type': {kind[:40]!r} is not supported here, {inner.others}.",
            param=f"{path}.type",
        )
    return inner.models[kind]
