"""Items of a conversation: as messages for the chat template, and as they are told back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dynamo_serve.api import parse
from dynamo_serve.api.responses_store import ResponseStore
from dynamo_serve.api.schema_responses import (
    FunctionCallItem,
    FunctionCallOutputItem,
    Item,
    MessageItem,
    ReasoningItem,
    ReferenceItem,
    ResponsesRequest,
    TextPart,
)
from dynamo_serve.errors import InvalidRequest, ResponseNotFound

Json = dict[str, Any]
MAX_SHOWN = 100
PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}


class Placed(NamedTuple):
    """An item, and the path of the field that it came with."""

    item: Item
    path: str


def item_id(response_id: str, kind: str, place: str) -> str:
    """An id from which the response can be found again: see `_referred`."""
    return f"{PREFIXES[kind]}_{response_id.partition('_')[2]}_{place}"


def conversation(body: ResponsesRequest, tenant: str, store: ResponseStore) -> list[Placed]:
    """All items up to the answer, with kept ones in place of what refers to them.

    Raises `PreviousNotFound`, and `InvalidRequest` for a reference to nothing.
    """
    placed: list[Placed] = []
    if body.previous_response_id is not None:
        kept = store.conversation(tenant, body.previous_response_id)
        placed += [Placed(item, "previous_response_id") for item in items_of(kept)]
    if isinstance(body.input, str):
        return [*placed, Placed(_said(body.input), "input")]
    known: dict[str, dict[str, Json]] = {}
    for i, item in enumerate(body.input):
        path = f"input[{i}]"
        meant = (
            _referred(item.id, path, tenant, store, known)
            if isinstance(item, ReferenceItem)
            else item
        )
        placed.append(Placed(meant, path))
    return placed


def _said(text: str) -> MessageItem:
    return MessageItem.model_validate({"role": "user", "content": text})


def items_of(kept: list[Json]) -> list[Item]:
    """Items that were told by this server, as a client might send them back."""
    body = parse.to_model(ResponsesRequest, {"input": kept}, "refuse") if kept else None
    return list(body.input) if body is not None and not isinstance(body.input, str) else []


def _referred(
    id: str, path: str, tenant: str, store: ResponseStore, known: dict[str, dict[str, Json]]
) -> Item:
    """The kept item of that id. `known` has the items of each response that was looked into."""
    _, _, rest = id.partition("_")
    response_id = f"resp_{rest.partition('_')[0]}"
    if response_id not in known:
        try:
            kept = store.everything(tenant, response_id)
        except ResponseNotFound:
            kept = []
        known[response_id] = {item["id"]: item for item in kept}
    if id in known[response_id]:
        return items_of([known[response_id][id]])[0]
    raise InvalidRequest(
        f"'{path}.id': there is no item {id[:MAX_SHOWN]!r} in a response that is kept here. Send "
        "the item itself, as clients do that are told store: false.",
        param=f"{path}.id",
    )


def told_back(placed: Iterable[Placed], response_id: str) -> list[Json]:
    """The items as a client gets to see them, each with an id."""
    told = []
    for number, (item, _) in enumerate(placed):
        plain = item.model_dump(by_alias=True, exclude_none=True)
        plain["id"] = item.id or item_id(response_id, item.type, f"in{number}")
        plain["status"] = "completed"
        if isinstance(item, MessageItem):
            kind = "output_text" if item.role == "assistant" else "input_text"
            plain["content"] = [
                {"annotations": [], **part} if part["type"] == "output_text" else part
                for part in _parts(item.content, kind)
            ]
        if isinstance(item, ReasoningItem):
            plain["summary"] = []
        told.append(plain)
    return told


def _parts(content: str | Sequence[TextPart], kind: str) -> list[Json]:
    if isinstance(content, str):
        return [{"type": kind, "text": content}]
    return [part.model_dump() for part in content]


def messages_of(placed: Iterable[Placed]) -> list[tuple[Json, str]]:
    """The messages that chat templates know, each with the path of its first item.

    What the model did in one turn (thoughts, text, calls) becomes one message.
    """
    told: list[tuple[Json, str]] = []
    for item, path in placed:
        if isinstance(item, FunctionCallOutputItem):
            result = {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
            told.append((result, path))
        elif isinstance(item, MessageItem) and item.role != "assistant":
            told.append(({"role": item.role, "content": _text(item.content)}, path))
        else:
            if not (told and _goes_on(told[-1][0], item)):
                told.append(({"role": "assistant", "content": ""}, path))
            _add(told[-1][0], item)
    return told


def _goes_on(message: Json, item: Item) -> bool:
    """Whether an item of the model's is of the same turn as this message."""
    if message["role"] != "assistant":
        return False
    if isinstance(item, FunctionCallItem):
        return True
    if isinstance(item, ReasoningItem):
        return not (message["content"] or message.get("tool_calls"))
    return not message["content"] or "tool_calls" in message


def _add(message: Json, item: Item) -> None:
    if isinstance(item, ReasoningItem):
        thought = "".join(part.text for part in item.content)
        message["reasoning_content"] = message.get("reasoning_content", "") + thought
    elif isinstance(item, MessageItem):
        message["content"] += _text(item.content)
    elif isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        message.setdefault("tool_calls", []).append(call)


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
