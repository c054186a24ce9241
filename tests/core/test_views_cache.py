"""Why a prompt was not found: each reason in turn, and nothing of another tenant's."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dynamo_serve.core import prefix_tree, views, views_cache
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.loop import Cancel, Submit
from dynamo_serve.core.prefix_index import extend_keys
from dynamo_serve.core.request import Request
from dynamo_serve.core.tiers import HOST
from tests.core.tiers import RoughEngine
from tests.core.traffic import VOCAB_SIZE, Harness

SIZE = 4
PROMPT = tuple(range(3, 20))  # four full pages and a token
Prompt = tuple[int, ...]


def serve(
    *, pages: int = 40, host: int = 0, prefix_sharing: bool = True, least: int = SIZE
) -> Harness:
    engine = RoughEngine(
        random.Random(1),
        failing=0.0,
        slowest=0,
        vocab_size=VOCAB_SIZE,
        max_model_len=64,
        page_size=SIZE,
        num_pages=pages,
        host_pages=host,
        disk_pages=0,
    )
    engine.harness = harness = Harness(
        engine,
        Limits(mix_phases=True, min_copied_tokens=least),
        prefix_sharing=prefix_sharing,
    )
    return harness


def request(name: str, prompt: Prompt, tenant: str, salt: str | None, now: float) -> Request:
    salt = tenant if salt is None else salt
    return Request(name, prompt, 2, tenant=tenant, salt=salt, arrival=now)


def ask(
    harness: Harness, prompt: Prompt = PROMPT, tenant: str = "acme", salt: str | None = None
) -> None:
    harness.generate(request(f"r{harness.now}", prompt, tenant, salt, harness.now))


def explain(
    harness: Harness, prompt: Prompt = PROMPT, tenant: str = "acme", salt: str | None = None
) -> dict[str, Any]:
    salt = tenant if salt is None else salt
    keys: list[bytes] = []
    extend_keys(keys, prompt, salt, SIZE, len(prompt))
    about = (tenant, salt, keys, prompt)
    told: dict[str, Any] = views.answer(harness.scheduler, "prompt", "", harness.now, about)
    assert told["prompt_tokens"] == len(prompt)
    assert told["matched_tokens"] == sum(told["tiers"].values())
    assert told["matched_tokens"] <= told["miss"]["position"]
    assert told["matched_tokens"] + told["miss"]["tokens"] == len(prompt)
    return told


def flood(harness: Harness, tenant: str) -> None:
    """Requests of a tenant take every page there is."""
    for i in range(12):
        ask(harness, tuple((i + j * 7) % VOCAB_SIZE for j in range(41)), tenant, "flood")


def let_others_take_pages(harness: Harness) -> None:
    """Every page is too old to be anybody's; else a flood would cost its own."""
    harness.scheduler.pool.cached.stale_seconds = 0.0


def settle(harness: Harness) -> None:
    for _ in range(2000):
        harness.turn()
        if not harness.scheduler.spill.flights.is_busy:
            return
    raise AssertionError("copies never end")


# ── each reason ──────────────────────────────────────────────────────────────


def test_what_nobody_sent_is_missed_for_the_first_time() -> None:
    told = explain(serve())
    assert told["matched_tokens"] == told["reused_tokens"] == 0
    assert told["miss"]["reason"] == "first_time"
    assert (told["miss"]["position"], told["miss"]["stored_ids"]) == (0, [])


def test_what_is_stored_is_found_but_for_the_end() -> None:
    harness = serve()
    ask(harness)
    told = explain(harness)
    assert told["matched_tokens"] == told["reused_tokens"] == 16
    assert told["tiers"] == {"device": 16}
    assert told["below"] is None
    assert (told["miss"]["reason"], told["miss"]["tokens"]) == ("too_short", 1)


@pytest.mark.parametrize(("length", "matched"), [(1, 0), (4, 0), (5, 4), (16, 12)])
def test_less_than_a_page_and_the_last_token_are_never_found(length: int, matched: int) -> None:
    harness = serve()
    ask(harness)
    told = explain(harness, PROMPT[:length])
    assert (told["matched_tokens"], told["miss"]["reason"]) == (matched, "too_short")


