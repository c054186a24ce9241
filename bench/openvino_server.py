"""OpenVINO GenAI behind just enough HTTP to be compared: /health and /v1/completions.

    ENV/bin/python bench/openvino_server.py FOLDER --port N [--budget 2048] [--cache-gib 4]

Runs in OpenVINO's own environment, so it imports nothing of ours. FOLDER is what
`optimum-cli export openvino` has made. One thread runs its continuous batching; each new token
becomes an event of a stream, decoded alone, which is cheaper than right.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openvino_genai as genai
from tokenizers import Tokenizer

Json = dict[str, Any]


class Batching:
    """The thread that steps, and who waits for which request's tokens."""

    def __init__(self, folder: Path, budget: int, cache_gib: int) -> None:
        config = genai.SchedulerConfig()
        config.max_num_batched_tokens = budget
        config.cache_size = cache_gib
        config.enable_prefix_caching = True
        precision = {"INFERENCE_PRECISION_HINT": "bf16"}
        self._pipeline = genai.ContinuousBatchingPipeline(str(folder), config, "CPU", precision)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._loop = asyncio.get_running_loop()
        self._new: list[tuple[str, Any, asyncio.Queue[list[int] | None]]] = []
        self._live: list[tuple[Any, asyncio.Queue[list[int] | None]]] = []
        self._wake = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    async def tokens(self, prompt: str, count: int) -> AsyncIterator[list[int]]:
        wishes = genai.GenerationConfig()
        wishes.max_new_tokens, wishes.ignore_eos, wishes.do_sample = count, True, False
        queue: asyncio.Queue[list[int] | None] = asyncio.Queue()
        with self._wake:
            self._new.append((prompt, wishes, queue))
            self._wake.notify()
        while (ids := await queue.get()) is not None:
            yield ids

    def _run(self) -> None:
        number = 0
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._new or self._live)
                coming, self._new = self._new, []
            for prompt, wishes, queue in coming:
                self._live.append((self._pipeline.add_request(number, prompt, wishes), queue))
                number += 1
            self._pipeline.step()
            still = []
            for handle, queue in self._live:
                while handle.can_read():
                    for output in handle.read().values():
                        self._tell(queue, list(output.generated_ids))
                if handle.get_status() == genai.GenerationStatus.RUNNING:
                    still.append((handle, queue))
                else:
                    self._tell(queue, None)
            self._live = still

    def _tell(self, queue: asyncio.Queue[list[int] | None], ids: list[int] | None) -> None:
        self._loop.call_soon_threadsafe(queue.put_nowait, ids)


async def serve(
    batching: Batching, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            await respond(batching, head.decode(), reader, writer)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def respond(
    batching: Batching, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    lines = head.split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if lines[0].startswith("GET"):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        return
    body = json.loads(await reader.readexactly(int(headers["content-length"])))
    generated = batching.tokens(body["prompt"], body["max_tokens"])
    if not body.get("stream"):
        ids = [token async for some in generated for token in some]
        text, usage = batching.tokenizer.decode(ids), {"completion_tokens": len(ids)}
        answer = {"choices": [choice(text, "length")], "usage": usage}
        raw = json.dumps(answer).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
        writer.write(f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        return
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
    writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
    async for ids in generated:
        put(writer, json.dumps({"choices": [choice(batching.tokenizer.decode(ids), None)]}))
        await writer.drain()
    put(writer, json.dumps({"choices": [choice("", "length")]}))
    put(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")


def choice(text: str, reason: str | None) -> Json:
    return {"index": 0, "text": text, "finish_reason": reason}


def put(writer: asyncio.StreamWriter, data: str) -> None:
    event = f"data: {data}\n\n".encode()
    writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--cache-gib", type=int, default=4)
    args = parser.parse_args()
    batching = Batching(args.folder, args.budget, args.cache_gib)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(batching, reader, writer)

    server = await asyncio.start_server(connected, "127.0.0.1", args.port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
