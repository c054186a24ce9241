"""Pages are whole HTML that asks nobody for anything, and their charts say what is in the run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from dynamo_serve.bench import page, plot_effects, plots, timeline
from dynamo_serve.bench.compare import compare
from dynamo_serve.bench.figures import summaries
from dynamo_serve.bench.plot import Chart, Line, figure, stacked, ticks
from dynamo_serve.bench.record import Record, Run, Sample
from dynamo_serve.bench.summary import summary
from tests.bench.synthetic import made_run

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Checked(HTMLParser):
    """Knows whether all tags were closed in order, and what the page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.asks: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asks += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def whole(text: str) -> Checked:
    found = Checked(text)
    assert found.open == []
    assert found.asks == []
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<script>.*?</script>", "", text))
    return found


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_report_is_whole_and_asks_nobody(number: int) -> None:
    runs = [made_run(seconds=20, seed=seed, rate=4 * seed) for seed in range(1, number + 1)]
    found = whole(page.html(*(runs or [Run({}, 0.0, [])])))
    assert ("polyline" in found.tags) is bool(number)


def test_a_comparison_is_whole_too() -> None:
    runs = [made_run(seconds=20, seed=seed) for seed in range(3)]
    assert "no difference that matters" in page.comparison(compare(runs, runs))
    whole(page.comparison(compare(runs, runs)))


def test_differences_are_drawn_about_the_middle() -> None:
    runs = [made_run(seconds=20, seed=seed) for seed in range(3)]
    slower = [made_run(seconds=20, seed=seed, step_ms=24) for seed in range(3)]
    drawn = plot_effects.figure(compare(runs, slower).differences, 0.05)
    places = dict(re.findall(r">(\w+)</text>(?:<line[^>]*>)?<circle [^>]*cx=\"([\d.]+)\"", drawn))
    middle = (plot_effects.LEFT + plot_effects.WIDTH - plot_effects.RIGHT) / 2
    assert float(places["itl_mean_ms"]) > middle + 100
    assert float(places["requests_per_s"]) == middle
    assert plot_effects.figure([], 0.05) == ""


def test_names_of_others_are_text_and_never_markup() -> None:
    evil = '</script><script>alert("x")</script>'
    records = [
        Record(0, 0, 0, first=0.1, end=0.2, tenant=evil, class_name=evil, kind=evil, error=evil)
    ]
    samples = [Sample(at, {f'dserve_batch_tokens_sum{{phase="{evil}"}}': at}) for at in (0, 1, 2)]
    text = page.html(Run({"model": evil}, 1.0, records, samples))
    assert "<script>alert" not in text
    whole(text)


def test_axes_start_at_zero_and_have_round_numbers() -> None:
    assert ticks(9.3) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.021) == pytest.approx([0, 0.005, 0.01, 0.015, 0.02, 0.025])
    assert ticks(1200) == [0, 250, 500, 750, 1000, 1250]
    assert ticks(0) == [0, 1]
    for high in (0.001, 0.7, 3, 99, 100, 101, 12345):
        assert ticks(high)[0] == 0 and ticks(high)[-1] >= high * (1 - 1e-9)


def test_stacked_areas_add_up() -> None:
    lines = [Line("a", [(0, 1), (1, 2)]), Line("b", [(0, 3), (1, 0)])]
    assert stacked(lines) == [[(0, 1), (1, 2)], [(0, 4), (1, 2)]]


def test_a_chart_without_data_says_so() -> None:
    assert "No data in this run" in figure(Chart("Empty", "x", "y", [Line("a", [])]))


def test_the_readout_has_the_values_of_every_line() -> None:
    drawn = figure(Chart("A chart", "x", "y", [Line("a", [(0, 1), (2, 3)]), Line("b", [(1, 1)])]))
    told = re.search(r'<script type="application/json">(.*?)</script>', drawn)
    assert told is not None
    assert json.loads(told[1])["lines"] == [
        {"name": "a", "points": [[0, 1], [2, 3]]},
        {"name": "b", "points": [[1, 1]]},
    ]


def test_throughput_over_time_has_every_token_once() -> None:
    run = made_run(seconds=30)
    output = timeline.charts(run)[0].lines[0]
    assert output.name == "output"
    tokens = sum(record.output_tokens for record in run.records)
    assert sum(y for _, y in output.points) == pytest.approx(tokens)  # intervals of a second


def test_choices_of_one_call_are_not_one_after_the_other_in_time() -> None:
    gaps = (1.0,) * 8  # four of each choice, at the same time
    record = Record(0, 0.0, 0.0, output_tokens=10, first=1.0, gaps=gaps, choices=2, end=5.0)
    (output, _) = timeline.charts(Run({}, 5.0, [record]))[0].lines
    assert max(at for at, y in output.points if y) == 5.5, "the second in which it ended"
    assert sum(y for _, y in output.points) == pytest.approx(10)


def test_pages_over_time_are_those_of_the_pool() -> None:
    chart = timeline.charts(made_run(seconds=30))[3]
    assert [line.name for line in chart.lines] == ["used", "cached", "free"]
    assert {round(y) for _, y in stacked(chart.lines)[-1]} == {4096}


def test_distributions_mark_p50_and_p99_where_they_are_known() -> None:
    few = plots.distribution("TTFT", [n / 1000 for n in range(101)])
    assert [mark.text for mark in few.marks] == ["p50 50 ms"]
    many = plots.distribution("TTFT", [n / 1000 for n in range(1001)])
    assert [mark.text for mark in many.marks] == ["p50 500 ms", "p99 990 ms"]


def test_a_straggler_does_not_squeeze_the_others_and_is_told_of() -> None:
    chart = plots.distribution("TTFT", [0.1] * 999 + [60.0])
    assert chart.x_high == pytest.approx(125)
    assert "1 beyond the edge, the greatest 60,000 ms" in chart.note


def test_a_sweep_has_a_point_for_each_load_with_the_interval_of_its_repeats() -> None:
    points = [
        summaries([made_run(rate=rate, seconds=60, seed=seed) for seed in (1, 2)])
        for rate in (4.0, 16.0)
    ]
    charts = plots.sweep(points)
    (p50, *_) = charts[0].lines
    assert p50.name == "TTFT p50" and len(p50.points) == 2
    assert p50.points[0][1] < p50.points[1][1]
    assert all(bar is not None for bar in p50.bars)
    assert [mark.text.split()[0] for mark in charts[-1].marks] == ["load", "load"]


def test_the_load_of_a_closed_loop_is_how_many_were_in_flight() -> None:
    records = [Record(n, 0, float(n), first=n + 0.5, end=n + 3.0) for n in range(10)]
    assert plots.load(summary(Run({"loop": "closed"}, 10.0, records))) == pytest.approx(3.0)
