"""Turns a growing list of token ids into text, never emitting half a character."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

REPLACEMENT = "\ufffd"
# Tokens kept as context when the window slides, and its length when it does.
CONTEXT = 12
WINDOW = 32
# A character has at most four bytes. More replacement characters than this at the end of the
# window are broken input and not a character still on its way.
LONGEST_WAIT = 4 * CONTEXT
STILL_OPEN = 3


class Detokenizer:
    """Incremental decode of one sequence.

    Decodes a sliding window of the newest tokens and emits what is new in it; the cost per token
    is bounded whatever the length of the text. Text that ends in U+FFFD may be a character of
    which some bytes are still to come, so it waits for the next token or for `flush`.

    `decode` maps ids to text. Ids in `skip` (special tokens) yield no text. `context` are tokens
    that went before: their text is not emitted, but it decides about leading spaces.

    `alone`, where the vocabulary allows it, maps a token to its text if that is the same in any
    company, and to None if it is no whole characters. Then nothing needs to be decoded except
    where a character is made of several tokens, and the window only holds such a character.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        skip: Collection[int] = (),
        context: Sequence[int] = (),
        alone: Callable[[int], str | None] | None = None,
    ) -> None:
        self._decode = decode
        self._skip = skip
        self._alone = alone
        self._window, before = self._begin(context)
        self._sent = len(before) - _broken_tail(before)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; "" if none."""
        if token_id in self._skip:
            return ""
        if not self._window and self._alone is not None:
            whole = self._alone(token_id)
            if whole is not None:
                return whole
        self._window.append(token_id)
        text = self._decode(self._window)
        run = _broken_tail(text)
        settled = len(text) - (run if run <= LONGEST_WAIT else STILL_OPEN)
        new = text[self._sent : settled]
        self._sent = max(self._sent, settled)
        if run == 0 and self._alone is not None:
            self._window.clear()
            self._sent = 0
        # Not while a character is open: a decoder may show its whole run of byte tokens as broken
        # until it is complete, and then `_sent` does not fit the text at hand.
        elif len(self._window) >= WINDOW and (run == 0 or run > LONGEST_WAIT):
            self._slide(text)
        return new

    def flush(self) -> str:
        """What is left at the end: broken characters show as U+FFFD."""
        text = self._decode(self._window) if self._window else ""
        new = text[self._sent :]
        self._sent = len(text)
        return new

    def _begin(self, context: Sequence[int]) -> tuple[list[int], str]:
        """The end of `context` and its text, not starting inside a character if that can be."""
        ids = [i for i in context[-CONTEXT - 3 :] if i not in self._skip]
        for size in range(CONTEXT, CONTEXT + 4):
            window = ids[-size:]
            text = self._decode(window) if window else ""
            if not text.startswith(REPLACEMENT):
                break
        return window, text

    def _slide(self, text: str) -> None:
        """Forget old tokens where that leaves the text of the kept ones as it is."""
        unsent = len(text) - self._sent
        for size in range(CONTEXT, CONTEXT + 4):
            kept = self._decode(self._window[-size:])
            # Longer than what is unsent: an empty context would make the next token look like
            # the start of the text.
            if len(kept) > unsent and text.endswith(kept):
                self._window = self._window[-size:]
                self._sent = len(kept) - unsent
                return


def _broken_tail(text: str) -> int:
    """How many U+FFFD are at the end of `text`: the next token might still change them."""
    return len(text) - len(text.rstrip(REPLACEMENT)) if text.endswith(REPLACEMENT) else 0
