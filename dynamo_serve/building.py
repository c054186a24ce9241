"""Builds an engine and the loop that turns it, from settings; in whichever process they run."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dynamo_serve import kv_events
from dynamo_serve.config import Config
from dynamo_serve.core.engine import Engine, EngineSpec
from dynamo_serve.core.flight import FlightRecorder
from dynamo_serve.core.loop import Inbox, Loop, Publish, Reply
from dynamo_serve.core.stats import Standing
from dynamo_serve.core.tenant import Tenancy
from dynamo_serve.core.tiers import DISK, HOST
from dynamo_serve.engines.fake import FakeEngine
from dynamo_serve.errors import EngineStartError
from dynamo_serve.scheduling import build_scheduler, recall_ladder

Progress = Callable[[str, float], None]
"""Called with a stage ("weights", "warm-up", "graphs") and how much of it is done, 0 to 1."""

log = logging.getLogger(__name__)

FAKE_TOKEN_BYTES = 1024  # what a token of the fake engine is said to take in its tiers
FAKE_SPEED = {"none": 1.0, "int8": 0.5}  # of a step's time: lighter weights are to be faster


def build_engine(config: Config, model_path: str, progress: Progress) -> Engine:
    if config.engine.kind == "fake":
        return build_fake(config, model_path)
    if config.engine.kind == "triton":
        return build_forwarding(config, model_path)
    # torch is imported only where it is needed: this line costs seconds
    from dynamo_serve.engines import local  # noqa: PLC0415

    section = config.scheduler
    limits = local.Limits(section.max_decode_sequences, section.max_prefill_tokens)
    wishes = local.Wishes(config.model, config.engine, config.cache, limits, model_path)
    engine: Engine = local.build(wishes, progress)
    return engine


def build_forwarding(config: Config, model_path: str) -> Engine:
    try:
        from dynamo_serve.engines.triton_server.engine import TritonEngine  # noqa: PLC0415
    except ImportError as error:
        remedy = "pip install 'dynamo-serve[triton]'"
        raise EngineStartError(f"engine.kind triton: {error}; install it: {remedy}") from None
    return TritonEngine(
        config.triton,
        model_path,
        max_model_len=config.model.max_model_len,
        num_slots=config.scheduler.max_decode_sequences,
    )


def build_fake(config: Config, model_path: str) -> Engine:
    """The fake engine with the vocabulary and context of the model it stands for."""
    try:
        facts = json.loads((Path(model_path) / "config.json").read_text())
    except OSError as error:
        raise EngineStartError(f"the fake engine needs {model_path}/config.json: {error}") from None
    if not {"vocab_size", "max_position_embeddings"} <= facts.keys():
        wanted = "vocab_size and max_position_embeddings"
        raise EngineStartError(f"the fake engine needs {wanted} in {model_path}/config.json")
    if config.cache.disk_path:
        log.warning("the fake engine has no disk: its pages in cache.disk_path end with it")
    max_model_len = config.model.max_model_len or facts["max_position_embeddings"]
    num_pages = config.cache.num_pages or 64 * -(-max_model_len // config.cache.page_size)
    pages_per_gib = (1 << 30) // (FAKE_TOKEN_BYTES * config.cache.page_size)
    return FakeEngine(
        vocab_size=facts["vocab_size"],
        max_model_len=max_model_len,
        page_size=config.cache.page_size,
        num_pages=num_pages,
        below={
            HOST: int(config.cache.host_gib * pages_per_gib),
            DISK: int(config.cache.disk_gib * pages_per_gib),
        },
        step_seconds=FAKE_SPEED[config.model.quantization] * config.engine.fake_step_ms / 1000,
        quantization=config.model.quantization,
    )


class Given(NamedTuple):
    """What an engine is started with; `standing` is how the ladder stood in the one before."""

    config: Config
    model_path: str
    tenancy: Tenancy
    standing: Standing


class Ends(NamedTuple):
    """How whoever has started an engine is reached from it."""

    ready: Callable[[EngineSpec], None]
    progress: Progress
    inbox: Inbox
    publish: Publish
    reply: Reply
    flight: FlightRecorder | None


def run_engine(given: Given, ends: Ends) -> None:
    """Start an engine and turn its loop until told to stop. Raises what ended it."""
    config = given.config
    with kv_events.opened(config.cache) as publisher:
        engine = build_engine(config, given.model_path, ends.progress)
        try:
            spec = engine.start()
            ends.ready(spec)
            loop = build_loop(given, engine, spec, ends)
            if publisher:
                publisher.follow(loop.scheduler)
            loop.run()
        finally:
            engine.close()


def build_loop(given: Given, engine: Engine, spec: EngineSpec, ends: Ends) -> Loop:
    loop = Loop(
        build_scheduler(given.config, given.tenancy, spec),
        engine,
        inbox=ends.inbox,
        publish=ends.publish,
        reply=ends.reply,
        clock=time.monotonic,
        flight=ends.flight,
        tells_shapes=bool(given.config.record.path and given.config.record.steps),
    )
    recall_ladder(loop.scheduler, given.config.scheduler, given.standing, time.monotonic())
    return loop
