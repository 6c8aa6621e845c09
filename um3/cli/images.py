"""`um3 caption`, `um3 reconstruct` and `um3 score`: pictures in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from um3.cli.app import (
    DEFAULT_MODEL,
    BatchOption,
    DeviceOption,
    FileOption,
    ImagesArgument,
    JsonOption,
    MinPOption,
    ModelOption,
    SeedOption,
    TokensOption,
    TopKOption,
    TopPOption,
    command,
)
from um3.cli.inputs import (
    check_pictures,
    file_names,
    load,
    make_folder,
    print_rows,
    read_pictures,
    read_rows,
    read_texts,
)
from um3.core.errors import UserError


@command(
    "Describe pictures.",
    "um3 caption holiday.jpg",
    "um3 caption samples/0*.png --temperature 0.7 --seed 1",
    "um3 caption --json *.jpg | jq -r .caption",
)
def caption(
    images: ImagesArgument,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    max_new_tokens: TokensOption = 32,
    seed: SeedOption = 0,
    batch_size: BatchOption = 64,
    as_json: JsonOption = False,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Describe IMAGES: one line each, the file and its caption."""
    check_pictures(images)
    pipeline = load(model, device=device)
    captions = pipeline.caption(
        read_pictures(images, size=pipeline.processor.image_size),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
    )
    found = zip(images, captions, captions.seeds, captions.logprobs, strict=True)
    if as_json:
        print_rows([dict(zip(("file", "caption", "seed", "logprob"), each, strict=True)) for each in found])
    else:
        for path, text, *_ in found:
            typer.echo(f"{path}: {text}")


@command(
    "Send pictures through the visual tokenizer and back.",
    "um3 reconstruct holiday.jpg --out reconstructions",
)
def reconstruct(
    images: ImagesArgument,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("reconstructions"),
    batch_size: BatchOption = 64,
    as_json: JsonOption = False,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Send IMAGES through the visual tokenizer: a PNG each with the original, its codes as colours, what came back."""
    check_pictures(images)
    make_folder(out)
    pipeline = load(model, device=device)
    ids = pipeline.ids
    result = pipeline.reconstruct(read_pictures(images, size=pipeline.processor.image_size), batch_size=batch_size)
    from um3.inference.image_io import code_picture, contact_sheet, save_png

    labels = ["original", f"{ids.num_patches} codes of {ids.num_bits} bits", "reconstruction"]
    rows = []
    for index, (path, name) in enumerate(zip(images, file_names([Path(each).stem for each in images]), strict=True)):
        codes_N = result.codes[index]
        panels = [result.originals[index], code_picture(codes_N, num_bits=ids.num_bits), result.images[index]]
        save_png(contact_sheet(panels, labels=labels, columns=3), out / name)
        rows.append({"file": path, "out": str(out / name), "codes": codes_N.tolist()})
    if as_json:
        print_rows(rows)
    else:
        for row in rows:
            typer.echo(row["out"])


@command(
    "Say how well pictures and texts fit.",
    'um3 score photo.png "a red circle" "a blue square"',
    "um3 score photo.png --file captions.txt --json",
    "um3 score --pairs samples/samples.jsonl",
)
def score(
    image: Annotated[str, typer.Argument(help="A picture; - is stdin.")] = "",
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to score it with.")] = None,
    file: FileOption = None,
    pairs: Annotated[
        str, typer.Option(help="JSON lines with file (from there) and prompt, such as samples.jsonl; - is stdin.")
    ] = "",
    batch_size: BatchOption = 64,
    as_json: JsonOption = False,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Score IMAGE with each of TEXTS, or the pairs of a file.

    Log-probabilities in nats, of the text given the picture and of the picture given the text; fit is the cosine of the
    two in QLIP's own towers, where it has a text tokenizer.
    """
    if bool(image) == bool(pairs):
        raise UserError("give a picture and texts, or --pairs with a file, and not both")
    if pairs:
        rows = read_rows(pairs, needed=("file", "prompt"))
        paths = [str(Path(pairs).parent / str(row["file"])) for row in rows]
        wanted = [str(row["prompt"]) for row in rows]
    else:
        wanted = read_texts(texts or [], file=file, what="text")
        paths = [image]
    check_pictures(paths)
    pipeline = load(model, device=device)
    pictures = read_pictures(paths, size=pipeline.processor.image_size)
    if not pairs:
        pictures, paths = pictures.repeat(len(wanted), axis=0), paths * len(wanted)
    found = pipeline.score(pictures, wanted, batch_size=batch_size)
    fits: Sequence[float | None] = found.fits or [None] * len(wanted)
    scored = list(zip(found.text_logprobs, found.image_logprobs, fits, paths, wanted, strict=True))
    if as_json:
        names = ("text_logprob", "image_logprob", "fit", "file", "text")
        print_rows([dict(zip(names, each, strict=True)) for each in scored])
        return
    typer.echo("text|picture  picture|text     fit  file: text")
    for text, picture, fit, path, words in scored:
        typer.echo(f"{text:12.2f}  {picture:12.2f}  {'-' if fit is None else format(fit, '.3f'):>6}  {path}: {words}")
