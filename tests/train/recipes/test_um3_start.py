"""What UM3's training starts from: a language model, calibrated once a run, or the folder of a UM3."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from data_mix.codes.shards import open_code_sources
from tests.helpers.code_shards import write_codes
from tests.helpers.tiny_um3 import save_language_model
from tests.train.conftest import logged, train_here
from tests.train.recipes.test_um3_lora import weights
from train.recipes.um3 import MAX_EXAMPLE_CHARACTERS, example_captions
from um3.core.errors import UserError
from um3.model.text_tokenizer import encode_turns

GAINS = "cache/qk_norm-*.safetensors"
NO_BITS = "vocabulary.bit_embeddings=false"
STILL = ["optimizer.lr=1e-12", "optimizer.weight_decay=0", "loop.max_steps=1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama whose text tokenizer already has the image tokens."""
    return save_language_model(tmp_path_factory.mktemp("base"), initializer_range=0.5)


def test_training_starts_from_the_weights_of_a_um3_folder(start, made, tmp_path):
    options = [f"model.base_model={start}", NO_BITS]
    train_here("um3", made, tmp_path / "still", *options, *STILL, "engine.activation_checkpointing=true")
    before, after = weights(start), weights(tmp_path / "still/model")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    assert not [*(tmp_path / "still").glob(GAINS)]
    card = (tmp_path / "still/model/README.md").read_text()
    assert "LlamaForCausalLM" in card and "280" in card
    train_here("um3", made, tmp_path / "moved", *options, "loop.max_steps=1", "optimizer.lr=1e-2")
    assert not torch.equal(weights(tmp_path / "moved/model")["lm_head.weight"], before["lm_head.weight"])


def test_a_trained_vocabulary_has_the_words_of_conversations(made, tmp_path):
    turns, lengths = [("How many shapes are there?", "3"), ("Is it the circle?", "yes")], []
    for name, conversations in (("without", "[]"), ("with", "[{name: scenes, kind: scenes, length: 100}]")):
        settings = ["vocabulary.text_vocab_size=500", f"vocabulary.conversations={conversations}"]
        train_here("um3", made, tmp_path / name, *settings, "loop.max_steps=1")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name / "model")
        lengths.append(sum(len(ids) for turn in encode_turns(turns, tokenizer=tokenizer) for ids in turn))
    assert lengths[1] < lengths[0]


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("model.qk_norm=false", r"set model\.qk_norm=true"),
        ("vocabulary.subtokens=3", r"set vocabulary\.subtokens=2"),
        ("vocabulary.tokenizer=somewhere", r"vocabulary\.tokenizer"),
        ("visual_tokenizer={made}/stage1/model", r"was made for visual tokenizer \w+, but visual_tokenizer="),
    ],
)
def test_a_config_that_contradicts_the_folder_is_refused(override, remedy, start, made, tmp_path):
    with pytest.raises(UserError, match=remedy):
        train_here("um3", made, tmp_path, f"model.base_model={start}", override.format(made=made))


def test_a_base_keeps_its_text_rows_and_is_calibrated_once_a_run(base, made, tmp_path):
    options = [f"model.base_model={base}", *STILL]
    train_here("um3", made, tmp_path, *options)
    trained, before = weights(tmp_path / "model"), weights(base)
    table = "model.embed_tokens.weight"
    torch.testing.assert_close(trained[table][: len(before[table])], before[table])
    (file,) = tmp_path.glob(GAINS)
    gains = load_file(file)
    for part in ("q", "k"):
        name = f"model.layers.0.self_attn.{part}_norm.weight"
        torch.testing.assert_close(trained[name], gains[name], rtol=0, atol=1e-6)
    # A second start in the same folder reads the gains of the cache: these could not have been fitted.
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "done.json").unlink()
    save_file(gains | {name: torch.full_like(gains[name], 7.0)}, file)
    train_here("um3", made, tmp_path, *options)
    assert (weights(tmp_path / "model")[name] - 7).abs().max() < 1e-5
    moved = shutil.move(base, tmp_path / "base")  # the same base by another path
    train_here("um3", made, tmp_path, *options, f"model.base_model={moved}")
    shutil.move(moved, base)


@pytest.mark.slow
def test_new_rows_can_be_random(base, made, tmp_path):
    options = [f"model.base_model={base}", *STILL, NO_BITS]
    spreads = {}
    for init_by in ("mean", "random"):
        train_here("um3", made, tmp_path / init_by, *options, f"model.new_token_init={init_by}")
        spreads[init_by] = weights(tmp_path / init_by / "model")["lm_head.weight"][280:].std(0).mean().item()
    assert spreads["mean"] < 1e-6 and spreads["random"] == pytest.approx(0.5, rel=0.1)


@pytest.mark.slow
def test_streamed_text_is_read_once_a_run(made, tmp_path, monkeypatch):
    """The vocabulary, the tokens and the validation sequences are made at the first start; later ones need no hub."""
    monkeypatch.chdir(tmp_path)
    words = tmp_path / "own" / "words"
    words.mkdir(parents=True)
    texts = [f"Sentence {number} of a text that is as long as it has to be, and not longer." for number in range(60)]
    (words / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = ["data.texts=[{name: h, kind: hub, path: own/words, stream: 50, val_fraction: 0.1}]"]
    options += ["text_validation.every_steps=2", "text_validation.num_sequences=2"]
    folder = tmp_path / "run"

    def values():
        return [train_here("um3", made, folder, *options), logged(folder, "text_validation/text_loss")]

    first = values()
    for path in (words, folder / "model", folder / "checkpoints"):
        shutil.rmtree(path)
    for name in ("done.json", "metrics.jsonl"):
        (folder / name).unlink()
    assert values() == first and first[1][-1] is not None
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="own/words"):
        values()


def test_examples_are_short_captions_of_every_source_in_turn(tmp_path):
    captions = {
        "a": ["one", "", "x" * (MAX_EXAMPLE_CHARACTERS + 1), "two", "one", "three"],
        "b": ["four"],
        "c": ["five"],
    }
    for source, texts in captions.items():
        made_of = lambda row, texts=texts: [texts[row]] if texts[row] else []  # noqa: E731
        write_codes(tmp_path, num_images=len(texts), source=source, captions=made_of)
    images = open_code_sources(tmp_path, split="train")
    assert example_captions(images, weights={"a": 1.0, "b": 1.0}) == ["one", "four", "two", "three"]
    assert example_captions(images, weights={"c": 1.0}) == ["five"]
    assert example_captions({}, weights={}) == []  # a mix of text alone reads no code shards
