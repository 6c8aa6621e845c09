"""The app that the commands join, and the options that several commands share."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from um3.cli.inputs import find_images
from um3.core.errors import UserError
from um3.core.hub import model_folder
from um3.core.text import printable

if TYPE_CHECKING:
    from um3.inference.image_pipeline import ImagePipeline
    from um3.inference.pipeline import UM3Pipeline

DEFAULT_MODEL = "runs/demo/um3/model"
DType = Literal["auto", "float32", "bfloat16", "float16"]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per result, for scripts.")]
BatchSize = Annotated[int, typer.Option(help="Number of items that the model processes at once.", min=1)]
Images = Annotated[
    list[str],
    typer.Argument(
        help="Image files (PNG, JPEG, WEBP, GIF, BMP, TIFF) or folders of them; - is stdin.", callback=find_images
    ),
]
TextFile = Annotated[
    Path | None, typer.Option("--file", "-f", help="Read from a file, one per line; - is stdin (the default).")
]


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; what is not given is the model's or the command's default."""

    temperature: Annotated[float | None, typer.Option(help="0 is greedy, 1 is the model's own distribution.")] = None
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest entries up to this share; in (0, 1].")] = None
    top_k: Annotated[int | None, typer.Option(help="Keep only the k most probable entries; 0 keeps all.")] = None
    min_p: Annotated[
        float | None, typer.Option(help="Keep entries at least this share as probable as the most probable; 0 is off.")
    ] = None
    seed: Annotated[int, typer.Option(help="Equal seeds give equal results.")] = 0

    def given(self) -> dict[str, Any]:
        """The options that are set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class TextOptions(SamplingOptions):
    """How to sample text."""

    max_new_tokens: Annotated[int | None, typer.Option(help="Upper limit of new tokens per text.")] = None


@dataclass(frozen=True)
class ModelOptions:
    """Which model runs where."""

    model: Annotated[str, typer.Option("--model", help="Folder of a trained UM3, or a hub id.")] = DEFAULT_MODEL
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto for the GPU if there is one.")] = "auto"
    dtype: Annotated[DType, typer.Option(help="Type of the weights; auto is that of the saved ones.")] = "auto"

    def folder(self) -> Path:
        """The model's local folder; a hub id is downloaded."""
        if self.model == DEFAULT_MODEL and not Path(self.model).exists():
            raise UserError(f"there is no model in {self.model}; run um3 demo, or pass a trained UM3 as --model")
        return model_folder(self.model, kind="UM3 model")

    def load(self) -> "UM3Pipeline":
        """The pipeline over a UM3."""
        options = self._prepare()
        from um3.inference.pipeline import UM3Pipeline

        return UM3Pipeline.from_pretrained(self.model, **options)

    def load_generator(self) -> "ImagePipeline":
        """The pipeline over a UM3 or a LlamaGen."""
        options = self._prepare()
        from downstream.pipelines import load_pipeline

        return load_pipeline(self.model, **options)

    def _prepare(self) -> dict[str, Any]:
        """Set up messages and check the folder; the device, which is tried, and the type for `from_pretrained`."""
        folder = self.folder()
        if not (folder / "config.json").is_file():
            inner = [path for path in (folder / "model", folder / "um3/model") if (path / "config.json").is_file()]
            remedy = f"pass --model {inner[0]}" if inner else "run um3 demo, or pass a trained UM3 as --model"
            raise UserError(f"{folder} has no config.json; {remedy}")
        typer.echo(f"loading {printable(self.model)}", err=True)
        import torch

        from um3.core.distributed import inference_device
        from um3.core.log import quiet_model_files, setup_logging

        setup_logging()
        quiet_model_files()
        device = self.device if self.device != "auto" else str(inference_device())
        if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", device):
            raise UserError(f"device '{device}' is unknown; use auto, cpu, cuda or mps")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"device '{device}' is not available ({reason}); use cpu or auto") from None
        return {"device": device, "dtype": None if self.dtype == "auto" else getattr(torch, self.dtype)}


app = typer.Typer(
    help="UM3: one model for text and images. Without --model, the model that `um3 demo` trains is used.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"um3 {version('um3')}")
        raise typer.Exit


@app.callback()
def _main(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def command(summary: str, *examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to the app, with its line in the list of commands and examples below its help.

    A parameter whose type is a dataclass stands for one option per field.
    """
    lines = "\n".join(f"  {example}" for example in examples)

    def add(function: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(function).parameters.values()
        groups: dict[str, Any] = {
            parameter.name: parameter.annotation
            for parameter in parameters
            if dataclasses.is_dataclass(parameter.annotation)
        }
        options = [
            parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in parameters if parameter.name not in groups
        ]
        for group in groups.values():
            hints = get_type_hints(group, include_extras=True)
            for field in dataclasses.fields(group):
                hint = hints[field.name]
                options.append(options[0].replace(name=field.name, default=field.default, annotation=hint))

        @functools.wraps(function)
        def run(**values: Any) -> None:
            for name, group in groups.items():
                values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            function(**values)

        vars(run)["__signature__"] = inspect.Signature(options)
        run.__annotations__ = {option.name: option.annotation for option in options}
        # \b keeps click from joining the lines
        return app.command(short_help=summary, epilog=f"\b\nExamples:\n{lines}")(run)

    return add
