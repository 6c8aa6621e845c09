"""Means and covariances of the features of a folder's images, and the files of reference statistics.

Shapes: N images, H height, W width, D feature dimensions.
"""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from eval.benchmarks.benchmark import Benchmark
from eval.command import SkipCounter
from eval.metrics.features import FeatureNetwork
from eval.metrics.frechet import Moments, StreamingMoments
from eval.part_files import read_arrays, write_arrays
from eval.results_cache import image_hash
from um3.core.config import differences
from um3.core.errors import UserError
from um3.core.files import short_hash

BATCH = 50
PYTORCH_FID = "inception-2015 pytorch-fid"
REMEDY = "set reference= to a folder of real images or to pytorch-fid's .npz with mu and sigma"


Preparation = tuple[str, Callable[[Image.Image], NDArray]]
"""How an RGB image becomes uint8 (H, W, 3), in words and as a function."""


class FeatureStatistics(NamedTuple):
    """The moments of each network's features by the network's key.

    `about` names the networks, the preparation of the images, their number and, whatever their order, the images.
    """

    moments: dict[str, Moments]
    about: dict[str, Any]


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
    """Measure the statistics of all images (by name) that can be used, at least two; a killed run resumes.

    Every image's features are cached, 11 KB for each way of preparing it for Inception (0.7 GB for COCO-30k): the ranks
    share the images, and the sums are over the same numbers in the same order in every run. Images whose shorter side
    has not `side` pixels are skipped; 0 uses all.
    """

    def extract(_: Sequence[str], images: Sequence[Image.Image]) -> list[dict[str, str] | None]:
        results: list[dict[str, str] | None] = [None] * len(images)
        if usable := [index for index, image in enumerate(images) if side in (0, min(image.size))]:
            images_NHWC = np.stack([preparation[1](images[index]) for index in usable])
            features = {network.key: network.extract(images_NHWC).numpy() for network in networks}
            for row, index in enumerate(usable):
                vectors = {key: features_ND[row].astype(np.float32) for key, features_ND in features.items()}
                results[index] = {key: base64.b64encode(vector.tobytes()).decode() for key, vector in vectors.items()}
        return results

    about: dict[str, Any] = _request(networks, preparation)
    features = benchmark.results(
        files,
        protocol=[about, side],
        open_model=lambda: extract,
        label=label,
        skipped=skipped,
        batch_size=BATCH,
        parse=lambda encoded: {key: encoded[key] for key in about["networks"]},
        unusable="image of another size",
    )
    if len(features) < 2:
        reasons = skipped.note() or "there are no others"
        raise UserError(f"{label}: only {len(features)} of {len(files)} images are usable ({reasons}); add images")
    moments = {network.key: StreamingMoments(network.num_features) for network in networks}
    encoded = list(features.values())
    for start in range(0, len(encoded), BATCH):
        for key, streaming in moments.items():
            batch = [base64.b64decode(of_image[key]) for of_image in encoded[start : start + BATCH]]
            streaming.add(torch.from_numpy(np.stack([np.frombuffer(row, dtype=np.float32) for row in batch])))
    about |= {"images": len(features), "images_sha256": short_hash(sorted(map(short_hash, encoded)))}
    return FeatureStatistics({key: streaming.result() for key, streaming in moments.items()}, about)


def save_statistics(path: Path, statistics: FeatureStatistics) -> None:
    """Write reference statistics that `load_statistics` reads."""
    arrays = {"about": np.asarray(json.dumps(statistics.about))}
    for key, moments in statistics.moments.items():
        arrays |= {f"{key}/mu": moments.mean.numpy(), f"{key}/sigma": moments.covariance.numpy()}
    write_arrays(path, arrays)


def load_statistics(path: Path, *, networks: Sequence[FeatureNetwork], preparation: Preparation) -> FeatureStatistics:
    """Read an .npz of `save_statistics`, or of pytorch-fid (mu and sigma of its own preprocessing only).

    UserError for another file, other networks or another preparation.
    """
    expected, changes = _request(networks, preparation), list[str]()
    try:
        arrays = read_arrays(path)
        about: dict[str, Any] = {"images": 0, "images_sha256": image_hash(path), "networks": {PYTORCH_FID: ""}}
        if "mu" in arrays:
            arrays = {f"{PYTORCH_FID}/{name}": array for name, array in arrays.items()}
        else:
            about = json.loads(str(arrays["about"]))
            about = {**about, "images": int(about["images"]), "images_sha256": str(about["images_sha256"])}
            changes = differences({key: about.get(key) for key in expected}, expected)
    except (UserError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} contains no feature statistics ({error}); {REMEDY}") from None
    if changes:
        how = "; ".join(changes)
        raise UserError(f"{path} was made differently ({how}); set reference= to the folder of real images")
    sizes = {network.key: network.num_features for network in networks}
    moments = {}
    for key in about["networks"]:
        pair = [arrays.get(f"{key}/{name}", np.empty(0)) for name in ("mu", "sigma")]
        size = sizes.get(key, pair[0].size)
        is_finite = all(array.size and array.dtype.kind in "fiu" and np.isfinite(array).all() for array in pair)
        if [array.shape for array in pair] != [(size,), (size, size)] or not is_finite:
            shapes = ", ".join(f"{array.dtype} {array.shape}" for array in pair)
            raise UserError(f"{path} contains no feature statistics of {size} finite dimensions ({shapes}); {REMEDY}")
        moments[key] = Moments(about["images"], *(torch.from_numpy(array.astype(np.float64)) for array in pair))
    return FeatureStatistics(moments, about)


def _request(networks: Sequence[FeatureNetwork], preparation: Preparation) -> dict[str, Any]:
    return {"preparation": preparation[0], "networks": {n.key: n.weights_sha256 for n in networks}}
