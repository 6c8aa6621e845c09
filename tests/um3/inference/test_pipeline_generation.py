"""Seeds, ranking, regions and variations of the pipeline, and what a picture says of itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from um3.core.errors import UserError
from um3.inference.image_io import read_metadata, save_png
from um3.inference.pipeline import UM3Pipeline
from um3.model.text_tokenizer import train_text_tokenizer

PROMPTS = ["a red square", "a green disk on a blue square", "a disk"]
OPTIONS = {"top_p": 0.95, "guidance_scale": (1.0, 3.0), "min_p": 0.001}


def pictures(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def roomy(pipeline: UM3Pipeline, monkeypatch: pytest.MonkeyPatch) -> UM3Pipeline:
    """The pipeline with a context for prompts of many bytes."""
    monkeypatch.setattr(pipeline.model.config, "max_position_embeddings", 512)
    return pipeline


@pytest.fixture
def seeing(pipeline: UM3Pipeline, monkeypatch: pytest.MonkeyPatch) -> UM3Pipeline:
    """The pipeline with a text tokenizer for QLIP's own text tower (40 entries)."""
    words = train_text_tokenizer(PROMPTS, vocab_size=300)
    small = {"input_ids": 40}

    class Words:
        """Ids below the tower's vocabulary; the last one ends the text, as CLIP's does."""

        def __call__(self, captions: list[str], **options: object) -> dict[str, torch.Tensor]:
            rows = [[each % (small["input_ids"] - 1) for each in words(text)["input_ids"]][:8] for text in captions]
            longest = max(map(len, rows)) + 1
            ids = torch.full((len(rows), longest), small["input_ids"] - 1)
            for row, tokens in zip(ids, rows, strict=True):
                row[: len(tokens)] = torch.tensor(tokens)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    monkeypatch.setattr(pipeline.processor, "_text_tokenizer", Words())
    return pipeline


def test_an_images_own_seed_draws_it_anywhere(pipeline: UM3Pipeline) -> None:
    whole = pipeline.generate(PROMPTS, num_images=2, seed=3, **OPTIONS)  # type: ignore[arg-type]
    for index in range(6):
        prompt, seed = whole.prompts[index], whole.seeds[index]
        alone = pipeline.generate([prompt], seeds=[seed], **OPTIONS)  # type: ignore[arg-type]
        assert torch.equal(alone.codes[0], whole.codes[index]) and alone.seeds == [seed]
        assert alone.logprobs[0] == pytest.approx(whole.logprobs[index], rel=1e-4)
    order = [5, 0, 3]
    mixed = pipeline.generate(
        [whole.prompts[index] for index in order], seeds=[whole.seeds[index] for index in order], batch_size=2,
        **OPTIONS,  # type: ignore[arg-type]
    )  # fmt: skip
    assert torch.equal(mixed.codes, whole.codes[order])


def test_texts_carry_seeds_that_write_them_again(pipeline: UM3Pipeline) -> None:
    whole = pipeline.complete(PROMPTS, max_new_tokens=6, seed=2, temperature=1.5)
    assert len(whole.seeds) == len(whole.logprobs) == 3 and all(each < 0 for each in whole.logprobs)
    alone = pipeline.complete(PROMPTS[2], max_new_tokens=6, seeds=whole.seeds[2:], temperature=1.5)
    assert alone == whole[2:] and alone.logprobs == pytest.approx(whole.logprobs[2:], rel=1e-4)
    captions = pipeline.caption(pictures(), max_new_tokens=6, temperature=2.0, seed=1)
    again = pipeline.caption(pictures()[1:2], max_new_tokens=6, temperature=2.0, seeds=captions.seeds[1:2])
    assert again == captions[1:2]


