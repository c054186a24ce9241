"""The prefix cache told as plain data: to a tenant why its prompt was not found, to an operator
what is there. Where a tenant is told of stored text, it is text that the tenant itself has sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_serve.core.prefix_index import extend_keys, page_key
from dynamo_serve.core.prefix_tree import MOST_LOST, Chain, Lost, Node, PrefixTree
from dynamo_serve.core.tiers import DEVICE, NAMES

if TYPE_CHECKING:
    from dynamo_serve.core.scheduler import Scheduler

MOST_RUNS = 200  # in one answer
MOST_NODES = 8192  # that are looked at for it: the loop stands still meanwhile
MOST_APART = 1024  # pages that are looked for under other salts of a tenant: each is hashed
SHOWN_PAGES = 2  # of a run, and of what a prompt was expected to go on with
Told = dict[str, Any]


class Ends(NamedTuple):
    """How far a prompt could be reused at most, how far it is stored, both in pages, and so many
    tokens of the page after that."""

    reusable: int
    matched: int
    in_part: int


def answer(scheduler: Scheduler, what: str, about: tuple[Any, ...], now: float) -> Told:
    """What is cached, or, with a `Chain` to ask `about`, why the rest of it is not; with salts of
    others after it also where else it is."""
    if what != "prompt":
        return cache(scheduler, now)
    chain, salts = Chain(*about[:4]), about[4:]
    told = explain(scheduler, chain, now)
    return {**told, "apart": apart(scheduler, chain, *salts)} if salts else told


def explain(scheduler: Scheduler, chain: Chain, now: float) -> Told:
    """How much of a prompt is stored, and why the rest is not. `chain.keys` are those of all its
    full pages."""
    pool, size = scheduler.pool, scheduler.pool.page_size
    # As for any request: the last token is always run, for its logits pick the next one.
    keys = chain.keys[: (len(chain.token_ids) - 1) // size] if pool.prefix_sharing else ()
    tiers: list[int] = []
    for key in keys:
        tier = _tier(scheduler, key)
        if tier is None:
            break
        tiers.append(tier)
    stored = keys[: len(tiers)]
    found = pool.match(stored)
    copied = 0 if None in found else _copied(scheduler, chain, len(found))
    in_part = copied if len(found) == len(tiers) else 0  # else it is in what lies below, too
    matched = {name: tiers.count(number) * size for number, name in _tiers(scheduler)}
    matched[NAMES[DEVICE]] += in_part
    return {
        "page_size": size,
        "prompt_tokens": len(chain.token_ids),
        "matched_tokens": len(tiers) * size + in_part,
        "shared_tokens": sum(key in pool.index.shared for key in stored) * size,
        "reused_tokens": len(found) * size + copied,
        "copied_tokens": copied,
        "tiers": matched,
        "below": _below(scheduler, stored, tiers),
        "miss": _miss(scheduler, chain, Ends(len(keys), len(tiers), in_part), now),
    }


def apart(scheduler: Scheduler, chain: Chain, salts: Sequence[str]) -> list[tuple[str, int]]:
    """How many tokens of a prompt are stored under each of some other salts, where any are: its
    tenant never finds those. For operators only."""
    size, pool, found = scheduler.pool.page_size, scheduler.pool, []
    reusable = (len(chain.token_ids) - 1) // size if pool.prefix_sharing else 0
    for salt in salts:
        keys: list[bytes] = []
        while len(keys) < reusable:
            extend_keys(
                keys, chain.token_ids, salt, size, len(keys) * size + size, pool.index.shared
            )
            if _tier(scheduler, keys[-1]) is None and keys[-1] not in pool.tree.salted:
                keys.pop()
                break
        if keys and keys[-1] not in pool.index.shared:
            found.append((salt, len(keys) * size))
    return found


def _copied(scheduler: Scheduler, chain: Chain, num_pages: int) -> int:
    """How much of the page after the first ones of a chain would be copied from another."""
    part = scheduler.life.parts.find(chain, num_pages, len(chain.token_ids) - 1)
    return part.num_tokens if part else 0


def _tiers(scheduler: Scheduler) -> list[tuple[int, str]]:
    lower = [tier.number for tier in scheduler.spill.tiers]
    return [(number, NAMES[number]) for number in (DEVICE, *lower)]


def _tier(scheduler: Scheduler, key: bytes) -> int | None:
    """The highest tier that has a page."""
    if key in scheduler.pool:
        return DEVICE
    return next((tier.number for tier in scheduler.spill.tiers if key in tier), None)


def _below(scheduler: Scheduler, keys: Sequence[bytes], tiers: list[int]) -> Told | None:
    """What becomes of the pages that are below the device."""
    found = [scheduler.pool.index.pages.get(key) for key in keys]
    if None not in found:
        return None
    restoring, computing = scheduler.spill.prices(keys, found)
    return {
        "tokens": found.count(None) * scheduler.pool.page_size,
        "restoring_s": restoring,
        "computing_s": computing,
        "would_be": "restored" if restoring < computing else "computed",
    }


def _miss(scheduler: Scheduler, chain: Chain, ends: Ends, now: float) -> Told:
    """Why the first token that is not matched is not stored."""
    pool, tree, size = scheduler.pool, scheduler.pool.tree, scheduler.pool.page_size
    place, begin = ends.matched, ends.matched * size
    position = begin + ends.in_part
    miss: Told = {"reason": "first_time", "position": position, "stored_ids": []}
    miss["tokens"] = len(chain.token_ids) - position
    if not pool.prefix_sharing:
        return {**miss, "reason": "not_shared"}
    wanted = chain.token_ids[begin : begin + size]
    node, same = tree.branch(tree.parent(chain, place), wanted, chain.tenant)
    is_last, left = place == ends.reusable, len(chain.token_ids) - 1 - begin
    if is_last and (not ends.in_part or same >= left):
        return {**miss, "reason": "too_short"}
    if not is_last and _is_computed_for(scheduler, chain.keys[place], chain.tenant):
        return {**miss, "reason": "being_computed"}
    gone = _lost(tree, chain.keys[place : ends.reusable], chain.tenant)
    if gone:
        return {
            **miss,
            "reason": "evicted",
            "evicted_tokens": len(gone) * size,
            "evicted_s_ago": now - gone[0].at,
            "pressure": _pressure(gone[0], chain.tenant),
        }
    apart = _apart(scheduler, chain, place, ends.reusable)
    if apart:
        miss |= {"reason": "salted_apart", "apart_until": begin + apart * size}
    elif node and place + same:
        ids = _going_on(scheduler, node, chain.tenant)[same:]
        miss |= {"reason": "differs", "position": begin + same, "stored_ids": ids}
    return miss


def _is_computed_for(scheduler: Scheduler, key: bytes, tenant: str) -> bool:
    """Whether a request of this tenant is computing a page; others are not told of."""
    maker = scheduler.running.get(scheduler.pool.index.maker(key) or "")
    return maker is not None and maker.request.tenant == tenant


def _lost(tree: PrefixTree, keys: Sequence[bytes], tenant: str) -> list[Lost]:
    """What became of the first pages of `keys`, as far as all of them are remembered to have been
    used by a tenant."""
    gone: list[Lost] = []
    for key in keys:
        lost = tree.lost.get(key)
        if lost is None or tenant not in lost.tenants:
            break
        gone.append(lost)
    return gone


def _apart(scheduler: Scheduler, chain: Chain, place: int, end: int) -> int:
    """How many pages of a chain, from a place on, its tenant has under other salts of its own."""
    tree, size = scheduler.pool.tree, scheduler.pool.page_size
    end, plain, count = min(end, place + MOST_APART), tree.plain_parent(chain, place), 0
    for at in range(place, end):
        plain = page_key(plain, chain.token_ids[at * size : (at + 1) * size])
        if not tree.has_apart(plain, chain.tenant):
            break
        count += 1
    return count


def _pressure(lost: Lost, tenant: str) -> str:
    """For whose pages it had to go; no other tenant is named. A damaged one went for nobody's."""
    if not lost.pressed_by:
        return "damaged"
    return "own" if tenant in lost.pressed_by else "others"


