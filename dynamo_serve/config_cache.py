"""The settings of the KV pool, of the tiers below it, and of whoever is told about pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynamo_serve.config_field import setting

ENDPOINT = r"(tcp://(\*|[\w.-]+|\[[\da-fA-F:.]+\]):\d{1,5})?"


@dataclass(frozen=True, slots=True)
class CacheSection:
    page_size: int = setting(16, "Tokens in a KV page.", low=1, high=1024)
    num_pages: int = setting(0, "Pages in the KV pool; 0 sizes it from memory_fraction.", low=0)
    memory_fraction: float = setting(
        0.0,
        "Share of the device's free memory for KV after loading; 0 means 0.85 on CUDA, 0.4 on CPU.",
        low=0,
        high=0.98,
    )
    kv_dtype: Literal["auto", "int8"] = setting(
        "auto",
        "What pages keep KV in; auto: model.dtype. int8 holds nearly twice the tokens of bfloat16, "
        "and a step reads half as much; answers change a little.",
    )
    prefix_sharing: bool = setting(True, "Reuse the pages of equal prompt heads.")
    partial_pages: bool = setting(
        True,
        "With prefix_sharing: copy the part of a page that a prompt begins with, where that is "
        "predicted to take less time than computing it.",
    )
    stale_s: float = setting(
        3600.0,
        "Cached pages unused for so many seconds go first, whosesoever they are; 0: never.",
        low=0,
    )
    shared_prefixes: str = setting(
        "",
        "YAML file of prefixes that tenants share, read at the start; empty: none.",
    )
    pinned_fraction: float = setting(
        0.25,
        "Share of the pool that pinned prefixes of all tenants may take beyond what these were "
        "guaranteed; never what the longest request needs.",
        low=0,
        high=1,
    )
    pinned_ttl_max_s: float = setting(
        86_400.0, "Longest time for which a prefix may be pinned, in seconds.", low=1
    )
    host_gib: float = setting(
        0.0, "Host memory for pages that have to leave the device, in GiB; 0: none.", low=0
    )
    disk_gib: float = setting(
        0.0, "Disk space for pages that have to leave host memory, in GiB; 0: none.", low=0
    )
    disk_path: str = setting(
        "",
        "Folder of the disk tier. The next server with the same model finds its prefixes there; "
        "what people wrote is in it, so keep it as private as they would.",
    )
    kv_events: str = setting(
        "",
        "Where cluster routers are told what becomes of KV pages, such as tcp://127.0.0.1:5557; "
        "empty: nowhere. What people wrote is in these events, and nobody is asked for a key.",
        pattern=ENDPOINT,
    )
    kv_events_topic: str = setting("", "Topic of these events, such as kv@10.0.0.7@my-model.")
    kv_events_replay: str = setting(
        "",
        "Where routers ask for events that they have missed, such as tcp://127.0.0.1:5558; empty: "
        "nowhere.",
        pattern=ENDPOINT,
    )
    kv_events_buffer: int = setting(
        10_000,
        "Events that may wait to be published; beyond it everything is told anew.",
        low=1,
    )
