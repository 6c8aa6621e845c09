"""`um3 encode` and `um3 decode`: pictures -> codes -> pictures, as JSON lines."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from um3.cli.app import DEFAULT_MODEL, BatchOption, DeviceOption, ImagesArgument, JsonOption, ModelOption, command
from um3.cli.inputs import check_pictures, file_names, load, make_folder, print_rows, read_pictures, read_rows
from um3.core.errors import UserError

if TYPE_CHECKING:
    from um3.inference.pipeline import UM3Pipeline


@command(
    "Pictures to codes.",
    "um3 encode *.jpg > codes.jsonl",
    "um3 encode photo.png | um3 decode - --out decoded",
)
def encode(
    images: ImagesArgument,
    batch_size: BatchOption = 64,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Print a JSON line for each of IMAGES: its file, codes in reading order, and the tokenizer's fingerprint."""
    check_pictures(images)
    pipeline = load(model, device=device)
    codes_BN = pipeline.encode(read_pictures(images, size=pipeline.processor.image_size), batch_size=batch_size)
    made_by = {"tokenizer": pipeline.model.config.um3["tokenizer_fingerprint"]}
    print_rows(
        [{"file": path, "codes": codes} | made_by for path, codes in zip(images, codes_BN.tolist(), strict=True)]
    )


@command(
    "Codes to pictures.",
    "um3 decode codes.jsonl --out decoded",
    "um3 decode samples/samples.jsonl --json",
)
def decode(
    file: Annotated[str, typer.Argument(help="JSON lines with codes, as um3 encode and generate write; - is stdin.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("decoded"),
    batch_size: BatchOption = 64,
    as_json: JsonOption = False,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Write a PNG for each line of FILE."""
    rows = read_rows(file, needed=["codes"])
    make_folder(out)
    pipeline = load(model, device=device)
    import torch

    codes = [_checked(row, number=number, pipeline=pipeline) for number, row in enumerate(rows, start=1)]
    images = pipeline.decode(torch.tensor(codes), batch_size=batch_size)
    from um3.inference.image_io import save_png

    labels = [Path(str(row.get("file", "codes"))).stem for row in rows]
    for row, image, name in zip(rows, images, file_names(labels), strict=True):
        save_png(image, out / name)
        if as_json:
            print_rows([{"file": row.get("file"), "out": str(out / name)}])
        else:
            typer.echo(str(out / name))


def _checked(row: dict[str, Any], *, number: int, pipeline: "UM3Pipeline") -> list[int]:
    """The codes of a row, if this model's tokenizer can have made them."""
    codes, ids = row["codes"], pipeline.ids
    ours = pipeline.model.config.um3["tokenizer_fingerprint"]
    if row.get("tokenizer", ours) != ours:
        raise UserError(f"the codes of row {number} are those of tokenizer {row['tokenizer']}, this model's is {ours}")
    if not isinstance(codes, list) or len(codes) != ids.num_patches or not all(type(code) is int for code in codes):
        raise UserError(f"row {number} is no picture of {ids.num_patches} codes, all whole numbers")
    if not all(0 <= code < 1 << ids.num_bits for code in codes):
        raise UserError(f"row {number} holds a code outside 0 .. 2**{ids.num_bits} - 1")
    return codes
