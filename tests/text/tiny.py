"""Small tokenizers of the two families, made on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
SAMPLE = [
    "hello world, how are you today?",
    "the stop word is here",
    "naïve café 你好 世界 😀😀",
] * 5
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' and m.content == 'refuse me' %}{{ raise_exception('no such talk') }}"
    "{% endif %}"
    "<|im_start|>{{ m.role ~ ('(' ~ m.name ~ ')' if m.name else '') }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening }}{% endif %}"
)


def byte_level(*, template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """GPT-2's way: every byte is a character of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    wrapped.chat_template = template
    return wrapped


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama 2's way: `▁` is a space, unknown characters fall back to byte tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz.,!", "he", "lo", "▁w", "▁wo"]:
        vocab[piece] = len(vocab)
    merges = [("h", "e"), ("l", "o"), ("▁", "w"), ("▁w", "o")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
