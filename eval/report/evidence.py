"""`python -m eval evidence`: write docs/evidence.md, the paper's claims beside the tables of docs/results.md.

`claims.yaml` holds the claims and their criteria. The table of a claim stands in docs/results.md below the heading that
names its ablation (NAME=...), as `make ablation` prints it.
"""

import argparse
import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from eval.report.ablation_rows import Ablation
from eval.report.table import Table
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.core.files import write_text

CLAIMS = Path(__file__).with_name("claims.yaml")
HOLDS, FAILS, UNCLEAR, NOT_RUN = "holds", "does not hold", "cannot show at this scale", "not run yet"
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
VALUE = re.compile(rf"({NUMBER})[^±/|(]*(?:± ?({NUMBER}))?")
WIDTH = 100
HEAD = """# Evidence

Written by `make evidence` from the tables of [results](results.md) and the criteria in
`eval/report/claims.yaml`; do not edit it. A claim holds if every difference that it names is larger
than asked by more than its spread: the root of the sum of squares of the two standard deviations
over the seeds, or with one seed the noise that the criterion states (beside a value with seeds,
that value's deviation). It does not hold if a difference is smaller than asked by more than that;
between the two, this scale cannot show it.
Models and data are the demo's: what holds here holds for small models on scenes and digits. The
paper states many things; these thirteen are our choice.
"""


@dataclass
class Criterion:
    """In `column`, the value of row `over` minus that of row `under` is more than `by`."""

    column: str = ""
    over: str = ""
    under: str = ""
    by: float = 0.0
    spread: float = 0.0
    """Noise of the difference where the values have no standard deviation."""


@dataclass
class Claim:
    """A claim of the paper, its values there, the ablation that tests it, and the criteria.

    before: the criteria were written before the numbers. cannot: why no table here can show it, instead of criteria.
    """

    claim: str = ""
    paper: str = ""
    table: str = ""
    before: bool = False
    note: str = ""
    cannot: str = ""
    criteria: list[Criterion] = field(default_factory=list)

    def __post_init__(self) -> None:
        if bool(self.cannot) == bool(self.criteria):
            raise ValueError(f"claim '{self.claim}' needs criteria, or `cannot` with the reason why it has none")


@dataclass
class Claims:
    """The file of claims."""

    claims: list[Claim] = field(default_factory=list)


class Judged(NamedTuple):
    """The verdict on a claim or a criterion, and the values behind it in words."""

    verdict: str
    lines: list[str]


def main(arguments: Sequence[str]) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        "python -m eval evidence", description="Compare the paper's claims with our tables."
    )
    parser.add_argument("--results", default="docs/results.md", help="page with the tables")
    parser.add_argument("--tables", default="configs/ablations", help="folder of the ablations")
    parser.add_argument("--out", default="docs/evidence.md", help="page to write")
    options = parser.parse_args(arguments)
    results = Path(options.results)
    if not results.is_file():
        raise UserError(f"{results} does not exist; give the page with the tables as --results")
    tables, claims = read_tables(results.read_text(encoding="utf-8")), read_claims()
    names = sorted({claim.table for claim in claims})
    seeds = {name: load_config(Ablation, path=Path(options.tables, f"{name}.yaml")).seeds for name in names}
    judged = [judge(claim, tables.get(claim.table)) for claim in claims]
    write_text(options.out, page(claims, judged, seeds=seeds))
    counts = {verdict: [one.verdict for one in judged].count(verdict) for verdict in (HOLDS, FAILS, UNCLEAR, NOT_RUN)}
    print(f"{options.out}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def read_claims() -> list[Claim]:
    """The claims of the paper, in the order of the page."""
    return load_config(Claims, path=CLAIMS).claims


def read_tables(markdown: str) -> dict[str, dict[str, dict[str, str]]]:
    """The first table below each heading with NAME=...: ablation -> row -> column -> cell."""
    tables = {}
    for section in re.split(r"^(?=#)", markdown, flags=re.MULTILINE):
        name = re.match(r"#+ .*`NAME=(\w+)", section)
        if name and (lines := _first_table(section)):
            head, _, *rows = [[cell.strip().replace("\\", "") for cell in line] for line in lines]
            tables[name[1]] = {row[0]: dict(zip(head[1:], row[1:], strict=False)) for row in rows}
    return tables


def _first_table(section: str) -> list[list[str]]:
    """The cells of the lines of the first table; none without one."""
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), section.splitlines())
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [row.strip().removeprefix("|").removesuffix("|").split("|") for row in rows]


