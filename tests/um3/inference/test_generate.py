"""Sampling: equal to stock greedy generation, legal, independent of the batch, from the right distribution."""

import pytest
import torch
from transformers import LogitsProcessorList

from tests.helpers.tiny_um3 import make_ids, make_model
from um3.core.errors import UserError
from um3.inference.generate import FREE, Sampler, choose
from um3.inference.grammar import Grammar, GrammarProcessor
from um3.inference.sampling_params import Sampling
from um3.model import sequences
from um3.model.visual_parts import DepthHead

IDS = make_ids(num_patches=4)
DEPTH_IDS = make_ids(subtokens=3, bits_per_subtoken=4, num_patches=4, depth_layers=2)
CAPTIONS = ([10, 11, 12], [20], [30, 31, 32, 33, 34], [], [40, 41])
GREEDY = Sampling(temperature=0)


class Setup:
    """A random model with distinct greedy choices, and prompts of unequal length."""

    def __init__(self, ids=IDS, **sizes):
        self.ids, self.model, self.depth = ids, make_model(ids, scale=8.0, seed=1, **sizes), None
        if ids.depth_layers:
            self.depth = DepthHead(ids, model=self.model).eval()
            for parameter in self.depth.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        self.prompts = [sequences.image_prompt(caption, ids=ids) for caption in CAPTIONS]
        self.unconditional = sequences.image_prompt([], ids=ids)
        self.uniforms = torch.rand(len(CAPTIONS), ids.image_subtokens, generator=torch.Generator().manual_seed(2))

    @property
    def sampler(self):
        return Sampler(self.model, ids=self.ids, depth=self.depth)

    def images(self, sampling, *, which=(0, 1, 2, 3, 4), **options):
        prompts = [self.prompts[index] for index in which]
        shared = {"unconditional_prompt": self.unconditional, "uniforms_BP": self.uniforms[list(which)]}
        return self.sampler.images(prompts=prompts, sampling=sampling, **shared, **options)

    @torch.no_grad()
    def logits(self, prompt, visual_ids):
        """Plain forward without a cache: logits of every sub-token, -inf outside its range."""
        ids_T = torch.cat([prompt, visual_ids])
        if self.depth is None:
            logits_PV = self.model(ids_T[None]).logits[0, len(prompt) - 1 : -1]
        else:
            embeddings_TSD = self.depth.embed(ids_T, table=self.model.get_input_embeddings())
            hidden_TD = self.model.model(inputs_embeds=embeddings_TSD.sum(1)[None]).last_hidden_state[0]
            states_NSD = self.depth(hidden_TD[len(prompt) - 1 : -1], embeddings_TSD[len(prompt) :])
            logits_PV = self.model.lm_head(states_NSD).flatten(0, 1)
        for position, logits_V in enumerate(logits_PV):
            start, end = self.ids.subtoken_range(position % self.ids.subtokens)
            logits_V[:start] = logits_V[end:] = float("-inf")
        return logits_PV

    def stock_greedy(self, prompt, *, count, images):
        output = self.model.generate(
            prompt.unsqueeze(0), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
            max_new_tokens=count, logits_processor=LogitsProcessorList([GrammarProcessor(IDS, images=images)]),
        )  # fmt: skip
        return output[0, len(prompt) :].tolist()


@pytest.fixture(params=[{"num_kv_heads": 4}, {}, {"qk_norm": False}], ids=["qwen3", "qwen3-gqa", "llama-gqa"])
def sizes(request):
    return request.param


@pytest.fixture
def flat(sizes):
    return Setup(IDS, **sizes)


@pytest.fixture(params=[IDS, DEPTH_IDS], ids=["flat", "depth"])
def setup(request, sizes):
    return Setup(request.param, **sizes)


def test_greedy_images_equal_stock_generation(flat):
    images = flat.images(GREEDY).visual_ids
    for prompt, visual_ids in zip(flat.prompts, images, strict=True):
        assert visual_ids.tolist() == flat.stock_greedy(prompt, count=IDS.image_tokens, images=True)


