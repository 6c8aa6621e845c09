"""The pipeline on a tiny saved model, and that the saved model is a stock one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

import tokenizer
import um3
from um3.core.errors import UserError
from um3.core.files import read_json, write_json
from um3.inference.decoder import FastDecoder
from um3.inference.pipeline import UM3Pipeline
from um3.inference.sampling_params import image_defaults
from um3.model.configuration import IMAGE_SAMPLING
from um3.model.language_model import load_model, save_model
from um3.model.vocabulary import OLD_KEYS, UnifiedVocabulary

PROMPTS = ["a red square", "a green disk on a blue square", "a disk"]


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_generate_is_prompt_major_and_decodes_its_own_codes(pipeline: UM3Pipeline) -> None:
    generated = pipeline.generate(PROMPTS, num_images=2, seed=3)
    assert generated.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2
    assert generated.images.shape == (6, 16, 16, 3) and generated.images.dtype == np.uint8
    assert generated.codes.shape == (6, 4) and generated.codes.dtype == torch.int64
    assert len(set(generated.seeds)) == 6 and len({tuple(codes) for codes in generated.codes.tolist()}) == 6
    assert all(logprob < 0 for logprob in generated.logprobs)
    with torch.no_grad():
        expected = pipeline.processor.images(pipeline.qlip.decode(generated.codes))
    assert np.array_equal(generated.images, expected)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_size_does_not_change_a_result(pipeline: UM3Pipeline, batch_size: int) -> None:
    options: dict[str, Any] = {"num_images": 2, "seed": 3, "top_p": 0.95, "guidance_scale": 2.0}
    whole, parts = (pipeline.generate(PROMPTS, batch_size=size, **options) for size in (64, batch_size))
    assert torch.equal(whole.codes, parts.codes) and np.array_equal(whole.images, parts.images)
    assert not torch.equal(whole.codes, pipeline.generate(PROMPTS, num_images=2, seed=4).codes)


def test_the_decoder_is_built_once_and_again_after_the_weights_changed(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[FastDecoder] = []
    build = FastDecoder.__init__
    monkeypatch.setattr(FastDecoder, "__init__", lambda self, model: builds.append(self) or build(self, model))
    pipeline = UM3Pipeline.from_pretrained(model_folder)
    first = pipeline.generate(PROMPTS, seed=1, batch_size=1)
    sampler = pipeline.sampler
    pipeline.caption(images(), batch_size=2)
    pipeline.interleave(["a red"], answer="image", max_new_tokens=2)
    pipeline.score(images(1), PROMPTS[:1])
    assert len(builds) == 1 and pipeline.sampler is sampler
    weights = {name: tensor.clone() for name, tensor in pipeline.model.state_dict().items()}
    pipeline.model.load_state_dict({name: tensor.flip(0) for name, tensor in weights.items()})
    assert not torch.equal(pipeline.generate(PROMPTS, seed=1).codes, first.codes) and len(builds) == 2
    pipeline.model = load_model(model_folder).model
    assert torch.equal(pipeline.generate(PROMPTS, seed=1).codes, first.codes) and len(builds) == 3
    pipeline.model.to(torch.bfloat16)
    pipeline.generate(PROMPTS[:1])
    assert len(builds) == 4


def test_white_space_around_a_prompt_changes_nothing(pipeline: UM3Pipeline) -> None:
    messy = pipeline.generate(["  a red\n square "], seed=1)
    assert torch.equal(messy.codes, pipeline.generate(["a red square"], seed=1).codes)


def test_captions_are_text_and_repeatable(pipeline: UM3Pipeline) -> None:
    captions = pipeline.caption(images(), max_new_tokens=8)
    assert len(captions) == 3 and not any("<|" in caption for caption in captions)
    assert captions == pipeline.caption(images(), max_new_tokens=8, batch_size=1)
    assert captions == pipeline.caption_codes(pipeline.encode(images()), max_new_tokens=8)
    hot = [pipeline.caption(images(), max_new_tokens=8, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]


def test_complete_continues_each_text_alone(pipeline: UM3Pipeline) -> None:
    texts = ["a red", "", "a green disk"]
    together = pipeline.complete(texts, max_new_tokens=6, seed=2)
    assert together == pipeline.complete(texts, max_new_tokens=6, seed=2, batch_size=1) and len(set(together)) > 1


def test_reconstruct_takes_arrays_and_pil_images_of_any_size(pipeline: UM3Pipeline) -> None:
    result = pipeline.reconstruct(images(5), batch_size=2)
    assert np.array_equal(result.originals, images(5))
    assert result.codes.shape == (5, 4) and result.images.shape == (5, 16, 16, 3)
    assert np.array_equal(np.asarray(result.pil_images[4]), result.images[4])
    with torch.no_grad():
        assert torch.equal(result.codes, pipeline.qlip.encode(pipeline.processor.pixels(images(5))))
    large = [Image.fromarray(images(1)[0]).resize((40, 30))]
    assert pipeline.reconstruct(large).images.shape == (1, 16, 16, 3)


def test_no_input_gives_no_output(pipeline: UM3Pipeline) -> None:
    assert pipeline.generate([]).images.shape == (0, 16, 16, 3)
    assert pipeline.complete([]) == [] and pipeline.caption(images(0)) == []


def test_the_config_stores_vocabulary_and_fingerprint_also_under_older_names(
    model_folder: Path, qlip_folder: Path, tmp_path: Path
) -> None:
    config = read_json(model_folder / "config.json")
    assert config["um3"]["tokenizer_fingerprint"] == tokenizer.load(qlip_folder)[0].fingerprint()
    ids = load_model(model_folder).ids
    assert UnifiedVocabulary.from_dict(config["um3"]) == ids
    shutil.copytree(model_folder, tmp_path / "old")
    config["um3"] |= {old_name: config["um3"].pop(name) for name, old_name in OLD_KEYS.items()}
    write_json(tmp_path / "old/config.json", config)
    assert load_model(tmp_path / "old").ids == ids


def test_image_defaults_are_in_the_generation_config_and_change_no_stock_text(
    model_folder: Path, qlip_folder: Path, tmp_path: Path
) -> None:
    assert image_defaults(model_folder) == IMAGE_SAMPLING
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    values = read_json(folder / "generation_config.json")
    changed = {"temperature": 0.25, "guidance_scale": [4.0, 1.0]}
    write_json(folder / "generation_config.json", values | {"image_sampling": changed})
    assert image_defaults(folder) == IMAGE_SAMPLING | changed
    loaded = load_model(folder)
    shared: dict[str, Any] = {"text_tokenizer": loaded.text_tokenizer, "ids": loaded.ids, "qlip_folder": qlip_folder}
    save_model(tmp_path / "again", model=loaded.model, **shared)
    assert image_defaults(tmp_path / "again") == IMAGE_SAMPLING | changed
    del values["image_sampling"]
    texts = [loaded.model.generate(torch.tensor([[0, 30, 31]]), max_new_tokens=8).tolist()]  # type: ignore[operator]
    write_json(folder / "generation_config.json", values)
    stock: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert texts == [stock.generate(torch.tensor([[0, 30, 31]]), max_new_tokens=8).tolist()]
    assert image_defaults(folder) == IMAGE_SAMPLING


@pytest.mark.parametrize("options", [{"warmth": 1}, {"temperature": "hot"}, {"top_k": 0.5}, [1]])
def test_invalid_image_defaults_name_the_file_and_the_key(options: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "generation_config.json", {"image_sampling": options})
    with pytest.raises(UserError, match=r"generation_config.json.*'image_sampling'.*" + str(next(iter(options)))):
        image_defaults(tmp_path)


def test_a_sampling_file_of_an_older_version_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "sampling.json", {"temperature": 1.0})
    with pytest.raises(UserError, match=r"sampling.json .*'image_sampling' in .*generation_config.json"):
        image_defaults(tmp_path)


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


def test_the_package_exports_the_pipeline_without_importing_torch() -> None:
    assert um3.UM3Pipeline is UM3Pipeline
    script = "import sys, um3; assert um3.__version__ and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_saving_keeps_trained_values(model_folder: Path, qlip_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(model_folder)
    for parameter in loaded.model.parameters():
        parameter.data.add_(0.125)
    state = {name: tensor + 1 for name, tensor in loaded.model.state_dict().items()}
    shared: dict[str, Any] = {"text_tokenizer": loaded.text_tokenizer, "ids": loaded.ids, "qlip_folder": qlip_folder}
    save_model(tmp_path / "own", model=loaded.model, **shared)
    save_model(tmp_path / "given", model=loaded.model, state_dict=state, **shared)
    for folder, offset in (("own", 0.0), ("given", 1.0)):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(again[name], tensor + offset) for name, tensor in loaded.model.state_dict().items())


def test_another_visual_tokenizer_is_refused_with_both_fingerprints(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    qlip, _ = tokenizer.load(model_folder / "qlip")
    right = qlip.fingerprint()
    next(qlip.parameters()).data.add_(1.0)
    qlip.save_pretrained(tmp_path / "model" / "qlip")
    with pytest.raises(UserError, match=f"{right}.*{qlip.fingerprint()}"):
        UM3Pipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json"], "run make demo or pass --model"),
        (["tokenizer.json", "tokenizer_config.json"], "no text tokenizer with .*begin_of_image"),
        (["tokenizer.json"], "no text tokenizer with .*begin_of_image"),
        (["qlip/config.json"], "lacks its visual tokenizer"),
        (["qlip/model.safetensors"], "cannot load a QLIP tokenizer"),
        (["model.safetensors"], r"cannot load .*model\.safetensors"),
    ],
)
def test_an_incomplete_folder_is_a_one_line_error(
    files: list[str], message: str, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    for name in files:
        (tmp_path / "model" / name).unlink()
    with pytest.raises(UserError, match=message) as caught:
        UM3Pipeline.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_a_um3_is_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "plain")
    config = json.loads((model_folder / "config.json").read_text())
    del config["um3"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no 'um3' in its config"):
        UM3Pipeline.from_pretrained(tmp_path / "plain")


def test_a_hub_id_is_found_in_the_cache(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--somebody--um3"
    shutil.copytree(model_folder, cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipeline = UM3Pipeline.from_pretrained("somebody/um3")
    assert pipeline.name == "somebody/um3" and pipeline.generate(PROMPTS[:1]).images.shape == (1, 16, 16, 3)
    with pytest.raises(UserError, match="'somebody/else' is neither a local folder nor an accessible"):
        UM3Pipeline.from_pretrained("somebody/else")
