"""The page in a real browser: `pytest -m browser`, which needs playwright and Chromium.

UNI3D_CHROMIUM names the browser, /usr/bin/chromium otherwise. The first test makes a mesh with the embedded
teacher; the others use the stub worker.
"""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image
from web_server import Served

pytest.importorskip("gradio", reason="the demo extra is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("UNI3D_CHROMIUM", "/usr/bin/chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no browser at {CHROMIUM}"),
]
# WebGL without a graphics card.
ARGUMENTS = [
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
]
PHONE_WIDTH = 360
PHONE = {"viewport": {"width": PHONE_WIDTH, "height": 780}, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("web") / "data", "--max-steps", "40") as server:
        yield server


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens a page as a new visitor; nothing may be asked of any other address."""
    contexts = []

    def open_page(served: Served, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        strangers: list[str] = []
        page.on(
            "request",
            lambda request: (
                strangers.append(request.url)
                if not request.url.startswith((served.address, "data:", "blob:"))
                else None
            ),
        )
        page.strangers = strangers
        page.goto(served.address)
        page.wait_for_selector("#generate")
        return page

    yield open_page
    for context in contexts:
        context.close()


def _order(page: Any, prompt: str) -> None:
    page.get_by_label("What to make").first.fill(prompt)
    page.click("#generate")


def _wait_for(page: Any, text: str, seconds: float = 30.0) -> None:
    page.wait_for_function(
        "text => document.querySelector('#create-status')?.innerText.includes(text)",
        arg=text,
        timeout=1000 * seconds,
    )


def _spread(picture: bytes) -> float:
    """How much the middle of a picture varies: 0 where it is blank."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), dtype=float)
    height, width = pixels.shape[:2]
    return float(pixels[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4].std())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_mesh_from_the_embedded_teacher(visit: Any, tmp_path: Path) -> None:
    with Served(tmp_path / "data", "--max-steps", "6", stub=False) as served:
        page = visit(served)
        _order(page, "a red wooden chair")
        _wait_for(page, "step", 400)
        _wait_for(page, "Done", 400)
        page.wait_for_selector("#create-model canvas", timeout=60_000)
        model = page.locator("#create-model")
        model.scroll_into_view_if_needed()
        for _ in range(60):
            if _spread(model.screenshot()) > 5:
                break
            page.wait_for_timeout(500)
        assert _spread(model.screenshot()) > 5, "the canvas of the model is blank"
        video = page.locator("#create-result video")
        video.scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('#create-result video').readyState >= 2")
        assert _spread(video.screenshot()) > 5, "the video is blank"
        with page.expect_download() as download:
            page.get_by_text("Download GLB").click()
        download.value.save_as(tmp_path / "chair.glb")
        assert len(trimesh.load(tmp_path / "chair.glb", force="mesh").faces) > 100  # pyright: ignore
        assert "passed" in page.inner_text("#create-result") or "Checks" in page.inner_text("#create-result")
        assert "uni3d generate" in page.inner_text("#create-result")
        assert page.strangers == []


def test_progress_moves_and_a_reload_goes_on(visit: Any, served: Served) -> None:
    page = visit(served)
    _order(page, "a slow chair")
    _wait_for(page, "step")
    first = page.inner_text("#create-status")
    page.wait_for_function("text => document.querySelector('#create-status').innerText != text", arg=first)
    assert "?job=" in page.url and page.locator("#create-preview img").count() == 1
    page.reload()
    page.wait_for_selector("#generate")
    _wait_for(page, "Done")
    assert page.get_by_label("What to make").first.input_value() == "a slow chair"
    page.wait_for_selector("#create-model canvas", timeout=60_000)
    page.get_by_role("tab", name="Your jobs").click()
    page.get_by_text("a slow chair").last.wait_for()
    assert page.strangers == []


def test_cancelling(visit: Any, served: Served) -> None:
    page = visit(served)
    _order(page, "a very slow chair that nobody wants")
    _wait_for(page, "step")
    page.click("#cancel")
    _wait_for(page, "Cancelled at step")
    assert page.locator("#cancel").is_disabled() or page.locator("#cancel:disabled").count() == 1


def test_a_failing_job_is_one_sentence_and_the_page_goes_on(visit: Any, served: Served) -> None:
    page = visit(served)
    _order(page, "fail")
    _wait_for(page, "This job failed: the teacher")
    _order(page, "a vase")
    _wait_for(page, "Done")
    _order(page, " ")
    page.get_by_text("the prompt is empty").first.wait_for()