def test_greedy_text_equals_stock_generation(flat):
    prompts = [sequences.text_prompt(tokens, ids=IDS) for tokens in CAPTIONS]
    texts = flat.sampler.texts(prompts=prompts, sampling=GREEDY, uniforms_BP=torch.zeros(len(CAPTIONS), 12)).token_ids
    for prompt, text in zip(prompts, texts, strict=True):
        stock = flat.stock_greedy(prompt, count=12, images=False)
        assert text == (stock[: stock.index(1)] if 1 in stock else stock)


def test_each_text_ends_at_its_own_end_of_text(setup):
    """eos is likely but not certain: texts end at different places, and none has a token that is not allowed."""
    setup.model.lm_head.weight.data[:50].mul_(0.05)
    uniforms_BP = torch.rand(40, 30, generator=torch.Generator().manual_seed(3))
    texts = setup.sampler.texts(prompts=setup.prompts * 8, sampling=Sampling(), uniforms_BP=uniforms_BP).token_ids
    assert len({len(text) for text in texts}) > 3
    assert all(4 < token < IDS.text_vocab_size for text in texts for token in text)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 5}, {"guidance_scale": 3.0}, {"temperature": 0.0}])
def test_a_sample_does_not_depend_on_its_batch(setup, options):
    sampling = Sampling(**options)
    seen = []
    together = setup.images(sampling, watch=lambda ids_PB: seen.append(ids_PB.clone()))
    assert torch.equal(seen[-1].T, together.visual_ids) and len(seen) > 3
    assert [len(ids_PB) for ids_PB in seen] == list(range(setup.ids.image_tokens + 1))[-len(seen) :]
    for which in ([0], [3, 1], [4, 2, 0]):
        apart = setup.images(sampling, which=which)
        assert torch.equal(apart.visual_ids, together.visual_ids[which])
        torch.testing.assert_close(apart.logprobs, together.logprobs[which], rtol=1e-4, atol=1e-3)


def test_a_reused_batch_samples_as_a_new_one():
    """Batches of one shape share their cache, whatever was in it."""
    setup = Setup()
    sampler, sampling = setup.sampler, Sampling(guidance_scale=2.0)
    prompts, shared = setup.prompts[:2], {"unconditional_prompt": setup.unconditional, "sampling": sampling}
    for order in ([0, 1], [1, 0]):
        for kept_BP in (None, None, IDS.codes_to_ids(torch.arange(8).view(2, 4)), torch.full((2, 16), FREE)):
            shared |= {"prompts": [prompts[index] for index in order], "uniforms_BP": setup.uniforms[order]}
            reused, new = (each.images(**shared, kept_BP=kept_BP) for each in (sampler, setup.sampler))
            assert torch.equal(reused.visual_ids, new.visual_ids) and torch.equal(reused.logprobs, new.logprobs)
    uniforms_BP = torch.rand(2, 20)
    texts = [sampler.texts(prompts=prompts, sampling=Sampling(), uniforms_BP=uniforms_BP) for _ in range(2)]
    assert texts[0] == texts[1] == setup.sampler.texts(prompts=prompts, sampling=Sampling(), uniforms_BP=uniforms_BP)


def test_every_image_is_legal_and_logprobs_are_the_models(setup):
    images = setup.images(Sampling(temperature=1.5, guidance_scale=2.0))
    setup.ids.ids_to_codes(images.visual_ids)
    for prompt, visual_ids, logprob in zip(setup.prompts, images.visual_ids, images.logprobs, strict=True):
        logprobs_PV = setup.logits(prompt, visual_ids).log_softmax(-1)
        entries_P = setup.ids.ids_to_rows(visual_ids).flatten()
        total = logprobs_PV.gather(-1, entries_P[:, None]).sum()
        torch.testing.assert_close(logprob, total, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, (0.0, 4.0)])
def test_guidance_extrapolates_from_the_unconditional_logits(setup, scale):
    sampling = Sampling(temperature=0, guidance_scale=scale)
    scales_P1 = torch.tensor(sampling.scales(setup.ids.image_subtokens))[:, None]
    images = setup.images(sampling).visual_ids
    assert scale == 0 or len(images.unique(dim=0)) > 1, "the prompts must matter"
    for prompt, visual_ids in zip(setup.prompts, images, strict=True):
        conditional, unconditional = (setup.logits(each, visual_ids) for each in (prompt, setup.unconditional))
        guided = unconditional + scales_P1 * (conditional - unconditional)
        guided = torch.where(conditional.isinf(), conditional, guided)
        assert torch.equal(guided.argmax(-1), setup.ids.ids_to_rows(visual_ids).flatten())


