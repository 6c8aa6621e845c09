"""The pipeline on a tiny saved model: its results, seeds, regions and errors, and the folders that it loads."""

import shutil

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import AutoModelForCausalLM

import tokenizer
from tests.tokenizer.conftest import change_json
from um3.core.errors import UserError
from um3.core.files import read_json, write_json
from um3.inference.decoder import FastDecoder
from um3.inference.image_io import read_metadata, save_png
from um3.inference.pipeline import UM3Pipeline
from um3.inference.sampling_params import image_defaults
from um3.model.configuration import IMAGE_SAMPLING
from um3.model.language_model import load_model, save_model

OPTIONS = {"top_p": 0.95, "guidance_scale": (1.0, 3.0), "min_p": 0.001}
PROMPTS = ["a red square", "a green disk on a blue square", "a disk"]


def images(count=3):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_generate_is_prompt_major_and_decodes_its_own_codes(pipeline):
    generated = pipeline.generate(PROMPTS, num_images=2, seed=3)
    assert generated.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2
    assert generated.arrays.shape == (6, 16, 16, 3) and generated.arrays.dtype == np.uint8
    assert generated.codes.shape == (6, 4) and generated.codes.dtype == torch.int64
    assert len(set(generated.seeds)) == 6 and len({tuple(codes) for codes in generated.codes.tolist()}) == 6
    assert all(logprob < 0 for logprob in generated.logprobs)
    with torch.no_grad():
        expected = pipeline.processor.images(pipeline.qlip.decode(generated.codes))
    assert np.array_equal(generated.arrays, expected)


def test_the_decoder_is_built_once_and_again_after_the_weights_changed(model_folder, monkeypatch):
    builds = []
    build = FastDecoder.__init__
    monkeypatch.setattr(
        FastDecoder, "__init__", lambda self, *args, **depth: builds.append(self) or build(self, *args, **depth)
    )
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


def test_an_image_may_be_a_path(pipeline, tmp_path):
    first, path = Image.fromarray(images()[0]), tmp_path / "a.png"
    first.save(path)
    for one in (path, str(path), [path], first):
        assert torch.equal(pipeline.encode(one), pipeline.encode([first]))
    assert pipeline.reconstruct(path).arrays.shape == pipeline.reconstruct([first]).arrays.shape
    path.write_text("text")
    wrong_images = {"a.png.*no known image format": path, "image 2 is a int": [first, 3], "/no.png": "/no.png"}
    for names, wrong in wrong_images.items():
        with pytest.raises(UserError, match=names):
            pipeline.caption(wrong)


def test_a_pil_image_of_any_mode_is_what_its_file_is(pipeline, tmp_path):
    rgb = Image.fromarray(images(1)[0]).resize((24, 32))
    clear = rgb.convert("RGBA")
    clear.putalpha(rgb.convert("L"))
    several = [rgb, clear, rgb.convert("L"), rgb.convert("P"), clear.convert("LA"), rgb.convert("1")]
    paths = [tmp_path / f"{number}.png" for number in range(len(several))]
    for image, path in zip(several, paths, strict=True):
        image.save(path)
    assert torch.equal(pipeline.encode(several), pipeline.encode(paths))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    assert torch.equal(pipeline.encode(Image.open(tmp_path / "turned.jpg")), pipeline.encode(tmp_path / "turned.jpg"))
    with pytest.raises(UserError, match=r"image 1: unsupported pixels: .* convert it to 8-bit RGB"):
        pipeline.caption(rgb.convert("F"))
    (tmp_path / "cut.png").write_bytes(paths[0].read_bytes()[:200])
    with pytest.raises(UserError, match="image 1: cannot be decoded"):
        pipeline.caption(Image.open(tmp_path / "cut.png"))


