"""Prints figures of how Python code is written, one column for each path.

    python tools/style_figures.py moe_jax ../another/package

A path is a file or a folder, whose *.py files are taken together. What each row counts stands in
the docstring of the function that counts it.
"""

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

LONG = 100  # characters
# Words that begin a fragment, not a sentence: "Of one layer.", "What is received of a mesh".
FRAGMENTS = frozenset(("Of", "What", "As", "Where", "That", "Which", "Whose", "Whether"))
LAYOUT = frozenset(
    (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Figures(NamedTuple):
    """What one file, or all files of a path together, holds."""

    files: int
    lines: int  # all but blank ones
    code_lines: int
    expressions: int
    comment_lines: int
    named_lambdas: int
    long_lines: int
    docstrings: int  # of classes and functions: that of a module is a title
    fragments: int  # of these, the ones that begin with a word of FRAGMENTS
    function_lengths: tuple[int, ...]
    longest_file: int  # its lines, blank ones too


def measure(text: str) -> Figures:
    """Returns the figures of the text of one file."""
    tree = ast.parse(text)
    lines = text.splitlines()
    title = list(docstring_nodes(tree, ast.Module))
    docstrings = list(docstring_nodes(tree, ast.ClassDef, *FUNCTIONS))
    return Figures(
        files=1,
        lines=sum(bool(line.strip()) for line in lines),
        code_lines=count_code_lines(text, [*title, *docstrings]),
        expressions=count_expressions(tree) - len(title) - len(docstrings),
        comment_lines=sum(line.lstrip().startswith("#") for line in lines_with_comments(text)),
        named_lambdas=sum(map(names_a_lambda, ast.walk(tree))),
        long_lines=sum(len(line) > LONG for line in lines),
        docstrings=len(docstrings),
        fragments=sum(begins_with_fragment(str(node.value)) for node in docstrings),
        function_lengths=tuple(function_lengths(tree)),
        longest_file=len(lines),
    )


def docstring_nodes(tree: ast.AST, *kinds: type[ast.AST]) -> Iterator[ast.Constant]:
    """Yields the docstring of each node of a tree that is of one of the kinds and has one."""
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            statement = node.body[0]
            yield statement.value


def count_code_lines(text: str, docstrings: Iterable[ast.Constant]) -> int:
    """Returns the number of lines that are not blank, a comment or a part of a docstring."""
    occupied: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            occupied.update(range(token.start[0], token.end[0] + 1))
    for node in docstrings:
        assert node.end_lineno is not None
        occupied.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(occupied)


def lines_with_comments(text: str) -> list[str]:
    """Returns the lines at which a comment begins, whole: what precedes it shows whether the
    comment has the line for itself.
    """
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token.line for token in tokens if token.type == tokenize.COMMENT]


def count_expressions(tree: ast.AST) -> int:
    """Returns the number of `ast.expr` nodes: each name, constant, call, operation, subscript and
    so on counts as one, and so does a docstring.
    """
    return sum(isinstance(node, ast.expr) for node in ast.walk(tree))


def names_a_lambda(node: ast.AST) -> bool:
    """Returns whether a statement gives a name to a lambda: `f = lambda x: x`."""
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
        value = node.value
        values = value.elts if isinstance(value, ast.Tuple) else [value]
        return any(isinstance(part, ast.Lambda) for part in values)
    return False


def begins_with_fragment(docstring: str) -> bool:
    """Returns whether the first word of a docstring is one of FRAGMENTS."""
    words = docstring.split(maxsplit=1)
    return bool(words) and words[0].rstrip(",:") in FRAGMENTS


def function_lengths(tree: ast.AST) -> Iterator[int]:
    """Yields the lines of every function, from `def` to its end, docstring and all."""
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1


def together(parts: Iterable[Figures]) -> Figures:
    """Returns the figures of several files: their sums, and the longest of them."""
    columns = Figures(*zip(*parts, strict=True))
    sums = {
        name: sum(values)
        for name, values in columns._asdict().items()
        if name not in ("function_lengths", "longest_file")
    }
    return Figures(
        **sums,
        function_lengths=sum(columns.function_lengths, ()),
        longest_file=max(columns.longest_file),
    )


def of_path(path: Path) -> Figures:
    """Returns the figures of a file, or of all *.py files below a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    if not files:
        raise SystemExit(f"error: {path} has no Python files")
    return together(measure(file.read_text(encoding="utf-8")) for file in files)


def rows(figures: Figures) -> dict[str, str]:
    """Returns what is printed of one path: label -> number."""
    lengths = sorted(figures.function_lengths) or [0]
    return {
        "files": f"{figures.files}",
        "lines that are not blank": f"{figures.lines}",
        "lines of code": f"{figures.code_lines}",
        "expressions per line of code": f"{figures.expressions / max(figures.code_lines, 1):.2f}",
        "% of lines, a comment of their own": f"{100 * figures.comment_lines / figures.lines:.2f}",
        "named lambdas per 1000 lines": f"{1000 * figures.named_lambdas / figures.lines:.2f}",
        f"% of lines over {LONG} characters": f"{100 * figures.long_lines / figures.lines:.2f}",
        "docstrings of classes, functions": f"{figures.docstrings}",
        "of these, fragments": f"{figures.fragments}",
        "function length, median": f"{statistics.median(lengths):g}",
        "function length, 90th percentile": f"{lengths[int(0.9 * (len(lengths) - 1))]}",
        "longest file": f"{figures.longest_file}",
    }


def main(paths: list[str]) -> None:
    if not paths:
        raise SystemExit("usage: python tools/style_figures.py PATH ...")
    columns = [rows(of_path(Path(path))) for path in paths]
    widths = [max(len(path), 8) for path in paths]
    print(" " * 34, *(path.rjust(width) for path, width in zip(paths, widths, strict=True)))
    for label in columns[0]:
        cells = (column[label].rjust(width) for column, width in zip(columns, widths, strict=True))
        print(label.ljust(34), *cells)


if __name__ == "__main__":
    main(sys.argv[1:])
