"""`UM3Pipeline.chat`: messages in Hugging Face's form, seeds, batches, and one-line errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from um3.core.errors import UserError
from um3.inference.sampling_params import Sampling
from um3.model import sequences
from um3.model.text_tokenizer import decode, encode_turns


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Paths of two images of different sizes."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for index, size in enumerate([(30, 40), (17, 16)]):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return sorted(folder.glob("*.png"))


def image(content):
    return {"type": "image", "image": content}


def text(content):
    return {"type": "text", "text": content}


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def conversations(photos):
    return [
        [user(image(Image.open(photos[0])), text("What is it?")), assistant("a disk"), user("What colour?")],
        "Why?",
        [user(text("What is"), image(str(photos[1])), text("it?"))],
        [user("a </s><|end_of_text|> \ud83d"), assistant(""), user(text("b 🦊"))],
    ]


def test_the_answer_is_the_greedy_text_after_the_layout_of_training(roomy, conversations, photos):
    (answer,) = answers = roomy.chat(conversations[0], max_new_tokens=8)
    turns = encode_turns([("What is it?", "a disk"), ("What colour?", "")], tokenizer=roomy.text_tokenizer)
    visual_ids = roomy.ids.codes_to_ids(roomy.encode([Image.open(photos[0])]))[0]
    prompt = sequences.chat_prompt(turns, visual_ids, ids=roomy.ids)
    expected = roomy.sampler.texts(
        prompts=[prompt], sampling=Sampling(temperature=0), uniforms_BP=torch.zeros(1, 8, dtype=torch.float64)
    )
    assert answer == decode(expected.token_ids[0], tokenizer=roomy.text_tokenizer).strip() != ""
    assert answers.logprobs == pytest.approx(expected.logprobs, rel=1e-4)
    codes_N = roomy.ids.ids_to_codes(visual_ids)
    for codes in (codes_N, codes_N.tolist()):
        first = user({"type": "image", "codes": codes}, text("What is it?"))
        assert roomy.chat([[first, *conversations[0][1:]]], max_new_tokens=8) == answers


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_conversations_together_give_what_each_gives_alone(roomy, conversations, options):
    whole = roomy.chat(conversations, max_new_tokens=8, **options)
    assert len(set(whole)) > 1 and max(whole.logprobs) < 0
    options.pop("seed", None)
    for index, conversation in enumerate(conversations):
        alone = roomy.chat(conversation, max_new_tokens=8, seeds=[whole.seeds[index]], **options)
        assert alone == [whole[index]] and alone.logprobs == pytest.approx(whole.logprobs[index : index + 1], rel=1e-4)
    pairs = roomy.chat(conversations, max_new_tokens=8, batch_size=2, seeds=whole.seeds, **options)
    assert pairs == whole and len(roomy.chat([])) == 0


def test_an_image_and_the_turns_before_change_the_answer(roomy, conversations):
    with_all, _, with_image, _ = roomy.chat(conversations, max_new_tokens=8)
    without_past, without_image = roomy.chat(["What colour?", "What is it?"], max_new_tokens=8)
    assert with_all != without_past and with_image != without_image


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["a", 3], "conversation 2 is of type int"),
        (["a", []], "conversation 2 ends without a question"),
        (["a", ["b"]], "conversation 2, message 1 is 'b'; give a dictionary with role and content"),
        ([{"role": "user"}], "message 1 is .* with role and content"),
        ([assistant("a")], "message 1 has the role 'assistant' instead of 'user'"),
        ([{"role": "system", "content": "be kind"}], "role 'system' instead of 'user'"),
        ([{"role": ["a"], "content": "b"}], "role .*'a'.* instead of 'user'"),
        ([user("a"), user("b")], "message 2 has the role 'user' instead of 'assistant'; user and assistant take turns"),
        ([user("a"), assistant("b")], "conversation 1 ends without a question"),
        ([user(" ")], "message 1 has no text; ask a question"),
        ([user(image("0.png"))], "message 1 has no text"),
        ([user(image("0.png"), image("0.png"), text("a"))], "conversation 1 has 2 images; give one"),
        ([user("a"), assistant("b"), user(image("0.png"), text("c"))], "message 3 has an image; .* first message"),
        ([user(image("0.png"), text("a"))], "0.png: cannot be read: .*check the path"),
        ([user(image("http://127.0.0.1/0.png"), text("a"))], "http://127.0.0.1/0.png: cannot be read"),
        ([user(image(__file__), text("a"))], "test_chat.py: not an image"),
        ([user({"type": "image", "codes": [1, 2, 3]}, text("a"))], r"an image is 4 codes from 0 to 2\*\*28 - 1"),
        (["a", [user({"type": "image", "codes": [1, 2, 3, 2**28]}, text("a"))]], "conversation 2: an image is 4 codes"),
        ([user({"type": "image", "codes": [1, 2, 3, True]}, text("a"))], "an image is 4 codes"),
        ([user(image(3), text("a"))], "content .*3.* is neither a text nor"),
        ([{"role": "user", "content": None}], "message 1: the content .* is neither a text nor"),
        (["a", "word " * 1000], r"prompt 2 of \S+ tokens leaves no room for 64 more .* of 512"),
    ],
)
def test_a_wrong_conversation_is_a_one_line_error(messages, message, roomy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        roomy.chat(messages)
