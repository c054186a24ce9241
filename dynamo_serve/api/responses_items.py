"""Items of a conversation: as messages for the chat template, and as they are told back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dynamo_serve.api import parse
from dynamo_serve.api.responses_store import ResponseStore, encoded
from dynamo_serve.api.schema import MAX_MESSAGES
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
from dynamo_serve.errors import InvalidRequest, PayloadTooLarge, ResponseNotFound

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
    """An id from which the response can be found again."""
    return f"{PREFIXES[kind]}_{response_id.partition('_')[2]}_{place}"


def conversation(
    body: ResponsesRequest, tenant: str, store: ResponseStore, max_bytes: int
) -> list[Placed]:
    """All items up to the answer, with kept ones in place of what refers to them: of these no more
    than `max_bytes`, for a reference is short and what it stands for is not.

    Raises `PreviousNotFound`, `PayloadTooLarge`, and `InvalidRequest` for a reference to nothing.
    """
    kept = _Kept(tenant, store, max_bytes)
    placed: list[Placed] = []
    if body.previous_response_id is not None:
        before = kept.before(body.previous_response_id)
        placed += [Placed(item, "previous_response_id") for item in before]
    if isinstance(body.input, str):
        placed.append(Placed(_said(body.input), "input"))
    else:
        for i, item in enumerate(body.input):
            path = f"input[{i}]"
            meant = kept.item(item.id, path) if isinstance(item, ReferenceItem) else item
            placed.append(Placed(meant, path))
    if len(placed) > MAX_MESSAGES:
        raise InvalidRequest(
            f"'input': with previous_response_id there are {len(placed)} items, at most "
            f"{MAX_MESSAGES} are possible.",
            param="input",
        )
    return placed


class _Kept:
    """What one request takes from the store. Each answer is read once."""

    def __init__(self, tenant: str, store: ResponseStore, max_bytes: int) -> None:
        self._tenant, self._store, self._max_bytes = tenant, store, max_bytes
        self._num_bytes = 0
        self._read: dict[str, dict[str, Json]] = {}  # of each answer its items by id
        self._meant: dict[str, tuple[Item, int]] = {}  # by id, with its bytes

    def before(self, id: str) -> list[Item]:
        """The conversation up to the end of an answer."""
        self._take(self._store.conversation_bytes(self._tenant, id), "previous_response_id")
        return items_of(self._store.conversation(self._tenant, id))

    def item(self, id: str, path: str) -> Item:
        """What a reference at `path` stands for."""
        if id not in self._meant:
            found = self._items(id).get(id)
            if found is None:
                raise InvalidRequest(
                    f"'{path}.id': there is no item {id[:MAX_SHOWN]!r} in a response that is kept "
                    "here. Send the item itself, as clients do that are told store: false.",
                    param=f"{path}.id",
                )
            self._meant[id] = items_of([found])[0], len(encoded(found))
        item, num_bytes = self._meant[id]
        self._take(num_bytes, path)
        return item

    def _items(self, id: str) -> dict[str, Json]:
        """Of the answer that an item's id is made from: see `item_id`."""
        response_id = f"resp_{id.partition('_')[2].partition('_')[0]}"
        if response_id not in self._read:
            try:
                items = self._store.everything(self._tenant, response_id)
            except ResponseNotFound:
                items = []
            # A client may give two items one id, which then is the first one's.
            self._read[response_id] = {item["id"]: item for item in reversed(items)}
        return self._read[response_id]

    def _take(self, num_bytes: int, path: str) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            raise PayloadTooLarge(
                f"'{path}': what is kept of the conversation has more than {self._max_bytes} "
                "bytes, the limit of a request body. Send what of it matters as 'input'.",
                param=path,
            )


def _said(text: str) -> MessageItem:
    return MessageItem.model_validate({"role": "user", "content": text})


def items_of(kept: list[Json]) -> list[Item]:
    """Items that were told by this server, as a client might send them back."""
    body = parse.to_model(ResponsesRequest, {"input": kept}, "refuse") if kept else None
    return list(body.input) if body is not None and not isinstance(body.input, str) else []


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
