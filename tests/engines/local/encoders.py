"""Small random encoders of many architectures, with a tokenizer made on the spot."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (
    *("the", "a", "of", "is", "in", "on", "page", "pool", "river", "bread", "flour", "city"),
    *("seine", "paris", "lies", "made", "how", "what", "where", "long", "holds", "tokens"),
    *("queue", "waits", "step", "runs", "fast", "slow", "and", "for", "who", "asks"),
)
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}
# name -> (config class, what differs from COMMON)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {}),
    "roberta": ("RobertaConfig", {"pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": ("DistilBertConfig", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "electra": ("ElectraConfig", {"embedding_size": 16}),
    "albert": ("AlbertConfig", {"embedding_size": 16}),
    "mpnet": ("MPNetConfig", {"pad_token_id": 1}),
    "modernbert": (
        "ModernBertConfig",
        {
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
    ),
}
PACKED = ("bert", "roberta", "distilbert", "electra", "albert", "modernbert")


@cache
def checkpoint(name: str, labels: int = 0) -> str:
    """A folder with random weights of `MODELS[name]`, the same every time; with `labels` a
    classifier."""
    kind, changes = MODELS[name]
    more = {"num_labels": labels} if labels else {}
    config = getattr(transformers, kind)(**{**COMMON, **changes, **more})
    torch.manual_seed(7)
    auto = AutoModelForSequenceClassification if labels else AutoModel
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
            elif parameter.abs().sum() == 0:
                parameter.normal_(0.0, 0.1)
    folder = Path(mkdtemp(prefix=f"{name}-"))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece with BERT's marks: [CLS] a [SEP], or [CLS] a [SEP] b [SEP] with types 0 and 1."""
    vocab = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    )


@cache
def plain_model(name: str, labels: int = 0) -> Any:
    """As transformers runs it."""
    auto = AutoModelForSequenceClassification if labels else AutoModel
    return auto.from_pretrained(checkpoint(name, labels), attn_implementation="eager").eval()


def plain_states(name: str, ids: tuple[int, ...]) -> torch.Tensor:
    """Hidden states [tokens, hidden] of a text alone."""
    with torch.inference_mode():
        states: torch.Tensor = plain_model(name)(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return states


def plain_logit(name: str, ids: tuple[int, ...], second_at: int) -> float:
    """A cross-encoder's for a pair alone."""
    kinds = [0] * (second_at or len(ids)) + [1] * (len(ids) - (second_at or len(ids)))
    typed = {"token_type_ids": torch.tensor([kinds])} if second_at else {}
    with torch.inference_mode():
        return float(plain_model(name, 1)(input_ids=torch.tensor([ids]), **typed).logits)
