"""Make a model folder of any Qwen3 shape with random, seeded weights and a byte-level tokenizer.

    python -m bench.random_model --out MODEL_DIR            # the 0.6B shape of bench/LOG.md
    python -m bench.random_model --out MODEL_DIR --chain    # the same, for bench.speculation

With `--chain` the model is no more random: after each token it always says the next one of a fixed
order (`chain`), at the cost of a whole forward. A prompt that holds parts of that order is then one
whose answer copies from it, exactly as far as the bench wants.

The embedding rows of special and of non-UTF-8 tokens are zero, so that greedy decoding never
chooses them: every server generates exactly the asked number of tokens.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words(seed: int, count: int) -> Iterator[str]:
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for _ in range(count):
        yield " ".join("".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(50))


def make_tokenizer(vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words(0, 8000), trainer)
    assert tokenizer.get_vocab_size() == vocab_size, tokenizer.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        model_max_length=max_length,
    )


def silent_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids whose text is special or not UTF-8 on its own."""
    return [
        i
        for i in range(len(tokenizer))
        if i in tokenizer.all_special_ids or "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([i])
    ]


def make_model(config: Qwen3Config, silent: list[int], dtype: torch.dtype) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight[silent] = 0
    model.generation_config.eos_token_id = config.eos_token_id
    return model


def chain(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """All tokens but the silent ones, in the order in which a `--chain` model says them."""
    silent = set(silent_tokens(tokenizer))
    order = [i for i in range(len(tokenizer)) if i not in silent]
    random.Random(0).shuffle(order)
    return order


def make_chain(model: Qwen3ForCausalLM, order: list[int]) -> None:
    """Have the layers add next to nothing, and the head look for the token before."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
        head = torch.zeros_like(model.lm_head.weight)
        head[order[1:] + order[:1]] = model.model.embed_tokens.weight[order]
        model.lm_head.weight.copy_(head)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=3072)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--chain", action="store_true", help="say a fixed order of tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    return parser.parse_args()


def main() -> None:
    args = parse()
    max_length = 4096
    tokenizer = make_tokenizer(args.vocab, max_length)
    config = Qwen3Config(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        intermediate_size=args.intermediate,
        vocab_size=args.vocab,
        tie_word_embeddings=not args.chain,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = make_model(config, silent_tokens(tokenizer), getattr(torch, args.dtype))
    if args.chain:
        make_chain(model, chain(tokenizer))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
