"""The paper's values (arXiv 2502.05178). Shares are fractions; the paper prints them times 100.

They were measured on ImageNet-1k and MS-COCO with models of 1.5B parameters. Beside values on other data or at another
scale they show what the method reached, not what the values should be.
"""

# Metrics of the five language tasks. The paper does not say whether it normalises by length. HellaSwag's 48.7 for
# Llama-3.2-1B can only be `acc` (its `acc_norm` is above 60); `acc_norm` for ARC and `acc` for PIQA is our choice.
LANGUAGE_METRICS: dict[str, str] = {
    "arc_challenge": "acc_norm",
    "hellaswag": "acc",
    "piqa": "acc",
    "social_iqa": "acc",
    "winogrande": "acc",
}

# Table 5: the unified models, by the heading of each column. LlamaGen uses the same image tokens as UM3.
COLUMNS = {
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
SYSTEMS: dict[str, dict[str, float]] = {
    "Llama-3.2 1B": dict(zip(COLUMNS, (0.3490, 0.4870, 0.7595, 0.4350, 0.6148), strict=False)),
    "ZeroCap 0.5B": {"bleu_4": 0.026, "meteor": 0.115, "cider": 0.146},
    "LlamaGen 0.8B": {"fid": 33.4, "clipscore": 0.257},
    "UM3 1.5B": dict(
        zip(COLUMNS, (0.3430, 0.4535, 0.7465, 0.4309, 0.5422, 0.086, 0.202, 0.173, 44.1, 0.250), strict=True)
    ),
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
REFERENCES: dict[str, tuple[str, str]] = {
    "language": ("UM3 1.5B", "the task's scored split"),
    "captions": ("UM3 1.5B", "COCO-Karpathy test"),
    "generation": ("UM3 1.5B", "COCO-30k"),
    "skills": ("LlamaGen-XL on QLIP-B/16", "GenEval"),
    "geneval": ("LlamaGen-XL on QLIP-B/16", "GenEval"),
    "dpg": ("LlamaGen-XL on QLIP-B/16", "DPG-Bench"),
    "tokenizer": ("QLIP-B-16-256", "ImageNet-1k val"),
}
"""The system and the data of the paper's value, by part of the evaluation or task."""

QUALITY = {"zero_shot": "zero-shot", "rfid": "rFID", "psnr": "PSNR", "ssim": "SSIM"}
TABLES: list[tuple[str, dict[str, str], dict[str, dict[str, float]]]] = [
    ("Unified models (Table 5)", COLUMNS, SYSTEMS),
    ("Tokenizers, ImageNet-1k val", QUALITY, TOKENIZERS),
    ("Linear probe, ImageNet-1k", {"cls": "class token", "mean": "mean of patches", "cls_mean": "both"}, LINEAR_PROBE),
]
"""The paper's main tables: title, heading of each value, and the values of each system."""
AS_PRINTED = ("fid", "rfid", "psnr", "ssim", "clipscore")
"""Values that the paper does not print times 100."""
