"""A small table of strings: the same numbers in the terminal and on the page of a run."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """`header` names the columns, each of `rows` has one string per column; the first column is the row's name.

    str(table) is aligned plain text: names to the left, values to the right. Raises ValueError for a ragged row.
    """
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"rows of table {self.title!r} must have {len(self.header)} cells, got {list(row)}")

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        text = ["  ".join(cell.rjust(width) if column else cell.ljust(width)
                          for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
                for line in lines]
        rule = "-" * (sum(widths) + 2 * max(0, len(widths) - 1))
        return "\n".join([self.title, text[0], rule, *text[1:]])


class Tables(tuple):
    """Several tables; str(tables) has one below the other."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))