def test_captions_are_text_and_repeatable(pipeline):
    captions = pipeline.caption(images(), max_new_tokens=8)
    assert len(captions) == 3 and not any("<|" in caption for caption in captions)
    assert captions == pipeline.caption(images(), max_new_tokens=8, batch_size=1)
    hot = [pipeline.caption(images(), max_new_tokens=8, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2]


def test_reconstruct_takes_arrays_and_pil_images_of_any_size(pipeline):
    result = pipeline.reconstruct(images(5), batch_size=2)
    assert np.array_equal(result.originals, images(5))
    assert result.codes.shape == (5, 4) and result.arrays.shape == (5, 16, 16, 3)
    assert np.array_equal(np.asarray(result.images[4]), result.arrays[4])
    with torch.no_grad():
        assert torch.equal(result.codes, pipeline.qlip.encode(pipeline.processor.pixels(images(5))))
    large = [Image.fromarray(images(1)[0]).resize((40, 30))]
    assert pipeline.reconstruct(large).arrays.shape == (1, 16, 16, 3)


def test_no_input_gives_no_output(pipeline):
    assert pipeline.generate([]).arrays.shape == (0, 16, 16, 3)
    assert pipeline.complete([]) == [] and pipeline.caption(images(0)) == []


def test_image_defaults_are_in_the_generation_config_and_change_no_stock_text(folder, qlip_folder, tmp_path):
    assert image_defaults(folder) == IMAGE_SAMPLING
    values = read_json(folder / "generation_config.json")
    changed = {"temperature": 0.25, "guidance_scale": [4.0, 1.0]}
    write_json(folder / "generation_config.json", values | {"image_sampling": changed})
    assert image_defaults(folder) == IMAGE_SAMPLING | changed
    loaded = load_model(folder)
    shared = {"text_tokenizer": loaded.text_tokenizer, "ids": loaded.ids, "visual_tokenizer": qlip_folder}
    save_model(tmp_path / "again", model=loaded.model, **shared)
    assert image_defaults(tmp_path / "again") == IMAGE_SAMPLING | changed
    del values["image_sampling"]
    texts = [loaded.model.generate(torch.tensor([[0, 30, 31]]), max_new_tokens=8).tolist()]
    write_json(folder / "generation_config.json", values)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert texts == [stock.generate(torch.tensor([[0, 30, 31]]), max_new_tokens=8).tolist()]
    assert image_defaults(folder) == IMAGE_SAMPLING


@pytest.mark.parametrize("options", [{"warmth": 1}, {"temperature": "hot"}, {"top_k": 0.5}, {"temperature": -1}, [1]])
def test_invalid_image_defaults_name_the_file_and_the_key(options, tmp_path):
    write_json(tmp_path / "generation_config.json", {"image_sampling": options})
    with pytest.raises(UserError, match=r"generation_config.json.*'image_sampling'.*" + str(next(iter(options)))):
        image_defaults(tmp_path)
    write_json(tmp_path / "sampling.json", {"temperature": 1.0})  # of an older version
    with pytest.raises(UserError, match=r"sampling.json .*'image_sampling' in .*generation_config.json"):
        image_defaults(tmp_path)


def test_given_tensors_are_saved_in_place_of_the_models(model_folder, qlip_folder, tmp_path):
    loaded = load_model(model_folder)
    state = {name: tensor + 1 for name, tensor in loaded.model.state_dict().items()}
    shared = {"text_tokenizer": loaded.text_tokenizer, "ids": loaded.ids, "visual_tokenizer": qlip_folder}
    save_model(tmp_path / "given", model=loaded.model, state_dict=state, **shared)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "given").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


def test_another_visual_tokenizer_is_refused_with_both_fingerprints(folder):
    qlip, _ = tokenizer.load(folder / "qlip")
    right = qlip.fingerprint()
    next(qlip.parameters()).data.add_(1.0)
    qlip.save_pretrained(folder / "qlip")
    with pytest.raises(UserError, match=f"{right}.*{qlip.fingerprint()}"):
        UM3Pipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no 'um3' in its config"),
        (["config.json"], "give the folder of a trained one"),
        (["tokenizer.json", "tokenizer_config.json"], "no text tokenizer at|no tokenizer.json"),
        (["tokenizer.json"], "no text tokenizer at|no tokenizer.json"),
        (["qlip/config.json"], "lacks its visual tokenizer"),
        (["model.safetensors"], r"cannot load .*model\.safetensors"),
    ],
)
def test_an_incomplete_folder_and_a_plain_model_are_one_line_errors(files, message, folder):
    for name in files:
        (folder / name).unlink()
    if not files:
        change_json(folder / "config.json", um3=None)
    with pytest.raises(UserError, match=message):
        UM3Pipeline.from_pretrained(folder)


