"""The one place that turns what a client sent into requests for the service, or rejects it."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, replace
from hashlib import blake2b

from dynamo_serve import __version__
from dynamo_serve.api.capable import check_generates, check_honoured
from dynamo_serve.api.prompt_logprobs import check_prompt_logprobs, prompt_logprobs
from dynamo_serve.api.prompts import check_ids
from dynamo_serve.api.schema import ChatRequest, CompletionRequest
from dynamo_serve.api.terms import Terms
from dynamo_serve.core.engine import EngineSpec
from dynamo_serve.core.request import Grammar, Request, Sampling
from dynamo_serve.directory import Caller
from dynamo_serve.errors import ContextTooLong, InvalidRequest
from dynamo_serve.text.detokenizer import Detokenizer
from dynamo_serve.text.dialect import Parsing, Reader
from dynamo_serve.text.message import PartedTranscript
from dynamo_serve.text.stream import Silent, Teller, Transcript
from dynamo_serve.text.tokenizer import Tokenizer

SEEDS = 2**63
ID_PREFIXES = {
    "chat": "chatcmpl-",
    "completions": "cmpl-",
    "messages": "msg_",
    "responses": "resp_",
}
TOKEN_ID = re.compile(r"0|[1-9]\d{0,18}", re.ASCII)  # one spelling each, so no token has two biases
# Of the engine's facts, those that can change a logit; the size of the pool cannot.
DECISIVE_FACTS = (
    *("architecture", "num_parameters", "device", "dtype", "kv_dtype", "quantization"),
    *("attention_backend", "torch_version", "transformers_version"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request: its prompts and the requests that answer them, `n` for each prompt.

    Choice `i` answers prompt `i // n`. `stops` and `min_tokens` are the text layer's share.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    n: int
    requests: tuple[Request, ...]
    stops: tuple[str, ...]
    endpoint: str  # whose body it was, which is how its answer looks
    stream: bool
    include_usage: bool
    return_token_ids: bool
    logprobs: int | None
    explain: bool
    keep_seconds: float = 0.0  # for a client that comes back, after its connection broke
    parsing: Parsing | None = None  # how answers are told apart, if they are
    infers: tuple[str, ...] = ()  # what of the answer the engine is not told: `EngineSpec`
    echo: bool = False
    prompt_logprobs: int | None = None  # as vLLM has them
    is_silent: bool = False  # no token was asked for

    @property
    def continues_text(self) -> bool:
        return self.endpoint == "completions"

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [request.prompt_ids for request in self.requests[:: self.n]]

    def transcript(self, index: int, tokenizer: Tokenizer) -> Teller:
        """A fresh transcript for choice `index`."""
        if self.is_silent:
            return Silent()
        request = self.requests[index]
        # A message is a text of its own; a completion continues its prompt, and that decides
        # whether its first token shows a leading space.
        context = request.prompt_ids if self.continues_text else ()
        hidden = tokenizer.hidden_ids(self.parsing.marks if self.parsing else ())
        detokenizer = Detokenizer(tokenizer.decode, hidden, context, tokenizer.alone)
        transcript = Transcript(detokenizer, self.stops, request.min_tokens)
        if self.parsing is None:
            return transcript
        return PartedTranscript(
            transcript, Reader(self.parsing), is_apart=self.logprobs is not None
        )


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a request is checked against: facts of the engine, wishes of the operator."""

    spec: EngineSpec
    max_choices: int
    resume_grace: float
    eos_ids: frozenset[int]


Body = ChatRequest | CompletionRequest


def to_job(
    body: Body,
    prompts: list[list[int]],
    bounds: Bounds,
    caller: Caller,
    terms: Terms,
    model: str,
    grammar: Grammar | None,
    parsing: Parsing | None = None,
) -> Job:
    """Raises `InvalidRequest` (or one of its kind) naming the field and the bound."""
    _check(body, len(prompts), bounds)
    job_id = ID_PREFIXES[body.endpoint] + secrets.token_hex(12)
    first = replace(_request(body, job_id, bounds, caller, terms), grammar=grammar)
    requests = _choices(first, prompts, body, bounds)
    return Job(
        id=job_id,
        created=int(time.time()),
        model=model,
        fingerprint=fingerprint(bounds.spec),
        n=body.n,
        requests=tuple(requests),
        stops=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        endpoint=body.endpoint,
        stream=body.stream,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        return_token_ids=body.return_token_ids,
        logprobs=_logprobs(body),
        explain=body.explain,
        keep_seconds=bounds.resume_grace if body.stream and body.is_resumable else 0.0,
        parsing=parsing,
        infers=tuple(bounds.spec.infers),
        echo=isinstance(body, CompletionRequest) and body.echo,
        prompt_logprobs=body.prompt_logprobs,
        is_silent=isinstance(body, CompletionRequest) and body.max_tokens == 0,
    )


def unread(body: Body, caller: Caller) -> Request:
    """What is known of a request at whose prompt nobody has looked."""
    return Request(
        id="",
        prompt_ids=(),
        max_tokens=_asked_tokens(body) or 0,
        tenant=caller.tenant,
        arrival=time.monotonic(),
        class_name=body.class_name,
        priority=body.priority,
        num_choices=body.n,
        is_open_ended=_asked_tokens(body) is None,
        is_stream=body.stream,
        group=body.prompt_cache_key or "",
    )


