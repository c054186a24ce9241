"""Numbers that stand for pages, and files that are begun anew before they get too large."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from errno import ENOENT
from pathlib import Path

from dynamo_serve.core.prefix_index import NOTHING, extend_keys
from dynamo_serve.errors import ConfigError

MOST_PAGES = 1 << 18  # whose numbers are remembered: about 50 MB
SLICE = 1024  # tokens that are hashed at a time
# Just what `TraceFiles` names a file: nobody's `trace-of-monday.jsonl` is deleted with the oldest.
PATTERN = "trace-????????T??????Z-*-?????.jsonl"
Run = tuple[int, int]


class PageNumbers:
    """Numbers for pages by their text and all before it, counted from 0 as they first appear.

    A number says nothing of a text. A hash would: whoever guesses a text can hash it and compare.
    A page that was not seen for long is forgotten, and gets another number when it comes again.
    """

    def __init__(
        self, page_size: int, shared: frozenset[bytes] = NOTHING, most: int = MOST_PAGES
    ) -> None:
        self._size = page_size
        self._shared = shared  # the same for all tenants, as in the engine
        self._most = most
        self._numbers: OrderedDict[bytes, int] = OrderedDict()  # oldest first
        self._next = 0

    def runs(
        self, token_ids: Sequence[int], salt: str, num_prompt: int
    ) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
        """The full pages of a prompt, and those behind them that its answer has filled, as runs of
        consecutive numbers."""
        keys: list[bytes] = []
        for end in range(SLICE, len(token_ids), SLICE):
            extend_keys(keys, token_ids, salt, self._size, end, self._shared)
            time.sleep(0)  # the event loop may have something to do, and needs the interpreter
        extend_keys(keys, token_ids, salt, self._size, len(token_ids), self._shared)
        numbers = [self._number(key) for key in keys]
        for key in reversed(keys):  # a page is forgotten before the one that it builds on
            self._numbers.move_to_end(key)
        while len(self._numbers) > self._most:
            self._numbers.popitem(last=False)
        in_prompt = num_prompt // self._size
        return runs_of(numbers[:in_prompt]), runs_of(numbers[in_prompt:])

    def _number(self, key: bytes) -> int:
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = self._next
            self._next += 1
        return number


def runs_of(numbers: Iterable[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for number in numbers:
        if runs and runs[-1][0] + runs[-1][1] == number:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((number, 1))
    return tuple(runs)


class TraceFiles:
    """Files of one recording in a folder: at `max_bytes` the next is begun with a header, and the
    oldest of the folder are deleted beyond `keep`. Only the writer's thread calls it."""

    def __init__(
        self, folder: Path, header: Callable[[int], str], *, max_bytes: int, keep: int
    ) -> None:
        self._folder = folder
        self._header = header  # of part so-and-so
        self._max_bytes = max_bytes
        self._keep = keep
        self._stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + f"-{os.getpid()}"
        self._part = 0
        self._fd = -1
        self._size = 0

    def write(self, lines: Sequence[str]) -> None:
        """Raises `OSError`; the file then ends with the last line before these."""
        if self._fd >= 0 and not os.fstat(self._fd).st_nlink:  # deleted: nobody would read these
            raise FileNotFoundError(ENOENT, "its file was deleted")
        data = "".join(line + "\n" for line in lines).encode()
        if self._fd >= 0 and self._size + len(data) > self._max_bytes:
            self.close()
        if self._fd < 0:
            self._begin()
        self._append(data)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size = -1, 0

    def _begin(self) -> None:
        path = self._folder / f"trace-{self._stamp}-{self._part:05d}.jsonl"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._append((self._header(self._part) + "\n").encode())
        self._part += 1
        # Not the one just begun, whatever the clock has made of its name.
        others = sorted(set(self._folder.glob(PATTERN)) - {path})
        for old in others[: max(0, len(others) + 1 - self._keep)]:
            old.unlink(missing_ok=True)

    def _append(self, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += written


def check_folder(path: str) -> Path:
    """The folder of traces, made if need be. Raises `ConfigError` if nothing can be written."""
    folder = Path(path)
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe.touch(mode=0o600)
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"record.path = {path!r}: {error.strerror}; name a folder that the server may write to"
        ) from None
    return folder
