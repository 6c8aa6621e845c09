"""Seeds, ranking, regions and variations of the pipeline, and the metadata of an image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from um3.core.errors import UserError
from um3.inference.image_io import read_metadata, save_png
from um3.inference.pipeline import UM3Pipeline

PROMPTS = ["a red square", "a green disk on a blue square", "a disk"]
OPTIONS: dict[str, Any] = {"top_p": 0.95, "guidance_scale": (1.0, 3.0), "min_p": 0.001}


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def roomy(pipeline: UM3Pipeline, monkeypatch: pytest.MonkeyPatch) -> UM3Pipeline:
    """The pipeline with a longer context, for prompts of many bytes."""
    monkeypatch.setattr(pipeline.model.config, "max_position_embeddings", 512)
    return pipeline


@pytest.fixture
def ranking(pipeline: UM3Pipeline, monkeypatch: pytest.MonkeyPatch) -> UM3Pipeline:
    """The pipeline with a text tokenizer for QLIP's text tower, which has 40 entries."""

    def tokenize(captions: list[str], **options: Any) -> dict[str, torch.Tensor]:
        ids_BT = torch.full((len(captions), 9), 39)  # the last entry ends the text, as CLIP's does
        for index, caption in enumerate(captions):
            ids_BT[index, : len(caption[:8])] = torch.tensor([ord(letter) % 39 for letter in caption[-8:]])
        return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}

    monkeypatch.setattr(pipeline.processor, "_text_tokenizer", tokenize)
    return pipeline


def test_an_images_own_seed_generates_it_anywhere(pipeline: UM3Pipeline) -> None:
    whole = pipeline.generate(PROMPTS, num_images=2, seed=3, **OPTIONS)
    for index in range(6):
        alone = pipeline.generate([whole.prompts[index]], seeds=[whole.seeds[index]], **OPTIONS)
        assert torch.equal(alone.codes[0], whole.codes[index]) and alone.seeds == [whole.seeds[index]]
        assert alone.logprobs[0] == pytest.approx(whole.logprobs[index], rel=1e-4)
    prompts, seeds = ([values[index] for index in (5, 0, 3)] for values in (whole.prompts, whole.seeds))
    mixed = pipeline.generate(prompts, seeds=seeds, batch_size=2, **OPTIONS)  # type: ignore[arg-type]
    assert torch.equal(mixed.codes, whole.codes[[5, 0, 3]])


def test_texts_return_seeds_that_write_them_again(pipeline: UM3Pipeline) -> None:
    whole = pipeline.complete(PROMPTS, max_new_tokens=6, seed=2, temperature=1.5)
    assert len(whole.seeds) == len(whole.logprobs) == 3 and all(logprob < 0 for logprob in whole.logprobs)
    alone = pipeline.complete(PROMPTS[2], max_new_tokens=6, seeds=whole.seeds[2:], temperature=1.5)
    assert alone == whole[2:] and alone.logprobs == pytest.approx(whole.logprobs[2:], rel=1e-4)
    captions = pipeline.caption(images(), max_new_tokens=6, temperature=2.0, seed=1)
    again = pipeline.caption(images()[1:2], max_new_tokens=6, temperature=2.0, seeds=captions.seeds[1:2])
    assert again == captions[1:2]


def test_best_of_keeps_the_images_that_qlip_ranks_highest(ranking: UM3Pipeline) -> None:
    every = ranking.generate(PROMPTS, num_images=5, seed=1)
    similarities = torch.tensor(ranking.similarity(every.images, every.prompts, batch_size=4)).view(3, 5)
    best = ranking.generate(PROMPTS, num_images=2, best_of=5, seed=1)
    top = similarities.topk(2, dim=1)
    assert best.similarities == pytest.approx(top.values.flatten().tolist(), abs=1e-5)
    chosen = (top.indices + 5 * torch.arange(3)[:, None]).flatten().tolist()
    assert torch.equal(best.codes, every.codes[chosen]) and np.array_equal(best.images, every.images[chosen])
    assert best.seeds == [every.seeds[index] for index in chosen]
    assert best.prompts == [every.prompts[index] for index in chosen] and best.settings["best_of"] == 5
    assert best.metadata(1)["similarity"] == best.similarities[1]  # type: ignore[index]


