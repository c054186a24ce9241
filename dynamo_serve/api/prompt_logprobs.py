"""What a request says about log probabilities of its prompt."""

from __future__ import annotations

from dynamo_serve.api.schema import ChatRequest, CompletionRequest
from dynamo_serve.errors import InvalidRequest


def prompt_logprobs(body: ChatRequest | CompletionRequest) -> int | None:
    """How many of the likeliest tokens are wanted beside each of the prompt; None: no scores."""
    wanted = [body.prompt_logprobs]
    if isinstance(body, CompletionRequest) and body.echo:
        wanted.append(body.logprobs)
    return max((count for count in wanted if count is not None), default=None)


def check_prompt_logprobs(body: ChatRequest | CompletionRequest) -> None:
    """Raises `InvalidRequest`."""
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest(
            "'prompt_logprobs' come with whole answers only: leave out 'stream'.",
            param="prompt_logprobs",
        )
    if body.max_tokens == 0 and not (
        body.prompt_logprobs is not None or (isinstance(body, CompletionRequest) and body.echo)
    ):
        raise InvalidRequest(
            "'max_tokens': 0 tokens are generated with 'echo' or 'prompt_logprobs' only.",
            param="max_tokens",
        )
