"""How soon the page in the browser gives a sign of life: from a click to the first words, from opening it to its first action.

    python -m benchmarks.page        # needs Chromium, Playwright and the extra ui

Wall seconds in Debian's Chromium at 1280 pixels, the median and the slowest of ``--repeats``. Predicting ends when the adapter is kept;
the first prediction also loads the generator.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._harness import write_result
from smidgen.tasks.drawing import draw_subject
from tests.serving.browser import Visit, browsing, served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], object]) -> None:
        started = time.perf_counter()
        run()
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as folder, browsing() as browser:
        draw_subject(Path(folder) / "ann", 7, 6)
        pictures = sorted((Path(folder) / "ann").glob("*.png"))
        with served(Path(folder) / "runs") as url:
            at = Visit(browser, url, 1280)
            for number in range(repeats):
                timed("open the page", lambda: _opened(at))
                at.page.wait_for_timeout(1500)
                timed("refuse without pictures", lambda: (at.click("Train"), at.says("Drop pictures first")))
                timed("judge six pictures", lambda: (at.drop("sm-files", *pictures), at.says("6 pictures, ready")))
                at.fill("Name", f"Ann {number}")
                timed("predict: first words", lambda: (at.click("Predict in a second"), at.says("Reading the face")))
                first = "predict, with loading the generator" if number == 0 else "predict: adapter kept"
                timed(first, lambda: at.says("was predicted in"))
                at.page.locator(".sm-gallery img").first.wait_for(timeout=300_000)
                at.page.wait_for_timeout(15_000)  # its scenes are drawn
            at.close()
    figures: dict[str, float] = {"load of the machine": round(os.getloadavg()[0], 1)}
    for name, values in seconds.items():
        figures |= {
            f"{name}, median s": round(statistics.median(values), 2),
            f"{name}, slowest s": round(max(values), 2),
        }
    for name, value in figures.items():
        print(f"{name}: {value}")
    print(write_result("page", figures, "python -m benchmarks.page"))


def _opened(at: Visit) -> None:
    at.page.goto(at.url)
    at.page.get_by_role("button", name="Predict in a second").wait_for()


if __name__ == "__main__":
    main()
