"""The page in a real Chromium; skipped where there is none. Nothing but the server is contacted."""

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.um3.web.conftest import SIDE, Server
from um3.inference.image_io import read_metadata

playwright = pytest.importorskip("playwright.sync_api")
Browser, Page, expect = playwright.Browser, playwright.Page, playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
PATIENCE_MS = 30_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page, opened; whatever it asks for beside its server and whatever goes wrong in it fails the test."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    foreign: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: foreign.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#facts")).to_contain_text("32 x 32 pixels from 64 codes of 28 bits")
    page.get_by_text("More settings").click()
    yield page
    page.close()
    assert [url for url in foreign if not url.startswith((server.url, "data:", "blob:"))] == []
    assert errors == []


def draw(page: Page, prompt: str, **fields: str) -> None:
    for name, value in fields.items():
        page.locator(f"[name={name}]").fill(value)
    page.locator("[name=prompt]").fill(prompt)
    page.locator("[name=prompt]").press("Enter")


def test_a_picture_appears_row_by_row_and_can_be_downloaded(page: Page, tmp_path: Path) -> None:
    # What the page shows is watched from inside it, so that no row is missed.
    page.evaluate(
        "() => { window.seen = []; new MutationObserver((found) => found.forEach(({target}) => "
        "{ if (target.tagName === 'IMG') window.seen.push(target.src); }))"
        ".observe(document.getElementById('runs'), {subtree: true, childList: true, attributes: true}); }"
    )
    draw(page, "a red disk", num_images="1", seed="5")
    run = page.locator("#runs article[aria-busy=false]")
    expect(run.locator("figcaption")).to_contain_text("seed 5")
    assert page.evaluate("() => window.seen.length") >= SIDE - 1
    with page.expect_download() as download:
        run.get_by_role("link", name="Download").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.name == "um3-seed-5.png"
    about = read_metadata(path)
    assert about["prompt"] == "a red disk" and about["seed"] == 5 and about["temperature"] == 0.5


def test_guidance_scales_stand_side_by_side_with_equal_seeds(page: Page) -> None:
    draw(page, "a blue square", num_images="2", seed="3", compare="1, 4")
    run = page.locator("#runs article[aria-busy=false]")
    expect(run.locator("figcaption")).to_have_count(4)
    assert run.locator(".scale b").all_inner_texts() == ["1", "4"]
    assert [text.split()[1] for text in run.locator("figcaption span").all_inner_texts()] == ["3", "4", "3", "4"]


def test_history_outlives_the_page_and_brings_settings_back(page: Page) -> None:
    draw(page, "ثلاث نجوم 🦊", num_images="1", seed="11", temperature="0.25")
    first = page.locator("#runs article[aria-busy=false] img").get_attribute("src")
    page.reload()
    entry = page.locator("#history button").first
    expect(entry).to_contain_text("seed 11")
    entry.click()
    assert page.locator("[name=prompt]").input_value() == "ثلاث نجوم 🦊"
    assert page.locator("[name=temperature]").input_value() == "0.25"
    page.locator("button.primary").click()
    again = page.locator("#runs article[aria-busy=false] img")
    assert again.get_attribute("src") == first
    page.locator("#forget").click()
    expect(page.locator("#history button")).to_have_count(0)


def test_a_picture_is_described_and_reconstructed(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "holiday.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    page.locator("#tab-draw").press("ArrowRight")
    page.locator("#file").set_input_files(path)
    found = page.locator("#looks article[aria-busy=false]")
    expect(found.locator("figure img")).to_have_count(3)
    assert "holiday.png · 40 x 30 pixels" in found.inner_text()
    caption = found.locator(".words").inner_text()
    assert found.locator("pre").text_content().count(" ") == SIDE**2 - 1  # type: ignore[union-attr]
    found.get_by_role("button", name="Draw this caption").click()
    expect(page.locator("#draw")).to_be_visible()
    assert page.locator("[name=prompt]").input_value().split() == caption.split()


def test_a_dropped_file_is_looked_at(page: Page) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format="PNG")
    transfer = page.evaluate_handle(
        "(bytes) => { const transfer = new DataTransfer(); "
        "transfer.items.add(new File([new Uint8Array(bytes)], 'dropped.png')); return transfer; }",
        list(buffer.getvalue()),
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#looks article[aria-busy=false]")).to_contain_text("dropped.png · 8 x 8 pixels")


def test_bad_files_and_settings_are_a_sentence_and_the_page_goes_on(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    big = tmp_path / "big.png"
    big.write_bytes(bytes(21 * 2**20))
    page.locator("#tab-look").click()
    page.locator("#file").set_input_files(path)
    expect(page.locator("#look-error")).to_contain_text("Not an image: the content is none of PNG")
    page.locator("#file").set_input_files(big)
    expect(page.locator("#look-error")).to_contain_text("big.png has 21 MiB; at most 20 are taken.")
    expect(page.locator("#looks article")).to_have_count(0)
    page.locator("#tab-draw").click()
    for fields, sentence in (
        ({"prompt": ""}, "Prompt 1 is empty; say what to draw."),
        (
            {"prompt": "a", "temperature": "-3"},
            "Temperature -3 is outside [0, inf); 0 takes the likeliest.",
        ),
        ({"prompt": "a", "temperature": "hot"}, "Temperature is 'hot', no number that can be used."),
        ({"prompt": "red " * 10_000, "temperature": ""}, "leaves no room for 256 more"),
        ({"prompt": "a", "num_images": "10000000000"}, "use 1 to 16."),
    ):
        draw(page, **fields)  # type: ignore[arg-type]
        expect(page.locator("#draw-error")).to_contain_text(sentence)
    draw(page, "a", num_images="1")
    expect(page.locator("#runs article[aria-busy=false] figcaption")).to_contain_text("seed")
    assert page.locator("#draw-error").inner_text() == ""


def test_a_cancelled_drawing_stops_and_the_next_is_drawn(page: Page) -> None:
    draw(page, "a red square", num_images="16", guidance_scale="3")
    expect(page.locator("#runs article")).to_contain_text("drawing, row")
    page.keyboard.press("Escape")
    expect(page.locator("#runs article")).to_contain_text("cancelled")
    assert page.locator("#runs a").count() == 0
    draw(page, "a green disk", num_images="1")
    expect(page.locator("#runs article").first.locator("figcaption")).to_contain_text("seed")


def test_eight_requests_at_once_are_all_drawn(page: Page) -> None:
    for seed in range(8):
        draw(page, f"picture {seed}", num_images="1", seed=str(seed))
    done = page.locator("#runs article[aria-busy=false]")
    expect(done).to_have_count(8)
    seeds = [re.search(r"seed (\d)", text) for text in done.locator("figcaption").all_inner_texts()]
    assert [found and found[1] for found in seeds] == [str(seed) for seed in reversed(range(8))]


def test_nothing_a_model_or_a_file_name_says_becomes_markup(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "<img src=x onerror=document.title=1>.png"
    Image.new("RGB", (8, 8)).save(path)
    page.locator("#tab-look").click()
    page.locator("#file").set_input_files(path)
    expect(page.locator("#looks article[aria-busy=false]")).to_contain_text("<img src=x onerror")
    assert page.title() == "UM3"
