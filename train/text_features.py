"""`make text-features`: encode the captions of the code shards, so that `make llamagen` reads them from a folder.

It reads the section `llamagen` of a config. A file per code shard is written; finished ones are kept.
"""

from collections.abc import Sequence
from pathlib import Path

from train.settings.llamagen import LlamaGenTrainingConfig
from um3.core.commands import command_parser, read_config
from um3.core.errors import UserError
from um3.core.files import folder_lock, short_hash
from um3.core.log import quiet_model_files, setup_logging
from um3.core.progress import Progress


def main(arguments: Sequence[str]) -> None:
    """Write the missing files of `text_features`; return at once if there are none."""
    from data_mix.codes.shards import map_shard, shard_headers
    from downstream.llamagen.text_features import FILES, is_written, write_features
    from train.recipes.llamagen import features_header, open_text_encoder

    parser = command_parser("python -m train text-features", "Encode captions for LlamaGen.", config="required")
    config, _ = read_config(LlamaGenTrainingConfig, parser, section="llamagen", arguments=arguments)
    setup_logging()
    quiet_model_files()
    if not config.text_features:
        raise UserError("text_features is empty; set it to the folder to write, such as runs/demo/text_features")
    folder, header = Path(config.text_features), features_header(config)
    shards = shard_headers(config.data.codes, split="train")
    names = {path: folder / f"{path.stem}.safetensors" for path in shards}
    parts = {path: short_hash(shard.crc32, config.data.caption) for path, shard in shards.items()}
    missing = [path for path in shards if not is_written(names[path], header=header, part=parts[path])]
    outdated = set(folder.glob(FILES)) - set(names.values())
    if not missing and not outdated:
        print(f"{folder}: up to date")
        return
    with folder_lock(folder):
        for path in outdated:
            path.unlink()
        encoder = open_text_encoder(config)
        progress = Progress(len(shards), label="encoding captions", unit="shards", start=len(shards) - len(missing))
        for path in missing:
            captions = map_shard(path, header=shards[path])[1].column("captions").to_pylist()
            chosen = [text for texts in captions for text in (texts if config.data.caption == "random" else texts[:1])]
            write_features(names[path], chosen, encoder=encoder, header=header, part=parts[path])
            progress.advance()
