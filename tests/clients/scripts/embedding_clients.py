"""Embeddings through the official client and LangChain."""

from __future__ import annotations

from typing import Any

import openai
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from telling import BASE, DOCUMENTS, MODEL, QUESTIONS, feature, tell

client = openai.OpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0)
# By default it sends the token ids of a tokenizer of OpenAI's, which it would have to download.
embeddings = OpenAIEmbeddings(
    model=MODEL, base_url=f"{BASE}/v1", api_key="none", check_embedding_ctx_length=False
)
TEXTS = list(DOCUMENTS.values())


@feature
def official() -> Any:
    """Asked for as base64 by the client itself; floats are the same."""
    packed = client.embeddings.create(model=MODEL, input=TEXTS)
    floats = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
    pairs = zip(packed.data, floats.data, strict=True)
    gaps = [
        abs(a - b)
        for one, other in pairs
        for a, b in zip(one.embedding, other.embedding, strict=True)
    ]
    return {
        "sizes": [len(item.embedding) for item in packed.data],
        "gap": max(gaps),
        "tokens": packed.usage.prompt_tokens,
    }


@feature
def dimensions() -> Any:
    answer = client.embeddings.create(model=MODEL, input="A cat sleeps.", dimensions=16)
    return len(answer.data[0].embedding)


@feature
def langchain() -> Any:
    """Of each question the document that a store of vectors finds, and the right one."""
    names = {text: name for name, text in DOCUMENTS.items()}
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    return {
        question: [names[store.similarity_search(question, k=1)[0].page_content], right]
        for question, right in QUESTIONS.items()
    }


tell()
