"""A folder of caption features, so that training need not encode captions: a safetensors file per code shard.

    train-scenes-00000.safetensors    # features (F, C) of its captions one after the other, ends (B), keys (B, 2)

Legend: B captions, T positions of the longest, F positions of all captions of a file, C width of the features.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from downstream.llamagen.captions import clean_caption
from downstream.llamagen.text_encoder import CaptionFeatures, TextEncoder
from um3.core.errors import UserError
from um3.core.files import atomic_file
from um3.core.text import printable, valid_text

FILES = "train-*.safetensors"
"""Named after the code shards; other files of a folder are left alone."""
METADATA_KEY = "caption_features_1"  # ends with the version of the format
ENCODED_AT_A_TIME = 256


@dataclass(frozen=True)
class FeaturesHeader:
    """What decides the features of a caption.

    encoder: kind and fingerprint of the text encoder. max_tokens: the setting. clean: whether captions were cleaned.
    """

    encoder: str
    max_tokens: int
    clean: bool


def write_features(
    path: Path, captions: Sequence[str], *, encoder: TextEncoder, header: FeaturesHeader, part: str
) -> None:
    """Encode the distinct `captions` and write them atomically; `part` identifies them (`is_written`)."""
    # Captions of similar length are encoded together.
    distinct = sorted({valid_text(caption) for caption in captions}, key=lambda caption: (len(caption), caption))
    parts, lengths = [torch.empty(0, encoder.width, dtype=encoder.dtype)], list[int]()
    for start in range(0, len(distinct), ENCODED_AT_A_TIME):
        texts = distinct[start : start + ENCODED_AT_A_TIME]
        features_BTC, mask_BT = encoder([clean_caption(text) if header.clean else text for text in texts])
        parts.append(features_BTC[mask_BT].cpu())
        lengths += mask_BT.sum(1).tolist()
    tensors = {
        "features": torch.cat(parts),
        "ends": torch.tensor(lengths, dtype=torch.int64).cumsum(0),
        "keys": torch.from_numpy(_keys(distinct)),
    }
    facts = {"positions": encoder.max_tokens, "part": part, "crc32": _crc32(tensors)}
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(asdict(header) | facts)})


def is_written(path: Path, *, header: FeaturesHeader, part: str) -> bool:
    """Whether a file holds the features of a `part`, made as `header` says."""
    try:
        facts = _open(path)[1]
    except UserError:
        return False
    return facts["part"] == part and all(facts[name] == value for name, value in asdict(header).items())


def check_features(path: Path) -> None:
    """UserError if a file does not have the content that was written."""
    file, facts = _open(path)
    if _crc32({name: file.get_tensor(name) for name in ("features", "ends", "keys")}) != facts["crc32"]:
        raise UserError(f"{path} is damaged (checksum); delete it and run make text-features")


class CachedFeatures:
    """The features of a folder, in place of a `TextEncoder`; they are read from mapped files as they are needed.

    `width` is that of the features, `max_tokens` the most positions of a caption.
    """

    def __init__(self, folder: str | Path, *, header: FeaturesHeader):
        """UserError: there are no features, or features of another encoder, length or cleaning than `header`."""
        self.folder = Path(folder)
        opened = {path: _open(path) for path in sorted(self.folder.glob(FILES))}
        if not opened:
            raise UserError(
                f"there are no caption features in '{folder}'; run make text-features, or unset text_features"
            )
        for path, (_, facts) in opened.items():
            for name, value in asdict(header).items():
                if facts[name] != value:
                    made = f"{path} was made with {name}={facts[name]}, this run has {value}"
                    raise UserError(f"{made}; run make text-features again, or unset text_features")
        self._files = [file for file, _ in opened.values()]
        self.width = self._files[0].get_slice("features").get_shape()[1]
        self.max_tokens = next(int(facts["positions"]) for _, facts in opened.values())
        self.digest = hashlib.sha256(repr([facts["crc32"] for _, facts in opened.values()]).encode()).hexdigest()[:16]
        keys = [file.get_tensor("keys").numpy() for file in self._files]
        places = [np.stack([np.full(len(part), number), np.arange(len(part))], 1) for number, part in enumerate(keys)]
        keys_B2, places_B2 = np.concatenate(keys), np.concatenate(places)
        order_B = np.lexsort((keys_B2[:, 1], keys_B2[:, 0]))
        self._keys_B2, self._places_B2 = keys_B2[order_B], places_B2[order_B].astype(np.int32)
        self._ends = [file.get_tensor("ends") for file in self._files]

    def __call__(self, captions: Sequence[str]) -> CaptionFeatures:
        """The features of captions, padded as a `TextEncoder` pads them; UserError for a caption without any."""
        found = [self._read(caption, key_2) for caption, key_2 in zip(captions, _keys(captions), strict=True)]
        longest = max(map(len, found))
        features_BTC = found[0].new_zeros(len(found), longest, self.width)
        mask_BT = torch.zeros(len(found), longest, dtype=torch.bool)
        for number, part_TC in enumerate(found):
            features_BTC[number, longest - len(part_TC) :] = part_TC
            mask_BT[number, longest - len(part_TC) :] = True
        return CaptionFeatures(features_BTC, mask_BT)

    def _read(self, caption: str, key_2: NDArray[np.int64]) -> Tensor:
        first, last = (np.searchsorted(self._keys_B2[:, 0], key_2[0], side=side) for side in ("left", "right"))
        for index in range(first, last):
            if self._keys_B2[index, 1] == key_2[1]:
                file, row = self._places_B2[index]
                ends_B = self._ends[file]
                start = int(ends_B[row - 1]) if row else 0
                features_TC: Tensor = self._files[file].get_slice("features")[start : int(ends_B[row])]
                return features_TC
        missing = f"'{printable(caption[:60])}' has no features in {self.folder}"
        raise UserError(f"{missing}; run make text-features for these codes and data.caption")


def _keys(captions: Sequence[str]) -> NDArray[np.int64]:
    """The first 16 bytes of each caption's sha256, as two integers (B, 2)."""
    digests = [hashlib.sha256(valid_text(caption).encode()).digest()[:16] for caption in captions]
    return np.frombuffer(b"".join(digests), dtype="<i8").reshape(-1, 2).copy()


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    crc32 = 0
    for name in sorted(tensors):
        crc32 = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data, crc32)
    return crc32


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """A file, mapped, and its metadata; UserError if it does not exist, is damaged or is another kind of file."""
    try:
        file: Any = safe_open(path, framework="pt")
        return file, json.loads((file.metadata() or {})[METADATA_KEY])
    except (SafetensorError, OSError, KeyError, ValueError):
        raise UserError(
            f"{path} is missing, damaged or not a file of caption features; delete it and run make text-features"
        ) from None