def _going_on(scheduler: Scheduler, node: Node, tenant: str) -> list[int]:
    """The tokens of a page, and of the page after it that the tenant used last."""
    ids = node.tokens
    for child in scheduler.pool.tree.children(node.key):
        if tenant in child.tenants:
            return ids + child.tokens
    return ids


# ── for operators ────────────────────────────────────────────────────────────


def cache(scheduler: Scheduler, now: float) -> Told:
    """The tree of what is stored, in runs: pages one after the other without a branch. Of these the
    latest used and the longest with all that comes after them; whoever is listed has the run
    before it listed, too."""
    tree, pool = scheduler.pool.tree, scheduler.pool
    nodes = tree.latest(MOST_NODES)
    runs = _runs(scheduler, nodes, now)
    half = MOST_RUNS // 2
    chosen = dict.fromkeys(sorted(range(len(runs)), key=lambda i: runs[i]["used_s_ago"])[:half])
    for i in sorted(range(len(runs)), key=lambda i: -runs[i]["tokens_below"]):
        if len(chosen) >= MOST_RUNS:
            break
        chosen[i] = None
    return {
        "page_size": pool.page_size,
        "prefix_sharing": pool.prefix_sharing,
        "pages": {
            "device": len(pool.index.pages),
            **{tier.name: len(tier) for tier in scheduler.spill.tiers},
        },
        "known_pages": len(tree.nodes),
        "looked_at_pages": len(nodes),
        "evicted_pages_remembered": len(tree.lost),
        "most_evicted_pages_remembered": MOST_LOST,
        "num_runs": len(runs),
        "runs": [runs[i] for i in sorted(chosen)],
    }


