"""Routers: each policy in a case small enough to see that it is right."""

from __future__ import annotations

import pytest

from dynamo_serve.cli_simulate_parser import ROUTING
from dynamo_serve.errors import ConfigError
from dynamo_serve.simulate import routing
from dynamo_serve.simulate.clients import Client, Length
from dynamo_serve.simulate.routing import Router
from dynamo_serve.trace import Arrival


def client(number: int = 0, tenant: str = "a", pages: tuple[tuple[int, int], ...] = ()) -> Client:
    return Client(number, [Arrival(0.0, 100, 1, 1, pages=pages, tenant=tenant)], Length(1, False))


def sent(router: Router, policy: str, *clients: Client) -> list[int]:
    return [router.send(each, routing.policy(policy)) for each in clients]


def test_round_robin_goes_round() -> None:
    assert sent(Router(3, 0), "round_robin", *[client()] * 5) == [0, 1, 2, 0, 1]


def test_least_loaded_looks_at_what_is_in_progress() -> None:
    router = Router(3, 0)
    assert sent(router, "least_loaded", *[client()] * 4) == [0, 1, 2, 0]
    router.ended(client(), 1)
    assert sent(router, "least_loaded", client()) == [1]


def test_share_aware_spreads_each_tenant() -> None:
    router = Router(2, 0)
    assert sent(router, "share_aware", *[client(tenant="a")] * 2, client(tenant="b")) == [0, 1, 0]
    # Fewest of its own first, then fewest in all.
    assert sent(router, "share_aware", client(tenant="b"), client(tenant="a")) == [1, 0]


def test_affinity_follows_the_longest_head() -> None:
    router = Router(4, 0)
    system, chat = ((0, 4),), ((0, 4), (10, 3))
    homes = sent(router, "prefix_affinity", client(pages=chat), client(pages=((50, 2),)))
    assert homes == [0, 1]
    assert sent(router, "prefix_affinity", client(pages=(*chat, (20, 2)))) == [0]
    assert sent(router, "prefix_affinity", client(pages=system)) == [0]


def test_affinity_leaves_a_crowded_replica() -> None:
    router = Router(2, 0)
    homes = sent(router, "prefix_affinity", *[client(pages=((0, 4),))] * 40)
    assert max(homes.count(0), homes.count(1)) <= 1.25 * 20 + 4


def test_the_command_line_names_every_policy() -> None:
    assert set(ROUTING) == routing.POLICIES.keys()


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="--routing random: no such policy; allowed: round_robin"):
        routing.policy("random")
