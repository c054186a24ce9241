"""Forwards of an encoder over whole texts of any lengths, without padding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dynamo_serve.engines.local.block_attention import BlockAttention


class Text(NamedTuple):
    """The ids of a text, or of a pair whose second one begins at `second_at`; and what is made of
    it: "mean", "last", "cls" or "score"."""

    ids: Sequence[int]
    second_at: int
    kind: str


class EncoderRunner(Protocol):
    """What runs texts, whoever does it."""

    name: str

    def vectors(self, texts: Sequence[Text]) -> list[torch.Tensor]:
        """A vector in float32 of each; neighbours of one length save time."""
        ...


@dataclass(frozen=True, slots=True)
class Encoder:
    """`backbone` is the part of `model` that makes hidden states, perhaps all of it. Positions
    begin at `first_position`; `inputs` are the names of those of the backbone."""

    model: PreTrainedModel
    backbone: Any
    first_position: int
    inputs: frozenset[str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Encoder:
        backbone = model.base_model
        names = frozenset(inspect.signature(backbone.forward).parameters)
        return cls(model, backbone, _first_position(backbone), names)

    def arguments(self, texts: Sequence[Text], rows: int) -> dict[str, torch.Tensor]:
        """All of `texts`, in so many rows of one length."""
        device, first = self.model.device, self.first_position
        arguments = {
            "input_ids": [i for text in texts for i in text.ids],
            "position_ids": [first + at for text in texts for at in range(len(text.ids))],
            "token_type_ids": [kind for text in texts for kind in _kinds(text)],
        }
        return {
            name: torch.tensor(values, dtype=torch.int64, device=device).view(rows, -1)
            for name, values in arguments.items()
            if name in self.inputs
        }


def _kinds(text: Text) -> list[int]:
    """The type ids: 1 from where the second text of a pair begins."""
    first = text.second_at or len(text.ids)
    return [0] * first + [1] * (len(text.ids) - first)


def _first_position(backbone: torch.nn.Module) -> int:
    """Families that count from behind their padding token say so in their table of positions."""
    for module in backbone.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding):
            return 0 if table.padding_idx is None else table.padding_idx + 1
    return 0


class PackedEncoder:
    """All texts of a step end to end: every product reads the weights once."""

    name = "packed"

    def __init__(self, encoder: Encoder, attention: BlockAttention) -> None:
        self._encoder = encoder
        self._attention = attention

    def vectors(self, texts: Sequence[Text]) -> list[torch.Tensor]:
        lengths = [len(text.ids) for text in texts]
        self._attention.begin(lengths)
        found = self._encoder.backbone(**self._encoder.arguments(texts, 1))
        states = found.last_hidden_state[0].split(lengths)
        scores = self._scores([s[0] for s, t in zip(states, texts, strict=True) if _scored(t)])
        return [
            scores.pop(0) if _scored(text) else pooled(part, text.kind)
            for part, text in zip(states, texts, strict=True)
        ]

    def _scores(self, firsts: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the model's own head makes of the first tokens' states [hidden] of some texts: the
        rest of its forward is run with these, as if they were what its backbone had made."""
        if not firsts:
            return []
        model, backbone = self._encoder.model, self._encoder.backbone
        features = torch.stack(firsts)[:, None]
        pooler = getattr(backbone, "pooler", None)
        made = BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=pooler(features) if pooler else None
        )
        prefix = model.base_model_prefix
        model._modules[prefix] = _Made(made)
        try:
            ids = torch.zeros(len(firsts), 1, dtype=torch.int64, device=features.device)
            logits: torch.Tensor = model(input_ids=ids).logits
        finally:
            model._modules[prefix] = backbone
        return list(logits.float())


class _Made(torch.nn.Module):  # type: ignore[misc]
    """Stands in for a backbone whose output is there already."""

    def __init__(self, output: BaseModelOutputWithPooling) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPooling:
        return self._output


class EncoderByLength:
    """Texts of one length side by side, the others after them: for models whose own attention has
    to be used. It needs no mask, for nothing is padded."""

    name = "by_length"

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def vectors(self, texts: Sequence[Text]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for (_, is_scored), alike in groupby(texts, key=lambda t: (len(t.ids), _scored(t))):
            rows = list(alike)
            arguments = self._encoder.arguments(rows, len(rows))
            if is_scored:
                found += self._encoder.model(**arguments).logits.float()
            else:
                states = self._encoder.backbone(**arguments).last_hidden_state
                found += [pooled(s, t.kind) for s, t in zip(states, rows, strict=True)]
        return found


def _scored(text: Text) -> bool:
    return text.kind == "score"


def pooled(states: torch.Tensor, kind: str) -> torch.Tensor:
    """Of the hidden states [tokens, hidden] of a whole text, in float32."""
    match kind:
        case "mean":
            return states.mean(dim=0, dtype=torch.float32)
        case "last":
            return states[-1].float()
        case "cls":
            return states[0].float()
    raise AssertionError(f"no pooling is called {kind!r}")
