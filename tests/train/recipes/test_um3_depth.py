"""UM3 with one position a patch: its loss and gradients, its files, resuming, and what stock clients read."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers.tiny_um3 import make_ids, make_model
from tests.train.conftest import arguments, check_resumed, logged, losses, saved_weights, train_here
from train.phase import main
from train.recipes.um3 import UM3Objective
from train.settings.um3 import UM3LossConfig
from um3.cli.info import describe_folder
from um3.core.errors import UserError
from um3.inference.pipeline import UM3Pipeline
from um3.inference.sampling_params import Sampling
from um3.model import sequences
from um3.model.gguf_export import export_gguf
from um3.model.language_model import load_model
from um3.model.visual_parts import BitEmbeddings, DepthHead

DEPTH = ("vocabulary.prediction=depth", "vocabulary.depth_layers=2")
IDS = make_ids(subtokens=3, bits_per_subtoken=4, num_patches=4, depth_layers=1)


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """A finished run of four steps."""
    folder = tmp_path_factory.mktemp("depth") / "um3"
    train_here("um3", made, folder, *DEPTH)
    return folder


@pytest.mark.parametrize("mode", ["split", "joint"])
def test_the_loss_by_chunks_and_its_gradient_are_those_of_all_logits(mode):
    model = make_model(IDS, scale=4.0)
    bits, depth = BitEmbeddings(IDS, model_config=model.config), DepthHead(IDS, model=model)
    for parameter in [*bits.parameters(), *depth.parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    images = [
        IDS.codes_to_ids(torch.randint(1 << 12, (4,), generator=torch.Generator().manual_seed(n))) for n in (1, 2)
    ]
    rows = [
        sequences.text_to_image_sequence([10, 11], images[0], ids=IDS),
        sequences.image_to_text_sequence(images[1], [12, 13], ids=IDS),
    ]
    input_ids_BT, target_mask_BT = (torch.stack(part) for part in zip(*rows, strict=True))
    objective = UM3Objective(model, ids=IDS, loss=UM3LossConfig(mode=mode, chunk_tokens=3), bits=bits, depth=depth)
    loss = objective(input_ids_BT, target_mask_BT)
    assert (int(loss.visual_count), int(loss.text_count)) == (4 * 3, 3 + 3)  # <boi> <eoi> eos; caption eos

    def table(rows):
        return bits.add_to_inputs(model.get_input_embeddings()(rows), ids_BT=rows)

    embeddings_BTSD = depth.embed(input_ids_BT, table=table)
    states_BTD = model.model(inputs_embeds=embeddings_BTSD[:, :-1].sum(2)).last_hidden_state
    start = int((input_ids_BT[0] >= 50).nonzero()[0])
    image_SD = depth(states_BTD[0, start - 1 : start + 3], embeddings_BTSD[0, start : start + 4]).flatten(0, 1)
    head_VD = bits.add_to_head(model.lm_head.weight)
    texts = [(0, start - 1, IDS.begin_of_image_id), (0, start + 4, IDS.end_of_image_id), (0, start + 5, IDS.eos_id)]
    texts += [(1, at, int(input_ids_BT[1, at])) for at in (7, 8, 9)]
    text_XD = torch.stack([states_BTD[row, at - 1] for row, at, _ in texts])
    first, last = (0, 50) if mode == "split" else (0, None)
    text = F.cross_entropy(
        text_XD @ head_VD[first:last].T, torch.tensor([target for *_, target in texts]), reduction="sum"
    )
    first = 50 if mode == "split" else 0
    image = F.cross_entropy(image_SD @ head_VD[first:].T, IDS.ids_to_rows(images[0]).flatten() - first, reduction="sum")
    torch.testing.assert_close(loss.text_sum, text)
    torch.testing.assert_close(loss.visual_sum, image)
    parameters = list(objective.parameters())
    ours = torch.autograd.grad(loss.text_sum + 2 * loss.visual_sum, parameters)
    for gradient, expected in zip(ours, torch.autograd.grad(text + 2 * image, parameters), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-4)
    calls = []
    depth.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    depth.is_checkpointed = True
    again = objective(input_ids_BT, target_mask_BT)
    checkpointed = torch.autograd.grad(again.text_sum + 2 * again.visual_sum, parameters)
    assert all(map(torch.equal, checkpointed, ours)) and len(calls) == 2  # forward, and once more in the backward pass


def test_it_learns_and_the_folder_draws_captions_and_scores(made, trained, tmp_path):
    assert logged(trained, "data/targets_visual")[0] % (16 * 2) == 0
    learnt = train_here("um3", made, tmp_path / "long", *DEPTH, "loop.max_steps=40", "optimizer.lr=1e-2")
    assert learnt[-1] < 0.9 * learnt[0]
    pipeline = UM3Pipeline.from_pretrained(trained / "model")
    assert pipeline.image_tokens == 16 and pipeline.ids.depth_layers == 2
    generated = pipeline.generate(["a circle", "two squares"], num_images=2, seed=3, guidance_scale=2.0)
    again = pipeline.generate(["two squares"], seeds=generated.seeds[3:], guidance_scale=2.0)
    assert torch.equal(generated.codes[3], again.codes[0]) and generated.arrays.shape == (4, 32, 32, 3)
    assert len(pipeline.caption(generated.arrays, max_new_tokens=4)) == 4
    scores = pipeline.score(generated.arrays[:1], ["a circle"])
    assert scores.text_logprobs[0] < 0 and scores.image_logprobs[0] < 0
    kept = pipeline.inpaint(generated.arrays[:1], ["a circle"], redraw=(0.5, 0.5, 1.0, 1.0))
    before_N = pipeline.encode(generated.arrays[:1])[0]
    is_kept_N = torch.ones(16, dtype=torch.bool)
    is_kept_N[kept.settings["redrawn_patches"]] = False
    assert is_kept_N.sum() == 12 and torch.equal(kept.codes[0][is_kept_N], before_N[is_kept_N])
    parts = pipeline.interleave(["a red circle"], answer="image", max_new_tokens=4)
    assert parts and pipeline.chat(["what is it?"], max_new_tokens=2)


def test_the_stock_half_is_a_stock_checkpoint_that_reads_and_writes_text(trained, tmp_path):
    stock = AutoModelForCausalLM.from_pretrained(trained / "model")
    names = set(load_file(trained / "model/model.safetensors"))
    assert not any("depth" in name for name in names) and names >= set(dict(stock.named_parameters()))
    pipeline = UM3Pipeline.from_pretrained(trained / "model")
    tokens = torch.tensor([[pipeline.ids.bos_id, 30, 31, 32]])
    texts = pipeline.sampler.texts(
        prompts=list(tokens), sampling=Sampling(temperature=0),
        uniforms_BP=torch.zeros(1, 6),
    )  # fmt: skip
    with torch.no_grad():
        for token in [*texts.token_ids[0], *([texts.ends[0]] if texts.ends[0] is not None else [])]:
            logits_V = stock(tokens).logits[0, -1, : pipeline.ids.text_vocab_size]
            specials = pipeline.ids.special_ids - {pipeline.ids.eos_id}
            logits_V[sorted(specials)] = float("-inf")
            assert int(logits_V.argmax()) == token
            tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
    facts, depth = describe_folder(trained / "model"), pipeline.depth.state_dict()
    assert facts["of the depth head"] == sum(tensor.numel() for tensor in depth.values())
    assert facts["parameters"] - facts["of the depth head"] == sum(weight.numel() for weight in stock.parameters())
    assert facts["image"].endswith("in 16 tokens")
    assert "`depth/model.safetensors`" in (trained / "model/README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="depth head"):
        export_gguf(trained / "model", out=tmp_path / "model.gguf")


def test_resuming_is_exact_and_processes_agree(made, trained, tmp_path):
    assert "model/depth/model.safetensors" in saved_weights(trained)
    check_resumed(arguments("um3", made, *DEPTH), trained, tmp_path, processes=2, within=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ("engine.zero_stage=0", "loop.micro_batch_size=2"),
        ("engine.zero_stage=3", "loop.micro_batch_size=1"),
        ("engine.activation_checkpointing=true", "data.packing=documents"),
    ],
)
def test_engines_agree(made, trained, tmp_path, overrides):
    expected = losses(trained)
    if "data.packing=documents" in overrides:
        expected = train_here("um3", made, tmp_path / "packed", *DEPTH, "data.packing=documents")
    ours = train_here("um3", made, tmp_path / "run", *DEPTH, *overrides)
    assert ours == pytest.approx(expected, abs=1e-4)


def test_training_continues_from_a_folder_with_its_head_or_gives_one_to_a_flat_folder(made, trained, tmp_path):
    base = f"model.base_model={trained}/model"
    visual = f"visual_tokenizer={made}/stage2/model"
    train_here("um3", made, tmp_path / "more", *DEPTH, base, visual, "optimizer.lr=1e-9")
    before, after = (load_model(folder / "model") for folder in (trained, tmp_path / "more"))
    for name, tensor in before.depth.state_dict().items():
        torch.testing.assert_close(after.depth.state_dict()[name], tensor, atol=1e-6, rtol=0)
    train_here("um3", made, tmp_path / "new", *DEPTH, f"model.base_model={made}/um3/model", "trainable=new_rows")
    given, new = load_model(made / "um3/model").model, load_model(tmp_path / "new/model")
    assert new.depth is not None and len(new.depth.layers) == 2
    entries = new.ids.text_vocab_size
    assert torch.equal(given.lm_head.weight[:entries], new.model.lm_head.weight[:entries])
    assert not torch.equal(given.lm_head.weight[entries:], new.model.lm_head.weight[entries:])
    with pytest.raises(UserError, match=r"vocabulary\.depth_layers=2"):
        train_here("um3", made, tmp_path / "other", base, visual)


def test_it_learns_to_answer(trained, made, tmp_path):
    main([*arguments("um3-instruct", made, f"loop.output_dir={tmp_path}"), f"init_from={trained}/model"])
    assert load_model(tmp_path / "model").ids.depth_layers == 2


def test_a_damaged_head_is_one_line(trained, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "model")
    head = tmp_path / "model/depth"
    (head / "model.safetensors").write_bytes((head / "model.safetensors").read_bytes()[:-4] + b"abcd")
    with pytest.raises(UserError, match="damaged"):
        load_model(tmp_path / "model")
    shutil.rmtree(head)
    with pytest.raises(UserError, match="depth"):
        load_model(tmp_path / "model")
