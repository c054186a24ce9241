"""`dynamo-serve triton check`: ask every server, and show what can be asked of it."""

from __future__ import annotations

import asyncio

from dynamo_serve.config import TritonSection
from dynamo_serve.engines.triton_server.check import Report, check

DIFFERENT = "the servers' models declare different inputs or outputs: they cannot serve together"
TOLD = (("usage", "token counts"), ("finish_reason", "the finish reason"))


def run(settings: TritonSection) -> int:
    """0 if every server has answered, and all alike."""
    reports = asyncio.run(check(settings))
    for report in reports:
        print("\n".join(lines(report, settings.model)))
    declared = [report.spoken.declared for report in reports if report.spoken]
    is_mixed = any(each != declared[0] for each in declared)
    if is_mixed:
        print(DIFFERENT)
    return int(is_mixed or any(report.error for report in reports))


def lines(report: Report, model: str) -> list[str]:
    """What is said of a server."""
    if report.spoken is None:
        return [f"{report.address}: {report.error}"]
    dialect, declared = report.spoken.dialect, report.spoken.declared
    answer = report.error or f"a token in {1000 * report.seconds:.0f} ms"
    told = [name for what, name in TOLD if what not in dialect.infers]
    inferred = [name for what, name in TOLD if what in dialect.infers]
    return [
        f"{report.address}: model {model}, dialect {dialect.name}; {answer}",
        f"  inputs: {', '.join(declared.inputs)}",
        f"  told by the server: {', '.join(told) or 'nothing'}; "
        f"inferred here: {', '.join(inferred) or 'nothing'}",
        f"  priority levels: {declared.priority_levels or 'none'}",
        "  refused:",
        *(f"    {name}: {why}" for name, why in dialect.refused.items()),
    ]
