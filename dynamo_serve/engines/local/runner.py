"""One forward of the model over a packed step."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from dynamo_serve.engines.local.attention import PagedAttention
from dynamo_serve.engines.local.step import Computed, PackedStep


class ModelRunner:
    """Runs steps through a transformers model whose attention is `attention`."""

    def __init__(self, model: PreTrainedModel, attention: PagedAttention) -> None:
        self.model = model
        self.attention = attention
        self._can_pick = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, step: PackedStep) -> torch.Tensor:
        """Logits [n, vocab] of the n sampling tokens; only those go through the model's head."""
        self.attention.begin(step)
        return self.forward(step)

    def run(self, step: PackedStep) -> Computed:
        """The logits, and the hidden states that `step` wants."""
        if step.state_index is None:
            return Computed(self.logits(step))
        found: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            found.append(output[0][0])

        # Models differ in what they do between this and their logits: they do it themselves.
        watched = self.model.base_model.register_forward_hook(keep)
        try:
            logits = self.logits(step)
        finally:
            watched.remove()
        (states,) = found
        return Computed(logits, states[step.state_index])

    def forward(self, step: PackedStep) -> torch.Tensor:
        """`logits` for a step that attention was prepared for."""
        inputs = {"input_ids": step.input_ids, "position_ids": step.position_ids}
        if self._can_pick:
            inputs["logits_to_keep"] = step.sample_index
        logits: torch.Tensor = self.model(**inputs, use_cache=False).logits[0]
        return logits if self._can_pick else logits[step.sample_index]
