"""Score rows: their file, their protocol hash, their format, and bootstrap intervals."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from eval.scores import Measurement, Score, bootstrap, bootstrap_groups, read_scores, write_scores
from um3.core.errors import UserError


def score(**changes):
    fields = {"task": "t", "metric": "acc", "value": 0.25, "n": 8, "seed": 1, "protocol": {"batch": 4}}
    return Score(**(fields | changes))


def test_round_trip_keeps_every_field(tmp_path):
    rows = [score(), score(metric="psnr", value=24.5, unit="dB", paper=23.16, skipped=2, note="why", version="2")]
    rows.append(score(metric="ssim", low=0.2, high=0.3))
    write_scores(tmp_path / "a.json", rows, samples=[{"x": 1}], seconds=2.5)
    assert read_scores(tmp_path / "a.json") == rows
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["samples"] == [{"x": 1}] and content["seconds"] == 2.5
    assert content["scores"][0]["commit"] and content["scores"][0]["protocol_hash"] == rows[0].protocol_hash


def test_protocol_hash_changes_with_protocol_and_version_only():
    assert score().protocol_hash == score(value=0.5, n=9, seed=2).protocol_hash
    assert score().protocol_hash != score(protocol={"batch": 5}).protocol_hash
    assert score().protocol_hash != score(version="2").protocol_hash
    assert score(protocol={"a": 1, "b": 2}).protocol_hash == score(protocol={"b": 2, "a": 1}).protocol_hash


def test_a_row_without_a_value():
    row = Measurement("t", 0).missing("fid", note="no weights", paper=44.1)
    assert row.value is None and row.paper == 44.1 and row.shown() == "–"


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"value": None}, "note"), ({"value": math.nan}, "not finite"), ({"value": math.inf}, "not finite")]
    + [({"low": low, "high": high}, "interval") for low, high in ((0.1, None), (None, 0.1), (0.3, 0.2), (0, math.inf))],
)
def test_rows_that_are_not_finite_or_not_complete_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        score(**fields)


def test_two_rows_with_one_key_are_refused(tmp_path):
    with pytest.raises(ValueError, match="t/acc"):
        write_scores(tmp_path / "a.json", [score(), score(value=0.3)])
    assert not list(tmp_path.iterdir())


def test_shown_follows_the_unit():
    assert score(unit="%").shown() == "25.0 %"
    assert score(value=24.456, unit="dB").shown() == "24.46 dB"
    assert score(unit="x100", value=0.0864).shown() == "8.6"
    assert score(value=0.31249).shown() == "0.312"
    assert score(value=0.004123).shown() == "0.00412" and score(value=123456.7).shown() == "123,457"
    assert score(value=120.5).shown(44.1) == "44.10"
    assert score(unit="%", low=0.0, high=0.3012).shown_interval() == "[0.0, 30.1]"
    assert score(value=24.4, unit="dB", low=24, high=25).shown_interval() == "[24.00, 25.00]"
    assert score(unit="x100", low=0.05, high=0.07).shown_interval() == "[5.0, 7.0]" and score().shown_interval() == ""


def test_another_file_is_a_one_line_error(tmp_path):
    (tmp_path / "a.json").write_text('{"scores": [{"task": 1}]}')
    with pytest.raises(UserError, match=r"a\.json"):
        read_scores(tmp_path / "a.json")


def test_weights_give_the_mean_per_byte():
    bits, lengths = [10.0, 400.0, 30.0, 260.0], [10, 100, 20, 80]
    low, high = bootstrap(bits, weights=lengths)
    assert 1 <= low <= sum(bits) / sum(lengths) <= high <= 4
    assert bootstrap([2.0, 6.0], weights=[1, 3]) == (None, None), "both have two bits per byte"
    with pytest.raises(ValueError, match="2 values and 1 weights"):
        bootstrap([1.0, 2.0], weights=[1])


@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_interval_is_scipys(is_weighted):
    values, lengths = np.random.default_rng(1).random((2, 300))
    weights = lengths if is_weighted else np.ones(300)
    options = {"paired": True, "n_resamples": 1000, "method": "percentile", "rng": np.random.default_rng(0)}
    result = stats.bootstrap((values, weights), lambda x, w, axis: x.sum(axis) / w.sum(axis), **options)
    expected = tuple(result.confidence_interval)
    assert bootstrap(values, weights=lengths if is_weighted else None) == pytest.approx(expected, rel=1e-12)


def test_a_mean_row_has_its_interval_and_count():
    row = Measurement("t", 3, {"a": 1}).mean("acc", [0, 1, 1, 1], unit="%")
    assert (row.value, row.n, row.seed, row.protocol) == (0.75, 4, 3, {"a": 1}) and 0 <= row.low < 0.75 < row.high <= 1
    identical = Measurement("t", 3).mean("acc", [1.0] * 9)
    assert identical.value == 1 and identical.low is identical.high is None


def test_the_interval_of_groups_resamples_each_by_itself():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    one = bootstrap_groups([np.array(values)[:, None]], lambda means: float(means[0][0]))
    assert one == bootstrap(values)
    constant = np.ones((4, 1))
    both = bootstrap_groups([constant, np.array(values)[:, None]], lambda means: float(sum(m[0] for m in means)))
    assert 1 <= both.low < 1.6 < both.high <= 2
    assert bootstrap_groups([constant, constant], lambda means: 1.0) == (None, None)
