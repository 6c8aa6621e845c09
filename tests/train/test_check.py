"""`make check`: every file of a run that has checksums is read, and a damaged one is named with its remedy."""

import pytest

from data_mix.batches.token_stream import TokenStream, scattered_sequences
from data_mix.sources.text import TextSource
from tests.data_mix.batches.test_mix import IDS, PROSE, TOKENIZER
from tests.helpers.code_shards import write_codes
from train.check import main
from train.run_folder import result_files, write_record
from um3.core.errors import UserError
from um3.core.files import sha256_of


@pytest.fixture
def run(tmp_path):
    """A shard, the tokens of a text, sequences of it and a checkpoint."""
    write_codes(tmp_path / "codes")
    options = {"tokenizer": TOKENIZER, "ids": IDS, "seq_len": 24, "cache": tmp_path / "um3/cache"}
    TokenStream(TextSource("prose", PROSE), **options)
    scattered_sequences(TextSource("prose", PROSE), num_sequences=3, seed=0, **options)
    step = tmp_path / "um3/checkpoints/step-00000002"
    step.mkdir(parents=True)
    (step / "model-00000.safetensors").write_bytes(b"weights")
    meta = {"step": 2, "files": {"model-00000.safetensors": sha256_of(step / "model-00000.safetensors")}}
    write_record(step / "meta.json", meta)
    (tmp_path / "um3/model").mkdir()
    (tmp_path / "um3/model/config.json").write_text("{}")
    write_record(tmp_path / "um3/done.json", {"files": result_files(tmp_path / "um3")})
    return tmp_path


def test_a_whole_run_is_ok(run, capsys):
    main([str(run)])
    assert [line.endswith(": ok") for line in capsys.readouterr().out.splitlines()] == [True] * 5
    (run / "empty").mkdir()
    for name in ("absent", "empty"):
        with pytest.raises(UserError, match=f"{name}.* RUN="):
            main([str(run / name)])


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("codes/*.arrow", "run make codes"),
        ("um3/cache/text-*.bin", "the next run makes it again"),
        ("um3/cache/sequences-*.json", "the next run makes it again"),
        ("um3/checkpoints/*/*.safetensors", "resume from the previous checkpoint"),
        ("um3/model/config.json", "run its phase again"),
    ],
)
def test_a_damaged_file_is_named_with_its_remedy(pattern, remedy, run, capsys):
    path = next(run.glob(pattern))
    data = path.read_bytes()
    place = data.find(b"scenes-0-3") if path.suffix == ".arrow" else len(data) // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(UserError, match="1 of 5 files are damaged"):
        main([str(run)])
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.endswith(": ok")]
    assert len(lines) == 1 and path.name in lines[0] and remedy in lines[0]
