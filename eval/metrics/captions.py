"""Caption quality: exact match, BLEU, ROUGE-L and CIDEr, and METEOR where Java is there and it is asked for.

The scorers are pycocoevalcap's, called one by one: its own `COCOEvalCap` builds SPICE first and fails offline before
any score exists. Values are fractions (the paper prints them times 100). CIDEr takes its document frequencies from the
references it is given, so it compares only over the same set of images; the package's `Cider` is CIDEr-D.
"""

import hashlib
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
from um3.core.progress import track

METEOR_TIMEOUT_S = 600.0
# The package starts its METEOR in a way that waits for ever at exit after any error (a lock held for good), and that
# fails where the system writes decimals with a comma. So: own process, fixed locale, a time limit.
METEOR_COMMAND = ("java", "-Duser.language=en", "-Duser.country=US", "-Xmx2G", "-jar", "meteor-1.5.jar")
METEOR_ARGUMENTS = ("-", "-", "-stdio", "-l", "en", "-norm")


def caption_scores(
    candidates: Sequence[str],
    *,
    references: Sequence[Sequence[str]],
    of: Measurement,
    skipped: int = 0,
    meteor: bool = False,
    left_out: str = "",
) -> list[Score]:
    """All caption metrics of `candidates` against the references of each.

    The order of the captions and any white space inside them do not matter. An empty caption counts: it scores zero,
    and the rows' notes say how many there are. `left_out` says what was left out before.

    Raises:
        UserError: not one candidate and at least one reference per image.
    """
    _check(candidates, references)
    of = of.with_protocol(
        tokenizer=TOKENIZER,
        references=sorted({len(given) for given in references}),
        references_sha256=_fingerprint(references),
    )
    pairs = list(zip(candidates, references, strict=True))
    common: dict[str, Any] = {"n": len(pairs), "skipped": skipped}
    empty = sum(not tokenize(candidate) for candidate in candidates)
    count = f"{empty} of {len(pairs)} captions are empty and count as wrong" if empty else ""
    told = "; ".join(filter(None, [left_out, count]))
    full = [_same(candidate, given[:1]) for candidate, given in pairs]
    any_of_them = [_same(candidate, given) for candidate, given in pairs]
    also: dict[str, Any] = {"skipped": skipped, "unit": "%"}
    rows = [
        of.mean("exact_match", full, note="word for word the full caption (captions[0])", **also),
        of.mean("exact_match_any", any_of_them, note="word for word any of the references", **also),
    ]
    longest = max(len(tokenize(given[0]).split()) for given in references)
    values, by_image = _scores(candidates, references=references)
    for name, value in values.items():
        if name.startswith("bleu") and int(name[-1]) > longest:
            note = f"the longest full caption has {longest} words, so a right one has no {name[-1]}-gram to match"
            rows.append(of.missing(name, note=note, unit="x100", paper=UM3.get(name)))
        else:
            ends = bootstrap(by_image[name])._asdict() if name in by_image else {}
            rows.append(of.score(name, value, unit="x100", paper=UM3.get(name), note=told, **common, **ends))
    if note := _no_meteor(asked=meteor):
        return [*rows, of.missing("meteor", note=note, paper=UM3["meteor"], unit="x100")]
    value = meteor_score(candidates, references=references)
    return [*rows, of.score("meteor", value, paper=UM3["meteor"], unit="x100", note=told, **common)]


def corpus_scores(candidates: Sequence[str], *, references: Sequence[Sequence[str]]) -> dict[str, float]:
    """bleu_1 .. bleu_4, rouge_l and cider of the whole set, tokenized without Java."""
    return _scores(candidates, references=references)[0]


def _scores(
    candidates: Sequence[str], *, references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The scores of the whole set, and of every image for those that are means over images."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    _check(candidates, references)
    truth = {index: [tokenize(text) for text in given] for index, given in enumerate(references)}
    result = {index: [tokenize(text)] for index, text in enumerate(candidates)}
    bleu, _ = Bleu(4).compute_score(truth, result, verbose=0)
    rouge, rouge_by_image = Rouge().compute_score(truth, result)
    cider, cider_by_image = Cider().compute_score(truth, result)
    values = {f"bleu_{order}": float(value) for order, value in enumerate(bleu, start=1)}
    values |= {"rouge_l": float(rouge), "cider": float(cider)}
    return values, {"rouge_l": list(rouge_by_image), "cider": list(cider_by_image)}


def meteor_score(candidates: Sequence[str], *, references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of the whole set, by the package's jar.

    Raises:
        UserError: no Java, or METEOR failed or took more than 10 minutes.
    """
    import pycocoevalcap.meteor

    _check(candidates, references)
    if shutil.which("java") is None:
        raise UserError("METEOR needs Java; install a JRE or set captions.meteor=false")
    folder = Path(next(iter(pycocoevalcap.meteor.__path__)))
    try:
        with subprocess.Popen(
            [*METEOR_COMMAND, *METEOR_ARGUMENTS],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=os.environ | {"LC_ALL": "C.UTF-8"},
        ) as process:
            try:
                return _ask_meteor(process, candidates, references=references)
            finally:
                process.kill()
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise UserError(f"METEOR failed ({type(error).__name__}: {error}); set captions.meteor=false") from None


def _ask_meteor(
    process: subprocess.Popen[str], candidates: Sequence[str], *, references: Sequence[Sequence[str]]
) -> float:
    """One SCORE line per caption gives its statistics; one EVAL line over all of them every score, then the mean."""
    watchdog = threading.Timer(METEOR_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        assert process.stdin is not None and process.stdout is not None
        statistics = []
        pairs = zip(candidates, references, strict=True)
        for candidate, given in track(pairs, total=len(candidates), label="METEOR"):
            fields = [*map(tokenize, given), tokenize(candidate).replace("|||", "")]
            process.stdin.write(" ||| ".join(["SCORE", *fields]) + "\n")
            process.stdin.flush()
            statistics.append(process.stdout.readline().strip())
        process.stdin.write(" ||| ".join(["EVAL", *statistics]) + "\n")
        process.stdin.flush()
        lines = [process.stdout.readline().strip() for _ in range(len(candidates) + 1)]
        return float(lines[-1])
    finally:
        watchdog.cancel()


def _no_meteor(*, asked: bool) -> str:
    """Why there is no METEOR; empty when there is."""
    if not asked:
        return "not asked for; set captions.meteor=true (needs Java, starts in about 20 s)"
    return "" if shutil.which("java") else "needs Java, which is not installed"


def _same(candidate: str, references: Sequence[str]) -> bool:
    return normalise(candidate) in {normalise(text) for text in references}


def _fingerprint(references: Sequence[Sequence[str]]) -> str:
    """The same set of references in any order has the same fingerprint."""
    lines = sorted("\t".join(map(normalise, given)) for given in references)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not candidates:
        raise UserError("no captions to score; is the validation split empty?")
    if len(candidates) != len(references):
        raise UserError(f"{len(candidates)} captions but references for {len(references)} images; give one per image")
    for index, given in enumerate(references):
        if not given:
            raise UserError(f"image {index} has no reference caption; leave it out")
