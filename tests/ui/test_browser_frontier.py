"""The Frontier tab in a real browser, with a real sweep of a tiny model. Chromium is required: without it these tests fail."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest
from in_browser import PATIENCE_MS, PHONE, chromium, desktop_page
from playwright.sync_api import Browser, Locator, Page, expect

from rewardiv.evaluate.table import collect
from rewardiv.generate import Engine
from rewardiv.sweep_jobs import list_sweeps, read_job, stop
from rewardiv.ui import create_demo, launch_options
from rewardiv.ui.frontier_data import Reader

AIG = '[data-point="aig:power:2|vivid"]'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def sweeps_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where sweeps go; none is left running."""
    folder = tmp_path_factory.mktemp("page") / "sweeps"
    yield folder
    for job in list_sweeps(folder):
        if job.alive:
            stop(job.folder)


@pytest.fixture(scope="module")
def frontier_url(engine: Engine, prepared_dir: Path, sweeps_dir: Path) -> Iterator[str]:
    demo: gr.Blocks = create_demo(lambda: engine, prepared_dir=prepared_dir, sweeps_dir=sweeps_dir)
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, _frontend=False, **launch_options())
    yield address
    demo.close()


@pytest.fixture(scope="module")
def page(browser: Browser, frontier_url: str) -> Iterator[Page]:
    with desktop_page(browser, frontier_url) as page:
        page.get_by_role("tab", name="Frontier").click()
        page.wait_for_selector(AIG)
        yield page


def box(page: Page, name: str) -> Locator:
    return page.locator(f"#rd-s-{name} input, #rd-s-{name} textarea").first


def fill(page: Page, name: str, text: str) -> None:
    box(page, name).fill(text)
    box(page, name).press("Tab")


def swap(page: Page, name: str, text: str) -> None:
    """Another value in a list that has one."""
    box(page, name).press("Backspace")
    box(page, name).fill(text)
    box(page, name).press("Enter")


def mark(page: Page, point: str) -> Locator:
    """A point without its bars; others may lie over it."""
    return page.locator(f"{point} .rd-fr-mark")


def test_a_prepared_sweep_is_seen_at_first_sight(page: Page) -> None:
    assert page.locator("#rd-scatter [data-point]").count() == 9 and page.locator("#rd-sweeps .rd-opened").count() == 1
    expect(page.locator("#rd-areas")).to_contain_text("LoRA scaling")
    expect(page.locator("#rd-point-images .rd-cell").first).to_be_visible()
    assert not page.is_visible("#rd-sweep-stop") and not page.is_visible("#rd-fr-more")


def test_points_are_reached_told_and_opened_by_keyboard(page: Page) -> None:
    point = page.locator(AIG)
    assert re.search(r"reward \d", point.get_attribute("aria-label")) and point.get_attribute("role") == "button"
    page.locator("[data-point]").first.focus()
    for _ in range(8):  # Tab goes from point to point
        if page.evaluate("document.activeElement.dataset.point") == "aig:power:2|vivid":
            break
        page.keyboard.press("Tab")
    tip = page.locator(".rd-fr-tip")
    expect(tip).to_contain_text("AIG power 2")
    expect(tip).to_contain_text("reward")
    page.keyboard.press("Enter")
    expect(page.locator("#rd-point-head")).to_contain_text("steers 67 % of the way")
    expect(point).to_have_attribute("aria-pressed", "true")
    assert page.evaluate("document.activeElement.dataset.point") == "aig:power:2|vivid"  # redrawn, and still there
    expect(page.locator("#rd-point-numbers")).to_contain_text("clip (held out)")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_a_click_opens_a_point_and_its_prompts(page: Page) -> None:
    mark(page, '[data-point="base|"]').hover(force=True)
    expect(page.locator(".rd-fr-tip")).to_contain_text("Base")
    mark(page, '[data-point="base|"]').click(force=True)
    expect(page.locator("#rd-point-head")).to_contain_text("Base")
    page.locator("#rd-fr-prompt input").click()
    page.get_by_role("option", name="a tulip").click()
    expect(page.locator("#rd-point-images h2")).to_have_text("a tulip")


def test_another_reward_moves_the_points(page: Page) -> None:
    before = page.locator(f"{AIG} .rd-fr-mark").get_attribute("transform")
    page.locator("#rd-fr-reward input").click()
    page.get_by_role("option", name="clip (held out)").click()
    expect(page.locator("#rd-scatter")).to_contain_text("mean reward: clip (held out)")
    assert page.locator(f"{AIG} .rd-fr-mark").get_attribute("transform") != before
    page.reload()  # and all of it is remembered
    expect(page.locator("#rd-scatter")).to_contain_text("mean reward: clip (held out)")
    expect(page.locator("#rd-point-images h2")).to_have_text("a tulip")


