"""Reading the package's source, for the tests beside this file."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dynamo_serve"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def modules() -> Iterator[Path]:
    """Every Python file of the package."""
    yield from sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """dynamo_serve/core/loop.py → dynamo_serve.core.loop"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file, also for types only.

    `from a import b` counts as `a.b` if that is a module of this package, else as `a`.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _base(path, node)
            found |= {_module(base, alias.name) for alias in node.names}
    return found


def _base(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        assert node.module is not None
        return node.module
    package = path.parent.relative_to(ROOT).parts
    above = package[: len(package) - node.level + 1]
    return ".".join((*above, *([node.module] if node.module else [])))


def _module(base: str, name: str) -> str:
    inner = ROOT.joinpath(*base.split("."), name)
    is_module = inner.with_suffix(".py").is_file() or (inner / "__init__.py").is_file()
    return f"{base}.{name}" if is_module else base


class Function(NamedTuple):
    name: str
    num_lines: int


def functions(path: Path) -> Iterator[Function]:
    """Every function with its length.

    Not counted: its docstring, which is for the caller, and functions inside it, which are
    counted on their own.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, FUNCTIONS):
            yield Function(f"{dotted(path)}.{node.name}", len(_own_lines(node)))


def _own_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[int]:
    inner = [
        node
        for child in ast.iter_child_nodes(function)
        for node in ast.walk(child)
        if isinstance(node, FUNCTIONS)
    ]
    lines = _lines(function) - _docstring_lines(function)
    return lines.difference(*map(_lines, inner))


def _lines(node: ast.stmt) -> set[int]:
    decorators = getattr(node, "decorator_list", [])
    assert node.end_lineno is not None
    return set(range(min(n.lineno for n in (node, *decorators)), node.end_lineno + 1))


def num_code_lines(path: Path) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    text = path.read_text()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*skipped, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - _docstring_lines(ast.parse(text)))


def _docstring_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node) is not None:
            first = node.body[0]
            assert first.end_lineno is not None
            lines.update(range(first.lineno, first.end_lineno + 1))
    return lines
