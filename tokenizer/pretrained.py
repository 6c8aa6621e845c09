"""Initialization from pretrained towers: EVA-02's or EVA-CLIP's visual encoder, CLIP's text tower (paper, Table 3b).

Legend: D width, P patch size, G side of a patch grid.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.modeling import QLIPModel
from um3.core.errors import UserError
from um3.core.hub import model_folder, read_tensors, read_weights

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
EVA_SKIPPED = re.compile(r"mask_token|lm_head\..*|head\..*|fc_norm\..*|(.*\.)?rope\..*|rel_pos_bias\..*|.*\.k_bias")
"""Heads of other tasks, and tables that QLIP computes itself."""
CLIP_FILES = ("model.safetensors", "pytorch_model.bin")
"""Some of CLIP's repositories have only the older of the two; it is read as tensors only."""


def load_encoder(qlip: QLIPModel, path: str | Path) -> dict[str, list[str]]:
    """Initialize the visual encoder of `qlip` from an EVA-02 (MIM) or EVA-CLIP file, or from a QLIP folder.

    `path` names a local safetensors or tensors-only `.pt` file, a QLIP folder, or a file on the hub: OWNER/NAME/FILE.
    Position embeddings and the patch convolution are resampled (bicubic) to QLIP's grid and patch size. Returns the
    names of QLIP's encoder tensors by source: copied ("loaded"), "resampled", or missing in the file ("fresh").
    UserError: no such file, a damaged one, or a tensor of another architecture or shape.
    """
    parts = ("vision_model.embeddings.", "vision_model.encoder.", "vision_model.post_layernorm.")
    path = _local_path(str(path))
    if path.is_dir():
        table = {name: x for name, x in read_weights(path).items() if name.startswith(parts) and ".rope." not in name}
        if not table:
            raise UserError(f"{path} holds no QLIP encoder; set model.encoder_weights to a QLIP folder or an EVA file")
        return _copy(table, qlip=qlip, parts=parts, path=path)
    published, table = read_tensors(path), {}
    # EVA-CLIP keeps its encoder under `visual.`, beside a text tower.
    visual = {name.removeprefix("visual."): x for name, x in published.items() if name.startswith("visual.")}
    for name, tensor in (visual or published).items():
        matches = ((re.fullmatch(pattern, name), target) for pattern, target in EVA_NAMES)
        if target := next((match.expand(target) for match, target in matches if match), ""):
            table[f"vision_model.{target}"] = tensor
        elif not EVA_SKIPPED.fullmatch(name):
            raise UserError(f"{path}: QLIP's encoder has no tensor for '{name}'; use an EVA-02 or EVA-CLIP file")
    return _copy(table, qlip=qlip, parts=parts, path=path)


def load_text_tower(qlip: QLIPModel, path_or_hub_id: str | Path) -> dict[str, list[str]]:
    """Initialize text tower and text projection of `qlip` from a CLIP folder or hub id in transformers' layout.

    Returns and raises as `load_encoder`; nothing is resampled.
    """
    paths = (model_folder(path_or_hub_id, kind="CLIP", files=[file]) / file for file in CLIP_FILES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise UserError(f"{path_or_hub_id} has no {' or '.join(CLIP_FILES)}; set text.weights to a CLIP")
    parts = ("text_model.", "text_projection.")
    table = {name: tensor for name, tensor in read_tensors(path).items() if name.startswith(parts)}
    table.pop("text_model.embeddings.position_ids", None)
    if not table:
        raise UserError(f"{path} holds no text tower in transformers' CLIP layout (text_model.*); use a CLIP's weights")
    return _copy(table, qlip=qlip, parts=parts, path=path)


def _local_path(path: str) -> Path:
    """The path itself, or the cached file of OWNER/NAME/FILE on the hub, which is downloaded if needed."""
    owner, name, file = (*path.split("/", 2), "", "")[:3]
    if Path(path).exists() or owner in ("", ".", "..") or not file:
        return Path(path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:160]
        problem = f"{path} is neither a local file nor OWNER/NAME/FILE on the hub ({reason})"
        raise UserError(f"{problem}; check model.encoder_weights") from None


def _copy(table: dict[str, Tensor], *, qlip: QLIPModel, parts: tuple[str, ...], path: Path) -> dict[str, list[str]]:
    parameters = {name: value for name, value in qlip.named_parameters() if name.startswith(parts)}
    if unknown := sorted(table.keys() - parameters.keys()):
        lacking = f"{path}: this QLIP lacks {len(unknown)} of its tensors ({unknown[0]}, ...)"
        raise UserError(f"{lacking}; change the config's depth or kind of layers")
    report: dict[str, list[str]] = {"loaded": [], "resampled": [], "fresh": sorted(parameters.keys() - table.keys())}
    for name, tensor in sorted(table.items()):
        fitted = _fit(name, tensor.float(), like=parameters[name])
        if fitted.shape != parameters[name].shape:
            sizes = f"{tuple(tensor.shape)} in the file and {tuple(parameters[name].shape)} in this QLIP"
            raise UserError(f"{path}: {name} is {sizes}; change the config's sizes")
        report["loaded" if fitted.numel() == tensor.numel() else "resampled"].append(name)
        with torch.no_grad():
            parameters[name].copy_(fitted)
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
    """A patch convolution for another patch size, scaled so that a uniform patch gives the same output."""
    kernel = F.interpolate(kernel_DCPP, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    kernel = kernel * (kernel_DCPP.shape[-1] / size) ** 2
    lost_DC11 = kernel_DCPP.sum(dim=(-2, -1), keepdim=True) - kernel.sum(dim=(-2, -1), keepdim=True)
    return kernel + lost_DC11 / size**2
