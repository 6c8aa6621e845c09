import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from data_mix.demo.scenes import ScenesSource
from tests.helpers.tiny_judges import save_inception, write_lines
from tests.helpers.tiny_qlip import make_qlip
from tests.helpers.tiny_um3 import make_base, save_um3
from tokenizer.text_tokenizer import train_byte_bpe
from um3.core.files import sha256_of, write_json
from um3.inference.pipeline import UM3Pipeline

sys.path.append(str(Path(__file__).parents[1] / "helpers"))  # imported by name, as from a user's PYTHONPATH

NAMES = ("Anna", "Bela", "Carl", "Dora", "Emil", "Flora", "Georg", "Hanna")
PLACES = ("the old harbour", "a quiet garden", "the long road", "his uncle's mill", "the upper room")
DEEDS = ("walked slowly through", "had never seen", "wrote a letter about", "was thinking of", "left early for")


@pytest.fixture(scope="session")
def scenes():
    """Forty validation scenes: images (N, 32, 32, 3) and all captions of each."""
    source = ScenesSource(size=32, length=40, seed=0, split="val")
    samples = [source[index] for index in range(len(source))]
    return np.stack([sample.image_HWC for sample in samples]), [sample.captions for sample in samples]


@pytest.fixture(scope="session")
def qlip_folder(tmp_path_factory, scenes):
    """A tiny QLIP with random weights and its processor, saved as a folder: 32 pixels, 16 patches of 8 bits."""
    captions = [caption for captions in scenes[1] for caption in captions]
    return make_qlip(tmp_path_factory.mktemp("qlip"), image_size=32, patch_size=8, bits=8, captions=captions)


@pytest.fixture(scope="session")
def documents():
    """Twenty short texts of eight sentences."""
    choose = np.random.default_rng(0).choice
    return [" ".join(f"{choose(NAMES)} {choose(DEEDS)} {choose(PLACES)}." for _ in range(8)) for _ in range(20)]


@pytest.fixture(scope="session")
def um3_folder(tmp_path_factory, qlip_folder, scenes, documents):
    """A tiny UM3 with random weights over the tiny QLIP: 2 subtokens of 4 bits."""
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "max_position_embeddings": 256}
    texts = [*documents, *(caption for captions in scenes[1] for caption in captions)]
    # A scale of 5, since initial weights give near-uniform distributions.
    return save_um3(tmp_path_factory.mktemp("um3"), qlip_folder=qlip_folder, texts=texts, bits=(2, 4), scale=5, **sizes)


@pytest.fixture(scope="session")
def pipeline(um3_folder):
    return UM3Pipeline.from_pretrained(um3_folder)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, qlip_folder, um3_folder):
    """The run folder after training: models, done.json and metrics.jsonl of every phase."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    for phase, model in (("stage1", qlip_folder), ("stage2", qlip_folder), ("um3", um3_folder)):
        shutil.copytree(model, run / phase / "model")
        rows = []
        for step in range(1, 60, 2):
            loss = 3 / step
            row = {"step": step, "train/loss": loss}
            if phase == "um3":
                row |= {"train/loss_text": loss, "train/loss_visual": loss + 1}
                counts = {"text": 6, "text/docs": 6, "i2t": 1, "i2t/scenes": 1, "t2i": 3, "t2i/scenes": 3}
                for name in ("samples", "scheduled"):
                    row |= {f"data/{name}/{key}": count * step for key, count in counts.items()}
                row |= {"text_validation/text_loss": loss, "text_validation/start": 1.5} if step % 10 == 9 else {}
            else:
                row |= {"train/mse": loss / 9, "train/contrastive": loss}
                if phase == "stage1" and step % 20 == 19:
                    row |= {"validation/contrastive/scenes": 2 * loss, "validation/psnr/scenes": 20 + step / 10}
            rows.append(row)
        write_lines(run / phase / "metrics.jsonl", rows)
        done = {"steps": 60, "seconds": 12.5, "peak_memory_gib": 0.8, "commit": "abc", "processes": 1}
        done |= {"versions": {"torch": "2.13.0"}, "machine": {"platform": "Linux", "cpu_cores": 2}}
        write_json(run / phase / "done.json", done | {"config": {"loop": {"max_steps": 60}}})
    sources = "data:\n  sources:\n  - {name: scenes, kind: scenes, length: 2400}\n  - {name: digits, kind: digits}\n"
    (run / "stage1" / "config.yaml").write_text(sources)
    return run


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """Seeded Inception weights in a file of the published layout, and the first digits of its sha256."""
    file = save_inception(tmp_path_factory.mktemp("inception") / "weights.pth")
    return str(file), sha256_of(file)[:8]


@pytest.fixture
def evaluate(run_folder, tmp_path):
    """Evaluates the tiny run with further settings; returns the rows in `folder` by key."""
    from eval.run import main
    from eval.scores import read_scores

    def run(*settings, folder="eval", run=run_folder):
        main([f"run={run}", f"output_dir={tmp_path / folder}", "num_threads=1", *settings])
        return {row.key: row for path in (tmp_path / folder).glob("*.json") for row in read_scores(path)}

    return run


@pytest.fixture(scope="session")
def um3_lm(pipeline):
    from eval.lm import UM3LM

    return UM3LM(pipeline.model, tokenizer=pipeline.text_tokenizer, batch_size=2)


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """A folder with small local copies of all five tasks, twelve different items each."""
    from language_items import write_benchmarks

    return write_benchmarks(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def benchmarks(bench, tmp_path_factory):
    """lm-eval's loaded tasks for the data in `bench`."""
    from eval.lm_eval_data import open_benchmarks

    return open_benchmarks(bench, folder=tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def exported(um3_folder, tmp_path_factory):
    from um3.model.export import export_text_half

    folder = tmp_path_factory.mktemp("exported") / "plain"
    export_text_half(um3_folder, out=folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory, documents):
    """A plain Llama with a tokenizer that adds bos and has no image tokens, like Llama 3's."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    bpe = train_byte_bpe(documents, setting="entries", vocab_size=400, special_tokens=["<s>", "</s>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    folder = tmp_path_factory.mktemp("llama")
    make_base("llama", initializer_range=0.4, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
