"""`um3 serve`."""

from typing import Annotated

import typer

from um3.cli import options
from um3.inference.sampling_params import image_defaults


@options.command(
    "Serve a web page that generates and captions images.",
    "um3 serve",
    "um3 serve --port 0 --no-open",
    "um3 serve --host 0.0.0.0 --allow-host gpu.example.org",
)
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 admits this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8000,
    most_waiting: Annotated[int, typer.Option(min=0, help="Limit of the request queue.")] = 32,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name by which requests may call the server, such as that of a proxy; repeatable."),
    ] = None,
    opens: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
    *,
    um3: options.ModelOptions,
) -> None:
    """Serve a page on this machine: generate images row by row, compare guidance, caption and reconstruct images.

    With --allow-host, or another --host than this machine's own, each request needs the token of the printed address.
    """
    from um3.web.security import check_host_names, listen

    names = check_host_names(allow_host or [])
    listener = listen(host, port)  # before the model is loaded: a taken port is reported at once
    sampling = image_defaults(um3.folder())
    pipeline = um3.load()
    from um3.web.server import run

    run(
        pipeline,
        listener=listener,
        sampling=sampling,
        max_waiting=most_waiting,
        open_page=opens,
        allow_hosts=names,
    )
    typer.echo("stopped", err=True)
