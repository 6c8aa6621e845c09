"""Sampling with a depth head: equal to the form without a cache, legal, independent of the batch; text stays stock."""

import pytest
import torch

from tests.helpers.tiny_um3 import make_ids, make_model
from um3.core.errors import UserError
from um3.inference.generate import FREE, Sampler
from um3.inference.grammar import Grammar
from um3.inference.sampling_params import Sampling
from um3.model import sequences
from um3.model.visual_parts import DepthHead

IDS = make_ids(subtokens=3, bits_per_subtoken=4, num_patches=4, depth_layers=2)
CAPTIONS = ([10, 11, 12], [20], [30, 31, 32, 33, 34], [], [40, 41])
PROMPTS = [sequences.image_prompt(caption, ids=IDS) for caption in CAPTIONS]
UNCONDITIONAL = sequences.image_prompt([], ids=IDS)
UNIFORMS = torch.rand(len(CAPTIONS), 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Setup:
    """A random model and depth head with distinct greedy choices."""

    def __init__(self, **sizes):
        self.model = make_model(IDS, scale=8.0, seed=1, **sizes)
        self.depth = DepthHead(IDS, model=self.model).eval()
        for parameter in self.depth.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        self.sampler = Sampler(self.model, ids=IDS, depth=self.depth)

    def images(self, sampling, *, which=(0, 1, 2, 3, 4), **options):
        prompts = [PROMPTS[index] for index in which]
        shared = {"unconditional_prompt": UNCONDITIONAL, "uniforms_BP": UNIFORMS[list(which)]}
        return self.sampler.images(prompts=prompts, sampling=sampling, **shared, **options)

    @torch.no_grad()
    def logits(self, prompt, visual_ids):
        """Logits (12, 16) of every sub-token among its own, by the training form without a cache."""
        embeddings_TSD = self.depth.embed(torch.cat([prompt, visual_ids]), table=self.model.get_input_embeddings())
        hidden = self.model.model(inputs_embeds=embeddings_TSD.sum(1)[None], use_cache=False).last_hidden_state[0]
        states_NSD = self.depth(hidden[len(prompt) - 1 : -1], embeddings_TSD[len(prompt) :])
        rows = [self.model.lm_head.weight[slice(*IDS.subtoken_range(subtoken))] for subtoken in range(3)]
        return torch.stack([states_NSD[:, subtoken] @ rows[subtoken].T for subtoken in range(3)], dim=1).flatten(0, 1)


@pytest.fixture(params=[{"num_kv_heads": 4}, {}, {"qk_norm": False}], ids=["qwen3", "qwen3-gqa", "llama-gqa"])
def setup(request):
    return Setup(**request.param)


def values(visual_ids):
    """Values (..., 12) of the sub-tokens, below 16."""
    return IDS.ids_to_rows(visual_ids).flatten(-2) - IDS.text_vocab_size - torch.tensor([0, 16, 32]).repeat(4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_greedy_images_are_those_of_the_form_without_a_cache(setup, scale):
    images = setup.images(Sampling(temperature=0, guidance_scale=scale)).visual_ids
    assert images.shape == (5, 4) and len(set(map(tuple, images.tolist()))) > 1
    for prompt, visual_ids in zip(PROMPTS, images, strict=True):
        logits, unconditional = (setup.logits(each, visual_ids) for each in (prompt, UNCONDITIONAL))
        guided = unconditional + scale * (logits - unconditional)
        assert torch.equal(guided.argmax(-1), values(visual_ids))


def test_sampled_images_are_legal_and_their_logprobs_are_the_models(setup):
    images = setup.images(Sampling(temperature=1.5, guidance_scale=2.0))
    assert IDS.ids_to_codes(images.visual_ids).max() < 1 << 12
    for prompt, visual_ids, logprob in zip(PROMPTS, images.visual_ids, images.logprobs, strict=True):
        logprobs = setup.logits(prompt, visual_ids).log_softmax(-1)
        expected = logprobs.gather(-1, values(visual_ids)[:, None]).sum()
        torch.testing.assert_close(logprob, expected, atol=1e-3, rtol=1e-4)
        assert setup.sampler.image_logprob(prompt, visual_ids=visual_ids) == pytest.approx(float(expected), abs=1e-3)


def test_a_sample_does_not_depend_on_its_batch_and_a_kept_patch_keeps_its_id(setup):
    sampling, seen = Sampling(guidance_scale=2.0), []
    together = setup.images(sampling, watch=lambda ids_PB: seen.append(ids_PB.clone()))
    assert [len(ids_PB) for ids_PB in seen] == [1, 2, 3, 4] and torch.equal(seen[-1].T, together.visual_ids)
    for which in ([0], [3, 1], [4, 2, 0]):
        assert torch.equal(setup.images(sampling, which=which).visual_ids, together.visual_ids[which])
    kept_BP = together.visual_ids.flip(0).clone()
    kept_BP[:, 1::2] = FREE
    again = setup.images(sampling, kept_BP=kept_BP).visual_ids
    assert torch.equal(again[:, ::2], kept_BP[:, ::2]) and not torch.equal(again[:, 1::2], together.visual_ids[:, 1::2])


@torch.no_grad()
def test_text_is_that_of_the_stock_model_also_after_an_image(setup):
    text = sequences.text_prompt([10, 11], ids=IDS)
    logprob = setup.sampler.text_logprob(text, token_ids=torch.tensor([12, 13]))
    stock = setup.model(torch.tensor([[0, 10, 11, 12, 13]])).logits[0, 2:, : IDS.text_vocab_size].log_softmax(-1)
    assert logprob == pytest.approx(float(stock[[0, 1, 2], [12, 13, IDS.eos_id]].sum()), abs=1e-3)
    visual_ids = IDS.codes_to_ids(torch.tensor([5, 4000, 77, 1234]))
    prompt = sequences.caption_prompt(visual_ids, ids=IDS)
    assert len(prompt) == 7
    summed_TD = setup.model.get_input_embeddings()(IDS.ids_to_rows(visual_ids)).sum(1)
    embeddings = setup.model.get_input_embeddings()(torch.tensor([0, IDS.begin_of_image_id, IDS.end_of_image_id, 20]))
    inputs = torch.cat([embeddings[:2], summed_TD, embeddings[2:]])
    stock = setup.model(inputs_embeds=inputs[None]).logits[0, -2:, : IDS.text_vocab_size].log_softmax(-1)
    logprob = setup.sampler.text_logprob(prompt, token_ids=torch.tensor([20]))
    assert logprob == pytest.approx(float(stock[0, 20] + stock[1, IDS.eos_id]), abs=1e-3)


def test_other_engines_may_write_text_only():
    with pytest.raises(UserError, match="depth head"):
        Grammar(IDS)
    assert Grammar(IDS, images=False).allowed([0, 10]) is None


@pytest.mark.parametrize("part", ["model", "depth"])
def test_a_decoder_notices_changed_weights(part):
    setup = Setup()
    decoder = setup.sampler.decoder
    assert decoder.is_current(setup.model)
    with torch.no_grad():
        next(getattr(setup, part).parameters()).mul_(2)
    assert not decoder.is_current(setup.model)
