"""The paper's values (arXiv 2502.05178). Shares are fractions; the paper prints them times 100.

They were measured on ImageNet-1k and MS-COCO with models of 1.5B parameters. Beside values on other data or at another
scale they show what the method reached, not what the values should be.
"""

from typing import NamedTuple


class Reference(NamedTuple):
    """The system, data and table of a paper value."""

    system: str
    data: str
    table: str


# Metrics of the five language tasks. The paper does not say whether it normalises by length. HellaSwag's 48.7 for
# Llama-3.2-1B can only be `acc` (its `acc_norm` is above 60); `acc_norm` for ARC and `acc` for PIQA is our choice.
LANGUAGE_METRICS: dict[str, str] = {
    "arc_challenge": "acc_norm",
    "hellaswag": "acc",
    "piqa": "acc",
    "social_iqa": "acc",
    "winogrande": "acc",
}

# Table 5: the unified models. LlamaGen uses the same image tokens as UM3.
SYSTEMS: dict[str, dict[str, float]] = {
    "Llama-3.2 1B": {
        "arc_challenge": 0.3490,
        "hellaswag": 0.4870,
        "piqa": 0.7595,
        "social_iqa": 0.4350,
        "winogrande": 0.6148,
    },
    "ZeroCap 0.5B": {"bleu_4": 0.026, "meteor": 0.115, "cider": 0.146},
    "LlamaGen 0.8B": {"fid": 33.4, "clipscore": 0.257},
    "UM3 1.5B": {
        "arc_challenge": 0.3430,
        "hellaswag": 0.4535,
        "piqa": 0.7465,
        "social_iqa": 0.4309,
        "winogrande": 0.5422,
        "bleu_4": 0.086,
        "meteor": 0.202,
        "cider": 0.173,
        "fid": 44.1,
        "clipscore": 0.250,
    },
}

# ImageNet-1k val: zero-shot accuracy, reconstruction after stage 2.
TOKENIZERS: dict[str, dict[str, float]] = {
    "QLIP-B-16-256": {"zero_shot": 0.743, "rfid": 3.21, "psnr": 23.16, "ssim": 0.6286},
    "QLIP-B-8-256": {"zero_shot": 0.756, "rfid": 0.70, "psnr": 26.79, "ssim": 0.7905},
    "QLIP-L-14-392": {"zero_shot": 0.791, "rfid": 1.46, "psnr": 25.36, "ssim": 0.6903},
    "BSQViT-B-16": {"rfid": 3.81, "psnr": 24.12, "ssim": 0.6638},
}

# Ablation of the weights, stage 1 only; the fourth row is the final recipe.
STAGE_1: dict[str, float] = {"zero_shot": 0.743, "rfid": 35.3, "psnr": 24.5}

# Linear probe on ImageNet-1k.
LINEAR_PROBE: dict[str, dict[str, float]] = {
    "QLIP-B": {"cls": 0.818, "mean": 0.777, "cls_mean": 0.821},
    "QLIP-L": {"cls": 0.852},
    "BSQViT": {"cls": 0.293, "mean": 0.254},
}

# GenEval of LlamaGen-XL trained on QLIP-B/16; the paper has none for UM3.
GENEVAL_LLAMAGEN_QLIP: dict[str, float] = {
    "single_object": 0.91,
    "two_object": 0.59,
    "counting": 0.22,
    "colors": 0.80,
    "position": 0.17,
    "color_attr": 0.24,
    "mean": 0.48,
}

# DPG-Bench of the same system, overall and by category.
DPG_LLAMAGEN_QLIP: dict[str, float] = {
    "overall": 0.7817,
    "global": 0.8237,
    "entity": 0.8468,
    "attribute": 0.8697,
    "relation": 0.9250,
    "other": 0.7920,
}

UM3 = SYSTEMS["UM3 1.5B"]
QLIP_B_16 = TOKENIZERS["QLIP-B-16-256"]
REFERENCES: dict[str, Reference] = {
    "language": Reference("UM3 1.5B", "the task's scored split", "Table 5"),
    "captions": Reference("UM3 1.5B", "COCO-Karpathy test", "Table 5"),
    "generation": Reference("UM3 1.5B", "COCO-30k", "Table 5"),
    "skills": Reference("LlamaGen-XL on QLIP-B/16", "GenEval", "section 3"),
    "geneval": Reference("LlamaGen-XL on QLIP-B/16", "GenEval", "section 3"),
    "dpg": Reference("LlamaGen-XL on QLIP-B/16", "DPG-Bench", "section 3"),
    "tokenizer": Reference("QLIP-B-16-256", "ImageNet-1k val", "main results"),
}


class PaperTable(NamedTuple):
    """A table as printed in the paper: shares times 100, an empty cell without a value."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def tables() -> list[PaperTable]:
    """The paper's main results, for comparison in a report."""
    columns = {
        "arc_challenge": "ARC-C",
        "hellaswag": "HellaSwag",
        "piqa": "PIQA",
        "social_iqa": "SIQA",
        "winogrande": "WinoGrande",
        "bleu_4": "BLEU-4",
        "meteor": "METEOR",
        "cider": "CIDEr",
        "fid": "gFID",
        "clipscore": "CLIPScore",
    }
    quality = {"zero_shot": "zero-shot", "rfid": "rFID", "psnr": "PSNR", "ssim": "SSIM"}
    probe = {"cls": "class token", "mean": "mean of patches", "cls_mean": "both"}
    return [
        _table("Unified models (Table 5)", columns, SYSTEMS),
        _table("Tokenizers, ImageNet-1k val", quality, TOKENIZERS),
        _table("Linear probe, ImageNet-1k", probe, LINEAR_PROBE),
    ]


def _table(title: str, columns: dict[str, str], systems: dict[str, dict[str, float]]) -> PaperTable:
    as_printed = {"fid", "rfid", "psnr", "ssim", "clipscore"}

    def cell(key: str, value: float | None) -> str:
        return "" if value is None else f"{value:g}" if key in as_printed else f"{100 * value:.4g}"

    rows = [(system, [cell(key, values.get(key)) for key in columns]) for system, values in systems.items()]
    return PaperTable(title, list(columns.values()), rows)
