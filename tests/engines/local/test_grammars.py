"""What an engine says with a grammar is a text of it, whatever else happens to the sequence."""

from __future__ import annotations

import json
import random
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from bench.structured_schemas import fault_of, random_schema
from dynamo_serve import bundled
from dynamo_serve.core.limits import Limits
from dynamo_serve.core.page_pool import PagePool
from dynamo_serve.core.request import Finish, Grammar, Request, Resumed, Sampling, TokenEvent
from dynamo_serve.core.scheduler import Scheduler
from dynamo_serve.core.step_cost import StepCost
from dynamo_serve.engines.local import LocalEngine, follower
from dynamo_serve.grammars import compiled, schema_grammar, vocabulary
from dynamo_serve.text.tokenizer import Tokenizer
from tests.engines.local.driver import GREEDY, make_engine

NUM_PAGES = 300
EOS = 2
HOT = Sampling(temperature=2.0, seed=1)
MAX_STEPS = 4000
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PATH = str(bundled.path())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(PATH)


@pytest.fixture(scope="module")
def engine() -> Generator[LocalEngine]:
    engine = make_engine(PATH, num_pages=NUM_PAGES, max_model_len=512, dtype="float32")
    assert engine.start().follows_grammars
    yield engine
    engine.close()


def ask(id: str, grammar: Grammar | None, count: int = 200, **fields: Any) -> Request:
    prompt = tuple(random.Random(id).sample(range(10, 2000), 9))
    return replace(Request(id, prompt, count, HOT, frozenset({EOS}), grammar=grammar), **fields)


class Run:
    """Requests from their arrival to their end, all of them at once."""

    def __init__(self, engine: LocalEngine, limits: Limits, num_pages: int = NUM_PAGES) -> None:
        self.engine = engine
        cost = StepCost(step_s=1.0, token_s=0.0, sequence_s=0.0)  # everything is drafted
        self.scheduler = Scheduler(PagePool(num_pages, 4), limits, cost=cost)
        self.ids: dict[str, list[int]] = {}
        self.last: dict[str, TokenEvent] = {}
        self.turn = 100

    def add(self, requests: Sequence[Request]) -> Run:
        for request in requests:
            self.ids[request.id] = []
            self.scheduler.add(request, 0.0)
        return self

    def steps(self, count: int = MAX_STEPS) -> Run:
        for _ in range(count):
            self.turn += 1
            now = self.turn / 100
            batch = self.scheduler.schedule(now)
            self.engine.drop(self.scheduler.take_dropped())
            if batch is None:
                break
            for event in self.scheduler.update(batch, self.engine.step(batch), now + 0.005):
                self.ids[event.request_id] += event.token_ids
                if event.finish is not None:
                    self.last[event.request_id] = event
            self.scheduler.check()
        self.engine.drop(self.scheduler.take_dropped())
        return self

    def text(self, tokenizer: Tokenizer, id: str) -> str:
        return tokenizer.decode(self.ids[id], skip_special_tokens=True)


def answers(engine: LocalEngine, requests: Sequence[Request], limits: Limits | None = None) -> Run:
    run = Run(engine, limits or Limits(mix_phases=True)).add(requests).steps()
    assert set(run.last) == {request.id for request in requests}
    assert not engine._matchers._of, "followers are left"
    return run


def test_random_schemas_are_kept_and_what_is_cut_can_be_completed(
    engine: LocalEngine, tokenizer: Tokenizer
) -> None:
    rng = random.Random(5)
    schemas = [random_schema(rng) for _ in range(32)]
    requests = [ask(str(i), schema_grammar(schema), 60) for i, schema in enumerate(schemas)]
    run = answers(engine, requests)
    cut = [r.id for r in requests if run.last[r.id].finish is Finish.LENGTH]
    for request, schema in zip(requests, schemas, strict=True):
        last = run.last[request.id]
        assert last.finish in (Finish.STOP, Finish.LENGTH), last
        if request.id not in cut:
            text = run.text(tokenizer, request.id)
            assert not fault_of(text, schema), (text, schema)
    assert 0 < len(cut) < 24
    assert tokenizer.as_json
    words = vocabulary(tokenizer.as_json, 2048, [EOS])
    for id in cut:
        grammar = requests[int(id)].grammar
        assert grammar and compiled(grammar, words).validate_tokens(run.ids[id]) == 60


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        (Grammar("choice", '["yes","no"]'), ("yes", "no")),
        (Grammar("choice", '["a\\"b","é\\n"]'), ('a"b', "é\n")),
        (Grammar("regex", "(ab|ba){3}"), None),
        (Grammar("grammar", 'start: "<" ("x" | "y") ">"'), ("<x>", "<y>")),
        (Grammar("grammar", 'root ::= "<" part ">"\npart ::= "x" | "y"'), ("<x>", "<y>")),
        (schema_grammar({"const": {"a": [1]}}, compact=True), ('{"a":[1]}',)),
    ],
)
def test_a_complete_text_ends_at_once(
    engine: LocalEngine, tokenizer: Tokenizer, grammar: Grammar, expected: tuple[str, ...] | None
) -> None:
    # Not even an unlimited wish for tokens makes it go on, and no end-of-text token is needed.
    fields: dict[str, Any] = {"min_tokens": 100, "stop_ids": frozenset()}
    run = answers(engine, [ask("a", grammar), ask("b", grammar, **fields)])
    for id in "ab":
        text = run.text(tokenizer, id)
        assert run.last[id].finish is Finish.STOP and run.last[id].stop_id is None
        assert text in expected if expected else len(text) == 6 and set(text) <= set("ab")
        assert EOS not in run.ids[id]


