"""The server over real sockets: its results, the requests that it refuses, and that no client can end it."""

import functools
import http.client
import io
import json
import struct
import time

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from tests.um3.web.conftest import MAX_WAITING, SIDE, half_open, opened
from um3.core.errors import UserError
from um3.inference.image_io import METADATA, code_image
from um3.web.security import RequestGuard, is_loopback, listen
from um3.web.server import MAX_UPLOAD_BYTES, build_app


def image_bytes(*, format="PNG", size=(60, 40)):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=format)
    return buffer.getvalue()


def huge_bmp():
    """A small file whose header says 7,500 x 7,500 pixels."""
    content = image_bytes(format="BMP")
    return content[:18] + struct.pack("<ii", 7_500, 7_500) + content[26:]


def test_generated_images_stream_row_by_row_and_equal_the_pipelines(server, web_pipeline):
    prompt = "🦊👩‍👩‍👧 ثلاث \x00\x1b[31m <script> half a pair \ud83d"
    request = {"prompt": prompt, "num_images": 2, "seed": 7, "temperature": 0.8, "guidance_scale": [4, 1]}
    answer = server.request("POST", "/api/generate", request)
    assert answer.status == 200 and [event.get("row") for event in answer.events] == [*range(1, SIDE), None]
    for row, event in enumerate(answer.events[:-1], start=1):
        alpha_HW = np.asarray(opened(event["images"][1]["url"]))[..., 3]
        assert (alpha_HW[: row * 32 // SIDE] == 255).all() and (alpha_HW[row * 32 // SIDE :] == 0).all()
    options = {"temperature": 0.8, "top_p": 0.9, "guidance_scale": [4.0, 1.0]}
    expected = web_pipeline.generate([prompt], num_images=2, seeds=[7, 8], **options)
    for index, result in enumerate(answer.events[-1]["images"]):
        image = opened(result["url"])
        assert np.array_equal(np.asarray(image), expected.arrays[index]) and result["seed"] == 7 + index
        metadata = json.loads(image.info[METADATA])
        assert metadata["prompt"] == prompt.replace("\ud83d", "\ufffd")
        assert metadata["codes"] == expected.codes[index].tolist()
    again = server.request("POST", "/api/generate", request | {"num_images": 1, "seed": 8}).events[-1]["images"][0]
    assert again["url"] == answer.events[-1]["images"][1]["url"]


def test_an_image_is_repainted_and_varied_from_its_codes(server, web_pipeline):
    codes, request = [*range(SIDE**2)], {"prompt": "a disk", "num_images": 2, "seed": 7, "temperature": 0.8}
    options = {"num_images": 2, "seeds": [7, 8], "temperature": 0.8, "top_p": 0.9, "guidance_scale": 2.0}
    codes_BN = torch.tensor([codes])
    for change, method in (
        ({"redraw": [0.5, 0, 1, 0.5]}, web_pipeline.inpaint_codes),
        ({"strength": 0.4}, web_pipeline.vary_codes),
    ):
        answer = server.request("POST", "/api/generate", request | {"codes": codes} | change)
        expected = method(codes_BN, ["a disk"], **options, **change)
        assert [image["codes"] for image in answer.events[-1]["images"]] == expected.codes.tolist(), answer


def test_the_answer_says_whether_the_prompt_is_outside_the_training_data(server, web_pipeline):
    for prompt in ("a red disk", "zebra!"):
        event = server.request("POST", "/api/generate", {"prompt": prompt, "seed": 3}).events[-1]
        ratio = web_pipeline.prompt_log_ratio(prompt, codes_N=torch.tensor(event["images"][0]["codes"]))
        assert event["outside"] is (ratio < 0)


def test_an_image_gets_its_caption_codes_and_reconstruction(server, web_pipeline):
    content = image_bytes()
    (result,) = server.request("POST", "/api/caption", content).events
    image = Image.open(io.BytesIO(content))
    expected = web_pipeline.reconstruct([image])
    assert result["caption"] == web_pipeline.caption([image])[0] and result["size"] == [60, 40]
    assert result["codes"] == expected.codes[0].tolist()
    arrays = {"reconstruction": expected.arrays[0], "original": expected.originals[0]}
    for name, array in (arrays | {"code_image": code_image(expected.codes[0], num_bits=28)}).items():
        assert np.array_equal(np.asarray(opened(result[name])), array), name


@pytest.mark.parametrize(
    ("request_body", "message", "parameter"),
    [
        ({"prompt": " \n"}, "prompt 1 is empty", "prompt"),
        ({"prompt": "red " * 10_000}, "tokens", "prompt"),
        ({}, "'prompt'", None),
        ([1], "JSON list", None),
        ({"prompt": None}, "prompt 1", "prompt"),
        ({"prompt": "a", "\ud800": 1}, "unknown option", None),
        ({"prompt": "a", "colour": 1}, "'colour'", None),
        ({"prompt": "a", "temperature": float("nan")}, "temperature nan", "temperature"),
        ({"prompt": "a", "temperature": 10**400}, "temperature", "temperature"),
        ({"prompt": "a", "temperature": "warm"}, "'warm'", "temperature"),
        ({"prompt": "a", "temperature": True}, "temperature", "temperature"),
        ({"prompt": "a", "top_p": 2}, "top-p 2", "top_p"),
        ({"prompt": "a", "top_k": 2.5}, "top_k is '2.5'", "top_k"),
        ({"prompt": "a", "top_k": -1}, "top-k -1", "top_k"),
        ({"prompt": "a", "min_p": 2}, "min-p 2", "min_p"),
        ({"prompt": "a", "guidance_scale": -1}, "guidance scale -1", "guidance_scale"),
        ({"prompt": "a", "guidance_scale": [1, None]}, "guidance_scale", "guidance_scale"),
        ({"prompt": "a", "num_images": 10**9}, "num_images is 1000000000; use 1 to 16", "num_images"),
        ({"prompt": "a", "seed": -1}, "seed is -1", "seed"),
        ({"prompt": "a", "seed": None}, "seed", "seed"),
        ({"prompt": "a", "best_of": 4}, "text tokenizer", None),
        ({"prompt": "a", "num_images": 4, "best_of": 2}, "best_of=2", "best_of"),
        ({"prompt": "a", "codes": [0] * SIDE**2}, "either 'redraw' or 'strength'", None),
        ({"prompt": "a", "redraw": [0, 0, 1, 1]}, "needs its 'codes'", None),
        ({"prompt": "a", "codes": "/etc/passwd", "strength": 0.5}, "'codes', a list", None),
        ({"prompt": "a", "codes": [-1] * SIDE**2, "strength": 0.5}, "an image is 16 codes", None),
        ({"prompt": "a", "codes": [0] * SIDE**2, "strength": "half"}, "strength is 'half'", "strength"),
        ({"prompt": "a", "codes": [0] * SIDE**2, "strength": 2}, "strength 2", "strength"),
        ({"prompt": "a", "codes": [0] * SIDE**2, "redraw": [0, 0, 1]}, "[left, top, right, bottom]", None),
        ({"prompt": "a", "codes": [0] * SIDE**2, "redraw": [0, 0, 1, "b"]}, "redraw is 'b'", "redraw"),
        ({"prompt": "a", "codes": [0] * SIDE**2, "redraw": [1, 0, 1, 1]}, "must be (left, top, right, bottom)", None),
        (b"{", "not valid JSON", None),
    ],
)
def test_an_invalid_request_gets_status_400_one_sentence_and_its_parameter(server, request_body, message, parameter):
    answer = server.request("POST", "/api/generate", request_body)
    (error,) = answer.events
    assert answer.status == 400 and message in error["error"] and "\n" not in error["error"]
    assert error.get("parameter") == parameter


def test_a_conversation_gets_the_answer_of_the_pipeline(server, web_pipeline):
    (image,) = server.request("POST", "/api/caption", content := image_bytes()).events
    texts, messages = ["What is it?", "a disk", "Why?"], []
    for text, role in zip(texts, ("user", "assistant", "user"), strict=True):
        messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    messages[0]["content"].insert(0, {"type": "image", "image": Image.open(io.BytesIO(content))})
    for options in ({}, {"temperature": 1.5, "top_k": 9, "seed": 5}):
        (event,) = server.request("POST", "/api/chat", {"messages": texts, "codes": image["codes"], **options}).events
        seeds = [options.pop("seed", 0)]
        expected = web_pipeline.chat(messages, seeds=seeds, **options)
        assert event == {"answer": expected[0], "logprob": pytest.approx(expected.logprobs[0], rel=1e-4)}
    assert server.request("GET", "/api/model").events[0]["conversations"] == []


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        ({}, "'messages'"),
        ({"messages": "a"}, "'messages' must be a list"),
        ({"messages": ["a", "b"]}, "ends without a question"),
        ({"messages": [{"type": "image", "image": "/etc/passwd"}]}, "is neither a text nor"),
        ({"messages": ["a"], "codes": "/etc/passwd"}, "'codes' a list"),
        ({"messages": ["a"], "codes": [10**30] * 16}, "an image is 16 codes"),
        ({"messages": ["a " * 500]}, "leaves no room"),
        ({"messages": ["a"], "image": "/etc/passwd"}, "unknown option 'image'"),
        ({"messages": ["a"], "seed": -1}, "seed -1"),
        ({"messages": ["a"], "guidance_scale": 2}, "guidance_scale"),
    ],
)
def test_an_invalid_conversation_gets_status_400_and_one_sentence(server, request_body, message):
    answer = server.request("POST", "/api/chat", request_body)
    (error,) = answer.events
    assert answer.status == 400 and message in error["error"] and "\n" not in error["error"]


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not an image"),
        (huge_bmp(), 413, "50,000,000"),
        (image_bytes(format="JPEG", size=(400, 300))[:9_000], 422, "truncated"),
    ],
    ids=["svg", "7500 pixels square", "cut jpeg"],
)
def test_a_bad_upload_gets_a_status_and_one_sentence(server, content, status, message):
    answer = server.request("POST", "/api/caption", content)
    assert answer.status == status and message in answer.events[0]["error"]
    assert "Traceback" not in str(answer) and "/um3/" not in str(answer)


