"""Texts embedded per second: one at a time, many clients, and all in one call.

    python -m bench.embeddings                       # a random BERT of MiniLM-L6's shape
    python -m bench.embeddings --model FOLDER        # any model; decoders, too
    python -m bench.embeddings --set model.dtype=bfloat16

Texts are token ids of seeded lengths (median 40, from 5 to 250), so that no tokenizer counts. One
server answers in turns, round by round; then, with nothing beside it, `transformers` embeds the
same texts in padded batches of 32, in their order and sorted by length. A table, then a JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

from bench.server import free_port, our_command, running

MEDIAN, SPREAD, SHORTEST, LONGEST = 40, 0.8, 5, 250
CLIENTS = 16
PADDED = 32
VOCAB = 30_522
Texts = Sequence[Sequence[int]]


def make_bert(folder: Path) -> None:
    """MiniLM-L6's shape, 22.7 M parameters, random weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "intermediate_size": 1536}
    config = BertConfig(**shape, num_hidden_layers=6, num_attention_heads=12, vocab_size=VOCAB)
    BertModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def texts_of(count: int, vocab_size: int) -> list[list[int]]:
    rng = random.Random(0)
    wished = [round(MEDIAN * math.exp(rng.gauss(0, SPREAD))) for _ in range(count)]
    lengths = [min(LONGEST, max(SHORTEST, length)) for length in wished]
    return [[rng.randrange(vocab_size // 2, vocab_size) for _ in range(n)] for n in lengths]


def rate(work: Callable[[], None], count: int) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def measure_server(args: argparse.Namespace, folder: Path, texts: Texts) -> dict[str, list[float]]:
    port, log = free_port(), Path(tempfile.gettempdir()) / "bench-embeddings.log"
    found: dict[str, list[float]] = {"one at a time": [], f"{CLIENTS} clients": [], "one call": []}
    command = our_command(folder, port, args.set)
    with running(command, port, log) as server, httpx.Client(timeout=600) as http:
        print(json.dumps(http.get(f"{server.url}/v1/server").json()["engine"]))

        def embed(*some: Sequence[int]) -> None:
            body = {"input": some, "encoding_format": "base64"}
            http.post(f"{server.url}/v1/embeddings", json=body).raise_for_status()

        def alone() -> None:
            for text in texts[: args.alone]:
                embed(text)

        def by_clients() -> None:
            with ThreadPoolExecutor(CLIENTS) as threads:
                list(threads.map(embed, texts))

        embed(*texts)  # a warm-up: step times are learned
        for _ in range(args.rounds):
            found["one at a time"].append(rate(alone, min(args.alone, len(texts))))
            found[f"{CLIENTS} clients"].append(rate(by_clients, len(texts)))
            found["one call"].append(rate(lambda: embed(*texts), len(texts)))
    return found


def measure_transformers(folder: Path, texts: Texts, rounds: int) -> dict[str, list[float]]:
    model = AutoModel.from_pretrained(folder).eval()

    def padded(some: Texts) -> None:
        for at in range(0, len(some), PADDED):
            rows = some[at : at + PADDED]
            width = max(map(len, rows))
            ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            with torch.inference_mode():
                states = model(input_ids=ids, attention_mask=mask).last_hidden_state
                (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    ordered = sorted(texts, key=len)
    padded(ordered)
    return {
        "transformers, padded": [rate(lambda: padded(texts), len(texts)) for _ in range(rounds)],
        "transformers, sorted": [rate(lambda: padded(ordered), len(texts)) for _ in range(rounds)],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: a random BERT of MiniLM-L6's shape")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--alone", type=int, default=64, help="of these, one at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as made:
        folder = args.model or Path(made)
        if args.model is None:
            make_bert(folder)
        facts: dict[str, Any] = json.loads((folder / "config.json").read_text())
        texts = texts_of(args.texts, facts["vocab_size"])
        found = measure_server(args, folder, texts)
        found |= measure_transformers(folder, texts, args.rounds)
    tokens = sum(map(len, texts)) / len(texts)
    print(f"{len(texts)} texts of {tokens:.0f} tokens on average\n")
    print("| texts/s | median | least | most |\n| --- | --- | --- | --- |")
    for name, rates in found.items():
        print(f"| {name} | {statistics.median(rates):.0f} | {min(rates):.0f} | {max(rates):.0f} |")
    print("\n" + json.dumps({name: [round(r, 1) for r in rates] for name, rates in found.items()}))


if __name__ == "__main__":
    main()
