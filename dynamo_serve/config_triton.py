"""The settings of an engine that forwards to NVIDIA Triton servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynamo_serve.config_field import setting

ENDPOINT = r"([\w.-]+|\[[\da-fA-F:.]+\]):\d{1,5}"


@dataclass(frozen=True, slots=True)
class TritonSection:
    endpoints: tuple[str, ...] = setting(
        (),
        "engine.kind triton: the servers' gRPC addresses, such as 10.0.0.7:8001; a request goes to "
        "the one of two with fewer in flight.",
        pattern=ENDPOINT,
    )
    metrics_endpoints: tuple[str, ...] = setting(
        (),
        "The same servers' metrics addresses, such as 10.0.0.7:8002, in the same order: what they "
        "tell is shown in /metrics, too.",
        pattern=ENDPOINT,
    )
    metrics_timeout_s: float = setting(
        1.0, "Seconds that /metrics waits for them; it then does without.", low=0.05, high=10
    )
    tls: bool = setting(False, "Encrypt connections to triton.endpoints.")
    tls_ca_file: str = setting(
        "", "PEM file with the certificates that theirs must be signed by; empty: the well-known."
    )
    tls_cert_file: str = setting(
        "", "PEM file with our certificate, for servers that ask for one; with tls_key_file."
    )
    tls_key_file: str = setting("", "PEM file with the key of that certificate.")
    tls_server_name: str = setting(
        "", "Name in the servers' certificates, where it is not that in triton.endpoints."
    )
    model: str = setting(
        "", "Name of the model on these servers; model.path has its tokenizer.", pattern=r"\S*"
    )
    dialect: Literal["auto", "vllm", "tensors", "llmapi", "dserve"] = setting(
        "auto",
        "How that model is asked; auto reads it from its inputs: vllm is Triton's vLLM backend, "
        "tensors are TensorRT-LLM's ensemble and BLS models, llmapi is its LLM API, dserve is our "
        "engine inside Triton.",
    )
    connect_timeout_s: float = setting(
        2.0, "Seconds for a server to be reached, and for any server to be there.", low=0.05
    )
    first_token_timeout_s: float = setting(
        60.0, "Seconds for the first token, else 504; the server's queue is told, too.", low=0.05
    )
    idle_timeout_s: float = setting(30.0, "Seconds between two tokens, else 504.", low=0.05)
    total_timeout_s: float = setting(600.0, "Seconds for a whole answer, else 504.", low=0.05)
    retries: int = setting(
        2, "Other tries of a request of which nothing has been sent on yet.", low=0, high=10
    )
