"""Measures a trained model: held-out sums, held-out phrasings, JSON, tool calls, sample answers.

python scripts/bundled_model/evaluate.py --model DIR
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import Qwen3ForCausalLM

from scripts.bundled_model import tokenizer as bpe
from scripts.bundled_model.arithmetic import question, random_sum
from scripts.bundled_model.concepts import concepts, held_out_question
from scripts.bundled_model.corpus import with_system
from scripts.bundled_model.records import json_turns
from scripts.bundled_model.toolcalls import TOOLS, bind, schema, use
from scripts.bundled_model.turns import Turns, user

TOUR = (
    "hello",
    "What is dynamo_serve?",
    "Who are you?",
    "What is a page?",
    "What is continuous batching?",
    "What is prefill?",
    "How do I cancel a request?",
    "What is 17 plus 25?",
    "Tell me a short story about a fox.",
    "Give me a JSON object for a person called Mia who is 31 years old.",
    "How do I start the server?",
    "Are you a large model?",
    "What is the difference between prefill and decode?",
    "What is the capital of France?",
    "Who won the football match yesterday?",
)


class Answerer:
    """Answers batches of conversations with a loaded model."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = bpe.load(folder)
        self.tokenizer.padding_side = "left"
        self.model = Qwen3ForCausalLM.from_pretrained(folder).eval()

    def prompt(self, chat: Turns, tools: list[Any] | None) -> str:
        made: Any = self.tokenizer.apply_chat_template(
            chat, tools=tools, tokenize=False, add_generation_prompt=True
        )
        return str(made)

    def __call__(
        self,
        chats: list[Turns],
        temperature: float = 0.0,
        tools: list[Any] | None = None,
        max_new_tokens: int = 96,
    ) -> list[str]:
        texts = [self.prompt(chat, tools) for chat in chats]
        return self.complete(texts, temperature, max_new_tokens)

    def complete(self, texts: list[str], temperature: float, max_new_tokens: int) -> list[str]:
        """Continues rendered prompts, 32 at a time; temperature 0 is greedy."""
        found: list[str] = []
        for at in range(0, len(texts), 32):
            found += self.some(texts[at : at + 32], temperature, max_new_tokens)
        return found

    def some(self, texts: list[str], temperature: float, max_new_tokens: int) -> list[str]:
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True)
        model: Any = self.model
        sampling = (
            {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        )
        made = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            eos_token_id=[self.tokenizer.eos_token_id, self.tokenizer.pad_token_id],
            **sampling,
        )
        answers = made[:, inputs["input_ids"].shape[1] :]
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in answers]


def share(right: list[bool]) -> float:
    return sum(right) / len(right)


def arithmetic(answer: Answerer, count: int, temperature: float) -> dict[str, float]:
    """Share of right results for held-out sums, by the size of the larger number."""
    rng = Random(101)
    sums = [random_sum(rng, held_out=True) for _ in range(count)]
    said = answer([[user(question(s, rng))] for s in sums], temperature, max_new_tokens=24)
    right = [
        str(s.value) == (re.findall(r"-?\d+", a) or [""])[-1]
        for s, a in zip(sums, said, strict=True)
    ]
    sizes = [len(str(max(s.a, s.b))) for s in sums]
    scores = {"all": share(right)}
    for op in "+-":
        for size in (2, 3):
            some = [
                r
                for r, s, n in zip(right, sums, sizes, strict=True)
                if s.op == op and n == size and s.value >= 0
            ]
            scores[f"{size} digits {op}"] = share(some)
    return scores


def nearest(said: str) -> str:
    """The concept whose answer is most like what was said; "" when none is close."""
    best = max(
        concepts(), key=lambda c: SequenceMatcher(None, said, c.answer, autojunk=False).ratio()
    )
    close = SequenceMatcher(None, said, best.answer, autojunk=False).ratio() > 0.7
    return best.name if close else ""


def paraphrases(answer: Answerer, rounds: int, temperature: float, show: int = 6) -> float:
    """Share of held-out phrasings that get the answer of the right concept."""
    rng = Random(202)
    pairs = [(c.name, held_out_question(c, rng)) for c in concepts() for _ in range(rounds)]
    said = answer([with_system([user(q)], rng) for _, q in pairs], temperature)
    right = [nearest(text) == name for (name, _), text in zip(pairs, said, strict=True)]
    missed = [(q, t) for (_, q), t, ok in zip(pairs, said, right, strict=True) if not ok]
    for asked, text in missed[:show]:
        print(f"   missed: {asked} -> {text[:90]}")
    return share(right)


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def json_score(answer: Answerer, count: int, temperature: float) -> float:
    """Share of JSON answers that are equal to the wanted object."""
    rng = Random(303)
    turns = [json_turns(rng) for _ in range(count)]
    said = answer([turn[:1] for turn in turns], temperature)
    return share([parsed(s) == parsed(t[1]["content"]) for s, t in zip(said, turns, strict=True)])


def tool_score(answer: Answerer, count: int, temperature: float) -> float:
    """Share of calls with the right name and arguments, with two tools on offer."""
    rng = Random(404)
    prompts, wanted = [], []
    for _ in range(count):
        bound = [bind(tool, rng) for tool in rng.sample(TOOLS, 2)]
        turns = use(bound[0], rng)
        prompts.append(answer.prompt(turns[:1], [schema(one, rng) for one in bound]))
        wanted.append(turns[1]["tool_calls"][0]["function"])
    said = answer.complete(prompts, temperature, 64)
    bodies = [re.search(r"<tool_call>\s*(.*?)\s*</tool_call>", s, re.DOTALL) for s in said]
    return share([b is not None and parsed(b[1]) == w for b, w in zip(bodies, wanted, strict=True)])


def weather_tool() -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather for a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The name of the city"}},
                "required": ["city"],
            },
        },
    }


def samples(answer: Answerer) -> None:
    """Prints what a user of the tour sees."""
    for temperature in (0.0, 0.7):
        print(f"\n## temperature {temperature}")
        said = answer([[user(asked)] for asked in TOUR], temperature, max_new_tokens=220)
        for asked, text in zip(TOUR, said, strict=True):
            print(f"> {asked}\n{text}\n")
        chat = [user("What is the weather in Paris?")]
        called = answer([chat], temperature, [weather_tool()])[0]
        print(f"> (tool) {chat[0]['content']}\n{called}\n")
        continued = answer.complete(["Once upon a time"], temperature, 120)[0]
        print(f"> (text) Once upon a time\n{continued}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=400, help="sums and JSON objects to ask for")
    parser.add_argument("--rounds", type=int, default=3, help="phrasings per concept")
    args = parser.parse_args()
    torch.manual_seed(1)
    answer = Answerer(args.model)
    measures: dict[str, Callable[[float], Any]] = {
        "held-out sums": lambda t: arithmetic(answer, args.count, t),
        "held-out phrasings": lambda t: paraphrases(answer, args.rounds, t),
        "JSON": lambda t: json_score(answer, args.count // 2, t),
        "tool calls": lambda t: tool_score(answer, args.count // 4, t),
    }
    for name, measure in measures.items():
        for temperature in (0.0, 0.7):
            print(f"{name}, temperature {temperature}: {measure(temperature)}", flush=True)
    samples(answer)


if __name__ == "__main__":
    main()
