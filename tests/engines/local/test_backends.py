"""Kernels that read pages in place, checked on the CPU by standing in for the kernel."""

from __future__ import annotations

import logging
import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from dynamo_serve.core.batch import Work
from dynamo_serve.core.request import Sampling
from dynamo_serve.engines.local import triton_attention, varlen_attention
from dynamo_serve.engines.local.attention import BackendNeeds, BackendUnavailable, LayerSpec
from dynamo_serve.engines.local.backends import BUILDERS, choose_backend
from dynamo_serve.engines.local.ragged import ragged_args
from dynamo_serve.engines.local.step import Row, pack, packing_order
from dynamo_serve.engines.local.trial import try_backend
from dynamo_serve.engines.local.varlen_attention import VarlenAttention

CPU = torch.device("cpu")
PLAIN = LayerSpec(4, 2, 8, 8, 0.35)
SLIDING = LayerSpec(4, 2, 8, 8, 0.35, window=3)


def emulated_varlen(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    num_splits: int,
) -> None:
    """torch's documented semantics of varlen_attn_out, one query at a time."""
    assert cu_seq_k is None and num_splits == 1 and out.is_contiguous() and query.is_contiguous()
    assert {t.dtype for t in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
    assert enable_gqa == (query.shape[1] != key.shape[2])
    group = query.shape[1] // key.shape[2]
    bounds = cu_seq_q.tolist()
    for i, (start, stop) in enumerate(pairwise(bounds)):
        used = int(seqused_k[i])
        assert stop - start <= max_q and used <= max_k
        keys = key[block_table[i].long()].flatten(0, 1)[:used].repeat_interleave(group, 1)
        values = value[block_table[i].long()].flatten(0, 1)[:used].repeat_interleave(group, 1)
        for t in range(start, stop):
            at = used - (stop - t)  # causal masks are aligned at the end
            first = 0 if window_size[0] < 0 else max(0, at - window_size[0])
            last = at + 1 + window_size[1]
            scores = torch.einsum("hd,lhd->hl", query[t], keys[first:last]) * scale
            out[t] = torch.einsum("hl,lhd->hd", scores.softmax(-1), values[first:last])


@pytest.mark.parametrize("page_size", [2, 4, 16])
@pytest.mark.parametrize("layer", [PLAIN, SLIDING, LayerSpec(2, 2, 8, 8, 1.0)], ids=str)
def test_varlen_arguments_describe_the_step(layer: LayerSpec, page_size: int) -> None:
    backend = VarlenAttention(emulated_varlen, page_size, CPU)
    try_backend(backend, BackendNeeds([layer], page_size, torch.float32, CPU))


def test_trial_finds_a_kernel_that_ignores_the_window() -> None:
    def deaf(*args: Any, **kwargs: Any) -> None:
        emulated_varlen(*args, **(kwargs | {"window_size": (-1, 0)}))

    needs = BackendNeeds([PLAIN, SLIDING], 4, torch.float32, CPU)
    try_backend(VarlenAttention(deaf, 4, CPU), needs._replace(layers=[PLAIN]))
    with pytest.raises(BackendUnavailable, match="off by"):
        try_backend(VarlenAttention(deaf, 4, CPU), needs)


@pytest.mark.parametrize("page_size", [1, 16, 1024])
def test_trial_covers_decodes_alone_and_chunks_longer_than_a_block(page_size: int) -> None:
    longest: list[int] = []

    def noting(*args: Any, **kwargs: Any) -> None:
        longest.append(args[6])
        emulated_varlen(*args, **kwargs)

    layer = LayerSpec(1, 1, 4, 4, 0.5)
    needs = BackendNeeds([layer], page_size, torch.float32, CPU)
    try_backend(VarlenAttention(noting, page_size, CPU), needs)
    assert min(longest) == 1 and max(longest) > triton_attention.MAX_ROWS


@pytest.mark.parametrize(
    ("key_dim", "dtype", "rows"),
    [
        (128, torch.bfloat16, 64),
        (256, torch.float16, 64),
        (64, torch.float32, 64),
        (96, torch.float32, 32),
        (256, torch.float32, 16),
    ],
)
def test_a_kernel_takes_fewer_rows_where_they_are_wide(
    key_dim: int, dtype: torch.dtype, rows: int
) -> None:
    assert triton_attention.most_rows(key_dim, dtype) == rows


def test_trial_reports_what_a_kernel_raises() -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("page size must be a multiple of 256")

    with pytest.raises(BackendUnavailable, match="multiple of 256"):
        needs = BackendNeeds([PLAIN], 4, torch.float32, CPU)
        try_backend(VarlenAttention(broken, 4, CPU), needs)


def test_installed_torch_offers_the_varlen_call_that_we_make() -> None:
    import inspect

    parameters = inspect.signature(varlen_attention._find_function()).parameters
    ours = inspect.signature(emulated_varlen).parameters
    assert list(ours)[:8] == list(parameters)[:8]
    assert set(ours) <= set(parameters)


@pytest.mark.parametrize(
    ("layer", "dtype", "reason"),
    [
        (PLAIN, torch.float32, "float32"),
        (LayerSpec(4, 2, 8, 8, 1.0, softcap=3.0), torch.bfloat16, "soft caps"),
        (LayerSpec(4, 2, 24, 16, 1.0), torch.bfloat16, "heads of 24"),
        (LayerSpec(4, 2, 512, 512, 1.0), torch.bfloat16, "heads of 512"),
    ],
)
def test_varlen_says_what_it_cannot_do(layer: LayerSpec, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=reason):
        varlen_attention.build(BackendNeeds([layer], 16, dtype, CPU))


def test_auto_logs_every_backend_it_passes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class OnCuda:  # a device that says it is a GPU, and nothing else
        type = "cuda"

    def refuse(needs: BackendNeeds) -> Any:
        raise BackendUnavailable("no such kernel")

    monkeypatch.setitem(BUILDERS, "varlen", refuse)
    monkeypatch.setitem(BUILDERS, "triton", refuse)
    needs = BackendNeeds([PLAIN], 4, torch.float32, OnCuda())
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", needs).name == "torch"
    assert [r.getMessage() for r in caplog.records] == [
        f"attention backend {name} cannot run here: no such kernel" for name in ("varlen", "triton")
    ]


def test_ragged_args_of_a_mixed_step() -> None:
    rows = [Row(1, 8, (5, 2, 9)), Row(3, 0, (7, 1)), Row(2, 3, (4, 8, 6))]
    args = ragged_args(rows, 4, CPU)
    assert args.query_starts.tolist() == [0, 1, 4, 6]
    assert args.kv_lengths.tolist() == [9, 3, 5]
    assert args.page_table.tolist() == [[5, 2, 9], [7, 0, 0], [4, 8, 0]]
    assert (args.max_query, args.max_kv) == (3, 9)
    assert ragged_args(rows, 4, CPU, width=6).page_table.shape == (3, 6)


def test_slots_follow_the_page_table() -> None:
    work = [
        Work("a", (1, 2, 3, 4, 5), 2, (9, 4), False, Sampling(), 7),
        Work("b", (6,), 4, (3, 0), True, Sampling(), 2),
        Work("c", (7,), 3, (8,), True, Sampling(), 2),
    ]
    step = pack(packing_order(work), 4, CPU)
    assert step.input_ids.tolist() == [[7, 6, 1, 2, 3, 4, 5]]
    assert step.position_ids.tolist() == [[3, 4, 2, 3, 4, 5, 6]]
    assert step.slots.tolist() == [35, 0, 38, 39, 16, 17, 18]
    assert step.sample_index.tolist() == [0, 1]
    assert math.isfinite(float(step.slots.sum()))
