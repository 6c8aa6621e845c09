"""`um3 generate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from um3.cli.app import (
    DEFAULT_MODEL,
    BatchOption,
    DeviceOption,
    FileOption,
    JsonOption,
    ModelOption,
    SeedOption,
    command,
)
from um3.cli.inputs import STDIN, file_names, load, make_folder, print_rows, read_texts
from um3.core.errors import UserError
from um3.core.files import write_text
from um3.core.hub import model_folder
from um3.core.progress import Progress
from um3.inference.generation_defaults import image_defaults

if TYPE_CHECKING:
    from um3.inference.outputs import Generated
    from um3.inference.pipeline import UM3Pipeline
    from um3.inference.requests import Watch


def scales(text: str) -> float | list[float]:
    """`2` -> 2.0, `4,1` -> [4.0, 1.0]."""
    try:
        points = [float(each) for each in text.split(",")]
    except ValueError:
        raise UserError(f"guidance scale '{text}' is no number and no list such as 4,1") from None
    return points[0] if len(points) == 1 else points


@command(
    "Draw pictures of prompts.",
    'um3 generate "a red circle above a blue square" -n 8 --out samples',
    'um3 generate "two green stars" "three stars" --guidance-scale 3 --seed 7',
    "um3 generate --file prompts.txt --best-of 8 -n 1 --json > samples.jsonl",
    'um3 generate "a red circle" -n 1 --out - | um3 caption -',
)
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; - reads stdin.")] = None,
    file: FileOption = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Pictures per prompt.")] = 4,
    best_of: Annotated[
        int, typer.Option(help="Draw that many per prompt, keep those that fit it best by QLIP's towers; 0 ranks none.")
    ] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for pictures, contact sheet and samples.jsonl; - is stdout, for one picture.")
    ] = Path("samples"),
    seed: SeedOption = 0,
    image_seed: Annotated[
        list[int] | None, typer.Option(help="The seed of one picture, to draw it again; repeat it for each.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy, 1 the model's own distribution.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest entries up to this share.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep only the k likeliest entries; 0 keeps all.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Keep what is this share as probable as the likeliest; 0 keeps all.")
    ] = None,
    guidance_scale: Annotated[
        str | None, typer.Option(help="Classifier-free guidance; 1 is off; 4,1 goes from 4 to 1 over the picture.")
    ] = None,
    batch_size: BatchOption = 64,
    as_json: JsonOption = False,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Draw pictures of PROMPTS: one PNG each, a contact sheet, and samples.jsonl with prompts, seeds and codes.

    Settings that are left out are those of sampling.json in the model's folder; without one temperature 0.5, top-p 0.9
    and guidance 2, with which the demo is measured.
    """
    wanted = read_texts(prompts or [], file=file, what="prompt")
    to_stdout = str(out) == STDIN
    if to_stdout and (len(wanted) * num_images != 1 or as_json):
        raise UserError("--out - writes one picture and nothing else; use it with one prompt, -n 1 and without --json")
    if not to_stdout:
        make_folder(out)
    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    given["guidance_scale"] = None if guidance_scale is None else scales(guidance_scale)
    settings = image_defaults(model_folder(model)) | {name: each for name, each in given.items() if each is not None}
    pipeline = load(model, device=device)
    generated = pipeline.generate(
        wanted,
        num_images=num_images,
        best_of=best_of,
        seed=seed,
        seeds=image_seed or None,
        batch_size=batch_size,
        watch=_progress(len(wanted) * (best_of or num_images), pipeline=pipeline),
        **settings,
    )
    if to_stdout:
        from um3.inference.image_io import png_bytes

        typer.echo(png_bytes(generated.pictures[0]), nl=False)
        return
    rows = _write(generated, out=out, columns=min(num_images, 8) if num_images > 1 else 0, pipeline=pipeline)
    if as_json:
        print_rows([row | {"file": str(out / row["file"])} for row in rows])
    else:
        typer.echo(f"{len(rows)} pictures, contact_sheet.png and samples.jsonl are in {out}")


def _progress(count: int, *, pipeline: "UM3Pipeline") -> "Watch":
    """Shows what is drawn of all pictures, token by token, and which are under way."""
    length = pipeline.ids.image_tokens
    progress = Progress(count * length, label="draw", unit="tokens")

    def show(batch: range, ids_PB: Any) -> None:
        done = batch.start * length + len(batch) * len(ids_PB)
        progress.advance(done - progress.done, note=f"pictures {batch.start + 1} to {batch.stop} of {count}")

    return show


def _write(generated: "Generated", *, out: Path, columns: int, pipeline: "UM3Pipeline") -> list[dict[str, Any]]:
    from um3.inference.image_io import contact_sheet, save_png

    fingerprint = pipeline.model.config.um3["tokenizer_fingerprint"]
    rows = []
    for index, (name, picture) in enumerate(zip(file_names(generated.prompts), generated.pictures, strict=True)):
        save_png(picture, out / name)
        rows.append({"file": name, **generated.metadata(index), "tokenizer": fingerprint})
    write_text(out / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    save_png(contact_sheet(generated.images, labels=generated.prompts, columns=columns), out / "contact_sheet.png")
    return rows
