"""Structured output: whether it keeps random schemas, and what it costs those beside it.

    python -m bench.structured                          # the bundled model
    python -m bench.structured --model MODEL_DIR --only neighbours

`schemas`: random JSON schemas, asked of a real server at temperature 1.5 (the model is told nothing
of them). What is finished has to be valid by `jsonschema`; what is cut by length is completed by
hand, token by token, and then has to be. `neighbours`: one engine in this process decodes a batch,
half of it without a grammar in every step; the other half has one or has none, block by block in
turn, so that both see the same machine; a schema, and a grammar that is made to be slow. A table,
then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from bench.server import free_port, our_command, running
from bench.structured_schemas import closing_token, fault_of, random_schema
from dynamo_serve import bundled
from dynamo_serve.config import CacheSection, EngineSection, ModelSection
from dynamo_serve.core.batch import Batch, Phase, Work
from dynamo_serve.core.request import Grammar, Request, Sampling
from dynamo_serve.engines.local import LocalEngine
from dynamo_serve.grammars import compiled, schema_grammar, vocabulary
from dynamo_serve.text.tokenizer import Tokenizer

MAX_TOKENS = 150
BLOCK = 16  # steps of a kind in turn
PAGE = 16
ENDLESS = {"type": "array", "items": {"type": "object", "minProperties": 1}, "minItems": 500}
MOST_COMPLETED = 20_000
GRAMMARS = {
    "schema": schema_grammar(ENDLESS),
    # Every text has so many readings that a mask takes a hundred times as long.
    "ambiguous": Grammar("grammar", 'start: s\ns: s s | "a" | "b" | s s s'),
}


def keep_schemas(model: str, count: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    schemas = [random_schema(rng) for _ in range(count)]
    tokenizer = Tokenizer.load(model)
    port, log = free_port(), Path(tempfile.gettempdir()) / "bench-structured.log"
    command = our_command(Path(model), port, [])
    with running(command, port, log) as server, httpx.Client(timeout=300) as http:

        def ask(at: int) -> dict[str, Any]:
            body = {
                "prompt": f"Example {at}:\n",
                "max_tokens": MAX_TOKENS,
                "temperature": 1.5,
                "seed": at,
                "return_token_ids": True,
                "structured_outputs": {"json": schemas[at]},
            }
            answer = http.post(f"{server.url}/v1/completions", json=body)
            return {"status": answer.status_code, **answer.json()}

        began = time.monotonic()
        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(ask, range(count)))
        seconds = time.monotonic() - began
    judge = Judge(tokenizer)
    verdicts = [judge.verdict(*pair) for pair in zip(answers, schemas, strict=True)]
    for at, (verdict, note) in enumerate(verdicts):
        if verdict in ("refused", "wrong"):
            print(f"{verdict}: {note}\n  {json.dumps(schemas[at])[:300]}")
    return {"seconds": round(seconds, 1), **Counter(verdict for verdict, _ in verdicts)}


class Judge:
    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.as_json
        self.tokenizer = tokenizer
        size = tokenizer.vocab_size
        self.words = vocabulary(tokenizer.as_json, size, tokenizer.eos_ids)

    def verdict(self, answer: dict[str, Any], schema: dict[str, Any]) -> tuple[str, str]:
        if answer["status"] != 200:
            return "refused", answer["error"]["message"]
        choice = answer["choices"][0]
        if choice["finish_reason"] == "stop":
            fault = fault_of(choice["text"], schema)
            return ("wrong", f"{fault}: {choice['text']!r}") if fault else ("valid", "")
        whole = self.completed(choice["token_ids"], schema_grammar(schema))
        fault = fault_of(whole, schema)
        return ("wrong", f"cut: {fault}: {whole!r}"[:500]) if fault else ("cut, completed", "")

    def completed(self, ids: list[int], grammar: Grammar) -> str:
        """A text that begins with these tokens, and ends as soon as it can."""
        matcher = compiled(grammar, self.words)
        assert matcher.consume_tokens(ids), matcher.get_error()
        rng, rest = random.Random(0), list[int]()
        while not matcher.is_accepting():
            assert len(rest) < MOST_COMPLETED, "it does not come to an end"
            mask = matcher.compute_bitmask()
            token = closing_token(self.tokenizer, mask, [*ids, *rest], rng)
            assert token is not None and matcher.consume_token(token), matcher.get_error()
            rest.append(token)
        return self.tokenizer.decode([*ids, *rest], skip_special_tokens=True)


def neighbours(model: str, num_pairs: int, blocks: int, grammar: Grammar) -> dict[str, Any]:
    pages_each = -(-(BLOCK * blocks * 2 + 32) // PAGE)
    engine = LocalEngine(
        ModelSection(),
        EngineSection(device="cpu"),
        CacheSection(page_size=PAGE, num_pages=2 * num_pairs * pages_each),
        max_decode_sequences=2 * num_pairs,
        max_prefill_tokens=512,
        path=model,
        progress=lambda stage, fraction: None,
    )
    vocab_size = engine.start().vocab_size
    batch = Beside(engine, num_pairs, pages_each, vocab_size, grammar)
    batch.block(False)
    batch.block(True)  # the grammar is compiled
    took: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(blocks - 1):
        for has_grammar in (False, True):
            took[has_grammar] += batch.block(has_grammar)
    engine.close()
    plain, beside = (statistics.median(took[kind]) for kind in (False, True))
    means = [statistics.fmean(sorted(took[kind])[: -len(took[kind]) // 20]) for kind in took]
    return {
        "sequences": f"{num_pairs} + {num_pairs}",
        "step_ms_without": round(plain * 1e3, 3),
        "step_ms_beside_grammars": round(beside * 1e3, 3),
        "lost_percent": round(100 * (1 - plain / beside), 2),
        "lost_percent_of_means": round(100 * (1 - means[0] / means[1]), 2),
        "unanswered": batch.num_unanswered,
    }


class Beside:
    """A batch of sequences that are decoded for ever; the second half may have a grammar."""

    def __init__(
        self, engine: LocalEngine, num_pairs: int, pages: int, vocab_size: int, grammar: Grammar
    ) -> None:
        self.engine, self.num_pairs, self.pages = engine, num_pairs, pages
        rng = random.Random(0)
        self.prompts = [
            tuple(rng.randrange(100, vocab_size - 100) for _ in range(PAGE))
            for _ in range(2 * num_pairs)
        ]
        self.grammar = grammar
        self.num_blocks = self.num_unanswered = 0

    def block(self, has_grammar: bool) -> list[float]:
        """Start all anew, and decode: seconds of each step but the first few."""
        self.num_blocks += 1
        ids = [f"{self.num_blocks}-{i}" for i in range(2 * self.num_pairs)]
        tokens = [list(prompt) for prompt in self.prompts]
        seconds = []
        for step in range(BLOCK):
            work = tuple(
                self._work(*pair, i, has_grammar)
                for i, pair in enumerate(zip(ids, tokens, strict=True))
            )
            began = time.perf_counter()
            outputs = self.engine.step(Batch(Phase.DECODE if step else Phase.PREFILL, work))
            seconds.append(time.perf_counter() - began)
            by_id = {out.seq_id: out for out in outputs}
            for i, id in enumerate(ids):
                assert not by_id[id].error, by_id[id].error
                if step and not by_id[id].token_ids:
                    self.num_unanswered += 1
                tokens[i] += by_id[id].token_ids
        self.engine.drop(ids)
        return seconds[4:]

    def _work(self, id: str, tokens: list[int], i: int, has_grammar: bool) -> Work:
        at = 0 if len(tokens) == PAGE else len(tokens) - 1
        grammar = self.grammar if has_grammar and i >= self.num_pairs else None
        return Work(
            seq_id=id,
            token_ids=tuple(tokens[at:]),
            position=at,
            page_table=tuple(range(i * self.pages, (i + 1) * self.pages)),
            samples=True,
            sampling=Sampling(seed=i),
            prompt_len=PAGE,
            request=Request(id, self.prompts[i], BLOCK, grammar=grammar),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(bundled.path()))
    parser.add_argument("--only", nargs="*", default=["schemas", "neighbours"])
    parser.add_argument("--count", type=int, default=1000, help="of schemas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, nargs="*", default=[1, 4, 8, 16])
    parser.add_argument("--blocks", type=int, default=20)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if "schemas" in args.only:
        found["schemas"] = keep_schemas(args.model, args.count, args.seed)
        print(found["schemas"])
    if "neighbours" in args.only:
        found["neighbours"] = []
        for num_pairs in args.pairs:
            for name, grammar in GRAMMARS.items():
                told = neighbours(args.model, num_pairs, args.blocks, grammar)
                found["neighbours"].append({"grammar": name, **told})
                print(found["neighbours"][-1], flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