def test_a_hub_id_is_found_in_the_cache(model_folder, tmp_path, monkeypatch):
    cache = tmp_path / "models--somebody--um3"
    shutil.copytree(model_folder, cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pipeline = UM3Pipeline.from_pretrained("somebody/um3")
    assert pipeline.name == "somebody/um3" and pipeline.generate(PROMPTS[:1]).arrays.shape == (1, 16, 16, 3)
    with pytest.raises(UserError, match="'somebody/else' is neither a local folder nor an accessible"):
        UM3Pipeline.from_pretrained("somebody/else")


@pytest.fixture
def ranking(pipeline, monkeypatch):
    """The pipeline with a text tokenizer for QLIP's text tower, which has 40 entries."""

    def tokenize(captions, **options):
        letters = [caption.rjust(8)[-8:] for caption in captions]  # the last entry ends the text, as CLIP's does
        ids_BT = torch.tensor([[*(ord(letter) % 39 for letter in text), 39] for text in letters])
        return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}

    monkeypatch.setattr(pipeline.processor, "_text_tokenizer", tokenize)
    return pipeline


def test_an_images_own_seed_generates_it_anywhere(pipeline):
    whole = pipeline.generate(PROMPTS, num_images=2, seed=3, **OPTIONS)
    for index in range(6):
        alone = pipeline.generate([whole.prompts[index]], seeds=[whole.seeds[index]], **OPTIONS)
        assert torch.equal(alone.codes[0], whole.codes[index]) and alone.seeds == [whole.seeds[index]]
        assert alone.logprobs[0] == pytest.approx(whole.logprobs[index], rel=1e-4)
    prompts, seeds = ([values[index] for index in (5, 0, 3)] for values in (whole.prompts, whole.seeds))
    mixed = pipeline.generate(prompts, seeds=seeds, batch_size=2, **OPTIONS)
    assert torch.equal(mixed.codes, whole.codes[[5, 0, 3]]) and np.array_equal(mixed.arrays, whole.arrays[[5, 0, 3]])
    assert not torch.equal(whole.codes, pipeline.generate(PROMPTS, num_images=2, seed=4, **OPTIONS).codes)


def test_texts_return_seeds_that_write_them_again(pipeline):
    whole = pipeline.complete([*PROMPTS[:1], "", *PROMPTS[2:]], max_new_tokens=6, seed=2, temperature=1.5)
    assert len(whole.seeds) == len(whole.logprobs) == len(set(whole)) == 3 and max(whole.logprobs) < 0
    alone = pipeline.complete(PROMPTS[2], max_new_tokens=6, seeds=whole.seeds[2:], temperature=1.5)
    assert alone == whole[2:] and alone.logprobs == pytest.approx(whole.logprobs[2:], rel=1e-4)
    captions = pipeline.caption(images(), max_new_tokens=6, temperature=2.0, seed=1)
    again = pipeline.caption(images()[1:2], max_new_tokens=6, temperature=2.0, seeds=captions.seeds[1:2])
    assert again == captions[1:2]


def test_best_of_keeps_the_images_that_qlip_ranks_highest(ranking):
    every = ranking.generate(PROMPTS, num_images=5, seed=1)
    similarities = torch.tensor(ranking.similarity(every.arrays, every.prompts)).view(3, 5)
    best = ranking.generate(PROMPTS, num_images=2, best_of=5, seed=1)
    top = similarities.topk(2, dim=1)
    assert best.similarities == pytest.approx(top.values.flatten().tolist(), abs=1e-5)
    chosen = (top.indices + 5 * torch.arange(3)[:, None]).flatten().tolist()
    assert torch.equal(best.codes, every.codes[chosen]) and np.array_equal(best.arrays, every.arrays[chosen])
    assert best.seeds == [every.seeds[index] for index in chosen]
    assert best.prompts == [every.prompts[index] for index in chosen] and best.settings["best_of"] == 5
    assert best.metadata(1)["similarity"] == best.similarities[1]


