"""Pictures and captions to tensors and back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.tokenizer.conftest import tiny_config
from tokenizer import load
from tokenizer.configuration import QLIPConfig
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from tokenizer.text_tokenizer import load_caption_tokenizer, train_caption_tokenizer
from um3.core.errors import UserError

CAPTIONS = ["a red circle", "three blue squares", "a green cross above a pink triangle"] * 5


@pytest.fixture
def processor() -> QLIPProcessor:
    return QLIPProcessor(train_caption_tokenizer(CAPTIONS, vocab_size=300), image_size=16, max_text_tokens=8)


def test_pixels_and_images_are_inverse(processor: QLIPProcessor) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    pixels = processor.pixels(images)
    assert pixels.shape == (3, 3, 16, 16)
    assert np.array_equal(processor.images(pixels), images)
    extreme = processor.images(pixels * 100)
    assert np.all(extreme[images > 130] == 255) and np.all(extreme[images < 100] == 0)  # clipped, not wrapped


def test_pictures_of_any_size_are_cropped_and_resized(processor: QLIPProcessor) -> None:
    pixels = processor.pixels([Image.new("RGB", (40, 20), "red"), Image.new("RGB", (9, 31), "red")])
    assert np.all(processor.images(pixels) == [255, 0, 0])


def test_arrays_of_another_size_are_refused(processor: QLIPProcessor) -> None:
    with pytest.raises(ValueError, match="16, 16"):
        processor.pixels(np.zeros((1, 8, 8, 3), dtype=np.uint8))


def test_captions_are_wrapped_padded_and_truncated(processor: QLIPProcessor) -> None:
    encoded = processor.text(["A Red Circle", "three blue squares " * 20])
    tokenizer = processor.text_tokenizer
    assert encoded["input_ids"].shape == (2, 8)
    assert (encoded["input_ids"][:, 0] == tokenizer.bos_token_id).all()
    assert int(encoded["input_ids"][1, -1]) == tokenizer.eos_token_id  # truncation keeps the end
    assert str(tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True)).strip() == "a red circle"


def test_saved_folder_loads_with_model_and_text_tokenizer(processor: QLIPProcessor, tmp_path: Path) -> None:
    config = tiny_config()
    config.text_tower.max_position_embeddings = 8
    QLIPModel(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, again = load(tmp_path)
    assert again.text(CAPTIONS[:2])["input_ids"].tolist() == processor.text(CAPTIONS[:2])["input_ids"].tolist()
    assert again.image_mean == processor.image_mean and again.image_size == 16
    assert model.get_text_features(again.text(CAPTIONS)["input_ids"]).shape == (15, 24)


def test_a_folder_without_text_tokenizer_says_so_when_asked(tmp_path: Path) -> None:
    QLIPModel(tiny_config()).save_pretrained(tmp_path)
    processor = QLIPProcessor.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no text tokenizer"):
        processor.text(["a red circle"])


def test_missing_text_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load a text tokenizer"):
        load_caption_tokenizer(tmp_path / "absent")


def test_the_auto_classes_load_a_saved_folder(processor: QLIPProcessor, tmp_path: Path) -> None:
    config = tiny_config()
    config.text_tower.max_position_embeddings = 8
    saved = QLIPModel(config).eval()
    saved.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, again = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(model) is QLIPModel and type(again) is QLIPProcessor and type(model.config) is QLIPConfig
    inputs = again(images=[Image.new("RGB", (20, 16), "red")] * 2, text=CAPTIONS[:2])
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits_per_image, saved(**inputs).logits_per_image)
    assert again(text="a red circle")["input_ids"].shape[0] == 1 and again() == {}


@pytest.mark.parametrize("content", ["[]", '{"image_mean": null}', '{"image_std": [1, 2]}', '{"image_mean": "abc"}'])
def test_a_processor_file_that_makes_no_sense_is_named(
    processor: QLIPProcessor, tiny_qlip: QLIPModel, tmp_path: Path, content: str
) -> None:
    tiny_qlip.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=r"preprocessor_config\.json: .* must be three numbers each"):
        QLIPProcessor.from_pretrained(tmp_path)
