"""Means and covariances of the features of a folder's images, and the files of reference statistics.

Shapes: N images, H height, W width, D feature dimensions.
"""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from eval.benchmarks.benchmark import Benchmark
from eval.command import SkipCounter
from eval.metrics.features import FeatureNetwork
from eval.metrics.frechet import Moments, StreamingMoments
from eval.results_cache import ImageModel, image_hash
from um3.core.config import differences
from um3.core.errors import UserError
from um3.core.files import atomic_file, short_hash

BATCH = 50
PYTORCH_FID = "inception-2015 pytorch-fid"


class Preparation(NamedTuple):
    """How an RGB image becomes uint8 (H, W, 3), in words and as a function."""

    description: str
    to_array: Callable[[Image.Image], NDArray]


class FeatureStatistics(NamedTuple):
    """The moments of each network's features by `network_key`.

    `about` names the networks, the preparation of the images, their number and, whatever their order, the images.
    """

    moments: dict[str, Moments]
    about: dict[str, Any]


def network_key(network: FeatureNetwork) -> str:
    """`inception-2015 clean-fid`, `random-features`."""
    return f"{network.name} {network.preprocessing}".strip()


def measure_features(
    benchmark: Benchmark,
    files: Mapping[str, Path],
    *,
    networks: Sequence[FeatureNetwork],
    preparation: Preparation,
    side: int = 0,
    label: str,
    skipped: SkipCounter,
) -> FeatureStatistics:
    """Measure the statistics of all images (by name) that can be used; a killed run resumes.

    Every image's features are cached, 11 KB for each way of preparing it for Inception (0.7 GB for COCO-30k): the ranks
    share the images, and the sums are over the same numbers in the same order in every run.

    Args:
        side: images whose shorter side has another length in pixels are skipped; 0 uses all.

    Raises:
        UserError: fewer than two usable images.
    """
    about: dict[str, Any] = _request(networks, preparation)
    features = benchmark.results(
        files,
        protocol=[about, side],
        open_model=lambda: _feature_model(networks, to_array=preparation.to_array, side=side),
        label=label,
        skipped=skipped,
        batch_size=BATCH,
    )
    for name in [name for name, encoded in features.items() if encoded is None]:
        skipped.add("image of another size", name)
        del features[name]
    if len(features) < 2:
        reasons = skipped.note() or "there are no others"
        raise UserError(f"{label}: only {len(features)} of {len(files)} images are usable ({reasons}); add images")
    moments = {network_key(network): StreamingMoments(network.num_features) for network in networks}
    names = list(features)
    for start in range(0, len(names), BATCH):
        batch = [features[name] for name in names[start : start + BATCH]]
        for key, streaming in moments.items():
            streaming.add(torch.from_numpy(np.stack([_decoded(encoded[key]) for encoded in batch])))
    about |= {"images": len(names), "images_sha256": short_hash(sorted(map(short_hash, features.values())))}
    return FeatureStatistics({key: streaming.result() for key, streaming in moments.items()}, about)


def save_statistics(path: Path, statistics: FeatureStatistics) -> None:
    """Write reference statistics that `load_statistics` reads."""
    arrays = {"about": np.asarray(json.dumps(statistics.about))}
    for key, moments in statistics.moments.items():
        arrays |= {f"{key}/mu": moments.mean.numpy(), f"{key}/sigma": moments.covariance.numpy()}
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_statistics(
    path: str | Path, *, networks: Sequence[FeatureNetwork], preparation: Preparation
) -> FeatureStatistics:
    """Read an .npz of `save_statistics`, or of pytorch-fid (mu and sigma of its own preprocessing only).

    Raises:
        UserError: another file, or statistics of other networks or another preparation.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = dict(content)
        if "mu" in arrays:
            moments = Moments(0, *(torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma")))
            return FeatureStatistics({PYTORCH_FID: moments}, {"images": 0, "images_sha256": image_hash(Path(path))})
        about = json.loads(str(arrays["about"]))
        pairs = {
            key: [torch.from_numpy(arrays[f"{key}/{name}"]) for name in ("mu", "sigma")] for key in about["networks"]
        }
    except (OSError, EOFError, BadZipFile, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} contains no feature statistics ({error}); set reference= to a folder of real images or to "
            "pytorch-fid's .npz with mu and sigma"
        ) from None
    expected = _request(networks, preparation)
    if changes := differences({key: about.get(key) for key in expected}, expected):
        raise UserError(
            f"{path} was made differently ({'; '.join(changes)}); set reference= to the folder of real images"
        )
    return FeatureStatistics({key: Moments(about["images"], *pair) for key, pair in pairs.items()}, about)


def _feature_model(
    networks: Sequence[FeatureNetwork], *, to_array: Callable[[Image.Image], NDArray], side: int
) -> ImageModel:
    def extract(_: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, str] | None]:
        results: list[dict[str, str] | None] = [None] * len(images)
        usable = [index for index, image in enumerate(images) if side in (0, min(image.size))]
        if usable:
            images_NHWC = np.stack([to_array(images[index]) for index in usable])
            features = {network_key(network): network.extract(images_NHWC).numpy() for network in networks}
            for row, index in enumerate(usable):
                results[index] = {key: _encoded(features_ND[row]) for key, features_ND in features.items()}
        return results

    return extract


def _encoded(features_D: NDArray) -> str:
    return base64.b64encode(features_D.astype(np.float32).tobytes()).decode()


def _decoded(encoded: str) -> NDArray:
    return np.frombuffer(base64.b64decode(encoded), dtype=np.float32)


def _request(networks: Sequence[FeatureNetwork], preparation: Preparation) -> dict[str, Any]:
    weights = {network_key(network): network.weights_sha256 for network in networks}
    return {"preparation": preparation.description, "networks": weights}
