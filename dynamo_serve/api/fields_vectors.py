"""What becomes of the fields that clients send with texts to embed or to rerank."""

from __future__ import annotations

from dynamo_serve.api.fields import Known, bookkeeping, only, refused

_COMMON: dict[str, Known] = {
    "user": bookkeeping("names the end user"),
    "metadata": bookkeeping("the caller's own notes"),
    "safety_identifier": bookkeeping("names the end user"),
    "service_tier": bookkeeping("there is one tier"),
    "request_id": bookkeeping("send the header X-Request-Id"),
    "truncate": refused("use truncate_prompt_tokens", only("NONE", "none", False)),
    "truncation": refused("use truncate_prompt_tokens", only(False)),
    "add_special_tokens": refused("the tokenizer's own are always added", only(True)),
    "mm_processor_kwargs": refused("the input is text"),
    "instruction": refused("put it before the text, as the model's card says"),
}

EMBEDDING: dict[str, Known] = {
    **_COMMON,
    "input_type": refused("put the model's own words for it before the text"),
    "task": refused("put the model's own words for it before the text"),
    "prompt_name": refused("put the model's own words for it before the text"),
    "messages": refused("send the text as input"),
    "embedding_type": refused("use encoding_format", only("float")),
    "output_dtype": refused("numbers are 32-bit floats", only("float")),
    "embed_dtype": refused("numbers are 32-bit floats", only("float32")),
    "endianness": refused("numbers are those of little-endian machines", only("little", "native")),
    "output_dimension": refused("use dimensions"),
    "late_chunking": refused("each input is embedded by itself", only(False)),
    "use_activation": refused("use normalize"),
}

RERANK: dict[str, Known] = {
    **_COMMON,
    "max_chunks_per_doc": refused("a document is read as one"),
    "max_tokens_per_doc": refused("use truncate_prompt_tokens"),
    "rank_fields": refused("documents have one field, text", only(["text"], [])),
    "return_text": refused("use return_documents"),
    "activation": refused("use raw_scores"),
    "use_activation": refused("use raw_scores"),
}
