"""The tests of the core must notice when the core is broken on purpose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.mutants
ROOT = Path(__file__).parents[2]
EVICTION = ("test_eviction.py",)
SHARED = ("test_shared.py",)
BOOKS = ("test_page_pool.py", "test_scheduler.py", "test_random_traffic.py")
PROMISES = ("test_hard_cases.py", "test_promises.py", "test_tenant_traffic.py")
DRAFTS = ("test_lookup.py", "test_speculation.py")
HURRY = ("test_cut_in.py", "test_tenant_traffic.py")
SURVIVAL = ("test_resume.py",)
TIERS = ("test_tiers.py", "test_mixed_traffic.py", "test_page_events.py")
TOLD = ("test_views_cache.py",)
EVENTS = ("test_page_events.py",)
PINS = ("test_pins.py",)
PARTS = ("test_page_parts.py", "test_views_cache.py", "test_tiers.py")
LADDER = ("test_controller.py", "test_rungs.py", "test_backlog.py")
GROUPS = ("test_grouping.py",)
STEP_TIME = ("test_step_time.py",)
TALLY = ("test_tally.py",)
SALTS = ("test_salts.py", "test_views_cache.py")
SCORES = ("test_prompt_logprobs.py",)
POOLING = ("test_pooling.py",)
HELPERS = ("traffic.py", "playing.py", "tiers.py")

BROKEN_BOOKS = {
    "reuse every token, leaving none to run": (
        "lifecycle.py",
        "end = seq.num_tokens - 1",
        "end = seq.num_tokens",
    ),
    "publish pages that are not written yet": (
        "lifecycle.py",
        "full = seq.num_computed // self.pool.page_size",
        "full = seq.num_tokens // self.pool.page_size",
    ),
    "forget to give pages back": ("lifecycle.py", "self.pool.release(seq.page_table)", "pass"),
    "keep the phase of a preempted sequence": (
        "lifecycle.py",
        "        seq.phase = Phase.PREFILL\n",
        "",
    ),
    "lose the preempted sequence": (
        "lifecycle.py",
        "        del self.running[seq.id]\n        self.waiting.add(seq)\n",
        "        del self.running[seq.id]\n",
    ),
    "show the pages of before": ("hits.py", "    seq.shown = ()\n", ""),
    "never withdraw a claim": ("lifecycle.py", "self.pool.index.unclaim(", "(lambda *_: None)("),
    "finish one token late": (
        "sequence.py",
        "num_outputs >= self.max_tokens",
        "num_outputs > self.max_tokens",
    ),
    "count the prefix again after a preemption": (
        "lifecycle.py",
        "if seq.admitted_at is None:",
        "if True:",
    ),
    "let somebody overtake the head of the queue": (
        "intake.py",
        "is_full = is_full or reason in FULL",
        "reason = Reason.PREFIX if reason else None",
    ),
    "hash a page without what is before it": (
        "prefix_index.py",
        "blake2b(parent + array",
        "blake2b(array",
    ),
    "hash without the salt": ("prefix_index.py", "blake2b(salt.encode()", 'blake2b(b""'),
    "share a page without counting": (
        "page_pool.py",
        "        for page_id in here:\n            self._ref_counts[page_id] += 1\n",
        "",
    ),
    "share a page that may still be evicted": (
        "page_pool.py",
        "self.cached.remove([page_id for page_id in here if self._ref_counts[page_id] == 0])",
        "pass",
    ),
    "evict and stay listed": ("page_pool.py", "        del self.index.pages[key]\n", ""),
    "evict the head of a chain first": ("page_pool.py", "page_table[::-1]", "page_table[:]"),
    "cover one page too few": ("page_pool.py", "-(-num_tokens //", "(num_tokens //"),
}
BROKEN_EVICTION = {
    "let the smallest owner lose": (
        "eviction.py",
        "return (self.held - self.guaranteed) / self.weight",
        "return (self.guaranteed - self.held) / self.weight",
    ),
    "forget the weights": ("eviction.py", "sum(tenant.weight for tenant in tenants)", "1.0"),
    "take what was guaranteed first": (
        "eviction.py",
        "sum(tenant.quota.pages_guaranteed for tenant in tenants)",
        "0",
    ),
    "count no page that is in use": ("eviction.py", "            owner.held += 1\n", ""),
    "keep stale pages": ("eviction.py", "if len(self._owners) == 1:", "if True:"),
    "evict dirty pages first": (
        "eviction.py",
        "owner.clean or owner.dirty, min",
        "owner.dirty or owner.clean, min",
    ),
    "let go of what was used last": (
        "eviction.py",
        "some = list(islice(pages, left))",
        "some = list(islice(reversed(pages), left))",
    ),
    "spill what would be lost last": (
        "eviction.py",
        "(self.held - len(self.clean) - self.guaranteed)",
        "(self.held - self.guaranteed)",
    ),
    "believe what is listed": (
        "ranking.py",
        "if -entry == level:",
        "if True:",
    ),
    "let a heap grow": ("ranking.py", "2 * len(self._listed) + SPARE_ENTRIES", "10**9"),
    "divide a salt among its tenants": (
        "eviction.py",
        "owner = self._by_salt.get(salt)",
        "owner = None",
    ),
    "know no time": ("scheduler.py", "self.pool.cached.now = now", "pass"),
}
BROKEN_SHARING = {
    "let tenants meet after a shared head": (
        "prefix_index.py",
        "    if before in shared:\n        return blake2b(root_key(salt) + before",
        "    if before in shared:\n        return blake2b(before",
    ),
    "share a page that is not declared": (
        "prefix_index.py",
        "            if key in shared:\n                keys.append(key)",
        "            if True:\n                keys.append(key)",
    ),
    "hang tails of all tenants on one page": (
        "prefix_index.py",
        "    return _own_parent(before, salt, shared)\n\n\ndef _own",
        "    return before or root_key(salt)\n\n\ndef _own",
    ),
    "let whoever computed a shared page own it": (
        "page_pool.py",
        "                self.cached.share(page_id)\n",
        "                pass\n",
    ),
    "evict a shared page like any": ("eviction.py", "owner.guaranteed = LAST", "pass"),
}
BROKEN_PROMISES = {
    "let a share grow with what was missed": (
        "shares.py",
        "max(account.virtual_time, self.virtual_time)",
        "account.virtual_time",
    ),
    "charge everybody alike": ("shares.py", "cost / account.tenant.weight", "cost"),
    "do not charge for pages": ("shares.py", "self._add(account, page_seconds / total)", "pass"),
    "serve who has had most": (
        "policy.py",
        "(accounts[name].lead, name)",
        "(-accounts[name].lead, name)",
    ),
    "give a long prompt the whole step": (
        "policy.py",
        "min(left, left_for_partial)",
        "left",
    ),
    "size no chunk by the targets": ("pace.py", "left == inf", "True"),
    "let the batch outgrow the targets": ("pace.py", "policy.DECODE_PART * itl", "2 * itl"),
    "one more than the quota": (
        "intake.py",
        "account.live >= quota.live_sequences",
        "account.live > quota.live_sequences",
    ),
    "lend guaranteed pages for good": (
        "preemption.py",
        "account.pages + need <= account.tenant.quota.pages_guaranteed",
        "False",
    ),
    "take what was guaranteed": (
        "preemption.py",
        "if guaranteed else 0.0",
        "if False else 0.0",
    ),
    "never take a place back": (
        "preemption.py",
        "self._preempt(others, Reason.OVER_SHARE, now)",
        "False",
    ),
    "let whoever has no room stop the others": (
        "intake.py",
        "is_full = is_full or reason in FULL",
        "queues = {} if reason in FULL else queues",
    ),
    "count no cached prefix in a forecast": (
        "forecast.py",
        "seq.num_pending - cached",
        "seq.num_pending - 0 * cached",
    ),
    "take a limit for a length": (
        "shares.py",
        "account.runs_full += gain",
        "account.runs_full += 0 * gain",
    ),
    "divide shared pages by their number": ("page_pool.py", "1 / self._ref_counts[page_id]", "1"),
    "let a deadline pass": ("deadlines.py", "self._heap[0][0] <= now", "False"),
    "admit what will be late": ("admission.py", "policy.SAFETY * target)", "9e9)"),
    "keep no place for who was told to come back": (
        "bookings.py",
        "total += booking.amount",
        "pass",
    ),
    "never refill a quota": (
        "shares.py",
        "self.level + (now - self.updated)",
        "self.level + 0 * (now - self.updated)",
    ),
}
BROKEN_DRAFTS = {
    "take a whole draft for right": ("batch.py", "if token != guess:", "if False:"),
    "settle what was not verified": (
        "lifecycle.py",
        "seq.phase, seq.num_computed = Phase.DECODE, len(seq.tokens) - 1",
        "seq.phase = Phase.DECODE\n"
        "            seq.num_computed = max(seq.num_tokens - 1, work.position + work.draft_len)",
    ),
    "draft beyond the last token": (
        "speculation.py",
        "seq.max_tokens - num_outputs - 1",
        "seq.max_tokens",
    ),
    "draft beyond min_tokens": (
        "speculation.py",
        "if num_outputs < request.min_tokens",
        "if False",
    ),
    "draft beyond a stop token": ("speculation.py", "if token in stops", "if False"),
    "draft where history counts": (
        "speculation.py",
        "seq.request.sampling.needs_history or",
        "",
    ),
    "take others' pages for a draft": (
        "speculation.py",
        "left >= len(self.life.running) and",
        "left >= 0 and",
    ),
    "take pages beyond a quota for a draft": (
        "speculation.py",
        "burst is None or",
        "True or",
    ),
    "draft more than the pages hold": (
        "speculation.py",
        "end = min(end, self._room(seq, end, now))",
        "self._room(seq, end, now)",
    ),
    "keep no account of losses": ("speculation.py", "self.credit > 0 and", ""),
    "draft whatever it costs": (
        "speculation.py",
        "LEAST_RETURN * (seconds - alone)",
        "0.0",
    ),
    "forget the promised gaps": ("speculation.py", "and seconds <= allowed", ""),
    "learn nothing from wrong guesses": (
        "lookup.py",
        "gain * (is_right - rates[matched])",
        "gain * (1.0 - rates[matched])",
    ),
    "take the first match for the longest": ("lookup.py", "if length > best:", "if best < 2:"),
    "lose the thread at a replaced word": ("lookup.py", "self.matched = SLIP", "pass"),
    "forecast one token a step": (
        "shares.py",
        "self.outputs(seq) / self.tokens_per_step",
        "self.outputs(seq)",
    ),
    "let nobody pay for a draft": (
        "step_shape.py",
        "                drafts += count - 1",
        "                drafts += 0",
    ),
}
BROKEN_HURRY = {
    "let nobody go ahead": (
        "intake.py",
        "if may_go_ahead else Prompts([])",
        "if False else Prompts([])",
    ),
    "let prompts go ahead all the time": ("scheduler.py", "and not self._went_ahead", ""),
    "go ahead whatever the tenant has had": (
        "policy.py",
        "account.lead <= accounts[name].lead for name in names",
        "True for name in names",
    ),
    "go ahead whoever decodes": (
        "pace.py",
        "left = policy.time_left(decoding, now) - self.cost.predict(shape_of(decoding))",
        "left = inf",
    ),
    "cut in whoever decodes": (
        "cut_in.py",
        "policy.time_left(inside, now) - left,",
        "inf,",
    ),
    "hold a step for ever": (
        "bill.py",
        "return self.step.predicted_seconds - self.before",
        "return 9e9",
    ),
    "preempt while a step is held": (
        "intake.py",
        "seq, account, now, may_preempt=False",
        "seq, account, now",
    ),
    "take the time of others for a step's own": (
        "bill.py",
        "self.step = step._replace(began=step.began + now - since)",
        "self.step = step",
    ),
    "cancel while a step is held": (
        "loop.py",
        "            if newcomers := self._newcomers():",
        "            for command in [c for c in self._postponed if isinstance(c, Cancel)]:\n"
        "                self._obey(command)\n"
        "            if newcomers := self._newcomers():",
    ),
    "cut in past the end": ("loop.py", "isinstance(command, Configure | Stop)", "False"),
    "swallow what went wrong": (
        "loop.py",
        "            raise self._failure\n",
        "            pass\n",
    ),
}
BROKEN_SURVIVAL = {
    "forget the tokens that were": ("sequence.py", "self.tokens += done.token_ids", "pass"),
    "tell a first token twice": (
        "sequence.py",
        "self.first_token_at = self.admitted_at",
        "self.admitted_at",
    ),
    "refuse who was accepted": (
        "scheduler.py",
        "        seq.resume(done, now)\n",
        "        seq.resume(done, now)\n        assert self.admission.refuse(seq, now) is None\n",
    ),
    "suspect nobody": ("quarantine.py", "if not (seq.is_suspect and is_live):", "if True:"),
    "suspect for ever": (
        "lifecycle.py",
        "seq.last_token_at, seq.is_suspect = now, False",
        "seq.last_token_at = now",
    ),
    "run others beside a suspect": (
        "scheduler.py",
        "return self._batch([], {}, [suspect], now)",
        "return self._batch(self._in(Phase.DECODE), {}, [suspect], now)",
    ),
    "fail the half of the culprit": (
        "rescue.py",
        "                todo[:0] = _halves(part)\n",
        "                outputs += [_failure(work, found) for work in part]\n",
    ),
    "run a broken engine again": (
        "rescue.py",
        "        except EngineBroken:\n            raise\n        except Exception as error:\n",
        "        except Exception as error:\n",
    ),
    "learn from a step that was run again": (
        "bill.py",
        "if self.is_smooth and Finish.ERROR not in",
        "if Finish.ERROR not in",
    ),
    "go on with an engine with which nothing works": (
        "rescue.py",
        "            raise error\n        return outputs",
        "            pass\n        return outputs",
    ),
    "lose the record of the held step": (
        "flight.py",
        "        self._write(activity, since + held, predicted, ids)\n",
        "        self._write(activity, since, 0.0, b'')\n",
    ),
}
BROKEN_LADDER = {
    "take every rung at once": ("controller.py", "if now < self._settled_at:", "if False:"),
    "take the next rung though it gets better": (
        "controller.py",
        "score > self._reading[1] + GAIN",
        "False",
    ),
    "never undo a rung": (
        "controller.py",
        "now - max(self.good_since, self._changed_at) >= state.calm",
        "False",
    ),
    "undo a rung at once": (
        "controller.py",
        "now - max(self.good_since, self._changed_at) >= state.calm",
        "True",
    ),
    "learn nothing from a relapse": (
        "controller.py",
        "min(2 * state.calm, MOST_CALM * state.rung.calm)",
        "state.rung.calm",
    ),
    "undo though a backlog waits": (
        "controller.py",
        "state.is_held = seen.has_backlog and self._is_needed(state, now)",
        "state.is_held = False",
    ),
    "hold though there is no backlog": (
        "controller.py",
        "state.is_held = seen.has_backlog and self._is_needed(state, now)",
        "state.is_held = self._is_needed(state, now)",
    ),
    "blame no undo": (
        "controller.py",
        "return self.states[last.rung] if is_its else None",
        "return None",
    ),
    "try again as soon as ever": (
        "controller.py",
        "state.hold = min(max(HOLD_SECONDS, 2 * state.hold), MOST_HOLD)",
        "state.hold = HOLD_SECONDS",
    ),
    "foresee what is and not what would be": (
        "controller.py",
        "state.rung.apply(self.restraint, state.level - 1)",
        "pass",
    ),
    "take one good moment for calm": (
        "controller.py",
        "return self._num_clear < CLEAR_LOOKS",
        "return self._num_clear < 1",
    ),
    "foresee an empty house": (
        "outlook.py",
        "beside = [0.0], self._let_in()",
        "beside = [0.0], []",
    ),
    "leave a window as it was tried": (
        "controller.py",
        "self.restraint.take_over(as_is)",
        "pass",
    ),
    "keep a backlog out as long as it stands": (
        "outlook.py",
        "self.restraint.batch_window, self._since = window / 2, now",
        "self._since = now",
    ),
    "let it in again as fast at once": (
        "outlook.py",
        "self._least = min(2 * window, BATCH_WINDOW)",
        "pass",
    ),
    "foresee jobs before whoever goes past them": (
        "forecast.py",
        "self.intake.brake.lets_pass(self.seq)",
        "False",
    ),
    "undo what is pinned": (
        "controller.py",
        "(s for s in reversed(self._taken) if s.mode is Mode.AUTO and s.rung.has_undo)",
        "reversed(self._taken)",
    ),
    "sleep while a rung is to be undone": (
        "scheduler.py",
        "look_at = self.controller.wake_at()",
        "look_at = None",
    ),
    "take a bad second for trouble": (
        "evidence.py",
        "bool(rises) and self._shots[rises[-1]].at - self._shots[rises[0]].at >= LASTING",
        "bool(rises)",
    ),
    "take a full pool for trouble": (
        "evidence.py",
        "return is_much and self._lasts([shot.preemptions for shot in self._shots])",
        "return seen.pages >= FULL",
    ),
    "answer for a tenant's own quota": (
        "tally.py",
        "return is_behind or any(reason in waits for reason in OWN_QUOTA)",
        "return False",
    ),
    "overlook who was refused": (
        "admission.py",
        "self.life.tally.refuse(seq)",
        "pass",
    ),
    "act where nobody was promised anything": (
        "tenant.py",
        "and self.name != NOBODY",
        "",
    ),
    "let nobody pass who is kept back": (
        "intake.py",
        "(Reason.PREFIX, Reason.WIDEN_WINDOW, Reason.CAP_BATCH, Reason.SPILL)",
        "(Reason.PREFIX,)",
    ),
    "let a backlog hide who is behind it": (
        "intake.py",
        "life.waiting.scan(name, SCAN_LIMIT)",
        "life.waiting.first(name, SCAN_LIMIT)",
    ),
    "overlook who waits behind a backlog": (
        "evidence.py",
        "waiting.scan(name, HEADS)",
        "waiting.first(name, HEADS)",
    ),
    "make up for what was missed": (
        "shares.py",
        "max(account.virtual_time, min(others, default=-inf))",
        "account.virtual_time",
    ),
    "shed whoever comes": (
        "admission.py",
        "if not restraint.sheds_batch or not seq.promise.is_batch:",
        "if not restraint.sheds_batch:",
    ),
    "cut what somebody asked for": (
        "ladder.py",
        "if is_capped and request.is_open_ended and seq.promise.is_batch:",
        "if is_capped and seq.promise.is_batch:",
    ),
    "cut whoever comes": (
        "ladder.py",
        "if is_capped and request.is_open_ended and seq.promise.is_batch:",
        "if is_capped and request.is_open_ended:",
    ),
    "cut what has begun": ("ladder.py", "if seq.admitted_at is None:", "if True:"),
    "tell nobody of a cut": (
        "lifecycle.py",
        "seq.first(event)._replace(max_tokens=seq.cut_to)",
        "seq.first(event)",
    ),
    "take a cut for a length": (
        "sequence.py",
        "finish is Finish.LENGTH and self.cut_to is None",
        "finish is Finish.LENGTH",
    ),
    "forecast all the room there is": (
        "forecast.py",
        "self.intake.brake.bound(seq)",
        "pass",
    ),
    "change engines all the time": (
        "controller.py",
        "now - self._began < ENGINE_SECONDS",
        "False",
    ),
    "start again though nothing is slow": (
        "ladder.py",
        "(seen.slowdown or 0.0) >= SLOW",
        "True",
    ),
    "start again and again": ("controller.py", "now - state.left_at < RESTART_SECONDS", "False"),
    "switch to weights that are not there": ("controller.py", "and state.is_possible and", "and"),
    "undo what has no undo": ("controller.py", "and s.rung.has_undo", ""),
    "forget with an engine what is taken": (
        "controller.py",
        "self._taken = [state for state in taken if state.level]",
        "pass",
    ),
    "forget with an engine what is held back": (
        "controller.py",
        "            state.rung.apply(self.restraint, state.level)\n",
        "",
    ),
    "tell the same news again": (
        "controller.py",
        "has_news, self.has_news = self.has_news, False",
        "has_news = self.has_news",
    ),
    "come again before the weights are back": (
        "controller.py",
        "sum(s.calm for s in later)",
        "10.0",
    ),
    "take slow steps for usual": (
        "wear.py",
        "if (latest if is_new else times) < STEADY:",
        "if True:",
    ),
    "compare what was never measured": (
        "wear.py",
        "if is_new or any(map(gt, shape, most)):",
        "if is_new:",
    ),
    "get used to slow steps": (
        "wear.py",
        "self._recent.append((now, times))",
        "self._recent.append((now, times)), self._cost.observe(shape, seconds)",
    ),
    "tell everybody to come again at once": (
        "admission.py",
        "max(restraint.sheds_until, now + seen.first_token, now + MIN_WAIT)",
        "now",
    ),
}

BROKEN_ANSWERS = {
    "tell operators of who has nothing": (
        "views_cache.py",
        "if keys and keys[-1] not in",
        "if not keys or keys[-1] not in",
    ),
    "tell a tenant what others have sent": (
        "prefix_tree.py",
        "            if tenant in node.tenants:\n",
        "            if True:\n",
    ),
    "tell a tenant how others go on": (
        "views_cache.py",
        "        if tenant in child.tenants:\n",
        "        if True:\n",
    ),
    "tell a tenant what others have lost": (
        "views_cache.py",
        "lost is None or tenant not in lost.tenants",
        "lost is None",
    ),
    "tell a tenant what others compute": (
        "views_cache.py",
        "maker is not None and maker.request.tenant == tenant",
        "maker is not None",
    ),
    "remember every page that is gone": ("prefix_tree.py", "len(self.lost) > MOST_LOST", "False"),
    "know pages that are gone": (
        "page_pool.py",
        "            self.tree.lose(key)\n",
        "            pass\n",
    ),
    "blame who has lost it": (
        "prefix_tree.py",
        "Lost(now, tenants, node.tenants)",
        "Lost(now, node.tenants, node.tenants)",
    ),
    "forget the hits of a tail": ("prefix_tree.py", "parent.hits += node.hits", "pass"),
}
BROKEN_TIERS = {
    "run before the pages are there": (
        "intake.py",
        "seq.phase is Phase.PREFILL and seq.restoring is None",
        "seq.phase is Phase.PREFILL",
    ),
    "let go of a page that is still being copied": (
        "flights.py",
        "            self._books(place).hold(place.slot)\n",
        "            self._books(place)\n",
    ),
    "publish what could not be copied": (
        "spill.py",
        "        if not result.error:\n",
        "        if True:\n",
    ),
    "list what could not be copied": (
        "spill.py",
        "            tier.give_back(copy.target.slot)\n",
        "            tier.settle(key, copy.target.slot)\n",
    ),
    "believe a page below that is gone": (
        "spill.py",
        "        if gone is not None:\n            self._is_gone(gone)\n",
        "",
    ),
    "use a slot again while it is read": ("tiers.py", "if slot not in self._holders:", "if True:"),
    "forget a slot that nobody can read": (
        "tiers.py",
        "        self._free.append(slot)\n\n    def adopt",
        "\n    def adopt",
    ),
    "admit a suspect without room": (
        "quarantine.py",
        "        if not self.intake.has_room(seq):\n            return False\n",
        "",
    ),
    "keep a claim on what was not restored": (
        "lifecycle.py",
        "begin = 0 if seq.restoring else seq.num_sealed",
        "begin = seq.num_sealed",
    ),
    "wait for a slow page for ever": ("spill.py", " or now > r.until", ""),
    "count a head that did not come": (
        "hits.py",
        "    else:\n        add(life, seq, seq.num_computed)",
        "    add(life, seq, seq.num_computed)",
    ),
    "restore what is sooner computed": (
        "spill.py",
        "return restoring < computing",
        "return 0.0 < computing",
    ),
    "spill though there is room": (
        "spill.py",
        "if ready < LOW or (is_idle and tier.number == HOST):",
        "if True:",
    ),
}

BROKEN_EVENTS = {
    "tell nobody what was evicted": ("page_pool.py", "self.events.changed(key)", "pass"),
    "tell nobody what came back": (
        "spill.py",
        "self.pool.events.sealed(seq.page_keys, seq.tokens, [place])",
        "pass",
    ),
    "tell nobody what a tier has": (
        "spill.py",
        "                upper.clean(key)\n        if self.pool.events is not None:",
        "                upper.clean(key)\n        if False:",
    ),
    "tell nobody what a tier has lost": (
        "spill.py",
        "                upper.soil(key)\n        if self.pool.events is not None:",
        "                upper.soil(key)\n        if False:",
    ),
    "tell of the tokens one page on": (
        "page_events.py",
        "token_ids[i * size : (i + 1) * size]",
        "token_ids[i * size + 1 : (i + 1) * size + 1]",
    ),
    "tell of pages without their heads": (
        "page_events.py",
        "if self._is_reachable(node) else",
        "or",
    ),
    "leave the tail of what is gone": (
        "page_events.py",
        "todo += self._children.get(key, ())",
        "pass",
    ),
    "lose what does not fit": (
        "page_events.py",
        "            self._begins_anew = True\n        if",
        "            self._waiting.clear()\n        if",
    ),
    "tell anew without forgetting": ("page_events.py", "[Cleared(), *parents", "[*parents"),
    "tell of children first": ("page_events.py", "in reversed(chain)", "in chain"),
}

BROKEN_PINS = {
    "let pinned pages go": (
        "pins.py",
        "            self.pool.hold(page_id)\n",
        "            pass\n",
    ),
    "pin what the longest request needs": (
        "pins.py",
        "sum(held.values()) > self.rules.most:",
        "False:",
    ),
    "pin what is guaranteed to others": (
        "pins.py",
        "min(self.rules.common, num_pages - sum(guarantees.values()))",
        "self.rules.common",
    ),
    "count the same pages twice": (
        "pins.py",
        "len({*self._keys.get(tenant, ()), *keys})",
        "sum(self._keys.get(tenant, {}).values()) + len(keys)",
    ),
    "never let a pin end": ("pins.py", "if pinned.until <= now", "if False"),
    "see an end only after the next claim": ("pins.py", "        self.expire(now)\n", ""),
    "keep a claim on what was not computed": (
        "pins.py",
        "            self.release(seq.id)\n            return []",
        "            return []",
    ),
    "charge nobody for pins": ("bill.py", ", *self.life.pins.by_id.values()]", "]"),
    "let pins and sequences have a burst each": (
        "intake.py",
        "        held.update(self.life.pins.pages_of(name))\n",
        "",
    ),
    "count those who pin as hits": ("pins.py", " or seq.request.pinned_until is not None", ""),
}

BROKEN_PARTS = {
    "part: copy every token, leaving none to run": (
        "page_parts.py",
        "num_pages, seq.num_tokens - 1)",
        "num_pages, seq.num_tokens)",
    ),
    "part: copy what another tenant has sent": (
        "page_parts.py",
        " and chain.tenant in node.tenants",
        "",
    ),
    "part: copy from pages that are not on the device": (
        "page_parts.py",
        "if page_id is not None and",
        "page_id = page_id or 0\n            if",
    ),
    "part: copy from a page that may be evicted": (
        "page_parts.py",
        "            pool.hold(part.page_id)\n",
        "",
    ),
    "part: hold the page for as long as it runs": (
        "lifecycle.py",
        "            self.parts.let_go(seq)\n        tokens, finish",
        "            pass\n        tokens, finish",
    ),
    "part: hold the page of who has left": (
        "lifecycle.py",
        "        self.parts.let_go(seq)\n        self.pool.release",
        "        self.pool.release",
    ),
    "part: hold a page that somebody needs": (
        "page_parts.py",
        "if pool.num_idle <= pool.pages_for(seq.num_tokens) - num_pages + len(running):",
        "if False:",
    ),
    "part: copy whatever it takes": (
        "page_parts.py",
        "self.copy_seconds <= computing",
        "True",
    ),
    "part: copy a token or two": ("page_parts.py", "wanted, self.least):", "wanted, 1):"),
    "part: hide from the engine what was copied": (
        "page_parts.py",
        "            seq.num_unseen = seq.num_computed\n",
        "",
    ),
    "part: let suspects copy": ("page_parts.py", "if seq.is_suspect or ", "if "),
    "part: copy one token too few": ("batch.py", "place], num_tokens)", "place], num_tokens - 1)"),
    "part: copy while pages are restored": (
        "hits.py",
        "    else:\n        life.parts.take",
        "    if True:\n        life.parts.take",
    ),
    "part: count no copies": ("hits.py", "life.parts.num_copied += ", "_ = "),
    "part: take the first page that begins alike": (
        "prefix_tree.py",
        "            if before > after:\n",
        "            if before:\n",
    ),
    "part: think one token more is the same": (
        "prefix_tree.py",
        "(differs.bit_length() + 7) // 8",
        "differs.bit_length() // 8",
    ),
    "part: keep what is gone in the order": (
        "prefix_tree.py",
        "            del by_tokens[",
        "            by_tokens[",
    ),
    "part: explain what is below twice": (
        "views_cache.py",
        "copied if len(found) == len(tiers) else 0",
        "copied",
    ),
    "part: explain a copy away": (
        "views_cache.py",
        "if None in found else _copied",
        "if True else _copied",
    ),
    "part: call what differs too short": (
        "views_cache.py",
        "if is_last and (not ends.in_part or same >= left):",
        "if is_last:",
    ),
}

BROKEN_GROUPS = {
    "run no group together": ("waiting.py", "if seq.request.group:", "if False:"),
    "let a group go before anybody": ("waiting.py", "if other.turn < earliest:", "if False:"),
    "let a group pass who was promised more": (
        "waiting.py",
        "if other.promise.strict or other.promise.ttft < seq.promise.ttft:",
        "if False:",
    ),
    "let a group pass who has a lower priority number": (
        "waiting.py",
        "if other.request.priority < seq.request.priority:",
        "if False:",
    ),
    "see batch-class and other requests apart": (
        "waiting.py",
        "for queue in self._by_tenant[seq.request.tenant]:\n            at",
        "for queue in [self._by_tenant[seq.request.tenant][seq.promise.is_batch]]:\n            at",
    ),
    "group what has nothing in common": (
        "waiting.py",
        "(other.request.group, other.request.salt) == (seq.request.group, seq.request.salt)",
        "other.request.group == seq.request.group",
    ),
    "look for a group from the turn that it had": (
        "waiting.py",
        "(seq.due, seq.ordinal), key=place)\n            near",
        "place(seq), key=place)\n            near",
    ),
}

BROKEN_SALTS = {
    "salt: make every salt of a client an owner": (
        "sequence.py",
        "plain_salt(self.request.salt)",
        "self.request.salt",
    ),
    "salt: tell of what another tenant has set apart": (
        "prefix_tree.py",
        "any(tenant in node.tenants for node",
        "any(True for node",
    ),
    "salt: keep what is gone": ("prefix_tree.py", "del self.salted[node.plain][key]", "pass"),
    "salt: know what is apart from its first page only": (
        "prefix_tree.py",
        "return before.plain",
        "return before.key",
    ),
    "salt: lose it after a shared head": (
        "prefix_tree.py",
        "if before is None or before.key in self.shared:",
        "if before is None:",
    ),
    "salt: tell of a difference first": ("views_cache.py", "    if apart:\n", "    if False:\n"),
    "salt: tell operators of what is not set apart only": (
        "views_cache.py",
        " and keys[-1] not in pool.tree.salted",
        "",
    ),
}

BROKEN_SCORES = {
    "score what is cached": (
        "sequence.py",
        "return self.scores if pooling is None",
        "return False if pooling is None",
    ),
    "tell of a prompt what was lost with its pages": (
        "hits.py",
        "    seq.prompt_logprobs = ()",
        "    pass",
    ),
    "score each token by its own logits": (
        "batch.py",
        "[self.position + 1 :]",
        "[self.position :]",
    ),
    "throw scores of a chunk away": ("lifecycle.py", "seq.prompt_logprobs += ", "_ = "),
}

BROKEN_POOLING = {
    "build a mean on what is cached": ("request.py", 'return self.kind != "last"', "return False"),
    "copy part of a page for a mean": (
        "page_parts.py",
        "if seq.is_suspect or seq.is_read_whole:",
        "if seq.is_suspect:",
    ),
    "lose the vector": ("lifecycle.py", "artifact=last.artifact", "artifact=None"),
    "count no vector as a first token": (
        "lifecycle.py",
        "if tokens or out.artifact is not None:",
        "if tokens:",
    ),
    "learn from vectors how long answers are": (
        "sequence.py",
        "or self.request.pooling is not None:",
        "or False:",
    ),
    "cut what has to be whole": ("intake.py", "if not self.limits.whole_prompts:", "if True:"),
    "share a step where prompts are whole": (
        "intake.py",
        "parts = pending if self.limits.whole_prompts else",
        "parts =",
    ),
    "cut a suspect that has to be whole": (
        "quarantine.py",
        "if not limits.whole_prompts:",
        "if True:",
    ),
}

BROKEN_STEP_TIME = {
    "let prompts make a step any length": (
        "pace.py",
        "seconds = min(usual, promised)",
        "seconds = promised",
    ),
    "hardly read prompts on a slow machine": ("policy.py", "STRETCH = 4.0", "STRETCH = 1.5"),
    "shrink the tokens and not the time": (
        "pace.py",
        "return needed + part * (most - needed) if part < 1.0 else most",
        "return most",
    ),
    "foresee prompts in the largest chunks": (
        "pace.py",
        "left = self._usual_seconds(needed, is_decoding)",
        "left = inf",
    ),
}

BROKEN_TALLY = {
    "take a late first token for one in time": (
        "tally.py",
        "[TTFT_KEPT + (now - seq.request.arrival > promise.ttft)]",
        "[TTFT_KEPT]",
    ),
    "take a late gap for one in time": (
        "tally.py",
        "[ITL_KEPT + (now - seq.last_token_at > promise.itl)]",
        "[ITL_KEPT]",
    ),
    "overlook who never had a token": ("lifecycle.py", "self.tally.end(seq, finish, now)", "pass"),
    "take who left in time for one who was let down": (
        "tally.py",
        "is_late = finish is Finish.ERROR or now - seq.request.arrival > seq.promise.ttft",
        "is_late = True",
    ),
    "overlook pauses for another engine": (
        "scheduler.py",
        "self.life.tally.pause(seq, away)",
        "pass",
    ),
    "answer for readers who were away": (
        "scheduler.py",
        "if not seq.was_left:",
        "if True:",
    ),
    "answer for readers who left before the first token": (
        "tally.py",
        " or seq.was_left:",
        ":",
    ),
    "promise something to prefixes": (
        "sequence.py",
        "promise.is_promised and request.pinned_until is None",
        "promise.is_promised",
    ),
    "answer for who is refused behind others": (
        "tally.py",
        "if seq.is_watched and not seq.request.priority:",
        "if seq.is_watched:",
    ),
}

MUTANTS = {
    **{name: (BOOKS, mutant) for name, mutant in BROKEN_BOOKS.items()},
    **{name: (SHARED, mutant) for name, mutant in BROKEN_SHARING.items()},
    **{name: (EVICTION, mutant) for name, mutant in BROKEN_EVICTION.items()},
    **{name: (PROMISES, mutant) for name, mutant in BROKEN_PROMISES.items()},
    **{name: (DRAFTS, mutant) for name, mutant in BROKEN_DRAFTS.items()},
    **{name: (HURRY, mutant) for name, mutant in BROKEN_HURRY.items()},
    **{name: (SURVIVAL, mutant) for name, mutant in BROKEN_SURVIVAL.items()},
    **{name: (LADDER, mutant) for name, mutant in BROKEN_LADDER.items()},
    **{name: (TIERS, mutant) for name, mutant in BROKEN_TIERS.items()},
    **{name: (EVENTS, mutant) for name, mutant in BROKEN_EVENTS.items()},
    **{name: (PINS, mutant) for name, mutant in BROKEN_PINS.items()},
    **{name: (PARTS, mutant) for name, mutant in BROKEN_PARTS.items()},
    **{name: (TOLD, mutant) for name, mutant in BROKEN_ANSWERS.items()},
    **{name: (GROUPS, mutant) for name, mutant in BROKEN_GROUPS.items()},
    **{name: (STEP_TIME, mutant) for name, mutant in BROKEN_STEP_TIME.items()},
    **{name: (TALLY, mutant) for name, mutant in BROKEN_TALLY.items()},
    **{name: (SALTS, mutant) for name, mutant in BROKEN_SALTS.items()},
    **{name: (SCORES, mutant) for name, mutant in BROKEN_SCORES.items()},
    **{name: (POOLING, mutant) for name, mutant in BROKEN_POOLING.items()},
}


def run_suite(folder: Path, suite: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    files = [f"tests/core/{name}" for name in suite]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )


def copied(folder: Path) -> Path:
    """The core, the fake engine and the suite, on their own."""
    package = folder / "dynamo_serve"
    shutil.copytree(ROOT / "dynamo_serve" / "core", package / "core")
    (package / "engines").mkdir()
    for name in ("fake.py", "fake_pooling.py"):
        shutil.copy(ROOT / "dynamo_serve" / "engines" / name, package / "engines")
    suite = folder / "tests" / "core"
    suite.mkdir(parents=True)
    for file in (package, package / "engines", suite.parent, suite):
        (file / "__init__.py").touch()
    suites = {files for files, _ in MUTANTS.values()}
    for name in {file for files in suites for file in files} | {*HELPERS}:
        shutil.copy(ROOT / "tests" / "core" / name, suite)
    return folder


def judged(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the suite says of a mutant."""
    suite, (file, old, new) = MUTANTS[name]
    path = copied(folder) / "dynamo_serve" / "core" / file
    source = path.read_text()
    assert old in source, "the mutation no longer applies: bring it up to date"
    path.write_text(source.replace(old, new))
    return run_suite(folder, suite)


@pytest.fixture(scope="module")
def verdicts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Of every mutant that was asked for, as many at a time as there are cores."""
    names = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_a_mutant_is_noticed"
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(judged, name, tmp_path_factory.mktemp("mutant")) for name in names}
        pool.shutdown(cancel_futures=True)


def test_the_unchanged_core_passes(tmp_path: Path) -> None:
    result = run_suite(copied(tmp_path), BOOKS + PROMISES + DRAFTS + HURRY[:1] + SURVIVAL)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(
    name: str, verdicts: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    result = verdicts[name].result()
    assert result.returncode == 1, f"nobody noticed: {name}\n{result.stdout}"
