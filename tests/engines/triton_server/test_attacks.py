"""Servers that are none, that stand still or lie, and many clients that hang up: nothing hangs."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Generator, Iterator
from typing import Any

import grpc
import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from dynamo_serve.config import TritonSection
from dynamo_serve.core.request import Finish
from dynamo_serve.engines.triton_server.dialects import Ask
from dynamo_serve.engines.triton_server.remote import Remote
from dynamo_serve.engines.triton_server.stream import Stream
from dynamo_serve.errors import EngineStartError
from tests.engines.triton_server.test_faults import (
    Actor,
    outcome,
    playing,
    said,
    serving_grpc,
    well,
)
from tests.engines.triton_server.test_forward import settles
from tests.patience import PATIENCE_S


@contextlib.contextmanager
def listening(says: bytes | None) -> Generator[str]:
    """A server of TCP: accepts and says this, or nothing; not even that it accepts, without."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(listener.accept()[0])
                    held[-1].sendall(says or b"")

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE_S)
            for each in held:
                each.close()


def start_of(endpoint: str, seconds: float) -> str:
    """What is said of a start that fails, each step of which may take so many seconds."""
    settings = TritonSection(endpoints=(endpoint,), model="m", connect_timeout_s=seconds)
    remote = Remote(settings)
    try:
        with pytest.raises(EngineStartError) as caught:
            remote.start()
    finally:
        remote.close()
    return str(caught.value)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 No\r\n\r\n", b"\xff" * 100_000])
def test_a_port_where_something_else_listens_is_no_server(says: bytes) -> None:
    with listening(says) as endpoint:
        assert "could be reached within 0.3 s" in start_of(endpoint, 0.3)


@pytest.mark.parametrize(
    "endpoint", ["no-such-host.invalid:8001", "127.0.0.1:9", "256.1.1.1:80", "[::1]:9"]
)
def test_addresses_where_nobody_is_are_named(endpoint: str) -> None:
    assert f"{endpoint}: no Triton server could be reached" in start_of(endpoint, 0.3)


class Sleeper(Actor):
    """Takes calls and never answers them."""

    def ModelReady(self, request: Any, context: Any) -> Any:
        self.cancelled.wait(PATIENCE_S)


class Liar(Actor):
    """Declares inputs of types that nobody has."""

    def ModelConfig(self, request: Any, context: Any) -> Any:
        answer = super().ModelConfig(request, context)
        answer.config.input.add(name="stream", data_type=model_config_pb2.TYPE_FP16)
        return answer


def test_a_server_that_takes_calls_and_answers_none_is_not_waited_for() -> None:
    sleeper = Sleeper(well)
    with serving_grpc(sleeper) as endpoint:
        assert "DEADLINE_EXCEEDED" in start_of(endpoint, 2.0)
        sleeper.cancelled.set()


@pytest.mark.parametrize("call", ["ModelReady", "ModelConfig", "ModelStreamInfer"])
def test_a_server_that_dies_at_the_start_is_named(call: str) -> None:
    def dies(self: Any, request: Any, context: Any) -> Any:
        if call == "ModelStreamInfer":  # one that is still being sent may be told otherwise
            next(request)
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    mortal = type("Mortal", (Actor,), {call: dies})(well)
    with serving_grpc(mortal) as endpoint:
        told = start_of(endpoint, PATIENCE_S)
        # gRPC's own core may put its word for a stream that ends while it begins in between.
        assert "was lost (UNAVAILABLE): Socket closed" in told or "was lost (INTERNAL)" in told


def test_a_server_that_dies_behind_the_answer_costs_nothing() -> None:
    def dies_after(request: Any, context: Any) -> Iterator[Any]:
        yield said("all ")
        yield said("well", "stop")
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    with playing(dies_after) as (remote, _):
        text, last = outcome(remote)
        assert (text, last.finish) == ("all well", Finish.STOP)


def test_a_type_that_nobody_knows_is_said_at_the_start() -> None:
    with serving_grpc(Liar(well)) as endpoint:
        assert "its input stream has the type FP16" in start_of(endpoint, PATIENCE_S)


def dawdles(request: Any, context: Any) -> Iterator[Any]:
    while context.is_active():
        yield said("on ")
        threading.Event().wait(0.005)


def begun(remote: Remote, count: int) -> list[Stream]:
    streams = [Stream(f"r{i}", Ask("Hi", 4000), 0, lambda: None) for i in range(count)]
    for each in streams:
        remote.begin(each)
    return streams


def test_two_hundred_of_whom_half_hang_up_leave_nothing_behind() -> None:
    rng = random.Random(3)
    with playing(well, well, first_token_timeout_s=PATIENCE_S) as (remote, _):
        for _ in range(4):
            streams = begun(remote, 50)
            for each in rng.sample(streams, 25):
                remote.cancel(each)
        text, last = outcome(remote)
        assert (text, last.finish) == ("all well", Finish.STOP)
        settles(lambda: not any(e["in_flight"] for e in remote.told()["endpoints"].values()))
        told = remote.told()["endpoints"].values()
        ended = sum(sum(each["outcomes"].values()) for each in told)
        assert ended <= 201, "some were cancelled before they were asked"
        assert sum(each["outcomes"]["done"] for each in told) >= 101


def test_a_stop_under_load_ends_all_of_it_there_too() -> None:
    with playing(dawdles) as (remote, (actor,)):
        streams = begun(remote, 6)
        settles(lambda: any(each.take() for each in streams))
        remote.close()
        assert actor.cancelled.wait(PATIENCE_S)


def test_another_model_under_the_same_name_is_noticed_and_gets_nothing() -> None:
    def has_changed(request: Any, context: Any) -> Iterator[Any]:
        message = "unexpected inference input 'text_input' for model 'm'"
        yield service_pb2.ModelStreamInferResponse(error_message=message)

    with playing(has_changed, well) as (remote, actors):
        actors[0].levels = 5  # and so its config differs
        assert {outcome(remote)[0] for _ in range(8)} == {"all well"}
        told = remote.told()["endpoints"].values()
        assert sorted(each["is_open"] for each in told) == [False, True]
