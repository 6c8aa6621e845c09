"""`um3 encode` and `um3 decode`: images -> codes -> images, as JSON lines."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from um3.cli import options
from um3.cli.inputs import file_names, load, load_with_images, make_folder, read_json_lines, show
from um3.core.errors import UserError

if TYPE_CHECKING:
    from um3.inference.pipeline import UM3Pipeline


@options.command(
    "Encode images to codes.",
    "um3 encode *.jpg > codes.jsonl",
    "um3 encode photo.png | um3 decode - --out decoded",
)
def encode(
    images: options.Images,
    batch_size: options.BatchSize = 64,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
) -> None:
    """Print a JSON line for each of IMAGES: its file, its codes in reading order, the tokenizer's fingerprint."""
    pipeline, images_BHW3 = load_with_images(model, device=device, paths=images)
    codes = pipeline.encode(images_BHW3, batch_size=batch_size).tolist()
    show({"file": images, "codes": codes, "tokenizer": [_fingerprint(pipeline)] * len(codes)}, as_json=True)


@options.command(
    "Decode codes to images.",
    "um3 decode codes.jsonl --out decoded",
    "um3 decode samples/samples.jsonl --json",
)
def decode(
    file: Annotated[str, typer.Argument(help="JSON lines of um3 encode or um3 generate; - is stdin.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("decoded"),
    batch_size: options.BatchSize = 64,
    as_json: options.AsJson = False,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
) -> None:
    """Write a PNG for each line of FILE."""
    rows = read_json_lines(file, keys=["codes"])
    make_folder(out)
    pipeline = load(model, device=device)
    import torch

    from um3.inference.image_io import save_png

    codes_BN = torch.tensor([_checked_codes(row, number=i, pipeline=pipeline) for i, row in enumerate(rows, start=1)])
    paths = [out / name for name in file_names(Path(str(row.get("file", "codes"))).stem for row in rows)]
    for image, path in zip(pipeline.decode(codes_BN, batch_size=batch_size), paths, strict=True):
        save_png(image, path)
    show({"file": [row.get("file") for row in rows], "out": list(map(str, paths))}, "{out}", as_json=as_json)


def _fingerprint(pipeline: "UM3Pipeline") -> str:
    return str(pipeline.model.config.um3["tokenizer_fingerprint"])


def _checked_codes(row: dict[str, Any], *, number: int, pipeline: "UM3Pipeline") -> list[int]:
    """The codes of a row, after a check against this model's tokenizer."""
    codes, ids, fingerprint = row["codes"], pipeline.ids, _fingerprint(pipeline)
    if row.get("tokenizer", fingerprint) != fingerprint:
        raise UserError(
            f"row {number}: the codes belong to the tokenizer {row['tokenizer']}, this model's is {fingerprint}"
        )
    if not isinstance(codes, list) or len(codes) != ids.num_patches or not all(type(code) is int for code in codes):
        raise UserError(f"row {number}: 'codes' must be a list of {ids.num_patches} integers")
    if not all(0 <= code < 1 << ids.num_bits for code in codes):
        raise UserError(f"row {number}: a code is outside 0 .. 2**{ids.num_bits} - 1")
    return codes
