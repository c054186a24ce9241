"""The model's tokens, as grammars see them."""

from __future__ import annotations

from llguidance import LLTokenizer
from transformers import AutoTokenizer, PreTrainedModel

from dynamo_serve.grammars import BadGrammar, vocabulary


def load_words(path: str, model: PreTrainedModel, vocab_size: int) -> LLTokenizer:
    """Loads the tokenizer: seconds, for a large one. Raises `BadGrammar` for a slow one."""
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if not tokenizer.is_fast:
        raise BadGrammar("the model's tokenizer is not one that grammars can be followed with")
    named = model.generation_config.eos_token_id if model.generation_config else None
    eos_ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    return vocabulary(tokenizer.backend_tokenizer.to_str(), vocab_size, eos_ids)
