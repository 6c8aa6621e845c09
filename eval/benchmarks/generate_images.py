"""`python -m eval generate-images model=FOLDER prompts=FILE out=FOLDER`: draw the images of a benchmark to disk.

It resumes from the images on disk, and `torchrun --nproc-per-node N -m eval generate-images ...` shares the work. An image's
random numbers come from the seed and its place in the list alone, and prompts are drawn in fixed groups, whole or not
at all: neither a kill nor the number of processes changes a pixel. (Another `sampling.batch_size` makes other groups,
which may move the last digits of the logits.)
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eval.benchmarks.generated_images import DrawnFolder, DrawnPrompt, Layout, claim, image_files, write_images
from eval.benchmarks.prompts import Prompt, read_prompts
from eval.command import folder_sha256, run_command
from eval.config import SamplingConfig
from eval.records import share
from eval.scores import texts_sha256
from um3.core.distributed import device, is_main, rank
from um3.core.errors import UserError
from um3.core.progress import Progress, format_seconds, quiet_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from um3.inference.pipeline import UM3Pipeline


@dataclass
class DrawConfig:
    """What to draw, with what, and where to. The benchmarks' own sizes: COCO-30k 1 image a prompt (flat), GenEval 4
    (geneval), DPG-Bench 4 (grid)."""

    model: str = ""
    """Folder of a trained UM3."""
    prompts: str = ""
    """.jsonl, .csv, .tsv, .txt, a folder of .txt, or COCO's captions: see `eval.benchmarks.prompts`."""
    out: str = ""
    layout: Layout = "flat"
    num_images: int = 1
    """Images of each prompt."""
    limit: int = 0
    """Prompts to draw, from the front; 0 for all."""
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if empty := [name for name in ("model", "prompts", "out") if not getattr(self, name)]:
            raise ValueError(f"set {empty[0]}=PATH")
        most = 4 if self.layout == "grid" else 10_000
        if not 1 <= self.num_images <= most:
            raise ValueError(f"num_images is {self.num_images}; layout={self.layout} takes 1 to {most}")


def main(arguments: Sequence[str]) -> None:
    """Draw what the settings ask for; returns at once where all of it is there."""
    about = "Draw the images of a benchmark to disk, resumable."
    run_command(DrawConfig, draw_to_disk, name="generate-images", about=about, arguments=arguments)


def draw_to_disk(config: DrawConfig) -> None:
    """Draw every image that is missing in the folder.

    Raises:
        UserError: no such model or prompts, or a folder that was drawn otherwise.
    """
    if not (Path(config.model) / "config.json").is_file():
        raise UserError(f"no UM3 model in {config.model}; run make um3 first, or set model=FOLDER")
    began, folder = time.monotonic(), Path(config.out)
    prompts = read_prompts(config.prompts, limit=config.limit, seed=config.seed)
    if config.layout == "geneval" and not all(prompt.line for prompt in prompts):
        raise UserError(f"layout=geneval needs GenEval's metadata (.jsonl); {config.prompts} is none")
    drawn = [planned(config, index=index, prompt=prompt) for index, prompt in enumerate(prompts)]
    described = describe(config, prompts=prompts, drawn=drawn)
    claim(folder, drawn=described, write=is_main(), model=config.model, prompts_file=config.prompts)
    size = max(1, config.sampling.batch_size // config.num_images)
    groups = share([range(start, min(start + size, len(drawn))) for start in range(0, len(drawn), size)])
    missing = [group for group in groups if any(_is_missing(drawn[index], folder=folder) for index in group)]
    count = sum(map(len, groups)) * config.num_images
    if missing:
        _draw_groups(config, groups=missing, prompts=prompts, drawn=drawn, total=count)
    said = f"drawn in {format_seconds(time.monotonic() - began)}" if missing else "up to date"
    print(f"{count} images {said} -> {folder}" + (f" (rank {rank()})" if not is_main() else ""))


def planned(config: DrawConfig, *, index: int, prompt: Prompt) -> DrawnPrompt:
    """The files and seeds of a prompt: functions of the seed and its place alone."""
    from um3.core.seeds import derive_seed

    files = image_files(config.layout, index=index, prompt_id=prompt.id, num_images=config.num_images)
    seeds = [derive_seed(config.seed, "image", index, copy) for copy in range(config.num_images)]
    return DrawnPrompt(prompt.id, prompt.text, files, seeds)


def describe(config: DrawConfig, *, prompts: Sequence[Prompt], drawn: list[DrawnPrompt]) -> DrawnFolder:
    """Everything that the images depend on."""
    protocol = {
        "num_prompts": len(prompts),
        "prompts_sha256": texts_sha256([prompt.text for prompt in prompts]),
        "layout": config.layout,
        "images_per_prompt": config.num_images,
        **config.sampling.protocol(),
    }
    pins = {
        "seed": config.seed,
        "seeds_sha256": texts_sha256([str(seed) for each in drawn for seed in each.seeds]),
        "model_sha256": folder_sha256(config.model),
    }
    return DrawnFolder(protocol, pins, drawn)


def _is_missing(drawn: DrawnPrompt, *, folder: Path) -> bool:
    return not all((folder / file).is_file() for file in drawn.files)


def _draw_groups(
    config: DrawConfig,
    *,
    groups: Sequence[range],
    prompts: Sequence[Prompt],
    drawn: Sequence[DrawnPrompt],
    total: int,
) -> None:
    from transformers.utils.logging import disable_progress_bar

    from um3.inference.pipeline import UM3Pipeline

    disable_progress_bar()
    pipeline = UM3Pipeline.from_pretrained(config.model, device=device())
    left = sum(map(len, groups)) * config.num_images
    progress = Progress(total, label="draw images", start=total - left)
    for group in groups:
        with quiet_progress():
            images = _draw_group(pipeline, drawn=[drawn[index] for index in group], sampling=config.sampling)
        for place, index in enumerate(group):
            own = list(images[place * config.num_images : (place + 1) * config.num_images])
            files = drawn[index].files
            write_images(Path(config.out), layout=config.layout, files=files, images=own, prompt=prompts[index])
        progress.advance(len(group) * config.num_images)


def _draw_group(pipeline: "UM3Pipeline", *, drawn: Sequence[DrawnPrompt], sampling: SamplingConfig) -> "NDArray":
    generated = pipeline.generate(
        [each.prompt for each in drawn],
        num_images=len(drawn[0].seeds),
        seeds=[seed for each in drawn for seed in each.seeds],
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        guidance_scale=sampling.guidance_scale,
        batch_size=sampling.batch_size,
    )
    return generated.images
