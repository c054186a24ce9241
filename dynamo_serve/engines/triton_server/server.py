"""One Triton server over gRPC: what its model is, whether it works, and streams of answers.

One channel for each server and one stream for each request, so that cancelling one cancels
nothing else. No keep-alive pings: a server takes more than a few on a silent stream for an attack
and closes the channel. Silence is what the timeouts are for.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from dynamo_serve.config import TritonSection
from dynamo_serve.engines.triton_server import faults
from dynamo_serve.engines.triton_server.dialects import Ask, Piece, TritonDialect
from dynamo_serve.engines.triton_server.faults import Fault
from dynamo_serve.engines.triton_server.tensors import Declared, outputs_of, request_of
from dynamo_serve.errors import EngineStartError

CANARY_SECONDS = 5.0  # for one token
WHY_SECONDS = 0.5
CANARY = Ask("Hello", max_tokens=1, ids=(0,), num_prompt=1)
OPTIONS = (
    ("grpc.max_receive_message_length", 1 << 26),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
)
TLS_FILES = ("tls_ca_file", "tls_key_file", "tls_cert_file")
READY, LOST = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE


@dataclass(frozen=True, slots=True)
class Spoken:
    """How all servers are asked."""

    dialect: TritonDialect
    declared: Declared


class Server:
    """To be used from one event loop. Raises `EngineStartError` for TLS files that are none."""

    def __init__(self, address: str, settings: TritonSection) -> None:
        self.address = address
        self._settings = settings
        self._channel = _channel_to(address, settings)
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def declared(self) -> Declared:
        """What the model declares, of a server that is reached and says that it is ready. Raises
        `Fault`."""
        name, seconds = self._settings.model, self._settings.connect_timeout_s
        await self._connect(is_patient=True)
        try:
            asked = service_pb2.ModelReadyRequest(name=name)
            if not (await self._stub.ModelReady(asked, timeout=seconds)).ready:
                raise Fault(f"the model {name!r} is not ready", "unavailable", ejects=True)
            asked = service_pb2.ModelConfigRequest(name=name)
            answer = await self._stub.ModelConfig(asked, timeout=seconds)
            return Declared.of(answer.config)
        except grpc.aio.AioRpcError as error:
            raise faults.broken(error) from None
        except (KeyError, ValueError) as error:
            said = f"the model {name!r} has a config that cannot be read: {error}"
            raise Fault(said, "unavailable", ejects=True) from None

    async def canary(self, spoken: Spoken) -> int | None:
        """Ask for one token: that a server is ready it also says when its model is dead. Its count
        of the prompt's tokens, if it tells. Raises `Fault`."""
        count = None
        try:
            async with asyncio.timeout(CANARY_SECONDS):
                async for piece in self.stream("canary", CANARY, spoken, 0):
                    count = piece.prompt_count
        except TimeoutError:
            said = f"a canary has not come back within {CANARY_SECONDS:g} s"
            raise Fault(said, "timeout") from None
        return count

    async def stream(
        self, id: str, ask: Ask, spoken: Spoken, priority: int
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer, to its end. Closing it cancels the request there. Raises
        `Fault`."""
        await self._connect(is_patient=False)
        request = self._request(id, ask, spoken, priority)
        call = self._stub.ModelStreamInfer()
        try:
            await call.write(request)
            await call.done_writing()
            while (response := await call.read()) is not grpc.aio.EOF:
                if response.error_message:
                    raise faults.fault_of(response.error_message)
                piece = _read(spoken.dialect, response.infer_response)
                is_final = _is_final(response.infer_response)
                if piece is not None:
                    yield piece
                if is_final:
                    return
            raise Fault(faults.UNFINISHED, "unavailable", elsewhere=True)
        except grpc.aio.AioRpcError as error:
            raise faults.broken(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            said = "the Triton server cancelled the request"  # grpc raises what we would
            raise Fault(said, "unavailable", ejects=True, elsewhere=True) from None
        except asyncio.InvalidStateError:  # a write to a call that has ended: its status says why
            raise faults.broken(await _status(call)) from None
        finally:  # whatever the reason: nobody reads on
            call.cancel()

    def _request(self, id: str, ask: Ask, spoken: Spoken, priority: int) -> Any:
        values = spoken.dialect.values(ask)
        parameters = self._parameters(spoken.declared, priority)
        try:
            return request_of(self._settings.model, id, values, spoken.declared, parameters)
        except (ValueError, struct.error) as error:
            said = f"the model on the Triton server has no room for it: {error}"
            raise Fault(said, "refused") from None

    def _parameters(self, declared: Declared, priority: int) -> dict[str, int | bool]:
        """For the server's own queue: when to give up, and who comes first (1 is the highest)."""
        parameters: dict[str, int | bool] = {
            "triton_enable_empty_final_response": True,
            "timeout": round(self._settings.first_token_timeout_s * 1e6),
        }
        if declared.priority_levels:
            parameters["priority"] = min(1 + priority, declared.priority_levels)
        return parameters

    async def _connect(self, *, is_patient: bool) -> None:
        """Raises `Fault`; unless patient at once where the last try has failed."""
        seconds = self._settings.connect_timeout_s
        try:
            async with asyncio.timeout(seconds):
                while (state := self._channel.get_state(try_to_connect=True)) is not READY:
                    if state is LOST and not is_patient:
                        break
                    await self._channel.wait_for_state_change(state)
                else:
                    return
        except TimeoutError:
            pass
        said = f"no Triton server could be reached within {seconds:g} s"
        detail = await self._why_lost() if is_patient else ""
        raise Fault(said, "unavailable", ejects=True, elsewhere=True, detail=detail)

    async def _why_lost(self) -> str:
        """What only a call is told: no such name, nobody there, a certificate that is not good."""
        try:
            await self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=WHY_SECONDS)
        except grpc.aio.AioRpcError as error:
            return str(error.details())
        return ""


def _channel_to(address: str, settings: TritonSection) -> Any:
    if not settings.tls:
        return grpc.aio.insecure_channel(address, options=OPTIONS)
    ca, key, cert = (_content(settings, name) for name in TLS_FILES)
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    name = settings.tls_server_name
    # Checked against the certificate, too, despite what the option is called.
    named = (("grpc.ssl_target_name_override", name),) if name else ()
    return grpc.aio.secure_channel(address, credentials, options=(*OPTIONS, *named))


def _content(settings: TritonSection, name: str) -> bytes | None:
    path = getattr(settings, name)
    try:
        content = Path(path).read_bytes() if path else None
    except OSError as error:
        why = error.strerror or error
        raise EngineStartError(f"triton.{name} = {path!r}: cannot read this file: {why}") from None
    if content is not None and b"-----BEGIN " not in content:
        raise EngineStartError(f"triton.{name} = {path!r}: this is no PEM file")
    return content


def _read(dialect: TritonDialect, response: Any) -> Piece | None:
    try:
        piece = dialect.piece(outputs_of(response))
        if piece is not None:
            numbers = (piece.num_tokens, piece.prompt_count or 0, *piece.token_ids)
            if type(piece.text) is not bytes or any(type(each) is not int for each in numbers):
                raise TypeError("outputs of other types than those that it is known by")
        return piece
    except (ValueError, TypeError, AttributeError, struct.error) as error:
        said = f"what the Triton server has sent is no answer ({type(error).__name__}: {error})"
        raise Fault(said) from None


def _is_final(response: Any) -> bool:
    return bool(response.parameters["triton_final_response"].bool_param)


async def _status(call: Any) -> Any:
    return grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        details=await call.details(),
    )
