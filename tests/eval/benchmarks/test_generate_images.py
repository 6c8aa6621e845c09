"""Drawing to disk: the same pixels whatever the batch size, the point of a kill, and the number of processes."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from eval.benchmarks.generate_images import main
from eval.benchmarks.generated_images import read_drawn
from um3.core.errors import UserError

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "cross")]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def draw(um3_folder, prompts, tmp_path):
    def run(name, *options):
        main([f"model={um3_folder}", f"prompts={prompts}", f"out={tmp_path / name}", *options])
        return tmp_path / name

    return run


def pixels(folder):
    """A digest of every image's pixels, by name."""
    files = sorted(folder.rglob("*.png"))
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(np.asarray(Image.open(file)).tobytes()).hexdigest()
        for file in files
    }


def test_a_manifest_names_every_image_with_prompt_and_seed(draw):
    folder = draw("a", "num_images=2", "seed=5")
    protocol, pins, drawn = read_drawn(folder)
    assert [each.prompt for each in drawn] == PROMPTS
    assert (
        drawn[3].files == ["00003_0.png", "00003_1.png"] and len({seed for each in drawn for seed in each.seeds}) == 18
    )
    assert sorted(pixels(folder)) == sorted(file for each in drawn for file in each.files)
    assert len(set(pixels(folder).values())) > 12
    assert pins["seed"] == 5 and protocol["num_prompts"] == 9 and protocol["top_p"] == 0.95
    assert len(protocol["prompts_sha256"]) == len(pins["seeds_sha256"]) == len(pins["model_sha256"]) == 12


def test_batch_size_changes_no_pixel(draw):
    first = pixels(draw("a", "sampling.batch_size=2"))
    assert pixels(draw("b", "sampling.batch_size=5")) == first and pixels(draw("c")) == first
    assert pixels(draw("d", "seed=1")) != first


def test_a_run_goes_on_from_the_images_on_disk(draw, capsys):
    folder = draw("a", "sampling.batch_size=2")
    first = pixels(folder)
    for index in (1, 2, 8):
        (folder / f"{index:05d}.png").unlink()
    kept = (folder / "00000.png").stat().st_mtime_ns, (folder / "00005.png").stat().st_mtime_ns
    draw("a", "sampling.batch_size=2")
    assert pixels(folder) == first
    assert (folder / "00005.png").stat().st_mtime_ns == kept[1]
    capsys.readouterr()
    draw("a", "sampling.batch_size=2")
    assert "9 images up to date" in capsys.readouterr().out


def test_a_prompt_keeps_its_image_when_others_follow_it(draw):
    whole, part = draw("a"), draw("b", "limit=4")
    assert {name: pixels(whole)[name] for name in pixels(part)} == pixels(part)


def test_two_ranks_draw_what_one_draws_and_go_on_as_one(draw, monkeypatch, capsys):
    """Ranks need no word from one another, so they are run one after the other."""
    alone = draw("alone", "sampling.batch_size=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in ((0, 5), (1, 4)):
        monkeypatch.setenv("RANK", str(rank))
        shared = draw("shared", "sampling.batch_size=2")
        assert len(pixels(shared)) == (5 if rank == 0 else 9) and f"{count} images drawn" in capsys.readouterr().out
    assert pixels(shared) == pixels(alone)
    monkeypatch.delenv("WORLD_SIZE")
    (shared / "00006.png").unlink()
    assert pixels(draw("shared", "sampling.batch_size=2")) == pixels(alone)


def test_genevals_layout(um3_folder, tmp_path):
    lines = ['{"tag": "colors", "include": [], "prompt": "a red circle"}', '{"tag": "position", "prompt": "two dogs"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    main(
        [
            f"model={um3_folder}",
            f"prompts={tmp_path / 'metadata.jsonl'}",
            f"output_dir={out}",
            "layout=geneval",
            "num_images=3",
        ]
    )
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == json.loads(lines[1])
    assert sorted(pixels(out)) == [f"0000{i}/samples/000{copy}.png" for i in range(2) for copy in range(3)]


def test_dpgs_layout_is_the_same_images_in_a_grid(draw):
    flat, grids = draw("flat", "num_images=3"), draw("grids", "num_images=3", "layout=grid")
    sheet = np.asarray(Image.open(grids / "00004.png"))
    assert sheet.shape == (64, 64, 3)
    places = [(0, 0), (0, 32), (32, 0)]
    for copy, (top, left) in enumerate(places):
        assert (sheet[top : top + 32, left : left + 32] == np.asarray(Image.open(flat / f"00004_{copy}.png"))).all()
    assert (sheet[32:, 32:] == 0).all()


def test_another_request_does_not_mix_with_what_is_there(draw, tmp_path):
    draw("a")
    with pytest.raises(UserError, match=r"was drawn otherwise \(seed: 0 -> 1; seeds_sha256.*draw into another folder"):
        draw("a", "seed=1")
    with pytest.raises(UserError, match=r"temperature: 1\.0 -> 0\.5"):
        draw("a", "sampling.temperature=0.5")
    (tmp_path / "b").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "photo.png")
    with pytest.raises(UserError, match=r"holds images and no manifest.json"):
        draw("b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["prompts=''"], "set prompts=PATH"),
        (["num_images=5", "layout=grid"], "takes 1 to 4"),
        (["num_images=0"], "takes 1 to"),
        (["layout=geneval"], "layout=geneval needs GenEval's metadata"),
        (["model=nowhere"], "no UM3 model in nowhere; run make um3"),
        (["prompts=nowhere.txt"], "nowhere.txt does not exist"),
        (["promts=x"], "did you mean 'prompts'"),
    ],
)
def test_mistakes_are_one_line(draw, options, message):
    with pytest.raises(UserError, match=message):
        draw("a", *options)
