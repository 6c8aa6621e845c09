"""Images from folders, tables and shards, with captions and without: all are reconstructed, none stops the rest."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.run import main
from eval.scores import Score, read_scores
from um3.core.errors import UserError


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(place: Path, *, captions: bool) -> None:
    """PATH/SPLIT/CLASS/IMAGE, as ImageNet is usually unpacked."""
    for split in ("train", "val"):
        for number in range(6):
            folder = place / split / f"n0{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.png").write_bytes(png(number))
            if captions:
                (folder / f"{number}.txt").write_text(f"number {number}")


def parquet(place: Path, *, captions: bool) -> None:
    for split in ("train", "val"):
        columns = {"image": [{"bytes": png(number), "path": None} for number in range(6)], "label": [0, 1] * 3}
        columns |= {"caption": [f"number {number}" for number in range(6)]} if captions else {}
        pq.write_table(pa.table(columns), place / f"{split}-00000.parquet")


def webdataset(place: Path, *, captions: bool) -> None:
    with tarfile.open(place / "00000.tar", "w") as tar:
        for number in range(24):
            extra = {"txt": f"number {number}".encode()} if captions else {"cls": b"1"}
            for ending, data in ({"png": png(number)} | extra).items():
                member = tarfile.TarInfo(f"{number:05d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def evaluate(tmp_path: Path, run: Path, *settings: str) -> dict[str, Score]:
    (tmp_path / "eval.yaml").write_text("tokenizer: {num_images: 24, labelled: false}\nnum_threads: 1\n")
    main(["--config", str(tmp_path / "eval.yaml"), f"run={run}", f"out={tmp_path}", *settings])
    return {row.key: row for path in tmp_path.glob("*.json") for row in read_scores(path)}


@pytest.mark.parametrize("write", [image_folder, parquet, webdataset])
def test_images_serve_with_and_without_captions(run_folder: Path, tmp_path: Path, write) -> None:
    sources = []
    for name, captions in (("told", True), ("mute", False)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, captions=captions)
        path = json.dumps(str(tmp_path / name))
        sources.append(f"{{name: {name}, path: {path}, val_fraction: 0.5, has_captions: {str(captions).lower()}}}")
    parts = "parts=[tokenizer, captions]"
    rows = evaluate(tmp_path, run_folder, f"images=[{', '.join(sources)}]", parts, "captions.max_new_tokens=4")
    n = rows["told_captions/exact_match"].n
    assert n >= 6 and "mute_captions/exact_match" not in rows
    for name, distinct in (("told", n), ("mute", 0)):
        for stage in ("stage1", "stage2"):
            row = rows[f"{name}_reconstruction_{stage}/psnr"]
            assert row.value is not None and (row.n, row.skipped) == (n, 0)
        retrieval = rows[f"{name}_retrieval/image_to_text"]
        assert retrieval.value is None and retrieval.note.startswith(f"{distinct} distinct captions among {n} images")
    told, mute = (rows[f"{name}_reconstruction_stage2/psnr"] for name in ("told", "mute"))
    assert told.protocol_hash == mute.protocol_hash, "the same images by another way"
    assert told.value == pytest.approx(mute.value)


def test_captions_that_no_source_has_are_asked_for_in_one_line(run_folder: Path, tmp_path: Path) -> None:
    image_folder(tmp_path / "mute", captions=False)
    images = f"images=[{{name: mute, path: {tmp_path}/mute, has_captions: false}}]"
    with pytest.raises(UserError, match="no image source has captions, which captions needs"):
        evaluate(tmp_path, run_folder, images, "parts=[captions]")
    with pytest.raises(UserError, match=r"none of its 12 images has a caption.*has_captions=false"):
        evaluate(tmp_path, run_folder, images.replace(", has_captions: false", ""), "parts=[tokenizer]")
