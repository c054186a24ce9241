"""From wishes to a running model: load, look, size the pool, check, warm up."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynamo_serve.cgroups import usable_cores
from dynamo_serve.config import CacheSection, EngineSection, ModelSection
from dynamo_serve.core.batch import Work
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.engines.local.attention import (
    AttentionBackend,
    BackendNeeds,
    LayerSpec,
    PagedAttention,
)
from dynamo_serve.engines.local.backends import choose_backend
from dynamo_serve.engines.local.copier import Copier
from dynamo_serve.engines.local.discovery import (
    LayerRecorder,
    architecture,
    discover_layers,
    is_headless,
)
from dynamo_serve.engines.local.facts import model_facts, page_facts
from dynamo_serve.engines.local.graphs import DecodeGraphs, PageGeometry, record
from dynamo_serve.engines.local.kv_cache import (
    KVCache,
    PoolSize,
    bytes_per_token,
    page_dtype,
    size_pool,
)
from dynamo_serve.engines.local.loader import (
    load_config,
    load_model,
    position_limit,
    resolve_device,
)
from dynamo_serve.engines.local.malloc import keep_freed_memory
from dynamo_serve.engines.local.native_model import NotNative
from dynamo_serve.engines.local.native_runner import NativeRunner
from dynamo_serve.engines.local.native_start import NativeWish
from dynamo_serve.engines.local.page_copies import PageCopier
from dynamo_serve.engines.local.pooling_kind import pooling_kind
from dynamo_serve.engines.local.runner import ModelRunner
from dynamo_serve.engines.local.self_check import PageCheck, Runner
from dynamo_serve.engines.local.step import Computed, pack
from dynamo_serve.engines.local.tiers import build_tiers, host_bytes
from dynamo_serve.errors import EngineStartError

logger = logging.getLogger(__name__)

HEAD = ("lm_head.",)  # of a model without one nobody asks for text: its logits are anything
_names = (f"dynamo_serve_{i}" for i in itertools.count())  # one attention function per engine


class Limits(NamedTuple):
    """The largest steps the scheduler will plan."""

    max_decode_sequences: int
    max_prefill_tokens: int


@dataclass(frozen=True, slots=True)
class Wishes:
    """The settings that the local engine uses; `path` is a folder."""

    model: ModelSection
    engine: EngineSection
    cache: CacheSection
    limits: Limits
    path: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A model that runs: what `LocalEngine` holds between start and close."""

    spec: EngineSpec
    cache: KVCache
    runner: Runner
    graphs: DecodeGraphs | None
    attention: str
    copier: Copier | None
    parts: PageCopier

    def run(self, work: Sequence[Work]) -> Computed:
        """Logits of the works that sample, and hidden states of those that pool, in their order."""
        if self.graphs is not None and self.graphs.takes(work):
            return Computed(self.graphs.run(work))
        step = pack(work, self.spec.page_size, self.runner.model.device)
        return self.runner.run(step)

    def close(self) -> None:
        if self.copier:
            self.copier.close()
        del ALL_ATTENTION_FUNCTIONS[self.attention]


class Hook(NamedTuple):
    """Our attention function as transformers knows it, and what stands in for it at first."""

    name: str
    recorder: LayerRecorder


def start_up(wishes: Wishes, progress: Callable[[str, float], None]) -> Ready:
    """Raises `EngineStartError` with the remedy; nothing stays registered then."""
    native = NativeWish(wishes.model, wishes.engine)
    try:
        return _with_attention(wishes, progress, native)
    except NotNative as error:
        native.gave_up(str(error))
    gc.collect()  # the error held the packed model; its memory is wanted again
    return _with_attention(wishes, progress, native)


def _with_attention(
    wishes: Wishes, progress: Callable[[str, float], None], native: NativeWish
) -> Ready:
    attention = next(_names)
    recorder = LayerRecorder()
    ALL_ATTENTION_FUNCTIONS[attention] = recorder
    try:
        return _start_up(wishes, progress, Hook(attention, recorder), native)
    except torch.OutOfMemoryError as error:
        del ALL_ATTENTION_FUNCTIONS[attention]
        raise EngineStartError(
            f"out of memory on {wishes.engine.device} while starting {wishes.path}; lower "
            "cache.memory_fraction or scheduler.max_prefill_tokens, or choose a smaller model"
        ) from error
    except BaseException:
        del ALL_ATTENTION_FUNCTIONS[attention]
        raise


