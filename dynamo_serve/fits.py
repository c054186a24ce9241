"""Whether what is asked for fits into what there is."""

from __future__ import annotations

import logging

from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Request
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.errors import ContextTooLong

log = logging.getLogger(__name__)


def check_fits(request: Request, spec: EngineSpec) -> None:
    """Raise `ContextTooLong` for a request that is longer than the engine can run."""
    asked = len(request.prompt_ids) + request.max_tokens
    if asked > spec.max_model_len:
        raise ContextTooLong(
            f"{len(request.prompt_ids)} prompt tokens and max_tokens {request.max_tokens} make "
            f"{asked}, more than the limit of {spec.max_model_len}"
        )


def check_guarantees(tenancy: Tenancy, spec: EngineSpec) -> None:
    """Warn of guarantees that cannot all be kept at once."""
    pages = sum(tenant.quota.pages_guaranteed for tenant in tenancy.tenants.values())
    if pages > spec.num_pages:
        what = "quota.pages_guaranteed: the tenants' add up to %d, the pool has %d pages"
        log.warning(what, pages, spec.num_pages)
