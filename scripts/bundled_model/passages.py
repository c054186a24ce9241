"""Questions about a text that stands in the prompt; the answer is copied from the text."""

from __future__ import annotations

from random import Random

from scripts.bundled_model import names
from scripts.bundled_model.concepts import concepts
from scripts.bundled_model.turns import Example, Turns, ask

MISSING = "The text does not say."
ASKED = (
    "Answer from the text: {t}\n\n{q}",
    "Answer from the text.\n\nText: {t}\n\nQuestion: {q}",
    "Read this text and answer the question.\n\n{t}\n\nQuestion: {q}",
    "{t}\n\n{q}",
    "Context:\n{t}\n\nQuestion: {q}",
    "Use only this text: {t} {q}",
    "Here are my notes:\n{t}\n\n{q}",
    "Question: {q}\n\nText: {t}",
)
Fact = tuple[str, str]


def _fact(rng: Random) -> Fact:
    """A sentence and a question which that very sentence answers."""
    place, who = names.invented(rng), names.person(rng)
    thing, number = rng.choice(names.ITEMS), rng.randint(2, 900)
    hour, colour, job = rng.randint(6, 11), rng.choice(names.COLOURS), rng.choice(names.JOBS)
    town, animal = names.city(rng), rng.choice(names.ANIMALS)
    return rng.choice(
        (
            (f"The library in {place} opens at {hour}.", f"When does the library in {place} open?"),
            (
                f"The bridge of {place} is {number} metres long.",
                f"How long is the bridge of {place}?",
            ),
            (f"{who} works as a {job} in {town}.", f"What does {who} do?"),
            (f"{who} lives in {place}.", f"Where does {who} live?"),
            (f"The {thing} of {who} is {colour}.", f"What colour is the {thing} of {who}?"),
            (
                f"The {thing} in {place} costs {number} euros.",
                f"How much is the {thing} in {place}?",
            ),
            (f"The mayor of {place} is called {who}.", f"Who is the mayor of {place}?"),
            (f"The {animal} of {who} is called {place}.", f"What is the {animal} of {who} called?"),
            (f"The town of {place} has {number} houses.", f"How many houses does {place} have?"),
            (
                f"The museum in {place} was built in {1000 + number}.",
                f"When was the museum in {place} built?",
            ),
            (f"The train to {place} leaves at {hour}.", f"When does the train to {place} leave?"),
            (f"{who} likes the colour {colour}.", f"Which colour does {who} like?"),
        )
    )


def _filler(rng: Random) -> str:
    return rng.choice(concepts()).answer


def passage_turns(rng: Random) -> Turns:
    """A text of one to many sentences, a question, and at times a second question."""
    count = rng.choices(
        (rng.randint(1, 3), rng.randint(4, 8), rng.randint(9, 26)), (0.5, 0.38, 0.12)
    )[0]
    facts = [_fact(rng) for _ in range(count)]
    sentences = [fact[0] for fact in facts]
    if rng.random() < 0.2:
        sentences.insert(rng.randrange(len(sentences) + 1), _filler(rng))
    answer, asked = rng.choice(facts)
    if rng.random() < 0.1:
        answer, asked = MISSING, _fact(rng)[1]
    joint = "\n" if rng.random() < 0.2 else " "
    turns = ask(rng.choice(ASKED).format(t=joint.join(sentences), q=asked), answer)
    if count > 1 and rng.random() < 0.25:
        answer, asked = rng.choice(facts)
        turns += ask(asked, answer)
    return turns


def _word(rng: Random) -> str:
    pool = rng.choice((names.FIRST, names.CITIES, names.ITEMS, names.COLOURS, names.JOBS))
    return names.invented(rng) if rng.random() < 0.5 else rng.choice(pool)


def copy_drill(rng: Random) -> Example:
    """Words and values, then the same again: it teaches the model to copy from its prompt."""
    words = [_word(rng) for _ in range(rng.randint(4, 16))]
    if rng.random() < 0.3:
        words = [str(rng.randint(0, 999)) if rng.random() < 0.5 else word for word in words]
    if rng.random() < 0.5:
        joint = rng.choice((" ", ", ", "\n"))
        line = joint.join(words)
        return Example(given=f"{line}\n", text=line)
    pairs = [f"{rng.choice(names.ITEMS)} {i}: {word}" for i, word in enumerate(words)]
    again = rng.sample(pairs, len(pairs))
    return Example(given="\n".join(pairs) + "\n\n", text="\n".join(again))
