"""The server over real sockets: what it draws and reads, whom it refuses, and that nothing a client sends ends it."""

import asyncio
import base64
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.datastructures import Headers

from tests.um3.web.conftest import MOST_WAITING, SIDE, Server
from um3.core.errors import UserError
from um3.inference.image_io import METADATA, code_picture
from um3.inference.pipeline import UM3Pipeline
from um3.web.address import is_loopback, listen
from um3.web.security import Guard
from um3.web.server import MAX_UPLOAD, build_app

LONG = {"prompt": "a red disk", "num_images": 16, "guidance_scale": 3}


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def picture_bytes(*, format: str = "PNG", size: tuple[int, int] = (60, 40), **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format=format, **options)
    return buffer.getvalue()


def huge_png(side: int) -> bytes:
    """A valid header of a black picture that would fill gigabytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(1_000_000))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animation() -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def test_a_drawing_comes_row_by_row_and_ends_as_the_pipeline_draws_it(
    server: Server, web_pipeline: UM3Pipeline
) -> None:
    asked = {"prompt": "a red disk", "num_images": 2, "seed": 7, "temperature": 0.8, "guidance_scale": [4, 1]}
    answer = server.ask("POST", "/api/draw", asked)
    assert answer.status == 200 and [each["event"] for each in answer.events] == ["row"] * (SIDE - 1) + ["done"]
    for row, event in enumerate(answer.events[:-1], start=1):
        alpha_HW = np.asarray(opened(event["pictures"][1]))[..., 3]
        assert event["done"] == row and (alpha_HW[: row * 4] == 255).all() and (alpha_HW[row * 4 :] == 0).all()
    expected = web_pipeline.generate(
        ["a red disk"], num_images=2, seeds=[7, 8], temperature=0.8, top_p=0.9, guidance_scale=[4.0, 1.0]
    )
    for index, found in enumerate(answer.events[-1]["pictures"]):
        picture = opened(found["url"])
        assert np.array_equal(np.asarray(picture), expected.images[index]) and found["seed"] == 7 + index
        about = json.loads(picture.info[METADATA])
        assert about["prompt"] == "a red disk" and about["codes"] == expected.codes[index].tolist()
    again = server.ask("POST", "/api/draw", asked | {"num_images": 1, "seed": 8}).events[-1]["pictures"][0]
    assert again["url"] == answer.events[-1]["pictures"][1]["url"]


def test_looking_gives_caption_codes_and_reconstruction(server: Server, web_pipeline: UM3Pipeline) -> None:
    content = picture_bytes()
    (found,) = server.ask("POST", "/api/look", content).events
    picture = Image.open(io.BytesIO(content))
    expected = web_pipeline.reconstruct([picture])
    assert found["caption"] == web_pipeline.caption([picture])[0] and found["size"] == [60, 40]
    assert found["codes"] == expected.codes[0].tolist()
    assert np.array_equal(np.asarray(opened(found["reconstruction"])), expected.images[0])
    assert np.array_equal(np.asarray(opened(found["original"])), expected.originals[0])
    assert np.array_equal(np.asarray(opened(found["code_picture"])), code_picture(expected.codes[0], num_bits=28))


def test_of_an_animation_the_first_frame_is_read(server: Server) -> None:
    (found,) = server.ask("POST", "/api/look", animation()).events
    assert np.asarray(opened(found["original"])).mean(axis=(0, 1)).round().tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "prompt", ["🦊🚀👩‍👩‍👧", "ثلاث نجوم خضراء", "שלושה כוכבים", "\x00\x1b[31m", "<script>alert(1)</script>"]
)
def test_any_writing_is_a_prompt(server: Server, prompt: str) -> None:
    answer = server.ask("POST", "/api/draw", {"prompt": prompt, "num_images": 1, "temperature": 0})
    assert answer.status == 200
    assert json.loads(opened(answer.events[-1]["pictures"][0]["url"]).info[METADATA])["prompt"] == prompt


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"prompt": ""}, "prompt 1 is empty; say what to draw"),
        ({"prompt": " \n"}, "prompt 1 is empty"),
        ({"prompt": "red " * 10_000}, "leaves no room for 256 more"),
        ({"prompt": "a\ud800"}, "half a surrogate pair"),
        ({}, "no object with a prompt"),
        ({"prompt": 3}, "no object with a prompt"),
        ([1], "no object with a prompt"),
        ({"prompt": "a", "colour": 1}, "'colour' is no setting"),
        ({"prompt": "a", "temperature": -1}, "temperature -1 is outside"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature nan is"),
        ({"prompt": "a", "temperature": 10**400}, "no number that can be used"),
        ({"prompt": "a", "temperature": "warm"}, "temperature is 'warm', no number"),
        ({"prompt": "a", "temperature": True}, "no number"),
        ({"prompt": "a", "top_p": 0}, "top-p 0 is outside"),
        ({"prompt": "a", "top_k": 2.5}, "no whole number"),
        ({"prompt": "a", "min_p": 7}, "min-p 7 is outside"),
        ({"prompt": "a", "guidance_scale": 1e9}, "outside [0, 1000]"),
        ({"prompt": "a", "guidance_scale": []}, "schedule is empty"),
        ({"prompt": "a", "guidance_scale": [1, None]}, "no number"),
        ({"prompt": "a", "num_images": 0}, "num_images is 0; use 1 to 16"),
        ({"prompt": "a", "num_images": 10**9}, "num_images is 1000000000; use 1 to 16"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": "a", "seed": None}, "no whole number"),
        ({"prompt": "a", "num_images": 4, "best_of": 2}, "best of 2 leaves no 4 images"),
        ({"prompt": "a", "best_of": 4}, "text tokenizer"),
        (b"{", "the request is no JSON"),
        (b"\xff\xfe\x00", "the request is no JSON"),
        (b"[" * 100_000, "the request is no JSON"),
    ],
)
def test_a_drawing_that_cannot_be_is_one_sentence(server: Server, asked: Any, sentence: str) -> None:
    answer = server.ask("POST", "/api/draw", asked)
    (error,) = answer.events
    assert answer.status == 400 and sentence in error["error"] and "\n" not in error["error"]


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        (b"", 415, "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not an image"),
        (huge_png(20_000), 413, "too large"),
        (huge_png(7_500), 413, "pixels are more than the 50,000,000 allowed"),
        (picture_bytes(format="JPEG", size=(400, 300))[:9_000], 422, "truncated"),
        (picture_bytes()[:200] + b"\xff" * 200 + picture_bytes()[400:], 422, "cannot be decoded"),
    ],
    ids=["empty", "svg", "20000 pixels square", "7500 pixels square", "cut jpeg", "broken png"],
)
def test_a_bad_upload_is_one_sentence(server: Server, content: bytes, status: int, sentence: str) -> None:
    answer = server.ask("POST", "/api/look", content)
    assert answer.status == status and sentence in answer.events[0]["error"]
    assert "Traceback" not in str(answer) and "/um3/" not in str(answer)


def test_an_upload_is_refused_by_what_its_header_says(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /api/look HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {MAX_UPLOAD + 1}\r\n\r\n"
        connection.sendall(head.encode())  # and not a byte more
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_an_upload_without_a_length_is_cut_off(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    sent = 0

    def endless() -> Any:
        nonlocal sent
        while True:
            sent += 2**20
            yield bytes(2**20)

    with pytest.raises(OSError):
        connection.request(
            "POST", "/api/look", endless(), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
        )
    assert sent < 8 * MAX_UPLOAD


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/page.html", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "//etc/passwd", 404),
        ("GET", "/api/../server.py", 404),
        ("GET", "/api/draw", 405),
        ("POST", "/", 405),
        ("DELETE", "/api/model", 405),
    ],
)
def test_no_other_path_leads_anywhere(server: Server, method: str, path: str, status: int) -> None:
    answer = server.ask(method, path)
    assert answer.status == status and list(answer.events[0]) == ["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": ""},
        {"Host": "192.168.0.7"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_other_sites_are_refused(server: Server, headers: dict[str, str]) -> None:
    answer = server.ask("POST", "/api/draw", {"prompt": "a"}, headers)
    assert answer.status == 403 and list(answer.events[0]) == ["error"]


def test_the_own_page_is_not_refused(server: Server) -> None:
    headers = {"Host": f"localhost:{server.port}", "Origin": f"http://localhost:{server.port}"}
    asked = {"prompt": "a", "num_images": 1}
    assert server.ask("POST", "/api/draw", asked, headers | {"Sec-Fetch-Site": "same-origin"}).status == 200


@pytest.mark.parametrize(
    ("host", "own", "others"),
    [
        ("localhost:8000", True, True),
        ("127.0.0.1", True, True),
        ("[::1]:8000", True, True),
        ("192.168.0.7:8000", False, True),
        ("evil.example", False, False),
        ("[", False, False),
        ("", False, False),
    ],
)
def test_only_addresses_name_the_server(host: str, own: bool, others: bool) -> None:
    for open_to_others, expected in ((False, own), (True, others)):
        guard = Guard(lambda *_: None, page="", open_to_others=open_to_others)  # type: ignore[arg-type,return-value]
        assert (guard.refusal(Headers({"host": host}), method="GET") == "") == expected


def test_what_this_machine_alone_can_reach() -> None:
    hosts = ("localhost", "127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "192.168.0.7", "::", "example.org")
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 4


def test_settings_of_a_model_that_cannot_be_are_said_at_the_start() -> None:
    with pytest.raises(UserError, match="temperature -1 is outside"):
        build_app(None, sampling={"temperature": -1}, most_waiting=1)  # type: ignore[arg-type]


def test_every_answer_forbids_foreign_content(server: Server) -> None:
    for path in ("/", "/api/model", "/absent"):
        policy = server.ask("GET", path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_eight_at_once_are_all_answered(server: Server) -> None:
    answers: list[int] = []

    def draw() -> None:
        answers.append(server.ask("POST", "/api/draw", {"prompt": "a blue square", "num_images": 1}).status)

    threads = [threading.Thread(target=draw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 8


def test_a_full_line_is_503_and_who_leaves_makes_room(server: Server) -> None:
    body = json.dumps(LONG).encode()
    head = f"POST /api/draw HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    waiting = []
    refused: http.client.HTTPResponse | None = None
    for _ in range(MOST_WAITING + 1):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(head + body)
        waiting.append(connection)
    for _ in range(20):  # the line is full once the server has read all of them
        asking = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        asking.request("POST", "/api/draw", body)
        refused = asking.getresponse()
        if refused.status == 503:
            break
        asking.close()
    assert refused is not None and refused.status == 503 and refused.getheader("retry-after") == "2"
    assert b"too many requests wait" in refused.read()
    for connection in waiting:
        connection.close()
    for _ in range(300):  # the server looks a few times a second who is still there
        answer = server.ask("POST", "/api/draw", {"prompt": "a", "num_images": 1})
        if answer.status == 200:
            break
        time.sleep(0.1)
    assert answer.status == 200


def test_a_mistake_of_ours_is_told_without_its_traceback() -> None:
    app = build_app(None, sampling={}, most_waiting=1)  # type: ignore[arg-type]
    said: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": picture_bytes()}

    async def send(message: Any) -> None:
        said.append(message)

    scope = {"type": "http", "method": "POST", "path": "/api/look", "headers": [(b"host", b"127.0.0.1")]}
    with pytest.raises(AttributeError):  # from there it goes into the log
        asyncio.run(app(scope | {"query_string": b""}, receive, send))  # type: ignore[arg-type]
    assert said[0]["status"] == 500
    assert json.loads(said[1]["body"]) == {"error": "the server made a mistake; its own output says which"}


def test_a_port_in_use_and_a_strange_host_are_one_line(server: Server) -> None:
    with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1 port \d+ .*in use.*pass --port with another"):
        listen("127.0.0.1", server.port)
    with pytest.raises(UserError, match="pass --host with an address of this machine"):
        listen("203.0.113.9", 0)


def test_the_server_still_serves(server: Server) -> None:
    answer = server.ask("GET", "/api/model")
    assert answer.status == 200 and answer.events[0]["rows"] == SIDE and server.process.poll() is None
    assert answer.events[0]["sampling"]["temperature"] == 0.5
