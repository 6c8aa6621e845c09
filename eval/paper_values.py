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

# Tables 7 and 12: LlamaGen-XL by the tokenizer of its codes; GenEval by skill, and its mean. It has no GenEval for UM3.
LLAMAGEN_COLUMNS = {
    "fid": "gFID",
    "clipscore": "CLIPScore",
    "single_object": "single",
    "two_object": "two",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "attribute",
    "mean": "GenEval",
}
LLAMAGEN_TOKENIZERS: dict[str, dict[str, float]] = {
    "VQGAN (LlamaGen's own)": dict(
        zip(LLAMAGEN_COLUMNS, (15.68, 0.309, 0.69, 0.36, 0.20, 0.57, 0.06, 0.02, 0.32), strict=True)
    ),
    "BSQViT-B/16": dict(zip(LLAMAGEN_COLUMNS, (19.03, 0.303, 0.77, 0.26, 0.13, 0.56, 0.05, 0.06, 0.31), strict=True)),
    "QLIP-B/16": dict(zip(LLAMAGEN_COLUMNS, (15.29, 0.316, 0.91, 0.59, 0.22, 0.80, 0.17, 0.24, 0.48), strict=True)),
}
GENEVAL_LLAMAGEN_QLIP: dict[str, float] = {
    name: value for name, value in LLAMAGEN_TOKENIZERS["QLIP-B/16"].items() if name not in ("fid", "clipscore")
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

# Table 4: LLaVA-1.5 with Vicuna-1.5-7B, layer -2. VQAv2 is test-dev, TextVQA has OCR tokens in the prompt, POPE is the
# mean F1 of its three splits and MME the perception sum: the CLIP row has LLaVA's published figures, made so.
VQA_COLUMNS = {
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "textvqa_ocr": "TextVQA",
    "pope": "POPE",
    "mme": "MME",
    "mm_vet": "MM-Vet",
}
VQA_SYSTEMS: dict[str, dict[str, float]] = {
    "CLIP-L 336 (LLaVA's own)": dict(zip(VQA_COLUMNS, (0.785, 0.620, 0.582, 0.859, 1510.7, 0.305), strict=True)),
    "CLIP-L 392 (the paper's)": dict(zip(VQA_COLUMNS, (0.791, 0.623, 0.554, 0.875, 1484.9, 0.333), strict=True)),
    "QLIP-L-14-392": dict(zip(VQA_COLUMNS, (0.783, 0.618, 0.552, 0.861, 1498.3, 0.333), strict=True)),
}
VQA_LLAVA_QLIP = VQA_SYSTEMS["QLIP-L-14-392"]

# Table 6: encoders of base size by their losses, the layer that LLaVA reads, and whether it is quantized.
LAYER_COLUMNS = {
    "zero_shot": "zero-shot",
    "gqa": "GQA",
    "textvqa_ocr": "TextVQA",
    "pope": "POPE",
    "mme": "MME",
}
VQA_LAYERS: dict[str, dict[str, float]] = {
    "CLIP-B, layer -2": dict(zip(LAYER_COLUMNS, (0.683, 0.599, 0.512, 0.843, 1397.9), strict=True)),
    "contrastive alone, layer -2": dict(zip(LAYER_COLUMNS, (0.757, 0.621, 0.517, 0.859, 1411.0), strict=True)),
    "QLIP-B, layer -2": dict(zip(LAYER_COLUMNS, (0.743, 0.612, 0.511, 0.861, 1398.7), strict=True)),
    "QLIP-B, layer -1": dict(zip(tuple(LAYER_COLUMNS)[1:], (0.507, 0.450, 0.772, 1077.7), strict=True)),
    "QLIP-B, layer -1, quantized": dict(zip(tuple(LAYER_COLUMNS)[1:], (0.404, 0.430, 0.506, 677.17), strict=True)),
    "reconstruction alone, layer -2": dict(zip(LAYER_COLUMNS, (0.001, 0.508, 0.438, 0.783, 1093.8), strict=True)),
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
    "vqa": ("LLaVA-1.5 7B on QLIP-L-14-392", "the same splits"),
    **dict.fromkeys(("vqav2_test_dev", *VQA_COLUMNS), ("LLaVA-1.5 7B on QLIP-L-14-392", "the same split")),
}
"""The system and the data of the paper's value, by part of the evaluation or task."""

PAPER_ITEMS: dict[str, int] = {
    "arc_challenge": 1172,
    "hellaswag": 10_042,
    "piqa": 1838,
    "social_iqa": 1954,
    "winogrande": 1267,
    "coco_captions": 5000,
    "coco_generation": 30_000,
    "imagenet_reconstruction": 50_000,
    "imagenet_classification": 50_000,
    "geneval": 553,
    "dpg": 1065,
    "gqa": 12_000,
    "textvqa_ocr": 5000,
    "pope": 8900,
    "mme": 1100,
}
"""How many items the paper's data sets have, by the start of a task's name; only such tasks are like the paper's."""

QUALITY = {"zero_shot": "zero-shot", "rfid": "rFID", "psnr": "PSNR", "ssim": "SSIM"}
TABLES: list[tuple[str, dict[str, str], dict[str, dict[str, float]]]] = [
    ("Unified models (Table 5)", COLUMNS, SYSTEMS),
    ("Tokenizers, ImageNet-1k val", QUALITY, TOKENIZERS),
    ("Linear probe, ImageNet-1k", {"cls": "class token", "mean": "mean of patches", "cls_mean": "both"}, LINEAR_PROBE),
    ("LLaVA-1.5 7B (Table 4)", VQA_COLUMNS, VQA_SYSTEMS),
    ("LLaVA-1.5 7B by layer (Table 6)", LAYER_COLUMNS, VQA_LAYERS),
    ("LlamaGen-XL by tokenizer (Table 7)", LLAMAGEN_COLUMNS, LLAMAGEN_TOKENIZERS),
]
"""The paper's main tables: title, heading of each value, and the values of each system."""
AS_PRINTED = ("fid", "rfid", "psnr", "ssim", "clipscore", "mme")
"""Values that the paper does not print times 100."""