def test_ranking_without_a_text_tokenizer_is_refused_before_sampling(
    pipeline: UM3Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no text tokenizer files"):
        pipeline.generate(PROMPTS, best_of=4)
    assert "generate" not in capsys.readouterr().err
    assert pipeline.score(images(1), PROMPTS[:1]).similarities is None


def test_scores_of_pairs(ranking: UM3Pipeline) -> None:
    scores, alone = ranking.score(images(), PROMPTS), ranking.score(images()[1:2], PROMPTS[1])
    for name in ("text_logprobs", "image_logprobs"):
        values = getattr(scores, name)
        assert len(values) == 3 and max(values) < 0
        assert getattr(alone, name) == pytest.approx(values[1:2], rel=1e-4)
    assert scores.similarities == pytest.approx(ranking.similarity(images(), PROMPTS), abs=1e-5)


def test_inpainting_keeps_the_codes_outside_the_region(pipeline: UM3Pipeline) -> None:
    before = pipeline.encode(images())
    result = pipeline.inpaint(images(), PROMPTS, redraw=(0.5, 0.0, 1.0, 0.5), num_images=2, seed=4)
    assert torch.equal(result.codes[:, [0, 2, 3]], before.repeat_interleave(2, dim=0)[:, [0, 2, 3]])
    assert len(set(result.codes[:, 1].tolist())) > 2 and result.settings["redrawn_patches"] == [1]
    mask = np.array([[False, True], [False, False]])
    assert torch.equal(pipeline.inpaint(images(), PROMPTS, redraw=mask, num_images=2, seed=4).codes, result.codes)


def test_variations_keep_a_share_of_the_patches(roomy: UM3Pipeline) -> None:
    before = roomy.encode(images(1))
    varied = roomy.vary(images(1), PROMPTS[:1], num_images=40, strength=0.25, seed=5)
    kept = (varied.codes == before).float()
    assert 0.6 < float(kept.mean()) < 0.9 and 0 < len({tuple(row) for row in kept.tolist()}) <= 16
    again = roomy.vary(images(1), PROMPTS[:1], strength=0.25, seeds=varied.seeds[7:8])
    assert torch.equal(again.codes[0], varied.codes[7]) and varied.settings["strength"] == 0.25
    assert roomy.vary(images(), seed=1).prompts == roomy.caption(images())


def test_the_metadata_of_a_png_generates_the_image_again(pipeline: UM3Pipeline, tmp_path: Path) -> None:
    generated = pipeline.generate(["a red square 🟥"], num_images=2, seed=9, **OPTIONS)
    save_png(generated.pil_images[1], tmp_path / "a.png")
    metadata = read_metadata(tmp_path / "a.png")
    assert metadata == generated.metadata(1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), generated.images[1])
    options: Any = {name: metadata[name] for name in ("temperature", "top_p", "top_k", "min_p", "guidance_scale")}
    again = pipeline.generate([metadata["prompt"]], seeds=[metadata["seed"]], **options)
    assert again.codes[0].tolist() == metadata["codes"] and metadata["model"] == pipeline.name != ""
    save_png(generated.images[0], tmp_path / "b.png")
    for name in ("b.png", "none.png"):
        with pytest.raises(UserError, match=f"{name} is not a PNG"):
            read_metadata(tmp_path / name)


def test_any_text_is_a_prompt(roomy: UM3Pipeline) -> None:
    texts = [
        "a 🟥 👩🏽‍🚀 family",
        "مربع أحمر فوق دائرة",
        "ריבוע אדום",
        "a\u202eder\u202c square",
        "\x00 a disk",
        "<|begin_of_image|>",
    ]
    generated = roomy.generate(texts, seed=1)
    assert len({tuple(codes) for codes in generated.codes.tolist()}) == len(texts)
    assert len(roomy.complete(texts, max_new_tokens=3)) == len(texts)


@pytest.mark.parametrize(
    ("method", "arguments", "options", "message"),
    [
        ("generate", [["a disk", "  "]], {}, "prompt 2 is empty"),
        ("generate", [["a disk", "word " * 10_000]], {}, r"prompt 2 of \S+ tokens leaves no room .* shorten"),
        ("generate", [[3]], {}, "prompt 1 is of type int"),
        ("generate", [["\ud83d"]], {}, "half a surrogate pair"),
        ("generate", [["a disk"]], {"num_images": 0}, "num_images is 0"),
        ("generate", [["a disk"]], {"num_images": 10**12}, "images in one call"),
        ("generate", [["a disk"]], {"num_images": 3, "best_of": 2}, "best_of=2 .* num_images=3"),
        ("generate", [["a disk"]], {"batch_size": 0}, "batch_size is 0"),
        ("generate", [["a disk"]], {"seeds": [1, 2]}, "2 seeds for 1 results"),
        ("generate", [["a disk"]], {"seeds": [-1]}, "seed -1 is outside"),
        ("generate", [["a disk"]], {"guidance_scale": 1e9}, "guidance scale 1000000000.0 is outside"),
        ("complete", [["a"]], {"max_new_tokens": 10**12}, "no room for 1,000,000,000,000 more"),
        ("complete", [["a"]], {"guidance_scale": 2.0}, "guidance_scale"),
        ("inpaint", [images(1), ["a"]], {"redraw": (0.5, 0, 0.5, 1)}, "left, top, right, bottom"),
        ("inpaint", [images(1), ["a"]], {"redraw": np.zeros((2, 2), bool)}, "no patch"),
        ("inpaint", [images(1), ["a"]], {"redraw": np.ones((3, 2), bool)}, r"must be bool \(2, 2\)"),
        ("inpaint", [images(2), ["a"]], {"redraw": (0, 0, 1, 1)}, "2 images and 1 texts"),
        ("score", [images(3), ["a", "b"]], {}, "3 images and 2 texts"),
        ("vary", [images(1), ["a"]], {"strength": 0}, "strength 0"),
    ],
)
def test_invalid_input_is_a_one_line_error(
    pipeline: UM3Pipeline, method: str, arguments: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        getattr(pipeline, method)(*arguments, **options)
    assert "\n" not in str(caught.value)
