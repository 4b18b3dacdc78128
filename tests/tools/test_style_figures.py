"""The figures of a file that is counted by hand."""

import runpy
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "style_figures.py"))

TEXT = f'''"""A title."""

# A comment of its own.
double = lambda x: 2 * x  # a comment beside code


def first(rows):
    """Of the rows."""

    return sorted(rows, key=lambda row: row[0])[0]


class Row:
    """Holds one number."""

    number = "{"9" * 100}"
'''


def test_a_file_counted_by_hand(tmp_path, capsys):
    figures = TOOL["measure"](TEXT)
    # Not blank: title, comment, lambda, def with 2 more, class with 2 more. Code: 5 of these.
    assert (figures.lines, figures.code_lines, figures.longest_file) == (9, 5, 16)
    # double, its lambda, 2 * x, 2, x: 5. sorted(...)[0], sorted(...), sorted, rows, the other
    # lambda, row[0], row, 0 and 0: 9. number and its string: 2.
    assert figures.expressions == 16
    assert (figures.comment_lines, figures.named_lambdas, figures.long_lines) == (1, 1, 1)
    assert (figures.docstrings, figures.fragments) == (2, 1)
    assert figures.function_lengths == (4,)

    (tmp_path / "one.py").write_text(TEXT)
    (tmp_path / "two.py").write_text(TEXT)
    TOOL["main"]([str(tmp_path)])
    table = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert table["expressions per line of code"] == "3.20"
    assert table["named lambdas per 1000 lines"] == "111.11"


def test_a_folder_without_python_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="has no Python files"):
        TOOL["main"]([str(tmp_path)])
