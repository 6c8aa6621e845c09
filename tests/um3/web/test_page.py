"""The page in a real Chromium; skipped without one. The page contacts nothing but its server."""

import io
import re
import shutil

import pytest
from PIL import Image

from tests.um3.web.conftest import SIDE, opened, serving
from um3.inference.image_io import image_metadata, read_metadata
from um3.web.model_calls import EXAMPLES

playwright = pytest.importorskip("playwright.sync_api")
Browser, Locator, Page, expect = playwright.Browser, playwright.Locator, playwright.Page, playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
TIMEOUT_MS = 30_000

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"), pytest.mark.slow]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The opened page. A request to another server and an uncaught error in the page fail the test."""
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    expect.set_options(timeout=TIMEOUT_MS)
    urls = []
    errors = []
    page.on("request", lambda request: urls.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#facts")).to_contain_text(f"32 x 32 pixels from {SIDE**2} codes of 28 bits")
    page.get_by_text("More settings").click()
    yield page
    page.close()
    assert [url for url in urls if not url.startswith((server.url, "data:", "blob:"))] == []
    assert errors == []


def generate(page, prompt, **fields):
    """Fill the form and send it; returns the finished runs, of which there may be none yet."""
    for name, value in fields.items():
        page.locator(f"[name={name}]").fill(value)
    page.locator("[name=prompt]").fill(prompt)
    page.locator("[name=prompt]").press("Enter")
    return page.locator("#runs article[aria-busy=false]")


def upload(page, path):
    page.locator("#tab-caption").click()
    page.locator("#file").set_input_files(path)
    return page.locator("#captions article[aria-busy=false]")


def test_an_image_appears_row_by_row_and_can_be_downloaded(page, tmp_path):
    # An observer inside the page sees every row.
    page.evaluate(
        "() => { window.urls = []; new MutationObserver((changes) => changes.forEach(({target}) => "
        "{ if (target.tagName === 'IMG') window.urls.push(target.src); }))"
        ".observe(document.getElementById('runs'), {subtree: true, childList: true, attributes: true}); }"
    )
    run = generate(page, "a red disk", num_images="1", seed="5")
    expect(run.locator("figcaption")).to_contain_text("seed 5")
    assert page.evaluate("() => window.urls.length") >= SIDE - 1
    with page.expect_download() as download:
        run.get_by_role("link", name="Download").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    metadata = read_metadata(path)
    assert path.name == "um3-seed-5.png" and metadata["prompt"] == "a red disk"
    assert metadata["seed"] == 5 and metadata["temperature"] == 0.5


def test_guidance_scales_stand_side_by_side_with_equal_seeds(page):
    run = generate(page, "a blue square", num_images="2", seed="3", compare="1, 4")
    expect(run.locator("figcaption")).to_have_count(4)
    assert run.locator(".scale b").all_inner_texts() == ["1", "4"]
    assert [text.split()[1] for text in run.locator("figcaption span").all_inner_texts()] == ["3", "4", "3", "4"]


def test_the_history_survives_a_reload_and_restores_settings(page):
    run = generate(page, "ثلاث نجوم 🦊", num_images="1", seed="11", temperature="0.25")
    first = run.locator("img").get_attribute("src")
    page.reload()
    entry = page.locator("#history .entry").first
    expect(entry).to_contain_text("seed 11")
    entry.click()
    assert page.locator("[name=prompt]").input_value() == "ثلاث نجوم 🦊"
    assert page.locator("[name=temperature]").input_value() == "0.25"
    page.locator("#form button.primary").click()
    assert run.locator("img").get_attribute("src") == first
    page.locator("#clear-history").click()
    expect(page.locator("#history button")).to_have_count(0)


def test_an_image_is_captioned_and_reconstructed(page, photo):
    page.locator("#tab-generate").press("ArrowRight")
    expect(page.locator("#caption")).to_be_visible()
    result = upload(page, photo)
    expect(result.locator("figure img")).to_have_count(3)
    result.get_by_role("button", name="Reconstruction").click()
    expect(page.locator("#repaint")).to_be_visible()
    page.locator("#viewer-close").click()
    assert f"{photo.name} · 40 x 30 pixels" in result.inner_text()
    caption = result.locator(".title").inner_text()
    assert (result.locator("pre").text_content() or "").count(" ") == SIDE**2 - 1
    result.get_by_role("button", name="Generate from this caption").click()
    expect(page.locator("#generate")).to_be_visible()
    assert page.locator("[name=prompt]").input_value().split() == caption.split()


def test_a_dropped_file_is_captioned_and_its_name_never_becomes_markup(page):
    name = "<img src=x onerror=document.title=1>.png"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format="PNG")
    transfer = page.evaluate_handle(
        "([bytes, name]) => { const transfer = new DataTransfer(); "
        "transfer.items.add(new File([new Uint8Array(bytes)], name)); return transfer; }",
        [list(buffer.getvalue()), name],
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#captions article[aria-busy=false]")).to_contain_text(f"{name} · 8 x 8 pixels")
    assert page.title() == "UM3"


def test_bad_files_and_settings_show_a_sentence_and_the_page_still_works(page, tmp_path):
    text, big = tmp_path / "notes.png", tmp_path / "big.png"
    text.write_text("not an image")
    big.write_bytes(bytes(21 * 2**20))
    upload(page, text)
    expect(page.locator("#caption-error")).to_contain_text("Not an image: ")
    upload(page, big)
    expect(page.locator("#caption-error")).to_contain_text("big.png has 21 MiB; the limit is 20 MiB.")
    expect(page.locator("#captions article")).to_have_count(0)
    page.locator("#tab-generate").click()
    for prompt, fields, name, sentence in (
        ("", {}, "prompt", "The prompt is empty"),
        ("a", {"temperature": "-3"}, "temperature", "Temperature -3 is outside"),
        ("a", {"temperature": "hot"}, "temperature", "Temperature is 'hot'"),
        ("red " * 10_000, {"temperature": ""}, "prompt", "tokens"),
        ("a", {"top_k": "1.5"}, "top_k", "Top-k is '1.5'"),
        ("a", {"top_k": "", "compare": "1, much"}, "compare", "Guidance is 'much'"),
        ("a", {"compare": "", "num_images": "10000000000"}, "num_images", "Images is 10000000000; use 1 to 16."),
    ):
        generate(page, prompt, **fields)
        field = page.locator(f"[name={name}][aria-invalid=true]")
        expect(field).to_be_focused()
        expect(field).to_have_accessible_description(re.compile(sentence))
        expect(page.locator("#form .bad:not(:empty)")).to_have_count(1)
    expect(generate(page, "a", num_images="1").locator("figcaption")).to_contain_text("seed")
    expect(page.locator("#form .bad:not(:empty)")).to_have_count(0)
    expect(page.locator("[aria-invalid]")).to_have_count(0)


def test_a_cancelled_run_stops_and_the_next_one_works(page):
    generate(page, "a red square", num_images="16", guidance_scale="3")
    expect(page.locator("#runs article")).to_contain_text("row ")
    page.keyboard.press("Escape")
    expect(page.locator("#runs article")).to_contain_text("cancelled")
    assert page.locator("#runs a").count() == 0
    generate(page, "a green disk", num_images="1")
    expect(page.locator("#runs article").first.locator("figcaption")).to_contain_text("seed")


def test_a_cancelled_comparison_leaves_no_empty_frame(page):
    generate(page, "a red square", num_images="8", compare="1, 2, 3, 4")
    run = page.locator("#runs article")
    expect(run).to_contain_text("row ")
    page.keyboard.press("Escape")
    expect(run).to_contain_text("cancelled")
    frames, images = run.locator(".frame").count(), run.locator(".frame img").count()
    assert frames == images < 32 and run.locator(".scale").count() == run.locator(".images").count() < 4


def test_one_click_fills_in_an_example(page):
    example = page.locator("#examples button").first
    text = example.inner_text()
    assert text in EXAMPLES  # the model's folder names none
    example.click()
    expect(page.locator("[name=prompt]")).to_have_value(text)
    expect(page.locator("[name=prompt]")).to_be_focused()


def test_an_entry_of_the_history_can_be_removed(page):
    for seed in ("1", "2", "3"):
        expect(generate(page, "a red disk", num_images="1", seed=seed)).to_have_count(int(seed))
        expect(page.locator("#history li")).to_have_count(int(seed))
    page.get_by_role("button", name="Remove a red disk, seed 2").click()
    entries = page.locator("#history li")
    expect(entries).to_have_count(2)
    expect(entries.nth(1).locator(".remove")).to_be_focused()
    page.reload()
    expect(entries).to_have_count(2)
    assert [text.split("\n")[1] for text in page.locator("#history .entry").all_inner_texts()] == ["seed 3", "seed 1"]


def test_an_image_is_enlarged_with_the_keyboard_and_esc_closes_it(page):
    run = generate(page, "a red disk", num_images="1", seed="5")
    image = run.locator("button.frame")
    image.press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    small, large = (page.locator(each).bounding_box() for each in ("#runs button.frame", "#viewer-image"))
    assert large["width"] > 1.5 * small["width"]
    assert page.locator("#viewer-pixels").get_attribute("src") == run.locator("img").get_attribute("src")
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(image).to_be_focused()


def test_a_dragged_region_is_repainted_and_the_rest_kept(page):
    run = generate(page, "a red disk", num_images="1", seed="5")
    run.locator("button.frame").click()
    expect(page.locator("#repaint-button")).to_be_disabled()
    box = page.locator("#viewer-image").bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.1 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.4 * box["height"], steps=3)
    page.mouse.up()
    expect(page.locator("#selection-text")).to_have_text(f"Selected: columns 3 to {SIDE}, rows 1 to 2 of {SIDE}.")
    page.locator("#viewer-image").press("ArrowDown")
    page.keyboard.press("Shift+ArrowLeft")
    expect(page.locator("#selection-text")).to_have_text(f"Selected: columns 3 to 3, rows 2 to 3 of {SIDE}.")
    page.locator("[name=repaint_prompt]").fill(" ")
    page.locator("#repaint-button").click()
    expect(page.locator("#generate-error")).to_have_text("The prompt is empty; describe the image.")
    run.locator("button.frame").click()
    page.locator("#viewer-image").focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown", "Shift+ArrowDown"):
        page.keyboard.press(key)
    page.locator("[name=repaint_prompt]").fill("a blue disk")
    with page.expect_request("**/api/generate") as sent:
        page.locator("#repaint-button").click()
    request = sent.value.post_data_json
    assert request["redraw"] == [0.5, 0.25, 0.75, 0.75] and request["prompt"] == "a blue disk"
    repainted = page.locator("#runs article[aria-busy=false]").first
    expect(repainted).to_contain_text("repainted · seed")
    expect(repainted.locator("figcaption")).to_have_count(4)
    metadata = metadata_of(repainted)
    places = [row * SIDE + 2 for row in (1, 2)]
    assert all(values["redrawn_patches"] == places for values in metadata)
    kept = [place for place in range(SIDE**2) if place not in places]
    assert all(values["codes"][place] == request["codes"][place] for values in metadata for place in kept)


