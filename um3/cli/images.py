"""Commands over images and their codes: `um3 caption`, `reconstruct`, `score`, `encode` and `decode`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from um3.cli import options
from um3.cli.inputs import file_names, find_images, read_images, read_json_lines, read_texts, show
from um3.core.errors import UserError
from um3.core.files import folder_lock


@options.command(
    "Caption images.",
    "um3 caption holiday.jpg",
    "um3 caption samples/0*.png --temperature 0.7 --seed 1",
    "um3 caption --json *.jpg | jq -r .caption",
)
def caption(
    images: options.Images,
    batch_size: options.BatchSize = 64,
    as_json: options.AsJson = False,
    *,
    sampling: options.TextOptions,
    um3: options.ModelOptions,
) -> None:
    """Caption IMAGES: one line each, the file and its caption; by default greedy, with at most 32 tokens."""
    pipeline = um3.load()
    squares = read_images(images, size=pipeline.processor.image_size)
    captions = pipeline.caption(squares, batch_size=batch_size, **sampling.given())
    show(
        {"file": images, "caption": captions, "seed": captions.seeds, "logprob": captions.logprobs},
        "{file}: {caption}",
        as_json=as_json,
    )


@options.command(
    "Encode images with the visual tokenizer and decode them.",
    "um3 reconstruct holiday.jpg --out reconstructions",
)
def reconstruct(
    images: options.Images,
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("reconstructions"),
    batch_size: options.BatchSize = 64,
    as_json: options.AsJson = False,
    *,
    um3: options.ModelOptions,
    context: typer.Context,
) -> None:
    """Reconstruct IMAGES: a PNG each with the original, its codes as colours, and the reconstruction."""
    context.with_resource(folder_lock(out))
    pipeline = um3.load()
    squares = read_images(images, size=pipeline.processor.image_size)
    from um3.inference.image_io import code_image, contact_sheet, save_png

    ids, result = pipeline.ids, pipeline.reconstruct(squares, batch_size=batch_size)
    labels = ["original", f"{ids.num_patches} codes of {ids.num_bits} bits", "reconstruction"]
    paths = [out / name for name in file_names(Path(image).stem for image in images)]
    for path, original, codes_N, image in zip(paths, result.originals, result.codes, result.arrays, strict=True):
        panels = [original, code_image(codes_N, num_bits=ids.num_bits), image]
        save_png(contact_sheet(panels, labels=labels, columns=3), path)
    show({"file": images, "out": list(map(str, paths)), "codes": result.codes.tolist()}, "{out}", as_json=as_json)


@options.command(
    "Score how well images and texts match.",
    'um3 score photo.png "a red circle" "a blue square"',
    "um3 score photo.png --file captions.txt --json",
    "um3 score --pairs samples/samples.jsonl",
)
def score(
    image: Annotated[str, typer.Argument(help="An image file; - is stdin.")] = "",
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to score with the image.")] = None,
    file: options.TextFile = None,
    pairs: Annotated[
        str, typer.Option(help="JSON lines with prompt and file (relative to them), such as samples.jsonl.")
    ] = "",
    batch_size: options.BatchSize = 64,
    as_json: options.AsJson = False,
    *,
    um3: options.ModelOptions,
) -> None:
    """Score IMAGE with each of TEXTS, or the pairs of a file.

    Prints log-probabilities in nats, of the text given the image and of the image given the text, and the cosine
    similarity of both in QLIP's towers if the model's QLIP has a text tokenizer.
    """
    if bool(image) == bool(pairs):
        raise UserError("give either an image and texts, or --pairs with a file")
    if pairs:
        rows = read_json_lines(pairs, types={"file": str, "prompt": str}).values()
        paths, texts = [str(Path(pairs).parent / row["file"]) for row in rows], [row["prompt"] for row in rows]
    else:
        paths, texts = [image], read_texts(texts, file=file, kind="text")
    paths = find_images(paths)
    pipeline = um3.load()
    squares = read_images(paths, size=pipeline.processor.image_size)
    if image:
        squares, paths = squares * len(texts), paths * len(texts)
    scores = pipeline.score(squares, texts, batch_size=batch_size)
    similarities: list[Any] = scores.similarities or [None] * len(texts)
    if not as_json:
        typer.echo("text|image  image|text  similarity  file: text")
        similarities = ["-" if value is None else f"{value:.3f}" for value in similarities]
    logprobs = {"text_logprob": scores.text_logprobs, "image_logprob": scores.image_logprobs}
    show(
        {**logprobs, "similarity": similarities, "file": paths, "text": texts},
        "{text_logprob:10.2f}  {image_logprob:10.2f}  {similarity:>10}  {file}: {text}",
        as_json=as_json,
    )


@options.command(
    "Encode images to codes.",
    "um3 encode *.jpg > codes.jsonl",
    "um3 encode photo.png | um3 decode - --out decoded",
)
def encode(images: options.Images, batch_size: options.BatchSize = 64, *, um3: options.ModelOptions) -> None:
    """Print a JSON line for each of IMAGES: its file, its codes in reading order, the tokenizer's fingerprint."""
    pipeline = um3.load()
    squares = read_images(images, size=pipeline.processor.image_size)
    codes = pipeline.encode(squares, batch_size=batch_size).tolist()
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

    from um3.inference.chat import check_codes
    from um3.inference.image_io import save_png

    codes, fingerprint = list[torch.Tensor](), pipeline.fingerprint
    for number, row in rows.items():
        if (other := row.get("tokenizer", fingerprint)) != fingerprint:
            raise UserError(
                f"line {number}: the codes belong to the tokenizer {str(other)[:40]}, this model's is {fingerprint}"
            )
        codes.append(check_codes(row["codes"], ids=pipeline.ids, where=f"line {number}"))
    files = [row.get("file") for row in rows.values()]
    paths = [out / name for name in file_names(Path(name).stem if isinstance(name, str) else "" for name in files)]
    for image, path in zip(pipeline.decode(torch.stack(codes), batch_size=batch_size), paths, strict=True):
        save_png(image, path)
    show({"file": files, "out": list(map(str, paths))}, "{out}", as_json=as_json)