def test_ranking_without_a_text_tokenizer_is_refused_before_sampling(pipeline, capsys):
    with pytest.raises(UserError, match="no text tokenizer files"):
        pipeline.generate(PROMPTS, best_of=4)
    assert "generate" not in capsys.readouterr().err
    assert pipeline.score(images(1), PROMPTS[:1]).similarities is None


def test_scores_of_pairs(ranking):
    scores, alone = ranking.score(images(), PROMPTS), ranking.score(images()[1:2], PROMPTS[1])
    for name in ("text_logprobs", "image_logprobs"):
        values = getattr(scores, name)
        assert len(values) == 3 and max(values) < 0
        assert getattr(alone, name) == pytest.approx(values[1:2], rel=1e-4)
    assert scores.similarities == pytest.approx(ranking.similarity(images(), PROMPTS), abs=1e-5)


def test_a_prompt_is_compared_as_the_caption_of_its_image_and_as_a_text(ranking):
    prompt, codes_N = PROMPTS[1], ranking.encode(images()[1:2])[0]
    tokens = torch.tensor(ranking.text_tokenizer.encode(prompt, add_special_tokens=False))
    begin = torch.tensor([ranking.ids.bos_id])
    end = ranking.sampler.text_logprob(torch.cat([begin, tokens]), token_ids=tokens[:0])
    as_text = ranking.sampler.text_logprob(begin, token_ids=tokens) - end
    as_caption = ranking.score(images()[1:2], [prompt]).text_logprobs[0]
    expected = (as_caption - as_text) / len(tokens)
    assert ranking.prompt_log_ratio(prompt, codes_N=codes_N) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_metadata_counts_only_if_it_belongs_to_the_pixels(pipeline):
    generated = pipeline.generate(PROMPTS[:2], seed=1)
    first, second = generated.images
    encoded = pipeline.encode(generated.images)
    assert not torch.equal(encoded, generated.codes)  # otherwise this test shows nothing
    assert torch.equal(pipeline.known_codes([first, second]), generated.codes)
    second.info = first.info  # as after an edit by a program that keeps the text of a PNG
    assert torch.equal(pipeline.known_codes([first, second])[1], encoded[1])
    for damaged in ("{", "[]", '{"codes": [1]}', '{"codes": ["a", 0, 0, 0]}', '{"codes": [-1, 0, 0, 0]}'):
        second.info = {"um3": damaged}
        assert torch.equal(pipeline.known_codes([second])[0], encoded[1])


def test_inpainting_keeps_the_codes_outside_the_region(pipeline):
    before = pipeline.encode(images())
    result = pipeline.inpaint(images(), PROMPTS, redraw=(0.5, 0.0, 1.0, 0.5), num_images=2, seed=4)
    assert torch.equal(result.codes[:, [0, 2, 3]], before.repeat_interleave(2, dim=0)[:, [0, 2, 3]])
    assert len(set(result.codes[:, 1].tolist())) > 2 and result.settings["redrawn_patches"] == [1]
    mask = np.array([[False, True], [False, False]])
    assert torch.equal(pipeline.inpaint(images(), PROMPTS, redraw=mask, num_images=2, seed=4).codes, result.codes)


def test_variations_keep_a_share_of_the_patches(roomy):
    before = roomy.encode(images(1))
    varied = roomy.vary(images(1), PROMPTS[:1], num_images=40, strength=0.25, seed=5)
    kept = (varied.codes == before).float()
    assert 0.6 < float(kept.mean()) < 0.9 and 0 < len({tuple(row) for row in kept.tolist()}) <= 16
    again = roomy.vary(images(1), PROMPTS[:1], strength=0.25, seeds=varied.seeds[7:8])
    assert torch.equal(again.codes[0], varied.codes[7]) and varied.settings["strength"] == 0.25
    assert roomy.vary(images(), seed=1).prompts == roomy.caption(images())