def metadata_of(run):
    """The metadata of each image of a finished run."""
    urls = run.locator("img").evaluate_all("(all) => all.map((one) => one.src)")
    return [image_metadata(opened(url)) for url in urls]


def test_one_click_generates_variations(page):
    run = generate(page, "a red disk", num_images="1", seed="5")
    run.get_by_role("button", name="Vary").click()
    variations = page.locator("#runs article[aria-busy=false]").first
    expect(variations).to_contain_text("variations of seed 5")
    metadata = metadata_of(variations)
    assert len({values["seed"] for values in metadata}) == 4
    assert {(values["prompt"], values["strength"]) for values in metadata} == {("a red disk", 0.5)}
    expect(page.locator("#history li")).to_have_count(1)


def test_a_page_with_a_token_works_after_its_address_was_opened(browser, web_model, tmp_path):
    with serving(web_model, tmp_path, "--allow-host", "um3.localhost") as server:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(f"http://um3.localhost:{server.port}/?token={server.token}")
        assert page.url == f"http://um3.localhost:{server.port}/"
        expect(generate(page, "a red disk", num_images="1").locator("figcaption")).to_contain_text("seed")
        page.close()


def ask(page, question):
    page.locator("[name=question]").fill(question)
    page.locator("[name=question]").press("Enter")


