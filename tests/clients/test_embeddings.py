"""Embeddings: the official client, LangChain, LlamaIndex over documents of a folder, the AI SDK."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.clients import NODE, PYTHON, PYTHON_OPENAI_2
from tests.clients import judging
from tests.clients.conftest import Programs
from tests.clients.judging import Judge

# Of vectors of length 1 in bfloat16: what is asked again is found in the cache, and what is left of
# it may be computed by another kernel.
ROUNDING = 5e-3


def all_found(told: Any) -> None:
    assert len(told) > 1
    assert all(found == right for found, right in told.values()), told


def from_the_document(told: Any) -> None:
    assert told["sources"] == ["prefill.txt"]
    assert "prompt" in told["text"]


def equal_vectors(told: Any) -> None:
    assert set(told["sizes"]) == {judging.SIZE}
    assert told["gap"] < ROUNDING
    assert told["tokens"] > len(told["sizes"])


def shortened(told: Any) -> None:
    assert told == 16


def about_the_prompt(told: Any) -> None:
    assert "prompt" in told


EMBEDDING: dict[str, Judge] = {
    "official": equal_vectors,
    "dimensions": shortened,
    "langchain": all_found,
}
RAG: dict[str, Judge] = {
    "retrieve": all_found,
    "query": from_the_document,
    "stream": about_the_prompt,
}


@pytest.mark.parametrize("feature", EMBEDDING)
def test_vectors(programs: Programs, url: str, feature: str) -> None:
    programs.judge(EMBEDDING[feature], PYTHON, "embedding_clients.py", feature, url)


@pytest.mark.parametrize("feature", RAG)
def test_answers_from_local_documents(programs: Programs, url: str, feature: str) -> None:
    programs.judge(RAG[feature], PYTHON_OPENAI_2, "llamaindex_rag.py", feature, url)


def test_ai_sdk(programs: Programs, url: str) -> None:
    programs.judge(judging.two_vectors, NODE, "ai_sdk_providers.mjs", "embeddings", url)