def test_a_point_goes_to_the_compare_tab(page: Page) -> None:
    mark(page, AIG).click(force=True)
    expect(page.locator("#rd-point-head")).to_contain_text("AIG power 2")
    page.click("#rd-fr-send")
    expect(page.locator("#rd-prompt textarea, #rd-prompt input")).to_have_value("a tulip")
    expect(page.locator("#rd-lora input")).to_have_value("vivid (reward: vivid)")
    expect(page.locator("#rd-gamma .rd-gamma-text")).to_have_text("γ = power:2")
    ticked = page.locator("#rd-methods input:checked")
    assert ticked.count() == 3
    page.get_by_role("tab", name="Frontier").click()


def test_the_form_says_size_command_and_mistakes(page: Page, tiny_model_dir: Path, tiny_lora_dir: Path) -> None:
    expect(page.locator("#rd-s-say")).to_contain_text("= 216 images")
    fill(page, "methods", "finetuned lora:0.25,0.5,x")
    expect(page.locator("#rd-s-say .rd-wrong")).to_contain_text("x")
    page.click("#rd-s-start")
    expect(page.locator("#rd-s-say .rd-wrong")).to_be_visible()
    fill(page, "methods", "lora:0.5")
    swap(page, "loras", str(tiny_lora_dir))
    page.get_by_text("Model, checkpoints, rewards", exact=True).click()
    page.get_by_text("Steps, guidance, size", exact=True).click()
    box(page, "model").fill(str(tiny_model_dir))
    box(page, "model").press("Enter")
    box(page, "rewards").fill("colorfulness")
    box(page, "rewards").press("Enter")
    swap(page, "held_out", "jpeg")
    fill(page, "num_inference_steps", "2")
    fill(page, "max_prompts", "2")
    fill(page, "seeds", "0-1")
    fill(page, "name", "mine")
    expect(page.locator("#rd-s-say")).to_contain_text("2 prompts × 2 seeds × 2 methods = 8 images")
    command = page.locator("#rd-s-command")
    expect(command).to_contain_text("--num-inference-steps 2")
    expect(command).to_contain_text("--held-out jpeg")


def test_a_sweep_starts_stops_survives_a_reload_and_goes_on_to_its_end(page: Page, sweeps_dir: Path) -> None:
    page.click("#rd-s-start")
    page.wait_for_selector('.rd-opened[data-sweep="own/mine"]')
    page.click("#rd-sweep-stop")
    page.wait_for_selector(".rd-opened .rd-is-stopped")
    assert read_job(sweeps_dir / "mine").state == "stopped"
    page.reload()
    page.wait_for_selector(".rd-opened .rd-is-stopped")
    page.click("#rd-sweep-go_on")
    page.wait_for_selector("#rd-sweep-stop:visible")
    page.wait_for_selector('.rd-opened[data-sweep="own/mine"] .rd-is-done')
    page.wait_for_selector('[data-point^="lora:0.5"]')
    expect(page.locator("#rd-sweep-state")).to_contain_text("all 2 prompts are drawn and scored")
    view = Reader().view(sweeps_dir / "mine")
    assert view.measured.finished and view.frontier == collect(view.saved).frontiers()["colorfulness"]
    assert page.locator("#rd-scatter [data-point]").count() == 2


def test_what_cannot_be_scored_is_said(page: Page) -> None:
    page.get_by_text("Score these images with another reward", exact=True).click()
    page.click("#rd-fr-score")
    expect(page.get_by_text("choose a reward first")).to_be_visible()
    page.locator("#rd-fr-extra input").fill("vivd")
    page.locator("#rd-fr-extra input").press("Enter")
    page.click("#rd-fr-score")
    expect(page.get_by_text("did you mean 'vivid'")).to_be_visible()


def test_its_settings_come_back_into_the_form(page: Page) -> None:
    fill(page, "seeds", "5-9")
    page.click("#rd-sweep-reuse")
    expect(box(page, "seeds")).to_have_value("0-1")
    expect(box(page, "name")).to_have_value("sweep-1")


def test_on_a_phone_it_fits_and_a_tap_shows_the_images(browser: Browser, frontier_url: str) -> None:
    page = browser.new_page(viewport=PHONE, has_touch=True, color_scheme="dark")
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{frontier_url}?tab=frontier&sweep=prepared/emoji")
    page.wait_for_selector(AIG)
    mark(page, AIG).tap(force=True)
    expect(page.locator("#rd-point-head")).to_contain_text("AIG power 2")
    expect(page.locator("#rd-point-head")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    first = page.locator("#rd-scatter svg").first.bounding_box()
    assert first["x"] >= 0 and first["x"] + first["width"] <= PHONE["width"]
    page.close()
