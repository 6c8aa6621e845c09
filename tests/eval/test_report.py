import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from eval.config import PARTS
from eval.figures import write_figures
from eval.report import as_html, data_uri, headlines, main, metric_name, table, task_title
from eval.run import main as evaluate
from eval.run_data import load_run
from eval.scores import Measurement, read_scores, write_scores
from um3.core.errors import UserError

VOID = {"meta", "img", "br", "source", "link", "input", "path", "rect", "use"}


@pytest.fixture(scope="module")
def evaluated(run_folder, tmp_path_factory):
    """A whole tiny run: three phases and two parts of an evaluation, the others not run."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    shutil.copytree(run_folder, run)
    config = run / "eval.yaml"
    config.write_text(
        "captions: {num_images: 6, max_new_tokens: 4}\n"
        "generation: {num_images: 4, per_skill: 2}\n"
        "tokenizer: {num_images: 4}\nparts: [captions, generation, tokenizer]\n"
    )
    evaluate(["--config", str(config), f"run={run}"])
    return run


@pytest.fixture(scope="module")
def reported(evaluated):
    main(["--run", str(evaluated)])
    return evaluated


class Page(HTMLParser):
    """Collects text, and checks that every element is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(path):
    page = Page()
    page.feed(path.read_text())
    assert not page.open
    return page


def test_the_page_is_one_file_with_everything_in_it(reported):
    page = read(reported / "report.html")
    outside = [link for link in page.links if not link.startswith(("data:image/", "#"))]
    assert not outside and not re.search(r"url\((?!#)", (reported / "report.html").read_text())
    for uri in [link for link in page.links if link.startswith("data:")]:
        Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).verify()
    for score in read_scores(reported / "eval" / "captions.json"):
        if score.value is not None:
            assert score.shown() in page.text
    assert "held-out text, nats per token" in page.text and "back to the mix's start" in page.text
    assert "8.6" in page.text and "stage 1: reconstruct and align" in page.text
    assert "Not measured" in page.text, "language was not evaluated and the page must say so"


def test_drawings_stand_under_their_prompts_with_the_verdict(reported):
    samples = json.loads((reported / "eval" / "generation.json").read_text())["samples"]["skills"]
    page = (reported / "report.html").read_text()
    for sample in samples:
        kind, mark = ("right", "✓") if sample["passed"] else ("wrong", "✗")
        tile = rf'<figure class="tile {kind}"><img src="[^"]+" alt="{sample["prompt"]}"><span[^>]*>{mark}</span>'
        assert re.search(tile, page), sample["prompt"]


def test_report_json_is_flat_and_complete(reported):
    report = json.loads((reported / "report.json").read_text())
    rows = [
        row for part in ("captions", "generation", "tokenizer") for row in read_scores(reported / f"eval/{part}.json")
    ]
    assert set(report["values"]) == {row.key for row in rows}
    psnr = report["values"]["scenes_reconstruction_stage1/psnr"]
    assert {"value", "n", "seed", "protocol_hash", "paper", "note", "commit"} <= psnr.keys() and psnr["n"] == 4
    assert report["phases"]["stage1"]["seconds"] == 12.5 and report["phases"]["captions"]["peak_memory_gib"] > 0
    assert report["not_run"] == ["language"]
    assert report["versions"]["torch"] and report["machine"]["cpu_cores"]


def test_every_figure_is_a_picture_of_some_size(reported):
    names = {"hero", "hero_dark", "drawings", "captions", "reconstructions", "bits", "losses", "mix", "forgetting"}
    assert {path.stem for path in (reported / "figures").glob("*.png")} == names
    for name in names:
        picture = np.asarray(Image.open(reported / "figures" / f"{name}.png").convert("RGB"))
        assert picture.shape[1] > 1000 and picture.std() > 3, name
    hero = Image.open(reported / "figures" / "hero.png")
    assert hero.width / hero.height > 2


