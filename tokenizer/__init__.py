"""QLIP, the text-aligned visual tokenizer: images -> codes -> images, its text tower, losses and released layout.

Knows nothing of language models or training loops.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizer.modeling import QLIPModel
    from tokenizer.processor import QLIPProcessor


def load(folder: str | Path) -> tuple["QLIPModel", "QLIPProcessor"]:
    """Load a QLIP folder or hub id: the model in eval mode and its processor."""
    from tokenizer.modeling import load_qlip
    from tokenizer.processor import QLIPProcessor

    return load_qlip(folder).eval(), QLIPProcessor.from_pretrained(folder)
