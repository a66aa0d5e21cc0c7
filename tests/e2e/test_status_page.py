"""The status page in a real browser: what an operator sees, and that it looks again by itself."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import expect, sync_playwright

from client.identity import SiteFolder, create_site
from common.identity import load_card
from server.federation import FederationFolder, create_federation, enroll_site
from server.jobs import JobFolder, create_job, write_fields
from server.record import RoundEvent, SiteRound
from server.serving import create_serving
from server.status_page import make_page
from tests.server.test_keeper import CONFIG

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def federation(tmp_path: Path) -> tuple[FederationFolder, JobFolder]:
    """Three sites and a job in its third round; one site has refused. Nothing runs."""
    folder = FederationFolder(tmp_path / "federation")
    create_federation(folder, "Heart study", os.urandom)
    create_serving(folder, "Heart study", [], free_port(), os.urandom, datetime.datetime.now(datetime.UTC))
    for name in ("north", "south", "west"):
        place = SiteFolder(tmp_path / name)
        create_site(place, name, os.urandom, None, deployed=True)
        enroll_site(folder, load_card(place.card))
    path = tmp_path / "job.toml"
    path.write_text(CONFIG)
    job = create_job(folder, path, ['run.name="study"'], os.urandom, 1, lambda _: None)
    for number in range(3):
        add_round(job, number)
    write_fields(job.progress, {"stage": "mask", "since": time.time(), "absent": {"3": "refused-policy"}})
    return folder, job


def add_round(job: JobFolder, number: int) -> None:
    for site in (1, 2):
        job.append(SiteRound(number, site, "ok", 50_000, 60_000, []))
    job.append(RoundEvent(number, "all", 3, 2, 2, number != 1, 0.5 + number / 10, 0.7, 20, 1.0, None))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return min(int(free.getsockname()[1]), 65000)


@pytest.fixture
def url(federation: tuple[FederationFolder, JobFolder]) -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(make_page(federation[0]), host="127.0.0.1", port=port, log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_an_operator_sees_how_it_stands(
    federation: tuple[FederationFolder, JobFolder], url: str, tmp_path: Path
) -> None:
    wrong: list[str] = []
    with sync_playwright() as driver:
        browser: Any = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1300})
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if "Content Security" in line.text else None)
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(url) else None)
        page.goto(url)
        assert page.inner_text("h1") == "Heart study"
        text = page.inner_text("main")
        assert "The server does not run" in text
        assert "2 of 10" in text and "study" in text
        assert "refused-policy" in page.inner_text("tr:has-text('west')")
        assert page.locator("svg").count() == 2
        page.screenshot(path=str(tmp_path / "status.png"))
        add_round(federation[1], 3)
        expect(page.locator("main")).to_contain_text("3 of 10", timeout=15000)
        narrow = browser.new_page(viewport={"width": 360, "height": 700})
        narrow.goto(url)
        assert narrow.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    assert wrong == []
