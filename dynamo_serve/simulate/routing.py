"""Which replica gets a request, as a router in front of them would decide it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from random import Random

from dynamo_serve.errors import ConfigError
from dynamo_serve.simulate.clients import Client

MOST_LOOKED_AT = 64  # replicas: of more, so many are drawn for each request
MOST_HOMES = 1_000_000  # heads of prompts whose replica is remembered
CROWDED = 1.25  # times the usual load, and so many requests more: no cached head is worth that
CROWDED_BY = 4


class Router:
    """Knows what it has sent where and, as it is told of ends, what is still in progress."""

    def __init__(self, num_replicas: int, seed: int) -> None:
        self.num_replicas = num_replicas
        self.loads = [0] * num_replicas  # requests in progress
        self.total = 0
        self._own: list[Counter[str]] = [Counter() for _ in range(num_replicas)]  # by tenant
        self._homes: OrderedDict[object, int] = OrderedDict()
        self._rng = Random(f"router/{seed}")
        self._turn = -1

    def ended(self, client: Client, replica: int) -> None:
        self.loads[replica] -= 1
        self.total -= 1
        self._own[replica][client.asked.tenant] -= 1

    def send(self, client: Client, choose: Policy) -> int:
        replica = choose(self, client)
        self.loads[replica] += 1
        self.total += 1
        self._own[replica][client.asked.tenant] += 1
        return replica

    # ── policies ─────────────────────────────────────────────────────────────

    def round_robin(self, client: Client) -> int:
        self._turn = (self._turn + 1) % self.num_replicas
        return self._turn

    def least_loaded(self, client: Client) -> int:
        """Where the fewest requests are in progress."""
        return min(self._candidates(), key=self.loads.__getitem__)

    def share_aware(self, client: Client) -> int:
        """Where its tenant has the fewest requests in progress, and of these where the fewest are
        in all: each replica then sees every tenant with its part of the load, and what it gives
        each of them by weight is what the cluster does."""
        own, loads, tenant = self._own, self.loads, client.asked.tenant
        return min(self._candidates(), key=lambda at: (own[at][tenant], loads[at]))

    def prefix_affinity(self, client: Client) -> int:
        """Where the longest head of its prompt was sent last, unless that replica is crowded; then
        where the fewest are in progress."""
        heads: list[object] = [first for first, _ in client.asked.pages]
        if client.asked.group:
            heads.insert(0, client.asked.group)
        most = CROWDED * self.total / self.num_replicas + CROWDED_BY
        known = (self._homes.get(head) for head in reversed(heads))
        home = next((at for at in known if at is not None), None)
        if home is None or self.loads[home] > most:
            home = self.least_loaded(client)
        for head in heads:
            self._homes[head] = home
            self._homes.move_to_end(head)
        while len(self._homes) > MOST_HOMES:
            self._homes.popitem(last=False)
        return home

    def _candidates(self) -> Sequence[int]:
        if self.num_replicas <= MOST_LOOKED_AT:
            return range(self.num_replicas)
        return self._rng.choices(range(self.num_replicas), k=MOST_LOOKED_AT)


Policy = Callable[[Router, Client], int]

POLICIES: dict[str, Policy] = {
    "round_robin": Router.round_robin,
    "least_loaded": Router.least_loaded,
    "prefix_affinity": Router.prefix_affinity,
    "share_aware": Router.share_aware,
}
BLIND = ("round_robin",)  # look at no load, so that replicas need not be simulated side by side


def policy(name: str) -> Policy:
    if name not in POLICIES:
        raise ConfigError(f"--routing {name}: no such policy; allowed: {', '.join(POLICIES)}")
    return POLICIES[name]
