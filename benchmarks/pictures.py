"""The pictures of a report in the documentation, taken in a browser at three widths.

    python benchmarks/pictures.py

It wants the page that the demo ends with; Chromium is Debian's.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
SCREENS = ((1280, 1500, "light"), (768, 1100, "light"), (390, 844, "dark"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("page", nargs="?", type=Path, default=ROOT / "examples" / "demo" / "out" / "report.html")
    page_of = parser.parse_args().page.resolve()
    with sync_playwright() as program:
        browser = program.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        for width, height, scheme in SCREENS:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(page_of.as_uri())
            page.screenshot(path=ROOT / "docs" / "images" / f"report-{width}.png")
        browser.close()


if __name__ == "__main__":
    main()
