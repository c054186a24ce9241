"""What bfloat16, int8 weights and int8 KV do to a model's answers, on a text given to it.

    python -m bench.accuracy MODEL FILE...

Against float32: how often the likeliest token is the same, how far the logits are off, and the
cross-entropy of the text. A JSON line last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dynamo_serve import settings
from dynamo_serve.core.batch import Work
from dynamo_serve.core.request import Sampling
from dynamo_serve.engines.local import LocalEngine
from dynamo_serve.engines.local.step import pack

LENGTH = 512  # tokens that are seen at once
KINDS = {
    "float32": ("model.dtype=float32",),
    "bfloat16": ("model.dtype=bfloat16",),
    "bfloat16, KV int8": ("model.dtype=bfloat16", "cache.kv_dtype=int8"),
    "int8": ("model.dtype=bfloat16", "model.quantization=int8"),
    "int8, KV int8": (*("model.dtype=bfloat16", "model.quantization=int8", "cache.kv_dtype=int8"),),
}


def logits_of(args: argparse.Namespace, wanted: tuple[str, ...], ids: list[int]) -> torch.Tensor:
    """Logits [tokens, vocab] that foretell each token of each stretch but its first."""
    flags = [settings.from_set(setting) for setting in (*wanted, "cache.num_pages=64")]
    config = settings.load(flags=flags).config
    engine = LocalEngine(
        *(config.model, config.engine, config.cache),
        max_decode_sequences=1,
        max_prefill_tokens=LENGTH,
        path=str(args.model),
        progress=lambda stage, fraction: None,
    )
    spec = engine.start()
    assert engine._ready is not None
    table, found = tuple(range(-(-LENGTH // spec.page_size))), []
    for start in range(0, len(ids) - LENGTH + 1, LENGTH):
        part = tuple(ids[start : start + LENGTH])
        work = Work("text", part, 0, table, True, Sampling(), LENGTH)
        step = pack([work], spec.page_size, torch.device("cpu"))
        every = step._replace(sample_index=torch.arange(LENGTH))
        with torch.inference_mode():
            found.append(engine._ready.runner.logits(every).float()[:-1].clone())
    engine.close()
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = "".join(path.read_text() for path in args.text)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    targets, rows = whole[:, 1:].flatten(), []
    exact: torch.Tensor | None = None
    for name, wanted in KINDS.items():
        logits = logits_of(args, wanted, ids)
        exact = logits if exact is None else exact
        row: dict[str, Any] = {
            "kind": name,
            "tokens": len(targets),
            "same_likeliest": float((logits.argmax(-1) == exact.argmax(-1)).float().mean()),
            "logits_off_by": float((logits - exact).norm() / exact.norm()),
            "cross_entropy": float(torch.nn.functional.cross_entropy(logits, targets)),
        }
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        print(" | ".join(f"{key} {value}" for key, value in rows[-1].items()))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
