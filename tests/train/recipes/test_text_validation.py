"""Text validation: what it measures, that it changes nothing, and its alarm."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_mix.batches.token_stream import scattered_sequences
from data_mix.sources.text import TextSourceConfig, open_text_source
from tests.train.conftest import arguments, logged, losses, train_apart, train_here
from tests.train.test_resume import kill_and_resume
from um3.model.language_model import load_model

EVERY_STEP = ["text_validation.every_steps=1", "text_validation.num_sequences=5"]
EVERY_TWO = ["text_validation.every_steps=2", "text_validation.num_sequences=5"]
LOSS, START = "text_validation/text_loss", "text_validation/start"
NO_TEXT = ["data.mix.start=[0, 1, 1]", "data.mix.end=[0, 1, 1]"]


def text_loss(folder):
    """Text loss of the finished model, by the stock model and torch's cross entropy alone."""
    loaded = load_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    documents = open_text_source(TextSourceConfig(val_fraction=0.05), split="val")
    sequences = scattered_sequences(
        documents, tokenizer=loaded.text_tokenizer, ids=loaded.ids, num_sequences=5, seq_len=28, seed=0, cache=folder
    )
    total, count = 0.0, 0
    for sequence in sequences:
        with torch.no_grad():
            logits_TV = model(sequence.input_ids[None]).logits[0, :-1, : loaded.ids.text_vocab_size]
        total += torch.nn.functional.cross_entropy(logits_TV, sequence.input_ids[1:], reduction="sum").item()
        count += len(sequence.input_ids) - 1
    return total / count


def test_it_measures_the_model_and_changes_nothing(made, tmp_path):
    assert train_here("um3", made, tmp_path, *EVERY_STEP) == losses(made / "um3")
    assert logged(made / "um3", LOSS) == [None] * 4
    for key in ("optim/grad_norm", "data/samples/text"):
        assert logged(tmp_path, key) == logged(made / "um3", key)
    values, starts = logged(tmp_path, LOSS), logged(tmp_path, START)
    assert values[-1] == pytest.approx(text_loss(tmp_path), rel=1e-5)
    assert len(set(values)) == 4 and len(set(starts)) == 1 and values[-1] < starts[0]
    assert logged(tmp_path, "text_validation/above_start") == pytest.approx([value - starts[0] for value in values])


SETTINGS = ["loss.mode=joint", "data.packing=documents", "loop.micro_batch_size=2"]
SETTINGS += [f"engine.zero_stage={stage}" for stage in (0, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("override", SETTINGS)
def test_it_measures_the_split_softmax_of_unpacked_text(override, made, tmp_path):
    measured = train_here("um3", made, tmp_path / "with", *EVERY_STEP, override)
    assert measured == train_here("um3", made, tmp_path / "without", override)
    assert logged(tmp_path / "with", LOSS)[-1] == pytest.approx(text_loss(tmp_path / "with"), rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_keeps_the_loss_before_the_first_step(made, tmp_path, monkeypatch):
    train_here("um3", made, tmp_path / "whole", *EVERY_TWO)
    kill_and_resume(arguments("um3", made, f"loop.output_dir={tmp_path}/killed", *EVERY_TWO), 3, monkeypatch)
    for key in (START, LOSS):
        assert logged(tmp_path / "killed", key) == logged(tmp_path / "whole", key)


@pytest.mark.slow
def test_the_start_is_the_model_before_the_first_step(made, tmp_path):
    train_here("um3", made, tmp_path / "first", *EVERY_TWO, "loop.max_steps=2")
    options = [*EVERY_STEP, f"model.base_model={tmp_path}/first/model", "loop.max_steps=1"]
    train_here("um3", made, tmp_path / "second", *options)
    assert logged(tmp_path / "second", START)[0] == pytest.approx(logged(tmp_path / "first", LOSS)[-1], rel=1e-6)


@pytest.mark.slow
def test_two_processes_share_its_sequences(made, tmp_path):
    train_here("um3", made, tmp_path / "one", *EVERY_STEP)
    train_apart(arguments("um3", made, f"loop.output_dir={tmp_path}/two", *EVERY_STEP), processes=2)
    for key in (START, LOSS):
        assert logged(tmp_path / "two", key) == pytest.approx(logged(tmp_path / "one", key), rel=1e-4)


def test_the_alarm_names_step_and_loss(made, tmp_path, capsys):
    train_here("um3", made, tmp_path, *EVERY_TWO, "text_validation.alarm_above=-100")
    messages = [line for line in capsys.readouterr().err.splitlines() if "alarm_above=-100" in line]
    loss, start = logged(tmp_path, LOSS)[-1], logged(tmp_path, START)[-1]
    assert len(messages) == 2 and "step 2" in messages[0]
    assert "step 4" in messages[1] and f"{loss:.3f}" in messages[1] and f"{loss - start:.3f}" in messages[1]
    train_here("um3", made, tmp_path, *EVERY_TWO, "text_validation.alarm_above=100")  # may change in a finished run
    assert "up to date" in capsys.readouterr().out


@pytest.mark.slow
def test_it_measures_other_texts_even_if_no_text_is_trained(made, tmp_path):
    (tmp_path / "other.txt").write_text("\n\n".join(f"Passage {number} " + "word " * 700 for number in range(40)))
    no_text = [*EVERY_STEP, *NO_TEXT, "loop.max_steps=1"]
    other = f"text_validation.texts=[{{name: other, path: '{tmp_path}/other.txt', val_fraction: 0.3}}]"
    train_here("um3", made, tmp_path / "prose", *no_text)
    train_here("um3", made, tmp_path / "other", *no_text, other)
    prose, measured = (logged(tmp_path / name, START)[0] for name in ("prose", "other"))
    assert measured > 0 and measured != pytest.approx(prose, rel=1e-3)
