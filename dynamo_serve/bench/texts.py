"""Synthetic text of so many tokens: exactly, if the tokenizer is here or ids are sent; else about.

Every text begins with a space and consists of whole words, so that texts can be joined without
any token changing.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from dynamo_serve.errors import ConfigError

Text = str | tuple[int, ...]
# Short, common words: most vocabularies have each as one token.
_WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work number night
point home water room mother area money story fact month lot right study book eye job word
business issue side kind head house service friend father power hour game line end member law
car city name team minute idea body back parent face level office door health person art war
party result change morning reason moment air force order food boy age policy music mind sense
field town road form table price report heart tree bird fish stone river light sound color ship
small large good new old great high little long young big early public same able open red blue
run take make find give tell ask seem feel leave call keep let begin help show hear play move
live believe bring happen write sit stand lose pay meet include set learn lead understand watch
follow stop create speak read spend grow walk win teach offer remember love consider appear buy
wait serve die send build stay fall cut reach kill raise pass sell decide return explain
"""
WORDS = tuple(_WORDS.split())
FEWEST_WORDS = 200  # of a tokenizer's own whole words, for texts that differ


class Texts(Protocol):
    """`is_exact`: whether what `make` returns has just so many tokens."""

    is_exact: bool

    def make(self, num_tokens: int, rng: random.Random) -> Text: ...

    def count(self, text: str) -> int:
        """About how many tokens a text of somebody else's has."""
        ...

    def about(self) -> dict[str, Any]: ...


class WordTexts:
    """Common words, as many as make so many tokens on average by the server's own count."""

    is_exact = False

    def __init__(self, tokens_per_word: float = 1.0) -> None:
        self.tokens_per_word = tokens_per_word

    def make(self, num_tokens: int, rng: random.Random) -> str:
        count = max(1, round(num_tokens / self.tokens_per_word))
        return "".join([f" {word}" for word in rng.choices(WORDS, k=count)])

    def count(self, text: str) -> int:
        # English is about 4 characters a token; the words above have 5 with their space.
        return max(1, round(len(text) / 5 * self.tokens_per_word))

    def about(self) -> dict[str, Any]:
        return {"made_of": "words", "tokens_per_word": round(self.tokens_per_word, 4)}


class TokenizerTexts:
    """Whole words of the model's own vocabulary."""

    is_exact = True

    def __init__(self, folder: Path) -> None:
        """Raises `ConfigError` without a tokenizer.json, or if too few of its tokens are words."""
        from tokenizers import Tokenizer  # noqa: PLC0415  only who has a folder needs it

        path = folder / "tokenizer.json" if folder.is_dir() else folder
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # it raises this very class
            raise ConfigError(f"{path}: no tokenizer: {error}") from None
        self._path = path
        ids = self._tokenizer.get_vocab().values()
        self._words = sorted(text for number in ids if (text := self._word(number)))
        if len(self._words) < FEWEST_WORDS:
            raise ConfigError(f"{path}: too few of its tokens are words; leave the tokenizer out")

    def make(self, num_tokens: int, rng: random.Random) -> str:
        return "".join(rng.choices(self._words, k=max(1, num_tokens)))

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def about(self) -> dict[str, Any]:
        return {"made_of": "the tokenizer's words", "tokenizer": str(self._path)}

    def _word(self, number: int) -> str:
        """The token as text, if it is a word behind a space that stays one token; else nothing."""
        text = str(self._tokenizer.decode([number]))
        if not (text.startswith(" ") and text[1:].isalpha() and text.isascii()):
            return ""
        ids = self._tokenizer.encode(text + text, add_special_tokens=False).ids
        return text if ids == [number, number] else ""


class IdTexts:
    """Token ids drawn from the middle of the vocabulary: special ones are at its ends."""

    is_exact = True

    def __init__(self, vocab_size: int) -> None:
        self._low, self._high = vocab_size // 10, vocab_size * 9 // 10

    def make(self, num_tokens: int, rng: random.Random) -> tuple[int, ...]:
        return tuple(rng.choices(range(self._low, self._high), k=max(1, num_tokens)))

    def count(self, text: str) -> int:
        raise ConfigError("texts of a file cannot be sent as token ids; leave out --prompts ids")

    def about(self) -> dict[str, Any]:
        return {"made_of": "token ids", "from": self._low, "below": self._high}


def join(parts: Iterable[Text]) -> Text:
    """Parts of one kind as one text."""
    found = list(parts)
    if all(isinstance(part, str) for part in found):
        return "".join(str(part) for part in found)
    return tuple(number for part in found for number in part if isinstance(number, int))


class Library:
    """Texts that are shared: the same name and length are the same text, whoever asks."""

    def __init__(self, texts: Texts, seed: int) -> None:
        self._texts, self._seed = texts, seed
        self.get = functools.lru_cache(maxsize=4096)(self._make)

    def _make(self, name: str, num_tokens: int) -> Text:
        return self._texts.make(num_tokens, random.Random(f"{self._seed}:{name}"))
