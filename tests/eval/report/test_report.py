import base64
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.config import PARTS
from eval.report.figures import Canvas, save, svg
from eval.report.report import data_uri, headlines, main
from eval.report.results import labels, metric_name, result_tables, task_title
from eval.report.run_folder import RunData, load_run
from eval.run import main as evaluate
from eval.scores import Measurement, read_scores, write_scores
from um3.core.errors import UserError

VOID = {"meta", "img", "br", "source", "link", "input", "path", "rect", "use"}


@pytest.fixture(scope="module")
def evaluated(run_folder, tmp_path_factory):
    """A whole tiny run: three phases and two parts of an evaluation, the others not run."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    shutil.copytree(run_folder, run)
    settings = ["captions.num_images=6", "captions.max_new_tokens=4", "generation.num_images=4"]
    settings += ["generation.per_skill=2", "tokenizer.num_images=4", "parts=[captions,generation,tokenizer]"]
    evaluate([f"run={run}", *settings])
    return run


@pytest.fixture(scope="module")
def reported(evaluated):
    main(["--run", str(evaluated)])
    return evaluated


@pytest.fixture
def no_figures(monkeypatch):
    """The report without its figures, which take most of its time."""
    monkeypatch.setattr("eval.report.figures.write_figures", lambda run: {})


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
    assert "validation text, nats per token" in page.text and "Data mix: text 60.0% at the start" in page.text
    assert "8.6" in page.text and "stage 1: reconstruct and align" in page.text
    assert "UM3 on scenes and digits" in page.text
    assert "not measured: run make eval" in page.text, "the language part was not run"


def test_generated_images_have_their_prompt_and_verdict(reported):
    samples = json.loads((reported / "eval" / "generation.json").read_text())["samples"]["skills"]
    page = (reported / "report.html").read_text()
    for sample in samples:
        kind, mark = ("right", "✓") if sample["passed"] else ("wrong", "✗")
        tile = rf'<figure class="tile {kind}"><img src="[^"]+" alt="{sample["prompt"]}"><span[^>]*>{mark}</span>'
        assert re.search(tile, page), sample["prompt"]


def test_report_json_is_flat_and_complete(reported):
    report = json.loads((reported / "report.json").read_text())
    parts = ("captions", "generation", "tokenizer")
    assert set(report["values"]) == {row.key for part in parts for row in read_scores(reported / f"eval/{part}.json")}
    psnr = report["values"]["scenes_reconstruction_stage1/psnr"]
    assert {"value", "n", "seed", "protocol_hash", "paper", "note", "commit"} <= psnr.keys() and psnr["n"] == 4
    assert report["phases"]["stage1"]["seconds"] == 12.5 and report["phases"]["captions"]["peak_memory_gib"] > 0
    assert report["not_run"] == ["language"] and report["versions"]["torch"] and report["machine"]["cpu_cores"]


def test_every_figure_is_written(reported):
    names = {"hero", "hero_dark", "generated", "captions", "reconstructions", "bits"}
    names |= {"losses", "validation", "mix", "forgetting"}
    assert {path.stem for path in (reported / "figures").glob("*.png")} == names
    for name in names:
        figure = np.asarray(Image.open(reported / "figures" / f"{name}.png").convert("RGB"))
        assert figure.shape[1] > 1000 and figure.std() > 3, name
    hero = Image.open(reported / "figures" / "hero.png")
    assert hero.width / hero.height > 2


def test_writing_the_report_again_changes_nothing(reported, monkeypatch):
    commit = json.loads((reported / "report.json").read_text())["commit"]
    monkeypatch.setattr("eval.report.report.commit", lambda: commit)
    before = {path: path.read_bytes() for path in reported.rglob("*") if path.suffix in (".html", ".png")}
    main(["--run", str(reported)])
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_without_evaluation_says_what_is_missing(run_folder, tmp_path, capsys):
    run = tmp_path / "young"
    shutil.copytree(run_folder / "stage1", run / "stage1")
    (run / "figures").mkdir()
    (run / "figures" / "generated.png").write_bytes(b"of an earlier report")
    main(["--run", str(run)])
    page = read(run / "report.html")
    for words in ("no results yet", "No generated images", "No captions", "No reconstructions", "not run"):
        assert words in page.text
    assert {path.stem for path in (run / "figures").glob("*.png")} == {"losses", "validation"}
    assert json.loads((run / "report.json").read_text())["not_run"] == ["stage2", "um3", *PARTS]
    assert "not measured: run make eval" in capsys.readouterr().out


@pytest.fixture
def other(evaluated, tmp_path):
    """The same run with another PSNR, measured under another protocol, and another SSIM under the same."""

    def changed(row):
        if row.metric == "psnr":
            return dataclasses.replace(row, value=12.34, low=11.5, high=13.25, protocol=row.protocol | {"images": 9})
        return dataclasses.replace(row, value=0.4321, n=77, seed=5) if row.metric == "ssim" else row

    folder = tmp_path / "other"
    shutil.copytree(evaluated, folder)
    path = folder / "eval" / "tokenizer.json"
    samples = json.loads(path.read_text())["samples"]
    write_scores(path, [changed(row) for row in read_scores(path)], samples=samples)
    return folder


def rows_of(runs, key):
    return [row for table in result_tables(runs) for row in table.rows if row.key == key]


def test_values_of_different_protocols_never_share_a_row(evaluated, other):
    runs = [load_run(evaluated), load_run(other)]
    key = "scenes_reconstruction_stage1/psnr"
    first, second = rows_of(runs, key)
    score = runs[0].scores[key]
    assert [str(cell) for cell in first.cells[:2]] == [f"{score.shown()} {score.shown_interval()}".rstrip(), "–"]
    assert [str(cell) for cell in second.cells[:2]] == ["–", "12.34 dB [11.50, 13.25]"]
    assert first.cells[-1].value == score.protocol_hash != second.cells[-1].value
    assert first.differs == "" and second.differs == "images: 4 -> 9"
    (shared,) = rows_of(runs, "scenes_reconstruction_stage1/ssim")
    assert "–" not in [str(cell) for cell in shared.cells]
    assert [cell.value for cell in shared.cells[2:4]] == ["4 / 77", "0 / 5"]


def test_every_form_of_the_report_shows_value_interval_n_seed_and_protocol(evaluated, other, capsys, no_figures):
    main(["--run", str(evaluated), str(other)])
    score = load_run(other).scores["scenes_reconstruction_stage1/psnr"]
    said = capsys.readouterr().out
    markdown = (evaluated / "report.md").read_text()
    page = read(evaluated / "report.html").text
    for text, interval in ((said, "[11.50, 13.25]"), (markdown, r"\[11.50, 13.25\]"), (page, "[11.50, 13.25]")):
        assert "12.34 dB" in text and interval in text and score.protocol_hash in text and "images: 4 -> 9" in text
    row = next(line for line in markdown.splitlines() if "12.34 dB" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["–", r"12.34 dB \[11.50, 13.25\]", "4", "0", f"`{score.protocol_hash}`"]
    own, _, papers = markdown.partition("## The paper: Unified models (Table 5)")
    columns = {line.count("|") - line.count(r"\|") for line in own.splitlines() if line.startswith("|")}
    assert columns == {7}, "every row has its six cells"
    assert "| UM3 1.5B | 34.3 | 45.35 | 74.65 | 43.09 | 54.22 | 8.6 |" in papers
    report = json.loads((evaluated / "report.json").read_text())
    found = report["others"][str(other)]["scenes_reconstruction_stage1/psnr"]
    assert (found["value"], found["low"], found["high"]) == (12.34, 11.5, 13.25)
    assert report["protocols"][found["protocol_hash"]] == {"version": score.version} | score.protocol
    (sentence,) = report["not_comparable"]
    assert sentence.startswith("scenes_reconstruction_stage1/psnr, ") and sentence.endswith(" (images: 4 -> 9)")
    with pytest.raises(UserError, match="same run twice"):
        main(["--run", str(evaluated), str(evaluated / "eval" / "..")])


def test_many_runs_and_runs_of_one_name_are_told_apart(evaluated, tmp_path, capsys, no_figures):
    copies = [tmp_path / str(number) / "same" for number in range(5)]
    for folder in copies:
        shutil.copytree(evaluated / "eval", folder / "eval")
    runs = [load_run(folder) for folder in copies]
    assert labels(runs) == [str(folder) for folder in copies] and labels(runs[:1]) == ["same"]
    main(["--run", *map(str, copies)])
    said = capsys.readouterr().out
    value = runs[0].scores["scenes_reconstruction_stage1/psnr"].shown()
    assert max(line.count(value) for line in said.splitlines()) == 5
    assert "| " + " | ".join(labels(runs)) in (copies[0] / "report.md").read_text().replace("\\_", "_")


def test_a_models_language_alone_stands_beside_a_run(evaluated, tmp_path, no_figures):
    of = Measurement("piqa", 0, {"scored": "text"})
    row = of.mean("acc", [1, 0, 1, 1] * 460, unit="%", paper=0.7465, version="1.0")
    prompts = {"piqa": {"context": "Question: <b>", "continuation": " Turn it."}}
    write_scores(tmp_path / "llama" / "eval" / "language.json", [row], samples={"prompts": prompts})
    main(["--run", str(tmp_path / "llama"), str(evaluated)])
    main(["--run", str(tmp_path / "llama")])
    page = read(tmp_path / "llama" / "report.html").text
    assert "not measured: run make eval" not in (tmp_path / "llama" / "report.md").read_text()
    assert "images" not in page.partition("All results")[0] and "not run" not in page, "a report on language alone"
    assert "75.0 %" in page and row.shown_interval() in page and "Question: <b>" in page
    (row_of_both,) = rows_of([load_run(evaluated), load_run(tmp_path / "llama")], "piqa/acc")
    assert [str(cell) for cell in row_of_both.cells[:3]] == ["–", f"75.0 % {row.shown_interval()}", "74.7 %"]


def test_the_papers_value_stands_only_beside_as_many_items_of_its_data(tmp_path):
    def papers(task, n):
        row = Measurement(task, 0).score("cider", 8.75, n=n, unit="x100", paper=0.173)
        write_scores(tmp_path / "eval" / "captions.json", [row])
        (captions,) = [table for table in result_tables([load_run(tmp_path)]) if table.rows]
        return [cell.value for row in captions.rows for cell in row.cells if "paper" in captions.columns][1:2]

    assert papers("coco_captions", 5000) == ["17.3"]
    assert papers("coco_captions", 8) == papers("emoji_captions", 5000) == []


def test_captions_from_outside_cannot_break_the_page(evaluated, tmp_path, no_figures):
    run = tmp_path / "hostile"
    shutil.copytree(evaluated, run)
    path = run / "eval" / "captions.json"
    content = json.loads(path.read_text())
    content["samples"]["scenes"][0] |= {"caption": '<script>alert("x")</script>$\\frac{$\x19', "right": True}
    path.write_text(json.dumps(content))
    main(["--run", str(run)])
    page = (run / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_names_from_outside_cannot_break_markdown_or_terminal(tmp_path, no_figures, capsys):
    row = Measurement("a|b\n<img>\x1b[31m", 0, {"c": "`|<b>"}).score("x_[1](http://y)", 0.5, n=3)
    hole = Measurement("t", 0).missing("m\x1b]0;", note="say `x` | <b>no</b>\nmore")
    write_scores(tmp_path / "eval" / "language.json", [row, hole])
    main(["--run", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert r"**a\|b &lt;img>\\x1b\[31m**" in text and r"x \[1\](http://y)" in text and "<b>no" not in text
    assert r"say \`x\` \| &lt;b>no&lt;/b> more" in text and """: `{"version": "1", "c": "'|<b>"}`""" in text
    assert "\x1b" not in text + capsys.readouterr().out


def test_names_and_headlines_are_readable(evaluated):
    run = RunData(Path("run"), titles={"data": "emoji"})
    assert task_title("scenes_reconstruction_stage1", run) == "reconstruction · scenes · stage 1"
    assert task_title("data_captions", run) == "captions · emoji" and task_title("piqa", run) == "piqa"
    assert metric_name("frechet_distance[qlip-features]") == "Frechet distance, qlip-features"
    first = ["skills/mean", "scenes_captions/exact_match", "scenes_reconstruction_stage2/psnr"]
    assert [score.key for score, _, _ in headlines(load_run(evaluated))][:3] == first


def test_large_images_are_shrunk_for_the_page_and_small_ones_kept():
    generator = np.random.default_rng(0)
    small, large = (generator.integers(0, 256, (side, side, 3)).astype(np.uint8) for side in (32, 512))
    kept = Image.open(io.BytesIO(base64.b64decode(data_uri(small).split(",", 1)[1])))
    assert (np.asarray(kept) == small).all()
    shrunk = Image.open(io.BytesIO(base64.b64decode(data_uri(large).split(",", 1)[1])))
    assert shrunk.format == "JPEG" and max(shrunk.size) < 256


def test_letters_that_the_font_lacks_give_no_warning(tmp_path, recwarn):
    canvas = Canvas(200, 100)
    canvas.figure.text(0.5, 0.5, "一个方块")
    assert save(canvas.figure, tmp_path / "letters.png").stat().st_size > 100 and svg(canvas.figure).startswith("<svg")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