def _start_up(
    wishes: Wishes, progress: Callable[[str, float], None], hook: Hook, native: NativeWish
) -> Ready:
    model, modules, needs, reserved = _load(wishes, progress, hook, native.kernels)
    longest = _longest_wished(model, wishes.model.max_model_len)
    size = _pool_size(wishes, needs, longest, reserved)
    max_model_len = _longest_served(longest, wishes.model.max_model_len, size)
    cache = KVCache(needs.layers, size, needs.page_dtype, needs.device)
    facts = model_facts(model, size, needs.page_dtype) | {"quantization": wishes.model.quantization}
    check = PageCheck(model, [layer.window or 0 for layer in needs.layers], hook.name, size)
    packed = native.run(model, needs, cache, max_model_len, check)
    graphs = None
    if packed is not None:
        runner: Runner = packed
        facts |= packed.facts
    else:
        plain, backend = _plain(wishes, model, needs, modules, cache, hook)
        check.compare(plain, needs.page_dtype)
        runner = plain
        facts |= {"attention_backend": backend.name, "kernels": "torch"}
        if wishes.engine.cuda_graphs and needs.device.type == "cuda":
            geometry = PageGeometry.of(size.page_size, max_model_len, cache.scratch_page)
            graphs = record(plain, backend, geometry, wishes.limits.max_decode_sequences, progress)
    _take_memory(cache, needs.device)
    tiers, copier = build_tiers(wishes.cache, cache, page_facts(facts, wishes.model, wishes.path))
    progress("warm-up", 1.0)
    spec = EngineSpec(
        *(max_model_len, size.page_size, size.num_pages, model.config.get_text_config().vocab_size),
        facts=facts | {"cuda_graphs": graphs is not None},
        verifies_drafts=graphs is None,  # with one, a step has one token for each sequence
        holds_steps=isinstance(runner, NativeRunner),
        tiers=tiers,
        copy_seconds=PageCopier(cache).measure(),
        follows_grammars=True,
        pooling=pooling_kind(wishes.path, wishes.model.pooling, is_encoder=False),
        vector_size=model.config.get_text_config().hidden_size,
        generates=not is_headless(model.config),
    )
    return Ready(spec, cache, runner, graphs, hook.name, copier, PageCopier(cache))


def _take_memory(cache: KVCache, device: torch.device) -> None:
    """On a CPU; not sooner than weights that were packed could go back."""
    if device.type == "cpu":
        keep_freed_memory()
        cache.take_memory()


def _load(
    wishes: Wishes, progress: Callable[[str, float], None], hook: Hook, kernels: str
) -> tuple[PreTrainedModel, list[int], BackendNeeds, int]:
    """The model, its attention modules' ids, what they ask for, and bytes still to be taken."""
    device = resolve_device(wishes.engine.device)
    use(device, wishes.engine.threads)
    progress("weights", 0.0)
    config = load_config(wishes.path)
    unused = HEAD if is_headless(config) else ()
    model = load_model(wishes.path, config, wishes.model.dtype, device, hook.name, unused=unused)
    progress("weights", 1.0)
    progress("warm-up", 0.0)
    layers, reserved = _examine(model, hook.recorder, wishes.limits)
    specs, page_size = [*layers.values()], wishes.cache.page_size
    kv_dtype = page_dtype(wishes.cache.kv_dtype, model.dtype, specs)
    needs = BackendNeeds(specs, page_size, model.dtype, device, kernels, kv_dtype)
    return model, [*layers], needs, reserved


def _plain(
    wishes: Wishes,
    model: PreTrainedModel,
    needs: BackendNeeds,
    modules: Sequence[int],
    cache: KVCache,
    hook: Hook,
) -> tuple[ModelRunner, AttentionBackend]:
    """Transformers' own modules, with our attention; `modules` are ids of the attention layers."""
    backend = choose_backend(wishes.engine.attention, needs)
    parts = zip(modules, zip(needs.layers, cache.layers, strict=True), strict=True)
    paged = PagedAttention(dict(parts), backend)
    ALL_ATTENTION_FUNCTIONS[hook.name] = paged
    return ModelRunner(model, paged), backend


def use(device: torch.device, threads: int) -> None:
    """Set what torch keeps for this process or thread; 0 `threads` takes all usable cores."""
    torch.set_num_threads(threads or usable_cores())
    if device.index is not None:
        # Graphs and Triton kernels go to the current device, wherever their tensors are.
        torch.cuda.set_device(device)


def _examine(
    model: PreTrainedModel, recorder: LayerRecorder, limits: Limits
) -> tuple[dict[int, LayerSpec], int]:
    """The attention layers by module id, and the bytes that are still to be taken: by activations
    on CUDA, by packed weights on the CPU."""
    device, longest = model.device, position_limit(model.config).num_tokens
    if device.type != "cuda":
        # What is read from a file counts as free until the kernels' own weights take its place.
        packed = sum(p.numel() * p.element_size() for p in model.parameters())
        return discover_layers(model, recorder, 2, longest), packed
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    layers = discover_layers(model, recorder, limits.max_prefill_tokens, longest)
    activations = torch.cuda.max_memory_allocated(device) - before
    vocab_size = model.config.get_text_config().vocab_size
    sampling = 6 * 4 * vocab_size * limits.max_decode_sequences  # float copies while it chooses
    return layers, activations + sampling


def _longest_wished(model: PreTrainedModel, wish: int) -> int:
    limit = position_limit(model.config)
    if wish > limit.num_tokens:
        raise EngineStartError(
            f"model.max_model_len: {wish} is more than the {limit.num_tokens} tokens that "
            f"{architecture(model.config)} is good for ({limit.reason})"
        )
    return wish or limit.num_tokens


def _longest_served(longest: int, wish: int, size: PoolSize) -> int:
    if wish > size.num_tokens:
        logger.warning(
            "model.max_model_len: %d was asked for, the KV pool holds %d tokens; raise "
            "cache.num_pages or cache.memory_fraction",
            *(wish, size.num_tokens),
        )
    return min(longest, size.num_tokens)


def _pool_size(wishes: Wishes, needs: BackendNeeds, longest: int, reserved: int) -> PoolSize:
    # A sequence may leave its last page partly empty, so pages are counted whole.
    pages = -(-longest // needs.page_size) * wishes.limits.max_decode_sequences
    token_bytes = bytes_per_token(needs.layers, needs.page_dtype)
    useful_tokens = pages * needs.page_size
    if needs.device.type == "cpu":
        reserved += host_bytes(wishes.cache)
    return size_pool(wishes.cache, token_bytes, useful_tokens, needs.device, reserved)