def _runs(scheduler: Scheduler, nodes: dict[bytes, Node], now: float) -> list[Told]:
    """All runs of some nodes, each after the one that it goes on from."""
    after: dict[bytes, list[Node]] = {}
    for node in nodes.values():
        after.setdefault(node.parent, []).append(node)
    todo: list[tuple[Node, int | None]] = [
        (node, None) for node in nodes.values() if node.parent not in nodes
    ]
    runs: list[Told] = []
    while todo:
        node, parent = todo.pop()
        run = [node]
        while len(branches := after.get(run[-1].key, ())) == 1:
            run += branches
        todo += [(child, len(runs)) for child in branches]
        runs.append(_run(scheduler, run, len(runs), parent, now))
    for run_told in reversed(runs):  # what comes after a run counts for it, too
        if run_told["parent"] is not None:
            before = runs[run_told["parent"]]
            before["hits"] += run_told["hits"]
            before["tokens_below"] += run_told["tokens_below"]
            before["used_s_ago"] = min(before["used_s_ago"], run_told["used_s_ago"])
            hits = [r["last_hit_s_ago"] for r in (before, run_told)]
            before["last_hit_s_ago"] = min((at for at in hits if at is not None), default=None)
    return runs


def _run(
    scheduler: Scheduler, nodes: list[Node], number: int, parent: int | None, now: float
) -> Told:
    size, first = scheduler.pool.page_size, nodes[0]
    tiers = [_tier(scheduler, node.key) for node in nodes]
    hit_at = max((node.hit_at for node in nodes if node.hit_at is not None), default=None)
    return {
        "run": number,
        "parent": parent,
        "position": first.depth * size,
        "tokens": len(nodes) * size,
        "tokens_below": len(nodes) * size,
        "pages": {name: tiers.count(number) for number, name in _tiers(scheduler)},
        "hits": sum(node.hits for node in nodes),
        "last_hit_s_ago": None if hit_at is None else now - hit_at,
        "used_s_ago": now - max(hit_at or 0.0, *(node.born for node in nodes)),
        "age_s": now - first.born,
        "tenants": sorted(first.tenants),
        "shared": first.key in scheduler.pool.index.shared,
        "salted": first.plain != first.key,
        "first_ids": [token for node in nodes[:SHOWN_PAGES] for token in node.tokens],
    }
