"""Released LlamaGen text-to-image files (`.pt`) as a model folder, and back.

Names and shapes are the same in both; the folder adds config.json. A file does not hold the number of heads nor that
of the image's codes, so both are asked for.
"""

import math
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from downstream.llamagen.configuration import LlamaGenConfig
from downstream.llamagen.modeling import LlamaGen, load_llamagen
from um3.core.commands import positive
from um3.core.errors import UserError
from um3.core.files import atomic_file, atomic_folder, check_new
from um3.core.hub import read_tensors, write_checksums

WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
COMPUTED = re.compile(r"freqs_cis|causal_mask|.*\.kv_cache\..*")
"""Tables of a released model that is set up for sampling; they are computed."""
UNCONDITIONAL = "cls_embedding.uncond_embedding"
LICENCE = "LlamaGen's code is MIT; see https://huggingface.co/peizesun/llamagen_t2i for the licence of its weights."


def import_released(
    file: str | Path, folder: str | Path, *, num_patches: int, num_heads: int = 0, subtokens: int = 1
) -> LlamaGenConfig:
    """Write a released file (DDP's, DeepSpeed's or bare) as a folder for `LlamaGen.from_pretrained`.

    `num_heads` 0: heads 64 wide, as in all published sizes. UserError: a file with other than tensors, of a
    class-conditional LlamaGen, or with tensors that are missing, unexpected or of another shape; or `folder` exists.
    """
    check_new(folder, kind="folder")
    weights = {WRAPPERS.sub("", name): tensor for name, tensor in read_tensors(file).items()}
    weights = {name: tensor for name, tensor in weights.items() if not COMPUTED.fullmatch(name)}
    config = _config_of(weights, file=file, num_patches=num_patches, num_heads=num_heads, subtokens=subtokens)
    with torch.device("meta"):
        model = LlamaGen(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        stored = tuple(weights[name].shape) if name in weights else None
        wanted = tuple(expected[name]) if name in expected else None
        if stored != wanted:
            problem = f"shape {stored}, not {wanted}" if stored and wanted else "missing" if wanted else "unexpected"
            raise UserError(f"{file}: tensor '{name}' is {problem}; use a text-to-image file of LlamaGen")
    model.load_state_dict(weights, assign=True)
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        write_checksums(partial)
    return config


def export_released(model: LlamaGen, file: str | Path) -> None:
    """Write the weights as the released code's samplers read them: `{"model": tensors}`."""
    if model.config.subtokens > 1:
        raise UserError(f"the released code knows one id a patch, not {model.config.subtokens}; export is for those")
    check_new(file, kind="file")
    with atomic_file(Path(file)) as temporary:
        torch.save({"model": {name: tensor.contiguous() for name, tensor in model.state_dict().items()}}, temporary)


def _config_of(
    weights: dict[str, Tensor], *, file: str | Path, num_patches: int, num_heads: int, subtokens: int
) -> LlamaGenConfig:
    """The sizes that the shapes tell."""
    if UNCONDITIONAL not in weights:
        if any(name.startswith("cls_embedding.embedding_table") for name in weights):
            raise UserError(f"{file} is a class-conditional LlamaGen; use a text-to-image one (t2i)")
        raise UserError(f"{file} lacks '{UNCONDITIONAL}'; use a text-to-image file of LlamaGen")
    layers = [int(match[1]) for name in weights if (match := re.match(r"layers\.(\d+)\.", name))]
    try:
        num_rows, width = weights["tok_embeddings.weight"].shape
        qkv_rows = len(weights["layers.0.attention.wqkv.weight"])
        intermediate_size = len(weights["layers.0.feed_forward.w1.weight"])
    except (KeyError, ValueError):
        raise UserError(f"{file} lacks tensors of LlamaGen's embeddings or first layer; fetch it again") from None
    heads = num_heads or max(width // 64, 1)
    bits = math.log2(num_rows / subtokens) if num_rows else -1.0
    key_heads = (qkv_rows * heads // width - heads) // 2 if width % heads == 0 else 0
    if not bits.is_integer() or key_heads < 1:
        problem = f"{num_rows} ids, {qkv_rows} rows of queries, keys and values"
        raise UserError(f"{file}: {problem} do not fit {subtokens} sub-tokens and {heads} heads; correct these two")
    captions, caption_width = weights[UNCONDITIONAL].shape
    try:
        return LlamaGenConfig(
            hidden_size=width, intermediate_size=intermediate_size, num_hidden_layers=max(layers) + 1,
            num_attention_heads=heads, num_key_value_heads=key_heads, caption_width=caption_width,
            max_caption_tokens=captions, num_patches=num_patches, subtokens=subtokens, bits_per_subtoken=int(bits),
        )  # fmt: skip
    except Exception as error:  # huggingface_hub's own kind, with the reason as its cause
        raise UserError(f"{file}: {error.__cause__ or error}; correct the sizes") from None


def main(arguments: Sequence[str]) -> None:
    """The commands llamagen-import and llamagen-export; `arguments` starts with the name."""
    name, *rest = arguments
    parser = ArgumentParser(f"python -m downstream {name}", description=LICENCE)
    imports = name == "llamagen-import"
    parser.add_argument("source", help="a released text-to-image file (.pt)" if imports else "a LlamaGen folder")
    parser.add_argument("target", help="the folder to write" if imports else "the file to write (.pt)")
    if imports:
        parser.add_argument(
            "--patches", type=positive, default=256, help="codes of an image; default 256; 1024 at 512 pixels"
        )
        parser.add_argument("--heads", type=int, default=0, help="attention heads; 0: heads 64 wide, as published")
        parser.add_argument("--subtokens", type=positive, default=1, help="ids of a code (default 1, as published)")
    options = parser.parse_args(rest)
    if not imports:
        export_released(load_llamagen(options.source), options.target)
    else:
        sizes = {"num_patches": options.patches, "num_heads": options.heads, "subtokens": options.subtokens}
        config = import_released(options.source, options.target, **sizes)
        print(f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.slot_size} ids; {LICENCE}")
    print(f"written to {options.target}")
