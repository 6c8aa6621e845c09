"""The growth benchmark measures every line and loader at a small size, and names how each cost grows."""

import json

import pytest

from benchmarks import growth
from benchmarks.growth import LINES, Point


@pytest.fixture
def few(monkeypatch):
    """Little made data, and one run of each call."""
    settings = {"synthetic.JPEGS": 8, "growth.IMAGE_BATCH": 4, "synthetic.DOCUMENTS": 4, "synthetic.SHARDS": 1}
    for name, value in (settings | {"growth.MEASURED_S": 0.01, "growth.STEADY_S": 0.0}).items():
        monkeypatch.setattr(f"benchmarks.{name}", value)


@pytest.mark.usefixtures("few")
def test_every_line_and_loader_is_measured(tmp_path, capsys):
    growth.main(["--small", "--out", str(tmp_path)])
    *table, numbers = capsys.readouterr().out.splitlines()
    measured = json.loads(numbers)
    assert {name: [size for size, _, _ in points] for name, points in measured["growth"].items()} == {
        name: list(line.small) for name, line in LINES.items()
    }
    assert all(cpu_s > 0 and mib >= 0 for points in measured["growth"].values() for _, cpu_s, mib in points)
    assert len(measured["delivered"]) == 3 and min(measured["delivered"].values()) > 0 and not measured["ratio"]
    assert all(sum(line.what in row for row in table) == 1 for line in LINES.values())
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "growth.json").read_text())["growth"] == measured["growth"]


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_loaders_are_compared_with_what_training_reads(tmp_path, capsys):
    small = ["--steps", "2", "--warmup", "1", "--images", "64", "--lines", "--out", str(tmp_path)]
    growth.main([*small, "loop.batch_size=16"])
    *table, numbers = capsys.readouterr().out.splitlines()
    measured = json.loads(numbers)
    for what in ("images", "tokens"):
        ratio = measured["delivered"][what] / measured["read_by_steps"][what]
        assert ratio == measured["ratio"][what] > 0
        assert any(row.startswith(f"| {what} |") and f"{ratio:.1f}x (goal 5x)" in row for row in table)
    assert not (tmp_path / "growth.png").exists()


def test_growth_is_named_by_the_exponent_of_the_largest_sizes():
    costs = [Point(1, 1.0, 0.0), Point(10, 1.1, 0.1), Point(100, 11.0, 0.2)]
    row = growth.growth_table({"shards": costs})[-1]
    assert "| 1 | 100 shards | 1 s to 11 s | linear (1.00) | 0.0 to 0.2 MiB | constant (0.00) |" in row
    verdicts = {0.1: "constant", 0.5: "less than linear", 1.1: "linear", 2.0: "worse than linear"}
    assert {power: growth.verdict(power).rpartition(" ")[0] for power in verdicts} == verdicts
    assert [growth.duration(seconds) for seconds in (2e-6, 0.0034, 12.345)] == ["2 us", "3.4 ms", "12.3 s"]
