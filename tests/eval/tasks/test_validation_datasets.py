"""Validation images from folders, tables and shards, with and without captions."""

import json

import pytest

from data_mix.sources.image_sources import ImageSourceConfig
from eval.tasks.validation_data import trained_on
from tests.helpers.image_files import write_folder, write_parquet, write_shards
from um3.core.errors import UserError

SETTINGS = ("tokenizer.num_images=24", "tokenizer.digits=false", "captions.max_new_tokens=4")


@pytest.mark.parametrize("write", [write_folder, write_parquet, write_shards])
def test_images_serve_with_and_without_captions(evaluate, tmp_path, write):
    sources = []
    for name, captions in (("captioned", True), ("plain", False)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, captions=captions)
        path = json.dumps(str(tmp_path / name))
        sources.append(f"{{name: {name}, path: {path}, val_fraction: 0.5, has_captions: {str(captions).lower()}}}")
    rows = evaluate(*SETTINGS, f"images=[{', '.join(sources)}]", "parts=[tokenizer, captions]")
    n = rows["captioned_captions/cider"].n
    assert n >= 6 and "plain_captions/cider" not in rows
    assert "captioned_captions/exact_match" not in rows, "captions in free words are never the same to the word"
    for name, distinct in (("captioned", n), ("plain", 0)):
        for stage in ("stage1", "stage2"):
            row = rows[f"{name}_reconstruction_{stage}/psnr"]
            assert row.value is not None and (row.n, row.skipped) == (n, 0)
        retrieval = rows[f"{name}_retrieval/image_to_text"]
        assert retrieval.value is None and f"{distinct} distinct captions" in retrieval.note
    first, second = (rows[f"{name}_reconstruction_stage2/psnr"] for name in ("captioned", "plain"))
    assert first.protocol_hash == second.protocol_hash, "the same images with other metadata"
    assert first.value == pytest.approx(second.value)


def test_missing_captions_are_a_one_line_error(evaluate, tmp_path):
    write_folder(tmp_path / "plain", captions=False)
    images = f"images=[{{name: plain, path: {tmp_path}/plain, has_captions: false}}]"
    with pytest.raises(UserError, match="captions needs captions"):
        evaluate(images, "parts=[captions]")
    with pytest.raises(UserError, match="has_captions=false"):
        evaluate(images.replace(", has_captions: false", ""), "parts=[tokenizer]")


@pytest.mark.parametrize("content", ["", "a: [", "data: {}", "data: {images: [7]}", "data: {images: 7}"])
def test_a_damaged_config_of_the_run_is_named(content, tmp_path):
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1/config.yaml").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}/stage1/config.yaml"):
        trained_on(str(tmp_path), phase="stage1", key="images", kind=ImageSourceConfig)
