import base64
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from eval.config import PARTS
from eval.report.figures import write_figures
from eval.report.report import as_html, data_uri, headlines, main
from eval.report.run_folder import load_run
from eval.report.table import compare, labels, metric_name, task_title
from eval.run import main as evaluate
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
    monkeypatch.setattr("eval.report.report.commit", lambda: "the same")
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


def lines_of(runs, key):
    return [line for s in compare(runs) for block in s.blocks for line in block.lines if line.key == key]


def test_numbers_of_other_protocols_never_stand_on_one_line(evaluated, other):
    runs = [load_run(evaluated), load_run(other)]
    key = "scenes_reconstruction_stage1/psnr"
    first, second = lines_of(runs, key)
    own = runs[0].scores[key]
    assert [str(cell) for cell in first.cells] == [f"{own.shown()} {own.shown_interval()}".rstrip(), "–"]
    assert [str(cell) for cell in second.cells] == ["–", "12.34 dB [11.50, 13.25]"]
    assert first.protocol == own.protocol_hash != second.protocol
    assert first.differs == "" and second.differs == "images: 4 -> 9"
    (together,) = lines_of(runs, "scenes_reconstruction_stage1/ssim")
    assert (
        "–" not in [str(cell) for cell in together.cells] and together.counts == "4 / 77" and together.seeds == "0 / 5"
    )
    for line in (line for s in compare(runs) for block in s.blocks for line in block.measured):
        hashes = {
            run.scores[line.key].protocol_hash for run, cell in zip(runs, line.cells, strict=True) if cell.value != "–"
        }
        assert hashes == {line.protocol}


def test_every_form_of_the_report_shows_value_interval_n_seed_and_protocol(evaluated, other, capsys):
    main(["--run", str(evaluated), str(other)])
    score = load_run(other).scores["scenes_reconstruction_stage1/psnr"]
    said = capsys.readouterr().out
    markdown = (evaluated / "report.md").read_text()
    page = read(evaluated / "report.html").text
    for text, interval in ((said, "[11.50, 13.25]"), (markdown, r"\[11.50, 13.25\]"), (page, "[11.50, 13.25]")):
        assert "12.34 dB" in text and interval in text and score.protocol_hash in text and "images: 4 -> 9" in text
    row = next(line for line in markdown.splitlines() if "12.34 dB" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == ["–", r"12.34 dB \[11.50, 13.25\]", "24.50 dB", "4", "0", f"`{score.protocol_hash}`"]
    own, _, papers = markdown.partition("## The paper: Unified models (Table 5)")
    columns = {line.count("|") - line.count(r"\|") for line in own.splitlines() if line.startswith("|")}
    assert columns == {8}, "every row has its seven cells"
    assert "| UM3 1.5B | 34.3 | 45.35 | 74.65 | 43.09 | 54.22 | 8.6 |" in papers
    report = json.loads((evaluated / "report.json").read_text())
    found = report["others"][str(other)]["scenes_reconstruction_stage1/psnr"]
    assert (found["value"], found["low"], found["high"]) == (12.34, 11.5, 13.25)
    assert report["protocols"][found["protocol_hash"]] == {"version": score.version} | score.protocol
    (sentence,) = report["not_comparable"]
    assert sentence.startswith("scenes_reconstruction_stage1/psnr, ") and sentence.endswith(" (images: 4 -> 9)")
    with pytest.raises(UserError, match="given twice"):
        main(["--run", str(evaluated), str(evaluated / "eval" / "..")])


def test_many_runs_and_runs_of_one_name_are_told_apart(evaluated, tmp_path, capsys):
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


def test_a_models_language_alone_stands_beside_a_run(evaluated, tmp_path):
    of = Measurement("piqa", 0, {"scored": "text"})
    row = of.mean("acc", [1, 0, 1, 1] * 10, unit="%", paper=0.7465, version="1.0")
    prompts = {"piqa": {"context": "Question: <b>", "continuation": " Turn it."}}
    write_scores(tmp_path / "llama" / "eval" / "language.json", [row], samples={"prompts": prompts})
    main(["--run", str(tmp_path / "llama"), str(evaluated)])
    page = read(tmp_path / "llama" / "report.html").text
    assert "75.0 %" in page and row.shown_interval() in page and "Question: <b>" in page
    (line,) = lines_of([load_run(evaluated), load_run(tmp_path / "llama")], "piqa/acc")
    assert [str(cell) for cell in line.cells] == ["–", f"75.0 % {row.shown_interval()}"] and line.paper == "74.7 %"


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


def test_names_from_outside_cannot_break_the_markdown(tmp_path):
    row = Measurement("a|b\n<img>", 0, {"c": "`|"}).score("x_[1](http://y)", 0.5, n=3)
    hole = Measurement("t", 0).missing("m", note="say `x` | <b>no</b>\nmore")
    write_scores(tmp_path / "eval" / "language.json", [row, hole])
    main(["--run", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert r"**a\|b &lt;img>**" in text and r"x \[1\](http://y)" in text and "<b>" not in text
    assert r"say \`x\` \| &lt;b>no&lt;/b> more" in text


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
    assert as_html([run], sections=compare([run]))


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
