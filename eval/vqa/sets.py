"""All sets, by the name that `set=` takes."""

from typing import Literal

from eval.vqa.multiple_choice import MULTIPLE_CHOICE
from eval.vqa.open_ended import OPEN_ENDED
from eval.vqa.questions import VQASet
from eval.vqa.yes_no import YES_NO

SetName = Literal[
    "vqav2", "vqav2_test_dev", "gqa", "textvqa", "textvqa_ocr", "pope", "mme", "mm_vet", "scienceqa", "seed_bench",
    "mmbench", "scenes",
]  # fmt: skip
SETS: dict[str, VQASet] = OPEN_ENDED | YES_NO | MULTIPLE_CHOICE
