"""The generation part of `make eval`: generate images to a folder, then score the folder.

Images are generated for validation captions of every source (Frechet distance, CLIPScore), and for prompts of the six
skills of GenEval, which the scene checker verifies.

Shapes: N images, H height, W width.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import tokenizer
from data_mix.demo.scene_checker import Verdict, check, describe
from data_mix.demo.scene_prompts import SKILLS, ScenePrompt, evaluation_prompts
from eval.command import model_hash
from eval.config import EvalConfig
from eval.metrics.clipscore import Clip, clip_conventions, clip_cosines, load_clip, missing_clip, no_text_note
from eval.metrics.features import FeatureNetwork, frechet_rows, open_features
from eval.paper_values import GENEVAL_LLAMAGEN_QLIP, UM3
from eval.scores import SHOWN_IMAGES, Measurement, PartResult, Score, bootstrap
from eval.tasks.generate_images import GenerateConfig, generate_folder
from eval.tasks.generated_images import read_images
from eval.tasks.nearest_training import nearest_rows, training_codes
from eval.tasks.prompts import Prompt
from eval.tasks.validation_data import validation_images
from tokenizer.images import embed_images, embed_texts
from tokenizer.modeling import QLIPModel
from tokenizer.processor import QLIPProcessor
from um3.core.errors import UserError
from um3.core.files import short_hash
from um3.core.progress import track
from um3.inference.image_pipeline import ImagePipeline

CHECKER = "scene checker"


def evaluate_generation(config: EvalConfig, *, model: Path, pipeline: ImagePipeline) -> PartResult:
    """Generate images to RESULTS/generated/NAME and score them. Images of an interrupted evaluation are reused.

    UserError if the feature network or CLIP is missing, or a source has too few usable images.
    """
    part = config.generation
    towers: dict[str, Any] = {"model": pipeline.qlip, "processor": pipeline.processor}
    # Load the metrics' networks before the hours of generation.
    features = open_features(config.fid_features, **towers, inception_weights=config.inception_weights)
    clip = load_clip(part.clip) if part.clip else None
    judge = tokenizer.load(part.judge) if part.judge else None
    if judge and (note := no_text_note(judge[1])):
        raise UserError(f"generation.judge={part.judge}: {note}")
    of = Measurement("", config.seed, part.sampling.protocol())
    result = PartResult([], {"captions": {}, "skills": []}, {})
    wanted = {"num_images": part.num_images, "size": pipeline.processor.image_size, "seed": config.seed}
    data = [validation_images(source, **wanted) for source in config.captioned]
    for source in data:
        prompts = source.full_captions
        images_NHWC, samples = _generate(config, name=source.name, prompts=prompts, model=model, pipeline=pipeline)
        task = of.named(f"{source.name}_generation")
        options: dict[str, Any] = {"pipeline": pipeline, "features": features, "clip": clip, "captions": prompts}
        result.scores.extend(distribution_scores(images_NHWC, originals_NHWC=source.images, of=task, **options))
        if judge is not None:
            result.scores.append(judge_row(images_NHWC, captions=prompts, judge=judge, of=task))
        if source.has_checker:
            note = "the caption read from the generated pixels equals the prompt"
            result.scores.append(read_back_row(images_NHWC, captions=prompts, note=note, of=task))
        known: dict[str, Any] = {"source": source.name, "tokenizer": pipeline.visual_tokenizer}
        training = training_codes(config.run, **known) if config.run else None
        if training is not None:
            first = {"images": images_NHWC[:SHOWN_IMAGES], "originals": source.images[:SHOWN_IMAGES]}
            rows, result.images[f"{source.name}_nearest"] = nearest_rows(training, **first, of=task)
            result.scores.extend(rows)
        result.samples["captions"][source.name] = samples[:SHOWN_IMAGES]
        result.images[f"{source.name}_drawn"] = images_NHWC[:SHOWN_IMAGES]
        result.images[f"{source.name}_real"] = source.images[:SHOWN_IMAGES]
    if any(source.has_checker for source in data):
        _evaluate_skills(config, model=model, pipeline=pipeline, result=result, of=of.named("skills"))
    return result


def _evaluate_skills(
    config: EvalConfig, *, model: Path, pipeline: ImagePipeline, result: PartResult, of: Measurement
) -> None:
    """Generate images for the prompts of the six skills, and add their scores to `result`."""
    scenes = evaluation_prompts(per_skill=config.generation.per_skill, seed=config.seed)
    prompts = [scene.prompt for scene in scenes]
    images_NHWC, samples = _generate(config, name="skills", prompts=prompts, model=model, pipeline=pipeline)
    result.images["skills"], verdicts = images_NHWC, check_scenes(images_NHWC, prompts=scenes)
    result.scores.extend(skill_scores(verdicts, prompts=scenes, of=of))
    result.samples["skills"] = [
        sample | {"skill": scene.skill, "passed": verdict.passed, "demands_met": verdict.demands_met}
        for sample, scene, verdict in zip(samples, scenes, verdicts, strict=True)
    ]


def _generate(
    config: EvalConfig, *, name: str, prompts: Sequence[str], model: Path, pipeline: ImagePipeline
) -> tuple[NDArray, list[dict[str, Any]]]:
    """One image per prompt in RESULTS/generated/NAME; images with other settings or of another model are replaced."""
    folder = config.results_dir / "generated" / name
    if config.force:
        shutil.rmtree(folder, ignore_errors=True)
    settings: dict[str, Any] = {"seed": config.seed, "sampling": config.generation.sampling}
    request = GenerateConfig(model=str(model), prompts=name, output_dir=str(folder), **settings)
    numbered = [Prompt(f"{index:05d}", text) for index, text in enumerate(prompts)]
    generated = generate_folder(request, prompts=numbered, load_pipeline=lambda: pipeline, is_exclusive=True)
    samples = [{"prompt": prompt.prompt, "seed": prompt.seeds[0]} for prompt in generated.prompts]
    return read_images(folder, generated), samples


def distribution_scores(
    images_NHWC: NDArray,
    *,
    originals_NHWC: NDArray,
    captions: Sequence[str],
    pipeline: ImagePipeline,
    features: FeatureNetwork,
    clip: Clip | None,
    of: Measurement,
) -> list[Score]:
    """Frechet distance of the generated images to the real ones with the same captions, and CLIPScores of both."""
    of = of.with_protocol(prompts_sha256=short_hash(captions))
    rows = frechet_rows(images_NHWC, originals_NHWC=originals_NHWC, features=features, fid="fid", paper=UM3, of=of)
    if clip is None:
        rows.append(missing_clip(of, setting="generation.clip"))
    else:
        cosines_N = clip_cosines(images_NHWC, texts=captions, clip=clip)
        rows += clip_conventions(cosines_N, of=of.with_protocol(towers=model_hash(clip.name), prefix=""))
    if note := no_text_note(pipeline.processor):
        return [*rows, of.missing("clipscore_qlip", note=note)]
    of = of.with_protocol(towers="qlip", fingerprint=pipeline.qlip.fingerprint()[:12])
    generated, real = pipeline.similarity(images_NHWC, captions), pipeline.similarity(originals_NHWC, captions)
    other = pipeline.similarity(images_NHWC, [*captions[1:], *captions[:1]])
    return [
        *rows,
        of.mean("clipscore_qlip", generated, note="by the tokenizer's own towers, not CLIP's"),
        of.mean("clipscore_qlip_real", real, note="the real images with these captions"),
        of.mean("clipscore_qlip_other", other, note="every generated image with the prompt of another image"),
    ]


def judge_row(
    images_NHWC: NDArray, *, captions: Sequence[str], judge: tuple[QLIPModel, QLIPProcessor], of: Measurement
) -> Score:
    """CLIPScore by the towers of a QLIP that is none of the models under test."""
    qlip, processor = judge
    of = of.with_protocol(prompts_sha256=short_hash(captions), towers="judge", fingerprint=qlip.fingerprint()[:12])
    towers: dict[str, Any] = {"model": qlip, "processor": processor}
    cosines_N = (embed_images(images_NHWC, **towers) * embed_texts(captions, **towers)).sum(-1)
    return of.mean("clipscore_judge", cosines_N.tolist(), note="by the towers of generation.judge")


def check_scenes(images_NHWC: Iterable[NDArray], *, prompts: Sequence[ScenePrompt]) -> list[Verdict]:
    """The scene checker's verdict on every image."""
    pairs = track(zip(images_NHWC, prompts, strict=True), total=len(prompts), label="check images")
    return [check(image, prompt.demands) for image, prompt in pairs]


