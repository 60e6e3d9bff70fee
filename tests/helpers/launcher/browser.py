"""Chromium, driven by its own driver, for tests of the page."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PATIENCE = 120.0  # seconds: other tests may take the processors


def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    from selenium.webdriver.chrome.service import Service

    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


class Page:
    """The page of a server in a browser, as a person uses it.

    Args:
        browser: of `chromium`.
        url: of the server.
    """

    def __init__(self, browser: Any, url: str) -> None:
        self.browser, self.url = browser, url
        browser.get(f"{url}/health")  # the page's own storage can be cleared from any address of the server
        browser.execute_script("sessionStorage.clear()")
        browser.get_log("browser")
        browser.get(url)

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        """The first element, once it is there."""
        return self.until(lambda: (self.all(selector) or [None])[0], selector)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.browser.execute_script(code, *arguments)

    def until(self, condition: Callable[[], Any], what: str = "") -> Any:
        """Wait until something holds, and return it; elements may be replaced meanwhile."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except StaleElementReferenceException:
                pass
            time.sleep(0.03)
        raise AssertionError(f"not seen: {what}\n{self.js('return document.body.innerText')}\n{self.complaints()}")

    def says(self, selector: str, text: str) -> None:
        """Wait until an element holds a text."""
        self.until(lambda: any(text in element.text for element in self.all(selector)), f"{text!r} at {selector}")

    def fill(self, **settings: Any) -> None:
        for name, value in settings.items():
            field = self.one(f"[name='{name}']")
            field.clear()
            field.send_keys(str(value))

    def generate(self, prompt: str, **settings: Any) -> str:
        """Fill in the form and start; returns the selector of the new tile."""
        self.until(lambda: self.one("#generate").is_enabled(), "the form")
        before = {tile.get_attribute("data-id") for tile in self.all(".tile")}
        self.fill(prompt=prompt, **settings)
        self.one("#generate").click()

        def newest() -> str | None:
            ids = [tile.get_attribute("data-id") for tile in self.all(".tile")]
            return next((id for id in ids if id not in before), None)

        return f".tile[data-id='{self.until(newest, 'a new tile')}']"

    def complaints(self) -> list[str]:
        """What the browser has complained about, other than answers of the server that are errors."""
        return [line["message"] for line in self.browser.get_log("browser") if line["source"] != "network"]

    def emulate(self, scheme: str = "light", width: int | None = None) -> None:
        """Another colour scheme, and the width of a phone."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        if width is None:
            self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        else:
            screen = {"width": width, "height": 740, "deviceScaleFactor": 2, "mobile": True}
            self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
