"""Builds the tiers below the device that the settings ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

import torch

from dynamo_serve.config import CacheSection
from dynamo_serve.core.tiers import DISK, HOST, TierSpec
from dynamo_serve.engines.local.copier import Copier
from dynamo_serve.engines.local.kv_cache import KVCache
from dynamo_serve.engines.local.memory import free_bytes
from dynamo_serve.engines.local.page_bytes import PageBytes
from dynamo_serve.engines.local.tier_stores import DiskStore, HostStore, Store
from dynamo_serve.errors import EngineStartError

GIB = 1 << 30
DISK_BYTES_PER_SECOND = 500e6  # believed of a disk until pages have come from it
TRIALS = 3

Tiers = tuple[tuple[TierSpec, ...], Copier | None]


def build_tiers(cache: CacheSection, kv: KVCache, facts: Mapping[str, str]) -> Tiers:
    """The tiers, the highest first, and what copies between them; `facts` tell whose pages a folder
    holds. Raises `EngineStartError`."""
    wanted = {HOST: cache.host_gib, DISK: cache.disk_gib}
    if not any(wanted.values()):
        return (), None
    page = PageBytes(kv)
    page_bytes = page.num_bytes
    seconds = page_seconds(page, page_bytes)
    stores: dict[int, Store] = {}
    specs = []
    for number in (number for number, gib in wanted.items() if gib):
        num_slots = int(wanted[number] * GIB) // page_bytes
        if not num_slots:
            name = "cache.host_gib" if number == HOST else "cache.disk_gib"
            raise EngineStartError(f"{name}: a page takes {page_bytes / (1 << 20):.2f} MiB")
        if number == HOST:
            stores[HOST] = HostStore(num_slots, page_bytes, kv.layers[0].keys.device)
            specs.append(TierSpec(HOST, num_slots, seconds))
        else:
            stores[DISK] = DiskStore(_folder(cache, facts), num_slots, page_bytes, facts)
            slow = page_bytes / DISK_BYTES_PER_SECOND
            specs.append(TierSpec(DISK, num_slots, seconds + slow))
    return tuple(specs), Copier(stores, kv)


def _folder(cache: CacheSection, facts: Mapping[str, str]) -> Path:
    """A folder below the usual one for quantized weights: the ladder may go back and forth. And one
    below that for pages of another type."""
    kind, pages = facts["quantization"], facts.get("kv_dtype")
    folder = Path(cache.disk_path) / ("" if kind == "none" else kind)
    return folder / f"kv-{pages}" if pages else folder


def host_bytes(cache: CacheSection) -> int:
    """What the host tier takes. Raises `EngineStartError` if so much memory is not free."""
    free = free_bytes(torch.device("cpu"))
    if cache.host_gib * GIB > free:
        raise EngineStartError(
            f"cache.host_gib: {cache.host_gib:g} GiB do not fit the {free / GIB:.1f} GiB of memory "
            "that are free"
        )
    return int(cache.host_gib * GIB)


def page_seconds(page: PageBytes, page_bytes: int) -> float:
    """What a copy between the device and host memory takes, measured on an empty page."""
    store, row = HostStore(1, page_bytes, page.device), torch.zeros(page_bytes, dtype=torch.uint8)
    took = []
    for _ in range(TRIALS):
        began = perf_counter()
        page.gather(0, row)
        store.write(0, b"", row)
        store.read(0, b"", row)
        took.append((perf_counter() - began) / 2)
    return min(took)
