"""Caption features of a T5 in the real format and of QLIP's text tower."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from downstream.llamagen.text_encoder import TextEncoder, TextEncoderConfig
from tests.helpers.tiny_qlip import make_qlip
from tokenizer.modeling import load_qlip
from um3.core.errors import UserError

CAPTIONS = ["a red circle", "a red circle left of two blue squares", "a cross"]
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qlip(tmp_path_factory):
    return make_qlip(tmp_path_factory.mktemp("qlip"), captions=CAPTIONS * 20)


@pytest.fixture(params=["t5", "qlip"])
def encoder(request, t5, qlip):
    return TextEncoder(TextEncoderConfig(kind=request.param, name=str({"t5": t5, "qlip": qlip}[request.param])))


def test_captions_end_at_the_last_position_and_do_not_depend_on_each_other(encoder):
    features, mask = encoder(CAPTIONS)
    assert features.shape == (*mask.shape, encoder.width) and mask[:, -1].all()
    assert torch.equal(mask.long(), mask.long().sort(dim=1).values) and not features[~mask].any()
    for index, caption in enumerate(CAPTIONS):
        alone, _ = encoder([caption])
        torch.testing.assert_close(features[index][mask[index]], alone[0], atol=1e-5, rtol=0)


def test_qlip_features_lead_to_its_text_embedding(qlip):
    encoder, model = TextEncoder(TextEncoderConfig(kind="qlip", name=str(qlip))), load_qlip(qlip)
    ids = encoder.tokenizer(CAPTIONS[0], return_tensors="pt")["input_ids"]
    pooled = torch.nn.functional.normalize(model.text_projection(encoder(CAPTIONS[:1]).features[:, -1]), dim=-1)
    torch.testing.assert_close(pooled, model.get_text_features(ids))


def test_t5_features_are_a_hidden_state_after_the_final_norm(t5):
    ids = [3 + WORDS.index(word) for word in CAPTIONS[0].split()] + [1]
    output = T5EncoderModel.from_pretrained(t5)(torch.tensor([ids]), output_hidden_states=True)
    whole, one = (TextEncoder(TextEncoderConfig(name=str(t5), num_layers=number)) for number in (-1, 1))
    torch.testing.assert_close(whole(CAPTIONS[:1]).features, output.last_hidden_state)
    expected = one.model.encoder.final_layer_norm(output.hidden_states[1])
    torch.testing.assert_close(one(CAPTIONS[:1]).features, expected)


def test_fewer_layers_of_qlip_are_run_before_the_final_norm(qlip):
    encoder, tower = TextEncoder(TextEncoderConfig("qlip", str(qlip), num_layers=0)), load_qlip(qlip).text_model
    embedded = tower.embeddings(encoder.tokenizer(CAPTIONS[0], return_tensors="pt")["input_ids"])
    torch.testing.assert_close(encoder(CAPTIONS[:1]).features, tower.final_layer_norm(embedded))


@pytest.mark.parametrize("kind", ["t5", "qlip"])
def test_more_layers_than_the_encoder_has_are_named(kind, t5, qlip):
    with pytest.raises(UserError, match="num_layers=3, but the encoder has"):
        TextEncoder(TextEncoderConfig(kind, str(t5 if kind == "t5" else qlip), num_layers=3))


def test_long_captions_are_cut_and_keep_their_end(encoder):
    encoder.max_tokens = 4
    _, mask = encoder(["a red circle left of two blue squares a red circle"])
    assert mask.shape == (1, 4) and mask.all()
    end = encoder.tokenizer.eos_token_id
    assert encoder.tokenizer("a red circle left of", truncation=True, max_length=4)["input_ids"][-1] == end
    assert encoder([""]).features.shape[1] <= 2 and encoder(["word " * 10_000]).features.shape[1] == 4


def test_a_t5_without_its_tokenizer_is_named(t5, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((t5 / name).read_bytes())
    with pytest.raises(UserError, match="T5 text encoder"):
        TextEncoder(TextEncoderConfig(name=str(tmp_path)))
