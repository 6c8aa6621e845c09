"""The `um3` command: draw, caption, reconstruct, continue text, and look into a model folder.

torch and transformers are imported inside the commands: `um3 --help` answers at once.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from um3.core.errors import UserError, run_main

if TYPE_CHECKING:
    from PIL import Image

    from um3.pipeline import UM3Pipeline

DEFAULT_MODEL = Path("runs/demo/um3/model")
EXAMPLES = "\b\nExamples:"  # \b keeps click from joining the lines

ModelOption = Annotated[Path, typer.Option("--model", help="Folder of a trained UM3.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
SeedOption = Annotated[int, typer.Option(help="The same seed draws the same.")]
ImagesArgument = Annotated[list[Path], typer.Argument(help="Image files (PNG, JPEG, WEBP, GIF, BMP, TIFF).")]
TokensOption = Annotated[int, typer.Option(help="Longest text to write, in tokens.")]
TopPOption = Annotated[float, typer.Option(help="Keep the likeliest entries up to this share; in (0, 1].")]

app = typer.Typer(
    help="UM3: one model for text and pictures. Without --model, the model that `make demo` trains is used.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def entry_point() -> None:
    """The console script."""
    run_main(app)


@app.command(
    short_help="Draw pictures of prompts.",
    epilog=f"""{EXAMPLES}
  um3 generate "a red circle above a blue square" -n 8 --out samples
  um3 generate "two green stars" "three stars" --guidance-scale 3 --seed 7""",
)
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw; several prompts are drawn in one go.")],
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Pictures per prompt.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for the pictures, the contact sheet and samples.jsonl.")] = Path(
        "samples"
    ),
    seed: SeedOption = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy, 1 the model's own distribution.")] = 1.0,
    top_p: TopPOption = 0.95,
    top_k: Annotated[int, typer.Option(help="Keep only the k likeliest entries; 0 keeps all.")] = 0,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is off.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at once.")] = 64,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Draw pictures of PROMPTS: one PNG each, a contact sheet, and samples.jsonl with prompts, seeds and codes."""
    _prepare(out)
    settings = {
        "seed": seed,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "guidance_scale": guidance_scale,
    }
    generated = _load(model, device=device).generate(
        prompts,
        num_images=num_images,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
    )
    from um3.core.files import write_text
    from um3.pictures import contact_sheet, save_png

    lines = []
    for index, (image, prompt) in enumerate(zip(generated.images, generated.prompts, strict=True)):
        name = f"{index:04d}-{_slug(prompt)}.png"
        save_png(image, out / name)
        row = {"file": name, "prompt": prompt, "image_seed": generated.seeds[index], "model": str(model)} | settings
        row |= {"logprob": generated.logprobs[index], "codes": generated.codes[index].tolist()}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(out / "samples.jsonl", "".join(lines))
    sheet = contact_sheet(
        generated.images, labels=generated.prompts, columns=min(num_images, 8) if num_images > 1 else 0
    )
    save_png(sheet, out / "contact_sheet.png")
    typer.echo(f"{len(lines)} pictures, contact_sheet.png and samples.jsonl are in {out}")


@app.command(
    short_help="Describe pictures.",
    epilog=f"""{EXAMPLES}
  um3 caption holiday.jpg
  um3 caption samples/0*.png --temperature 0.7 --seed 1""",
)
def caption(
    images: ImagesArgument,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: TopPOption = 1.0,
    max_new_tokens: TokensOption = 32,
    seed: SeedOption = 0,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Describe IMAGES: one line each, the file and its caption."""
    pictures = _read(images)
    captions = _load(model, device=device).caption(
        pictures, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
    )
    for path, text in zip(images, captions, strict=True):
        typer.echo(f"{path}: {text}")


@app.command(
    short_help="Send pictures through the visual tokenizer and back.",
    epilog=f"""{EXAMPLES}
  um3 reconstruct holiday.jpg --out reconstructions""",
)
def reconstruct(
    images: ImagesArgument,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("reconstructions"),
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Send IMAGES through the visual tokenizer: a PNG each with the original, its codes as colours, what came back."""
    _prepare(out)
    pictures = _read(images)
    pipeline = _load(model, device=device)
    result = pipeline.reconstruct(pictures)
    from um3.pictures import code_picture, contact_sheet, save_png

    labels = ["original", f"{pipeline.ids.num_patches} codes of {pipeline.ids.num_bits} bits", "reconstruction"]
    for index, path in enumerate(images):
        codes = code_picture(result.codes[index], num_bits=pipeline.ids.num_bits)
        panels = [result.originals[index], codes, result.images[index]]
        name = out / f"{index:04d}-{_slug(path.stem)}.png"
        save_png(contact_sheet(panels, labels=labels, columns=3), name)
        typer.echo(str(name))


@app.command(
    short_help="Continue texts.",
    epilog=f"""{EXAMPLES}
  um3 complete "There is a red" --temperature 0.7 --max-new-tokens 20""",
)
def complete(
    texts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: TopPOption = 0.95,
    max_new_tokens: TokensOption = 64,
    seed: SeedOption = 0,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Continue TEXTS; no picture can come out of this."""
    written = _load(model, device=device).complete(
        texts, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
    )
    for text, continuation in zip(texts, written, strict=True):
        typer.echo(text + continuation)


@app.command(
    short_help="Say what is in a model folder.",
    epilog=f"""{EXAMPLES}
  um3 info runs/demo/um3/model""",
)
def info(folder: Annotated[Path, typer.Argument(help="Folder of a trained UM3.")] = DEFAULT_MODEL) -> None:
    """Say what is in a model FOLDER: architecture, parameters by part, vocabulary, visual tokenizer."""
    from um3.model import describe_folder

    for name, value in describe_folder(folder).items():
        typer.echo(f"{name:<18} {value}")


def _prepare(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}); pass --out with a folder of yours") from None


def _load(folder: Path, *, device: str) -> "UM3Pipeline":
    if not (folder / "config.json").is_file():
        raise UserError(f"no UM3 model in {folder}; run make demo or pass --model with the folder of a trained one")
    import torch
    from transformers.utils import logging

    from um3.core.log import setup_logging
    from um3.pipeline import UM3Pipeline

    setup_logging()
    logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' cannot be used ({str(error).splitlines()[0]}); use cpu or auto") from None
    return UM3Pipeline.from_pretrained(folder, device=device)


def _read(paths: list[Path]) -> "list[Image.Image]":
    from um3.core.images import ImageError, read_image

    pictures = []
    for path in paths:
        try:
            pictures.append(read_image(path))
        except ImageError as error:
            raise UserError(f"{path}: {error}; give a PNG, JPEG, WEBP, GIF, BMP or TIFF file") from None
    return pictures


def _slug(text: str, *, longest: int = 40) -> str:
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    return "-".join(words)[:longest].strip("-") or "picture"
