"""The text of a prompt for a server that makes tokens of it by itself."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_serve.engines.triton_server.faults import Fault
from dynamo_serve.text.tokenizer import Tokenizer

NO_TEXT = (
    "the prompt's token ids are not what a text is cut into, and a text is all that the Triton "
    "server takes"
)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text that a server cuts into just these ids, if there is one.

    A server puts what the model wants around a text (BOS) before it, as our tokenizer does if it is
    told to. A prompt that begins so already must not get it twice. Raises `Fault` if the ids are
    those of no text.
    """
    ids = list(ids)
    head = tokenizer.encode("", add_special_tokens=True)
    plain = tokenizer.decode(ids)
    if head and ids[: len(head)] == head:
        bare = tokenizer.decode(ids[len(head) :])
        if tokenizer.encode(bare, add_special_tokens=True) == ids:
            return bare
    if tokenizer.encode(plain) != ids:
        raise Fault(NO_TEXT, "refused")
    return plain