def test_a_long_upload_is_refused_by_its_announced_length(server):
    head = f"POST /api/caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {MAX_UPLOAD_BYTES + 1}\r\n\r\n"
    (connection,) = half_open(server.port, 1, head.encode())
    assert connection.recv(4096).startswith(b"HTTP/1.1 413")
    connection.close()


def test_an_upload_without_a_length_is_cut_off(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    num_sent = 0

    def endless():
        nonlocal num_sent
        while True:
            num_sent += 2**20
            yield bytes(2**20)

    chunked = {"Transfer-Encoding": "chunked"}
    with pytest.raises(OSError):
        connection.request("POST", "/api/caption", endless(), encode_chunked=True, headers=chunked)
    assert num_sent < 8 * MAX_UPLOAD_BYTES


def test_no_other_path_exists(server):
    absent = [
        ("GET", path) for path in ("/page.html", "/page/page.js", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd")
    ]
    for method, path in (*absent, ("GET", "/api/generate"), ("DELETE", "/api/model"), ("POST", "/")):
        answer = server.request(method, path)
        assert answer.status == (404 if (method, path) in absent else 405) and list(answer.events[0]) == ["error"]


def test_only_the_servers_own_page_may_call_it(server):
    own = f"localhost:{server.port}"
    call = functools.partial(server.request, "POST", "/api/generate", {"prompt": "a", "num_images": 1})
    assert call({"Host": own, "Origin": f"http://{own}", "Sec-Fetch-Site": "same-origin"}).status == 200
    evil = "http://evil.example"
    for name, value in (("Host", evil[7:]), ("Origin", evil), ("Origin", "null"), ("Sec-Fetch-Site", "cross-site")):
        answer = call({name: value})
        assert answer.status == 403 and list(answer.events[0]) == ["error"]


def test_only_addresses_are_valid_hosts():
    own, other = {"localhost:8000", "127.0.0.1", "[::1]:8000"}, "192.168.0.7:8000"
    for is_open, valid in ((False, own), (True, own | {other})):
        guard = RequestGuard(lambda *_: None, open_to_others=is_open)
        hosts = own | {other, "evil.example", "[", ""}
        assert {host for host in hosts if not guard.refusal(Headers({"host": host}), method="GET")} == valid


def test_addresses_and_ports_are_checked_before_the_server_starts(server):
    hosts = ("localhost", "127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "192.168.0.7", "::", "example.org")
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 4
    with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1 port \d+ .*in use.*--port"):
        listen("127.0.0.1", server.port)
    remedy = "address of this machine as --host"
    for host, message in (("203.0.113.9", remedy), ("nowhere.invalid", remedy), ("", "the host is empty")):
        with pytest.raises(UserError, match=message):
            listen(host, 0)
    with pytest.raises(UserError, match="temperature -1 is outside"):
        build_app(None, sampling={"temperature": -1}, max_waiting=1)


def test_every_answer_forbids_foreign_content(server):
    assert server.request("GET", "/api/model").events[0]["sampling"]["temperature"] == 0.5
    for path in ("/", "/page.js", "/page.css", "/api/model", "/absent"):
        headers = server.request("GET", path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"


def test_what_a_client_sends_is_escaped_in_the_log(server):
    server.request("GET", "/%0a08:00:00%20forged%1b%5b31m")
    (line,) = [line for line in server.log.read_text().split("\n") if "forged" in line]
    assert r"GET /\n08:00:00 forged\x1b[31m -> 404" in line


def test_a_full_queue_is_503_and_disconnected_clients_make_room(server):
    body = json.dumps({"prompt": "a red disk", "num_images": 16, "guidance_scale": 3}).encode()
    head = f"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connections = half_open(server.port, MAX_WAITING + 1, head + body)
    for _ in range(20):  # the queue is full once the server has read all requests
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        client.request("POST", "/api/generate", body)
        response = client.getresponse()
        if response.status == 503:
            break
        client.close()
    assert response.status == 503 and response.getheader("retry-after") == "2"
    assert b"queue is full" in response.read()
    for connection in connections:
        connection.close()
    for _ in range(300):  # the server notices a disconnected client within POLL_S
        answer = server.request("POST", "/api/generate", {"prompt": "a", "num_images": 1})
        if answer.status == 200:
            break
        time.sleep(0.1)
    assert answer.status == 200


def test_a_bug_is_answered_without_its_traceback():
    app = build_app(None, sampling={}, max_waiting=1)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = client.post("/api/caption", content=image_bytes())
    assert answer.status_code == 500 and list(answer.json()) == ["error"]
