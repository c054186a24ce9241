"""What a simulation takes from a trace: its traffic, its steps, what it was recorded on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo_serve import trace
from dynamo_serve.bench.record import Record, Run
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.core.tiers import TierSpec
from dynamo_serve.errors import ConfigError
from dynamo_serve.json_lines import is_count
from dynamo_serve.simulate.clients import Client, clients_of, was_scheduled
from dynamo_serve.simulate.texts import OWN
from dynamo_serve.trace import MOST_TOKENS, Arrival, Header, Step

OUTCOMES = {"stop": "ok", "length": "ok", "cancelled": "cancelled", "refused": "refused"}


@dataclass(frozen=True, slots=True)
class Recording:
    """One or several parts of a recording. `left_out`: arrivals that no scheduler has seen."""

    header: Header
    arrivals: list[Arrival]
    steps: list[Step]
    left_out: int = 0

    @property
    def has_drafts(self) -> bool:
        return any(step.shape[5] for step in self.steps)

    def clients(self) -> list[Client]:
        """Fresh ones: each simulation needs its own."""
        return clients_of(self.arrivals)

    def run(self) -> Run:
        """What was recorded, as clients saw it but for the gaps between tokens."""
        records = [_record(client) for client in self.clients()]
        return Run({"command": "record", "loop": "open"}, duration(records), records)


def read(paths: Sequence[Path]) -> Recording:
    """Raises `ConfigError` for what is no trace, or makes no sense."""
    headers, arrivals, steps = [], [], []
    for path in paths:
        try:
            header, lines = trace.read(path)
            headers.append(header)
            for line in lines:
                if isinstance(line, Step):
                    steps.append(_checked_step(line, path))
                else:
                    arrivals.append(_checked(line, header, path))
        except OSError as error:
            raise ConfigError(f"{path}: cannot read this file: {error.strerror}") from None
    if any(header.began_at != headers[0].began_at for header in headers):
        raise ConfigError(f"{paths[-1]}: not of the same recording as {paths[0]}")
    seen = [arrival for arrival in arrivals if was_scheduled(arrival)]
    if not seen:
        raise ConfigError(f"{paths[0]}: nobody asks for anything in this trace")
    steps.sort(key=lambda step: step.at)
    return Recording(headers[0], seen, steps, len(arrivals) - len(seen))


def _checked(arrival: Arrival, header: Header, path: Path) -> Arrival:
    where = f"{path}: the request at {arrival.at:g} s"
    pages = sum(count for _, count in arrival.pages)
    if pages * header.page_size > arrival.prompt_tokens:
        raise ConfigError(
            f"{where} has {pages} full pages in {arrival.prompt_tokens} prompt tokens"
        )
    runs = (*arrival.pages, *arrival.output_pages)
    if any(
        first < 0 or count < 1 or (first + count) * header.page_size > OWN for first, count in runs
    ):
        raise ConfigError(f"{where} has a page number below 0 or too large, or an empty run")
    return arrival


def _checked_step(step: Step, path: Path) -> Step:
    if len(step.shape) != 6:
        raise ConfigError(f"{path}: the step at {step.at:g} s has {len(step.shape)} numbers, not 6")
    return step


def _record(client: Client) -> Record:
    first, last = client.asked, client.tries[-1]
    begin = None if last.first_token is None else last.at + last.first_token
    return Record(
        number=client.number,
        due=first.at,
        sent=first.at,
        outcome=OUTCOMES.get(last.ended, "failed"),
        status=last.status,
        tenant=last.tenant,
        class_name=last.class_name,
        prompt_tokens=last.prompt_tokens,
        output_tokens=last.output_tokens,
        cached_tokens=last.cached_tokens,
        first=begin,
        end=None if last.end is None else last.at + last.end,
        finish=last.ended,
        attempts=len(client.tries),
        retry_after=last.retry_after,
    )


def duration(records: Sequence[Record]) -> float:
    """From the first request to the last end."""
    ends = [record.end for record in records if record.end is not None]
    return max(ends, default=0.0) - min(record.due for record in records)


def spec_of(header: Header, num_pages: int, page_size: int) -> EngineSpec:
    """The engine, with so many pages (0: as many as it had) of so many tokens. Raises
    `ConfigError`."""
    told = header.spec
    for name in ("num_pages", "max_model_len"):
        if not is_count(told.get(name, 0)) or not 0 <= told.get(name, 0) <= MOST_TOKENS:
            raise ConfigError(f"the trace's header: spec.{name} cannot be {told[name]!r:.40}")
    try:
        return _spec(header, told, num_pages, page_size)
    except (TypeError, ValueError):
        raise ConfigError("the trace's header: spec.tiers are none") from None


def _spec(header: Header, told: dict[str, Any], num_pages: int, page_size: int) -> EngineSpec:
    num_pages = num_pages or int(told.get("num_pages", 0)) * header.page_size // page_size
    if not num_pages:
        raise ConfigError("the trace does not say how many KV pages there are; set cache.num_pages")
    room = num_pages * page_size
    tiers = (tier.values() if isinstance(tier, dict) else tier for tier in told.get("tiers", ()))
    return EngineSpec(
        max_model_len=min(room, int(told.get("max_model_len", 0)) or room),
        page_size=page_size,
        num_pages=num_pages,
        vocab_size=1 << 32,  # of token ids that stand for texts (`texts`)
        holds_steps=bool(told.get("holds_steps", False)),
        whole_prompts=bool(told.get("whole_prompts", False)),
        tiers=tuple(TierSpec(*tier) for tier in tiers),
    )


def tenancy_of(header: Header, arrivals: Sequence[Arrival], given: Tenancy | None) -> Tenancy:
    """Who paid and what was promised, or what is `given` instead."""
    try:
        tenancy = given or (Tenancy.of(header.tenancy) if header.tenancy else Tenancy())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the trace's header: `tenancy` cannot be used ({error!r}); give a tenants file with "
            "--tenants"
        ) from None
    if strangers := {arrival.tenant for arrival in arrivals} - tenancy.tenants.keys():
        raise ConfigError(
            f"tenant {min(strangers)!r} of the trace is in no tenants file; "
            "give the one of that server with --tenants"
        )
    return tenancy
