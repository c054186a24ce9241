"""Prefixes that operators declare shared between tenants, as token ids: the same as requests'."""

from __future__ import annotations

import asyncio

from pydantic import ValidationError

from dynamo_serve.api.prompts import render_messages
from dynamo_serve.api.schema_message import Message
from dynamo_serve.config import CacheSection
from dynamo_serve.core.prefix_index import shared_keys
from dynamo_serve.errors import ConfigError, RequestError
from dynamo_serve.prefixes import Head
from dynamo_serve.shared import Declared, read
from dynamo_serve.text.tokenizer import Tokenizer


def declared_heads(cache: CacheSection, tokenizer: Tokenizer) -> list[Head]:
    """Those in `cache.shared_prefixes`, none without it. Raises `ConfigError`."""
    if not cache.shared_prefixes:
        return []
    return [_head(item, cache, tokenizer) for item in read(cache.shared_prefixes)]


def _head(item: Declared, cache: CacheSection, tokenizer: Tokenizer) -> Head:
    where = f"prefixes.{item.name} (from file {cache.shared_prefixes})"
    if item.text is not None:
        ids = tokenizer.encode(item.text, add_special_tokens=True)
    else:
        try:
            messages = [Message.model_validate(message) for message in item.messages or ()]
            rendering = render_messages(messages, tokenizer, {}, add_generation_prompt=False)
            ids = tokenizer.encode(asyncio.run(rendering))
        except RequestError as error:
            raise ConfigError(f"{where}: {error.message}") from None
        except ValidationError as error:
            raise ConfigError(f"{where}: {error.errors()[0]['msg']}") from None
    if len(ids) < cache.page_size:
        raise ConfigError(
            f"{where}: {len(ids)} tokens; only full pages of {cache.page_size} are shared"
        )
    return Head(item.name, tuple(ids), tuple(shared_keys(ids, cache.page_size)))
