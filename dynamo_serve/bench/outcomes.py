"""What became of a call: from the answer as it came to its record."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

from dynamo_serve.bench import answers
from dynamo_serve.bench.answers import REFUSALS
from dynamo_serve.bench.client import Answer
from dynamo_serve.bench.plan import Call
from dynamo_serve.bench.record import Record, Run

STORM_S = 0.01  # between the attempts of who does not obey: no client is faster than its network
BACKOFF_S, BACKOFF_MAX_S = 0.5, 30.0  # of who obeys, where the server names no time


def pause(record: Record, retry: str, attempt: int) -> float:
    """Seconds until who was refused comes again."""
    if retry == "storm":
        return STORM_S
    if record.retry_after is not None:
        return record.retry_after
    return float(min(BACKOFF_MAX_S, BACKOFF_S * 2 ** (attempt - 1)))


def record_of(
    answer: Answer, said: answers.Said, call: Call, blank: Record, began: float
) -> Record:
    """The record of an attempt that is over."""
    choices, usage = said.by_choice.values(), said.usage
    is_slow = call.behaviour.bytes_per_s is not None  # its gaps are its own, not the server's
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    outcome, error = _outcome(answer, said, call)
    return replace(
        blank,
        outcome=outcome,
        error=error,
        status=answer.status,
        prompt_tokens=usage.get("prompt_tokens") or blank.prompt_tokens,
        output_tokens=usage.get("completion_tokens") or said.num_pieces,
        cached_tokens=details.get("cached_tokens") or 0,
        choices=max(1, len(choices)),
        first=min(times[0] for times in choices) - began if choices else None,
        gaps=()
        if is_slow
        else tuple(round(b - a, 6) for times in choices for a, b in itertools.pairwise(times)),
        end=answer.end - began,
        finish=said.finish,
        retry_after=answers.retry_after(answer),
        server=answers.server_times(said.explain),
    )


def _outcome(answer: Answer, said: answers.Said, call: Call) -> tuple[str, str]:
    if answer.has_left:
        return "cancelled", ""
    if answer.status in REFUSALS:
        return "refused", said.error
    if answer.status != 200:
        return "failed", said.error or answer.error or f"HTTP {answer.status}"
    if error := answers.failure(answer, said, call.is_stream):
        return "failed", error
    if said.finish == "deadline":  # the caller's own, or one that he had not asked for
        return ("failed" if call.deadline is None else "cancelled"), "its deadline had come"
    return "ok", ""


def nothing_answered(run: Run) -> str:
    """Why a run says nothing of a server, or empty. Clients that left by their own will were on
    their way to an answer."""
    load = [record for record in run.records if record.kind != "probe"]
    if any(record.outcome in ("ok", "cancelled") for record in load):
        return ""
    if not load:
        return "no request was sent"
    (most, _), *_ = Counter(record.error or record.outcome for record in load).most_common()
    return f"none of {len(load)} requests was answered; most often: {most}"
