"""`python -m eval generate-images model=FOLDER prompts=FILE output_dir=FOLDER`: generate a benchmark's images.

It resumes from the images on disk, and `torchrun --nproc-per-node N -m eval generate-images ...` shares the work. An
image's random numbers come from the seed and its place in the list alone, and prompts are generated in fixed groups.
So neither a kill nor the number of processes changes a pixel. (`sampling.batch_size` changes the groups, which may
change the last digits of the logits.)
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from eval.command import model_hash, run_command
from eval.config import SamplingConfig
from eval.tasks.generated_images import (
    GeneratedFolder,
    GeneratedPrompt,
    Layout,
    check_manifest,
    has_manifest,
    image_files,
    write_images,
    write_manifest,
)
from eval.tasks.prompts import Prompt, read_prompts
from um3.core.distributed import device, is_main, rank, world_size
from um3.core.errors import UserError
from um3.core.files import folder_lock, short_hash
from um3.core.progress import Progress, format_seconds, quiet_progress
from um3.core.ranges import NonNegativeInt, Range
from um3.core.seeds import derive_seed

if TYPE_CHECKING:
    from um3.inference.pipeline import UM3Pipeline

MANIFEST_TIMEOUT_S = 60.0


@dataclass
class GenerateConfig:
    """What to generate, and where.

    The benchmarks' own sizes: COCO-30k 1 image per prompt (flat), GenEval 4 (geneval), DPG-Bench 4 (grid).
    """

    model: str = ""
    """Folder of a trained UM3."""
    prompts: str = ""
    """.jsonl, .csv, .tsv, .txt, a folder of .txt, or COCO's captions: see `eval.tasks.prompts`."""
    output_dir: str = ""
    layout: Layout = "flat"
    num_images: Annotated[int, Range(1, 10_000)] = 1
    """Images per prompt."""
    limit: NonNegativeInt = 0
    """Number of prompts, from the start of the list; 0 for all."""
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if empty := [name for name in ("model", "prompts", "output_dir") if not getattr(self, name)]:
            raise ValueError(f"set {empty[0]}=PATH")
        if self.layout == "grid" and self.num_images > 4:
            raise ValueError(f"num_images is {self.num_images}; layout=grid allows 1 to 4")


def main(arguments: Sequence[str]) -> None:
    """Generate the missing images."""
    about = "Generate the images of a benchmark, resumable."
    run_command(GenerateConfig, generate_benchmark, name="generate-images", about=about, arguments=arguments)


def generate_benchmark(config: GenerateConfig) -> None:
    """Generate the images of a prompt list.

    Raises:
        UserError: the model or the prompts are missing, or the folder holds other images.
    """
    if not (Path(config.model) / "config.json").is_file():
        raise UserError(f"no UM3 model in {config.model}; run make um3 first, or set model=FOLDER")
    prompts = read_prompts(config.prompts, limit=config.limit, seed=config.seed)
    if config.layout == "geneval" and not all(prompt.line for prompt in prompts):
        raise UserError(f"layout=geneval needs GenEval's metadata (.jsonl), not {config.prompts}")

    def load() -> "UM3Pipeline":
        from transformers.utils.logging import disable_progress_bar

        from um3.inference.pipeline import UM3Pipeline

        disable_progress_bar()
        return UM3Pipeline.from_pretrained(config.model, device=device())

    with folder_lock(config.output_dir) if is_main() else contextlib.nullcontext():
        generate_folder(config, prompts=prompts, load_pipeline=load, share_over_ranks=True)


def generate_folder(
    config: GenerateConfig,
    *,
    prompts: Sequence[Prompt],
    load_pipeline: Callable[[], "UM3Pipeline"],
    share_over_ranks: bool = False,
    replace: bool = False,
) -> GeneratedFolder:
    """Generate the images that are missing in `config.output_dir`; without any the pipeline is not loaded.

    Args:
        share_over_ranks: generate this rank's share only.
        replace: delete images with other settings, instead of raising.

    Raises:
        UserError: the folder holds other images.
    """
    began, folder = time.monotonic(), Path(config.output_dir)
    generated = plan_folder(config, prompts=prompts)
    deadline = began + MANIFEST_TIMEOUT_S
    while share_over_ranks and not is_main() and not has_manifest(folder) and time.monotonic() < deadline:
        time.sleep(0.1)  # until the first rank has checked the folder; ranks do not communicate
    try:
        is_planned = check_manifest(folder, generated)
    except UserError:
        if not replace:
            raise
        shutil.rmtree(folder)
        is_planned = False
    if is_main() and not is_planned:
        write_manifest(folder, generated, model=config.model, prompts_file=config.prompts)
    size = max(1, config.sampling.batch_size // config.num_images)
    groups: Sequence[range] = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    groups = groups[rank() :: world_size()] if share_over_ranks else groups
    files = generated.prompts
    missing = [
        group for group in groups if not all((folder / file).is_file() for i in group for file in files[i].files)
    ]
    count, num_missing = (sum(map(len, ranges)) * config.num_images for ranges in (groups, missing))
    if missing:
        pipeline, progress = load_pipeline(), Progress(count, label="generate images", start=count - num_missing)
    for group in missing:
        with quiet_progress():
            _generate_group(
                config, pipeline=pipeline, prompts=[prompts[i] for i in group], files=[files[i] for i in group]
            )
        progress.advance(len(group) * config.num_images)
    result = f"generated in {format_seconds(time.monotonic() - began)}" if missing else "up to date"
    print(f"{count} images {result} -> {folder}" + (f" (rank {rank()})" if not is_main() else ""))
    return generated


def plan_folder(config: GenerateConfig, *, prompts: Sequence[Prompt]) -> GeneratedFolder:
    """The manifest: everything that the images depend on. Files and seeds depend on a prompt's place alone."""
    generated = [
        GeneratedPrompt(
            prompt.id,
            prompt.text,
            image_files(config.layout, index=index, prompt_id=prompt.id, num_images=config.num_images),
            [derive_seed(config.seed, "image", index, copy) for copy in range(config.num_images)],
        )
        for index, prompt in enumerate(prompts)
    ]
    protocol = {
        "num_prompts": len(prompts),
        "prompts_sha256": short_hash([prompt.text for prompt in prompts]),
        "layout": config.layout,
        "images_per_prompt": config.num_images,
        **config.sampling.protocol(),
    }
    seeds = [seed for prompt in generated for seed in prompt.seeds]
    pins = {"seed": config.seed, "seeds_sha256": short_hash(seeds), "model_sha256": model_hash(config.model)}
    return GeneratedFolder(protocol, pins, generated)


def _generate_group(
    config: GenerateConfig, *, pipeline: "UM3Pipeline", prompts: Sequence[Prompt], files: Sequence[GeneratedPrompt]
) -> None:
    images_NHWC = pipeline.generate(
        [prompt.text for prompt in prompts],
        num_images=config.num_images,
        seeds=[seed for prompt in files for seed in prompt.seeds],
        batch_size=config.sampling.batch_size,
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        top_k=config.sampling.top_k,
        guidance_scale=config.sampling.guidance_scale,
    ).images
    for index, prompt in enumerate(prompts):
        images = list(images_NHWC[index * config.num_images : (index + 1) * config.num_images])
        names = files[index].files
        write_images(Path(config.output_dir), layout=config.layout, files=names, images=images, prompt=prompt)
