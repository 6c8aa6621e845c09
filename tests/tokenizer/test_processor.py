"""Images and captions to tensors and back, to codes and to embeddings."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.tokenizer.conftest import tiny_config
from tokenizer.configuration import QLIPConfig
from tokenizer.images import EMBEDDING_BATCH, QLIPImages, decode_codes, embed_images, embed_texts, encode_images
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from tokenizer.text_tokenizer import train_caption_tokenizer
from um3.core.errors import UserError

CAPTIONS = ["a red circle", "three blue squares", "a green cross above a pink triangle"] * 5


@pytest.fixture(scope="module")
def processor():
    return QLIPProcessor(train_caption_tokenizer(CAPTIONS, vocab_size=300), image_size=16, max_text_tokens=8)


@pytest.fixture(scope="module")
def model():
    config = tiny_config()
    config.text_tower.max_position_embeddings = 8
    torch.manual_seed(0)
    return QLIPModel(config).eval()


def random_images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_pixels_and_images_are_inverse(processor):
    images = random_images(3)
    pixels = processor.pixels(images)
    assert pixels.shape == (3, 3, 16, 16)
    assert np.array_equal(processor.images(pixels), images)
    extreme = processor.images(pixels * 100)
    assert np.all(extreme[images > 130] == 255) and np.all(extreme[images < 100] == 0)  # clipped, not wrapped
    cropped = processor.pixels([Image.new("RGB", (40, 20), "red"), Image.new("RGB", (9, 31), "red")])
    assert np.all(processor.images(cropped) == [255, 0, 0])
    with pytest.raises(ValueError, match="16, 16"):
        processor.pixels(np.zeros((1, 8, 8, 3), dtype=np.uint8))


def test_captions_are_wrapped_padded_and_truncated(processor):
    encoded = processor.text(["A Red Circle", "three blue squares " * 20])
    tokenizer = processor.text_tokenizer
    assert encoded["input_ids"].shape == (2, 8)
    assert (encoded["input_ids"][:, 0] == tokenizer.bos_token_id).all()
    assert int(encoded["input_ids"][1, -1]) == tokenizer.eos_token_id  # truncation keeps the end
    assert str(tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True)).strip() == "a red circle"


def test_batches_give_the_codes_images_and_embeddings_of_single_calls(model, processor):
    qlip, images = QLIPImages(model, processor), random_images(5)
    codes = encode_images(qlip, images, batch_size=2)
    assert torch.equal(codes, qlip.encode(images)) and codes.shape == (5, qlip.num_codes)
    assert np.array_equal(decode_codes(qlip, codes, batch_size=2), qlip.decode(codes))
    assert encode_images(qlip, images[:0]).shape == (0, qlip.num_codes)
    count = EMBEDDING_BATCH + 3
    image_embeds = embed_images(random_images(count), model=model, processor=processor)
    text_embeds = embed_texts([CAPTIONS[i % 15] for i in range(count)], model=model, processor=processor)
    assert image_embeds.shape == text_embeds.shape == (count, 24)
    with torch.no_grad():
        alone = model(**processor(images=random_images(count)[-3:], text=[CAPTIONS[i % 15] for i in (256, 257, 258)]))
    torch.testing.assert_close(image_embeds[-3:], alone.image_embeds)
    torch.testing.assert_close(text_embeds[-3:], alone.text_embeds)


def test_the_auto_classes_load_a_saved_folder(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    auto, again = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(auto) is QLIPModel and type(again) is QLIPProcessor and type(auto.config) is QLIPConfig
    contents = {"images": [Image.new("RGB", (20, 16), "red")] * 2, "text": CAPTIONS[:2]}
    inputs, expected = again(**contents), processor(**contents)
    assert inputs.keys() == expected.keys() and all(torch.equal(inputs[name], expected[name]) for name in expected)
    with torch.inference_mode():
        assert torch.equal(auto(**inputs).logits_per_image, model(**inputs).logits_per_image)
    assert again(text="a red circle")["input_ids"].shape[0] == 1 and again() == {}


def test_a_missing_text_tokenizer_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    processor = QLIPProcessor.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no text tokenizer"):
        processor.text(["a red circle"])
