"""Marks of calls and thoughts that a server leaves out of its text, because they are special tokens
of the model."""

from __future__ import annotations

from collections.abc import Mapping

from dynamo_serve.config import ModelSection
from dynamo_serve.errors import EngineStartError
from dynamo_serve.text.dialect import TAGS, dialect_of
from dynamo_serve.text.tokenizer import Tokenizer
from dynamo_serve.text.tools.forms import FORMS


def refused_for(tokenizer: Tokenizer, model: ModelSection) -> Mapping[str, str]:
    """What cannot be told from the text of such a server: as `EngineSpec.refused`.

    Raises `EngineStartError` where thoughts cannot, for these come unasked.
    """

    def is_lost(mark: str) -> bool:
        return tokenizer.added_id(mark) in tokenizer.special_ids

    spoken = dialect_of(tokenizer.template, model.tool_parser, model.reasoning_parser)
    if spoken.thoughts and any(map(is_lost, TAGS[spoken.thoughts])):
        raise EngineStartError(
            f"model.reasoning_parser: {' and '.join(TAGS[spoken.thoughts])} are special tokens, "
            "which the Triton server leaves out of its text, so thoughts cannot be told from the "
            "answer; set it to none and they are part of the answer"
        )
    if not spoken.tools:
        return {}
    openings = [opening.mark for opening in FORMS[spoken.tools].openings]
    if not all(map(is_lost, openings)):
        return {}
    what = f"{' and '.join(openings)} marks a call, and is a special token"
    return {"tools": f"{what} that the Triton server leaves out of its text"}
