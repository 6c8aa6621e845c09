"""The pipeline end to end on a tiny saved model, and that the saved model is a stock one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

import tokenizer
from um3.core.errors import UserError
from um3.inference.pipeline import UM3Pipeline
from um3.model.language_model import load_model
from um3.model.vocabulary import UnifiedVocabulary

PROMPTS = ["a red square", "a green disk on a blue square", "a disk"]


def pictures(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_generate_is_prompt_major_and_decodes_its_own_codes(pipeline: UM3Pipeline) -> None:
    generated = pipeline.generate(PROMPTS, num_images=2, seed=3)
    assert generated.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2
    assert generated.images.shape == (6, 16, 16, 3) and generated.images.dtype == np.uint8
    assert generated.codes.shape == (6, 4) and generated.codes.dtype == torch.int64
    assert len(set(generated.seeds)) == 6 and len({tuple(each) for each in generated.codes.tolist()}) == 6
    assert all(logprob < 0 for logprob in generated.logprobs)
    with torch.no_grad():
        expected = pipeline.processor.images(pipeline.qlip.decode(generated.codes))
    assert np.array_equal(generated.images, expected)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_seed_decides_whatever_the_batch(pipeline: UM3Pipeline, batch_size: int) -> None:
    options = {"num_images": 2, "seed": 3, "top_p": 0.95, "guidance_scale": 2.0}
    whole = pipeline.generate(PROMPTS, **options)  # type: ignore[arg-type]
    parts = pipeline.generate(PROMPTS, batch_size=batch_size, **options)  # type: ignore[arg-type]
    assert torch.equal(whole.codes, parts.codes) and np.array_equal(whole.images, parts.images)
    assert not torch.equal(whole.codes, pipeline.generate(PROMPTS, num_images=2, seed=4).codes)


def test_white_space_around_a_prompt_changes_nothing(pipeline: UM3Pipeline) -> None:
    messy = pipeline.generate(["  a red\n square "], seed=1)
    assert torch.equal(messy.codes, pipeline.generate(["a red square"], seed=1).codes)


def test_captions_are_text_and_repeatable(pipeline: UM3Pipeline) -> None:
    captions = pipeline.caption(pictures(), max_new_tokens=8)
    assert len(captions) == 3
    assert captions == pipeline.caption(pictures(), max_new_tokens=8, batch_size=1)
    assert captions == pipeline.caption_codes(pipeline.encode(pictures()), max_new_tokens=8)
    hot = [pipeline.caption(pictures(), max_new_tokens=8, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]
    assert not any("<|" in caption for caption in captions)


def test_complete_continues_each_text_alone(pipeline: UM3Pipeline) -> None:
    texts = ["a red", "", "a green disk"]
    together = pipeline.complete(texts, max_new_tokens=6, seed=2)
    assert together == pipeline.complete(texts, max_new_tokens=6, seed=2, batch_size=1)
    assert len(set(together)) > 1


def test_reconstruct_takes_arrays_and_pictures_of_any_size(pipeline: UM3Pipeline) -> None:
    reconstruction = pipeline.reconstruct(pictures(5), batch_size=2)
    assert np.array_equal(reconstruction.originals, pictures(5))
    assert reconstruction.codes.shape == (5, 4) and reconstruction.images.shape == (5, 16, 16, 3)
    with torch.no_grad():
        assert torch.equal(reconstruction.codes, pipeline.qlip.encode(pipeline.processor.pixels(pictures(5))))
    large = [Image.fromarray(pictures(1)[0]).resize((40, 30))]
    assert pipeline.reconstruct(large).images.shape == (1, 16, 16, 3)


def test_no_input_gives_no_output(pipeline: UM3Pipeline) -> None:
    assert pipeline.generate([]).images.shape == (0, 16, 16, 3)
    assert pipeline.complete([]) == [] and pipeline.caption(pictures(0)) == []


def test_the_config_carries_ids_and_fingerprint(model_folder: Path, qlip_folder: Path) -> None:
    stored = json.loads((model_folder / "config.json").read_text())["um3"]
    qlip, _ = tokenizer.load(qlip_folder)
    assert stored["tokenizer_fingerprint"] == qlip.fingerprint()
    assert UnifiedVocabulary.from_dict(stored) == load_model(model_folder).ids


@pytest.mark.slow
def test_stock_transformers_loads_the_folder_without_our_code(model_folder: Path, tmp_path: Path) -> None:
    model = load_model(model_folder).model
    assert isinstance(model, Qwen3ForCausalLM)
    input_ids = [[0, 30, 31, 3, 300, 500, 700]]
    with torch.no_grad():
        expected = model(torch.tensor(input_ids)).logits
    script = f"""
