"""The page in a browser: what a person does with it, from the prompt to the gallery."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from helpers.launcher.browser import Page, chromium
from helpers.launcher.served import KEYS, Served

LONG = 1000  # steps of a job that lasts until it is cancelled
MOST = 2000  # steps that the server allows

browser = pytest.fixture(scope="module")(chromium)


@pytest.fixture
def page(browser, server):
    page = Page(browser, server.url)
    yield page
    assert page.complaints() == []
    asked = page.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert asked and all(url.startswith((server.url, "blob:", "data:")) for url in asked)


@pytest.fixture
def no_jobs(http):
    """The jobs that a test leaves behind are cancelled."""
    yield
    for status in ("queued", "running"):
        for job in http.get("/v1/jobs", params={"status": status}).json()["data"]:
            http.delete(f"/v1/jobs/{job['id']}")


# Collects the previews that were ever shown, however short.
COLLECT = """
window.previews = new Set();
const look = () => document.querySelectorAll("img.preview").forEach((image) => window.previews.add(image.src));
new MutationObserver(look).observe(document.getElementById("gallery"), { subtree: true, childList: true });
"""


def test_generate_watch_and_see(page):
    page.one("#prompt")
    page.js(COLLECT)
    tile = page.generate("a red fox", steps=20, seed=7, images=2)
    page.until(lambda: len(page.all(f"{tile}[data-status=done] img.result")) == 2, "both pictures")
    assert len(page.js("return [...window.previews]")) > 4
    assert page.js(f'return document.querySelector("{tile} img.result").naturalWidth') == 32
    status = page.one(f"{tile} .status").text
    assert "32 × 32" in status and "20 steps" in status and "seed 7" in status
    assert "steps" in page.one(f"{tile} .times").get_attribute("aria-label")
    assert page.js("return document.getElementById('news').textContent") == "a red fox is finished"


def test_several_at_once_reload_and_cancel(page, no_jobs):
    page.one("#more summary").click()
    first = page.generate("a long one", steps=LONG, previews=20)
    second = page.generate("one behind it", steps=3)
    page.says(f"{second} .status", "next in the queue")
    page.one(f"{first}[data-status=running] img.preview")
    page.browser.refresh()
    page.one(f"{first}[data-status=running] img.preview")  # the previews of before are told again
    page.says(f"{first} .status", f"of {LONG}")
    page.says(f"{second} .status", "next in the queue")
    assert page.js("return document.title").startswith("(2)")
    assert page.one("#prompt").get_attribute("value") == "one behind it"  # what was written stays
    page.one(f"{first} .cancel").click()
    page.one(f"{first}[data-status=cancelled]")
    page.says(f"{first} .status", "cancelled")
    page.one(f"{second}[data-status=done] img.result")
    page.until(lambda: not page.js("return document.title").startswith("("), "no active job")


def test_the_gallery_and_again_with_the_keyboard(page, http):
    from selenium.webdriver.common.keys import Keys

    words = {"prompt": "a blue fox", "steps": 4, "seed": [5, 9], "negative": "grey", "width": 16, "format": "webp"}
    id = http.post("/v1/jobs", json=words).json()["id"]
    page.browser.refresh()
    tile = f".tile[data-id='{id}']"
    page.one(f"{tile}[data-status=done] img.result")
    page.one(f"{tile} .media").send_keys(Keys.ENTER)
    page.says("#details h2", "a blue fox")
    page.until(lambda: len(page.all("#details img.result")) == 2, "both in large")
    text = page.one("#details").text
    for part in ("steps", "decoding", "Negative prompt", "grey", "5, 9", "webp"):
        assert part in text
    page.one("#details").send_keys(Keys.ESCAPE)
    page.until(lambda: not page.all("#details[open]"), "closed details")
    page.one(f"{tile} .again").send_keys(Keys.ENTER)
    page.until(lambda: page.one("#prompt").get_attribute("value") == "a blue fox", "the prompt")
    values = {
        name: page.one(f"[name='{name}']").get_attribute("value") for name in ("seed", "steps", "width", "format")
    }
    assert values == {"seed": "5, 9", "steps": "4", "width": "16", "format": "webp"}
    assert page.js("return document.activeElement.id") == "prompt"
    page.one("#prompt").send_keys(Keys.ESCAPE, Keys.ENTER)
    page.until(lambda: len([one for one in page.all(".tile .prompt") if one.text == "a blue fox"]) == 2, "another one")
    page.one(f"{tile} .remove").click()
    page.says(f"{tile} .remove", "Really")
    page.one(f"{tile} .remove").click()
    page.until(lambda: not page.all(tile), "a gallery without it")
    assert http.get(f"/v1/jobs/{id}").status_code == 404


def test_what_is_wrong_is_said_where_it_is(page):
    page.until(lambda: page.one("#generate").is_enabled(), "the form")
    many = len(page.all(".tile"))
    page.fill(prompt="a fox", width=17)
    page.one("#generate").click()
    page.says("#set-width-error", "width=17 is not a multiple of")
    assert page.one("#set-width").get_attribute("aria-invalid") == "true"
    page.fill(width=32, steps=MOST + 1)
    page.one("#generate").click()
    page.says("#set-steps-error", f"give {MOST} or less")
    assert not page.one("#set-width-error").is_displayed()
    page.fill(steps=3, seed="seven")
    page.one("#generate").click()
    page.says("#set-seed-error", "whole number")
    page.fill(prompt="  ", seed="")
    page.one("#generate").click()
    page.says("#prompt-error", "there is no prompt")
    assert len(page.all(".tile")) == many


def test_markup_is_text(page):
    prompt = '<img src=x onerror="window.broken = 1"><b>fox</b>'
    tile = page.generate(prompt, steps=2)
    page.one(f"{tile}[data-status=done] img.result")
    assert page.one(f"{tile} .prompt").text == prompt
    page.one(f"{tile} .media").click()
    page.says("#details h2", prompt)
    assert page.all(".prompt b, h2 b") == [] and page.all("[src='x']") == [] and page.js("return window.broken") is None


def test_loras_have_a_field_each(page):
    page.one("#more > summary").click()
    tile = page.generate("a fox in ink", steps=2, **{"lora.ink": 3})
    page.one(f"{tile}[data-status=done] .media").click()
    page.says("#details dl", "ink")
    assert "wash" not in page.one("#details dl").text
    page.one("#details .again").click()
    page.until(lambda: page.one("#set-lora-ink").get_attribute("value") == "3", "the scale")
    page.fill(**{"lora.ink": 0})


def test_the_plan_is_drawn(page):
    page.says("#plan", "one process")
    assert page.one("#plan tbody th").text == "0" and page.one("#plan svg .mine")


def test_on_a_phone_and_in_the_dark(page):
    grounds, shots = [], []
    try:
        for scheme, width in (("light", None), ("dark", None), ("dark", 360), ("light", 360)):
            page.emulate(scheme, width)
            page.until(lambda: page.one("#generate").is_enabled(), "the form")
            grounds.append(page.js("return getComputedStyle(document.body).backgroundColor"))
            shots.append(Image.open(io.BytesIO(page.browser.get_screenshot_as_png())).convert("L"))
        assert not page.one("#settings [name=steps]").is_displayed()  # folded, so that the pictures are near
        page.js("document.querySelectorAll('details').forEach((part) => (part.open = true))")
        assert page.js("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
        bright = [sum(shot.resize((1, 1)).getdata()) for shot in shots]
        assert grounds[0] == grounds[3] != grounds[1] == grounds[2] and bright[0] > 2 * bright[1]
    finally:
        page.emulate()


def test_a_key_is_asked_for(browser, words, tmp_path):
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "keys").write_text(KEYS[0])
    served = Served(tmp_path / "work", *words, "--keys", str(tmp_path / "keys"), key=KEYS[0])
    try:
        page = Page(browser, served.url)
        field = page.until(lambda: page.one("#key-dialog[open] #key"), "the question")
        field.send_keys(Keys.ESCAPE)
        page.one("#key-dialog[open]")
        field.send_keys("a-wrong-key-of-the-tests", Keys.ENTER)
        page.says("#key-error", "this key is not known")
        page.one("#key").send_keys(KEYS[0], Keys.ENTER)
        page.until(lambda: page.one("#generate").is_enabled(), "the form")
        tile = page.generate("a red fox")
        page.browser.refresh()
        page.one(tile)  # this tab knows the key
        assert not page.all("#key-dialog[open]")
        served.process.kill()
        page.says("#banner", "does not answer")
        assert page.one("#state").get_attribute("data-state") == "away"
    finally:
        served.close()
