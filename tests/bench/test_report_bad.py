"""Whatever a run is, its report is made, and says nothing that is not known."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_serve.bench import compare_text, page, several
from dynamo_serve.bench.compare import compare
from dynamo_serve.bench.record import Record, Run, Sample
from dynamo_serve.bench.summary import summary
from dynamo_serve.bench.text import line, text
from tests.bench.test_report_page import whole

ANY = st.floats() | st.integers(-5, 10**6)
TIME = st.floats(0, 100) | ANY
NAMES = st.sampled_from(["", "a", "b", '<b>&"'])
TARGETS = st.dictionaries(st.sampled_from(["ttft", "itl", "tpot", "e2e", "odd"]), TIME, max_size=2)
RECORDS = st.builds(
    Record,
    number=st.integers(0, 5),
    due=TIME,
    sent=TIME,
    outcome=st.sampled_from(["ok", "refused", "failed", "cancelled", "odd"]),
    kind=st.sampled_from(["", "chat", "probe"]),
    tenant=NAMES,
    class_name=NAMES,
    prompt_tokens=st.integers(-1, 10**5),
    output_tokens=st.integers(-1, 10**5),
    cached_tokens=st.integers(-1, 10**5),
    first=st.none() | TIME,
    end=st.none() | TIME,
    gaps=st.lists(TIME, max_size=4).map(tuple),
    error=NAMES,
    is_warm_up=st.booleans(),
    attempts=st.integers(0, 3),
    targets=TARGETS,
    server=st.dictionaries(st.just("ttft"), TIME, max_size=1),
)
METRICS = st.sampled_from(
    [
        "dserve_sequences_live",
        'dserve_pages{state="used"}',
        'dserve_pages{state="cached"}',
        'dserve_batch_tokens_sum{phase="prefill"}',
        'dserve_ttft_seconds_bucket{le="0.1"}',
        'dserve_ttft_seconds_bucket{le="+Inf"}',
        'dserve_ttft_seconds_bucket{le="much"}',
        "dserve_ttft_seconds_count",
        "dserve_ttft_seconds_sum",
        'dserve_tenant_device_seconds_total{tenant="a"}',
        "dserve_prefix_asked_tokens_total",
        "dserve_prefix_hit_tokens_total",
    ]
)
SAMPLES = st.builds(Sample, at=TIME, values=st.dictionaries(METRICS, ANY, max_size=6))
ABOUT: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "loop": st.sampled_from(["open", "closed", "odd"]),
        "weights": st.just({"a": 0, "b": "x"}) | st.just([]) | st.just({"a": 3}),
        "bytes_per_step": ANY,
        "bandwidth": ANY,
        "client": st.just({"warning": "slow"}) | st.just("odd"),
        "settings": st.just({"a": {"b": [1, math.nan]}}),
        "began_at": ANY,
    },
)
RUNS = st.builds(
    Run,
    about=ABOUT,
    seconds=TIME,
    records=st.lists(RECORDS, max_size=8),
    samples=st.lists(SAMPLES, max_size=4),
)


def strictly(told: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert "\n" not in told
    return json.loads(told, parse_constant=refuse)


def is_honest(words: str) -> bool:
    found = words.lower().replace("infinity", "inf").split()
    return not {"nan", "inf", "-inf", "none"} & set(found)


@settings(max_examples=150, deadline=None)
@given(RUNS)
def test_a_report_of_any_run_is_made(run: Run) -> None:
    found = summary(run)
    assert is_honest(text(found))
    strictly(line(found))
    whole(page.html(run))


@settings(max_examples=40, deadline=None)
@given(st.lists(RUNS, min_size=1, max_size=4), st.lists(RUNS, min_size=4, max_size=4))
def test_so_it_is_of_several_and_of_two_compared(a: list[Run], b: list[Run]) -> None:
    assert is_honest(several.text(a))
    strictly(several.line(a))
    whole(page.html(*a))
    found = compare(a, b[: len(a)])
    assert is_honest(compare_text.text(found))
    strictly(compare_text.line(found))
    whole(page.comparison(found))


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "No requests were measured."),
        ([Record(0, 0, 0, is_warm_up=True)], "No requests were measured."),
        (
            [Record(n, 0, 0, "refused", 429, end=0.1) for n in range(3)],
            "Every request was refused: there are no latencies.",
        ),
        ([Record(0, 0, 0, "failed", 500, end=1)], "No request got a token"),
        ([Record(0, 5.0, 1.0), Record(1, math.nan, 0)], "2 records were left out"),
    ],
)
def test_where_there_is_nothing_to_report_it_says_why(records: list[Record], words: str) -> None:
    assert words in text(summary(Run({"loop": "open"}, 1.0, records)))


def test_one_request_has_a_mean_and_a_greatest_but_no_percentile() -> None:
    one = Record(0, 0, 0, first=0.25, end=1.0, output_tokens=2, gaps=(0.75,))
    words = text(summary(Run({"loop": "open"}, 1.0, [one])))
    row = next(row.split() for row in words.splitlines() if row.startswith("TTFT"))
    assert row == ["TTFT", "1", "250", "–", "–", "–", "–", "–", "250"]


def test_a_run_without_time_has_no_figures_per_second() -> None:
    found = summary(Run({"loop": "open"}, 0.0, [Record(0, 0, 0, first=0.1, end=0.2)]))
    assert found.total.rates is None
    assert "The run measured no time" in text(found)
