"""Small image files in every container that the image sources read."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(number: int, kind: str = "PNG") -> bytes:
    """A plain image with `number` as its red channel."""
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (number, 0, 255)).save(buffer, kind)
    return buffer.getvalue()


def write_folder(root: Path, *, captions: bool = True) -> None:
    """40 images in two folders, with captions in .txt files if `captions`."""
    for number in range(40):
        folder = root / ("a" if number % 2 else "b/c")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.png").write_bytes(encoded(number))
        if captions:
            (folder / f"{number:02d}.txt").write_text(f"number {number}\n\nalso {number}\n")


def write_parquet(root: Path, *, captions: bool = True) -> None:
    """40 images in two parquet files, with a caption or else with their numbers alone."""
    for part in range(2):
        numbers = list(range(part * 20, part * 20 + 20))
        table = {"id": numbers, "image": [encoded(number) for number in numbers]}
        table |= {"caption": [f"number {number}" for number in numbers]} if captions else {}
        pq.write_table(pa.table(table), root / f"{part}.parquet")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """An uncompressed tar file of `members`."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_shards(root: Path, *, captions: bool = True) -> None:
    """40 images in two WebDataset shards, with a caption or a class."""
    for part in range(2):
        members = {}
        for number in range(part * 20, part * 20 + 20):
            text = {f"{number:03d}.txt": f"number {number}".encode()} if captions else {f"{number:03d}.cls": b"1"}
            members |= {f"{number:03d}.png": encoded(number)} | text
        write_tar(root / f"shard-{part:06d}.tar", members)


def write_hub_images(file: Path, numbers: range) -> None:
    """A parquet file as `datasets` writes it."""
    import datasets

    table = {
        "image": [{"bytes": encoded(number), "path": None} for number in numbers],
        "caption": [f"number {number}" for number in numbers],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).to_parquet(file)
