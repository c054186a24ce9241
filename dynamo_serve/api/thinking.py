"""What a request says about thinking, as variables for the chat template."""

from __future__ import annotations

from typing import Any

from dynamo_serve.api.schema import ChatRequest
from dynamo_serve.errors import InvalidRequest, UnsupportedField
from dynamo_serve.text.dialect import BUDGET, EFFORT, Dialect


def template_arguments(body: ChatRequest, dialect: Dialect) -> dict[str, Any]:
    """The variables for the template: the client's own, and what its other fields come to.

    Raises `UnsupportedField` for what the template cannot be told, `InvalidRequest` for what is
    said twice.
    """
    arguments = dict(body.chat_template_kwargs)
    named = body.names.of
    for field, variables in (
        ("reasoning_effort", _effort(body, dialect)),
        ("thinking_token_budget", _budget(body, dialect)),
    ):
        for name, value in variables.items():
            if name in arguments:
                path, other = named(field), named(f"chat_template_kwargs.{name}")
                raise InvalidRequest(
                    f"'{path}' and '{other}' say the same; send one of them.", param=path
                )
            arguments[name] = value
    return arguments


def _effort(body: ChatRequest, dialect: Dialect) -> dict[str, Any]:
    effort, switch = body.reasoning_effort, dialect.switch
    if effort is None:
        return {}
    if effort == "none" and switch is not None:
        return {switch: False}
    if EFFORT in dialect.variables:
        return {EFFORT: effort}
    path = body.names.of("reasoning_effort")
    if switch is not None:
        raise UnsupportedField(
            f"'{path}': {effort!r} is not supported by this model: its thinking can be "
            "turned off ('none') or left on, and knows no degrees.",
            param=path,
        )
    raise UnsupportedField(
        f"'{path}' is not supported by this model: its chat template has no variable for thinking.",
        param=path,
    )


def _budget(body: ChatRequest, dialect: Dialect) -> dict[str, Any]:
    if body.thinking_token_budget is None:
        return {}
    if BUDGET not in dialect.variables:
        path = body.names.of("thinking_token_budget")
        raise UnsupportedField(
            f"'{path}' is not supported by this model: its chat template has no variable {BUDGET}.",
            param=path,
        )
    return {BUDGET: body.thinking_token_budget}