def test_questions_about_an_image_and_the_history(page, photo, web_pipeline):
    page.locator("#tab-caption").press("ArrowRight")
    expect(page.locator("#chat-note")).to_contain_text("not trained on conversations")
    page.locator("#chat-file").set_input_files(photo)
    expect(page.locator("#chat-image img")).to_have_count(1)
    messages, said = [], []
    for question in ("What is it?", "Why?"):
        image = [] if messages else [{"type": "image", "image": Image.open(photo)}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        answer = web_pipeline.chat(messages, seeds=[0])[0]
        messages.append({"role": "assistant", "content": answer})
        ask(page, question)
        said += [question, answer or "(no answer)"]
        expect(page.locator("[name=question]")).to_have_value("")
        assert page.locator("#thread li").evaluate_all("(items) => items.map((item) => item.textContent)") == said
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#thread li")).to_have_count(0)
    expect(page.locator("#chat-image img")).to_have_count(0)


def test_an_error_stands_at_its_field_and_the_conversation_goes_on(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    page.locator("#tab-chat").click()
    page.locator("#chat-file").set_input_files(tmp_path / "broken.png")
    expect(page.locator("#image-error")).to_contain_text("Not an image")
    for question, message in ((" ", "has no text; ask a question"), ("why " * 300, "leaves no room")):
        ask(page, question)
        expect(page.locator("#ask-error")).to_contain_text(message)
        expect(page.locator("#thread li")).to_have_count(0)
        assert page.locator("[name=question]").input_value() == question
    ask(page, "<b>Why?</b>")
    expect(page.locator("[name=question]")).to_have_value("")
    assert page.locator("#thread li").first.inner_text() == "<b>Why?</b>" and page.locator("#thread b").count() == 0
    expect(page.locator("#ask-error")).to_be_empty()


def test_a_generated_image_can_be_asked_about(page):
    run = generate(page, "a red disk", num_images="1", seed="5")
    run.get_by_role("button", name="Ask").click()
    expect(page.locator("#chat-image img")).to_have_count(1)
    expect(page.locator("#chat")).to_be_visible()
