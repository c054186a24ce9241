"""Who is asking: from the Authorization header to a tenant."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import NamedTuple

from dynamo_serve.errors import Unauthorized


class Tenant(NamedTuple):
    """Who pays. Tenants with different salts never share a page."""

    name: str
    salt: str


DEFAULT_TENANT = Tenant("default", "")


def tenant_of(authorization: str | None, api_keys: Sequence[str]) -> Tenant:
    """The tenant that a header's key belongs to. Raises `Unauthorized`.

    Without configured keys everybody is welcome. Every key is compared, in constant time, so the
    time taken tells nothing about them.
    """
    if not api_keys:
        return DEFAULT_TENANT
    scheme, _, given = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise Unauthorized("An API key is needed: send the header 'Authorization: Bearer KEY'.")
    token = given.strip().encode("latin-1")  # the bytes that came, before they became a string
    matches = [hmac.compare_digest(token, key.encode()) for key in api_keys]
    if not any(matches):
        raise Unauthorized("This API key is not known here.")
    return DEFAULT_TENANT
