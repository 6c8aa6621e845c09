"""One table model with three renderers: terminal and Markdown here, HTML in `report_template.html`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from um3.core.text import printable

MARKDOWN_ESCAPES = str.maketrans({sign: f"\\{sign}" for sign in "\\|[]`*_"} | {"<": "&lt;"})
OTHERS_WIDTH, VALUES_WIDTH = 96, 26  # characters off a terminal: of all other columns, and of each column of values


class Cell(NamedTuple):
    """A printed value, its 95 % interval if it has one, and the settings that a protocol's hash stands for."""

    value: str
    interval: str = ""
    settings: dict[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".rstrip()


class Row(NamedTuple):
    """A row of a table; a row without cells is the heading of the rows below it.

    `differs` says how the row's protocol differs from that of the row above it; such rows must not be compared.
    """

    name: str
    cells: Sequence[Cell] = ()
    note: str = ""
    key: str = ""
    differs: str = ""


@dataclass(frozen=True)
class Table:
    """A titled table. `columns` does not count the column of names; the first `num_values` columns hold the values.

    `note` stands beside the title. `missing` maps the key of a metric without a value to the reason.
    """

    title: str
    columns: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    note: str = ""
    num_values: int = 0
    missing: dict[str, str] = field(default_factory=dict)


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables that share their columns, aligned with each other."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

    def safe(text: object) -> str:
        return escape(printable(text))

    num_values = tables[0].num_values
    console = Console(width=None if Console().is_terminal else OTHERS_WIDTH + VALUES_WIDTH * num_values)
    grid = Grid(box=None, pad_edge=False, header_style="dim")
    grid.add_column("")
    for number, column in enumerate(tables[0].columns):
        grid.add_column(safe(column), justify="right", style="" if number < num_values else "dim")
    for table in tables:
        grid.add_row(f"[bold]{safe(table.title)}[/] [dim]{safe(table.note)}[/]")
        for row in table.rows:
            name = f"{'    ' if row.cells else '  '}{safe(row.name)}{' ≠' if row.differs else ''}"
            note = "" if row.cells or not row.note else f" [dim]{safe(row.note)}[/]"
            grid.add_row(name + note, *map(safe, row.cells))
    console.print(grid)


def markdown(table: Table) -> list[str]:
    """The lines of the table in Markdown, without its title."""
    rows = [["", *map(escaped, table.columns)], ["---", *["--:"] * len(table.columns)]] if table.rows else []
    for row in table.rows:
        name = f"{escaped(row.name)}{' ≠' if row.differs else ''}"
        cells = [code(str(cell)) if cell.settings else escaped(str(cell)) for cell in row.cells]
        if not cells:
            name = f"**{name}**{f' ({escaped(row.note)})' if row.note else ''}"
            cells = [""] * len(table.columns)
        rows.append([name, *cells])
    return [f"| {' | '.join(cells)} |" for cells in rows]


def escaped(text: str) -> str:
    """Untrusted text on one line of Markdown: it cannot add a cell, a line, a link or a tag."""
    return printable(" ".join(text.split())).translate(MARKDOWN_ESCAPES)


def code(text: object) -> str:
    """Untrusted text as one code span of Markdown."""
    return f"`{printable(text).replace('`', chr(39))}`"


def markdown_list(title: str, items: Mapping[Any, Any]) -> list[str]:
    """A section with an item per key: text is escaped, everything else is JSON; nothing for no items."""
    texts = [escaped(value) if isinstance(value, str) else code(json.dumps(value)) for value in items.values()]
    lines = [f"- {code(key)}: {text}" for key, text in zip(items, texts, strict=True)]
    return [f"## {title}", "", *lines, ""] if items else []
