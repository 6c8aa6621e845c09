"""Caption metrics: exact match, BLEU, ROUGE-L, CIDEr, and METEOR on request where Java is installed.

The scorers are pycocoevalcap's, called one by one: its own `COCOEvalCap` builds SPICE first and fails offline. Values
are fractions (the paper prints them times 100). CIDEr takes its document frequencies from the references, so values
are comparable only over the same set of images; the package's `Cider` is CIDEr-D.
"""

import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.metrics.ptb_tokenizer import TOKENIZER, normalise, tokenize
from eval.paper_values import UM3
from eval.scores import Measurement, Score, bootstrap
from um3.core.errors import UserError
from um3.core.files import short_hash
from um3.core.progress import track

EXACT_MATCHES = ("exact_match", "exact_match_any")
METEOR_TIMEOUT_S = 600.0
# pycocoevalcap's own METEOR process hangs at exit after any error (it never releases a lock), and fails in locales
# that write decimals with a comma. This one has a fixed locale and a time limit.
METEOR_COMMAND = ["java", "-Duser.language=en", "-Duser.country=US", "-Xmx2G", "-jar", "meteor-1.5.jar"]
METEOR_COMMAND += ["-", "-", "-stdio", "-l", "en", "-norm"]


def caption_scores(
    candidates: Sequence[str],
    *,
    references: Sequence[Sequence[str]],
    of: Measurement,
    skipped: int = 0,
    meteor: bool = False,
    note: str = "",
) -> list[Score]:
    """All caption metrics of `candidates` against the references of each image.

    The order of the captions and the kind of white space inside them do not matter. An empty caption scores zero; the
    notes count them, after `note`. UserError if an image has no reference, or not every image has one caption.
    """
    _check(candidates, references)
    of = of.with_protocol(**_protocol(references))
    pairs = list(zip(candidates, references, strict=True))
    num_empty = sum(not tokenize(candidate) for candidate in candidates)
    empty_note = f"{num_empty} of {len(pairs)} captions are empty and count as wrong" if num_empty else ""
    notes = "; ".join(filter(None, [note, empty_note]))
    matches = [[normalise(candidate) == normalise(text) for text in texts] for candidate, texts in pairs]
    share: dict[str, Any] = {"unit": "%", "skipped": skipped}
    rows = [
        of.mean("exact_match", [first for first, *_ in matches], note="equals the full caption (captions[0])", **share),
        of.mean("exact_match_any", list(map(any, matches)), note="equals any of the references", **share),
    ]
    common: dict[str, Any] = {"unit": "x100", "n": len(pairs), "skipped": skipped}
    num_words = max(len(tokenize(texts[0]).split()) for texts in references)
    values, by_image = corpus_scores(candidates, references=references)
    for name, value in values.items():
        if name.startswith("bleu") and int(name[-1]) > num_words:
            too_short = f"the longest full caption has {num_words} words, so no caption can match a {name[-1]}-gram"
            rows.append(of.missing(name, note=too_short, unit="x100", paper=UM3.get(name)))
        else:
            interval = bootstrap(by_image[name])._asdict() if name in by_image else {}
            rows.append(of.score(name, value, paper=UM3.get(name), note=notes, **common, **interval))
    if not meteor or shutil.which("java") is None:
        reason = "not requested; set captions.meteor=true (needs Java, starts in about 20 s)"
        reason = "needs Java, which is not installed" if meteor else reason
        return [*rows, of.missing("meteor", note=reason, paper=UM3["meteor"], unit="x100")]
    value = meteor_score(candidates, references=references)
    return [*rows, of.score("meteor", value, paper=UM3["meteor"], note=notes, **common)]


def other_images_row(candidates: Sequence[str], *, references: Sequence[Sequence[str]], of: Measurement) -> Score:
    """CIDEr of every caption against the references of the next image: what a caption gets that ignores its image."""
    values, by_image = corpus_scores([*candidates[1:], *candidates[:1]], references=references)
    interval, note = bootstrap(by_image["cider"])._asdict(), "every image with the caption of another image"
    of = of.with_protocol(**_protocol(references))
    return of.score("cider_other_image", values["cider"], n=len(candidates), unit="x100", note=note, **interval)


def _protocol(references: Sequence[Sequence[str]]) -> dict[str, Any]:
    digest = short_hash(sorted("\t".join(map(normalise, texts)) for texts in references))
    return {
        "tokenizer": TOKENIZER,
        "references": sorted({len(texts) for texts in references}),
        "references_sha256": digest,
    }


def corpus_scores(
    candidates: Sequence[str], *, references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """bleu_1 to bleu_4, rouge_l and cider of the whole set, and of every image for those that are means over images."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    _check(candidates, references)
    truth = {index: [tokenize(text) for text in texts] for index, texts in enumerate(references)}
    result = {index: [tokenize(text)] for index, text in enumerate(candidates)}
    bleu, _ = Bleu(4).compute_score(truth, result, verbose=0)
    rouge, rouge_by_image = Rouge().compute_score(truth, result)
    cider, cider_by_image = Cider().compute_score(truth, result)
    values = {f"bleu_{order}": float(value) for order, value in enumerate(bleu, start=1)}
    values |= {"rouge_l": float(rouge), "cider": float(cider)}
    return values, {"rouge_l": list(rouge_by_image), "cider": list(cider_by_image)}


def meteor_score(candidates: Sequence[str], *, references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of the whole set, by the package's jar; UserError if it fails or takes over 10 minutes."""
    import pycocoevalcap.meteor

    _check(candidates, references)
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    options |= {"cwd": Path(next(iter(pycocoevalcap.meteor.__path__))), "env": os.environ | {"LC_ALL": "C.UTF-8"}}
    try:
        with subprocess.Popen(METEOR_COMMAND, text=True, encoding="utf-8", **options) as process:
            try:
                return _run_meteor(process, candidates, references=references)
            finally:
                process.kill()
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise UserError(f"METEOR failed ({error!r}); install Java, or set captions.meteor=false") from None


def _run_meteor(
    process: subprocess.Popen[str], candidates: Sequence[str], *, references: Sequence[Sequence[str]]
) -> float:
    """METEOR's protocol: a SCORE line per caption returns statistics; an EVAL line all scores and the mean."""
    watchdog = threading.Timer(METEOR_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        assert process.stdin is not None and process.stdout is not None
        statistics = []
        pairs = zip(candidates, references, strict=True)
        for candidate, texts in track(pairs, total=len(candidates), label="METEOR"):
            fields = [*map(tokenize, texts), tokenize(candidate).replace("|||", "")]
            process.stdin.write(" ||| ".join(["SCORE", *fields]) + "\n")
            process.stdin.flush()
            statistics.append(process.stdout.readline().strip())
        process.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
        process.stdin.flush()
        lines = [process.stdout.readline().strip() for _ in range(len(candidates) + 1)]
        return float(lines[-1])
    finally:
        watchdog.cancel()


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not candidates:
        raise UserError("no captions to score; check that the validation split has images")
    if len(candidates) != len(references):
        raise UserError(f"{len(candidates)} captions, but references for {len(references)} images; give one per image")
    for index, texts in enumerate(references):
        if not texts:
            raise UserError(f"image {index} has no reference caption; remove the image or add a caption")