def test_a_guidance_schedule_runs_from_the_first_position_to_the_last():
    assert Sampling(guidance_scale=(1.0, 4.0, 2.0)).scales(5) == [1.0, 2.5, 4.0, 3.0, 2.0]
    assert Sampling(guidance_scale=3).scales(2) == [3.0, 3.0] and not Sampling(guidance_scale=[1.0, 1.0]).guided
    with pytest.raises(UserError, match="schedule is empty"):
        Sampling(guidance_scale=())


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"guidance_scale": 2.0}])
def test_kept_ids_stay_and_later_positions_depend_on_them(setup, options):
    sampling, patch = Sampling(**options), setup.ids.image_tokens // 4
    plain = setup.images(sampling)
    kept_BP = torch.full_like(plain.visual_ids, FREE)
    kept_BP[:, patch : 2 * patch] = setup.ids.codes_to_ids(torch.arange(5)[:, None])
    images = setup.images(sampling, kept_BP=kept_BP)
    assert torch.equal(images.visual_ids[:, :patch], plain.visual_ids[:, :patch])
    assert torch.equal(images.visual_ids[:, patch : 2 * patch], kept_BP[:, patch : 2 * patch])
    assert not torch.equal(images.visual_ids[:, 2 * patch :], plain.visual_ids[:, 2 * patch :])
    whole = setup.images(sampling, kept_BP=images.visual_ids)
    assert torch.equal(whole.visual_ids, images.visual_ids)
    torch.testing.assert_close(whole.logprobs, images.logprobs, rtol=1e-4, atol=1e-3)


