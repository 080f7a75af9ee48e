"""The page in a real browser: it draws, sorts, sifts, links, needs no mouse and no network, and can be read by everybody."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]
WIDTHS = (1280, 768, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as program:
        # As root, as in a container, Chromium has no sandbox.
        opened = program.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def path(told: dict[str, Any], tmp_path: Path) -> Path:
    lamina.report(told.pop("source"), tmp_path / "report.html", **told)
    return tmp_path / "report.html"


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Any]:
    """Opens the page; what it says on the console, and what it asks the network for, must be nothing."""
    said: list[str] = []
    asked: list[str] = []
    contexts: list[Any] = []

    def open_it(width: int = 1280, scheme: str = "light") -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not said
    assert set(asked) == {path.as_uri()}


def names(page: Any) -> list[str]:
    shown: list[str] = page.locator("#table tbody tr:not([hidden]) th").all_inner_texts()
    return shown


@pytest.mark.parametrize("width", WIDTHS)
def test_what_was_got_is_on_the_first_screen_and_nothing_is_wider_than_it(opened: Any, width: int) -> None:
    page = opened(width)
    numbers = page.locator(".numbers").bounding_box()
    assert page.locator("h1").bounding_box()["y"] >= 0 and numbers["y"] + numbers["height"] <= 900
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_picture_is_drawn(opened: Any) -> None:
    page = opened()
    for plot in ("front-plot", "times-plot", "staircase-plot"):
        assert page.locator(f"#{plot} svg.main-svg").count() >= 1
        assert page.locator(f"#{plot} .trace").count() >= 2


def test_columns_sort_by_their_numbers_and_without_a_mouse(opened: Any) -> None:
    page = opened()
    button = page.get_by_role("button", name="parameters")
    button.focus()
    page.keyboard.press("Enter")
    column = page.locator("#table tbody tr td:nth-child(8)")
    by = [int(cell.get_attribute("data-by")) for cell in column.all()]
    assert by == sorted(by) and len(set(by)) > 1
    assert button.locator("..").get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    by = [int(cell.get_attribute("data-by")) for cell in column.all()]
    assert by == sorted(by, reverse=True)
    page.get_by_role("button", name="layer", exact=True).press("Enter")
    assert page.locator("#table th[aria-sort=ascending], #table th[aria-sort=descending]").count() == 1


def test_layers_are_sifted_by_words_and_by_state(opened: Any) -> None:
    page = opened()
    every = names(page)
    page.get_by_label("Show layers that contain").fill("body")
    assert names(page) == [name for name in every if "body" in name] != every
    assert page.locator("#shown").inner_text() == f"{len(names(page))} of {len(every)} layers"
    page.get_by_label("Show layers that contain").fill("")
    page.get_by_label("that are").select_option("decomposed")
    assert names(page) and all(
        row.get_attribute("data-state") == "decomposed" for row in page.locator("#table tbody tr:not([hidden])").all()
    )


def test_a_layers_link_leads_to_its_staircase(opened: Any) -> None:
    page = opened()
    link = page.locator("#table a[data-layer]").last
    name = link.inner_text()
    link.focus()
    page.keyboard.press("Enter")
    assert page.locator("#layer").input_value() == name
    assert page.url.endswith("#staircases")
    assert "chosen: " in page.locator("#staircase-plot .legend").text_content()


def test_in_the_dark_the_page_and_its_pictures_are_dark(opened: Any) -> None:
    def seen(scheme: str) -> tuple[str, str]:
        page = opened(scheme=scheme)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        text = page.evaluate("getComputedStyle(document.querySelector('#front-plot .xtick text')).fill")
        return ground, text

    light, dark = seen("light"), seen("dark")
    assert light[0] == "rgb(255, 255, 255)" and dark[0] == "rgb(13, 17, 23)"
    assert light[1] == "rgb(27, 31, 35)" and dark[1] == "rgb(230, 237, 243)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nobody_is_left_out_by_contrast_labels_or_structure(opened: Any, width: int, scheme: str) -> None:
    found = axe.Axe().run(opened(width, scheme)).response
    assert found["passes"]
    assert [(each["id"], each["help"]) for each in found["violations"]] == []


def test_on_paper_there_is_nothing_to_press(opened: Any) -> None:
    page = opened()
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible() and not page.locator("#filter").is_visible()
    assert page.locator("#table").is_visible()
    assert len(page.pdf()) > 10_000
