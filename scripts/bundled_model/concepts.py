"""Questions and answers about the server, read from data/concepts.txt."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

from scripts.bundled_model.paraphrase import (
    HELD_OUT_BEFORE,
    HELD_OUT_WHAT,
    WHAT,
    lower_first,
    rough,
    wrapped,
)
from scripts.bundled_model.turns import Example, Turns, ask

DATA = Path(__file__).parent / "data"
BRIEF = (
    "{q} Answer in one sentence.",
    "{q} Keep it short.",
    "Briefly: {q}",
    "{q} Be brief.",
    "In one sentence: {q}",
    "{q} In one sentence, please.",
)
MORE = (
    "Tell me more.",
    "Can you tell me more?",
    "More, please.",
    "Go on.",
    "What else?",
    "Anything else?",
    "Say more about that.",
    "Please go on.",
    "Can you say more?",
    "And?",
    "Tell me more about it.",
    "Continue.",
)
AGAIN = (
    "Say that again.",
    "Can you repeat that?",
    "Please repeat.",
    "Sorry, what?",
    "Again, please.",
)
FIRST_ASKED = (
    "dynamo_serve",
    "who_are_you",
    "what_can_you_do",
    "cancel",
    "how_big",
    "start_server",
)


@dataclass
class Concept:
    """What the model should know about one thing."""

    name: str
    terms: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    answer: str = ""
    more: str = ""


@cache
def concepts() -> tuple[Concept, ...]:
    """All concepts of the data file, in its order."""
    found: list[Concept] = []
    for line in (DATA / "concepts.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            found.append(Concept(line[3:].strip()))
        elif line[:2] in ("t:", "q:"):
            parts = [part.strip() for part in line[2:].split(" | ")]
            (found[-1].terms if line[0] == "t" else found[-1].questions).extend(parts)
        elif line[:2] == "a:":
            found[-1].answer = line[2:].strip()
        elif line[:2] == "m:":
            found[-1].more = line[2:].strip()
    return tuple(found)


def fill(pattern: str, term: str) -> str:
    """Puts a term into a pattern; a pattern that begins with it gets a capital letter."""
    if pattern == "What are {t}?" and not term.endswith("s"):
        pattern = "What is {t}?"
    text = pattern.format(t=term)
    keep = term[:1].isupper() or "_" in term or "/" in term
    return text[0].upper() + text[1:] if pattern.startswith("{t}") and not keep else text


def question(concept: Concept, rng: Random) -> str:
    """One plain question about a concept, before wrapping."""
    if concept.terms and (not concept.questions or rng.random() < 0.6):
        return fill(rng.choice(WHAT), rng.choice(concept.terms))
    return rng.choice(concept.questions)


def held_out_question(concept: Concept, rng: Random) -> str:
    """A phrasing that training never shows."""
    if concept.terms and (not concept.questions or rng.random() < 0.6):
        return fill(rng.choice(HELD_OUT_WHAT), rng.choice(concept.terms))
    return rng.choice(HELD_OUT_BEFORE) + lower_first(rng.choice(concept.questions))


def first_sentence(text: str) -> str:
    head, mark, _ = text.partition(". ")
    return head + "." if mark else text


def concept_turns(rng: Random) -> Turns:
    """One question with its answer, at times short, and at times with a second turn."""
    concept = rng.choice(concepts())
    if rng.random() < 0.15:
        wanted = rng.choice(FIRST_ASKED)
        concept = next(c for c in concepts() if c.name == wanted)
    asked = question(concept, rng)
    if rng.random() < 0.05:
        brief = rng.choice(BRIEF)
        inner = lower_first(asked) if not brief.startswith("{q}") else asked
        return ask(rough(brief.format(q=inner), rng), first_sentence(concept.answer))
    turns = ask(wrapped(asked, rng), concept.answer)
    draw = rng.random()
    if draw < 0.10:
        turns += ask(rough(rng.choice(MORE), rng), concept.more)
    elif draw < 0.12:
        turns += ask(rough(rng.choice(AGAIN), rng), concept.answer)
    return turns


def prose(rng: Random) -> Example:
    """Explanatory text without a chat, for plain completions."""
    chosen = rng.sample(concepts(), rng.randint(1, 4))
    blocks = []
    for concept in chosen:
        body = f"{concept.answer} {concept.more}" if rng.random() < 0.8 else concept.answer
        if concept.terms and rng.random() < 0.3:
            title = concept.terms[0]
            body = f"# {title[0].upper() + title[1:]}\n\n{body}"
        elif rng.random() < 0.15:
            body = f"Q: {question(concept, rng)}\nA: {concept.answer}"
        blocks.append(body)
    return Example(text="\n\n".join(blocks))
