"""Small code shards with random codes, for tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_mix.codes.shards import ShardHeader, shard_path, write_shard


def random_codes(shard: int, *, num_images: int, num_patches: int = 16, bits: int = 28) -> np.ndarray:
    """The codes_BN that `write_codes` writes."""
    return np.random.default_rng(shard).integers(0, 2**bits, size=(num_images, num_patches))


def write_codes(
    folder: Path,
    *,
    shard: int = 0,
    num_images: int = 5,
    num_patches: int = 16,
    captions: Callable[[int], list[str]] = lambda row: [f"caption {row}", "short"][: 1 + row % 2],
    **header: Any,
) -> Path:
    """Write one shard; `header` sets fields of its header, `captions` gives those of image `row`."""
    values = {"fingerprint": "f" * 64, "bits": 28, "image_size": 32, "split": "train", "source": "scenes"} | header
    full_header = ShardHeader(shard=shard, **values)
    path = shard_path(folder, split=full_header.split, source=full_header.source, shard=shard)
    codes_BN = random_codes(shard, num_images=num_images, num_patches=num_patches, bits=full_header.bits)
    keys = [f"{full_header.source}-{shard}-{row}" for row in range(num_images)]
    texts = [captions(row) for row in range(num_images)]
    write_shard(path, header=full_header, keys=keys, codes_BN=codes_BN, captions=texts)
    return path
