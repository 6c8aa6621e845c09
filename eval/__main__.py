"""`python -m eval COMMAND ...`: evaluate a run, run a published benchmark, or write a report."""

from um3.core.commands import Command, run_room

COMMANDS = {
    "run": Command("eval.run", "evaluate a run or a model"),
    "lm": Command("eval.lm", "lm-eval's command line with UM3 as a model"),
    "generate-images": Command("eval.tasks.generate_images", "generate the images of a benchmark"),
    "coco-captions": Command("eval.benchmarks.coco_captions", "BLEU, METEOR, ROUGE-L and CIDEr of captions"),
    "coco-generation": Command("eval.benchmarks.coco_generation", "gFID and CLIPScore of generated images"),
    "geneval": Command("eval.benchmarks.geneval", "GenEval of generated images"),
    "dpg": Command("eval.benchmarks.dpg", "DPG-Bench of generated images"),
    "vqa": Command("eval.benchmarks.vqa", "questions about images: VQAv2, GQA, TextVQA, POPE, MME and others"),
    "report": Command("eval.report.report", "compare runs with the paper: tables and figures"),
    "ablation": Command("eval.report.ablation", "train and measure the rows of an ablation"),
    "evidence": Command("eval.report.evidence", "compare the paper's claims with our tables"),
}

if __name__ == "__main__":
    run_room("eval", COMMANDS)
