"""Reuse below a page: the part of a stored page that a prompt goes on with is copied.

Pages are found whole, by their keys. After the last one that is found, a stored page may begin as
the prompt goes on, and then differ, or be longer. So much of it is copied on the device into the
sequence's own page, by the engine, at the start of the sequence's first step; it is *held* until
that step has been settled, so that whatever is run again copies the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.prefix_tree import Chain
from dynamo_serve.core.sequence import Sequence
from dynamo_serve.core.spill import SAMPLE, Spill


class Part(NamedTuple):
    """The first `num_tokens` of a page."""

    page_id: int
    num_tokens: int


class PageParts:
    """Finds them, and holds their pages. With `copy_seconds`, what an engine takes to copy a page;
    None is for one that cannot. Fewer than `least` tokens are not worth a look."""

    def __init__(
        self, pool: PagePool, spill: Spill, copy_seconds: float | None, least: int
    ) -> None:
        self.pool = pool
        self.spill = spill
        self.copy_seconds = copy_seconds
        self.least = least
        self.num_copied = 0  # tokens of prompts, when first admitted

    def find(self, chain: Chain, num_pages: int, end: int) -> Part | None:
        """The longest part of a page that goes on after the first `num_pages` of a chain, of which
        the first `end` tokens may be reused. Only in pages that this tenant has used itself: where
        tenants share a salt, nobody can guess another's text token by token."""
        pool, size = self.pool, self.pool.page_size
        begin = num_pages * size
        most = min(size - 1, end - begin)
        if self.copy_seconds is None or most < self.least:
            return None
        wanted = chain.token_ids[begin : begin + most]
        for node, same in pool.tree.alike(pool.tree.parent(chain, num_pages), wanted, self.least):
            page_id = pool.index.pages.get(node.key)
            if page_id is not None and chain.tenant in node.tenants:
                return Part(page_id, same) if self._pays(same, begin) else None
        return None

    def _pays(self, num_tokens: int, position: int) -> bool:
        # By the price of more tokens than these: a few may seem to cost nothing, or a tile more.
        computing = self.spill.computing(SAMPLE, position) / SAMPLE * num_tokens
        return self.copy_seconds is not None and self.copy_seconds <= computing

    def take(self, seq: Sequence, running: Collection[Sequence]) -> None:
        """Let a sequence that is being admitted begin within a page, if it can."""
        if seq.is_suspect or seq.is_read_whole:  # nothing that may go wrong again
            return
        num_pages, pool = len(seq.page_table), self.pool
        # Holding one page more must not cost anybody a page: neither this one, nor who grows next.
        if pool.num_idle <= pool.pages_for(seq.num_tokens) - num_pages + len(running):
            return
        part = self.find(seq.chain(seq.page_keys), num_pages, seq.num_tokens - 1)
        if part is not None:
            pool.hold(part.page_id)
            seq.copied_from = part.page_id
            seq.num_computed += part.num_tokens
            seq.num_unseen = seq.num_computed

    def let_go(self, seq: Sequence) -> None:
        """Its page has been copied, or will not be."""
        if seq.copied_from is not None:
            self.pool.release([seq.copied_from])  # that is: it has been of use
            seq.copied_from = None

    def check(self, running: Collection[Sequence]) -> list[list[int]]:
        """Pages that are held to be copied, as page tables. Raise AssertionError for one that makes
        no sense."""
        held: list[list[int]] = []
        for seq in running:
            if seq.copied_from is not None:
                same = seq.num_computed - seq.num_sealed * self.pool.page_size
                assert 0 < same < self.pool.page_size, f"{seq.id}: {same} tokens are copied"
                assert seq.copied_from not in seq.page_table, f"{seq.id} copies its own page"
                assert not seq.restoring, f"{seq.id} copies and restores"
                held.append([seq.copied_from])
        return held
