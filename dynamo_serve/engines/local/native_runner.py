"""One forward of a natively packed model over a packed step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from dynamo_serve.engines.local.native_model import NativeModel
from dynamo_serve.engines.local.native_step import NativeStep
from dynamo_serve.engines.local.step import Computed, PackedStep
from dynamo_serve.native import structs
from dynamo_serve.native.library import Kernels


class NativeRunner:
    """Runs steps through the kernels; what is left of `model` holds its settings."""

    def __init__(
        self, model: PreTrainedModel, native: NativeModel, kernels: Kernels, page_size: int
    ) -> None:
        self.model = model
        self.native = native
        self._kernels = kernels
        self._page_size = page_size
        self._between: ctypes._FuncPointer | None = None
        self._every = 0  # nanoseconds
        self._spent: structs.Spent | None = None

    @contextmanager
    def watched(self) -> Iterator[dict[structs.Stage, float]]:
        """What the steps in between have spent, in seconds by stage, is known at its end."""
        self._spent = spent = structs.Spent()
        found: dict[structs.Stage, float] = {}
        try:
            yield found
        finally:
            found |= {stage: spent.nanoseconds[stage] / 1e9 for stage in structs.Stage}
            self._spent = None

    def hold_for(self, between: Callable[[], None], every: float) -> None:
        """Call `between` between two layers of a step, but not of one that runs within it."""
        self._between, self._every = structs.Between(between), int(every * 1e9)

    @property
    def facts(self) -> dict[str, str | int | float | bool]:
        """What the log and `/v1/server` say of it."""
        return {
            "attention_backend": "native",
            "kernels": self._kernels.name,
            "weights_bytes": self.native.weights_bytes,
            "weights_read_bytes": self.native.weights_bytes - self.native.embedding_bytes,
        }

    def logits(self, step: PackedStep) -> torch.Tensor:
        """Logits [n, vocab] in float32 of the n sampling tokens."""
        return self.run(step).logits

    def run(self, step: PackedStep) -> Computed:
        """The logits, and the hidden states that `step` wants, in float32."""
        arrays = NativeStep(step, self._page_size)
        logits = torch.empty(len(step.sample_index), self.native.vocab_size)
        arrays.struct.logits = logits.data_ptr()
        states = None
        if step.state_index is not None:
            states = torch.empty(len(step.state_index), self.native.struct.hidden)
            arrays.struct.states = states.data_ptr()
        if self._between is not None:
            arrays.struct.between, arrays.struct.every = self._between, self._every
        if self._spent is not None:
            arrays.struct.spent = ctypes.addressof(self._spent)
        self._kernels.forward(self.native.struct, arrays.struct)
        cap = self.native.softcap
        return Computed(logits if cap is None else torch.tanh(logits / cap) * cap, states)
