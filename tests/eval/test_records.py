import contextlib
import json

import numpy as np
import pytest

from eval.command import LeftOut
from eval.records import NoJudgeError, Records, judgements, supplied
from um3.core.errors import UserError
from um3.inference.image_io import save_png


@pytest.fixture
def files(tmp_path):
    """Four images of one colour each, by name."""
    for value in range(4):
        save_png(np.full((4, 4, 3), value * 10, dtype=np.uint8), tmp_path / "images" / f"{value}.png")
    return {f"{value}.png": tmp_path / "images" / f"{value}.png" for value in range(4)}


class Brightness:
    """A judge that notes an image's first value, and which images it was asked about; it may die."""

    def __init__(self, *, dies_at=""):
        self.asked, self.dies_at = [], dies_at

    def __call__(self, files, images):
        if self.dies_at in files:
            raise KeyboardInterrupt
        self.asked += files
        return [int(np.asarray(image)[0, 0, 0]) for image in images]


def judge_all(files, tmp_path, judge, **options):
    left_out = LeftOut()
    common = {"stem": tmp_path / "out.values", "made_by": "brightness", "label": "judge", **options}
    return judgements(files, open_judge=lambda: judge, left_out=left_out, **common), left_out


def test_values_come_in_the_order_of_the_files_and_are_kept(files, tmp_path):
    judge, again = Brightness(), Brightness()
    found, _ = judge_all(files, tmp_path, judge, batch_size=3)
    assert list(found.items()) == [("0.png", 0), ("1.png", 10), ("2.png", 20), ("3.png", 30)]
    assert judge_all(files, tmp_path, again)[0] == found and again.asked == []


def test_a_killed_run_goes_on_behind_its_last_whole_line(files, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        judge_all(files, tmp_path, Brightness(dies_at="2.png"))
    lines = tmp_path / "out.values.jsonl"
    lines.write_bytes(lines.read_bytes()[:-5])
    again = Brightness()
    found, _ = judge_all(files, tmp_path, again)
    assert again.asked == ["1.png", "2.png", "3.png"] and list(found.values()) == [0, 10, 20, 30]


def test_another_judge_or_another_image_is_judged_again(files, tmp_path):
    judge_all(files, tmp_path, Brightness())
    other = Brightness()
    judge_all(files, tmp_path, other, made_by="another")
    assert len(other.asked) == 4
    save_png(np.full((4, 4, 3), 99, dtype=np.uint8), files["1.png"])
    again = Brightness()
    assert judge_all(files, tmp_path, again)[0]["1.png"] == 99 and again.asked == ["1.png"]


def test_missing_and_unreadable_images_are_named_and_counted(files, tmp_path):
    files["0.png"].unlink()
    files["2.png"].write_bytes(b"no image")
    for _ in range(2):
        found, left_out = judge_all(files, tmp_path, Brightness())
        assert list(found) == ["1.png", "3.png"] and left_out.count == 2
        assert "missing image (1, such as 0.png)" in left_out.note()
        assert "unreadable image: not an image (1, such as 2.png)" in left_out.note()


def test_two_ranks_share_the_work_and_the_first_reads_all(files, tmp_path, monkeypatch):
    """Each rank in turn; the meeting of real processes is tested with the drawing."""
    monkeypatch.setattr("eval.records.joined_ranks", contextlib.nullcontext)
    asked = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        judge = Brightness()
        found, _ = judge_all(files, tmp_path, judge)
        asked.append(judge.asked)
    assert asked == [["1.png", "3.png"], ["0.png", "2.png"]] and list(found.values()) == [0, 10, 20, 30]
    monkeypatch.delenv("WORLD_SIZE")
    alone = Brightness()
    assert judge_all(files, tmp_path, alone)[0] == found and alone.asked == []


def test_a_judge_that_cannot_be_had_is_asked_for_only_where_work_is_left(files, tmp_path, monkeypatch):
    def absent():
        raise UserError("no judge at x; give one")

    options = {"stem": tmp_path / "out.values", "made_by": "brightness", "label": "judge"}
    with pytest.raises(NoJudgeError, match="no judge at x; give one"):
        judgements(files, open_judge=absent, left_out=LeftOut(), **options)
    found, _ = judge_all(files, tmp_path, Brightness())
    assert judgements(files, open_judge=absent, left_out=LeftOut(), **options) == found
    # The second rank has no judge for its share: the first must not take its images for missing.
    monkeypatch.setattr("eval.records.joined_ranks", contextlib.nullcontext)
    monkeypatch.setenv("WORLD_SIZE", "2")
    left_out = LeftOut()
    options["made_by"] = "another"
    judgements(files, open_judge=Brightness, left_out=left_out, **options)
    assert left_out.to_dict() == {"not judged": {"count": 2, "first": ["1.png", "3.png"]}}


def test_supplied_values(tmp_path):
    path = tmp_path / "given.jsonl"
    rows = [json.dumps({"file": "a", "objects": [1]}), "broken", json.dumps({"file": "b"}), json.dumps([1]), ""]
    path.write_text("\n".join(rows))
    left_out = LeftOut()
    assert supplied(path, field="objects", files=["a", "b"], left_out=left_out) == {"a": [1]}
    assert left_out.to_dict()["line without file and objects"]["count"] == 3
    assert left_out.to_dict()["no objects supplied"] == {"count": 1, "first": ["b"]}
    with pytest.raises(UserError, match="does not exist"):
        supplied(tmp_path / "none", field="objects", files=[], left_out=left_out)
    with pytest.raises(UserError, match="no line is a JSON object with 'file' and 'answers'"):
        supplied(path, field="answers", files=[], left_out=left_out)


def test_records_of_older_lines_lose_to_newer_ones(tmp_path):
    records = Records(tmp_path / "r", made_by="x")
    records.add("a", image="1", value=1)
    records.add("a", image="1", value=2)
    assert Records(tmp_path / "r", made_by="x").get("a", image="1")["value"] == 2