import sys, torch
torch.set_num_threads({torch.get_num_threads()})
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(model_folder)!r})
AutoTokenizer.from_pretrained({str(model_folder)!r})
with torch.no_grad():
    torch.save(model(torch.tensor({input_ids})).logits, {str(tmp_path / "logits.pt")!r})
assert not {{"um3", "tokenizer"}} & set(sys.modules), "our code was imported"
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_a_round_trip_keeps_trained_values(model_folder: Path, qlip_folder: Path, tmp_path: Path) -> None:
    from um3.model.language_model import save_model

    loaded = load_model(model_folder)
    for parameter in loaded.model.parameters():
        parameter.data.add_(0.125)
    state = {name: tensor + 1 for name, tensor in loaded.model.state_dict().items()}
    shared = {"text_tokenizer": loaded.text_tokenizer, "ids": loaded.ids, "qlip_folder": qlip_folder}
    save_model(tmp_path / "own", model=loaded.model, **shared)  # type: ignore[arg-type]
    save_model(tmp_path / "given", model=loaded.model, state_dict=state, **shared)  # type: ignore[arg-type]
    for folder, offset in (("own", 0.0), ("given", 1.0)):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(again[name], tensor + offset) for name, tensor in loaded.model.state_dict().items())


def test_mistakes_are_user_errors(pipeline: UM3Pipeline, model_folder: Path, qlip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run make demo or pass --model"):
        UM3Pipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="prompt 2 is empty"):
        pipeline.generate(["a disk", "  "])
    with pytest.raises(UserError, match="num images is 0"):
        pipeline.generate(["a disk"], num_images=0)
    with pytest.raises(UserError, match="shorten the prompt"):
        pipeline.generate(["red " * 100])
    pipeline.model.config.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    del config["um3"]
    shutil.copytree(model_folder, tmp_path / "plain", dirs_exist_ok=True)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no 'um3' in its config"):
        UM3Pipeline.from_pretrained(tmp_path / "plain")


def test_another_visual_tokenizer_is_refused_with_both_fingerprints(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    qlip, _ = tokenizer.load(model_folder / "qlip")
    right = qlip.fingerprint()
    next(qlip.parameters()).data.add_(1.0)
    qlip.save_pretrained(tmp_path / "model" / "qlip")
    with pytest.raises(UserError, match=f"{right}.*{qlip.fingerprint()}"):
        UM3Pipeline.from_pretrained(tmp_path / "model")


def test_a_folder_with_a_part_missing_says_which(model_folder: Path, tmp_path: Path) -> None:
    cases = (
        (["tokenizer.json", "tokenizer_config.json"], "has no text tokenizer with .*begin_of_image"),
        (["tokenizer.json"], "has no text tokenizer with .*begin_of_image"),
        (["qlip/config.json"], "lacks its visual tokenizer"),
        (["qlip/model.safetensors"], "cannot load a QLIP tokenizer"),
        (["model.safetensors"], r"cannot load .*model\.safetensors"),
    )
    for index, (names, message) in enumerate(cases):
        folder = tmp_path / str(index)
        shutil.copytree(model_folder, folder)
        for name in names:
            (folder / name).unlink()
        with pytest.raises(UserError, match=message) as caught:
            UM3Pipeline.from_pretrained(folder)
        assert "\n" not in str(caught.value)


def test_a_hub_id_is_found_in_the_cache(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--somebody--um3"
    shutil.copytree(model_folder, cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipeline = UM3Pipeline.from_pretrained("somebody/um3")
    assert pipeline.name == "somebody/um3"
    assert torch.equal(
        pipeline.generate(PROMPTS, seed=1).codes,
        UM3Pipeline.from_pretrained(model_folder).generate(PROMPTS, seed=1).codes,
    )
    with pytest.raises(UserError, match="'somebody/else' is no folder, and the hub does not give it"):
        UM3Pipeline.from_pretrained("somebody/else")
