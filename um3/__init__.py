"""UM3: a language model that reads and writes text and images.

    from um3 import UM3Pipeline

The pipeline is imported on first use, so that `import um3` (and with it the command line's `--help`) needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from um3.inference.pipeline import UM3Pipeline as UM3Pipeline

__all__ = ["UM3Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "UM3Pipeline":
        from um3.inference.pipeline import UM3Pipeline

        return UM3Pipeline
    if name == "__version__":
        from importlib.metadata import version

        return version("um3")
    raise AttributeError(f"module 'um3' has no attribute '{name}'")
