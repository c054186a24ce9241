"""Says one question in many ways: wrappers, letter case, missing marks and typing mistakes."""

from __future__ import annotations

import string
from random import Random

WHAT = (
    "What is {t}?",
    "What is {t}?",
    "What is {t}?",
    "What's {t}?",
    "What are {t}?",
    "What does {t} mean?",
    "What do you mean by {t}?",
    "What is {t} in dynamo_serve?",
    "What is {t} good for?",
    "What exactly is {t}?",
    "Explain {t}.",
    "Explain {t} to me.",
    "Explain what {t} is.",
    "Can you explain {t}?",
    "Could you explain {t} to me?",
    "Please explain {t}.",
    "Tell me about {t}.",
    "Tell me what {t} is.",
    "Can you tell me what {t} is?",
    "Could you tell me about {t}?",
    "Define {t}.",
    "Describe {t}.",
    "How would you describe {t}?",
    "Help me understand {t}.",
    "I do not understand {t}.",
    "I don't know what {t} is.",
    "I want to know what {t} is.",
    "Do you know what {t} is?",
    "How does {t} work?",
    "Why is there {t}?",
    "{t}?",
    "{t}",
    "And {t}?",
    "What about {t}?",
    "I keep reading about {t}. What is it?",
    "What is {t}, in simple words?",
    "What is meant by {t}?",
    "Say something about {t}.",
    "Teach me about {t}.",
    "Give me a short explanation of {t}.",
    "I'd like to know more about {t}.",
    "What can you tell me about {t}?",
    "Remind me what {t} is.",
    "Is there a simple explanation of {t}?",
    "{t}: what is it?",
    "Write one paragraph about {t}.",
    "What is the idea of {t}?",
    "What is the purpose of {t}?",
    "How would you explain {t} to a child?",
    "I read the word {t} somewhere. Please explain it.",
    "Somewhere I saw {t}. What does it mean?",
)
HELD_OUT_WHAT = (
    "Give me a definition of {t}.",
    "I would like to learn about {t}.",
    "In your own words, what is {t}?",
    "Somebody mentioned {t}. What is that?",
    "What should I know about {t}?",
    "Would you mind explaining {t}?",
)
BEFORE = (
    "Hi! ",
    "Hello, ",
    "Hey, ",
    "Quick question: ",
    "Please tell me: ",
    "I have a question. ",
    "I am new here. ",
    "Sorry, ",
    "OK. ",
    "Next question: ",
    "Question: ",
    "Now tell me: ",
    "I wonder: ",
    "By the way, ",
    "I was wondering, ",
    "Good evening. ",
    "Good morning! ",
    "Let me ask you something: ",
    "My boss asks: ",
    "One question: ",
    "Just curious: ",
    "So, ",
    "Well, ",
    "Also, ",
    "Could you help me? ",
    "I am reading the docs. ",
    "For my notes: ",
    "There is something I want to know: ",
    "A question about the server: ",
    "I forgot: ",
    "Dear model, ",
    "Tell me, ",
)
AFTER = (
    " Please.",
    " Thanks!",
    " Thank you.",
    " I am curious.",
    " I am a beginner.",
    " Please help.",
)
HELD_OUT_BEFORE = ("One more thing: ", "Good day. ", "Something I never understood: ")
_KEYS = "qwertyuiopasdfghjklzxcvbnm"


def typo(text: str, rng: Random) -> str:
    """Swaps, drops, doubles or replaces one letter of a word."""
    places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    if kind == 1:
        return text[:i] + text[i + 1 :]
    if kind == 2:
        return text[:i] + text[i] + text[i:]
    return text[:i] + rng.choice(_KEYS) + text[i + 1 :]


def lower_first(text: str) -> str:
    """Lowers the first letter unless the word is an abbreviation."""
    return (
        text[0].lower() + text[1:] if len(text) > 1 and text[1] in string.ascii_lowercase else text
    )


def rough(text: str, rng: Random) -> str:
    """Types a text as people type: careless about case, marks and letters."""
    if rng.random() < 0.22:
        text = text.lower()
    elif rng.random() < 0.03:
        text = text.upper()
    if rng.random() < 0.22:
        text = text.rstrip("?.! ")
    if rng.random() < 0.14:
        text = typo(text, rng)
        if rng.random() < 0.3:
            text = typo(text, rng)
    if rng.random() < 0.03:
        text = text.replace("?", "??") if "?" in text else text + "?"
    return text


def wrapped(question: str, rng: Random) -> str:
    """Puts a greeting, an opening or thanks around a question, then roughens it."""
    draw = rng.random()
    if draw < 0.14:
        opening = rng.choice(BEFORE)
        joined = lower_first(question) if opening[-2] in ",:" else question
        question = opening + joined
    elif draw < 0.22:
        question = question + rng.choice(AFTER)
    elif draw < 0.26:
        question = "Please " + lower_first(question)
    return rough(question, rng)
