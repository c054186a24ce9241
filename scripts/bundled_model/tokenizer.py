"""Trains the byte-level BPE tokenizer and writes it with the chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = Path(__file__).parent / "chat_template.jinja"
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
CONTEXT = 4096


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns merges from texts. Digits stay single, and every byte has a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END, CALL, CALL_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return unspecial(tokenizer, (CALL, CALL_END))


def unspecial(tokenizer: Tokenizer, marks: tuple[str, ...]) -> Tokenizer:
    """Keeps the marks whole but not special, so that they survive skip_special_tokens."""
    layout = json.loads(tokenizer.to_str())
    for token in layout["added_tokens"]:
        if token["content"] in marks:
            token["special"] = False
    return Tokenizer.from_str(json.dumps(layout))


def save(tokenizer: Tokenizer, out: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "eos_token": END,
        "pad_token": PAD,
        "bos_token": None,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")
    shutil.copyfile(TEMPLATE, out / TEMPLATE.name)


def load(folder: Path) -> PreTrainedTokenizerFast:
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded
