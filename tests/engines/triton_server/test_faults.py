"""Faults that a healthy server does not give, from one that plays a script."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from dynamo_serve.config import TritonSection
from dynamo_serve.core.batch import SequenceOutput
from dynamo_serve.core.request import Finish
from dynamo_serve.engines.triton_server import endpoints
from dynamo_serve.engines.triton_server.dialects import Ask
from dynamo_serve.engines.triton_server.remote import Remote
from dynamo_serve.engines.triton_server.stream import Stream
from dynamo_serve.errors import EngineStartError
from tests.patience import PATIENCE_S

Script = Callable[[Any, Any], Iterator[Any]]  # of a request and the call's context
INPUTS = ("text_input", "sampling_parameters", "return_finish_reason")


def said(text: str, finish: str = "None", *, is_final: bool = False) -> Any:
    answer = service_pb2.ModelStreamInferResponse()
    inside = answer.infer_response
    for name, value in (("text_output", text), ("finish_reason", finish)):
        inside.outputs.add(name=name, datatype="BYTES", shape=[1])
        data = value.encode()
        inside.raw_output_contents.append(len(data).to_bytes(4, "little") + data)
    inside.parameters["triton_final_response"].bool_param = is_final
    return answer


def failed(message: str) -> Any:
    return service_pb2.ModelStreamInferResponse(error_message=message)


def well(request: Any, context: Any) -> Iterator[Any]:
    yield said("all ")
    yield said("well", "stop", is_final=True)


class Actor(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers canaries well, and requests by the script."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Any] = []
        self.cancelled = threading.Event()
        self.levels = 0

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=True)

    def ModelConfig(self, request: Any, context: Any) -> Any:
        kind = model_config_pb2.TYPE_STRING
        inputs = [model_config_pb2.ModelInput(name=name, data_type=kind) for name in INPUTS]
        config = model_config_pb2.ModelConfig(name=request.name, input=inputs)
        config.model_transaction_policy.decoupled = True
        if self.levels:
            config.dynamic_batching.priority_levels = self.levels
        return service_pb2.ModelConfigResponse(config=config)

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:
        request = next(requests)
        if request.id == "canary":
            yield from well(request, context)
            return
        context.add_callback(self.cancelled.set)
        self.requests.append(request)
        yield from self.script(request, context)


@contextlib.contextmanager
def serving_grpc(actor: Actor) -> Generator[str]:
    """Where it can be reached."""
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(actor, server)
        endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield endpoint
        finally:
            server.stop(0).wait()


@contextlib.contextmanager
def playing(*scripts: Script, **settings: Any) -> Generator[tuple[Remote, list[Actor]]]:
    """A server for each script, and what forwards to all of them."""
    actors = [Actor(script) for script in scripts]
    levels = settings.pop("levels", 0)
    with contextlib.ExitStack() as stack:
        endpoints = []
        for actor in actors:
            actor.levels = levels
            endpoints.append(stack.enter_context(serving_grpc(actor)))
        given = {"model": "m", "connect_timeout_s": PATIENCE_S, **settings}
        section = TritonSection(endpoints=tuple(endpoints), **given)
        remote = Remote(section, random.Random(1))
        stack.callback(remote.close)
        remote.start()
        yield remote, actors


def outcome(remote: Remote, priority: int = 0) -> tuple[str, SequenceOutput]:
    """All text of a request, and its last output."""
    news = threading.Event()
    stream = Stream("r", Ask("Hi", 9), priority, news.set)
    remote.begin(stream)
    text = ""
    for _ in range(100):
        assert news.wait(PATIENCE_S)
        news.clear()
        while (output := stream.take()) is not None:
            text += "".join(output.texts)
            if output.finish:
                return text, output
    raise AssertionError("it never ended")


def breaks_off(request: Any, context: Any) -> Iterator[Any]:
    return iter(())


def breaks_off_later(request: Any, context: Any) -> Iterator[Any]:
    yield said("all ")


def never_says_why(request: Any, context: Any) -> Iterator[Any]:
    yield said("all ", is_final=True)


def is_garbage(request: Any, context: Any) -> Iterator[Any]:
    answer = said("all ")
    answer.infer_response.raw_output_contents[0] = b"\xff\xff\xff\x7fall"
    yield answer


def is_odd(request: Any, context: Any) -> Iterator[Any]:
    answer = service_pb2.ModelStreamInferResponse()
    answer.infer_response.outputs.add(name="text_output", datatype="FP32", shape=[1])
    answer.infer_response.raw_output_contents.append(b"1234")
    yield answer


def lacks_tensors(request: Any, context: Any) -> Iterator[Any]:
    answer = said("all ")
    del answer.infer_response.raw_output_contents[:]
    yield answer


def is_huge(request: Any, context: Any) -> Iterator[Any]:
    yield said("x" * (1 << 27))


def is_full(request: Any, context: Any) -> Iterator[Any]:
    yield failed("Exceeds maximum queue size")


def gives_up(request: Any, context: Any) -> Iterator[Any]:
    context.abort(grpc.StatusCode.CANCELLED, "shutting down")
    yield said("never")


def has_a_dead_model(request: Any, context: Any) -> Iterator[Any]:
    yield failed("Failed to process the request(s), message: Stub process 'm_0_0' is not healthy.")


@pytest.mark.parametrize("script", [breaks_off, is_full, gives_up, has_a_dead_model])
def test_what_goes_wrong_before_the_first_token_is_tried_elsewhere(script: Script) -> None:
    with playing(script, well) as (remote, actors):
        outcomes = [outcome(remote) for _ in range(6)]
        assert {text for text, _ in outcomes} == {"all well"}
        assert len(actors[0].requests) > 0, "it was asked, too"


@pytest.mark.parametrize(
    ("script", "fault", "message"),
    [
        (breaks_off_later, "unavailable", "broke off"),
        (never_says_why, "unavailable", "broke off"),
        (is_garbage, "", "is no answer"),
        (is_odd, "", "is no answer"),
        (lacks_tensors, "", "is no answer"),
        (is_huge, "unavailable", "RESOURCE_EXHAUSTED"),
        (is_full, "unavailable", "maximum queue size"),
        (gives_up, "unavailable", "was lost (CANCELLED)"),
        (has_a_dead_model, "unavailable", "is not healthy"),
    ],
)
def test_where_there_is_no_elsewhere_the_client_is_told(
    script: Script, fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        endpoints, "FIRST_PAUSE", 0.01
    )  # it is soon asked again, as often as may be
    with playing(script) as (remote, _):
        _, last = outcome(remote)
        assert (last.finish, last.fault or "") == (Finish.ERROR, fault)
        assert last.error is not None and message in last.error


def test_a_stream_that_ends_in_no_time_is_cancelled() -> None:
    def goes_on(request: Any, context: Any) -> Iterator[Any]:
        while context.is_active():
            yield said("on ")
            threading.Event().wait(0.05)

    with playing(goes_on, total_timeout_s=1.5) as (remote, (actor,)):
        text, last = outcome(remote)
        assert text.startswith("on on") and last.fault == "timeout"
        assert actor.cancelled.wait(PATIENCE_S)


def test_the_server_is_told_how_long_to_queue_a_request_and_before_whom() -> None:
    with playing(well, first_token_timeout_s=150.0, levels=3) as (remote, (actor,)):
        for priority, sent in ((0, 1), (1, 2), (90, 3)):
            outcome(remote, priority)
            parameters = actor.requests[-1].parameters
            assert parameters["priority"].int64_param == sent
            assert parameters["timeout"].int64_param == 150_000_000


def test_a_server_is_not_late_for_who_came_while_it_was_shut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 1.6)
    with playing(well, first_token_timeout_s=1.0) as (remote, _):
        (endpoint,) = remote._endpoints
        remote._loop.call_soon_threadsafe(remote._eject, endpoint, "it was silent")
        text, last = outcome(remote)
        assert (text, last.finish) == ("all well", Finish.STOP)


def test_servers_whose_models_differ_do_not_serve_together() -> None:
    with playing(well, well) as (remote, actors):
        actors[1].levels = 2
        actors[1].script = gives_up
        assert {outcome(remote)[0] for _ in range(6)} == {"all well"}
        assert sum(endpoint.is_open for endpoint in remote._endpoints) == 1


def test_nobody_there_is_said_at_the_start() -> None:
    remote = Remote(TritonSection(endpoints=("127.0.0.1:9",), model="m", connect_timeout_s=0.2))
    with pytest.raises(EngineStartError, match=r"127\.0\.0\.1:9: no Triton server"):
        remote.start()
    remote.close()
    remote.close()