def cells_of(table: Table) -> dict[str, dict[str, str]]:
    """The same of a table that an ablation has made."""
    return {row.name: dict(zip(table.columns, map(str, row.cells), strict=True)) for row in table.rows}


def judge(claim: Claim, cells: Mapping[str, Mapping[str, str]] | None) -> Judged:
    """The verdict on a claim: that of its worst criterion."""
    if claim.cannot:
        return Judged(UNCLEAR, [claim.cannot])
    parts = [_judge(criterion, cells or {}) for criterion in claim.criteria]
    verdicts = {part.verdict for part in parts}
    worst = next(verdict for verdict in (NOT_RUN, FAILS, UNCLEAR, HOLDS) if verdict in verdicts)
    return Judged(worst, [line for part in parts for line in part.lines])


def _judge(criterion: Criterion, cells: Mapping[str, Mapping[str, str]]) -> Judged:
    shown = [cells.get(row, {}).get(criterion.column, "") for row in (criterion.over, criterion.under)]
    values = [_value(cell) for cell in shown]
    asked = f"more than {criterion.by:g} above" if criterion.by > 0 else "above"
    asked = f"less than {-criterion.by:g} below" if criterion.by < 0 else asked
    text = f"{criterion.column}: '{criterion.over}' {asked} '{criterion.under}'"
    if None in values:
        return Judged(NOT_RUN, [text])
    (over, over_spread), (under, under_spread) = (value for value in values if value)
    # A value of one seed gets the spread of the value beside it.
    spread = math.hypot(over_spread or under_spread, under_spread or over_spread) or criterion.spread
    difference = over - under - criterion.by
    verdict = UNCLEAR if abs(difference) <= spread else HOLDS if difference > 0 else FAILS
    ours = " against ".join(cell.partition(" (")[0] for cell in shown)
    return Judged(verdict, [f"{text}: {ours}, spread {spread:.3g}: {verdict}"])


def _value(cell: str) -> tuple[float, float] | None:
    """The mean and the standard deviation (0 without one) that a cell begins with."""
    found = VALUE.match(cell)
    return found and (_number(found[1]), _number(found[2] or "0"))


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def page(claims: Sequence[Claim], judged: Sequence[Judged], *, seeds: Mapping[str, int]) -> str:
    """The Markdown of the page."""
    numbered = list(enumerate(zip(claims, judged, strict=True), start=1))
    lines = [HEAD, "| | claim | verdict |", "|---|---|---|"]
    lines += [f"| {number} | {claim.claim} | {found.verdict} |" for number, (claim, found) in numbered]
    for number, (claim, found) in numbered:
        written, count = "before" if claim.before else "after", seeds[claim.table]
        items = [
            f"paper: {claim.paper}",
            *(f"here: {line}" for line in found.lines),
            *([claim.note] if claim.note else []),
        ]
        command = f"`make ablation NAME={claim.table}`, {count} seed{'s' * (count > 1)}"
        items.append(f"{command}; criteria written {written} the numbers")
        lines += ["", f"## {number}. {claim.claim}", "", f"**{found.verdict}**", ""]
        lines += [
            textwrap.fill(f"- {item}", WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
            for item in items
        ]
    return "\n".join(lines) + "\n"


def verdict_lines(name: str, table: Table) -> list[str]:
    """A line for every claim that the table of the ablation `name` can judge."""
    judged = [(claim, judge(claim, cells_of(table))) for claim in read_claims() if claim.table == name]
    return [f"{claim.claim}: {found.verdict}." for claim, found in judged if found.verdict != NOT_RUN]
