"""What a call of the pipeline asks for: texts, how many images of each, and every result's seed."""

from collections.abc import Callable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING

from um3.core.errors import UserError
from um3.core.progress import Progress
from um3.core.seeds import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

Watch = Callable[[range, "Tensor"], None]
"""Shown a batch's places among all images and its ids so far (positions, B) at every position; may raise to end it."""
MAX_IMAGES = 1_000_000
"""Of one call: a slip of the finger is refused before it fills the memory."""


class Jobs:
    """The images of one call: `prompt_of` (B,) says which prompt each is of, `seeds` (B,) what it is drawn from."""

    def __init__(
        self, prompts: Sequence[str], *, num_images: int, best_of: int, seed: int, seeds: Sequence[int] | None
    ):
        check_counts(num_images=num_images)
        if best_of and best_of < num_images:
            raise UserError(
                f"best of {best_of} leaves no {num_images} images to choose; draw as many or more, or 0 to rank none"
            )
        copies = best_of or num_images
        if len(prompts) * copies > MAX_IMAGES:
            raise UserError(f"{len(prompts) * copies:,} images in one call; at most {MAX_IMAGES:,}")
        self.prompts, self.num_images, self.best_of = prompts, num_images, best_of
        self.prompt_of = [index for index in range(len(prompts)) for _ in range(copies)]
        names = [("image", index, copy) for index in range(len(prompts)) for copy in range(copies)]
        self.seeds = own_seeds(seeds, names=names, seed=seed)


def own_seeds(given: Sequence[int] | None, *, names: Sequence[tuple[str | int, ...]], seed: int) -> list[int]:
    """The given seeds, or one for each of `names` under `seed`."""
    if given is None:
        return [derive_seed(seed, *name) for name in names]
    if len(given) != len(names):
        raise UserError(f"{len(given)} seeds for {len(names)} results; give each its own")
    for each in given:
        if not 0 <= each < 2**63:
            raise UserError(f"seed {each} is outside 0 .. 2**63 - 1")
    return list(given)


def as_texts(texts: Sequence[str], *, what: str, may_be_empty: bool = False) -> list[str]:
    """A list of texts; one text alone is a list of one."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"{what} {index + 1} is a {type(text).__name__}, not a text")
        if not (may_be_empty or text.strip()):
            raise UserError(f"{what} {index + 1} is empty; say what {'to draw' if what == 'prompt' else 'it is'}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{what} {index + 1} holds half a surrogate pair, which is no character")
    return texts


def check_pairs(images: Sized, texts: Sized) -> None:
    if len(images) != len(texts):
        raise UserError(f"{len(images)} pictures and {len(texts)} texts; give each picture its own")


def check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name.replace('_', ' ')} is {count}; use 1 or more")


def batches(count: int, *, batch_size: int, label: str) -> Iterator[range]:
    """0 .. count - 1 in ranges of at most `batch_size`; the progress is shown unless the label is empty."""
    progress = Progress(count, label=label)
    for start in range(0, count, batch_size):
        batch = range(start, min(start + batch_size, count))
        yield batch
        if label:
            progress.advance(len(batch))
