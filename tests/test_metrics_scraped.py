"""Metrics of other servers on our page: whatever they say, the page stays one that can be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from dynamo_serve.metrics_scraped import mean_batches, read, written

PAGE = """\
# HELP nv_inference_count Number of inferences performed
# TYPE nv_inference_count counter
nv_inference_count{model="echo",version="1"} 12
nv_inference_count{model="idle",version="1"} 0
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{model="echo",version="1"} 5
nv_inference_exec_count{model="idle",version="1"} 0
# TYPE nv_latency summary
nv_latency_count{model="echo"} 3
nv_latency{model="echo",quantile="0.5"} NaN
nv_plain 1.5e-3 1700000000000
"""


def shown(page: bytes) -> set[str]:
    return {line for line in page.decode().splitlines() if not line.startswith("#")}


def test_samples_keep_their_names_and_say_whose_they_are() -> None:
    page = written({"a:1": read(PAGE), "b:1": read('nv_plain{x="\\"y"} 2')}, ())
    assert shown(page) == {
        'nv_inference_count{endpoint="a:1",model="echo",version="1"} 12',
        'nv_inference_count{endpoint="a:1",model="idle",version="1"} 0',
        'nv_inference_exec_count{endpoint="a:1",model="echo",version="1"} 5',
        'nv_inference_exec_count{endpoint="a:1",model="idle",version="1"} 0',
        'nv_latency_count{endpoint="a:1",model="echo"} 3',
        'nv_latency{endpoint="a:1",model="echo",quantile="0.5"} NaN',
        'nv_plain{endpoint="a:1"} 1.5e-3',
        'nv_plain{endpoint="b:1",x="\\"y"} 2',
    }
    assert page.count(b"# TYPE nv_plain untyped") == 1, "samples of a name stand together"


def test_what_is_ours_stays_ours_and_a_name_has_one_meaning() -> None:
    theirs = {
        "a:1": read("# TYPE both counter\nboth 1\nours 2"),
        "b:1": read("# TYPE both gauge\nboth 3"),
    }
    assert shown(written(theirs, {"ours"})) == {'both{endpoint="a:1"} 1'}


def test_a_label_of_the_same_name_is_kept_under_another() -> None:
    page = written({"a:1": read('x{endpoint="inner"} 1')}, ())
    assert shown(page) == {'x{endpoint="a:1",exported_endpoint="inner"} 1'}


def test_what_is_told_twice_is_shown_once() -> None:
    assert shown(written({"a:1": read('x{a="1"} 1\nx{a="1"} 2')}, ())) == {
        'x{endpoint="a:1",a="1"} 1'
    }


@pytest.mark.parametrize(
    "line",
    [
        "<html>",
        "x",
        "x y",
        'x{a="b} 1',
        'x{a="b"c="d"} 1',
        "x{9=1} 1",
        'x{a="1",a="2"} 3',
        'x{a="\\q"} 1',
        "9x 1",
        "x 1_000",
        'x{} 1 2 3{"',
        "é 1",
    ],
)
def test_a_page_with_a_line_that_is_none_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        read(f"fine 1\n{line}\n")


def test_the_mean_batch_is_by_model_and_only_of_models_that_ran() -> None:
    assert mean_batches(read(PAGE)) == {("echo", "1"): 12 / 5}
    assert mean_batches({}) == {}


@given(st.text(alphabet='ab_{}=",\\ 1.#\nHELPTYN', max_size=60))
def test_whatever_is_taken_can_be_read_by_others(text: str) -> None:
    try:
        page = read(text)
    except ValueError:
        return
    rendered = written({"a:1": page}, ()).decode()
    samples = [s for f in text_string_to_metric_families(rendered) for s in f.samples]
    assert all(sample.labels["endpoint"] == "a:1" for sample in samples)