def _request(body: Body, id: str, bounds: Bounds, caller: Caller, terms: Terms) -> Request:
    """What all choices have in common; prompt, length and the choice's own seed are missing."""
    seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed % SEEDS
    now = time.monotonic()
    return Request(
        id=id,
        prompt_ids=(),
        max_tokens=0,
        sampling=_sampling(body, seed),
        stop_ids=frozenset(body.stop_token_ids)
        | (frozenset() if body.ignore_eos else bounds.eos_ids),
        min_tokens=body.min_tokens,
        tenant=caller.tenant,
        salt=caller.salted(body.cache_salt).salt,
        arrival=now,
        deadline=now + terms.deadline,
        class_name=terms.class_name,
        priority=terms.priority,
        is_stream=body.stream,
        group=body.prompt_cache_key or "",
        has_class_deadline=terms.has_class_deadline,
    )


def _choices(first: Request, prompts: list[list[int]], body: Body, bounds: Bounds) -> list[Request]:
    """A request for each choice of each prompt; the first answers to the quotas for all."""
    total, tokens = len(prompts) * body.n, body.n * sum(map(len, prompts))
    call, seed = first.id, first.sampling.seed
    return [
        replace(
            first,
            id=f"{call}-{at * body.n + choice}",
            num_choices=0 if at or choice else total,
            call_tokens=0 if at or choice else tokens,
            prompt_ids=tuple(ids),
            max_tokens=_max_tokens(body, len(ids), bounds.spec.max_model_len),
            is_open_ended=_asked_tokens(body) is None,
            sampling=replace(first.sampling, seed=choice_seed(seed, choice)),
        )
        for at, ids in enumerate(prompts)
        for choice in range(body.n)
    ]


def _check(body: Body, num_prompts: int, bounds: Bounds) -> None:
    vocab_size = bounds.spec.vocab_size
    check_generates(bounds.spec)
    check_honoured(body, bounds.spec)
    if body.n * num_prompts > bounds.max_choices:
        raise InvalidRequest(
            f"'n': {body.n} choices for {num_prompts} prompt(s), the limit is "
            f"{bounds.max_choices} choices in one request.",
            param="n",
        )
    check_prompt_logprobs(body)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")
    if isinstance(body, ChatRequest):
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens) and (
            body.max_tokens != body.max_completion_tokens
        ):
            raise InvalidRequest(
                "'max_tokens' and 'max_completion_tokens' contradict each other.",
                param="max_tokens",
            )
    check_ids(body.stop_token_ids, vocab_size, "stop_token_ids")
    for key in body.logit_bias:
        if not (TOKEN_ID.fullmatch(key) and int(key) < vocab_size):
            raise InvalidRequest(
                f"'logit_bias': {key[:40]!r} is not a token id below {vocab_size}.",
                param="logit_bias",
            )


def _max_tokens(body: Body, num_prompt: int, limit: int) -> int:
    """How many tokens may be generated. Raises `ContextTooLong` if there is no room for them."""
    asked = _asked_tokens(body)
    num_tokens = limit - num_prompt if asked is None else asked
    if num_tokens < 1 or num_prompt + num_tokens > limit:
        wanted = "" if asked is None else f" and {body.names.of('max_tokens')} is {asked}"
        raise ContextTooLong(
            f"The prompt has {num_prompt} tokens{wanted}; "
            f"prompt and answer together may have {limit}.",
            param=body.names.of("messages") if isinstance(body, ChatRequest) else "prompt",
        )
    if body.min_tokens > num_tokens:
        raise InvalidRequest(
            f"'min_tokens' is {body.min_tokens}, more than the {num_tokens} that may be generated.",
            param="min_tokens",
        )
    return num_tokens


def _asked_tokens(body: Body) -> int | None:
    """How long the answer may get, if the client says so."""
    if isinstance(body, ChatRequest):
        return body.max_completion_tokens or body.max_tokens
    return body.max_tokens or 1  # with 0 the first token is thrown away


def _sampling(body: Body, seed: int) -> Sampling:
    return Sampling(
        temperature=body.temperature,
        top_k=max(body.top_k, 0),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=tuple((int(key), bias) for key, bias in body.logit_bias.items()),
        seed=seed,
        logprobs=_logprobs(body),
        prompt_logprobs=prompt_logprobs(body),
    )


def _logprobs(body: Body) -> int | None:
    if isinstance(body, ChatRequest):
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs


def choice_seed(seed: int, choice: int) -> int:
    """Choice 0 keeps the seed, so that n: 1 and n: 4 begin alike; the others get their own."""
    if choice == 0:
        return seed
    digest = blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % SEEDS


def fingerprint(spec: EngineSpec) -> str:
    """Changes when the same seed may give another answer: other code, model, device or numbers."""
    facts = [(name, spec.facts.get(name)) for name in DECISIVE_FACTS]
    told = repr((__version__, spec.vocab_size, facts))
    return "fp_" + blake2b(told.encode(), digest_size=5).hexdigest()
