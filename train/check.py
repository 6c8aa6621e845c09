"""`make check`: read what a run wrote, and compare it with the checksums that were written with it."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_mix.batches.token_stream import TokenFile, read_sequences
from data_mix.codes.shards import map_shard, read_header
from downstream.llamagen.text_features import check_features
from train import run_folder
from train.checkpoint import read_checkpoint
from um3.core.errors import UserError
from um3.core.files import walk_files
from um3.core.text import printable


def main(arguments: Sequence[str]) -> None:
    """Print a line for each file of a run that has checksums; UserError if one is damaged, or if there is none."""
    parser = argparse.ArgumentParser(prog="python -m train check", description="Verify the files of a run.")
    parser.add_argument("run", type=Path, help="folder of a run, or one below it, such as runs/demo")
    run = parser.parse_args(arguments).run
    if not run.is_dir():
        raise UserError(f"there is no folder '{run}'; give RUN= the folder of a run, such as runs/demo")
    results = []
    for path, check in checks(run):
        try:
            check(path)
            results.append("")
        except (UserError, OSError) as error:
            results.append(str(error))
        print(printable(results[-1] or f"{path}: ok"), flush=True)
    if damaged := sum(map(bool, results)):
        raise UserError(f"{run}: {damaged} of {len(results)} files are damaged; their lines above say how")
    if not results:
        raise UserError(f"'{run}' holds no code shard, text cache or checkpoint; give RUN= the folder of a run")


def checks(run: Path) -> Iterator[tuple[Path, Callable[[Path], object]]]:
    """Each code shard, cache, checkpoint and finished model below `run`, and the function that verifies it."""
    for path in walk_files(run, suffixes=(".arrow", ".bin", ".json", ".safetensors")):
        if path.suffix == ".arrow":
            yield path, lambda path: map_shard(path, header=read_header(path))
        elif path.suffix == ".bin" and path.name.startswith("text-"):
            yield path, lambda path: TokenFile(path).check()
        elif path.parent.name == "text_features":
            yield path, check_features
        elif path.name.startswith("sequences-"):
            yield path, read_sequences
        elif path.name == "meta.json" and path.parent.parent.name == "checkpoints":
            yield path.parent, _check_checkpoint
        elif path.name == "done.json" and (path.parent / "model").is_dir():
            yield path, _check_result


def _check_checkpoint(path: Path) -> None:
    _, files = read_checkpoint(path)
    if files:
        raise UserError(f"{path} is damaged ({', '.join(files)}); delete it to resume from the previous checkpoint")


def _check_result(path: Path) -> None:
    if files := run_folder.damaged_files(path.parent, run_folder.read_record(path)["files"]):
        raise UserError(f"{path.parent} lacks {', '.join(files)}, or they are damaged; run its phase again")
