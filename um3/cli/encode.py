"""`um3 encode` and `um3 decode`: images -> codes -> images, as JSON lines."""

from pathlib import Path
from typing import Annotated

import typer

from um3.cli import options
from um3.cli.inputs import file_names, read_images, read_json_lines, show
from um3.core.errors import UserError
from um3.core.files import folder_lock


@options.command(
    "Encode images to codes.",
    "um3 encode *.jpg > codes.jsonl",
    "um3 encode photo.png | um3 decode - --out decoded",
)
def encode(images: options.Images, batch_size: options.BatchSize = 64, *, um3: options.ModelOptions) -> None:
    """Print a JSON line for each of IMAGES: its file, its codes in reading order, the tokenizer's fingerprint."""
    pipeline = um3.load()
    images_BHW3 = read_images(images, size=pipeline.processor.image_size)
    codes = pipeline.encode(images_BHW3, batch_size=batch_size).tolist()
    show({"file": images, "codes": codes, "tokenizer": [pipeline.fingerprint] * len(codes)}, as_json=True)


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
    *,
    um3: options.ModelOptions,
    context: typer.Context,
) -> None:
    """Write a PNG for each line of FILE."""
    rows = read_json_lines(file, types={"codes": list})
    context.with_resource(folder_lock(out))
    pipeline = um3.load()
    import torch

    from um3.inference.image_io import save_png

    ids, fingerprint = pipeline.ids, pipeline.fingerprint
    for number, row in rows.items():
        if (other := row.get("tokenizer", fingerprint)) != fingerprint:
            raise UserError(
                f"line {number}: the codes belong to the tokenizer {str(other)[:40]}, this model's is {fingerprint}"
            )
        is_code = [type(code) is int and 0 <= code < 1 << ids.num_bits for code in row["codes"]]
        if len(is_code) != ids.num_patches or not all(is_code):
            raise UserError(
                f"line {number}: 'codes' must be a list of {ids.num_patches} integers from 0 to 2**{ids.num_bits} - 1"
            )
    files = [row.get("file") for row in rows.values()]
    paths = [out / name for name in file_names(Path(name).stem if isinstance(name, str) else "" for name in files)]
    codes_BN = torch.tensor([row["codes"] for row in rows.values()])
    for image, path in zip(pipeline.decode(codes_BN, batch_size=batch_size), paths, strict=True):
        save_png(image, path)
    show({"file": files, "out": list(map(str, paths))}, "{out}", as_json=as_json)
