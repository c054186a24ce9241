"""One forward of the model over a packed step."""

from __future__ import annotations

import inspect

import torch
from transformers import PreTrainedModel

from dynamo_serve.engines.local.attention import PagedAttention
from dynamo_serve.engines.local.step import PackedStep


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

    def forward(self, step: PackedStep) -> torch.Tensor:
        """`logits` for a step that attention was prepared for."""
        inputs = {"input_ids": step.input_ids, "position_ids": step.position_ids}
        if self._can_pick:
            inputs["logits_to_keep"] = step.sample_index
        logits: torch.Tensor = self.model(**inputs, use_cache=False).logits[0]
        return logits if self._can_pick else logits[step.sample_index]
