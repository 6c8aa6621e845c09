"""Drawn images: do they show what the prompt demands, do they fit it, are they distributed like real ones?

Shapes: N images, H height, W width.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from data_mix.demo.scene_checker import Verdict, check, describe
from data_mix.demo.scene_prompts import SKILLS, ScenePrompt
from eval.config import SamplingConfig
from eval.metrics.clipscore import Clip, clipscore_rows
from eval.metrics.features import FeatureNetwork, inception_note
from eval.metrics.frechet import frechet_distance
from eval.paper_values import GENEVAL_LLAMAGEN_QLIP, UM3
from eval.scores import Measurement, Score, bootstrap, texts_sha256
from um3.core.errors import UserError
from um3.core.progress import track
from um3.inference.pipeline import UM3Pipeline

JUDGE = "scene checker"


class Drawing(NamedTuple):
    """A drawn image (H, W, 3) uint8 under its prompt; `skill` and `verdict` where a checker judged it."""

    image: NDArray
    prompt: str
    seed: int
    skill: str = ""
    verdict: Verdict | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pixels, as plain JSON."""
        values: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed}
        if self.verdict is not None:
            values |= {"skill": self.skill, "passed": self.verdict.passed, "demands_met": self.verdict.demands_met}
        return values


def draw(pipeline: UM3Pipeline, *, prompts: Sequence[str], seed: int, sampling: SamplingConfig) -> list[Drawing]:
    """One image for every prompt."""
    generated = pipeline.generate(
        prompts,
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        guidance_scale=sampling.guidance_scale,
        batch_size=sampling.batch_size,
    )
    return [Drawing(*each) for each in zip(generated.images, generated.prompts, generated.seeds, strict=True)]


def judge(images_NHWC: Sequence[NDArray], *, prompts: Sequence[ScenePrompt]) -> list[Verdict]:
    """The scene checker's verdict on every image."""
    pairs = track(zip(images_NHWC, prompts, strict=True), total=len(prompts), label="judge images")
    return [check(image, prompt.demands) for image, prompt in pairs]


def skill_scores(verdicts: Sequence[Verdict], *, prompts: Sequence[ScenePrompt], of: Measurement) -> list[Score]:
    """Share of images that meet all demands of their prompt, for each of GenEval's six skills, and the mean of the six.

    Raises:
        UserError: a skill without a prompt.
    """
    of = of.with_protocol(judge=JUDGE, prompts_sha256=texts_sha256([prompt.prompt for prompt in prompts]))
    rows, paper = [], GENEVAL_LLAMAGEN_QLIP
    shares: list[float] = []
    weights: list[float] = []
    for skill in SKILLS:
        passed = [v.passed for v, prompt in zip(verdicts, prompts, strict=True) if prompt.skill == skill]
        if not passed:
            raise UserError(f"no prompts for the skill '{skill}'; set generation.per_skill to 1 or more")
        rows.append(of.mean(skill, passed, unit="%", paper=paper[skill]))
        shares += [each / len(passed) for each in passed]
        weights += [1 / len(passed)] * len(passed)
    mean = sum(row.value or 0.0 for row in rows) / len(rows)
    note, ends = "mean of the six skills, as GenEval takes it", bootstrap(shares, weights=weights)._asdict()
    return [*rows, of.score("mean", mean, n=len(verdicts), unit="%", paper=paper["mean"], note=note, **ends)]


def missing_skills(of: Measurement) -> list[Score]:
    """The rows of `skill_scores` for data that no checker can judge."""
    note = "only the scenes have a checker; for other images GenEval needs a detector"
    return [of.missing(name, note=note, unit="%", paper=paper) for name, paper in GENEVAL_LLAMAGEN_QLIP.items()]


def read_back_row(images_NHWC: Iterable[NDArray], *, captions: Sequence[str], note: str, of: Measurement) -> Score:
    """Share of images whose caption the scene checker reads off the pixels, word for word."""
    read = [describe(image) for image in track(images_NHWC, total=len(captions), label="read images")]
    right = [found == caption for found, caption in zip(read, captions, strict=True)]
    return of.with_protocol(judge=JUDGE).mean("read_back", right, unit="%", note=note)


def distribution_scores(
    images_NHWC: NDArray,
    *,
    originals_NHWC: NDArray,
    captions: Sequence[str],
    pipeline: UM3Pipeline,
    features: FeatureNetwork,
    clip: Clip | None,
    of: Measurement,
) -> list[Score]:
    """Frechet distance of the drawn images to the real ones with the same captions, and their CLIPScores."""
    of = of.with_protocol(prompts_sha256=texts_sha256(captions))
    rows = frechet_rows(images_NHWC, originals_NHWC=originals_NHWC, features=features, fid="fid", paper=UM3, of=of)
    return rows + clipscore_rows(
        images_NHWC, texts=captions, originals_NHWC=originals_NHWC, pipeline=pipeline, clip=clip, of=of
    )


def frechet_rows(
    images_NHWC: NDArray,
    *,
    originals_NHWC: NDArray,
    features: FeatureNetwork,
    fid: str,
    paper: dict[str, float],
    of: Measurement,
) -> list[Score]:
    """The distance of two sets of images. Over Inception features it is called `fid`; any other name says which
    features it is over, and the row `fid` then says why it has no value."""
    distance = frechet_distance(features.moments(images_NHWC), features.moments(originals_NHWC))
    n, dims = len(images_NHWC), features.num_features
    note = f"{n} images for {dims} dimensions: biased upwards, compare only at equal n" if n < 10 * dims else ""
    named = of.with_protocol(features=features.name, dimensions=dims, features_sha256=features.weights_sha256, images=n)
    if features.preprocessing:
        named = named.with_protocol(preprocessing=features.preprocessing)
    common: dict[str, Any] = {"n": n, "higher_is_better": False, "note": note}
    if features.name == "inception-2015":
        return [named.score(fid, distance, paper=paper.get(fid), **common)]
    return [
        named.score(f"frechet_distance[{features.name}]", distance, **common),
        of.missing(fid, note=inception_note(), higher_is_better=False, paper=paper.get(fid)),
    ]
