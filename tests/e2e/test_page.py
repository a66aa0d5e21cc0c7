"""The page of `confide serve` in a real browser: what a person types, sends and sees."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from tests.conftest import LABELS, World
from tests.e2e.service import CLAIM, Service, adapter, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A narrow screen; a script that fails, or anything that is not this machine's, fails the test."""
    tab = browser.new_page(viewport={"width": 360, "height": 700})
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda line: wrong.append(line.text) if "Content Security" in line.text else None)
    tab.on("request", lambda r: None if "//127.0.0.1:" in r.url or r.url == "data:," else wrong.append(r.url))
    yield tab
    fits = tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    tab.close()
    assert wrong == [] and fits


def test_a_conversation(chat: Service, page: Any) -> None:
    page.goto(chat.url)
    assert CLAIM.sentence() in page.inner_text("main")
    bodies: list[Any] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" else None)
    page.get_by_label("Question").fill("w1 <b>w2</b>")
    page.get_by_text("How it answers").click()
    page.get_by_label("Tokens at most").fill("12")
    page.keyboard.press("Enter")  # in a field of the form: asks
    page.wait_for_selector("#send:not([disabled])")
    first = page.inner_text(".turn.assistant span")
    assert first and page.inner_text(".turn.user span") == "w1 <b>w2</b>"
    assert page.locator(".turn b b").count() == 0  # what was typed is text, not markup
    page.get_by_label("Question").fill("w3")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator(".turn")).to_have_count(4)
    page.wait_for_selector("#send:not([disabled])")
    assert [m["role"] for m in bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert bodies[1]["messages"][2]["content"] == "w3" and bodies[1]["max_tokens"] == 12
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0


def test_an_answer_can_be_stopped(chat: Service, page: Any) -> None:
    page.goto(chat.url)
    page.get_by_text("How it answers").click()
    page.get_by_label("Tokens at most").fill("4000")
    page.get_by_label("Question").fill("w1 w2")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator(".turn.assistant span")).to_have_text(re.compile("[^…]"))
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("#send:not([disabled])", timeout=5000)
    assert page.inner_text(".turn.assistant small") == "stopped"


def test_a_label(judge: Service, page: Any) -> None:
    page.goto(judge.url)
    assert CLAIM.sentence() in page.inner_text("main")
    page.get_by_label("Text").fill("some good text")
    page.get_by_role("button", name="Answer").click()
    page.wait_for_selector("#answer .bar")
    with judge.client() as client:
        wanted = client.post("/predict", json={"text": "some good text"}).json()
    assert page.inner_text("#answer").strip() == f"{wanted['label']} {100 * wanted['probability']:.1f} %"
    page.get_by_label("Text").fill("   ")
    page.get_by_role("button", name="Answer").click()
    page.wait_for_selector("#error p")
    assert "empty" in page.inner_text("#error") and page.inner_text("#answer") == ""


def test_an_image_and_a_token(world: Callable[..., World], page: Any, tmp_path: Path) -> None:
    this = world("vit-images")
    folder = adapter(this.model, this.config, tmp_path / "adapter")
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    (tmp_path / "token").write_text("0123456789abcdef0123\n")
    with serving(folder, tmp_path / "log", "--token-file", str(tmp_path / "token")) as service:
        page.goto(service.url)
        page.get_by_label("Image").set_input_files(tmp_path / "red.png")
        page.get_by_label("Token").fill("wrong")
        page.get_by_role("button", name="Answer").click()
        page.wait_for_selector("#error p")
        assert "Bearer" in page.inner_text("#error")
        page.get_by_label("Token").fill("0123456789abcdef0123")
        page.get_by_role("button", name="Answer").click()
        page.wait_for_selector("#answer .bar")
        assert page.inner_text("#answer").split()[0] in LABELS
