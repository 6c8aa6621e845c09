"""The page of evidence: its tables are found, its verdicts follow from numbers, and it is up to date."""

import pytest

from eval.report.ablation_rows import Ablation
from eval.report.evidence import (
    Claim,
    Claims,
    Criterion,
    cells_of,
    judge,
    main,
    read_claims,
    read_tables,
    verdict_lines,
)
from eval.report.table import Cell, Row, Table
from tests.helpers.processes import ROOT
from um3.core.config import load_config
from um3.core.errors import UserError

PAGE = """
## First (`NAME=one`)

| | speed, m/s | heat |
|---|---|---|
| a \\*b\\* | 1,000.5 ± 2.0 (paper 3) | the same |
| c | -3 % | 0.2 / 7 ± 1 |

| | other |
|---|---|
| a | 1 |

## Second
| | x |
|---|---|
"""


def test_the_first_table_of_a_section_that_names_its_ablation_is_read():
    tables = read_tables(PAGE)
    assert tables == {
        "one": {
            "a *b*": {"speed, m/s": "1,000.5 ± 2.0 (paper 3)", "heat": "the same"},
            "c": {"speed, m/s": "-3 %", "heat": "0.2 / 7 ± 1"},
        }
    }


def verdict(over, under, *, by=0.0, spread=0.0):
    cells = {"a": {"x": over}, "b": {"x": under}}
    claim = Claim("c", criteria=[Criterion("x", over="a", under="b", by=by, spread=spread)])
    return judge(claim, cells).verdict


@pytest.mark.parametrize(
    ("over", "under", "options", "expected"),
    [
        ("5 ± 1", "2 ± 1", {}, "holds"),
        ("5 ± 3", "2 ± 1", {}, "cannot show at this scale"),
        ("2 ± 1", "5 ± 1", {}, "does not hold"),
        ("4 ± 0.1", "5 ± 0.1", {"by": -2}, "holds"),
        ("6 ± 0.1", "5 ± 0.1", {"by": 2}, "does not hold"),
        ("6", "5", {"spread": 2}, "cannot show at this scale"),
        ("6 ± 1.2", "5", {"spread": 0.1}, "cannot show at this scale"),  # the spread of the other value
        ("1,006 dB (paper 2)", "5 dB", {"spread": 2}, "holds"),
        ("0.00232 ± 8.3e-05", "0.00132 ± 7e-05", {}, "holds"),
        ("–", "5", {}, "not run yet"),
        ("the same", "5", {}, "not run yet"),
    ],
)
def test_a_verdict_compares_a_difference_with_its_spread(over, under, options, expected):
    assert verdict(over, under, **options) == expected


def test_the_worst_criterion_decides_and_a_missing_table_is_not_run():
    criteria = [Criterion("x", over="a", under="b"), Criterion("x", over="b", under="a")]
    cells = {"a": {"x": "2"}, "b": {"x": "1"}}
    assert judge(Claim("c", criteria=criteria), cells).verdict == "does not hold"
    assert judge(Claim("c", criteria=criteria), None).verdict == "not run yet"
    assert judge(Claim("c", cannot="no data"), cells) == ("cannot show at this scale", ["no data"])


def test_there_are_thirteen_claims_whose_rows_and_columns_exist():
    claims, tables = read_claims(), read_tables((ROOT / "docs/results.md").read_text())
    assert len(claims) == 13
    for claim in claims:
        ablation = load_config(Ablation, path=ROOT / f"configs/ablations/{claim.table}.yaml")
        for criterion in claim.criteria:
            if {criterion.over, criterion.under} <= tables.get(claim.table, {}).keys():
                assert judge(claim, tables[claim.table]).verdict != "not run yet", claim.claim
            else:
                assert criterion.column in ablation.columns.values(), criterion
                assert {criterion.over, criterion.under} <= {row.name for row in ablation.rows}, criterion


def test_the_table_of_an_ablation_has_its_verdicts():
    rows = {"layer -2": "60.0 ± 1.0", "layer -1": "50.0 ± 1.0 (paper 5)", "layer -1 after the quantizer": "55.0 ± 1.0"}
    table = Table("t", ["all questions"], [Row(name, [Cell(*text.split(" (", 1))]) for name, text in rows.items()])
    assert cells_of(table)["layer -2"] == {"all questions": "60.0 ± 1.0"}
    (line,) = verdict_lines("llava_layers", table)
    assert line.endswith("does not hold.") and "second-last" in line
    assert verdict_lines("softmax", table) == []


def test_the_page_is_up_to_date(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    main(["--out", str(tmp_path / "evidence.md")])
    assert (tmp_path / "evidence.md").read_text() == (ROOT / "docs/evidence.md").read_text()
    assert "holds" in capsys.readouterr().out
    with pytest.raises(UserError, match="--results"):
        main(["--results", str(tmp_path / "nowhere.md")])


def test_a_claim_without_criteria_needs_a_reason(tmp_path):
    (tmp_path / "claims.yaml").write_text("claims: [{claim: c, table: weights}]")
    with pytest.raises(UserError, match="claim 'c' needs criteria"):
        load_config(Claims, path=tmp_path / "claims.yaml")
