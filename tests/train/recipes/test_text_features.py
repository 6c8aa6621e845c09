"""`make text-features`, and LlamaGen trained from its folder."""

import shutil

import pytest
import torch

from data_mix.codes.shards import open_code_sources
from downstream.llamagen.text_encoder import TextEncoder
from downstream.llamagen.text_features import CachedFeatures, write_features
from tests.helpers.processes import ROOT
from tests.train.conftest import arguments, check_resumed, copy_half, losses
from train.check import main as check
from train.phase import main
from train.recipes.llamagen import features_header, open_text_encoder
from train.settings.llamagen import LlamaGenTrainingConfig
from train.text_features import main as text_features
from um3.core.config import load_config
from um3.core.errors import UserError


def settings(made, folder, *overrides):
    """The arguments of `llamagen` after its name, with features of first captions in `folder` if there is one."""
    features = [f"text_features={folder}"] if folder else []
    return arguments("llamagen", made, "data.caption=first", *features, *overrides)[1:]


@pytest.fixture(scope="module")
def features(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "text_features"
    text_features(settings(made, folder))
    return folder


@pytest.fixture(scope="module")
def config(made):
    overrides = [f"visual_tokenizer={made}/stage2/model", f"data.codes={made}/codes", "data.caption=first"]
    return load_config(LlamaGenTrainingConfig, path=ROOT / "configs/demo.yaml", section="llamagen", overrides=overrides)


@pytest.fixture(scope="module")
def trained(made, features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamagen") / "llamagen"
    main(["llamagen", *settings(made, features, f"loop.output_dir={folder}")])
    return folder


def test_cached_features_are_those_of_the_encoder(config, features):
    images = next(iter(open_code_sources(config.data.codes, split="train").values()))
    captions = [images[index].captions[0] for index in range(12)]
    cached = CachedFeatures(features, header=features_header(config))(captions)
    online = open_text_encoder(config)(captions)
    assert torch.equal(cached.mask, online.mask) and cached.features.dtype == online.features.dtype
    torch.testing.assert_close(cached.features, online.features, rtol=0, atol=1e-5)
    assert not cached.features[~cached.mask].any()


def test_bf16_features_keep_their_bits(config, features, tmp_path):
    encoder = TextEncoder(config.resolved_text_encoder(), dtype=torch.bfloat16)
    header = features_header(config)
    captions = ["a red circle", "a blue square left of two green circles", "a red circle", "caption \ud800"]
    for part, caption in zip("abc", dict.fromkeys(captions), strict=True):  # alone: in a batch bf16 rounds differently
        write_features(tmp_path / f"train-{part}.safetensors", [caption], encoder=encoder, header=header, part=part)
    cached = CachedFeatures(tmp_path, header=header)
    for caption in captions:
        assert torch.equal(cached([caption]).features, encoder([caption]).features)
    assert (cached.width, cached.max_tokens) == (encoder.width, encoder.max_tokens)


def test_training_agrees_with_encoding_in_the_loop(made, trained, tmp_path):
    main(["llamagen", *settings(made, "", f"loop.output_dir={tmp_path}/online")])
    assert losses(trained) == pytest.approx(losses(tmp_path / "online"), rel=1e-5)


def test_a_resumed_run_has_the_same_bits_and_two_processes_agree(made, features, trained, tmp_path):
    moved = shutil.copytree(features, tmp_path / "moved")
    check_resumed(["llamagen", *settings(made, moved)], trained, tmp_path, processes=2)
    with pytest.raises(UserError, match="text_features"):
        main(["llamagen", *settings(made, "", f"loop.output_dir={copy_half(trained, tmp_path / 'other')}")])


def test_finished_files_are_kept_and_damaged_ones_are_made_again(made, features, tmp_path, capsys):
    folder = shutil.copytree(features, tmp_path / "text_features")
    text_features(settings(made, folder))
    assert "up to date" in capsys.readouterr().out
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    check([str(tmp_path)])
    file.write_bytes(content[:-4] + b"\1\2\3\4")
    with pytest.raises(UserError, match="damaged"):
        check([str(tmp_path)])
    file.write_bytes(content[: len(content) // 2])
    (folder / "train-gone-00000.safetensors").write_bytes(content)
    (folder / "model.safetensors").write_bytes(b"someone else's")
    text_features(settings(made, folder))
    assert (folder / "model.safetensors").exists()
    assert [path.name for path in folder.glob("train-*.safetensors")] == [file.name] and file.read_bytes() == content


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["text_features={empty}"], "run make text-features"),
        (["text_encoder.max_tokens=10"], "max_tokens=120, this run has 10"),
        (["text_encoder.num_layers=1"], "0 layers, this run has qlip [0-9a-f]*, 1 layers"),
        (["clean=true"], "clean=False, this run has True"),
        (["text_encoder.name={made}/stage1/model"], "encoder=qlip"),
        (["data.caption=random"], "has no features"),
    ],
)
def test_features_that_do_not_fit_are_one_line(overrides, named, made, features, tmp_path):
    values = {"empty": tmp_path, "made": made}
    overrides = [override.format(**values) for override in overrides]
    with pytest.raises(UserError, match=named):
        main(["llamagen", *settings(made, features, f"loop.output_dir={tmp_path}/run", *overrides)])


def test_a_folder_must_be_named(made):
    with pytest.raises(UserError, match="text_features is empty"):
        text_features(settings(made, ""))