def test_best_of_keeps_what_qlips_towers_rank_highest(seeing: UM3Pipeline) -> None:
    every = seeing.generate(PROMPTS, num_images=5, seed=1)
    fits = torch.tensor(seeing.fits(every.images, every.prompts, batch_size=4)).view(3, 5)
    best = seeing.generate(PROMPTS, num_images=2, best_of=5, seed=1)
    top = fits.topk(2, dim=1)
    assert best.fits == pytest.approx(top.values.flatten().tolist(), abs=1e-5)
    chosen = (top.indices + 5 * torch.arange(3)[:, None]).flatten().tolist()
    assert torch.equal(best.codes, every.codes[chosen]) and np.array_equal(best.images, every.images[chosen])
    assert best.seeds == [every.seeds[index] for index in chosen]
    assert best.prompts == [every.prompts[index] for index in chosen] and best.settings["best_of"] == 5
    with pytest.raises(UserError, match="best of 2 leaves no 3"):
        seeing.generate(PROMPTS, num_images=3, best_of=2)


def test_ranking_without_a_text_tokenizer_is_refused_before_drawing(
    pipeline: UM3Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no text tokenizer files"):
        pipeline.generate(PROMPTS, best_of=4)
    assert "draw" not in capsys.readouterr().err


def test_scores_of_pairs(seeing: UM3Pipeline) -> None:
    scores = seeing.score(pictures(), PROMPTS)
    assert len(scores.text_logprobs) == len(scores.image_logprobs) == 3
    assert all(each < 0 for each in [*scores.text_logprobs, *scores.image_logprobs])
    alone = seeing.score(pictures()[1:2], PROMPTS[1])
    assert alone.text_logprobs == pytest.approx(scores.text_logprobs[1:2], rel=1e-4)
    assert alone.image_logprobs == pytest.approx(scores.image_logprobs[1:2], rel=1e-4)
    assert scores.fits == pytest.approx(seeing.fits(pictures(), PROMPTS), abs=1e-5)
    with pytest.raises(UserError, match="3 pictures and 2 texts"):
        seeing.score(pictures(), PROMPTS[:2])


def test_without_qlips_text_tokenizer_pairs_have_no_cosine(pipeline: UM3Pipeline) -> None:
    assert pipeline.score(pictures(1), PROMPTS[:1]).fits is None


def test_inpainting_keeps_the_codes_outside_the_region(pipeline: UM3Pipeline) -> None:
    before = pipeline.encode(pictures())
    drawn = pipeline.inpaint(pictures(), PROMPTS, redraw=(0.5, 0.0, 1.0, 0.5), num_images=2, seed=4)
    assert torch.equal(drawn.codes[:, [0, 2, 3]], before.repeat_interleave(2, dim=0)[:, [0, 2, 3]])
    assert len(set(drawn.codes[:, 1].tolist())) > 2 and drawn.settings["redrawn_patches"] == [1]
    mask = np.array([[False, True], [False, False]])
    assert torch.equal(pipeline.inpaint(pictures(), PROMPTS, redraw=mask, num_images=2, seed=4).codes, drawn.codes)


def test_variations_keep_some_patches_and_say_which_share(pipeline: UM3Pipeline) -> None:
    before = pipeline.encode(pictures(1))
    varied = pipeline.vary(pictures(1), PROMPTS[:1], num_images=40, strength=0.25, seed=5)
    kept = (varied.codes == before).float()
    assert 0.6 < float(kept.mean()) < 0.9 and 0 < len({tuple(each) for each in kept.tolist()}) <= 16
    again = pipeline.vary(pictures(1), PROMPTS[:1], strength=0.25, seeds=varied.seeds[7:8])
    assert torch.equal(again.codes[0], varied.codes[7]) and varied.settings["strength"] == 0.25
    with pytest.raises(UserError, match="strength 0"):
        pipeline.vary(pictures(1), PROMPTS[:1], strength=0)


def test_variations_without_prompts_take_the_models_captions(roomy: UM3Pipeline) -> None:
    assert roomy.vary(pictures(), seed=1).prompts == roomy.caption(pictures())


def test_a_png_says_how_it_was_drawn_and_that_draws_it_again(pipeline: UM3Pipeline, tmp_path: Path) -> None:
    drawn = pipeline.generate(["a red square 🟥"], num_images=2, seed=9, **OPTIONS)  # type: ignore[arg-type]
    save_png(drawn.pictures[1], tmp_path / "a.png")
    found = read_metadata(tmp_path / "a.png")
    assert found == drawn.metadata(1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), drawn.images[1])
    options = {name: found[name] for name in ("temperature", "top_p", "top_k", "min_p", "guidance_scale")}
    again = pipeline.generate([found["prompt"]], seeds=[found["seed"]], **options)  # type: ignore[arg-type]
    assert again.codes[0].tolist() == found["codes"] and found["model"] == pipeline.name != ""
    save_png(drawn.images[0], tmp_path / "b.png")
    for name in ("b.png", "none.png"):
        with pytest.raises(UserError, match=f"{name} is no PNG with what UM3 writes"):
            read_metadata(tmp_path / name)


