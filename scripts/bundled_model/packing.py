"""Turns examples into rows of a fixed length: documents end to end, none of them cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from scripts.bundled_model import corpus
from scripts.bundled_model.tokenizer import END, PAD, START
from scripts.bundled_model.turns import Example

IGNORE = -100
Ints = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Document:
    """Token ids and, for each, whether the model is trained to predict it."""

    ids: Ints
    learned: npt.NDArray[np.bool_]


def render(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    if example.text is not None:
        return example.given + example.text + PAD
    made: Any = tokenizer.apply_chat_template(example.turns, tools=example.tools, tokenize=False)
    return str(made)


class Encoder:
    """Encodes examples and marks what the assistant says."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.header = tokenizer.encode(f"{START}assistant\n")
        self.end = tokenizer.convert_tokens_to_ids(END)

    def __call__(self, example: Example) -> Document:
        ids = self.tokenizer.backend_tokenizer.encode(render(self.tokenizer, example)).ids
        plain = example.text is not None
        learned = np.ones(len(ids), np.bool_) if plain else self.answers(ids)
        if example.given:
            learned[: len(self.tokenizer.encode(example.given))] = False
        return Document(np.array(ids, np.int16), learned)

    def answers(self, ids: list[int]) -> npt.NDArray[np.bool_]:
        """True from after each assistant header to the end mark, inclusive."""
        learned = np.zeros(len(ids), np.bool_)
        width, inside = len(self.header), False
        for i, token in enumerate(ids):
            if inside:
                learned[i] = True
                inside = token != self.end
            elif i + 1 >= width and ids[i + 1 - width : i + 1] == self.header:
                inside = True
        return learned


@dataclass
class Row:
    """Documents that share one row."""

    documents: list[Document]
    used: int


def pack(documents: Iterator[Document], length: int, open_rows: int = 24) -> Iterator[Row]:
    """First fit over a few open rows; the fullest is handed out when nothing fits."""
    rows: list[Row] = []
    for document in documents:
        size = len(document.ids)
        fitting = [row for row in rows if row.used + size <= length]
        if fitting:
            row = max(fitting, key=lambda r: r.used)
            row.documents.append(document)
            row.used += size
        else:
            rows.append(Row([document], size))
        if len(rows) > open_rows:
            fullest = max(range(len(rows)), key=lambda i: rows[i].used)
            yield rows.pop(fullest)


@dataclass(frozen=True)
class Rows:
    """One training batch: all tensors are [rows, length], the mask [rows, 1, length, length]."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def to_tensors(rows: list[Row], length: int) -> Rows:
    """Pads rows, restarts positions at each document, and keeps documents apart in the mask."""
    ids = np.zeros((len(rows), length), np.int64)
    positions = np.zeros_like(ids)
    labels = np.full_like(ids, IGNORE)
    owner = np.full_like(ids, -1)
    for r, row in enumerate(rows):
        at = 0
        for d, document in enumerate(row.documents):
            span = slice(at, at + len(document.ids))
            ids[r, span] = document.ids
            positions[r, span] = np.arange(len(document.ids))
            labels[r, span] = np.where(document.learned, document.ids, IGNORE)
            labels[r, at] = IGNORE
            owner[r, span] = d
            at = span.stop
    owners = torch.from_numpy(owner)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (owners[:, :, None] == owners[:, None, :]) & causal
    tensors = [torch.from_numpy(array) for array in (ids, positions, labels)]
    return Rows(tensors[0], tensors[1], mask[:, None], tensors[2])


def batches(encoder: Encoder, seed: int, length: int, rows: int) -> Iterator[Rows]:
    """Endless batches. One in eight has rows of twice the length, for long documents."""
    rng = Random(seed)
    long_documents: list[Document] = []

    def short() -> Iterator[Document]:
        while True:
            document = encoder(corpus.example(rng))
            if len(document.ids) <= length:
                yield document
            elif len(document.ids) <= 2 * length:
                long_documents.append(document)

    packed = pack(short(), length)
    while True:
        yield to_tensors([next(packed) for _ in range(rows)], length)
        while len(long_documents) > 2 * rows:
            queue, long_documents[:] = list(long_documents), []
            long_rows = list(pack(iter(queue), 2 * length, open_rows=0))
            for at in range(0, len(long_rows) - rows // 2 + 1, rows // 2):
                yield to_tensors(long_rows[at : at + rows // 2], 2 * length)
