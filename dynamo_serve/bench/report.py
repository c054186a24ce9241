"""The face of the reports: figures, words, pages and comparisons of runs."""

from __future__ import annotations

from dynamo_serve.bench.compare import Comparison, Difference, compare, interleave, turns
from dynamo_serve.bench.figures import Repeats, figures, summaries
from dynamo_serve.bench.page import html
from dynamo_serve.bench.summary import Summary, summary
from dynamo_serve.bench.text import line, text

__all__ = [
    "Comparison",
    "Difference",
    "Repeats",
    "Summary",
    "compare",
    "figures",
    "html",
    "interleave",
    "line",
    "summaries",
    "summary",
    "text",
    "turns",
]
