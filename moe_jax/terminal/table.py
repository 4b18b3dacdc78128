"""Tables that fit where they are printed: no number is cut or folded, whatever the width.

A table that is too wide gives way in this order:

1. headers break between words, and so does prose;
2. the table becomes several, one below the other, each with the columns that name its rows;
3. a name that would take more than half of the width is folded.

A `Table` is printed by a rich Console, alone or in a group with others, and as Markdown.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich import box
from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

# Columns of the terminal between two columns of a table.
GAP = 2
# A column of prose is made no narrower than this before the table is split.
PROSE = 24


class Column(NamedTuple):
    """A column of a table."""

    name: str
    # "number" stays on one line, to the right; "name" is folded only in need; "prose" breaks
    # between words.
    kind: str


def names(*columns: str) -> list[Column]:
    return [Column(name, "name") for name in columns]


def numbers(*columns: str) -> list[Column]:
    return [Column(name, "number") for name in columns]


def prose(*columns: str) -> list[Column]:
    return [Column(name, "prose") for name in columns]


class Row(NamedTuple):
    """A row of a table."""

    # A str is shown as it is: what looks like markup in it is none.
    cells: tuple[str | Text, ...]
    style: str
    # With a line below it.
    ends: bool = False


class Table:
    """Rows of cells under named columns.

    Args:
      columns: made by `names`, `numbers` and `prose`.
      title: printed above the table, broken between words.
      keys: how many columns at the left name a row; each part of a table that is split has them.
    """

    def __init__(self, columns: Sequence[Column], *, title: str = "", keys: int = 1):
        self.columns, self.title, self.keys = list(columns), title, keys
        self.rows: list[Row] = []

    def add(self, *cells: str | Text, style: str = "") -> None:
        """Adds a row; cells that are missing at its end are empty."""
        empty = ("",) * (len(self.columns) - len(cells))
        self.rows.append(Row(cells + empty, style))

    def section(self) -> None:
        """Ends the rows so far with a line."""
        self.rows[-1:] = [row._replace(ends=True) for row in self.rows[-1:]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        if self.title:
            yield Text(self.title, style="bold")
        for number, part in enumerate(self._parts(options.max_width)):
            if number:
                yield ""
            yield self._drawn(part, options.max_width)

    def markdown(self) -> str:
        """Returns the rows as a Markdown table, without the title."""
        marks = ["---:" if column.kind == "number" else "---" for column in self.columns]
        lines = [f"| {' | '.join(column.name for column in self.columns)} |"]
        lines.append(f"|{'|'.join(marks)}|")
        for row in self.rows:
            cells = [_plain(cell) for cell in row.cells]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def _parts(self, width: int) -> list[list[int]]:
        """Returns the numbers of the columns of each part: as few parts as fit, and about equally
        wide.
        """
        least = self._least_widths(width)
        keys, others = list(range(self.keys)), list(range(self.keys, len(self.columns)))
        room = width - sum(least[i] + GAP for i in keys)

        def packed(room: int) -> list[list[int]]:
            """Returns parts no wider than `room`: each takes columns as long as they fit."""
            parts: list[list[int]] = [[]]
            used = 0
            for i in others:
                if parts[-1] and used + least[i] > room:
                    parts.append([])
                    used = 0
                parts[-1].append(i)
                used += least[i] + GAP
            return parts

        # The narrowest room that takes no more parts: the last part is then not much shorter than
        # the others.
        num_parts = len(packed(room))
        narrowest = next((limit for limit in range(room) if len(packed(limit)) == num_parts), room)
        return [keys + part for part in packed(narrowest)]

    def _drawn(self, part: list[int], width: int) -> rich_table.Table:
        widths = self._widths(part, width)
        drawn = rich_table.Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0)
        )
        for i in part:
            justify: Any = "right" if self.columns[i].kind == "number" else "left"
            header = Text(self.columns[i].name)
            drawn.add_column(header, justify=justify, width=widths[i], overflow="fold")
        for row in self.rows:
            cells = [_text(row.cells[i]) for i in part]
            drawn.add_row(*cells, style=row.style or None, end_section=row.ends)
        return drawn

    def _widths(self, part: list[int], width: int) -> dict[int, int]:
        """Returns the least widths, with the rest dealt out to columns that want more."""
        least = self._least_widths(width)
        widths = {i: least[i] for i in part}
        left = width - sum(widths.values()) - GAP * (len(part) - 1)
        # One by one, so that all of them grow alike.
        wanting = [i for i in part if widths[i] < self._natural_width(i)]
        while left > 0 and wanting:
            growing = wanting[:left]
            for i in growing:
                widths[i] += 1
            left -= len(growing)
            wanting = [i for i in wanting if widths[i] < self._natural_width(i)]
        return widths

    def _least_widths(self, width: int) -> list[int]:
        """Returns how narrow each column may become on a terminal of this width."""
        cell_widths = [self._cell_width(i) for i in range(len(self.columns))]
        key_widths = cell_widths[: self.keys]
        number_widths = [
            cell_widths[i] for i, column in enumerate(self.columns) if column.kind == "number"
        ]
        # What names a row leaves room for the widest number beside it, and takes no more than half
        # of the width.
        widest = max(number_widths, default=PROSE)
        key_room = max(GAP * self.keys, min(width // 2, width - widest - GAP))
        key_most = _cap(key_widths, key_room)
        other_most = max(1, width - sum(min(n, key_most) + GAP for n in key_widths))
        least = []
        for i, column in enumerate(self.columns):
            most = key_most if i < self.keys else other_most
            heading = min(_longest_word(column.name), most)
            if column.kind == "number":
                least.append(max(cell_widths[i], heading))
            elif column.kind == "name":
                least.append(max(min(cell_widths[i], most), heading))
            else:
                words = max((_longest_word(_plain(row.cells[i])) for row in self.rows), default=0)
                least.append(min(self._natural_width(i), max(PROSE, words, heading), most))
        return least

    def _cell_width(self, i: int) -> int:
        return max((_width(row.cells[i]) for row in self.rows), default=0)

    def _natural_width(self, i: int) -> int:
        """Returns the width at which nothing in a column breaks."""
        return max(cell_len(self.columns[i].name), self._cell_width(i))


def _cap(widths: Sequence[int], room: int) -> int:
    """Returns the largest width that all columns can be cut to so that they and the gaps behind
    them fit; at least 1.
    """
    for cap in range(max(widths, default=1), 1, -1):
        if sum(min(width, cap) + GAP for width in widths) <= room:
            return cap
    return 1


def _plain(cell: str | Text) -> str:
    return cell.plain if isinstance(cell, Text) else cell


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _width(cell: str | Text) -> int:
    # In columns of the terminal: some characters take two.
    return max(map(cell_len, _plain(cell).split("\n")))


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)
