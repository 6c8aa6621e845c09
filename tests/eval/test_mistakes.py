"""Mistakes in the settings of evaluation's commands are one line that names the remedy."""

import numpy as np
import pytest

from eval.benchmarks import coco_captions, coco_generation, dpg, geneval, vqa
from eval.run import main as run
from eval.tasks.generate_images import main as generate
from tests.eval.vqa.files import write_pope
from um3.core.errors import UserError
from um3.inference.image_io import save_png

CAPTIONS, DISTANCE = ["references=TMP/refs.json"], ["images=TMP/two"]
QUESTIONS = ["data=TMP/pope", "output=TMP/o.json"]
IMAGES = ["model=TMP/UM3", "prompts=TMP/a.txt", "output_dir=TMP/out"]


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (coco_captions.main, [], "set references=FILE"),
        (coco_captions.main, CAPTIONS, "set either model=FOLDER"),
        (coco_captions.main, [*CAPTIONS, "model=a", "captions=b"], "set either model=FOLDER"),
        (coco_captions.main, [*CAPTIONS, "model=a"], "set output=FILE"),
        (coco_captions.main, [*CAPTIONS, "model=m", "output=TMP/o.json"], "UM3 model 'm' is neither a local folder"),
        (coco_captions.main, [*CAPTIONS, "captions=no.json", "output=TMP/o.json"], "no.json does not exist"),
        (coco_generation.main, [], "set images=FOLDER"),
        (coco_generation.main, ["images=nowhere"], "nowhere does not exist"),
        (coco_generation.main, ["images=TMP/empty"], "contains no images"),
        (coco_generation.main, [*DISTANCE, "reference=nowhere"], "no reference at nowhere"),
        (coco_generation.main, [*DISTANCE, "reference=TMP/one", "inception_weights=x"], "no Inception weights at x"),
        (coco_generation.main, ["images=TMP/one", "reference=TMP/one"], "only 1 of 1 images are usable .*; add images"),
        (geneval.main, [], "set images=FOLDER"),
        (geneval.main, [*DISTANCE, "detector=a", "detections=b"], "set one of them"),
        (geneval.main, ["images=TMP/empty"], "no 00000/metadata.jsonl of GenEval"),
        (dpg.main, [*DISTANCE, "vqa=a", "answers=b"], "set one of them"),
        (dpg.main, ["images=nowhere"], "nowhere does not exist"),
        (dpg.main, [*DISTANCE, "num_images=5"], "num_images is 5"),
        (dpg.main, [*DISTANCE, "questions=q", "answers=a", "num_images=1"], "num_images=1: set resolution"),
        (vqa.main, ["model=m"], "set data=FOLDER"),
        (vqa.main, ["data=none", "model=m", "output=TMP/o.json"], "none is not a folder"),
        (vqa.main, [*QUESTIONS, "model=m", "answers=a"], "either model=FOLDER or answers=FILE"),
        (vqa.main, [*QUESTIONS, "answers=none.jsonl"], "none.jsonl does not exist"),
        (vqa.main, [*QUESTIONS, "model=/none"], "vision-language model '/none'"),
        (vqa.main, [*QUESTIONS, "set=vqa", "model=m"], "pope"),
        (generate, [*IMAGES, "prompts=''"], "set prompts=PATH"),
        (generate, [*IMAGES, "num_images=5", "layout=grid"], "allows 1 to 4"),
        (generate, [*IMAGES, "layout=geneval"], "layout=geneval needs GenEval's metadata"),
        (generate, [*IMAGES, "model=nowhere"], "no UM3 model in nowhere; run make um3"),
        (generate, [*IMAGES, "prompts=nowhere.txt"], "nowhere.txt does not exist"),
        (generate, [*IMAGES, "promts=x"], "did you mean 'prompts'"),
        (run, [], "set run=FOLDER"),
        (run, ["model=RUN/um3/model", "parts=[language]"], "output_dir="),
        (run, ["run=nowhere"], "no UM3 model in nowhere/um3/model; run make um3 first"),
        (run, ["run=nowhere", "parts=[tokenizer]"], "no visual tokenizer in nowhere/stage1 or stage2; run make stage1"),
        (run, ["run=nowhere", "parts=[tokenizer]", "tokenizer.stages={a: x}"], "visual tokenizer 'x'"),
        (run, ["run=RUN", "parts=[]"], "no parts to measure"),
        (run, ["run=RUN", "parts=[tokenizer]", "tokenizer.stages={original: x}"], "'original' is reserved"),
        (run, ["run=RUN", "tokenizer.external={stage2: 'a:b'}"], "'stage2' is reserved"),
        (run, ["run=RUN", "tokenizer.external={flipped: 'a:b'}"], "'flipped' is reserved"),
        (run, ["run=RUN", "tokenizer.probe.epochs=1"], "warmup_epochs=1"),
        (run, ["run=RUN", "caption.num_images=3"], "did you mean 'captions'"),
        (run, ["run=RUN", "captions.num_images=1"], r"captions\.num_images is 1"),
        (run, ["run=RUN", "fid_features=inception-2015", "inception_weights=x", "parts=[tokenizer]"], "weights at x"),
    ],
)
def test_a_mistake_is_one_line(main, arguments, message, run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "refs.json").write_text('{"a.png": "a dog"}')
    (tmp_path / "a.txt").write_text("a dog")
    write_pope(tmp_path / "pope")
    for file in ("one/a.png", "two/a.png", "two/b.png"):
        save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / file)
    places = {"TMP/UM3": f"{run_folder}/um3/model", "TMP": str(tmp_path), "RUN": str(run_folder)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    with pytest.raises(UserError, match=message):
        main(arguments)
