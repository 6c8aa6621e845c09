"""POST /v1/images/generations: the requests and answers of OpenAI's images API."""

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.um3.web.conftest import opened
from um3.web.model_calls import MAX_IMAGES
from um3.web.server import build_app

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def client(web_pipeline):
    app = build_app(web_pipeline, sampling={"temperature": 0.5}, max_waiting=1)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def test_images_are_those_of_the_pipeline(client, web_pipeline):
    request = {"model": "um3", "user": "me", "prompt": "a red disk", "n": 2, "size": "32x32"}
    answer = client.post(PATH, json=request | {"response_format": "b64_json", "seed": 7, "guidance_scale": 2})
    expected = web_pipeline.generate(["a red disk"], num_images=2, seeds=[7, 8], temperature=0.5, guidance_scale=2)
    assert answer.status_code == 200 and isinstance(answer.json()["created"], int)
    assert [list(image) for image in answer.json()["data"]] == [["b64_json"]] * 2
    images = [np.asarray(opened(image["b64_json"])) for image in answer.json()["data"]]
    assert np.array_equal(images, expected.arrays)


def test_the_seed_is_random_without_one(client):
    images = [client.post(PATH, json={"prompt": "a", "size": "auto"}).json()["data"] for _ in range(2)]
    assert [len(image) for image in images] == [1, 1] and images[0] != images[1]


@pytest.mark.parametrize(
    ("request_body", "message", "parameter"),
    [
        ({}, "'prompt'", None),
        ({"prompt": "a", "n": MAX_IMAGES + 1}, "use 1 to 16", "num_images"),
        ({"prompt": "a", "size": "1024x1024"}, "size is '1024x1024'; use auto or 32x32", "size"),
        ({"prompt": "a", "response_format": "url"}, "response_format is 'url'; use b64_json", "response_format"),
        ({"prompt": "a", "quality": "hd"}, "unknown option 'quality'", None),
    ],
)
def test_an_invalid_request_is_an_error_of_openais_form(client, request_body, message, parameter):
    answer = client.post(PATH, json=request_body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", parameter, None)
