"""Towers to start from: EVA-02's or EVA-CLIP's visual encoder, CLIP's text tower (paper, section 3 and Table 3b).

The names are those of the published files. What has no place in QLIP is either known to have none or an error; what
QLIP has and the file has not stays fresh and is reported. Legend: C channels, D width, G side of a patch grid.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.modeling import QLIPModel
from um3.core.errors import UserError
from um3.core.tensors import read_tensors

LAYER = r"blocks\.(\d+)\."
EVA_NAMES: tuple[tuple[str, str], ...] = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding.weight"),
    (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embedding.\1"),
    (LAYER + r"norm([12])\.(weight|bias)", r"encoder.layers.\1.layer_norm\2.\3"),
    (LAYER + r"attn\.([qkv])_proj\.weight", r"encoder.layers.\1.self_attn.\2_proj.weight"),
    (LAYER + r"attn\.([qv])_bias", r"encoder.layers.\1.self_attn.\2_proj.bias"),
    (LAYER + r"attn\.inner_attn_ln\.(weight|bias)", r"encoder.layers.\1.self_attn.inner_attn_ln.\2"),
    (LAYER + r"attn\.proj\.(weight|bias)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (LAYER + r"mlp\.(w[123]|ffn_ln|fc[12])\.(weight|bias)", r"encoder.layers.\1.mlp.\2.\3"),
    (r"norm\.(weight|bias)", r"post_layernorm.\1"),
)
CLIP_FILES = ("model.safetensors", "pytorch_model.bin")
EVA_LEFT_OUT = re.compile(r"mask_token|lm_head\..*|head\..*|fc_norm\..*|(.*\.)?rope\..*|rel_pos_bias\..*|.*\.k_bias")
"""Heads of other tasks, and tables that QLIP computes itself."""


def load_encoder(qlip: QLIPModel, path: str | Path) -> dict[str, list[str]]:
    """Give `qlip` the visual encoder of an EVA-02 (MIM) or EVA-CLIP file, safetensors or tensors-only `.pt`, or that of
    a QLIP folder. `path` is that of the file or folder, or OWNER/NAME/FILE for a file on the hub.

    Position embeddings and the patch convolution are resampled (bicubic) to QLIP's grid and patch size. EVA-CLIP's
    projection is not taken: its dimension is that of another text tower.

    Returns:
        Names of QLIP's encoder tensors that came from the file as they are ("loaded"), were resampled ("resampled"),
        and have no counterpart in the file ("fresh").

    Raises:
        UserError: no such file, a damaged one, a tensor of another architecture or shape.
    """
    parts = ("vision_model.embeddings.", "vision_model.encoder.", "vision_model.post_layernorm.")
    path = _on_this_machine(str(path))
    if path.is_dir():
        given = read_tensors(path / "model.safetensors")
        own = {name: tensor for name, tensor in given.items() if name.startswith(parts) and ".rope." not in name}
        if not own:
            raise UserError(f"{path} holds no QLIP, so no encoder to start from")
        return _copy(own, qlip=qlip, parts=parts, path=path)
    found: dict[str, Tensor] = {}
    for name, tensor in _vision_part(read_tensors(path)).items():
        place = _place(name)
        if place:
            found[f"vision_model.{place}"] = tensor
        elif not EVA_LEFT_OUT.fullmatch(name):
            raise UserError(f"{path}: '{name}' has no place in QLIP's encoder; is it an EVA-02 or EVA-CLIP file?")
    return _copy(found, qlip=qlip, parts=parts, path=path)


def load_text_tower(qlip: QLIPModel, path: str | Path) -> dict[str, list[str]]:
    """Give `qlip` the text tower and text projection of a CLIP folder or hub id in transformers' layout.

    Returns and raises as `load_encoder` does; nothing is resampled.
    """
    given = read_tensors(_clip_file(path))
    found = {name: tensor for name, tensor in given.items() if name.startswith(("text_model.", "text_projection."))}
    found.pop("text_model.embeddings.position_ids", None)
    if not found:
        raise UserError(f"{path} holds no text tower in transformers' CLIP layout (text_model.*)")
    return _copy(found, qlip=qlip, parts=("text_model.", "text_projection."), path=path)


def _on_this_machine(path: str) -> Path:
    """The path itself, or the cached file of a hub's OWNER/NAME/FILE, fetched if need be."""
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    if Path(path).exists() or owner in ("", ".", "..") or not file:
        return Path(path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is no file here, and as OWNER/NAME/FILE the hub has none: {reason}") from None


def _place(name: str) -> str:
    for pattern, replacement in EVA_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return ""


def _vision_part(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EVA-CLIP keeps its encoder below `visual.`, beside a text tower."""
    visual = {name.removeprefix("visual."): tensor for name, tensor in given.items() if name.startswith("visual.")}
    return visual or dict(given)


def _copy(
    found: dict[str, Tensor], *, qlip: QLIPModel, parts: tuple[str, ...], path: str | Path
) -> dict[str, list[str]]:
    ours = {name: value for name, value in qlip.named_parameters() if name.startswith(parts)}
    if strangers := sorted(found.keys() - ours.keys()):
        raise UserError(
            f"{path}: this QLIP has no place for {len(strangers)} of its tensors ({strangers[0]}, ...); change the "
            "config's depth or kind of layers"
        )
    report: dict[str, list[str]] = {"loaded": [], "resampled": [], "fresh": sorted(ours.keys() - found.keys())}
    for name, tensor in sorted(found.items()):
        fitted, wanted = _fit(name, tensor.float(), like=ours[name]), tuple(ours[name].shape)
        if fitted.shape != ours[name].shape:
            sizes = f"{tuple(tensor.shape)} in the file and {wanted} in this QLIP"
            raise UserError(f"{path}: {name} is {sizes}; change the config's sizes")
        report["loaded" if fitted.numel() == tensor.numel() else "resampled"].append(name)
        with torch.no_grad():
            ours[name].copy_(fitted)
    return report


def _fit(name: str, tensor: Tensor, *, like: nn.Parameter) -> Tensor:
    if name.endswith("class_embedding"):
        return tensor.flatten()
    if name.endswith("embeddings.position_embedding.weight"):
        return _resample_positions(tensor.reshape(-1, tensor.shape[-1]), num_positions=len(like))
    if name.endswith("patch_embedding.weight") and tensor.shape[-2:] != like.shape[-2:]:
        return _resample_patches(tensor, size=like.shape[-1])
    return tensor


def _resample_positions(positions_XD: Tensor, *, num_positions: int) -> Tensor:
    """1 + G * G positions, the class token's first, to another G."""
    old, new = (round((count - 1) ** 0.5) for count in (len(positions_XD), num_positions))
    if old == new or old**2 + 1 != len(positions_XD):
        return positions_XD
    grid_1DGG = positions_XD[1:].T.unflatten(-1, (old, old))[None]
    grid_1DGG = F.interpolate(grid_1DGG, size=(new, new), mode="bicubic", align_corners=False, antialias=new < old)
    return torch.cat([positions_XD[:1], grid_1DGG[0].flatten(1).T])


def _resample_patches(kernel_DCPP: Tensor, *, size: int) -> Tensor:
    """A patch convolution for patches of another size, scaled so that an even patch answers as before."""
    kernel = F.interpolate(kernel_DCPP, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    kernel = kernel * (kernel_DCPP.shape[-1] / size) ** 2
    lost_DC11 = kernel_DCPP.sum(dim=(-2, -1), keepdim=True) - kernel.sum(dim=(-2, -1), keepdim=True)
    return kernel + lost_DC11 / size**2


def _clip_file(path: str | Path) -> str:
    """CLIP's weights in a folder or hub id: safetensors, or the older file that some of its repositories have only."""
    from transformers.utils import cached_file

    try:
        for name in CLIP_FILES:
            if found := cached_file(str(path), name, _raise_exceptions_for_missing_entries=False):
                return str(found)
    except OSError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"cannot find CLIP's weights in {path}: {reason}") from None
    raise UserError(f"cannot find CLIP's weights in {path}: there is no {' or '.join(CLIP_FILES)}")
