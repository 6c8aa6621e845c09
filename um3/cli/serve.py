"""`um3 serve`."""

from typing import Annotated

import typer

from um3.cli.app import DEFAULT_MODEL, DeviceOption, ModelOption, command
from um3.cli.inputs import load
from um3.core.hub import model_folder
from um3.inference.generation_defaults import image_defaults


@command("Open a page to draw and look at pictures with.", "um3 serve", "um3 serve --port 0 --no-open")
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; any but this machine's own lets others in.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    most_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait for the one that is drawn.")] = 32,
    opens: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Serve a page on this machine: draw prompts row by row, compare guidance, caption and reconstruct pictures."""
    from um3.web.address import is_loopback, listen

    listener = listen(host, port)  # before the model is loaded: a port in use is said at once
    if not is_loopback(host):
        typer.echo(f"warning: {host} is open to others; there is no password, and each may draw", err=True)
    pipeline = load(model, device=device)
    sampling = image_defaults(model_folder(model))
    from um3.web.server import run

    run(pipeline, listener=listener, sampling=sampling, most_waiting=most_waiting, opens=opens)
    typer.echo("stopped", err=True)
