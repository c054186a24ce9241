"""Runs the worked examples of docs/concepts and draws what happens, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dynamo_serve.core.batch import Batch, SequenceOutput
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Request
from dynamo_serve.core.scheduler import Scheduler

PAGE_SIZE = 4
NUM_PAGES = 10
HEAD = tuple(range(100, 108))  # eight tokens that several prompts begin with


def draw(pool: PagePool, tables: Mapping[str, list[int]]) -> str:
    """Who holds each page; * after a published one, "old" for a cached one, . for a blank one."""
    cells = []
    for page_id in range(pool.num_pages):
        published = "*" if page_id in pool.index.pages.values() else ""
        holders = "".join(name for name, table in tables.items() if page_id in table)
        cells.append((holders or ("old" if published else ".")) + (published if holders else ""))
    numbers = "".join(f"{page_id:<5}" for page_id in range(pool.num_pages))
    content = "".join(f"{cell:<5}" for cell in cells)
    return f"page  {numbers}".rstrip() + "\n" + f"      {content}".rstrip() + "\n"


class Holder:
    """A sequence as the pool sees it: tokens, and a page table."""

    def __init__(self, pool: PagePool, tokens: tuple[int, ...]) -> None:
        self.pool = pool
        self.tokens = list(tokens)
        self.keys: list[bytes] = []
        pool.extend_keys(self.keys, self.tokens, "", len(tokens) - 1)
        self.table, _ = pool.attach(self.keys)
        self.num_found = len(self.table)
        assert pool.grow(self.table, len(tokens))

    def computed(self) -> None:
        """The engine has run every token: publish what is full."""
        self.pool.extend_keys(self.keys, self.tokens, "", len(self.tokens))
        for page_id, key in zip(self.table, self.keys, strict=False):
            self.pool.seal(page_id, key)

    def decode(self, num_tokens: int) -> None:
        for token in range(num_tokens):
            self.tokens.append(200 + token)
            assert self.pool.grow(self.table, len(self.tokens))
            self.computed()


def page_pool_blocks() -> Iterator[str]:
    """The snapshots of docs/concepts/page-pool.md, in order."""
    pool = PagePool(NUM_PAGES, PAGE_SIZE)
    a = Holder(pool, (*HEAD, 1, 2))
    a.computed()
    yield draw(pool, {"A": a.table})
    b = Holder(pool, (*HEAD, 3, 4, 5))
    assert b.num_found == 2
    b.computed()
    yield draw(pool, {"A": a.table, "B": b.table})
    a.decode(3)
    yield draw(pool, {"A": a.table, "B": b.table})
    pool.release(a.table)
    yield draw(pool, {"B": b.table})
    pool.release(b.table)
    yield draw(pool, {})
    c = Holder(pool, tuple(range(300, 336)))
    assert c.num_found == 0
    yield draw(pool, {"C": c.table})
    pool.release(c.table)
    d = Holder(pool, (*HEAD, 1, 2))
    assert d.num_found == 1
    yield draw(pool, {"D": d.table})
    pool.check([d.table])


class Trace:
    """Turns a scheduler and writes one line per step, with a clock that a test can wind."""

    def __init__(self, limits: Limits) -> None:
        self.pool = PagePool(NUM_PAGES, PAGE_SIZE)
        self.scheduler = Scheduler(self.pool, limits)
        self.now_ms = 0
        self.lines = [f"{'ms':<4}{'step':<9}{'runs':<32}{'running':<9}{'waiting':<9}used"]

    def add(self, name: str, prompt: tuple[int, ...], max_tokens: int) -> None:
        request = Request(name, prompt, max_tokens, arrival=self.now_ms / 1000)
        self.scheduler.add(request, request.arrival)

    def step(self) -> None:
        """One step of 10 ms; every sequence that is to yield a token yields one."""
        batch = self.scheduler.schedule(self.now_ms / 1000)
        self.lines.append(self._line(batch))
        if batch is None:
            self.now_ms += 1
            return
        self.now_ms += 10
        tokens = [SequenceOutput(w.seq_id, (7,)) for w in batch.work if w.samples]
        self.scheduler.update(batch, tokens, self.now_ms / 1000)
        self.scheduler.check()

    def _line(self, batch: Batch | None) -> str:
        runs = ", ".join(
            f"{w.seq_id} {w.position}..{w.position + len(w.token_ids) - 1}"
            for w in (batch.work if batch else ())
        )
        phase = batch.phase.value if batch else "-"
        running, waiting = ("".join(group) for group in self._groups())
        used = self.pool.num_used
        line = f"{self.now_ms:<4}{phase:<9}{runs:<32}{running:<9}{waiting:<9}{used}"
        return line.rstrip()

    def _groups(self) -> tuple[list[str], list[str]]:
        return list(self.scheduler.running), [seq.id for seq in self.scheduler.waiting]

    def until_idle(self) -> str:
        for _ in range(100):
            if self.scheduler.is_idle:
                return "\n".join(self.lines) + "\n"
            self.step()
        raise AssertionError("the example does not end")


def scheduling_blocks() -> Iterator[str]:
    """The tables of docs/concepts/scheduling.md, in order."""
    limits = Limits(max_prefill_tokens=8, max_decode_sequences=3, max_queue_delay=0.003)
    merged = Trace(limits)
    merged.add("A", tuple(range(3)), 4)
    merged.step()
    merged.add("B", tuple(range(20, 23)), 4)
    for _ in range(3):
        merged.step()
    merged.add("C", tuple(range(40, 50)), 2)
    yield merged.until_idle()
    shared = Trace(limits)
    shared.add("A", (*HEAD, 1, 2), 3)
    shared.add("B", (*HEAD, 3, 4), 3)
    yield shared.until_idle()
    tight = Trace(Limits(max_prefill_tokens=32, max_decode_sequences=3, max_queue_delay=0.0))
    tight.add("A", tuple(range(14)), 8)
    tight.add("B", tuple(range(30, 44)), 8)
    yield tight.until_idle()
