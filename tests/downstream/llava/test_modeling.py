"""LLaVA on QLIP: built of parts, saved, loaded by transformers in a fresh process, asked."""

import json

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_vlms import HFMultimodalLM
from PIL import Image
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from downstream.llava import modeling
from downstream.llava.modeling import load_llava, save_options, save_weights
from downstream.llava.template import Template
from tests.downstream.llava.conftest import build, save
from tests.helpers.processes import run_python
from tests.helpers.tiny_qlip import make_qlip
from tests.helpers.tiny_um3 import save_language_model
from tokenizer.modeling import load_qlip
from um3.core.errors import UserError
from um3.core.hub import read_weights
from um3.core.seeds import numpy_generator

QUESTIONS = ("what colour?", "how many red squares are there, and where?", "is it a disk?")


def photo(width: int, height: int, *, seed: int = 0) -> Image.Image:
    return Image.fromarray(numpy_generator(seed, "photo").integers(0, 256, (height, width, 3)).astype(np.uint8))


def ask(llava, questions, images, **options):
    model, processor = llava
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*[{"type": "image"}] * (image is not None), {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text, image in zip(questions, images, strict=True)
    ]
    images = [image for image in images if image is not None] or None
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        answers_BT = model.generate(**inputs, max_new_tokens=12, **options)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(answers_BT, skip_special_tokens=True)


@torch.no_grad()
def test_image_features_are_qlips_layer_behind_the_projector(parts):
    model, processor = build(parts, layer=1)
    qlip = load_qlip(parts[1])
    pixels_BCHW = processor(text="<image>", images=photo(31, 17), return_tensors="pt")["pixel_values"]
    features = model.model.get_image_features(pixels_BCHW).pooler_output[0]
    hidden_BTD = qlip.vision_features(pixels_BCHW)
    assert torch.equal(features, model.model.multi_modal_projector(hidden_BTD[:, 1:])[0])
    quantized = build(parts, layer=-1, quantized=True).model
    patches_BND = qlip.vision_model.quant_embed_post(
        qlip.vision_model.quantizer.codes_to_quantized(qlip.encode(pixels_BCHW))
    )
    features = quantized.model.get_image_features(pixels_BCHW).pooler_output[0]
    assert torch.equal(features, quantized.model.multi_modal_projector(patches_BND)[0])


def test_the_projector_starts_as_llavas(parts):
    """nn.Linear's default: uniform weights and biases; transformers' own is normal(0.02) with zero biases."""
    projector = build(parts).model.model.multi_modal_projector
    for layer in (projector.linear_1, projector.linear_2):
        bound = layer.in_features**-0.5
        assert layer.bias.abs().max() > 0 and bound / 2 < layer.weight.abs().max() <= bound


