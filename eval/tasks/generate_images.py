"""`python -m eval generate-images model=FOLDER prompts=FILE output_dir=FOLDER`: generate a benchmark's images.

It resumes from the images on disk, and `torchrun --nproc-per-node N -m eval generate-images ...` shares the work. An
image's random numbers come from the seed and its place in the list alone, and prompts are generated in fixed groups.
So neither a kill nor the number of processes changes a pixel. (`sampling.batch_size` changes the groups, which may
change the last digits of the logits.)
"""

import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from um3.core.seeds import sample_seed

if TYPE_CHECKING:
    from um3.inference.image_pipeline import ImagePipeline

MANIFEST_TIMEOUT_S = 60.0


@dataclass
class GenerateConfig:
    """What to generate, and where.

    The benchmarks' own sizes: COCO-30k 1 image per prompt (flat), GenEval 4 (geneval), DPG-Bench 4 (grid).
    """

    model: str = ""
    """Folder of a trained UM3 or LlamaGen."""
    external_tokenizer: str = ""
    """The external tokenizer whose codes a LlamaGen generates, package.module:function."""
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
    """Generate the images of a prompt list; UserError without model or prompts, or if the folder holds others."""
    if not (Path(config.model) / "config.json").is_file():
        raise UserError(f"no UM3 model in {config.model}; run make um3 first, or set model=FOLDER")
    prompts = read_prompts(config.prompts, limit=config.limit, seed=config.seed)
    if config.layout == "geneval" and not all(prompt.line for prompt in prompts):
        raise UserError(f"layout=geneval needs GenEval's metadata (.jsonl), not {config.prompts}")

    def load() -> "ImagePipeline":
        from transformers.utils.logging import disable_progress_bar

        from downstream.pipelines import load_pipeline

        disable_progress_bar()
        return load_pipeline(config.model, device=device(), external_tokenizer=config.external_tokenizer)

    with folder_lock(config.output_dir) if is_main() else contextlib.nullcontext():
        generate_folder(config, prompts=prompts, load_pipeline=load)


def generate_folder(
    config: GenerateConfig,
    *,
    prompts: Sequence[Prompt],
    load_pipeline: Callable[[], "ImagePipeline"],
    is_exclusive: bool = False,
) -> GeneratedFolder:
    """Generate the images that are missing in `config.output_dir`; without any the pipeline is not loaded.

    The ranks share the work, and UserError if the folder holds other images. With `is_exclusive` this process generates
    all images, and deletes those with other settings.
    """
    began, folder = time.monotonic(), Path(config.output_dir)
    generated = _plan(config, prompts=prompts)
    deadline = began + MANIFEST_TIMEOUT_S
    while not (is_exclusive or is_main() or has_manifest(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)  # until the first rank has checked the folder; ranks do not communicate
    try:
        is_planned = check_manifest(folder, generated)
    except UserError:
        if not is_exclusive:
            raise
        shutil.rmtree(folder)
        is_planned = False
    if is_main() and not is_planned:
        write_manifest(folder, generated, model=config.model, prompts_file=config.prompts)
    files = [prompt.files for prompt in generated.prompts]
    size = max(1, config.sampling.batch_size // config.num_images)
    groups: Sequence[range] = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    groups = groups if is_exclusive else groups[rank() :: world_size()]
    missing = [group for group in groups if not all((folder / file).is_file() for i in group for file in files[i])]
    count, num_missing = (sum(map(len, ranges)) * config.num_images for ranges in (groups, missing))
    if missing:
        pipeline, progress = load_pipeline(), Progress(count, label="generate images", start=count - num_missing)
    for group in missing:
        seeds = [seed for i in group for seed in generated.prompts[i].seeds]
        options: dict[str, Any] = {"num_images": config.num_images, "seeds": seeds, **vars(config.sampling)}
        with quiet_progress():
            images = iter(pipeline.generate([prompts[i].text for i in group], **options).arrays)
        for i in group:
            copies = list(itertools.islice(images, config.num_images))
            write_images(folder, layout=config.layout, files=files[i], images=copies, prompt=prompts[i])
        progress.advance(len(group) * config.num_images)
    result = f"generated in {format_seconds(time.monotonic() - began)}" if missing else "up to date"
    print(f"{count} images {result} -> {folder}" + (f" (rank {rank()})" if not is_main() else ""))
    return generated


def _plan(config: GenerateConfig, *, prompts: Sequence[Prompt]) -> GeneratedFolder:
    """The manifest: everything that the images depend on. Files and seeds depend on a prompt's place alone."""
    generated = []
    for index, prompt in enumerate(prompts):
        files = image_files(config.layout, index=index, prompt_id=prompt.id, num_images=config.num_images)
        seeds = [sample_seed(config.seed, "image", index, copy) for copy in range(config.num_images)]
        generated.append(GeneratedPrompt(prompt.id, prompt.text, files, seeds))
    protocol = {
        "num_prompts": len(prompts),
        "prompts_sha256": short_hash([prompt.text for prompt in prompts]),
        "layout": config.layout,
        "images_per_prompt": config.num_images,
        **config.sampling.protocol(),
    }
    seeds_sha256 = short_hash([seed for prompt in generated for seed in prompt.seeds])
    pins = {"seed": config.seed, "seeds_sha256": seeds_sha256, "model_sha256": model_hash(config.model)}
    return GeneratedFolder(protocol, pins, generated)
