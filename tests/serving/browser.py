"""A browser at the page: Debian's Chromium through Playwright, with everything it must not do written down."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
SHOTS = os.environ.get("SMIDGEN_SCREENSHOTS", "")  # a folder to keep pictures of the page in
WIDTHS = (1280, 390)
QUIET = 4000  # milliseconds within which the page has to say something; generous, as machines are busy


def needed():
    """Skips where there is no browser to look with."""
    for name in ("gradio", "playwright", "axe_playwright_python"):
        pytest.importorskip(name, reason=f"the page's browser tests need {name}: pip install 'smidgen[ui,browser]'")
    if not CHROMIUM:
        pytest.skip("the page's browser tests need Chromium: apt-get install chromium")


@contextmanager
def served(folder):
    """``smidgen ui`` over a folder of runs; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (folder.parent / "server.log").open("w+")
    words = [sys.executable, "-m", "smidgen.cli", "ui", "--folder", str(folder), "--port", str(port)]
    server = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, (folder.parent / "server.log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(180)
        log.close()


@contextmanager
def browsing():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One tab of the browser at the page, and what it did besides."""

    def __init__(self, browser, url, width):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, accept_downloads=True)
        self.url, self.width = url, width
        self.errors, self.elsewhere = [], []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda asked: self._note(asked.url))
        self.open()

    def _note(self, url):
        if not url.startswith((self.url, "data:", "blob:")):
            self.elsewhere.append(url)

    def open(self):
        self.page.goto(self.url)
        self.page.get_by_role("button", name="Predict in a second").wait_for()
        self.page.wait_for_timeout(1500)

    def tab(self, name):
        self.page.get_by_role("tab", name=name).click()
        self.page.wait_for_timeout(1500)

    def click(self, name):
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").click()

    def unfold(self, name):
        """Open what is folded away."""
        self.page.get_by_role("button", name=name).locator("visible=true").click()

    def says(self, words, timeout=60_000):
        """The page shows these words."""
        self.page.get_by_text(words).locator("visible=true").first.wait_for(timeout=timeout)

    def fill(self, label, value):
        self.page.get_by_label(label, exact=True).locator("visible=true").first.fill(value)

    def drop(self, where, *paths):
        self.page.locator(f"#{where} input[type=file]").set_input_files([str(path) for path in paths])

    def shot(self, name):
        if SHOTS:
            self.page.screenshot(path=str(Path(SHOTS) / f"{name}-{self.width}.png"), full_page=True)

    def accessible(self):
        """What axe finds serious or critical."""
        import axe_playwright_python

        self.page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text())
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        return [
            f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found if one["impact"] in ("serious", "critical")
        ]

    def wide(self):
        """Pixels that the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    def close(self):
        self.page.close()
        assert not self.errors, self.errors
        assert not self.elsewhere, self.elsewhere
