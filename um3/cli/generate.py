"""`um3 generate` and `um3 complete`: prompts in, images or text out."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from um3.cli import options
from um3.cli.inputs import STDIN, file_names, json_text, printable_lines, read_json_lines, read_texts, show
from um3.core.errors import UserError
from um3.core.files import folder_lock, write_text
from um3.core.progress import Progress
from um3.core.ranges import EXACT_BELOW
from um3.core.text import printable
from um3.inference.sampling_params import image_defaults

MAX_SEED = EXACT_BELOW - 1

if TYPE_CHECKING:
    from um3.inference.image_pipeline import ImagePipeline
    from um3.inference.outputs import Generated
    from um3.inference.requests import Watch


@options.command(
    "Generate images from prompts.",
    'um3 generate "a red circle above a blue square" -n 8 --out samples',
    'um3 generate "two green stars" "three stars" --guidance-scale 3 --seed 7',
    "um3 generate --file prompts.txt --best-of 8 -n 1 --json > samples.jsonl",
    'um3 generate "a red circle" -n 1 --out - | um3 caption -',
)
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; - reads stdin.")] = None,
    file: options.TextFile = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Images per prompt.")] = 4,
    best_of: Annotated[
        int, typer.Option(help="Generate that many per prompt and keep the best matches by QLIP; 0 for no ranking.")
    ] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for images, contact sheet and samples.jsonl; - writes one PNG to stdout.")
    ] = Path("samples"),
    image_seed: Annotated[
        list[int] | None,
        typer.Option(help="Seed of one image, to generate it again; repeat it for each image.", min=0, max=MAX_SEED),
    ] = None,
    guidance_scale: Annotated[
        str | None, typer.Option(help="Classifier-free guidance; 1 is off; 4,1 goes from 4 to 1 over the image.")
    ] = None,
    batch_size: options.BatchSize = 64,
    as_json: options.AsJson = False,
    *,
    sampling: options.SamplingOptions,
    um3: options.ModelOptions,
    context: typer.Context,
) -> None:
    """Generate images from PROMPTS: a PNG each, a contact sheet, and samples.jsonl with prompts, seeds and codes.

    A folder that has samples keeps them: the numbers continue, and samples.jsonl grows.

    Sampling options that are not given come from image_sampling in the model's generation_config.json; a new model has
    temperature 0.5, top-p 0.9 and guidance 2, with which the demo is measured.
    """
    prompts = read_texts(prompts, file=file, kind="prompt")
    to_stdout = str(out) == STDIN
    if to_stdout and (len(prompts) * num_images != 1 or as_json):
        raise UserError("--out - writes a single PNG; use it with one prompt and -n 1, without --json")
    settings = image_defaults(um3.folder()) | sampling.given()
    if guidance_scale is not None:
        try:
            settings["guidance_scale"] = [float(scale) for scale in guidance_scale.split(",")]
        except ValueError:
            message = f"guidance scale '{guidance_scale}' is neither a number nor a list such as 4,1"
            raise UserError(message) from None
    if not to_stdout:
        context.with_resource(folder_lock(out))
    earlier = _EarlierSamples(out)
    pipeline = um3.load_generator()
    generated = pipeline.generate(
        prompts,
        num_images=num_images,
        best_of=best_of,
        seeds=image_seed or None,
        batch_size=batch_size,
        watch=_progress(len(prompts) * (best_of or num_images), pipeline=pipeline),
        **settings,
    )
    if to_stdout:
        from um3.inference.image_io import png_bytes

        typer.echo(png_bytes(generated.images[0]), nl=False)
        return
    columns = min(num_images, 8) if num_images > 1 else 0
    rows = _write(generated, out=out, earlier=earlier, columns=columns, fingerprint=pipeline.fingerprint)
    if not as_json:
        typer.echo(f"{len(rows)} images, {earlier.contact_sheet} and samples.jsonl are in {printable(out)}")
    for row in rows if as_json else ():
        typer.echo(json_text(row | {"file": str(out / row["file"])}))


@options.command(
    "Continue texts.",
    'um3 complete "There is a red" --temperature 0.7 --max-new-tokens 20',
    "um3 complete --file beginnings.txt --json",
)
def complete(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to continue; - reads stdin.")] = None,
    file: options.TextFile = None,
    batch_size: options.BatchSize = 64,
    as_json: options.AsJson = False,
    *,
    sampling: options.TextOptions,
    um3: options.ModelOptions,
) -> None:
    """Continue TEXTS, by default with 64 tokens, temperature 1 and top-p 0.95. The model writes text, no images."""
    texts = read_texts(texts, file=file, kind="text")
    written = um3.load().complete(texts, batch_size=batch_size, **sampling.given())
    show(
        {"text": texts, "continuation": written, "seed": written.seeds, "logprob": written.logprobs},
        "{text}{continuation}",
        as_json=as_json,
        escape=printable_lines,
    )


def _progress(num_images: int, *, pipeline: "ImagePipeline") -> "Watch":
    """A progress line that counts the tokens of all images."""
    length = pipeline.image_tokens
    progress = Progress(num_images * length, label="generate", unit="tokens")

    def watch(batch: range, ids_PB: Any) -> None:
        done = batch.start * length + len(batch) * len(ids_PB)
        progress.advance(done - progress.done, note=f"images {batch.start + 1} to {batch.stop} of {num_images}")

    return watch


class _EarlierSamples:
    """The samples that a folder has: the text of samples.jsonl, and the first number that none of their files has."""

    def __init__(self, out: Path) -> None:
        path = out / "samples.jsonl"
        content = path.read_bytes().strip() if path.is_file() else b""
        rows = read_json_lines(str(path), types={"file": str}).values() if content else ()
        self.lines = content.decode("utf-8-sig")
        names = [*(row["file"] for row in rows), *(file.name for file in out.glob("*.png"))]
        numbers = [int(match[1]) for name in names if (match := re.match(r"(\d{4,9})-", name))]
        self.next_number = max(numbers, default=-1) + 1
        self.contact_sheet = f"contact_sheet-{self.next_number:04d}.png" if self.next_number else "contact_sheet.png"


def _write(
    generated: "Generated", *, out: Path, earlier: _EarlierSamples, columns: int, fingerprint: str
) -> list[dict[str, Any]]:
    from um3.inference.image_io import contact_sheet, save_png

    rows = []
    names = file_names(generated.prompts, start=earlier.next_number)
    for index, (name, image) in enumerate(zip(names, generated.images, strict=True)):
        save_png(image, out / name)
        rows.append({"file": name, **generated.metadata(index), "tokenizer": fingerprint})
    lines = [*([earlier.lines] if earlier.lines else []), *map(json_text, rows)]
    write_text(out / "samples.jsonl", "".join(f"{line}\n" for line in lines))
    save_png(contact_sheet(generated.arrays, labels=generated.prompts, columns=columns), out / earlier.contact_sheet)
    return rows
