"""Whether what is asked for fits into what there is."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from dynamo_serve.config import CacheSection
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.pins import Pinning
from dynamo_serve.core.request import Request
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.errors import ConfigError, ContextTooLong, EngineStartError

log = logging.getLogger(__name__)

GIB = 1 << 30


def check_fits(request: Request, spec: EngineSpec) -> None:
    """Raise `ContextTooLong` for a request that is longer than the engine can run."""
    asked = len(request.prompt_ids) + request.max_tokens
    if asked > spec.max_model_len:
        raise ContextTooLong(
            f"{len(request.prompt_ids)} prompt tokens and max_tokens {request.max_tokens} make "
            f"{asked}, more than the limit of {spec.max_model_len}"
        )


def check_disk(cache: CacheSection) -> None:
    """Raise `ConfigError` for a disk tier that cannot be: said at the start, for later an engine
    does without."""
    if not cache.disk_gib:
        return
    folder = Path(cache.disk_path)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        pages = folder / "pages"
        held = pages.stat().st_size if pages.exists() else 0
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(f"cache.disk_path = {cache.disk_path!r}: {error}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"cache.disk_path = {cache.disk_path!r}: this server may not write there")
    if cache.disk_gib * GIB > free + held:
        raise ConfigError(
            f"cache.disk_gib = {cache.disk_gib:g}: only {free / GIB:.1f} GiB are free there; "
            "allowed: at most that"
        )


def check_shared(asked: int, cache: CacheSection, spec: EngineSpec) -> None:
    """Raise `EngineStartError` for shared prefixes that cannot stay in the pool: for so many pages,
    of which those that several begin with count once."""
    longest = -(-spec.max_model_len // spec.page_size)
    rules = Pinning.of(spec.num_pages, longest, cache.pinned_fraction)
    if asked > min(rules):
        raise EngineStartError(
            f"cache.shared_prefixes: they take {asked} KV pages; cache.pinned_fraction of "
            f"{spec.num_pages} allows {rules.common}, the longest request leaves {rules.most}: "
            "declare less, or raise cache.num_pages or cache.pinned_fraction"
        )


def check_guarantees(tenancy: Tenancy, spec: EngineSpec) -> None:
    """Warn of guarantees that cannot all be kept at once."""
    pages = sum(tenant.quota.pages_guaranteed for tenant in tenancy.tenants.values())
    if pages > spec.num_pages:
        what = "quota.pages_guaranteed: the tenants' add up to %d, the pool has %d pages"
        log.warning(what, pages, spec.num_pages)
