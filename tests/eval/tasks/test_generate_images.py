"""Image generation to disk: the same pixels for every batch size, point of a kill and number of processes."""

import numpy as np
import pytest
from PIL import Image

from eval.tasks.generate_images import GenerateConfig, generate_folder, main
from eval.tasks.generated_images import read_images, read_manifest
from eval.tasks.prompts import Prompt
from um3.core import distributed
from um3.core.errors import UserError

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "cross")]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def generate(um3_folder, prompts, tmp_path):
    def run(name, *options):
        main([f"model={um3_folder}", f"prompts={prompts}", f"output_dir={tmp_path / name}", *options])
        return tmp_path / name

    return run


def pixels(folder):
    """Every image's pixels, by name."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*.png"))}
    return {name: np.asarray(Image.open(file)).tobytes() for name, file in files.items()}


def test_a_manifest_names_every_image_with_prompt_and_seed(generate):
    folder = generate("a", "num_images=2", "seed=5")
    generated = read_manifest(folder)
    assert [prompt.prompt for prompt in generated.prompts] == PROMPTS
    assert generated.prompts[3].files == ["00003_0.png", "00003_1.png"]
    assert len({seed for prompt in generated.prompts for seed in prompt.seeds}) == 18
    assert sorted(pixels(folder)) == sorted(file for prompt in generated.prompts for file in prompt.files)
    assert len(set(pixels(folder).values())) > 12 and read_images(folder, generated).shape == (18, 32, 32, 3)
    assert generated.seed == 5 and generated.protocol["num_prompts"] == 9 and generated.protocol["top_p"] == 0.95
    assert {"prompts_sha256"} <= generated.protocol.keys() and {"seeds_sha256", "model_sha256"} <= generated.pins.keys()


def test_batch_size_and_later_prompts_change_no_pixel(generate):
    first = pixels(generate("a", "sampling.batch_size=2"))
    assert pixels(generate("b", "sampling.batch_size=5")) == first
    part = pixels(generate("c", "limit=4"))
    assert len(part) == 4 and part.items() <= first.items()
    assert pixels(generate("d", "seed=1")) != first


def test_a_run_resumes_from_the_images_on_disk(generate, capsys):
    folder = generate("a", "sampling.batch_size=2")
    first = pixels(folder)
    for index in (1, 2, 8):
        (folder / f"{index:05d}.png").unlink()
    unchanged = (folder / "00005.png").stat().st_mtime_ns
    generate("a", "sampling.batch_size=2")
    assert pixels(folder) == first and (folder / "00005.png").stat().st_mtime_ns == unchanged
    capsys.readouterr()
    generate("a", "sampling.batch_size=2")
    assert "9 images up to date" in capsys.readouterr().out


def test_two_ranks_generate_the_images_of_one(generate, monkeypatch, capsys):
    """Ranks do not communicate, so the test runs them one after the other."""
    alone = generate("alone", "sampling.batch_size=2")
    capsys.readouterr()
    monkeypatch.setattr(distributed, "_process_group", lambda: None)  # an earlier test may have started one
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count, total in ((0, 5, 5), (1, 4, 9)):
        monkeypatch.setenv("RANK", str(rank))
        shared = generate("shared", "sampling.batch_size=2")
        assert len(pixels(shared)) == total and f"{count} images generated" in capsys.readouterr().out
    assert pixels(shared) == pixels(alone)
    monkeypatch.delenv("WORLD_SIZE")
    (shared / "00006.png").unlink()
    assert pixels(generate("shared", "sampling.batch_size=2")) == pixels(alone)


def test_an_open_pipeline_generates_a_folder_and_replaces_other_images(um3_folder, pipeline, tmp_path, monkeypatch):
    def run(seed, *, load=lambda: pipeline):
        config = GenerateConfig(model=str(um3_folder), prompts="made", output_dir=str(tmp_path / "a"), seed=seed)
        made = [Prompt(f"{index:05d}", text) for index, text in enumerate(PROMPTS[:2])]
        generate_folder(config, prompts=made, load_pipeline=load, is_exclusive=True)
        return pixels(tmp_path / "a")

    first = run(0)
    assert run(1) != first and run(0) == first
    monkeypatch.setenv("WORLD_SIZE", "2")  # within a training on several ranks the first one evaluates alone
    assert run(0, load=lambda: pytest.fail("everything is there")) == first and len(run(1)) == 2


def test_dpgs_layout_is_the_same_images_in_a_grid(generate):
    flat, grids = generate("flat", "num_images=3"), generate("grids", "num_images=3", "layout=grid")
    sheet = np.asarray(Image.open(grids / "00004.png"))
    assert sheet.shape == (64, 64, 3) and (sheet[32:, 32:] == 0).all()
    for copy, (top, left) in enumerate([(0, 0), (0, 32), (32, 0)]):
        assert (sheet[top : top + 32, left : left + 32] == np.asarray(Image.open(flat / f"00004_{copy}.png"))).all()


def test_other_settings_do_not_mix_with_existing_images(generate, tmp_path):
    generate("a", "limit=2")
    with pytest.raises(UserError, match=r"seed: 0 -> 1; seeds_sha256.*another output folder"):
        generate("a", "limit=2", "seed=1")
    with pytest.raises(UserError, match=r"temperature: 1\.0 -> 0\.5"):
        generate("a", "limit=2", "sampling.temperature=0.5")
    (tmp_path / "b").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "photo.png")
    with pytest.raises(UserError, match=r"no manifest.json"):
        generate("b")
