"""The model's tokenizer and chat template, safe to use from several threads."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from dynamo_serve.errors import InvalidRequest
from dynamo_serve.text.dialect import takes_tools
from dynamo_serve.text.fewest import Fewest
from dynamo_serve.text.pieces import Pieces, WholeTexts, is_byte_level

# A template is a program of the model's authors; these are how it stumbles over odd messages.
TEMPLATE_FAULTS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
)


class Tokenizer:
    """Text to ids and back.

    `eos_ids` end an answer: those of generation_config.json and of the tokenizer. `special_ids`
    yield no text. `vocab_size` counts added tokens too; the model's own may be larger (padding).
    `template_parameters` are not for clients to set. `alone`: see `Detokenizer`.
    """

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "is_fast", False)
        self._lock = threading.Lock()
        if self._fast:
            self._backend = tokenizer.backend_tokenizer
            # A truncating or padding tokenizer.json is a training leftover. With both off
            # nothing ever changes the tokenizer, so threads may share it without a lock.
            self._backend.no_truncation()
            self._backend.no_padding()
        own_eos = {tokenizer.eos_token_id} - {None}
        self.eos_ids = eos_ids | own_eos
        added = tokenizer.added_tokens_decoder
        self._added = {str(token.content): i for i, token in added.items()}
        self._specials = {i: str(token.content) for i, token in added.items() if token.special}
        self.special_ids = frozenset(self._specials)
        self.vocab_size = len(tokenizer)
        self._pieces = Pieces(tokenizer)
        whole = WholeTexts(self.decode) if is_byte_level(tokenizer) else None
        self.alone = whole.__getitem__ if whole is not None else None
        self.has_chat_template = bool(tokenizer.chat_template)
        self.takes_tools = takes_tools(self.template)
        signature = inspect.signature(tokenizer.apply_chat_template)
        self.template_parameters = frozenset(signature.parameters) | {"messages"}

    @property
    def as_json(self) -> str | None:
        """As in tokenizer.json; None of a slow one."""
        return str(self._backend.to_str()) if self._fast else None

    @classmethod
    def load(cls, path: str) -> Tokenizer:
        """From a folder; the network is never asked.

        Raises `OSError` if there is no tokenizer.
        """
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        if not _has_words(tokenizer):
            raise OSError("its files are missing, tokenizer.json or those of its kind")
        return cls(tokenizer, _generation_eos(path))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of `text`; `add_special_tokens` adds what the model wants around a text (BOS)."""
        if self._fast:
            # A batch of one: unlike a single text, it is encoded without the interpreter lock.
            # "Fast" is without the position of each token in the text, which nobody asks for.
            batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = batch[0].ids
            return ids
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_pairs(
        self, texts: Sequence[str], before: str | None = None, most: int | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """The ids and the type ids of each text, or of `before` and it as a pair, with the special
        tokens that the model wants; of what is longer than `most` the end of the text is cut."""
        if not self._fast:
            with self._lock:
                return [self._slow_pair(text, before, most) for text in texts]
        ids, kinds, at = self._frame(before)
        room = None if most is None else max(0, most - (len(ids) - 1))
        made = []
        for each in self._backend.encode_batch_fast(list(texts), add_special_tokens=False):
            text = each.ids[:room]
            made.append(
                (
                    [*ids[:at], *text, *ids[at + 1 :]],
                    [*kinds[:at], *[kinds[at]] * len(text), *kinds[at + 1 :]],
                )
            )
        return made

    def _frame(self, before: str | None) -> tuple[list[int], list[int], int]:
        """The ids and the type ids of a text of one token, alone or behind `before`, and where in
        them that token is: any other text can take its place."""
        encodings = self._backend.encode_batch(["a"], add_special_tokens=False)
        encodings[0].truncate(1)
        if before is not None:
            encodings = self._backend.encode_batch([before], add_special_tokens=False) + encodings
        whole = self._backend.post_process(*encodings, add_special_tokens=True)
        return whole.ids, whole.type_ids, whole.sequence_ids.index(len(encodings) - 1)

    def _slow_pair(
        self, text: str, before: str | None, most: int | None
    ) -> tuple[list[int], list[int]]:
        parts = (text,) if before is None else (before, text)
        cut = "longest_first" if before is None else "only_second"
        truncation = {} if most is None else {"truncation": cut, "max_length": most}
        found = self._tokenizer(*parts, **truncation)
        return list(found["input_ids"]), list(found.get("token_type_ids", ()))

    def fewest_tokens(self, text: str) -> int:
        """So many `encode` makes of `text` at least, found without it; 0 where that cannot be said.
        Takes milliseconds for a megabyte, and more the first time."""
        return 0 if self._fewest is None else self._fewest.of(text)

    @cached_property
    def _fewest(self) -> Fewest | None:
        return Fewest(self._backend) if self._fast else None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; ids that are no token yield nothing."""
        if self._fast:
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
            return text
        with self._lock:
            known = [i for i in ids if i < self.vocab_size]
            return str(
                self._tokenizer.decode(
                    known,
                    skip_special_tokens=skip_special_tokens,
                    clean_up_tokenization_spaces=False,
                )
            )

    def digest(self) -> str:
        """The same for tokenizers that make the same text of the same ids."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        told = repr((vocabulary, sorted(self.special_ids)))
        return blake2b(told.encode(errors="surrogatepass"), digest_size=16).hexdigest()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; empty if it is no token."""
        return self._pieces[token_id]

    def token_text(self, token_id: int) -> str:
        """One token for people: its text, or `bytes:\\\\x..` if it is not whole characters."""
        raw = self._pieces[token_id]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation, by the model's own template.

        Raises `InvalidRequest` if the model has none, or if the template refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "This model has no chat template: use /v1/completions.", param="messages"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(template_arguments or {}),
            )
        except TEMPLATE_FAULTS as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return text

    def hidden_ids(self, shown: Collection[str]) -> frozenset[int]:
        """The special ids but for those of `shown`: marks that have to be seen."""
        if not shown:
            return self.special_ids
        return frozenset(i for i, text in self._specials.items() if text.strip() not in shown)

    def added_id(self, text: str) -> int | None:
        """The token that was added for all of `text`, if there is one."""
        return self._added.get(text)

    @property
    def template(self) -> str:
        """The text of the chat template, of all of them if there are several; "" if none."""
        template = self._tokenizer.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, dict) else str(template)

    @property
    def knows_developer_role(self) -> bool:
        """Whether the chat template treats `developer` as a role of its own."""
        return "developer" in str(self._tokenizer.chat_template)


def _has_words(tokenizer: Any) -> bool:
    """False for what transformers makes of a family's name where the files are missing: special
    tokens and at most a space, into which any text disappears."""
    special = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    return len(tokenizer.get_vocab().keys() - special - {*tokenizer.all_special_tokens}) > 1


def _generation_eos(path: str) -> frozenset[int]:
    file = Path(path, "generation_config.json")
    if not file.is_file():
        return frozenset()
    eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
