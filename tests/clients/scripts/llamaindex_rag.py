"""LlamaIndex: documents of a folder in an index by embeddings, and answers made from them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from telling import BASE, DOCUMENTS, MODEL, QUESTIONS, feature, tell

common = {"api_base": f"{BASE}/v1", "api_key": "none", "max_retries": 0}
llm = OpenAILike(
    model=MODEL, is_chat_model=True, context_window=4096, max_tokens=60, temperature=0, **common
)
embeddings = OpenAILikeEmbedding(model_name=MODEL, **common)


def index_of(folder: Path) -> VectorStoreIndex:
    for name, text in DOCUMENTS.items():
        (folder / name).write_text(text)
    documents = SimpleDirectoryReader(str(folder)).load_data()
    return VectorStoreIndex.from_documents(
        documents, embed_model=embeddings, transformations=[SentenceSplitter()]
    )


with tempfile.TemporaryDirectory() as folder:
    index = index_of(Path(folder))


@feature
def retrieve() -> Any:
    """Of each question the document that is found, and the right one."""
    retriever = index.as_retriever(similarity_top_k=1)
    return {
        question: [retriever.retrieve(question)[0].metadata["file_name"], right]
        for question, right in QUESTIONS.items()
    }


@feature
def query() -> Any:
    """The whole of it: find, put into a prompt, answer."""
    answer = index.as_query_engine(llm=llm, similarity_top_k=1).query("What is prefill?")
    return {
        "text": str(answer),
        "sources": [node.metadata["file_name"] for node in answer.source_nodes],
    }


@feature
def stream() -> Any:
    engine = index.as_query_engine(llm=llm, similarity_top_k=1, streaming=True)
    return "".join(engine.query("What is prefill?").response_gen)


tell()