def test_what_goes_on_after_a_stored_head_is_new() -> None:
    harness = serve()
    ask(harness, PROMPT[:9])
    told = explain(harness, PROMPT[:8] + tuple(range(9)))
    assert told["matched_tokens"] == 8
    assert (told["miss"]["reason"], told["miss"]["position"]) == ("first_time", 8)


@pytest.mark.parametrize("at", [1, 3, 4, 5, 10, 15])
def test_one_token_that_differs_is_named_with_what_is_stored_there(at: int) -> None:
    harness = serve()
    ask(harness)
    changed = (*PROMPT[:at], 22, *PROMPT[at + 1 :])
    told = explain(harness, changed)
    assert told["matched_tokens"] == at // SIZE * SIZE
    miss = told["miss"]
    assert (miss["reason"], miss["position"]) == ("differs", at)
    assert tuple(miss["stored_ids"]) == PROMPT[at : min(16, (at // SIZE + 2) * SIZE)]


def test_the_branch_that_is_most_alike_is_told() -> None:
    harness = serve()
    for third in (1, 2):
        ask(harness, (*PROMPT[:6], third, 0, 0))
    ask(harness, (*PROMPT[:4], 0, 0, 0, 0, 0))
    miss = explain(harness, (*PROMPT[:6], 5, 5, 5))["miss"]
    assert (miss["position"], miss["stored_ids"]) == (6, [2, 0]), "of equal ones the latest"


@pytest.mark.parametrize(("tenant", "pressure"), [("acme", "own"), ("beta", "others")])
def test_what_was_evicted_is_told_with_when_and_for_whom(tenant: str, pressure: str) -> None:
    harness = serve()
    let_others_take_pages(harness)
    ask(harness)
    flood(harness, tenant)
    then = harness.now
    harness.now += 100.0
    told = explain(harness)
    miss = told["miss"]
    assert (told["matched_tokens"], miss["reason"], miss["pressure"]) == (0, "evicted", pressure)
    assert 100.0 <= miss["evicted_s_ago"] <= 100.0 + then
    assert miss["evicted_tokens"] == 16
    assert "beta" not in str(told)
    ask(harness)
    assert explain(harness)["matched_tokens"] == 16
    harness.scheduler.check()


def test_so_much_is_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "MOST_LOST", 3)
    harness = serve()
    ask(harness)
    flood(harness, "acme")
    assert len(harness.scheduler.pool.tree.lost) == 3
    assert explain(harness)["miss"]["reason"] == "first_time"


def test_what_is_being_computed_is_told_to_its_tenant_only() -> None:
    harness = serve()
    harness.scheduler.add(request("a", PROMPT, "acme", "both", 0.0), 0.0)
    assert harness.scheduler.schedule(1.0), "the merge window is over"
    assert explain(harness, salt="both")["miss"]["reason"] == "being_computed"
    assert explain(harness, tenant="beta", salt="both")["miss"]["reason"] == "first_time"


def test_without_sharing_nothing_is_found_and_nothing_remembered() -> None:
    harness = serve(prefix_sharing=False)
    ask(harness)
    assert explain(harness)["miss"]["reason"] == "not_shared"
    assert not harness.scheduler.pool.tree.nodes


def test_pages_below_are_told_by_tier_with_both_prices() -> None:
    harness = serve(pages=20, host=256)
    ask(harness)
    settle(harness)
    flood(harness, "acme")
    told = explain(harness)
    assert told["tiers"] == {"device": 0, "host": 16}
    assert told["below"]["tokens"] == 16 and told["below"]["would_be"] == "restored"
    assert told["below"]["restoring_s"] < told["below"]["computing_s"]
    assert told["reused_tokens"] == 16 and told["miss"]["reason"] == "too_short"
    harness.scheduler.spill.tiers[0].page_seconds = 10.0
    told = explain(harness)
    assert (told["below"]["would_be"], told["reused_tokens"]) == ("computed", 0)
    assert told["matched_tokens"] == 16


def test_a_page_that_came_back_damaged_went_for_nobody() -> None:
    harness = serve(pages=20, host=256)
    ask(harness)
    settle(harness)
    flood(harness, "acme")
    engine = harness.engine
    assert isinstance(engine, RoughEngine) and harness.scheduler.spill.tiers[0].number == HOST
    engine.failing = 1.0
    harness.commands.append(Submit(request("b", PROMPT, "acme", None, harness.now)))
    for _ in range(20):
        harness.turn()
        if harness.scheduler.running:
            break
    assert harness.scheduler.running["b"].restoring
    harness.commands.append(Cancel("b"))  # or it would compute what does not come
    harness.turn()
    miss = explain(harness)["miss"]
    assert (miss["reason"], miss["pressure"], miss["position"]) == ("evicted", "damaged", 0)


# ── below a page ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", range(2, 18))
def test_all_of_a_stored_head_but_the_last_token_is_told_to_be_found(length: int) -> None:
    harness = serve(least=1)
    ask(harness)
    told = explain(harness, PROMPT[:length])
    assert told["matched_tokens"] == told["reused_tokens"] == length - 1
    assert told["copied_tokens"] == (length - 1) % SIZE
    assert (told["miss"]["reason"], told["miss"]["position"]) == ("too_short", length - 1)


@pytest.mark.parametrize("at", [1, 3, 4, 5, 10, 15])
def test_what_is_told_to_be_copied_is_what_is_copied(at: int) -> None:
    harness = serve(least=1)
    ask(harness)
    changed = (*PROMPT[:at], 22, *PROMPT[at + 1 :])
    told = explain(harness, changed)
    assert (told["reused_tokens"], told["copied_tokens"]) == (at, at % SIZE)
    assert told["tiers"] == {"device": at}
    assert (told["miss"]["reason"], told["miss"]["position"]) == ("differs", at)
    ask(harness, changed)
    assert harness.scheduler.stats().prefix_hit_tokens_total == at


def test_a_short_prompt_that_differs_within_a_page_is_told_where() -> None:
    harness = serve(least=1)
    ask(harness)
    told = explain(harness, (*PROMPT[:6], 22, 22))
    assert (told["matched_tokens"], told["copied_tokens"]) == (6, 2)
    assert (told["miss"]["reason"], told["miss"]["position"]) == ("differs", 6)
    assert tuple(told["miss"]["stored_ids"]) == PROMPT[6:12]


def test_of_many_branches_the_most_alike_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "MOST_BRANCHES", 2)
    harness = serve(least=1)
    ask(harness, (*PROMPT[:7], 0, 0))
    for third in range(5):
        ask(harness, (*PROMPT[:5], third, third, third, 0))
    told = explain(harness, (*PROMPT[:7], 5, 5, 5))
    assert (told["copied_tokens"], told["miss"]["position"]) == (3, 7)
    assert told["miss"]["stored_ids"] == [0]


def test_a_part_of_what_lies_below_is_not_counted_twice() -> None:
    harness = serve(pages=20, host=256, least=1)
    ask(harness)
    settle(harness)
    flood(harness, "acme")
    harness.scheduler.spill.tiers[0].page_seconds = 10.0
    ask(harness, (*PROMPT[:6], 22, 22, 22))
    told = explain(harness)
    assert told["below"]["would_be"] == "computed"
    assert told["tiers"] == {"device": 4, "host": 12}, "4 of them were computed again"
    assert (told["reused_tokens"], told["copied_tokens"]) == (6, 2)


# ── nothing of others ────────────────────────────────────────────────────────


def test_another_tenant_learns_nothing() -> None:
    harness = serve()
    changed = (*PROMPT[:10], 22, *PROMPT[11:])
    before = [explain(harness, p, "beta") for p in (PROMPT, changed, PROMPT[:3])]
    ask(harness)
    assert [explain(harness, p, "beta") for p in (PROMPT, changed, PROMPT[:3])] == before
    flood(harness, "acme")
    assert [explain(harness, p, "beta") for p in (PROMPT, changed, PROMPT[:3])] == before


def test_operators_are_told_who_else_has_it() -> None:
    harness = serve()
    keys: list[bytes] = []
    extend_keys(keys, PROMPT, "beta", SIZE, len(PROMPT))

    def asked(*salts: str) -> dict[str, Any]:
        about = ("beta", "beta", keys, PROMPT, list(salts))
        told: dict[str, Any] = views.answer(harness.scheduler, "prompt", "", harness.now, about)
        return told

    assert asked("acme", "gamma")["apart"] == []
    ask(harness)
    ask(harness, (*PROMPT[:9], 22, 22, 22), "gamma")
    assert asked("acme", "gamma", "delta")["apart"] == [("acme", 16), ("gamma", 8)]
    assert asked("gamma")["apart"] == [("gamma", 8)]
    told = asked("acme")
    assert (told.pop("apart"), told) == ([("acme", 16)], explain(harness, tenant="beta"))


def test_who_shares_a_salt_is_told_no_text_but_its_own() -> None:
    harness = serve()
    ask(harness, salt="both")
    changed = (*PROMPT[:10], 22, *PROMPT[11:])
    told = explain(harness, changed, "beta", "both")
    assert told["matched_tokens"] == 8, "so much it would find, and be told of in its usage"
    assert (told["miss"]["reason"], told["miss"]["stored_ids"]) == ("first_time", [])
    ask(harness, PROMPT[:13], "beta", "both")
    told = explain(harness, changed, "beta", "both")
    assert told["miss"]["reason"] == "differs"
    assert tuple(told["miss"]["stored_ids"]) == PROMPT[10:12], "the page after it is acme's alone"


def test_what_others_lost_is_not_told_to_who_shares_a_salt() -> None:
    harness = serve()
    let_others_take_pages(harness)
    ask(harness, salt="both")
    flood(harness, "gamma")
    assert explain(harness, salt="both")["miss"]["reason"] == "evicted"
    assert explain(harness, tenant="beta", salt="both")["miss"]["reason"] == "first_time"


# ── the whole tree ───────────────────────────────────────────────────────────


def cache(harness: Harness) -> dict[str, Any]:
    told: dict[str, Any] = views.answer(harness.scheduler, "cache", "", harness.now)
    return told


def test_pages_without_a_branch_are_one_run() -> None:
    harness = serve()
    ask(harness)
    ask(harness, (*PROMPT[:8], *range(9)))
    harness.now += 5.0
    ask(harness, (*PROMPT[:8], *range(9)))
    told = cache(harness)
    head, *others = told["runs"]
    assert (head["parent"], head["position"], head["tokens"]) == (None, 0, 8)
    assert (head["tokens_below"], head["pages"]) == (24, {"device": 2})
    assert head["hits"] == 2, "of the second request, and of the third"
    assert head["last_hit_s_ago"] < 5.0 <= head["age_s"]
    assert head["first_ids"] == list(PROMPT[:8])
    assert {(run["parent"], run["position"], run["tokens"]) for run in others} == {
        (head["run"], 8, 8)
    }
    assert sorted(run["hits"] for run in others) == [0, 1]
    assert told["pages"] == {"device": 6} and told["known_pages"] == 6


def test_hits_of_an_evicted_tail_stay_with_its_head() -> None:
    harness = serve()
    ask(harness)
    ask(harness)
    tree = harness.scheduler.pool.tree
    *_, last = tree.nodes.values()
    assert last.hits == 1 and last.depth == 3
    tree.lose(last.key)
    assert tree.nodes[last.parent].hits == 1
    assert tree.nodes[last.parent].hit_at == last.hit_at


def test_tenants_are_told_of_every_page_that_they_used() -> None:
    harness = serve()
    ask(harness, salt="both")
    ask(harness, PROMPT[:9], "beta", "both")
    tree = harness.scheduler.pool.tree
    assert [
        sorted(node.tenants) for node in sorted(tree.nodes.values(), key=lambda n: n.depth)
    ] == [
        ["acme", "beta"],
        ["acme", "beta"],
        ["acme"],
        ["acme"],
    ]


def test_the_list_is_cut_and_whoever_is_listed_has_its_head_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(views_cache, "MOST_RUNS", 7)
    rng = random.Random(5)
    harness = serve(pages=200)
    for _ in range(60):
        kept = rng.randrange(12)
        ask(harness, (*PROMPT[:kept], *(rng.randrange(VOCAB_SIZE) for _ in range(9))))
    told = cache(harness)
    listed = [run["run"] for run in told["runs"]]
    assert len(listed) == 7 < told["num_runs"]
    assert all(run["parent"] in (None, *listed) for run in told["runs"])
    monkeypatch.setattr(views_cache, "MOST_NODES", 10)
    assert 10 <= cache(harness)["looked_at_pages"] < told["looked_at_pages"]


def test_evictions_are_told_by_what_they_were_for() -> None:
    harness = serve(pages=16)
    ask(harness)
    flood(harness, "acme")
    stats = harness.scheduler.stats()
    assert 0 < stats.admission_evicted_pages_total <= stats.evicted_pages_total