def test_scores_of_finished_sequences_are_those_of_sampling(setup):
    setup.model.lm_head.weight.data[1] *= 0.05
    sampler, images = setup.sampler, setup.images(Sampling())
    for prompt, visual_ids, logprob in zip(setup.prompts, images.visual_ids, images.logprobs.tolist(), strict=True):
        assert sampler.image_logprob(prompt, visual_ids=visual_ids) == pytest.approx(logprob, rel=1e-4, abs=1e-3)
    uniforms_BP = torch.rand(5, 30, generator=torch.Generator().manual_seed(4))
    texts = sampler.texts(prompts=setup.prompts, sampling=Sampling(temperature=2.0), uniforms_BP=uniforms_BP)
    ended = [index for index, end in enumerate(texts.ends) if end == IDS.eos_id]
    assert ended
    for index in ended:
        tokens = torch.tensor(texts.token_ids[index], dtype=torch.int64)
        scored = sampler.text_logprob(setup.prompts[index], token_ids=tokens)
        assert scored == pytest.approx(texts.logprobs[index], rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_logits_that_are_not_finite_are_refused(value, guidance_scale):
    setup, prompts, uniforms_BP = Setup(), [sequences.text_prompt([10], ids=IDS)] * 2, torch.zeros(2, 4)
    setup.model.lm_head.weight.data[[20, IDS.subtoken_range(2)[0]]] = value
    for call in (
        lambda: setup.images(Sampling(guidance_scale=guidance_scale)),
        lambda: setup.sampler.image_logprob(prompts[0], visual_ids=IDS.codes_to_ids(torch.arange(4)[None])[0]),
        lambda: setup.sampler.texts(prompts=prompts, sampling=Sampling(), uniforms_BP=uniforms_BP),
        lambda: setup.sampler.text_logprob(prompts[0], token_ids=torch.tensor([10])),
    ):
        with pytest.raises(UserError, match="logits are not finite"):
            call()


@torch.no_grad()
def test_text_with_a_depth_head_is_that_of_the_stock_model_also_after_an_image(sizes):
    setup, ids = Setup(DEPTH_IDS, **sizes), DEPTH_IDS
    text = sequences.text_prompt([10, 11], ids=ids)
    logprob = setup.sampler.text_logprob(text, token_ids=torch.tensor([12, 13]))
    stock = setup.model(torch.tensor([[0, 10, 11, 12, 13]])).logits[0, 2:, : ids.text_vocab_size].log_softmax(-1)
    assert logprob == pytest.approx(float(stock[[0, 1, 2], [12, 13, ids.eos_id]].sum()), abs=1e-3)
    visual_ids = ids.codes_to_ids(torch.tensor([5, 4000, 77, 1234]))
    prompt = sequences.caption_prompt(visual_ids, ids=ids)
    assert len(prompt) == 7
    summed_TD = setup.model.get_input_embeddings()(ids.ids_to_rows(visual_ids)).sum(1)
    embeddings = setup.model.get_input_embeddings()(torch.tensor([0, ids.begin_of_image_id, ids.end_of_image_id, 20]))
    inputs = torch.cat([embeddings[:2], summed_TD, embeddings[2:]])
    stock = setup.model(inputs_embeds=inputs[None]).logits[0, -2:, : ids.text_vocab_size].log_softmax(-1)
    logprob = setup.sampler.text_logprob(prompt, token_ids=torch.tensor([20]))
    assert logprob == pytest.approx(float(stock[0, 20] + stock[1, ids.eos_id]), abs=1e-3)


def test_other_engines_write_only_text_of_a_model_with_a_depth_head():
    with pytest.raises(UserError, match="depth head"):
        Grammar(DEPTH_IDS)
    assert Grammar(DEPTH_IDS, images=False).allowed([0, 10]) is None


@pytest.mark.parametrize("part", ["model", "depth"])
def test_a_decoder_notices_changed_weights(part):
    setup = Setup(DEPTH_IDS)
    decoder = setup.sampler.decoder
    assert decoder.is_current(setup.model)
    with torch.no_grad():
        next(getattr(setup, part).parameters()).mul_(2)
    assert not decoder.is_current(setup.model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_recorded_steps_on_a_gpu_sample_as_the_cpu(flat, scale):
    sampling = Sampling(temperature=0, guidance_scale=scale)
    on_cpu = flat.images(sampling).visual_ids
    flat.model.to("cuda")
    sampler = flat.sampler
    for _ in range(2):  # the second batch replays the graphs of the first
        images = sampler.images(
            prompts=flat.prompts, unconditional_prompt=flat.unconditional, sampling=sampling, uniforms_BP=flat.uniforms
        )
        assert torch.equal(images.visual_ids.cpu(), on_cpu)


def test_choose_inverts_the_distribution():
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    levels = (torch.arange(2000) + 0.5) / 2000
    logits = probabilities.log().expand(2000, 4)

    def shares(**options):
        choices = choose(logits, sampling=Sampling(**options), uniforms_B=levels)
        return [round(float(share), 3) for share in torch.bincount(choices, minlength=4) / 2000]

    assert shares() == [0.05, 0.5, 0.15, 0.3]
    assert shares(top_k=2) == [0, 0.625, 0, 0.375]
    assert shares(top_p=0.81) == pytest.approx([0, 0.526, 0.158, 0.316], abs=2e-3)
    assert shares(top_p=0.79) == [0, 0.625, 0, 0.375]
    assert shares(top_p=1e-6) == shares(temperature=0) == shares(top_k=1) == [0, 1, 0, 0]
    squared = probabilities.square() / probabilities.square().sum()
    assert shares(min_p=0.5) == [0, 0.625, 0, 0.375] and shares(min_p=0.61) == [0, 1, 0, 0]
    assert shares(min_p=0.5, top_p=0.5) == shares(temperature=1e-300) == [0, 1, 0, 0]
    assert shares(temperature=1e300) == [0.25] * 4
    assert shares(temperature=0.5) == pytest.approx(squared.tolist(), abs=2e-3)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("options", [
    {"temperature": -0.1}, {"temperature": NAN}, {"temperature": INF}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1},
    {"min_p": 1.5}, {"guidance_scale": -1.0}, {"guidance_scale": 1e30}, {"guidance_scale": (NAN, 1.0)},
])  # fmt: skip
def test_options_out_of_range_are_named_with_their_value(options):
    (name, value), *_ = options.items()
    first = value[0] if isinstance(value, tuple) else value
    with pytest.raises(UserError, match=name.replace("_", ".") + f" {first}".replace("+", r"\+")):
        Sampling(**options)