def test_the_end_of_text_is_picked_only_where_the_grammar_may_end(
    engine: LocalEngine, tokenizer: Tokenizer
) -> None:
    wants_end = Sampling(temperature=0.0, logit_bias=((EOS, 100.0),))
    [number, person] = Grammar("regex", "[0-9]+"), schema_grammar(PERSON)
    run = answers(
        engine,
        [
            ask("number", number, sampling=wants_end),
            ask("longer", number, sampling=wants_end, min_tokens=7),
            ask("person", person, sampling=wants_end),
        ],
    )
    assert len(run.ids["number"]) == 2 and run.last["number"].stop_id == EOS
    assert len(run.ids["longer"]) == 8 and run.text(tokenizer, "longer").isdecimal()
    assert not fault_of(run.text(tokenizer, "person"), PERSON)


def mixed(*samplings: Sampling) -> list[Request]:
    grammars = [schema_grammar(PERSON), None, Grammar("regex", "(abc|bca|cab){12,20}")]
    return [
        ask(f"{i}-{j}", grammar, 40, sampling=replace(sampling, seed=i))
        for i, sampling in enumerate(samplings)
        for j, grammar in enumerate(grammars)
    ]


def test_neighbours_drafts_and_preemption_change_nothing(engine: LocalEngine) -> None:
    requests = mixed(HOT, GREEDY, Sampling(0.7, top_p=0.9), Sampling(repetition_penalty=1.3))
    alone: dict[str, list[int]] = {}
    for request in requests:
        alone |= answers(engine, [request]).ids
    together = answers(engine, requests)
    assert together.ids == alone
    drafted = answers(engine, requests, Limits(max_draft_tokens=6, mix_phases=True))
    assert drafted.ids == alone
    assert drafted.scheduler.stats().draft_accepted_tokens_total > 0
    tight = Run(engine, Limits(16, 6, max_draft_tokens=3), num_pages=40).add(requests).steps()
    assert tight.ids == alone
    assert tight.scheduler.stats().preemptions_total > 0


@pytest.mark.parametrize("slow", [-1.0, 1.0])
def test_masks_that_take_their_time_give_the_same_answer(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, slow: float
) -> None:
    """They come when they come; the end of a slow one is noticed a step later."""
    requests = mixed(HOT, GREEDY)
    quick = answers(engine, requests)
    monkeypatch.setattr(follower, "SLOW", slow)
    monkeypatch.setattr(follower, "CHEAP", -1.0)  # none is made on the engine's own thread
    late = answers(engine, requests, Limits(max_draft_tokens=6, mix_phases=True))
    assert late.ids == quick.ids
    assert {id: e.finish for id, e in late.last.items()} == {
        id: e.finish for id, e in quick.last.items()
    }


def test_an_answer_goes_on_in_another_engine(engine: LocalEngine) -> None:
    grammar = schema_grammar(PERSON)
    request = ask("a", grammar)
    whole = answers(engine, [request]).ids["a"]
    for at in range(1, len(whole), 3):
        rest = Run(engine, Limits())
        rest.ids["a"] = whole[:at]
        rest.scheduler.resume(request, Resumed(tuple(whole[:at]), 0.0, "engine_lost"), 0.0)
        rest.steps()
        assert rest.ids["a"] == whole and rest.last["a"].finish is Finish.STOP


def test_what_has_been_computed_is_shared(engine: LocalEngine) -> None:
    """A grammar changes no KV: the second request finds the pages of the first."""
    run = answers(engine, [ask("a", None, 20)])
    request = replace(ask("a", schema_grammar(PERSON)), id="b")
    run.add([request]).steps()
    assert run.last["b"].summary and run.last["b"].summary.cached_tokens == 8


def test_log_probabilities_are_those_of_the_model(engine: LocalEngine) -> None:
    request = ask("a", Grammar("choice", '["yes"]'), sampling=replace(GREEDY, logprobs=2))
    run = Run(engine, Limits()).add([request])
    scores = []
    for _ in range(20):
        run.turn += 1
        batch = run.scheduler.schedule(run.turn / 100)
        if batch is None:
            break
        outputs = engine.step(batch)
        scores += [score for out in outputs for score in out.logprobs]
        run.scheduler.update(batch, outputs, run.turn / 100)
    engine.drop(run.scheduler.take_dropped())
    assert [score.token_id for score in scores] and all(len(score.top) == 2 for score in scores)
    assert any(score.token_id not in dict(score.top) for score in scores), "it did not want this"


@pytest.mark.parametrize("text", ["nonsense ::= (", "start: <no_such_token>"])
def test_one_that_cannot_be_followed_fails_alone(engine: LocalEngine, text: str) -> None:
    """The edge refuses these; an engine that gets one all the same goes on."""
    run = answers(engine, [ask("a", Grammar("grammar", text)), ask("b", None, 5)])
    assert run.last["a"].finish is Finish.ERROR and "grammar" in (run.last["a"].error or "")
    assert run.last["b"].finish is Finish.LENGTH


def test_choices_of_json_are_read_as_text(engine: LocalEngine, tokenizer: Tokenizer) -> None:
    words = [json.dumps({"a": i}) for i in range(50)]
    run = answers(engine, [ask("a", Grammar("choice", json.dumps(words)))])
    assert run.text(tokenizer, "a") in words
