"""One request on its way: what has arrived of its answer, for the engine to take."""

from __future__ import annotations

import asyncio
import codecs
import threading
from collections import deque
from collections.abc import Callable

from dynamo_serve.core.batch import SequenceOutput
from dynamo_serve.core.request import NO_ID, Finish
from dynamo_serve.engines.triton_server.dialects import Ask, Piece
from dynamo_serve.engines.triton_server.faults import Fault

MOST_WAITING = 4096  # pieces; the engine takes them with every step
MOST_BYTES = 1 << 24
MOST_IDS = 1 << 31  # of any vocabulary; a model's may be larger than its tokenizer's


class Stream:
    """Filled by the loop's thread, emptied by the engine's. `wake` is called when there is news."""

    def __init__(self, seq_id: str, ask: Ask, priority: int, wake: Callable[[], None]) -> None:
        self.seq_id = seq_id
        self.ask = ask
        self.priority = priority
        self.task: asyncio.Task[None] | None = None  # of the loop
        self.first_by = self.end_by = 0.0  # by the loop's clock
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: deque[SequenceOutput] = deque()
        self._num_bytes = 0  # about, of what waits
        self._is_taken = False  # some of it
        self._begin()

    def _begin(self) -> None:
        self.num_tokens = 0
        self.is_over = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._whole = b""  # all text, where each response repeats it
        self._held = ""  # text of a response that counts no token

    @property
    def so_far(self) -> tuple[str, int]:
        """For the log."""
        return self.seq_id, self.num_tokens

    def begin_again(self) -> bool:
        """Forget what has come from a server that has failed; False if some of it is sent on."""
        with self._lock:
            if self._is_taken:
                return False
            self._waiting.clear()
            self._begin()
            return True

    def push(self, piece: Piece) -> None:
        """Raises `Fault`."""
        if piece.error:
            raise Fault(piece.error)
        self._num_bytes += len(piece.text)
        if len(self._waiting) >= MOST_WAITING or self._num_bytes > MOST_BYTES:
            raise Fault("more has come from the Triton server than is taken")
        if not 0 <= piece.num_tokens <= self.ask.max_tokens:
            counted = f"{piece.num_tokens} tokens in one response"
            raise Fault(f"the Triton server tells of {counted}, asked for {self.ask.max_tokens}")
        if piece.token_ids:
            self._put_ids(piece)
            return
        self._held += self._decoder.decode(self._new(piece))
        if piece.num_tokens:
            self._put(piece.num_tokens, piece.finish)
        elif piece.finish:
            self.end(piece.finish)

    def _new(self, piece: Piece) -> bytes:
        """Of its text, what was not said before."""
        if not piece.is_whole:
            return piece.text
        if not piece.text.startswith(self._whole):
            raise Fault("the Triton server has taken back what it had said")
        new, self._whole = piece.text[len(self._whole) :], piece.text
        return new

    def end(self, finish: Finish | None = None) -> None:
        """The answer is over; without `finish` the server never says why."""
        self._held += self._decoder.decode(b"", final=True)
        is_full = self.num_tokens >= self.ask.max_tokens
        finish = finish or (Finish.LENGTH if is_full else Finish.STOP)
        self._put(1 if self._held else 0, finish)

    def fail(self, fault: Fault) -> None:
        error = SequenceOutput(
            self.seq_id, finish=Finish.ERROR, error=fault.message, fault=fault.kind
        )
        self._waiting.append(error)
        self._wake()

    def _put(self, count: int, finish: Finish | None) -> None:
        if finish and count:
            self._held += self._decoder.decode(b"", final=True)
        self.is_over = finish is not None
        texts = (self._held, *[""] * (count - 1)) if count else ()
        self._held = ""
        self.num_tokens += count
        output = SequenceOutput(self.seq_id, (NO_ID,) * count, finish=finish, texts=texts)
        self._waiting.append(output)
        self._wake()

    def _put_ids(self, piece: Piece) -> None:
        if not all(0 <= i < MOST_IDS for i in piece.token_ids):
            raise Fault("the Triton server has sent token ids that are none")
        self.is_over = piece.finish is not None
        self.num_tokens += piece.num_tokens
        self._waiting.append(SequenceOutput(self.seq_id, piece.token_ids, finish=piece.finish))
        self._wake()

    def take(self) -> SequenceOutput | None:
        """All that has arrived, as one output; for the engine's thread. A failure comes alone, for
        with it goes what it comes with."""
        output = None
        with self._lock:
            while self._waiting:
                if output is not None and self._waiting[0].finish is Finish.ERROR:
                    break
                more = self._waiting.popleft()
                output = more if output is None else _together(output, more)
            self._num_bytes = 0
            self._is_taken = self._is_taken or output is not None
        return output


def _together(first: SequenceOutput, second: SequenceOutput) -> SequenceOutput:
    return second._replace(
        token_ids=first.token_ids + second.token_ids, texts=first.texts + second.texts
    )
