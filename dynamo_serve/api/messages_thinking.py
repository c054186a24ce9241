"""What Anthropic's `thinking` comes to, for the template of the model."""

from __future__ import annotations

from typing import Any

from dynamo_serve.api.schema_messages import Thinking
from dynamo_serve.errors import InvalidRequest, UnsupportedField
from dynamo_serve.text.dialect import BUDGET, EFFORT, Dialect


def thinking_fields(wish: Thinking | None, dialect: Dialect, effort: str | None) -> dict[str, Any]:
    """The fields of a chat that say the same. Raises `InvalidRequest` and `UnsupportedField`."""
    if wish is None:
        return {}
    if wish.budget_tokens is not None and wish.type != "enabled":
        raise InvalidRequest(
            "'thinking.budget_tokens' goes with the type 'enabled'.", param="thinking.budget_tokens"
        )
    if wish.type == "disabled":
        return _off(dialect, effort)
    if not (dialect.thoughts or dialect.variables):
        raise UnsupportedField(
            "'thinking' is not supported by this model: it does not think.", param="thinking"
        )
    fields: dict[str, Any] = {}
    if dialect.switch is not None:
        fields["chat_template_kwargs"] = {dialect.switch: True}
    if wish.budget_tokens is not None and BUDGET in dialect.variables:
        fields["thinking_token_budget"] = wish.budget_tokens
    return fields


def _off(dialect: Dialect, effort: str | None) -> dict[str, Any]:
    if dialect.switch is not None:
        return {"chat_template_kwargs": {dialect.switch: False}}
    if EFFORT in dialect.variables:
        if effort is not None:
            raise InvalidRequest(
                "'thinking' is off, and 'output_config.effort' says how much.", param="thinking"
            )
        return {"reasoning_effort": "none"}
    if dialect.thoughts:
        raise UnsupportedField(
            "'thinking': this model's thinking cannot be turned off.", param="thinking"
        )
    return {}