TEXTS_OF_ALL_KINDS = (
    "a 🟥 👩🏽‍🚀 family",
    "مربع أحمر فوق دائرة",
    "ריבוע אדום",
    "a\u202eder\u202c square",
    "\x00 a disk",
    "<|begin_of_image|> eos",
)


def test_any_text_is_a_prompt(roomy: UM3Pipeline) -> None:
    drawn = roomy.generate(TEXTS_OF_ALL_KINDS, seed=1)
    assert len({tuple(each) for each in drawn.codes.tolist()}) == len(TEXTS_OF_ALL_KINDS)
    assert len(roomy.complete(TEXTS_OF_ALL_KINDS, max_new_tokens=3)) == len(TEXTS_OF_ALL_KINDS)


def test_bad_input_has_one_clear_answer_each(pipeline: UM3Pipeline) -> None:
    for call, message in (
        (lambda: pipeline.generate([""]), "prompt 1 is empty"),
        (lambda: pipeline.generate(["a disk", "word " * 10_000]), r"prompt 2 of \S+ tokens leaves no room .* shorten"),
        (lambda: pipeline.generate([3]), "prompt 1 is a int, not a text"),  # type: ignore[list-item]
        (lambda: pipeline.generate(["\ud83d"]), "half a surrogate pair"),
        (lambda: pipeline.generate(["a disk"], num_images=10**12), "images in one call"),
        (lambda: pipeline.generate(["a disk"], batch_size=0), "batch size is 0"),
        (lambda: pipeline.generate(["a disk"], seeds=[1, 2]), "2 seeds for 1 results"),
        (lambda: pipeline.generate(["a disk"], seeds=[-1]), "seed -1 is outside"),
        (lambda: pipeline.generate(["a disk"], temperature=float("nan")), "temperature nan"),
        (lambda: pipeline.generate(["a disk"], guidance_scale=1e9), "guidance scale 1000000000.0 is outside"),
        (lambda: pipeline.complete(["a"], max_new_tokens=10**12), "leaves no room for 1,000,000,000,000 more"),
        (lambda: pipeline.complete(["a"], guidance_scale=2.0), "guidance is for drawing"),  # type: ignore[call-arg]
        (lambda: pipeline.inpaint(pictures(1), ["a"], redraw=(0.5, 0, 0.5, 1)), "is no .left, top, right, bottom"),
        (lambda: pipeline.inpaint(pictures(1), ["a"], redraw=np.zeros((2, 2), bool)), "holds no patch"),
        (lambda: pipeline.inpaint(pictures(1), ["a"], redraw=np.ones((3, 2), bool)), r"must be bool \(2, 2\)"),
        (lambda: pipeline.inpaint(pictures(2), ["a"], redraw=(0, 0, 1, 1)), "2 pictures and 1 texts"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