def skill_scores(verdicts: Sequence[Verdict], *, prompts: Sequence[ScenePrompt], of: Measurement) -> list[Score]:
    """Share of images that meet all demands of their prompt, for each of GenEval's six skills, and the mean of the six.

    UserError if a skill has no prompt.
    """
    of = of.with_protocol(judge=CHECKER, prompts_sha256=short_hash([prompt.prompt for prompt in prompts]))
    rows, paper = [], GENEVAL_LLAMAGEN_QLIP
    shares, weights = list[float](), list[float]()
    for skill in SKILLS:
        passed = [v.passed for v, prompt in zip(verdicts, prompts, strict=True) if prompt.skill == skill]
        if not passed:
            raise UserError(f"no prompts for the skill '{skill}'; set generation.per_skill to at least 2")
        rows.append(of.mean(skill, passed, unit="%", paper=paper[skill]))
        shares += [is_passed / len(passed) for is_passed in passed]
        weights += [1 / len(passed)] * len(passed)
    mean = sum(row.value or 0.0 for row in rows) / len(rows)
    note, interval = "mean of the six skills, as in GenEval", bootstrap(shares, weights=weights)._asdict()
    return [*rows, of.score("mean", mean, n=len(verdicts), unit="%", paper=paper["mean"], note=note, **interval)]


def read_back_row(images_NHWC: Iterable[NDArray], *, captions: Sequence[str], note: str, of: Measurement) -> Score:
    """Share of images whose caption, read from the pixels by the scene checker, equals the expected one."""
    descriptions = [describe(image) for image in track(images_NHWC, total=len(captions), label="read images")]
    hits = [description == caption for description, caption in zip(descriptions, captions, strict=True)]
    return of.with_protocol(judge=CHECKER).mean("read_back", hits, unit="%", note=note)
