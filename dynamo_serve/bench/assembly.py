"""From a scenario to a plan and how it is sent; asks the server what it needs to know."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynamo_serve.bench import arrivals, bodies, endpoint, memory_speed, trace_files
from dynamo_serve.bench.client import Client
from dynamo_serve.bench.driver import Driving
from dynamo_serve.bench.plan import Call, Planned
from dynamo_serve.bench.precise_loop import new_loop
from dynamo_serve.bench.run import Options
from dynamo_serve.bench.scenario import Scenario, Source, sources
from dynamo_serve.bench.texts import IdTexts, Library, Texts, TokenizerTexts, WordTexts
from dynamo_serve.bench.workloads import Limits, Visit, Visits, plan, probes
from dynamo_serve.errors import ConfigError

PROBE_TOKENS = 16
# The seed and the bandwidth `about` tells itself.
APART = ("key", "metrics_key", "seed", "wait", "bandwidth", "measure_bandwidth")


@dataclass(frozen=True, slots=True)
class Assembled:
    """What is known of the server, and texts for it."""

    scenario: Scenario
    facts: endpoint.Facts
    texts: Texts
    extras: bodies.BodyExtras
    bandwidth: float | None = None  # bytes per second

    @property
    def context(self) -> int | None:
        return self.scenario.max_context or self.facts.context

    def plan(self, rate: float | None = None, seed: int = 0) -> Iterator[Planned]:
        """The plan anew; of a sweep with the rate and the seed of a level."""
        scenario = self.scenario if rate is None else replace(self.scenario, rate=rate)
        return make_plan(scenario, self.texts, self.context, scenario.seed + seed)

    def options(self, url: str, progress: Callable[[float, str], None] | None) -> Options:
        scenario = self.scenario
        has_metrics = self.facts.has_metrics and scenario.metrics_every > 0
        return Options(
            url=url,
            driving=Driving(
                extras=self.extras,
                concurrency=scenario.concurrency,
                duration=scenario.duration,
                grace=scenario.grace,
                timeout=scenario.timeout,
                warm_up_s=scenario.warm_up,
                warm_up_calls=scenario.warm_up_requests,
            ),
            processes=scenario.processes,
            probes=self._probes(),
            metrics_every=scenario.metrics_every if has_metrics else None,
            metrics_key=scenario.metrics_key or _any_key(scenario),
            total=scenario.requests,
            progress=progress,
            about=self.about(),
        )

    def about(self) -> dict[str, Any]:
        scenario = self.scenario
        is_open = scenario.rate is not None or bool(scenario.arrivals) or bool(scenario.sweep)
        return {
            "loop": "open" if is_open else "closed",
            "model": self.facts.model,
            "seed": scenario.seed,
            "settings": self.facts.server,
            **({} if self.bandwidth is None else {"bandwidth": self.bandwidth}),
            "weights": {s.part.call.tenant: s.weight for s in sources(scenario)},
            "plan": {
                **unusual(scenario),
                "texts": self.texts.about() | {"exact": self.texts.is_exact},
            },
        }

    def _probes(self) -> Iterator[Planned]:
        if not self.scenario.probe_rate:
            return iter(())
        first = sources(self.scenario)[0]
        call = Call(
            kind="probe",
            max_tokens=PROBE_TOKENS,
            prompt_tokens=PROBE_TOKENS,
            tenant=first.part.call.tenant,
            api_key=first.part.call.api_key,
        )
        rng = random.Random(f"{self.scenario.seed}:probes")
        return probes(self.scenario.probe_rate, self.texts, rng, call, is_chat=first.shape.is_chat)


def assemble(url: str, scenario: Scenario) -> Assembled:
    """Ask the server what it is. Raises `EndpointError` and `ConfigError`."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(_assemble(url, scenario))


async def _assemble(url: str, scenario: Scenario) -> Assembled:
    client = Client(url)
    try:
        patience = endpoint.Patience(scenario.wait)
        facts = await endpoint.facts(client, scenario.model, _any_key(scenario), patience)
        bandwidth = memory_speed.of_server(url, scenario, facts.server)
        extras = bodies.BodyExtras(
            model=facts.model,
            usage=scenario.usage,
            explain=bool(facts.server),
            extra=tuple(scenario.extra.items()),
        )
        texts = await _texts(client, scenario, facts, extras, patience)
        return Assembled(scenario, facts, texts, extras, bandwidth)
    finally:
        await client.close()


