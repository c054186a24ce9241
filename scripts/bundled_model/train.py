"""Makes the bundled model: corpus, tokenizer, training, bf16 weights.

python scripts/bundled_model/train.py --out DIR
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ["OMP_WAIT_POLICY"] = "passive"  # the machine may be shared

import torch

from scripts.bundled_model import corpus
from scripts.bundled_model import tokenizer as bpe
from scripts.bundled_model.network import VOCAB, Network, config
from scripts.bundled_model.packing import Encoder, Rows, batches, render

TOKENIZER_SAMPLE = 12_000
WARMUP = 100


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=3300)
    parser.add_argument("--start", type=Path, help="go on from the weights of this folder")
    parser.add_argument("--minutes", type=float, default=0.0, help="train so long, not --steps")
    parser.add_argument("--rows", type=int, default=8, help="rows per batch")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=500, help="steps between saves to --out")
    return parser.parse_args()


def make_tokenizer(out: Path, seed: int) -> None:
    """Trains the tokenizer on rendered examples; a bare one renders them first."""
    bpe.save(bpe.train(["a"], 300), out)
    plain = bpe.load(out)
    rng = Random(seed)
    texts = [render(plain, corpus.example(rng)) for _ in range(TOKENIZER_SAMPLE)]
    bpe.save(bpe.train(texts, VOCAB), out)


class Schedule:
    """Linear warm-up, a constant rate, then a linear decay over the last quarter of the steps.

    With a number of minutes the number of steps is settled when three quarters of them have
    passed. It is reported, and the same number given as --steps makes the same model.
    """

    def __init__(self, top: float, steps: int, minutes: float) -> None:
        self.top = top
        self.minutes = minutes
        self.steps = 0 if minutes else steps

    def running(self, step: int) -> bool:
        return not self.steps or step < self.steps

    def rate(self, step: int, passed_minutes: float) -> float:
        """The learning rate of a step."""
        if not self.steps and passed_minutes >= 0.75 * self.minutes:
            self.steps = math.ceil((step + 1) / 0.75)
        warm = min(1.0, (step + 1) / WARMUP)
        if not self.steps:
            return self.top * warm
        left = (self.steps - step) / (0.25 * self.steps)
        return self.top * min(warm, max(0.01, left))


def used(rows: Rows) -> int:
    """Tokens of a batch that have one before them; padding stands at position 0."""
    return int((rows.positions > 0).sum().item())


def report(step: int, steps: int, loss: float, tokens: int, began: float) -> None:
    passed = time.monotonic() - began
    left = f"{passed / step * (steps - step) / 60:.1f} min" if steps else "not settled"
    print(
        f"step {step}/{steps or '?'}  loss {loss:.4f}  {tokens / passed:,.0f} tokens/s"
        f"  {tokens / 1e6:.2f}M tokens  {passed / 60:.1f} min  ETA {left}",
        flush=True,
    )


def train(args: argparse.Namespace) -> dict[str, float]:
    """Runs all steps and saves on the way; returns the figures of the run."""
    loaded = bpe.load(args.out)
    torch.manual_seed(args.seed)
    network = Network(config(loaded.pad_token_id, loaded.eos_token_id), args.lr)
    if args.start:
        network.load(args.start)
    stream = batches(Encoder(loaded), args.seed + 1, args.length, args.rows)
    schedule = Schedule(args.lr, args.steps, args.minutes)
    average, tokens, step, began = 0.0, 0, 0, time.monotonic()
    while schedule.running(step):
        rows = next(stream)
        loss = network.step(rows, schedule.rate(step, (time.monotonic() - began) / 60))
        tokens += used(rows)
        keep = min(0.98, step / (step + 1))
        average = keep * average + (1 - keep) * loss
        step += 1
        if step % 25 == 0:
            report(step, schedule.steps, average, tokens, began)
        if step % args.save_every == 0:
            network.save(args.out)
    network.save(args.out)
    minutes = (time.monotonic() - began) / 60
    return {"steps": step, "loss": average, "tokens": tokens, "minutes": minutes}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start:
        shutil.copytree(args.start, args.out, dirs_exist_ok=True)
    else:
        make_tokenizer(args.out, args.seed)
    figures = train(args)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
