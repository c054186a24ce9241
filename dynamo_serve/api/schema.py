"""What clients may send, field by field; the OpenAPI document is made from this."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Discriminator, Field, PrivateAttr, Tag

from dynamo_serve.api.names import OWN, Names
from dynamo_serve.api.schema_base import (
    MAX_NAME,
    Model,
    Salted,
    Scheduled,
    one_or_several,
)
from dynamo_serve.api.schema_message import Message
from dynamo_serve.api.schema_structured import (
    FORMATS,
    STRUCTURES,
    ResponseFormat,
    StructuredOutputs,
)
from dynamo_serve.api.schema_tools import Effort, ToolChoice, Tools

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 10_000
MAX_TEMPLATE_VARIABLES = 64
INT64 = 2**63


def _kind(value: Any) -> str:
    """Which of "one or several" a value is. The '#' keeps the tag out of error paths."""
    if not isinstance(value, list):
        return "#one"
    return "#lists" if value and isinstance(value[0], list) else _kind_of_items(value)


def _kind_of_items(value: list[Any]) -> str:
    return "#ids" if value and not isinstance(value[0], str) else "#several"


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[StopString, Tag("#one")]
    | Annotated[list[StopString], Field(max_length=MAX_STOPS), Tag("#several")],
    Discriminator(one_or_several),
]
# One fault is told; collecting a million of them would take gigabytes.
Ids = Annotated[list[int], Field(fail_fast=True)]
PromptField = Annotated[
    Annotated[str, Tag("#one")]
    | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("#several")]
    | Annotated[Ids, Field(min_length=1), Tag("#ids")]
    | Annotated[list[Annotated[Ids, Field(min_length=1)]], Field(fail_fast=True), Tag("#lists")],
    Discriminator(_kind),
]

PrefixField = Annotated[
    Annotated[str, Tag("#one")] | Annotated[Ids, Field(min_length=1), Tag("#several")],
    Discriminator(one_or_several),
]

# More digits than a machine's integer are nobody's wish, and errors repeat the number.
Count = Annotated[int, Field(ge=1, lt=INT64)]


class StreamOptions(Model):
    include_usage: bool = Field(False, description="End the stream with a chunk of token counts.")


class Sampled(Scheduled):
    """What every request has that generates: how tokens are picked, and when it runs."""

    model: str | None = Field(None, description="One of /v1/models; without it, the first.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    min_tokens: int = Field(
        0,
        ge=0,
        lt=INT64,
        description="No stop token or stop string ends the answer before so many tokens.",
    )
    stop: Stop | None = Field(None, description="Strings that end the answer, left out of it.")
    stop_token_ids: list[int] = Field(
        [], max_length=MAX_STOP_IDS, description="Further token ids that end the answer."
    )
    ignore_eos: bool = Field(False, description="Go on past the model's end-of-text token.")
    temperature: float = Field(
        1.0, ge=0, le=2, description="0 always takes the likeliest token. Not taken from the model."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from this much probability mass.")
    top_k: int = Field(
        0, ge=-1, lt=INT64, description="Sample from so many tokens; 0 or -1 from all."
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="Least probability, as a share of the likeliest token's."
    )
    repetition_penalty: float = Field(
        1.0,
        ge=0.01,
        le=10,
        description="Over 1: tokens of the prompt and the answer are less likely.",
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken off the logit of tokens that the answer has."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken off for each time that the answer has the token."
    )
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, max_length=MAX_BIASES, description="Token id -> what is added to its logit."
    )
    seed: int | None = Field(
        None, ge=-INT64, lt=INT64, description="Same seed, same answer. Drawn if not given."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="The same as vLLM has it: JSON, a regular expression, a choice, a grammar.",
        examples=STRUCTURES,
    )
    prompt_cache_key: str | None = Field(
        None,
        max_length=512,
        description="A hint which requests begin alike. Those of a tenant that wait with the same "
        "key run one after the other, while what they share is in the cache; none goes before one "
        "that is due much earlier. That they share it is seen from their tokens, key or not. POST "
        "/v1/prefixes keeps a head.",
    )
    explain: bool = Field(
        False, description="The end of each choice carries explain: where its time went."
    )


class Generation(Sampled):
    """What chat and plain completions have in common."""

    endpoint: ClassVar[str]  # how the answer looks
    is_resumable: ClassVar[bool] = True  # whether its stream can be gone on with

    stream_options: StreamOptions | None = Field(None, description="Only with stream: true.")
    n: Count = Field(1, description="Choices per prompt.")
    max_tokens: Count | None = Field(None, description="Most tokens to generate.")
    response_format: ResponseFormat | None = Field(
        None, description="What the answer has to be: any text, or JSON.", examples=FORMATS
    )
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="Log probability of each token of the prompt, and of so many of the likeliest; "
        "without stream. Nothing of the prompt then comes from the cache.",
    )
    return_token_ids: bool = Field(
        False, description="Choices carry token_ids; prompt_token_ids come with the answer."
    )
    _names: Names = PrivateAttr(default_factory=lambda: OWN)

    @property
    def names(self) -> Names:
        """What the client calls these fields."""
        return self._names

    def named(self, names: Names) -> Self:
        """The same, from a client that calls its fields otherwise."""
        other = self.model_copy()
        other._names = names
        return other


class ChatRequest(Generation):
    endpoint: ClassVar[str] = "chat"

    messages: list[Message] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
        description="The conversation so far.",
    )
    max_completion_tokens: Count | None = Field(
        None,
        description="The newer name of max_tokens. Without either: all there is room for.",
    )
    logprobs: bool = Field(False, description="Log probability of each token of the answer.")
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="So many of the likeliest tokens beside each; needs logprobs.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        max_length=MAX_TEMPLATE_VARIABLES,
        description="Further variables for the model's chat template (enable_thinking, ...).",
    )
    tools: Tools = Field([], description="What the model may call.")
    tool_choice: ToolChoice | None = Field(
        None,
        description="none (tools are not shown to the model), auto (the default with tools), "
        "required, or a named one.",
        examples=["auto", {"type": "function", "function": {"name": "get_weather"}}],
    )
    parallel_tool_calls: bool = Field(
        True, description="false: the answer ends with its first call."
    )
    reasoning_effort: Effort | None = Field(
        None, description="For templates that take one; none turns thinking off where it can be."
    )
    thinking_token_budget: int | None = Field(
        None, ge=0, lt=INT64, description="For templates that take one: tokens to think in."
    )


class CompletionRequest(Generation):
    endpoint: ClassVar[str] = "completions"

    prompt: PromptField = Field(
        description="A string, a list of strings, token ids, or a list of lists of token ids."
    )
    max_tokens: int = Field(
        16,
        ge=0,
        lt=INT64,
        description="Most tokens to generate; 0 with echo or prompt_logprobs only.",
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="Log probability of each token, and of so many of the likeliest.",
    )
    echo: bool = Field(
        False,
        description="The text begins with the prompt; with logprobs, these with those of its "
        "tokens, and nothing of it comes from the cache.",
    )


class TokenizeRequest(Model):
    model: str | None = Field(None, description="One of /v1/models; without it, the first.")
    prompt: str | None = Field(None, description="Text. Either this or messages.")
    messages: list[Message] | None = Field(
        None,
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
        description="A conversation.",
    )
    add_special_tokens: bool | None = Field(
        None, description="Add BOS and the like. Default: true for prompt, false for messages."
    )
    add_generation_prompt: bool = Field(
        True, description="messages: end with the opening of the assistant's answer."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        max_length=MAX_TEMPLATE_VARIABLES,
        description="messages: further variables for the chat template.",
    )
    tools: Tools = Field([], description="messages: shown to the model, as in a chat.")
    return_token_strs: bool = Field(False, description="Also answer the text of each token.")


class PrefixRequest(Salted):
    model: str | None = Field(None, description="One of /v1/models; without it, the first.")
    messages: list[Message] | None = Field(
        None,
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
        description="How conversations to come begin. Either this or prompt.",
    )
    prompt: PrefixField | None = Field(None, description="How prompts to come begin.")
    ttl_s: float = Field(
        3600.0, ge=1, description="Seconds for which it stays; cache.pinned_ttl_max_s at most."
    )
    tools: Tools = Field([], description="messages: tools of the prompts to come.")
    name: str | None = Field(None, max_length=MAX_NAME, description="For people.")
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        max_length=MAX_TEMPLATE_VARIABLES,
        description="messages: further variables for the chat template.",
    )


class DetokenizeRequest(Model):
    model: str | None = Field(None, description="One of /v1/models; without it, the first.")
    tokens: Ids = Field(description="Token ids.")