def test_two_visitors_see_only_their_own(visit: Any, served: Served) -> None:
    one, two = visit(served), visit(served, **PHONE)
    _order(one, "a slow chair of one")
    _order(two, "a vase of two")
    _wait_for(one, "step")
    _wait_for(two, "Waiting")
    for page, own, other in ((one, "of one", "of two"), (two, "of two", "of one")):
        _wait_for(page, "Done")
        page.get_by_role("tab", name="Your jobs").click()
        page.locator(".u3-card").first.wait_for()
        assert own in page.inner_text(".u3-cards") and other not in page.inner_text(".u3-cards")
    stolen = one.url
    two.goto(stolen)
    two.get_by_text("there is no such job").first.wait_for()
    assert "chair of one" not in two.content()


def test_two_methods_side_by_side(visit: Any, served: Served) -> None:
    page = visit(served)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-prompt textarea, #compare-prompt input").first.fill("a lamp")
    page.click("#compare")
    for side in ("left", "right"):
        page.wait_for_function(
            "id => document.querySelector(id).innerText.includes('Done')",
            arg=f"#{side}-status",
            timeout=30_000,
        )
    assert "--method uni-instruct" in page.inner_text("#left-result")
    assert "--method sds" in page.inner_text("#right-result")


def test_the_first_screen_gives_way_to_the_page(browser: Any, tmp_path: Path) -> None:
    served = Served(tmp_path / "data")
    served.launch()
    with closing(served), closing(browser.new_context(color_scheme="dark", **PHONE)) as context:
        page = context.new_page()
        page.goto(f"{served.address}?job=of-another")
        assert page.inner_text("#state").startswith("The page is starting")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE_WIDTH
        assert page.locator("img").count() > 0
        assert page.evaluate("[...document.images].every(picture => picture.naturalWidth > 0)")
        page.wait_for_selector("#generate", timeout=120_000)
        page.get_by_text("there is no such job").first.wait_for()
        assert page.url == f"{served.address}?job=of-another"


def test_an_open_page_outlives_its_server(visit: Any, tmp_path: Path) -> None:
    with Served(tmp_path / "data", "--max-steps", "80") as served:
        page = visit(served)
        _order(page, "a slow chair")
        _wait_for(page, "step")
        served.stop(signal.SIGKILL)
        page.wait_for_timeout(2000)
        served.start()
        _wait_for(page, "Done", 60)


def test_finished_examples_show_at_a_click(visit: Any, tmp_path: Path) -> None:
    for number, prompt in enumerate(("a green vase", "a blue bed")):
        folder = tmp_path / "examples" / str(number)
        folder.mkdir(parents=True)
        (folder / "example.json").write_text(json.dumps({"prompt": prompt, "seed": 5}))
        (folder / "report.json").write_text(json.dumps({"triangles": 12}))
        (folder / "turntable.mp4").write_bytes(b"")
        trimesh.creation.box().export(folder / "mesh.glb")
        for name in ("preview.jpg", "front.jpg"):
            Image.new("RGB", (64, 32), (200, 30 * number, 60)).save(folder / name)
    options = ("--examples", str(tmp_path / "examples"), "--max-steps", "100")
    with Served(tmp_path / "data", *options) as served:
        page = visit(served)
        _order(page, "a slow chair")
        _wait_for(page, "step")
        page.get_by_role("button", name="a blue bed").click()  # the running job goes on unseen
        _wait_for(page, "A finished example: a blue bed")
        page.wait_for_selector("#create-model canvas", timeout=30_000)
        assert page.get_by_label("What to make").first.input_value() == "a blue bed"
        page.wait_for_timeout(1500)
        assert "uni3d generate 'a blue bed' --seed 5" in page.inner_text("#create-result")
        with page.expect_download() as download:
            page.get_by_text("Download GLB").click()
        download.value.save_as(tmp_path / "bed.glb")
        assert len(trimesh.load(tmp_path / "bed.glb", force="mesh").faces) == 12  # pyright: ignore


def test_the_keyboard_is_enough(visit: Any, served: Served) -> None:
    page = visit(served)
    page.get_by_label("What to make").first.focus()
    page.keyboard.type("a lamp")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "generate":
            break
    page.keyboard.press("Enter")
    _wait_for(page, "Done")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")


def test_a_phone_needs_no_sideways_scrolling(visit: Any, served: Served) -> None:
    page = visit(served, **PHONE)
    for tab in ("Compare", "Your jobs", "Create"):  # the window of a phone widens with what is in it
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE_WIDTH, tab
    _order(page, "W" * 200)
    _wait_for(page, "Done")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE_WIDTH
