"""The settings: frozen sections of wishes, each field with its meaning and what is allowed.

Facts (what was really got) live in `core.engine.EngineSpec`. How files, environment and flags
become these sections is in `settings.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dynamo_serve.config_cache import CacheSection
from dynamo_serve.config_field import setting
from dynamo_serve.config_responses import ResponsesSection
from dynamo_serve.config_structured import StructuredSection
from dynamo_serve.config_triton import TritonSection

__all__ = [
    "CacheSection",
    "Config",
    "EngineSection",
    "LogSection",
    "ModelSection",
    "ResponsesSection",
    "SchedulerSection",
    "ServerSection",
    "StructuredSection",
    "TritonSection",
]

# The rungs, as in `core.ladder`; the last one has no undo, so nobody can want it to stay.
PINNED = "shrink_chunks|widen_window|cap_batch|spill|shed_batch|lighter_weights"
RUNG = f"{PINNED}|restart_engine"


@dataclass(frozen=True, slots=True)
class ServerSection:
    host: str = setting("127.0.0.1", "Address to listen on.", pattern=r"\S+")
    port: int = setting(8000, "Port to listen on; 0 picks a free one.", low=0, high=65535)
    api_keys: tuple[str, ...] = setting(
        (),
        "Keys accepted in 'Authorization: Bearer'; empty means no key is asked for.",
        pattern=r"\S+",
        secret=True,
    )
    admin_keys: tuple[str, ...] = setting(
        (),
        "Keys that open /admin; the tenants file may name more. Without any, /admin stays shut.",
        pattern=r"\S+",
        secret=True,
    )
    tenants_file: str = setting(
        "",
        "YAML file of tenants, their keys and quotas, and classes, relative to the working "
        "directory. Empty: one tenant, whose keys are server.api_keys.",
    )
    cors_origins: tuple[str, ...] = setting((), "Origins browsers may call from; '*' for any.")
    max_body_bytes: int = setting(4_000_000, "Largest accepted request body, in bytes.", low=1024)
    drain_timeout_s: float = setting(
        30.0, "On SIGTERM, seconds that running requests get to finish.", low=0
    )
    handover: str = setting(
        "",
        "Path of a unix socket, relative to the working directory, where the next server started "
        "with the same settings gets the port and the streams of this one; empty: off.",
    )
    unknown_fields: Literal["refuse", "warn"] = setting(
        "refuse", "A request field nobody knows: refuse it by name, or log a warning and go on."
    )
    ping_interval_s: float = setting(15.0, "Seconds between keep-alive comments on SSE.", low=1)
    resume_grace_s: float = setting(
        15.0,
        "Seconds for which a stream whose connection broke is kept, parked, for a client that comes"
        " back with Last-Event-ID; 0 cancels it at once.",
        low=0,
        high=3600,
    )
    stream_credit_bytes: int = setting(
        2_048,
        "About how much may wait for one slow reader (beyond what its connection buffers) before "
        "its request is parked.",
        low=1024,
    )
    reader_patience_s: float = setting(
        30.0, "Seconds that a parked request waits for its reader to read on.", low=0.1
    )
    max_choices: int = setting(16, "Largest n (and list of prompts) in one request.", low=1)
    max_inputs: int = setting(
        2048, "Largest list of inputs to embed, or of documents to rerank, in one request.", low=1
    )
    max_connections: int = setting(
        4096, "Open connections; who comes then gets a 503, but for probes.", low=1
    )
    header_timeout_s: float = setting(
        10.0, "Seconds for the headers of a request to arrive, else 408.", low=0.1
    )
    body_timeout_s: float = setting(
        30.0, "Seconds for the body to arrive after the headers, else 408.", low=0.1
    )
    send_timeout_s: float = setting(
        60.0,
        "Seconds in which a client has to take something of what waits for it; else it is cut off.",
        low=0.1,
    )
    stream_buffer_bytes: int = setting(
        65_536,
        "Bytes that wait for a slow reader, in the server and again in the kernel; then it waits.",
        low=4096,
        high=2**24,
    )


@dataclass(frozen=True, slots=True)
class ModelSection:
    path: str = setting(
        "bundled", "Local folder, hub id, or 'bundled' for the shipped model.", pattern=r".*\S.*"
    )
    served_names: tuple[str, ...] = setting(
        (),
        "Names clients may use; the first is the one reported. Empty: derived from the path.",
        pattern=r"\S+",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Weights, and KV where cache.kv_dtype is auto; auto takes the checkpoint's."
    )
    quantization: Literal["none", "int8"] = setting(
        "none", "int8 keeps the weights in 8 bits, with the native CPU kernels only."
    )
    lighter: Literal["", "int8"] = setting(
        "",
        "As model.quantization: weights that the rung lighter_weights of the ladder may switch to, "
        "with other answers from then on; empty: it never does.",
    )
    tool_parser: Literal["auto", "none", "hermes", "llama3", "mistral", "json"] = setting(
        "auto",
        "In which form the model calls tools; auto asks its chat template; none refuses tools.",
    )
    reasoning_parser: Literal["auto", "none", "think", "mistral", "seed", "cohere"] = setting(
        "auto",
        "Tags that the model thinks in; auto asks its chat template; none leaves them in the text.",
    )
    pooling: Literal["auto", "mean", "last", "cls"] = setting(
        "auto",
        "What an embedding is made of: the mean of all tokens, the last or the first one; auto does"
        " as the model's sentence-transformers files say, without these mean for encoders, else"
        " last.",
    )
    max_model_len: int = setting(
        0, "Longest prompt + output in tokens; 0 takes the model's own limit.", low=0
    )


@dataclass(frozen=True, slots=True)
class EngineSection:
    kind: Literal["local", "fake", "triton"] = setting(
        "local",
        "local runs the model with torch; fake answers nonsense without one; triton forwards to "
        "NVIDIA Triton servers.",
    )
    process: bool = setting(True, "Run the engine in its own process.")
    device: str = setting(
        "auto",
        "Where the model runs; auto takes CUDA if there is one.",
        pattern=r"auto|cpu|cuda(:\d+)?",
    )
    attention: Literal["auto", "torch", "native", "varlen", "triton"] = setting(
        "auto", "Attention backend; auto takes the best one the device and torch offer."
    )
    kernels: Literal["auto", "torch", "amx", "avx512_bf16", "avx512", "avx2"] = setting(
        "auto",
        "CPU kernels; auto takes the best native set the processor runs, torch takes none of them.",
    )
    cuda_graphs: bool = setting(True, "Capture decode batches in CUDA graphs (CUDA only).")
    threads: int = setting(
        0,
        "CPU compute threads; 0 takes all cores that affinity and quotas allow.",
        low=0,
        high=1024,
    )
    stall_timeout_s: float = setting(
        20.0,
        "An engine that makes no progress for so long (and 30 times what was foreseen) is ended "
        "and started again; 0: never. An engine in a thread (process: false) cannot be ended.",
        low=0,
    )
    restart_patience_s: float = setting(
        60.0, "Seconds that requests wait for a lost engine to come back before they fail.", low=0
    )
    fake_step_ms: float = setting(
        0.0, "kind fake: how long it sleeps in every step, as a device would compute.", low=0
    )


@dataclass(frozen=True, slots=True)
class SchedulerSection:
    max_prefill_tokens: int = setting(2048, "Prompt tokens in a step, at most.", low=1)
    max_mixed_tokens: int = setting(
        2048, "Prompt tokens in a step that decodes, too, at most.", low=1
    )
    max_step_ms: float = setting(
        200.0,
        "Prompt tokens make a step take no longer than this, by learned step times, or than four"
        " times what decoding takes alone: more throughput, longer gaps; 0: only tokens count.",
        low=0,
        high=600_000,
    )
    max_queue_delay_ms: float = setting(
        3.0,
        "Merge window for arrivals; only waited while nothing else could run.",
        low=0,
        high=60_000,
    )
    max_decode_sequences: int = setting(64, "Live sequences.", low=1)
    mix_phases: bool = setting(
        True, "Prompt chunks and decoding in one step; false: steps of either kind in turn."
    )
    hold_steps: bool = setting(
        True,
        "Hold a running step between two layers for a prompt that would miss its TTFT target;"
        " for engines that can.",
    )
    fit_chunks: bool = setting(
        True, "Size prompt chunks so that running streams keep their class's ITL target."
    )
    speculation: Literal["auto", "off"] = setting(
        "auto",
        "Guess tokens from the request's own text and verify them beside the next one, wherever "
        "learned step times say that it pays. Answers stay the same, up to rounding in half "
        "precision and of KV in int8.",
    )
    max_draft_tokens: int = setting(8, "Guessed tokens of one sequence in a step.", low=1, high=64)
    max_waiting: int = setting(10_000, "Requests that may wait; beyond it 503.", low=1)
    ladder: Literal["auto", "off"] = setting(
        "auto",
        "Take and undo the rungs of the healing ladder when targets are missed; off leaves them to "
        "operators.",
    )
    ladder_max_tokens: int = setting(
        512,
        "While the rung cap_batch is taken: tokens for the answer to a batch-class request whose "
        "client did not state max_tokens.",
        low=1,
    )
    ladder_pin: tuple[str, ...] = setting(
        (), "Rungs that are taken from the start.", pattern=PINNED
    )
    ladder_forbid: tuple[str, ...] = setting(
        (), "Rungs that are never taken, also if they are pinned.", pattern=RUNG
    )


@dataclass(frozen=True, slots=True)
class LogSection:
    level: Literal["debug", "info", "warning", "error"] = setting("info", "Least level logged.")
    requests: bool = setting(False, "Log one line per HTTP request.")


@dataclass(frozen=True, slots=True)
class RecordSection:
    path: str = setting(
        "", "Folder for traces of who asked when and for how much, without a text; empty: none."
    )
    max_mib: float = setting(64.0, "Size at which the next file is begun, in MiB.", low=0.01)
    keep: int = setting(16, "Files kept in this folder; the oldest are deleted.", low=1)
    steps: int = setting(100, "Engine steps recorded per second, at most.", low=0, high=10_000)
    text: bool = setting(
        False, "Record prompts as text, too: whoever can read the folder reads what people wrote."
    )


@dataclass(frozen=True, slots=True)
class Config:
    server: ServerSection = field(default_factory=ServerSection)
    model: ModelSection = field(default_factory=ModelSection)
    engine: EngineSection = field(default_factory=EngineSection)
    cache: CacheSection = field(default_factory=CacheSection)
    scheduler: SchedulerSection = field(default_factory=SchedulerSection)
    log: LogSection = field(default_factory=LogSection)
    record: RecordSection = field(default_factory=RecordSection)
    structured: StructuredSection = field(default_factory=StructuredSection)
    responses: ResponsesSection = field(default_factory=ResponsesSection)
    triton: TritonSection = field(default_factory=TritonSection)
