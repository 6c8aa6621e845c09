"""Moments of the features of a folder's images, kept on disk while they grow: a killed run goes on from there, and what
a finished one leaves is the file of reference statistics for the next.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eval.command import LeftOut
from eval.metrics.features import FeatureNetwork
from eval.metrics.frechet import Moments, StreamingMoments
from eval.records import image_name
from um3.core.config import differences
from um3.core.errors import UserError
from um3.core.files import atomic_file
from um3.core.images import ImageError, read_image
from um3.core.progress import Progress

BATCH = 50
SAVE_EVERY = 2000  # images; with Inception's 2,048 dimensions a save writes 33 MB for each way of preparing them
DIGESTS = 2**256


class WrongSizeError(Exception):
    """An image that is not of the size of the others."""


class FolderMoments(NamedTuple):
    """Moments by the key of the network, with what names the images, whatever their order, and their preparation."""

    moments: dict[str, Moments]
    about: dict[str, Any]


@dataclass
class _State:
    """What has been seen so far. The digests are added up, so that the order of the images does not matter."""

    moments: dict[str, StreamingMoments]
    position: int = 0
    digest: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)


def network_key(network: FeatureNetwork) -> str:
    """`inception-2015 clean-fid`, `random-features`."""
    return f"{network.name} {network.preprocessing}".strip()


def networks_in_words(networks: Sequence[FeatureNetwork]) -> dict[str, str]:
    """The weights of each network by its key."""
    return {network_key(each): each.weights_sha256 for each in networks}


def measure(
    files: Mapping[str, Path],
    *,
    networks: Sequence[FeatureNetwork],
    preparation: str,
    to_array: Callable[[Image.Image], NDArray],
    file: Path,
    label: str,
    left_out: LeftOut,
) -> FolderMoments:
    """Moments over all images, brought to uint8 (H, W, 3) by `to_array`, which `preparation` puts in words; they grow
    and stay in `file`. Images that are missing, unreadable or of another size (WrongSizeError) are left out.

    Raises:
        UserError: fewer than two usable images.
    """
    request = json.dumps([(name, _stamp(path)) for name, path in files.items()])
    about = {"preparation": preparation, "networks": networks_in_words(networks)}
    about |= {"files_sha256": hashlib.sha256(request.encode()).hexdigest()[:12]}
    state = _resumed(file, about=about, networks=networks)
    names, saved = list(files), state.position
    progress = Progress(len(names), label=label, start=state.position)
    while state.position < len(names):
        batch = names[state.position : state.position + BATCH]
        _add(state, {name: files[name] for name in batch}, networks=networks, to_array=to_array)
        if state.position - saved >= SAVE_EVERY or state.position == len(names):
            _save(file, state, about=about, complete=state.position == len(names))
            saved = state.position
        progress.advance(len(batch))
    left_out.merge(state.left_out)
    if next(iter(state.moments.values())).count < 2:
        raise UserError(f"{label}: fewer than two images can be used of {len(names)}; {state.left_out.note()}")
    return FolderMoments({key: each.result() for key, each in state.moments.items()}, _described(state, about))


def load_reference(path: str | Path, *, networks: Sequence[FeatureNetwork], preparation: str) -> FolderMoments:
    """Reference statistics: a file that `measure` left, or pytorch-fid's .npz, which holds those of its own way alone.

    Raises:
        UserError: no such file, one of something else, or one made with other networks or sizes.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return _from_npz(path)
    moments, about = _read(path)
    expected = {"preparation": preparation, "networks": networks_in_words(networks)}
    if changed := differences({key: about.get(key) for key in expected}, expected):
        raise UserError(f"{path} was made otherwise ({'; '.join(changed)}); measure the folder of real images again")
    if not about["complete"]:
        raise UserError(f"{path} was left by a run that was stopped; give the folder of real images to go on")
    return FolderMoments({key: each.result() for key, each in moments.items()}, about)


def _add(
    state: _State,
    files: Mapping[str, Path],
    *,
    networks: Sequence[FeatureNetwork],
    to_array: Callable[[Image.Image], NDArray],
) -> None:
    arrays = []
    for name, path in files.items():
        try:
            arrays.append(to_array(read_image(path)))
        except ImageError as error:
            state.left_out.add(f"unreadable image: {error.reason}" if path.is_file() else "missing image", name)
        except WrongSizeError:
            state.left_out.add("image of another size", name)
    for array in arrays:
        digest = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).digest()
        state.digest = (state.digest + int.from_bytes(digest, "big")) % DIGESTS
    if arrays:
        images_BHWC = np.stack(arrays)
        for network in networks:
            state.moments[network_key(network)].add(network.extract(images_BHWC))
    state.position += len(files)


def _described(state: _State, about: Mapping[str, Any]) -> dict[str, Any]:
    count = next(iter(state.moments.values())).count
    return {**about, "images": count, "images_sha256": f"{state.digest:064x}"[:12]}


def _save(file: Path, state: _State, *, about: Mapping[str, Any], complete: bool) -> None:
    tensors = {f"{key}/mean": each.mean_D for key, each in state.moments.items()}
    tensors |= {f"{key}/scatter": each.scatter_DD for key, each in state.moments.items()}
    described = _described(state, about)
    described |= {
        "complete": complete,
        "position": state.position,
        "digest": f"{state.digest:x}",
        "left_out": state.left_out.to_dict(),
    }
    with atomic_file(file) as partial:
        save_file(tensors, partial, metadata={"about": json.dumps(described)})


def _read(path: Path) -> tuple[dict[str, StreamingMoments], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as content:
            about = json.loads(content.metadata()["about"])
            moments = {}
            for key in about["networks"]:
                mean_D = content.get_tensor(f"{key}/mean")
                moments[key] = StreamingMoments(len(mean_D))
                moments[key].mean_D, moments[key].scatter_DD = mean_D, content.get_tensor(f"{key}/scatter")
                moments[key].count = about["images"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no statistics of images ({type(error).__name__}: {error})") from None
    return moments, about


def _resumed(file: Path, *, about: Mapping[str, Any], networks: Sequence[FeatureNetwork]) -> _State:
    """Where a run of the same request stopped; the start where there is none."""
    if file.is_file():
        moments, before = _read(file)
        if all(before.get(key) == value for key, value in about.items()):
            left_out = LeftOut(before["left_out"])
            return _State(moments, before["position"], int(before["digest"], 16), left_out)
    return _State({network_key(each): StreamingMoments(each.num_features) for each in networks})


def _from_npz(path: Path) -> FolderMoments:
    try:
        with np.load(path, allow_pickle=False) as content:
            mean_D, covariance_DD = (torch.from_numpy(content[name].astype(np.float64)) for name in ("mu", "sigma"))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} holds no mu and sigma ({error}); give pytorch-fid's .npz or the folder") from None
    moments = Moments(0, mean_D, covariance_DD)
    return FolderMoments(
        {"inception-2015 pytorch-fid": moments}, {"images": 0, "images_sha256": f"file {image_name(path)}"}
    )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0)
    return (stat.st_size, stat.st_mtime_ns)