def test_pixels_are_padded_to_a_square_in_the_mean_colour(llava):
    image = photo(40, 20)
    pixels_CHW = llava.processor(text="<image>", images=image, return_tensors="pt")["pixel_values"][0]
    mean = tuple(int(255 * value) for value in llava.processor.image_processor.image_mean)
    assert mean == (122, 116, 104)
    square = Image.new("RGB", (40, 40), mean)
    square.paste(image, (0, 10))
    unit_HWC = np.asarray(square.resize((24, 24), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    processor = llava.processor.image_processor
    expected_HWC = (unit_HWC - processor.image_mean) / processor.image_std
    np.testing.assert_allclose(pixels_CHW.permute(1, 2, 0), expected_HWC, atol=1e-5)


def test_without_padding_the_centre_is_cropped(parts):
    crop = build(parts, pad_to_square=False).processor
    image, centre = photo(40, 24), photo(40, 24).crop((8, 0, 32, 24))
    pixels = [crop(text="<image>", images=each, return_tensors="pt")["pixel_values"] for each in (image, centre)]
    assert torch.equal(*pixels)


def test_a_tower_in_bf16_keeps_qlips_rotary_tables(parts):
    own = read_weights(parts[1])
    tower = build(parts, dtype=torch.bfloat16).model.model.vision_tower
    assert tower.dtype == torch.bfloat16 and dict(tower.named_buffers())
    for name, buffer in tower.named_buffers():
        assert torch.equal(buffer, own[name]), name


def test_lm_evals_hf_multimodal_gives_the_same_answers(llava, llava_folder):
    images = [photo(30, 20, seed=1), photo(20, 60, seed=2)]
    judge = HFMultimodalLM(pretrained=str(llava_folder), device="cpu", dtype="float32", batch_size=2, max_images=1)
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    requests = []
    for number, (question, image) in enumerate(zip(QUESTIONS[:2], images, strict=True)):
        prompt = judge.apply_chat_template([{"role": "user", "content": f"<image>\n{question}"}])
        requests.append(Instance("generate_until", {}, (prompt, options, {"visual": [image]}), number))
    answers = judge.generate_until(requests, disable_tqdm=True)
    assert answers == ask(llava, QUESTIONS[:2], images) and len(set(answers)) == 2


def test_text_logits_are_those_of_the_language_model(parts):
    """Two rows were added, and filled to 64: their logits come after the old ones."""
    model, processor = build(parts)
    language = AutoModelForCausalLM.from_pretrained(parts[0]).eval()
    ids_BT = processor(text="a red square", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits, own = model(input_ids=ids_BT).logits, language(ids_BT).logits
    assert logits.shape[-1] == 320 and torch.equal(logits[..., :280], own)
    rows = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[280:], rows[:280].mean(0).expand(40, -1))


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen3", False), ("qwen3", True)])
def test_other_language_models(kind, tied, parts, tmp_path):
    language = save_language_model(tmp_path / "language", kind=kind, tie_word_embeddings=tied)
    llava = build((language, parts[1]))
    loaded = load_llava(save(tmp_path / "llava", llava))
    assert (loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight) == tied
    asked = (QUESTIONS[:1], [photo(20, 30)])
    assert ask(loaded, *asked) == ask(llava, *asked)


def test_a_batch_gives_the_answers_of_one_by_one(llava):
    images = [photo(30, 20, seed=1), None, photo(20, 60, seed=2)]
    batch = ask(llava, QUESTIONS, images)
    assert batch == [ask(llava, [question], [image])[0] for question, image in zip(QUESTIONS, images, strict=True)]
    assert len(set(batch)) == 3


def test_training_ids_are_those_of_the_processor(llava):
    tokenizer = llava.processor.tokenizer
    template = Template(tokenizer, kind="v1", num_image_tokens=4, max_tokens=400)
    text, _ = template.text([("what?", "red"), ("and?", "a disk")], has_image=True)
    inputs = llava.processor(text=text, images=photo(20, 30), return_tensors="pt")
    sequence = template([("what?", "red"), ("and?", "a disk")], has_image=True)
    assert torch.equal(inputs["input_ids"][0], sequence.input_ids_T)
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)


FRESH = """
import tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor
model, report = AutoModelForImageTextToText.from_pretrained(FOLDER, output_loading_info=True)
AutoProcessor.from_pretrained(FOLDER)
print(type(model).__name__, *(len(report[f"{kind}_keys"]) for kind in ("missing", "unexpected", "mismatched")))
"""


def test_a_fresh_process_loads_the_folder_with_the_auto_classes(llava_folder):
    fresh = run_python(f"FOLDER = {str(llava_folder)!r}\n{FRESH}", HF_HUB_OFFLINE="1")
    assert fresh.stdout.split()[-4:] == ["LlavaForConditionalGeneration", "0", "0", "0"], fresh.stderr


def test_saved_names_are_those_of_transformers(llava, llava_folder, tmp_path):
    llava.model.save_pretrained(tmp_path)
    assert {name: tensor.shape for name, tensor in read_weights(tmp_path).items()} == {
        name: tensor.shape for name, tensor in read_weights(llava_folder).items()
    }


def test_shards_and_another_dtype(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling, "SHARD_BYTES", 20_000)
    llava = build(parts)
    folder = save(tmp_path, llava, dtype=torch.bfloat16)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2 and not list(folder.glob("*.partial"))
    kinds = {tensor.dtype for name, tensor in read_weights(folder).items() if ".freqs_" not in name}
    assert kinds == {torch.bfloat16} and json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_llava(folder)
    assert loaded.model.dtype == torch.bfloat16
    for name, tensor in llava.model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), tensor.bfloat16()), name
    assert ask(loaded, QUESTIONS[:1], [photo(20, 30)])


def test_generation_settings_of_the_base_do_not_stop_the_save(llava_folder):
    settings = json.loads((llava_folder / "generation_config.json").read_text())
    assert "temperature" not in settings and settings["eos_token_id"] == 1 and not settings.get("do_sample")


def test_the_licence_of_the_tower_stays_with_the_model(parts, tmp_path):
    qlip = load_qlip(parts[1])
    qlip.config.weights_license = "not for sale"
    qlip.save_pretrained(tmp_path / "qlip")
    llava = build((parts[0], tmp_path / "qlip"))
    save_options(tmp_path, llava, dtype=torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["weights_license"] == "not for sale"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, "vision_feature_layer=0"),
        ({"layer": -4}, r"vision_feature_layer=-4.*1 layers"),
        ({"layer": -2, "quantized": True}, "vision_feature_layer=-1, not -2"),
    ],
)
def test_layers_that_cannot_be_used(parts, options, message):
    with pytest.raises(UserError, match=message):
        build(parts, **options)


def test_folders_that_cannot_be_used(parts, llava_folder, tmp_path):
    with pytest.raises(UserError, match="language model"):
        build((tmp_path, parts[1]))
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="GPT2LMHeadModel; use a Llama or Qwen"):
        build((tmp_path, parts[1]))
    with pytest.raises(UserError, match="QLIP"):
        build((parts[0], parts[0]))
    with pytest.raises(UserError, match="LLaVA model"):
        load_llava(parts[0])
    folder = save(tmp_path / "llava", build(parts))
    config = json.loads((folder / "config.json").read_text())
    for key, value in (("vision_feature_layer", [-2]), ("vision_feature_select_strategy", "full")):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=f"{key}={value!r}".replace("[", r"\[")):
            load_llava(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = read_weights(folder) | {"multi_modal_projector.linear_1.weight": torch.zeros(32, 24)}
    save_weights(folder, tensors.items(), dtype=torch.float32)
    with pytest.raises(UserError, match=r"other shapes.*multi_modal_projector\.linear_1\.weight"):
        load_llava(folder)


def test_the_number_of_image_tokens_is_that_of_the_patches(parts, tmp_path):
    other = make_qlip(tmp_path, image_size=36)
    model, processor = build((parts[0], other))
    ids_BT = processor(text="<image>", images=photo(20, 30), return_tensors="pt")["input_ids"]
    assert model.config.image_seq_length == 9 == (ids_BT == model.config.image_token_id).sum()
