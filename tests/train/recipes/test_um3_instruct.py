"""`make um3-instruct` at a tiny size: what it learns and writes, and that a resumed run computes the same bits."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from data_mix.batches.chat_batches import join_codes
from data_mix.codes.shards import open_code_sources
from data_mix.sources.config import ConversationSourceConfig
from tests.tokenizer.conftest import change_json
from tests.train.conftest import arguments, check_resumed, train_here
from um3.core.errors import UserError
from um3.core.files import read_json
from um3.core.metrics import read_metrics
from um3.inference.pipeline import UM3Pipeline
from um3.inference.sampling_params import image_defaults
from um3.model.configuration import IMAGE_SAMPLING


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("instruct") / "um3-instruct"
    train_here("um3-instruct", made, folder)
    return folder


def test_the_result_is_a_um3_that_names_its_conversations_and_chats(made, trained):
    stored = read_json(trained / "model/config.json")["um3"]
    assert stored == read_json(made / "um3/model/config.json")["um3"] | {"conversations": ["scenes"]}
    sampling = [image_defaults(folder / "model") for folder in (made / "um3", trained)]
    assert sampling == [IMAGE_SAMPLING | {"temperature": 0.8}] * 2  # as the config of um3 says, and kept
    captions = [shards[0].captions[0] for shards in open_code_sources(made / "codes", split="train").values()]
    assert stored["examples"][: len(captions)] == captions
    card = (trained / "model/README.md").read_text()
    assert "trained on the conversations scenes" in card and "Q: question A:" in card
    assert "Q: question" not in (made / "um3/model/README.md").read_text()
    pipeline = UM3Pipeline.from_pretrained(trained / "model")
    assert pipeline.examples == stored["examples"]
    assert pipeline.trained_on == ["scenes"] and len(pipeline.chat("How many?", max_new_tokens=3)) == 1
    before, after = (load_file(folder / "model/model.safetensors") for folder in (made / "um3", trained))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    rows = read_metrics(trained / "metrics.jsonl")
    assert [row["data/samples/chat"] for row in rows] == [4, 8, 12, 16] == [row["data/scheduled/chat"] for row in rows]
    assert all(row["train/loss_visual"] > 0 for row in rows)


def test_a_run_in_two_parts_and_two_processes_agree_with_one(made, trained, tmp_path):
    check_resumed(arguments("um3-instruct", made), trained, tmp_path, processes=2)


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_it_learns_the_answers_about_a_few_scenes(made, tmp_path, packing):
    """From conversations to greedy answers: most questions about eight scenes are answered after 150 steps."""
    few = ConversationSourceConfig("scenes", kind="scenes", length=8)
    setting = "data.conversations=[{name: scenes, kind: scenes, length: 8}]"
    steps = ("loop.max_steps=150", "loop.save_every_steps=150", "data.chat_share=0.75", f"data.packing={packing}")
    train_here("um3-instruct", made, tmp_path / "few", setting, *steps)
    chats = join_codes([few], codes=str(made / "codes"), fingerprint=None)["scenes"]
    asked, answers = [], []
    for turns, codes_N in (chats[index] for index in range(len(chats))):
        content = [{"type": "image", "codes": codes_N}, {"type": "text", "text": turns[0].question}]
        asked.append([{"role": "user", "content": content}])
        answers.append(turns[0].answer)
    pipeline = UM3Pipeline.from_pretrained(tmp_path / "few/model")
    found = pipeline.chat(asked, max_new_tokens=12)
    assert sum(a == b for a, b in zip(found, answers, strict=True)) >= 6, list(zip(found, answers, strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=nowhere"], "no model in 'nowhere'; run `make um3` first"),
        (["data.conversations=[]"], "conversations has 0 values"),
        (["data.conversations=[{name: a, kind: scenes}, {name: a, kind: scenes}]"], "give each source its own name"),
        (["data.chat_share=1"], "chat_share is 1"),
        (["data.conversations=[{name: scenes, kind: scenes, length: 100}]"], "only 64 of 100 .* run make codes"),
        (["data.seq_len=19"], "data.seq_len=19"),
        (["text_validation.every_steps=3", "loop.log_every_steps=2"], "text_validation.every_steps=3 must be"),
    ],
)
def test_mistakes_are_one_line(overrides, message, made, tmp_path):
    with pytest.raises(UserError, match=message):
        train_here("um3-instruct", made, tmp_path / "run", *overrides)


def test_a_model_without_bos_is_not_packed(made, tmp_path):
    """Its answers end with the token that begins a document (Qwen)."""
    shutil.copytree(made / "um3/model", tmp_path / "model")
    stored = read_json(tmp_path / "model/config.json")["um3"]
    change_json(tmp_path / "model/config.json", um3=stored | {"bos_id": stored["eos_id"]})
    start = f"init_from={tmp_path}/model"
    with pytest.raises(UserError, match=r"begins documents with the token that ends its answers.*data.packing=none"):
        train_here("um3-instruct", made, tmp_path / "run", start, "data.packing=documents")
    train_here("um3-instruct", made, tmp_path / "run", start, "data.packing=none", "loop.max_steps=2")
