import json

import numpy as np
import pytest

from eval.command import SkipCounter
from eval.results_cache import ResultsCache, UnavailableError, measure_images, supplied_results
from um3.core import distributed
from um3.core.errors import UserError
from um3.inference.image_io import save_png


@pytest.fixture
def files(tmp_path):
    """Four images of one colour each, by name."""
    for value in range(4):
        save_png(np.full((4, 4, 3), value * 10, dtype=np.uint8), tmp_path / "images" / f"{value}.png")
    return {f"{value}.png": tmp_path / "images" / f"{value}.png" for value in range(4)}


class Brightness:
    """A model that returns an image's first value and records which images it gets; it may stop at one."""

    def __init__(self, *, stops_at=""):
        self.asked, self.stops_at = [], stops_at

    def __call__(self, names, images):
        if self.stops_at in names:
            raise KeyboardInterrupt
        self.asked += names
        return [int(np.asarray(image)[0, 0, 0]) for image in images]


@pytest.fixture
def measure(files, tmp_path):
    def run(model, *, protocol="brightness", **options):
        skipped = SkipCounter()
        cache = ResultsCache(tmp_path / "out.values", protocol=protocol)
        common = {"label": "measure", "skipped": skipped, "open_model": lambda: model, **options}
        return measure_images(files, cache=cache, **common), skipped

    return run


def test_results_are_in_the_order_of_the_files_and_cached(measure):
    again = Brightness()
    results, _ = measure(Brightness(), batch_size=3)
    assert list(results.items()) == [("0.png", 0), ("1.png", 10), ("2.png", 20), ("3.png", 30)]
    assert measure(again)[0] == results and again.asked == []


def test_a_killed_run_resumes_and_ignores_a_cut_line(measure, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(Brightness(stops_at="2.png"))
    lines = tmp_path / "out.values.jsonl"
    lines.write_bytes(lines.read_bytes()[:-5])
    again = Brightness()
    results, _ = measure(again)
    assert again.asked == ["1.png", "2.png", "3.png"] and list(results.values()) == [0, 10, 20, 30]


def test_a_damaged_record_is_noticed_and_measured_again(measure, tmp_path, caplog):
    """Every byte of the second record, one bit flipped: its item is measured again, or its key no longer exists."""
    results, _ = measure(Brightness())
    lines = tmp_path / "out.values.jsonl"
    whole = lines.read_bytes()
    start, end = (whole.index(f'"item": "{name}.png'.encode()) - 40 for name in (1, 2))
    for place in range(start, end, 3):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        lines.write_bytes(damaged)
        caplog.clear()
        again = Brightness()
        assert measure(again)[0] == results and again.asked, bytes(damaged[start:end])
        assert "damaged" in caplog.text and str(lines) in caplog.text


def test_batches_do_not_depend_on_where_a_run_was_killed(measure, tmp_path):
    results, _ = measure(Brightness(), batch_size=2)
    lines = tmp_path / "out.values.jsonl"
    lines.write_text("\n".join(lines.read_text().splitlines()[:-1]))
    again = Brightness()
    assert measure(again, batch_size=2)[0] == results and again.asked == ["2.png", "3.png"]


def test_another_protocol_or_another_image_is_measured_again(measure, files):
    measure(Brightness())
    other = Brightness()
    measure(other, protocol="another")
    assert len(other.asked) == 4
    save_png(np.full((4, 4, 3), 99, dtype=np.uint8), files["1.png"])
    again = Brightness()
    assert measure(again)[0]["1.png"] == 99 and again.asked == ["1.png"]


def test_missing_and_unreadable_images_are_skipped_and_counted(measure, files):
    files["0.png"].unlink()
    files["2.png"].write_bytes(b"no image")
    for _ in range(2):
        results, skipped = measure(Brightness())
        assert list(results) == ["1.png", "3.png"] and skipped.count == 2
        assert "missing image (1, such as 0.png)" in skipped.note()
        assert "unreadable image: not an image (1, such as 2.png)" in skipped.note()


@pytest.fixture
def ranks(monkeypatch):
    """Sets rank and number of ranks; they run one after the other (test_coco_captions runs real processes)."""
    monkeypatch.setattr("eval.results_cache._join_ranks", lambda: None)
    monkeypatch.setattr(distributed, "_process_group", lambda: None)  # an earlier test may have started one

    def be(rank, *, of):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(of))

    return be


def test_two_ranks_share_the_work_and_read_all_results(measure, ranks):
    first, second = Brightness(), Brightness()
    ranks(1, of=2)
    with pytest.raises(UnavailableError, match="2 images were not measured"):  # the other one has not run yet
        measure(second)
    ranks(0, of=2)
    results, _ = measure(first)
    assert (first.asked, second.asked) == (["0.png", "2.png"], ["1.png", "3.png"])
    assert list(results.values()) == [0, 10, 20, 30]
    ranks(0, of=1)
    alone = Brightness()
    assert measure(alone)[0] == results and alone.asked == []


def test_a_model_is_opened_only_if_a_result_is_missing(measure, ranks):
    def missing():
        raise UserError("no model at x; give one")

    with pytest.raises(UnavailableError, match="no model at x"):
        measure(None, open_model=missing)
    results, _ = measure(Brightness())
    assert measure(None, open_model=missing)[0] == results
    ranks(0, of=2)  # another rank had no model for its share: a part of the images is no result
    with pytest.raises(UnavailableError, match="2 images were not measured: another process could not"):
        measure(Brightness(), protocol="another")


def test_supplied_results(tmp_path):
    path = tmp_path / "supplied.jsonl"
    rows = [json.dumps({"file": "a", "objects": [1]}), "broken", json.dumps({"file": "b"}), json.dumps([1]), ""]
    path.write_text("\n".join(rows))
    skipped, ids = SkipCounter(), {"a": "1", "b": "2"}
    assert supplied_results(path, field="objects", ids=ids, skipped=skipped) == {"a": [1]}
    assert skipped.to_dict()["entry without file and objects"]["count"] == 3
    assert skipped.to_dict()["no objects supplied"] == {"count": 1, "first": ["b"]}


def test_a_newer_result_replaces_an_older_one(tmp_path):
    cache = ResultsCache(tmp_path / "r", protocol="x")
    cache.add({"a": 1})
    cache.add({"a": 2, "b": 0.1 + 0.2})
    again = ResultsCache(tmp_path / "r", protocol="x")
    assert again["a"] == 2 and again["b"] == 0.1 + 0.2 and "a" not in ResultsCache(tmp_path / "r", protocol="y")
    again.remove()
    assert "a" not in ResultsCache(tmp_path / "r", protocol="x")
