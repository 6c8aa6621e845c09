"""The config dataclasses of all commands."""

from typing import Any

from data_mix.batches.mix_preview import PreviewConfig
from data_mix.codes.encode import EncodeConfig
from data_mix.write_questions import QuestionsConfig
from eval.benchmarks.coco_captions import CocoCaptionsConfig
from eval.benchmarks.coco_generation import CocoGenerationConfig
from eval.benchmarks.dpg import DPGConfig
from eval.benchmarks.geneval import GenEvalConfig
from eval.benchmarks.vqa import VQAConfig
from eval.config import EvalConfig
from eval.report.ablation_rows import Ablation
from eval.tasks.generate_images import GenerateConfig
from train.phase import CONFIGS

SECTIONS: dict[str, type[Any]] = {**CONFIGS, "codes": EncodeConfig, "eval": EvalConfig}
"""Section of an experiment's file -> its schema."""
BENCHMARKS = (CocoCaptionsConfig, CocoGenerationConfig, GenEvalConfig, DPGConfig, VQAConfig)
SCHEMAS = (*SECTIONS.values(), PreviewConfig, QuestionsConfig, GenerateConfig, Ablation, *BENCHMARKS)