def test_the_metadata_of_a_png_generates_the_image_again(pipeline, tmp_path):
    generated = pipeline.generate(["a red square 🟥"], num_images=2, seed=9, **OPTIONS)
    save_png(generated.images[1], tmp_path / "a.png")
    metadata = read_metadata(tmp_path / "a.png")
    assert metadata == generated.metadata(1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), generated.arrays[1])
    options = {name: metadata[name] for name in ("temperature", "top_p", "top_k", "min_p", "guidance_scale")}
    again = pipeline.generate([metadata["prompt"]], seeds=[metadata["seed"]], **options)
    assert again.codes[0].tolist() == metadata["codes"] and metadata["model"] == pipeline.name != ""
    save_png(generated.arrays[0], tmp_path / "b.png")
    for name in ("b.png", "none.png"):
        with pytest.raises(UserError, match=f"{name} is not a PNG"):
            read_metadata(tmp_path / name)


def test_any_text_is_a_prompt(roomy):
    texts = ["a 🟥 👩🏽‍🚀 family", "مربع أحمر فوق دائرة", "ריבוע אדום", "a\u202eder\u202c square", "\x00 a disk"]
    texts += ["<|begin_of_image|>", "half a pair \ud83d"]
    generated = roomy.generate(texts, seed=1)
    assert len({tuple(codes) for codes in generated.codes.tolist()}) == len(texts)
    assert generated.prompts == [*texts[:-1], "half a pair \ufffd"]
    assert roomy.interleave(["\ud83d"], answer="text", max_new_tokens=1) is not None
    assert len(roomy.complete(texts, max_new_tokens=3)) == len(texts)


@pytest.mark.parametrize(
    ("method", "arguments", "options", "message"),
    [
        ("generate", [["a disk", "  "]], {}, "prompt 2 is empty"),
        ("generate", [["a disk", "word " * 10_000]], {}, r"prompt 2 of \S+ tokens .* 16 more .* of 64; shorten"),
        ("generate", [[3]], {}, "prompt 1 is of type int"),
        ("generate", [["a disk"]], {"num_images": 0}, "num_images is 0"),
        ("generate", [["a disk"]], {"num_images": 10**12}, "images in one call"),
        ("generate", [["a disk"]], {"num_images": 3, "best_of": 2}, "best_of=2 .* num_images=3"),
        ("generate", [["a disk"]], {"batch_size": 0}, "batch_size is 0"),
        ("generate", [["a disk"]], {"seeds": [1, 2]}, "2 seeds for 1 results"),
        ("generate", [["a disk"]], {"seeds": [-1]}, "seed -1 is outside"),
        ("generate", [["a disk"]], {"seeds": [2**53]}, "seed 9007199254740992 is outside"),
        ("complete", [["a"]], {"max_new_tokens": 10**12}, "no room for 1,000,000,000,000 more"),
        ("complete", [["a"]], {"guidance_scale": 2.0}, "guidance_scale"),
        ("inpaint", [images(1), ["a"]], {"redraw": (0.5, 0, 0.5, 1)}, "left, top, right, bottom"),
        ("inpaint", [images(1), ["a"]], {"redraw": (0, 0, 1)}, "must be four numbers"),
        ("inpaint", [images(1), ["a"]], {"redraw": (np.float32(0), 0, np.float32(0), 1)}, "as shares"),
        ("inpaint", [images(1), ["a"]], {"redraw": np.zeros((2, 2), bool)}, "no patch"),
        ("inpaint", [images(1), ["a"]], {"redraw": np.ones((3, 2), bool)}, r"must be bool \(2, 2\)"),
        ("inpaint", [images(2), ["a"]], {"redraw": (0, 0, 1, 1)}, "2 images and 1 texts"),
        ("vary", [images(1), ["a"]], {"strength": 0}, "strength 0"),
        ("interleave", [list(images(3))], {"answer": "image"}, "leaves no room"),
        ("interleave", [["word " * 1000]], {}, "leaves no room"),
        ("interleave", [[3]], {}, "type int"),
        ("interleave", [["a"]], {"answer": "video"}, "answer 'video'"),
    ],
)
def test_invalid_input_is_a_one_line_error(pipeline, method, arguments, options, message):
    with pytest.raises(UserError, match=message):
        getattr(pipeline, method)(*arguments, **options)
