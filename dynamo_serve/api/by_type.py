"""Objects in a body that are told apart by their `type`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from dynamo_serve.errors import InvalidRequest, UnsupportedField


class ByType(NamedTuple):
    """The models by type; an object without a type has the `default` one, if there is one. `others`
    says what is supported, to who sends another type."""

    models: Mapping[str, type[BaseModel]]
    others: str
    default: str = ""


Inner = type[BaseModel] | ByType


def model_of(inner: Inner, item: Any, path: str) -> type[BaseModel]:
    """The model that `item` at `path` has to fit. Raises `InvalidRequest`, `UnsupportedField`."""
    if not isinstance(inner, ByType):
        return inner
    first = next(iter(inner.models.values()))
    if not isinstance(item, dict):
        return first  # which says what is wrong with it
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
