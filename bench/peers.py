"""How other servers are started for a comparison; each lives in an environment of its own."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NamedTuple

from bench.server import our_command

PAGES = 2400  # of 16 tokens: 38,400 tokens of KV for everybody


class Peer(NamedTuple):
    """A server to start: its command, what its environment adds, and where it says it is up."""

    command: list[str]
    environment: dict[str, str]
    ready: str


def ours(args: argparse.Namespace, port: int, *settings: str) -> Peer:
    wanted = ["model.dtype=bfloat16", f"cache.num_pages={PAGES}", *settings, *args.set]
    return Peer(our_command(args.model, port, wanted), {}, "/ready")


def int8(args: argparse.Namespace, port: int) -> Peer:
    return ours(args, port, "model.quantization=int8")


def variant(args: argparse.Namespace, port: int) -> Peer:
    return ours(args, port, *args.variant)


def transformers(args: argparse.Namespace, port: int) -> Peer:
    command = [str(args.transformers), "serve", str(args.model), "--continuous-batching",
               "--device", "cpu", "--dtype", "bfloat16", "--attn-implementation", "sdpa",
               "--cb-num-blocks", "1152", "--cb-block-size", "32", "--cb-max-batch-tokens", "512",
               "--port", str(port)]  # fmt: skip
    return Peer(command, {}, "/health")


def vllm(args: argparse.Namespace, port: int) -> Peer:
    """`--vllm` is its command; libiomp5 is taken from beside it, tcmalloc from --tcmalloc.

    Both cores are bound to computing: by default it keeps one for its API, which is 1.6 times
    slower.
    """
    command = [str(args.vllm), "serve", str(args.model), "--served-model-name", str(args.model),
               "--dtype", "bfloat16", "--max-model-len", "4096", "--generation-config", "vllm",
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))
    runtime = Path(args.vllm).parent.parent / "lib" / "libiomp5.so"
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
        "LD_PRELOAD": ":".join(map(str, [*([args.tcmalloc] if args.tcmalloc else []), runtime])),
    }
    return Peer(command, environment, "/health")


def openvino(args: argparse.Namespace, port: int) -> Peer:
    """`--openvino` is the Python of its environment, `--openvino-model` the exported folder."""
    script = Path(__file__).with_name("openvino_server.py")
    command = [*map(str, (args.openvino, script, args.openvino_model)), "--port", str(port)]
    return Peer(command, {}, "/health")


def llama(args: argparse.Namespace, port: int) -> Peer:
    """`--llama` is llama-server, `--gguf` its file, in whatever precision that is."""
    command = [str(args.llama), "--model", str(args.gguf), "--alias", str(args.model),
               "--host", "127.0.0.1", "--port", str(port), "--parallel", "32", "--kv-unified",
               "--ctx-size", str(16 * PAGES), "--threads", str(len(os.sched_getaffinity(0))),
               "--no-webui"]  # fmt: skip
    return Peer(command, {}, "/health")


SERVERS = {
    "dynamo_serve": ours,
    "int8": int8,
    "variant": variant,
    "vllm": vllm,
    "openvino": openvino,
    "llama": llama,
    "transformers": transformers,
}
NO_END = {"vllm", "llama"}  # told with each request; others are by their model or command
