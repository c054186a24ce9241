"""Who is asking: from the Authorization header to a caller, by keys that a reload may replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dynamo_serve import tenants
from dynamo_serve.config import ServerSection
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.directory import DEFAULT_CALLER, Caller, Directory, changes, digest
from dynamo_serve.errors import ConfigError, Forbidden, Unauthorized

NO_TENANTS_FILE = "no tenants file to read again: server.tenants_file is not set"
NO_ADMIN_KEY = (
    "No admin key is configured, so /admin is shut: set server.admin_keys, or admin_keys in the "
    "tenants file."
)


def credentials(headers: Mapping[str, str]) -> str | None:
    """What a tenant's request says of who sends it: its Authorization header, or without one the
    key in x-api-key, as Anthropic's clients send it. An admin key comes in the former only."""
    authorization, key = headers.get("authorization"), headers.get("x-api-key")
    return authorization if authorization is not None or key is None else f"Bearer {key}"


class Access:
    """Whose key is whose, from now until the next reload.

    A key is hashed and looked up. How long that takes tells something about hashes at most, and
    no key can be made from one, so nothing needs to be compared in constant time.
    """

    def __init__(self, server: ServerSection, configure: Callable[[Tenancy], None]) -> None:
        """`configure` is told the tenancy, now and on each reload. Raises `ConfigError`."""
        self._server = server
        self._configure = configure
        self._directory = Directory()
        self._load()

    @property
    def tenancy(self) -> Tenancy:
        return self._directory.tenancy

    @property
    def asks_key(self) -> bool:
        return not self._directory.is_open

    @property
    def reloads(self) -> bool:
        """Whether there is a file to read again."""
        return bool(self._server.tenants_file)

    def caller(self, authorization: str | None) -> Caller:
        """Who sent a header. Raises `Unauthorized`."""
        if self._directory.is_open:
            return DEFAULT_CALLER
        caller = self._directory.callers.get(_digest(authorization))
        if caller is None:
            raise Unauthorized("This API key is not known here.")
        return caller

    def caller_named(self, tenant: str) -> Caller | None:
        """Who calls for a tenant; None if nobody does."""
        if self._directory.is_open:
            return DEFAULT_CALLER if tenant == DEFAULT_CALLER.tenant else None
        callers = self._directory.callers.values()
        return next((caller for caller in callers if caller.tenant == tenant), None)

    def sharing(self) -> dict[str, list[str]]:
        """The tenants with keys by their salt: those of one share pages."""
        sharing: dict[str, list[str]] = {}
        for tenant, salt in sorted(set(self._directory.callers.values())):
            sharing.setdefault(salt, []).append(tenant)
        return sharing

    def check_admin(self, authorization: str | None) -> None:
        """Raises `Unauthorized` or `Forbidden` unless the header carries an admin key."""
        if not self._directory.admins:
            raise Forbidden(NO_ADMIN_KEY)
        key = _digest(authorization)
        if key in self._directory.callers:
            raise Forbidden("This is the key of a tenant; /admin opens with an admin key only.")
        if key not in self._directory.admins:
            raise Unauthorized("This admin key is not known here.")

    def shows_tenants(self, authorization: str | None) -> bool:
        """Whether who sent this header may see numbers by tenant: with a tenants file, who holds
        an admin key."""
        if not self.reloads:
            return True
        try:
            self.check_admin(authorization)
        except (Forbidden, Unauthorized):
            return False
        return True

    def reload(self) -> dict[str, dict[str, list[str]]]:
        """Read the tenants file again; what has changed, by name.

        Raises `ConfigError`; then everything stays as it was. Nothing that is live is dropped.
        """
        if not self.reloads:
            raise ConfigError(NO_TENANTS_FILE)
        old = self._directory
        self._load()
        return changes(old, self._directory)

    def _load(self) -> None:
        directory = tenants.load(self._server)
        self._configure(directory.tenancy)
        self._directory = directory


def _digest(authorization: str | None) -> str:
    """The digest of the key in a header. Raises `Unauthorized` if there is no key."""
    scheme, _, given = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise Unauthorized("An API key is needed: send the header 'Authorization: Bearer KEY'.")
    return digest(given.strip().encode("latin-1"))  # the bytes that came
