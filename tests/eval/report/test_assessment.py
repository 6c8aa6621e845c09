"""The first lines of a report: what is good and what is not, on a run with images of one's own."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from eval.part_files import write_part
from eval.report.assessment import findings
from eval.report.figures import hero, tile_figure
from eval.report.report import main, title_of
from eval.report.run_folder import load_run
from eval.report.samples import Tile, TileGroup, selection_note
from eval.scores import Measurement, PartResult
from tests.helpers.tiny_judges import write_lines
from um3.core.files import write_json

STAGES = {"stages": ["stage1", "stage2"]}
LONG = "a very long caption of a picture with unbelievablylongwordswithoutanyspaceinthemwhichgoonandon " * 20


@pytest.fixture
def own(tmp_path):
    """A run on a folder of emoji, named `data` as make names it, with captions in free words; writes further parts."""
    about = {"config": {"images": [{"name": "data", "path": "/somewhere/emoji"}]}}

    def write(part, *, samples, **values):
        own = {"captions": ("data_captions", "data"), "tokenizer": ("data_reconstruction_stage2", "data_original")}
        of, images = Measurement(own[part][0], 0), {own[part][1]: np.zeros((12, 8, 8, 3), np.uint8)}
        rows = [of.score(name, value, n=34, low=low, high=high) for name, (value, low, high) in values.items()]
        write_part(tmp_path / "eval" / f"{part}.json", PartResult(rows, samples, images), **about)

    samples = {"data": [{"caption": LONG, "references": [f"reference {n}"]} for n in range(12)]}
    write("captions", samples=samples, cider=(0.9, 0.8, 1.0), cider_other_image=(0.1, 0.0, 0.2))
    write("tokenizer", samples=STAGES, psnr=(14.6, 14, 15))
    counts = {"train": {"data": {"images": 166, "skipped": {"not an image": 4}}}}
    counts["val"] = {"data": {"images": 34, "skipped": {"no caption": 2}}}
    unused = {"data": {"no caption": 2, "names no image": 3}}
    write_json(tmp_path / "codes" / "summary.json", {"splits": counts, "unused": unused})
    for phase in ("stage1", "um3"):
        (tmp_path / phase).mkdir()
    row = {"step": 9, "data/truncated_captions": 30, "data/samples/i2t": 40, "data/samples/t2i": 60}
    write_lines(tmp_path / "um3" / "metrics.jsonl", [row])
    return write


def test_it_says_what_works_what_does_not_and_what_was_skipped(own, tmp_path):
    run = load_run(tmp_path)
    good, facts, cut, blurred = findings(run)
    assert good.good and good.text.startswith("Captions of emoji tell images apart: CIDEr 0.900 [0.800, 1.000], 0.1")
    assert facts.good is None and facts.text.startswith("emoji: 166 training and 34 validation images. Skipped: ")
    reasons = facts.text.removesuffix(".").partition("Skipped: ")[2].split(", ")
    assert sorted(reasons) == ["names no image (3)", "no caption (2)", "not an image (4)"]
    assert cut.good is blurred.good is False
    assert cut.text.startswith("30% of the captions") and "Reconstruction of emoji: 14.60" in blurred.text
    assert title_of(run) == "UM3 on emoji"


def test_a_validation_without_a_number_is_no_finding(own, tmp_path):
    write_lines(tmp_path / "stage1/metrics.jsonl", [{"step": 9, "validation/contrastive/data": None}])
    assert len(findings(load_run(tmp_path))) == 4


def test_a_result_that_names_no_stages_is_judged_too(own, tmp_path):
    own("tokenizer", samples={}, psnr=(14.6, 14, 15))
    assert any("Reconstruction of emoji: 14.60" in finding.text for finding in findings(load_run(tmp_path)))


@pytest.mark.parametrize(("seams", "psnr", "is_said"), [(1.3, 21, True), (1.05, 21, False), (1.5, 33, False)])
def test_a_grid_of_patches_that_is_seen_is_a_finding(seams, psnr, is_said, own, tmp_path):
    own("tokenizer", samples=STAGES, psnr=(psnr, psnr, psnr), seams=(seams, None, None))
    said = [found for found in findings(load_run(tmp_path)) if "grid of patches" in found.text]
    assert len(said) == is_said
    for found in said:
        assert found.good is False and "1.30 times" in found.text and "decoder_overlap=2" in found.text


@pytest.mark.parametrize(("last", "is_said"), [(4.4, True), (3.6, False)])
def test_captions_that_stage_1_learned_by_heart_are_a_finding(last, is_said, own, tmp_path):
    rows = [{"step": step, "validation/contrastive/data": loss} for step, loss in ((200, 3.9), (400, 3.1), (600, last))]
    write_lines(tmp_path / "stage1/metrics.jsonl", rows)
    said = [found for found in findings(load_run(tmp_path)) if "by heart" in found.text]
    assert len(said) == is_said
    for found in said:
        assert found.good is False and "captions of emoji by heart" in found.text
        assert "3.10 after 400 steps, 4.40 at the end" in found.text


@pytest.mark.parametrize(
    ("ours", "others", "good"),
    [
        ((0.9, 0.1, 1.9), (0.5, 0.0, 1.2), False),
        ((0.05, 0.0, 0.2), (0.01, 0.0, 0.03), False),  # an interval may begin at zero
        ((0.05, 0.04, 0.2), (0.01, 0.0, 0.03), True),
    ],
)
def test_captions_of_other_images_decide_whether_captions_are_good(ours, others, good, own, tmp_path):
    samples = {"data": [{"caption": "a", "references": ["b"]}] * 12}
    own("captions", samples=samples, cider=ours, cider_other_image=others)
    assert [f.good for f in findings(load_run(tmp_path)) if "captions of emoji" in f.text.lower()] == [good]


def test_captions_that_nothing_judges_are_shown_in_order_and_not_called_successes(own, tmp_path):
    run = load_run(tmp_path)
    (group,) = run.shown["captions"]
    assert group.title == "emoji" and {tile.right for tile in group.tiles} == {None}
    assert "not selected" in selection_note(run.shown)
    image = group.tiles[0].image
    for rights, words in (((True, True), "successes"), ((True, False), "1 of these 2"), ((False,), "1 of these 1")):
        captions = TileGroup("x", [Tile(image, "a", right) for right in rights])
        assert words in selection_note({"skills": [], "generated": [], "captions": [captions]}), rights


def test_the_first_lines_are_in_every_form_of_the_report(own, tmp_path, capsys):
    main(["--run", str(tmp_path)])
    texts = [(tmp_path / f"report.{kind}").read_text() for kind in ("md", "html", "json")]
    for text in (capsys.readouterr().out, *texts):
        assert "UM3 read were cut" in text and "no caption" in text
    assert "✓" not in texts[1].partition('class="hero"')[2].partition("<h2>Reconstructions")[0], "nothing judges them"


def test_long_captions_stay_in_their_place(own, tmp_path):
    """Nothing is drawn below or beside a tile's own place, and an ellipsis says that words are left out."""
    tile = Tile(np.zeros((8, 8, 3), np.uint8), LONG, False, LONG)
    figures = [tile_figure([TileGroup("x", [tile] * 20)], rows=2), hero(load_run(tmp_path))]
    for figure in figures:
        renderer = FigureCanvasAgg(figure).get_renderer()
        boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts if text.get_text().strip()]
        images = [image.get_window_extent(renderer) for image in figure.axes[0].images]
        everything = [*boxes, *images]
        for number, box in enumerate(everything):
            assert box.y0 >= 0 and box.x1 <= figure.bbox.width
            assert not any(box.overlaps(other) for other in everything[number + 1 :] if not _same_line(box, other))
        assert any("…" in text.get_text() for text in figure.axes[0].texts)


def _same_line(box, other):
    """Lines of one text touch each other."""
    return abs(box.x0 - other.x0) < 1 and min(box.y1, other.y1) - max(box.y0, other.y0) < 4