def test_writing_the_report_again_changes_nothing(reported, monkeypatch):
    monkeypatch.setattr("eval.report.commit", lambda: "the same")
    main(["--run", str(reported)])
    before = {path: path.read_bytes() for path in reported.rglob("*") if path.suffix in (".html", ".png")}
    main(["--run", str(reported)])
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_without_evaluation_has_honest_holes(run_folder, tmp_path, capsys):
    run = tmp_path / "young"
    shutil.copytree(run_folder / "stage1", run / "stage1")
    main(["--run", str(run)])
    page = read(run / "report.html")
    for words in ("Nothing has been measured yet", "No drawings", "No captions", "No reconstructions", "not run"):
        assert words in page.text
    assert {path.stem for path in (run / "figures").iterdir()} == {"losses"}
    assert json.loads((run / "report.json").read_text())["not_run"] == ["stage2", "um3", *PARTS]
    assert "not measured: run make eval" in capsys.readouterr().out


def test_runs_stand_side_by_side_and_other_protocols_are_marked(evaluated, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(evaluated, other)
    rows = read_scores(other / "eval" / "tokenizer.json")
    changed = [
        Measurement(row.task, 0, {"other": 1}).score("psnr", 12.34, n=4, unit="dB") if row.metric == "psnr" else row
        for row in rows
    ]
    content = json.loads((other / "eval" / "tokenizer.json").read_text())
    write_scores(other / "eval" / "tokenizer.json", changed, samples=content["samples"])
    main(["--run", str(evaluated), str(other)])
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "PSNR" in line)
    assert "≠" in line and "12.34 dB" in line
    assert "≠" not in next(line for line in said.splitlines() if "SSIM" in line)
    report = json.loads((evaluated / "report.json").read_text())
    assert report["others"][str(other)]["scenes_reconstruction_stage1/psnr"]["value"] == 12.34
    assert "12.34 dB" in read(evaluated / "report.html").text
    with pytest.raises(UserError, match="given twice"):
        main(["--run", str(evaluated), str(evaluated / "eval" / "..")])


def test_captions_from_outside_cannot_break_the_page(evaluated, tmp_path):
    run = tmp_path / "hostile"
    shutil.copytree(evaluated, run)
    path = run / "eval" / "captions.json"
    content = json.loads(path.read_text())
    content["samples"]["scenes"][0] |= {"caption": '<script>alert("x")</script>$\\frac{$\x19', "right": True}
    path.write_text(json.dumps(content))
    main(["--run", str(run)])
    page = (run / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_names_and_headlines_are_readable(evaluated):
    assert task_title("scenes_reconstruction_stage1") == "reconstruction · scenes · stage 1"
    assert task_title("my_photos_captions") == "captions · my_photos"
    assert task_title("piqa") == "piqa"
    assert metric_name("frechet_distance[qlip-features]") == "Frechet distance, qlip-features"
    run = load_run(evaluated)
    first = headlines(run)
    assert [score.key for score, _, _ in first][:3] == [
        "skills/mean",
        "scenes_captions/exact_match",
        "scenes_reconstruction_stage2/psnr",
    ]
    assert as_html([run], sections=table([run]))


def test_large_images_are_shrunk_for_the_page_and_small_ones_kept():
    generator = np.random.default_rng(0)
    small, large = (generator.integers(0, 256, (side, side, 3)).astype(np.uint8) for side in (32, 512))
    kept = Image.open(io.BytesIO(base64.b64decode(data_uri(small).split(",", 1)[1])))
    assert (np.asarray(kept) == small).all()
    shrunk = Image.open(io.BytesIO(base64.b64decode(data_uri(large).split(",", 1)[1])))
    assert shrunk.format == "JPEG" and max(shrunk.size) < 256


def test_folders_that_are_no_run_are_one_line_errors(tmp_path, evaluated):
    with pytest.raises(UserError, match="does not exist"):
        main(["--run", str(tmp_path / "none")])
    with pytest.raises(UserError, match="is it a run folder"):
        main(["--run", str(tmp_path)])
    run = tmp_path / "damaged"
    shutil.copytree(evaluated, run)
    (run / "eval" / "captions.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"captions\.npz is damaged"):
        load_run(run)


def test_a_figure_whose_data_is_gone_is_removed(evaluated, tmp_path):
    run = tmp_path / "less"
    shutil.copytree(evaluated / "stage1", run / "stage1")
    (run / "figures").mkdir()
    (run / "figures" / "drawings.png").write_bytes(b"from an earlier report")
    assert set(write_figures(load_run(run), run / "figures")) == {"losses"}
    assert not (run / "figures" / "drawings.png").exists()