def without_server(scenario: Scenario) -> Assembled:
    """For a dry run: texts are as long as one token a word makes them."""
    texts = _known_texts(scenario, vocab_size=32_000) or WordTexts()
    return Assembled(scenario, endpoint.Facts(scenario.model), texts, bodies.BodyExtras())


async def _texts(
    client: Client,
    scenario: Scenario,
    facts: endpoint.Facts,
    extras: bodies.BodyExtras,
    patience: endpoint.Patience,
) -> Texts:
    known = _known_texts(scenario, facts.vocab_size)
    if known is not None:
        return known
    first = sources(scenario)[0]
    said = ({"role": "user", "content": ""},) if first.shape.is_chat else ()
    call = replace(first.part.call, messages=said)
    return await endpoint.calibrated(client, call, replace(extras, explain=False), patience)


def _known_texts(scenario: Scenario, vocab_size: int | None) -> Texts | None:
    """Texts that no server has to be asked for."""
    if scenario.tokenizer:
        return TokenizerTexts(Path(scenario.tokenizer))
    if scenario.prompts != "ids":
        return None
    if any(source.shape.is_chat for source in sources(scenario)):
        raise ConfigError("prompts: ids are for completions; this workload is a chat")
    if vocab_size is None:
        raise ConfigError(
            "prompts: the server does not say how many token ids there are; use words"
        )
    return IdTexts(vocab_size)


def make_plan(
    scenario: Scenario, texts: Texts, context: int | None, seed: int
) -> Iterator[Planned]:
    limits = Limits(scenario.requests, scenario.duration, context)
    library = Library(texts, scenario.seed)
    parts = []
    for number, source in enumerate(sources(scenario)):
        rng = random.Random(f"{seed}:{number}")
        visits = _visits(source, texts, library, rng, limits)
        if scenario.arrivals != "trace":
            visits = (replace(visit, at=None) for visit in visits)
        parts.append((source.part, visits))
    times = _times(scenario, random.Random(f"{seed}:arrivals"))
    return plan(parts, times, limits, random.Random(f"{seed}:mix"))


def _visits(
    source: Source, texts: Texts, library: Library, rng: random.Random, limits: Limits
) -> Iterator[Visit]:
    call = source.part.call
    if not source.trace:
        return iter(Visits(source.shape, call, texts, library, rng, limits))
    made = (call, texts, library, rng)
    found = trace_files.visits(source.trace, source.path, made, is_chat=source.shape.is_chat)
    return trace_files.timed(found, source.speed)


def _times(scenario: Scenario, rng: random.Random) -> Iterator[float] | None:
    """When sessions begin; None: when their trace says, or whenever a place is free."""
    kind = scenario.arrivals
    if not kind and scenario.rate is not None:
        kind = "poisson" if scenario.burstiness == 1.0 else "gamma"
    rate = scenario.rate or 0.0
    made: dict[str, Callable[[], Iterator[float]]] = {
        "constant": lambda: arrivals.constant(rate),
        "poisson": lambda: arrivals.poisson(rate, rng),
        "gamma": lambda: arrivals.gamma(rate, scenario.burstiness, rng),
        "ramp": lambda: arrivals.ramp(scenario.ramp, rng),
        "steps": lambda: arrivals.steps(scenario.steps, rng),
    }
    return made[kind]() if kind in made else None


def unusual(scenario: Scenario) -> dict[str, Any]:
    """What the scenario says that is not the default, without keys and what is no part of it."""
    usual = Scenario()
    names = [name for name in Scenario.__dataclass_fields__ if name not in APART]
    found = {name: getattr(scenario, name) for name in names}
    found = {name: value for name, value in found.items() if value != getattr(usual, name)}
    if scenario.mix:
        found["mix"] = [{k: v for k, v in part.items() if k != "key"} for part in scenario.mix]
    return {"workload": scenario.workload, **found}


def _any_key(scenario: Scenario) -> str:
    keys = (source.part.call.api_key for source in sources(scenario))
    return next(itertools.chain((key for key in keys if key), ("",)))
