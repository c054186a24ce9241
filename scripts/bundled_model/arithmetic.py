"""Small sums, as chats and as plain drills. One sum in ten is held out for evaluation."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from random import Random

from scripts.bundled_model.paraphrase import rough
from scripts.bundled_model.turns import Example, Turns, ask

WORDS = {"+": ("plus",), "-": ("minus",), "*": ("times", "multiplied by")}
SIGNS = {"+": ("+",), "-": ("-",), "*": ("*", "x", "×")}
ASKED = (
    "What is {e}?",
    "What is {e}?",
    "What's {e}?",
    "How much is {e}?",
    "What does {e} make?",
    "{e} = ?",
    "{e} =",
    "{e}?",
    "{e}",
    "Calculate {e}.",
    "Compute {e}.",
    "Please calculate {e}.",
    "Can you tell me what {e} is?",
    "Work out {e}.",
    "Tell me {e}.",
    "Solve {e}.",
    "Do you know {e}?",
    "What is the result of {e}?",
    "I need to know {e}.",
    "And {e}?",
    "Hi, what is {e}?",
)
NAMED = {
    "+": ("Add {a} and {b}.", "What is the sum of {a} and {b}?", "Add {b} to {a}."),
    "-": ("Subtract {b} from {a}.", "Take {b} away from {a}.", "What is {a} less {b}?"),
    "*": ("Multiply {a} by {b}.", "What is the product of {a} and {b}?", "Multiply {a} and {b}."),
}
THINGS = ("apples", "pears", "books", "coins", "eggs", "tokens", "pages", "stones", "cups", "balls")
PEOPLE = ("Mia", "Tom", "Anna", "Ben", "Lena", "Omar", "Ida", "Paul", "Nora", "Sam")


@dataclass(frozen=True)
class Sum:
    """a op b, with op one of + - *."""

    a: int
    op: str
    b: int

    @property
    def value(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.op]

    @property
    def held_out(self) -> bool:
        """Whether this sum is kept for evaluation; multiplication tables are all learned."""
        key = f"{self.a}{self.op}{self.b}".encode()
        big = self.op != "*" and self.a > 9 and self.b > 9
        return big and zlib.crc32(key) % 10 == 0

    def __str__(self) -> str:
        return f"{self.a} {self.op} {self.b}"


def _draw(rng: Random) -> Sum:
    op = rng.choices("+-*", (0.6, 0.25, 0.15))[0]
    if op == "*":
        return Sum(rng.randint(0, 12), op, rng.randint(0, 12))
    top = rng.choices((10, 100, 1000), (0.2, 0.72, 0.08))[0]
    other = top if rng.random() < 0.7 else max(10, top // 10)
    a, b = rng.randrange(top), rng.randrange(other)
    if op == "+" and rng.random() < 0.5:
        a, b = b, a
    if op == "-" and a < b and rng.random() < 0.85:
        a, b = b, a
    return Sum(a, op, b)


def random_sum(rng: Random, held_out: bool = False) -> Sum:
    """A sum from the training part, or from the held-out part."""
    while True:
        found = _draw(rng)
        if found.held_out == held_out:
            return found


def question(found: Sum, rng: Random) -> str:
    """One way to ask for a sum."""
    if rng.random() < 0.2:
        return rng.choice(NAMED[found.op]).format(a=found.a, b=found.b)
    if rng.random() < 0.45:
        expression = f"{found.a} {rng.choice(WORDS[found.op])} {found.b}"
    else:
        gap = "" if rng.random() < 0.15 else " "
        expression = f"{found.a}{gap}{rng.choice(SIGNS[found.op])}{gap}{found.b}"
    return rng.choice(ASKED).format(e=expression)


def answer(found: Sum) -> str:
    sign = "×" if found.op == "*" else found.op
    return f"{found.a} {sign} {found.b} = {found.value}."


def _problem(found: Sum, rng: Random) -> Turns:
    who, things = rng.choice(PEOPLE), rng.choice(THINGS)
    if found.op == "+":
        change, left = f"gets {found.b} more", f"{who} now has {found.value} {things}"
    else:
        change, left = f"gives away {found.b}", f"{who} has {found.value} {things} left"
    text = f"{who} has {found.a} {things} and {change}. How many {things} does {who} have?"
    return ask(text, f"{answer(found)[:-1]}, so {left}.")


def _numbers(rng: Random) -> Turns:
    """Counting, comparing, and what comes next."""
    a, b = rng.sample(range(1000) if rng.random() < 0.5 else range(100), 2)
    kind = rng.randrange(5)
    if kind == 0:
        return ask(
            rough(f"Which is larger, {a} or {b}?", rng), f"{max(a, b)} is larger than {min(a, b)}."
        )
    if kind == 1:
        return ask(rough(f"Which number comes after {a}?", rng), f"After {a} comes {a + 1}.")
    if kind == 2:
        end = rng.randint(3, 12)
        counted = ", ".join(str(i) for i in range(1, end + 1))
        return ask(rough(f"Count from 1 to {end}.", rng), f"{counted}.")
    if kind == 3:
        odd = "odd" if a % 2 else "even"
        return ask(rough(f"Is {a} odd or even?", rng), f"{a} is {odd}.")
    b = rng.randint(1, 12)
    c = rng.randint(1, 12)
    return ask(rough(f"What is {b * c} divided by {b}?", rng), f"{b * c} / {b} = {c}.")


def sum_turns(rng: Random) -> Turns:
    """One sum asked in a chat."""
    if rng.random() < 0.12:
        return _numbers(rng)
    found = random_sum(rng)
    if found.op != "*" and found.value >= 0 and rng.random() < 0.06:
        return _problem(found, rng)
    asked = question(found, rng)
    return ask(rough(asked, rng) if rng.random() < 0.4 else asked, answer(found))


def drill(rng: Random) -> Example:
    """A page of sums, one per line."""
    lines = [answer(random_sum(rng))[:-1] for _ in range(rng.randint(10, 24))]
    return Example(text="\n".join(lines))
