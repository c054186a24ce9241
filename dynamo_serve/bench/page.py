"""Reports as one file of HTML that needs nothing else: no network, no framework, no fonts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from dynamo_serve.bench import compare_text, plot_effects, plots, text, timeline
from dynamo_serve.bench.compare import Comparison
from dynamo_serve.bench.figures import Repeats, summaries, unit
from dynamo_serve.bench.groups import Group
from dynamo_serve.bench.latency import SHARES
from dynamo_serve.bench.plot import Chart, figure
from dynamo_serve.bench.record import Run
from dynamo_serve.bench.repeats import grouped, label
from dynamo_serve.bench.spread import needed
from dynamo_serve.bench.summary import Summary, summary
from dynamo_serve.bench.words import NONE, count, facts, ms, number, percent, share

Rows = Iterable[Sequence[str]]


def html(*runs: Run) -> str:
    """The report on one run; on several, what they come to together, and then each."""
    if len(runs) == 1:
        found = summary(runs[0])
        return page("Bench report", text.head(found), _run(runs[0], found))
    groups = [(name, summaries(group)) for name, group in grouped(runs)]
    parts = []
    if len(groups) > 1:
        drawn = "".join(map(figure, plots.sweep([of for _, of in groups])))
        parts.append(f'<h2>Over the load</h2><div class="charts">{drawn}</div>')
    parts += [_repeats(name, of) for name, of in groups if len(of.summaries) > 1]
    for at, run in enumerate(runs, 1):
        name = escape(f"Run {at}: {label(run.about)}")
        parts.append(f"<details><summary>{name}</summary>{_run(run, summary(run))}</details>")
    return page("Bench report", f"{count(len(runs), 'run')}", "".join(parts))


def comparison(of: Comparison) -> str:
    """What `compare` found, and what A and B are."""
    body = _notes(of.notes)
    classes = [one.verdict if one.verdict in ("better", "worse") else "" for one in of.differences]
    body += _table(compare_text.HEAD, compare_text.rows(of), last=classes)
    body += "<p>p: paired t-test, adjusted after Benjamini and Hochberg for many figures.</p>"
    body += plot_effects.figure(of.differences, of.matters)
    if of.apart:
        body += "<h2>What differs</h2>" + _table(("what", "A", "B"), of.apart)
    for name, several in (("A", of.a), ("B", of.b)):
        body += f"<h2>{name}</h2>{_facts(several[0])}"
    lead = f"{of.pairs} pairs of runs; differences under {of.matters:.0%} do not matter"
    return page("B against A", lead, body)


def page(title: str, lead: str, body: str) -> str:
    top = f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
    return _document(title, top + body)


def _document(title: str, body: str) -> str:
    here = resources.files("dynamo_serve.bench")
    style, script = here.joinpath("report.css"), here.joinpath("report.js")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style.read_text()}</style></head><body>"
        f"{body}<script>{script.read_text()}</script></body></html>\n"
    )


def bare(chart: Chart) -> str:
    """One chart alone, for a picture of it."""
    return _document(chart.title, figure(chart))


def _run(run: Run, of: Summary) -> str:
    charts = "".join(map(figure, timeline.charts(run)))
    curves = "".join(map(figure, plots.distributions(run, of.is_open)))
    return "".join(
        (
            _notes(of.notes),
            _tiles(of),
            _section("Latency", _latencies(of)),
            _section("Targets", _targets(of)),
            f'<h2>Over time</h2><div class="charts">{charts}</div>',
            f'<h2>Distributions</h2><div class="charts">{curves}</div>',
            _section("Tenants", _groups(of.tenants, *text.tenant_rows(of))),
            _section("Classes", _groups(of.classes, *text.group_rows(of.classes, "class"))),
            _section("Kinds", _groups(of.kinds, *text.group_rows(of.kinds, "kind"))),
            _section("Errors", _errors(of)),
            _section("Settings, versions, machine", _facts(of)),
        )
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{lines}</ul>' if lines else ""


def _tiles(of: Summary) -> str:
    counts, rates, total = of.total.counts, of.total.rates, of.total
    bound = f"{percent(of.bound.fraction)} of the bandwidth" if of.bound else "bandwidth unknown"
    tiles = [
        (f"{counts.ok:,} of {counts.all:,}", "requests answered"),
        (
            f"{counts.refused:,} · {counts.failed:,} · {counts.cancelled:,}",
            "refused · failed · cancelled",
        ),
        (number(rates.requests if rates else None), "requests/s answered"),
        (number(rates.output_tokens if rates else None), f"output tokens/s; {bound}"),
        (number(rates.input_tokens if rates else None), "input tokens/s"),
        (f"{ms(total.ttft.value('p50'))} ms", "TTFT p50"),
        (f"{ms(total.itl.value('p50'))} ms", "ITL p50"),
        (percent(total.cached_share), "of prompt tokens were cached"),
    ]
    if rates and rates.good is not None:
        tiles.insert(3, (number(rates.good), "requests/s within all their targets"))
    if of.fairness.jain is not None:
        tiles.append((text.jain(of), f"Jain index of {of.fairness.basis} by weight"))
    drawn = (
        f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles
    )
    return f'<div class="tiles">{"".join(drawn)}</div>'


def _latencies(of: Summary) -> str:
    rows = [(name, getattr(of.total, key)) for name, key in text.LATENCIES]
    if of.probes:
        rows += [(f"probe {name}", getattr(of.probes, key)) for name, key in text.LATENCIES[:2]]
    if of.is_open and of.late.count:
        rows.append(("sent late", of.late))
    body = _table(("ms", "samples", "mean", *SHARES, "max"), [(n, *text.cells(d)) for n, d in rows])
    needs = ", ".join(f"{name} {needed(value):,}" for name, value in SHARES.items())
    note = f"<p>{NONE}: too few samples to know; needed: {needs}.</p>"
    told = f"<p>TTFT: {escape(text.both_sides(of.reconciled))}.</p>" if of.reconciled else ""
    return body + note + told


def _targets(of: Summary) -> str:
    rows = [
        (one.name or "(none)", name, share(found))
        for one in of.classes
        for name, found in one.attainment.items()
    ]
    return _table(("class", "target", "kept (95 % interval)"), rows)


def _groups(groups: Sequence[Group], head: Sequence[str], rows: Rows) -> str:
    """Nothing where all requests are in one that has no name."""
    return _table(head, rows) if any(one.name for one in groups) else ""


def _errors(of: Summary) -> str:
    return _table(("error", "times"), [(name, f"{n:,}") for name, n in of.errors.items()])


def _facts(of: Summary) -> str:
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in facts(of.about)
    )
    return f'<table class="facts">{rows}</table>' if rows else "<p>The run does not say.</p>"


def _repeats(name: str, of: Repeats) -> str:
    rows = [
        (figure_name, unit(figure_name), number(e.value), f"{number(e.low)} to {number(e.high)}")
        for figure_name, e in of.figures.items()
    ]
    table = _table(("figure", "unit", "mean", "95 % interval"), rows)
    title = f"{count(len(of.summaries), 'repeat')} of {name}"
    missing = f"Not known in every run: {', '.join(of.missing)}." if of.missing else ""
    return f"<h2>{escape(title)}</h2>{table}<p>{escape(missing)}</p>"


def _table(head: Sequence[str], rows: Rows, last: Sequence[str] = ()) -> str:
    """`last` are classes for the last cell of each row. Nothing where there are no rows."""
    lines = []
    for n, row in enumerate(rows):
        cells = [f"<td>{escape(cell)}</td>" for cell in row]
        if last and last[n]:
            cells[-1] = f'<td class="{last[n]}">{escape(row[-1])}</td>'
        lines.append(f"<tr>{''.join(cells)}</tr>")
    if not lines:
        return ""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><tr>{top}</tr>{"".join(lines)}</table></div>'
