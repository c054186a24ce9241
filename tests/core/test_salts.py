"""Requests of one tenant that are set apart: exact, apart, and told where a prompt is stored."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dynamo_serve.core import views, views_cache
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Declare, Submit
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.prefix_index import APART, extend_keys, plain_salt, shared_keys
from dynamo_serve.core.prefix_tree import Chain, PrefixTree
from dynamo_serve.core.request import Request, Resumed
from dynamo_serve.core.tenant import Tenancy, Tenant
from tests.core.test_views_cache import PROMPT, SIZE, ask, explain, flood, serve, settle
from tests.core.tiers import RoughEngine
from tests.core.traffic import VOCAB_SIZE, Harness, reference

ANN, BOB = f"acme{APART}ann", f"acme{APART}bob"
LONGEST = 40
HEAD = tuple(range(2, 10))  # two full pages


def keys_of(prompt: tuple[int, ...], salt: str, shared: frozenset[bytes]) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, prompt, salt, SIZE, len(prompt), shared)
    return keys


def found(harness: Harness) -> int:
    return next(e.cached_tokens for e in harness.events if e.cached_tokens is not None)


# ── what is told ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("stored", "asked"), [(ANN, BOB), (ANN, "acme"), ("acme", ANN)])
def test_what_is_stored_under_another_salt_is_told_and_not_found(stored: str, asked: str) -> None:
    harness = serve()
    ask(harness, PROMPT[:13], salt=stored)
    told = explain(harness, salt=asked)
    assert (told["matched_tokens"], told["reused_tokens"]) == (0, 0)
    miss = told["miss"]
    assert (miss["reason"], miss["position"], miss["apart_until"]) == ("salted_apart", 0, 12)
    assert miss["stored_ids"] == []
    ask(harness, salt=asked)
    assert found(harness) == 0
    assert explain(harness, salt=asked)["matched_tokens"] == 16
    ask(harness, salt=stored)
    assert found(harness) == 12


def test_the_rest_of_what_is_found_in_part_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = serve()
    ask(harness, PROMPT[:9], salt=ANN)
    ask(harness, salt=BOB)
    told = explain(harness, salt=ANN)
    assert (told["matched_tokens"], told["miss"]["position"]) == (8, 8)
    assert (told["miss"]["reason"], told["miss"]["apart_until"]) == ("salted_apart", 16)
    monkeypatch.setattr(views_cache, "MOST_APART", 1)
    assert explain(harness, salt=ANN)["miss"]["apart_until"] == 12, "so far it was looked at"


def test_another_salt_counts_for_more_than_a_difference_in_ones_own() -> None:
    harness = serve()
    ask(harness, (*PROMPT[:6], 22, 22, 22), salt=ANN)
    ask(harness, PROMPT[:9], salt=BOB)
    miss = explain(harness, salt=ANN)["miss"]
    assert (miss["reason"], miss["apart_until"]) == ("salted_apart", 8)
    changed = (*PROMPT[:6], 21, *PROMPT[7:])
    assert explain(harness, changed, salt=ANN)["miss"]["reason"] == "differs", "with its own text"


def test_others_are_told_nothing_of_it() -> None:
    harness = serve()
    before = explain(harness, tenant="beta"), explain(harness, tenant="beta", salt="both")
    ask(harness, salt=ANN)
    ask(harness, salt=f"both{APART}ann")
    after = explain(harness, tenant="beta"), explain(harness, tenant="beta", salt="both")
    assert after == before and before[1]["miss"]["reason"] == "first_time"
    assert explain(harness, salt="both")["miss"]["reason"] == "salted_apart", "to who sent it"


def test_what_was_evicted_is_told_as_that_first() -> None:
    harness = serve()
    ask(harness, salt=ANN)
    flood(harness, "acme")
    ask(harness, salt=BOB)
    assert explain(harness, salt=ANN)["miss"]["reason"] == "evicted"
    flood(harness, "acme")
    assert not harness.scheduler.pool.tree.salted, "nothing is left behind"


def test_operators_are_told_of_what_others_have_set_apart() -> None:
    harness = serve()
    ask(harness, salt=ANN)
    about = ("beta", "beta", keys_of(PROMPT, "beta", frozenset()), PROMPT, ["acme"])
    told: dict[str, Any] = views.answer(harness.scheduler, "prompt", "", harness.now, about)
    assert told["apart"] == [("acme", 16)]
    runs = views.answer(harness.scheduler, "cache", "", harness.now)["runs"]
    assert [run["salted"] for run in runs] == [True]


def test_after_a_page_that_nobody_knows_nothing_is_told_and_nothing_kept() -> None:
    tree = PrefixTree(SIZE)
    keys = keys_of(PROMPT, ANN, frozenset())
    tree.learn(Chain("acme", ANN, keys, PROMPT), [1, 2], 0.0)
    tree.check([keys])
    assert not tree.salted
    tree.learn(Chain("acme", ANN, keys, PROMPT), [0], 0.0)
    plain = keys_of(PROMPT, "acme", frozenset())
    assert list(tree.salted) == plain[:1]
    assert [tree.has_apart(key, "acme") for key in plain] == [True, False, False, False]
    for key in keys[2::-1]:
        tree.lose(key)
        tree.check([keys])
    assert not tree.salted


# ── where salts are looked at ────────────────────────────────────────────────


def test_a_part_of_a_page_is_copied_within_a_salt_only() -> None:
    harness = serve(least=1)
    ask(harness, salt=ANN)
    ask(harness, PROMPT[:7], salt=BOB)
    assert found(harness) == 0
    ask(harness, PROMPT[:7], salt=ANN)
    assert found(harness) == 6


def test_nobody_waits_for_a_prefix_that_is_computed_under_another_salt() -> None:
    harness = serve()
    for name, salt in (("a", ANN), ("b", BOB), ("c", ANN)):
        request = Request(name, PROMPT, 2, tenant="acme", salt=salt)
        harness.scheduler.add(request, 0.0)
    batch = harness.scheduler.schedule(1.0)
    assert batch is not None and {work.seq_id for work in batch.work} == {"a", "b"}


def test_what_goes_on_after_a_crash_is_still_apart() -> None:
    harness = serve()
    ask(harness, salt=ANN)
    for salt, cached in ((BOB, 0), (ANN, 16)):
        request = Request(f"late{cached}", PROMPT, 3, tenant="acme", salt=salt)
        done = Resumed(tuple(reference(request)[0][:1]), 0.0, "engine_lost")
        before = harness.scheduler.stats().prefix_hit_tokens_total
        harness.commands.append(Submit(request, done))
        for _ in range(50):
            harness.turn()
            if harness.scheduler.is_idle:
                break
        assert harness.scheduler.stats().prefix_hit_tokens_total - before == cached


def test_pages_below_the_device_are_apart_and_told() -> None:
    harness = serve(pages=20, host=256)
    ask(harness, salt=ANN)
    settle(harness)
    flood(harness, "acme")
    assert explain(harness, salt=ANN)["tiers"] == {"device": 0, "host": 16}
    told = explain(harness, salt=BOB)
    assert (told["matched_tokens"], told["miss"]["apart_until"]) == (0, 16)
    harness.scheduler.check()


def test_all_salts_of_a_tenant_are_one_owner_of_pages() -> None:
    tenancy = Tenancy({"a": Tenant("a", 2.0), "b": Tenant("b", 1.0)})
    cached = PagePool(8, SIZE).cached
    cached.configure(lambda name: tenancy.tenants[name])
    harness = serve()
    owners = set()
    for tenant in "ab":
        for own in ("", f"{APART}ann", f"{APART}bob"):
            request = Request("r", PROMPT, 1, tenant=tenant, salt=f"both{own}")
            harness.scheduler.add(request, 0.0)
            seq = harness.scheduler.waiting.get("r")
            assert seq is not None
            owners.add(id(cached.owner(seq.owner)))
            harness.scheduler.cancel("r", 0.0)
    assert len(owners) == 1 and cached.owner(("both", "a")).weight == 3.0
    assert len(cached._by_salt) == 1, "a client's salts are not kept"


# ── random traffic ───────────────────────────────────────────────────────────


class Traffic:
    """Two tenants, one of them with a salt that a third one has, too; each sets some apart."""

    SALTS = ("acme", ANN, BOB, "both", f"both{APART}ann")

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        engine = RoughEngine(
            rng,
            failing=rng.choice([0.0, 0.3]),
            slowest=rng.choice([0, 5]),
            vocab_size=VOCAB_SIZE,
            max_model_len=LONGEST,
            page_size=SIZE,
            num_pages=10 + rng.randint(0, 10),
            host_pages=rng.choice([0, 6, 40]),
            disk_pages=rng.choice([0, 12]),
        )
        limits = Limits(mix_phases=True, min_copied_tokens=1, max_decode_sequences=3)
        engine.harness = self.harness = Harness(engine, limits)
        self.shared = frozenset(shared_keys(HEAD, SIZE)) if seed % 2 else frozenset[bytes]()
        self.harness.commands.append(Declare(sorted(self.shared)))
        self.harness.turn()
        self.texts = [tuple(rng.choices(range(VOCAB_SIZE), k=LONGEST - 4)) for _ in range(3)]

    def request(self, number: int) -> Request:
        rng, salt = self.rng, self.rng.choice(self.SALTS)
        tenant = "acme" if plain_salt(salt) == "acme" else rng.choice(["beta", "gamma"])
        head = rng.choice([(), HEAD])
        prompt = (*head, *rng.choice(self.texts))[: rng.randint(1, LONGEST - 4)]
        return Request(f"r{number}", prompt, rng.randint(1, 4), tenant=tenant, salt=salt)

    def run(self, requests: list[Request]) -> None:
        answers = self.harness.generate(*requests)
        for request in requests:
            assert answers[request.id] == reference(request)[0]

    def told(self, request: Request) -> dict[str, Any]:
        """As the engine says it, after a look at every page under every salt of the tenant."""
        scheduler, tree = self.harness.scheduler, self.harness.scheduler.pool.tree
        prompt, tenant, salt = request.prompt_ids, request.tenant, request.salt
        keys = keys_of(prompt, salt, self.shared)
        told = views_cache.explain(scheduler, Chain(tenant, salt, keys, prompt), self.harness.now)
        miss: dict[str, Any] = told["miss"]
        place = told["matched_tokens"] // SIZE
        own = [s for s in self.SALTS if plain_salt(s) == plain_salt(salt)]
        chains = [keys_of(prompt, each, self.shared) for each in own]
        count = 0
        for alike in list(zip(*chains, strict=True))[place : (len(prompt) - 1) // SIZE]:
            nodes = (tree.nodes.get(key) for key in alike)
            if not any(node is not None and tenant in node.tenants for node in nodes):
                break
            count += 1
        if miss["reason"] == "salted_apart":
            assert miss["apart_until"] == (place + count) * SIZE > told["matched_tokens"]
        elif miss["reason"] in ("first_time", "differs"):
            assert count == 0, "it is stored under another salt"
        return miss


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_is_exact_and_what_is_told_is_so(seed: int) -> None:
    traffic = Traffic(seed)
    reasons = set()
    for turn in range(25):
        traffic.run([traffic.request(5 * turn + i) for i in range(traffic.rng.randint(1, 5))])
        reasons |= {traffic.told(traffic.request(0))["reason"] for _ in range(6)}
    assert "salted_apart" in reasons
