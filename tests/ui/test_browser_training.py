"""The Training tab in a real browser, with real runs of a tiny model. Chromium is required: without it these tests fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import pytest
from in_browser import DESKTOP, PATIENCE_MS, PHONE, chromium, desktop_page
from playwright.sync_api import Browser, Page, expect

from rewardiv.generate import Engine
from rewardiv.jobs import list_jobs, order, read_job
from rewardiv.ui import create_demo, launch_options
from rewardiv.ui.train_list import SCRIPT

FORM = {  # of a run that takes a few seconds
    "max_train_steps": "120", "probe_every": "60", "learning_rate": "0.0001", "train_batch_size": "2",
    "num_inference_steps": "2", "grad_steps": "1", "num_probe_prompts": "2", "num_probe_seeds": "2",
    "checkpointing_steps": "60",
}
RunWriter = Callable[..., Path]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the runs go; none is left running."""
    folder = tmp_path_factory.mktemp("page") / "runs"
    yield folder
    for job in list_jobs(folder):
        if job.alive:
            order(job.folder, "stop")


@pytest.fixture(scope="module")
def training_url(engine: Engine, prepared_dir: Path, runs_dir: Path) -> Iterator[str]:
    demo: gr.Blocks = create_demo(lambda: engine, prepared_dir=prepared_dir, runs_dir=runs_dir)
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, _frontend=False, **launch_options(runs_dir=runs_dir))
    yield address
    demo.close()


@pytest.fixture(scope="module")
def page(browser: Browser, training_url: str) -> Iterator[Page]:
    with desktop_page(browser, training_url) as page:
        page.get_by_role("tab", name="Training").click()
        page.wait_for_selector("#rd-runs .rd-nothing")
        yield page


def fill(page: Page, name: str, text: str) -> None:
    box = page.locator(f"#rd-t-{name} input, #rd-t-{name} textarea").first
    box.fill(text)
    box.press("Tab")


def choose(page: Page, name: str, text: str) -> None:
    box = page.locator(f"#rd-t-{name} input")
    box.fill(text)
    box.press("Enter")


def steps_done(page: Page) -> int:
    found = re.search(r"step (\d+) of", page.inner_text("#rd-run-state"))
    return int(found[1]) if found else 0


def wait_for_state(page: Page, state: str) -> None:
    page.wait_for_selector(f".rd-opened .rd-is-{state}")


def test_without_a_run_the_page_invites_and_few_controls_are_seen(page: Page) -> None:
    assert "Start training" in page.inner_text("#rd-runs")
    assert not page.is_visible("#rd-run") and not page.is_visible("#rd-t-rank")
    assert page.locator(".rd-left input:visible, .rd-left textarea:visible").count() <= 12


def test_the_command_follows_the_form_and_a_mistake_loses_nothing(page: Page, tiny_model_dir: Path) -> None:
    choose(page, "model", str(tiny_model_dir))
    page.locator("#rd-t-rewards input").press("Backspace")  # takes vivid away
    choose(page, "rewards", "colorfulness")
    for title in ("Images and gradients", "Probes", "Checkpoints, seed, device"):
        page.get_by_text(title, exact=True).click()
    for name, text in FORM.items():
        fill(page, name, text)
    command = page.locator("#rd-train-command")
    expect(command).to_contain_text("--checkpointing-steps 60")
    expect(command).to_contain_text("--reward colorfulness")
    fill(page, "num_inference_steps", "0")
    expect(page.locator("#rd-say")).to_contain_text("num_inference_steps is 0")
    page.click("#rd-start")
    expect(page.locator("#rd-say .rd-wrong")).to_be_visible()
    assert page.locator("#rd-t-max_train_steps input").input_value() == "120"
    fill(page, "num_inference_steps", "2")
    expect(page.locator("#rd-say")).not_to_contain_text("num_inference_steps")


def test_a_run_starts_moves_survives_a_reload_stops_and_restarts_to_its_end(page: Page, runs_dir: Path) -> None:
    fill(page, "name", "first")
    page.click("#rd-start")
    wait_for_state(page, "running")
    page.wait_for_function("/step [1-9]/.test(document.querySelector('#rd-run-state').innerText)")
    page.click("#rd-run-pause")
    wait_for_state(page, "paused")
    before = steps_done(page)
    page.reload()
    wait_for_state(page, "paused")  # the same tab and the same run
    page.click("#rd-run-resume")
    page.wait_for_function(f"Number(/step (\\d+) of/.exec(document.querySelector('#rd-run-state').innerText)?.[1]) > {before}")
    page.click("#rd-run-stop")
    wait_for_state(page, "stopped")
    stopped_at = read_job(runs_dir / "first").step
    assert before < stopped_at < 120 and not page.is_visible("#rd-run-stop")
    page.click("#rd-run-restart")
    wait_for_state(page, "done")
    assert steps_done(page) == 120
    lines = (runs_dir / "first" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 120  # none was lost and none done twice


def test_the_plots_and_the_log_are_there(page: Page) -> None:
    expect(page.locator("#rd-train-plots svg").first).to_be_visible()
    page.get_by_text("Log", exact=True).click()
    expect(page.locator(".rd-log")).to_contain_text("started")


def test_the_slider_scrubs_the_probes_with_the_keyboard(page: Page) -> None:
    slider, picture = page.locator("#rd-probe input"), page.locator("#rd-probe .rd-probe-now")
    expect(page.locator("#rd-probe output")).to_have_text("step 120")
    last = picture.get_attribute("src")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#rd-probe output")).to_have_text("step 60")
    assert picture.get_attribute("src") != last
    page.keyboard.press("Home")
    expect(page.locator("#rd-probe output")).to_have_text("step 0")
    for kind in ("base", "now"):
        shown = page.locator(f"#rd-probe .rd-probe-{kind}")
        page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=shown.element_handle())
    page.keyboard.press("ArrowRight")
    expect(page.locator("#rd-probe output")).to_have_text("step 60")


def test_a_method_is_tried_on_the_checkpoint_that_the_slider_stands_on(page: Page) -> None:
    page.get_by_text("Try a sampling method").click()
    method = page.locator("#rd-try-method textarea, #rd-try-method input")
    expect(method).to_have_value("aig:power:2")
    method.press("Control+a")
    method.press_sequentially("aig:cosine", delay=30)  # as a person types; one event at once can come before the box listens
    method.press("Tab")
    expect(method).to_have_value("aig:cosine")
    page.click("#rd-try-draw")
    page.wait_for_selector("#rd-try-grid .rd-done")
    assert "AIG cosine" in page.inner_text("#rd-try-grid") and "checkpoint of step 60" in page.inner_text("#rd-try-grid")
    assert page.locator("#rd-try-grid .rd-cell").count() == 3 * 4


def test_a_checkpoint_goes_to_the_compare_tab(page: Page, runs_dir: Path, tiny_model_dir: Path) -> None:
    page.click("#rd-probe [data-compare]")
    expect(page.locator("#rd-lora input")).to_have_value(str(runs_dir / "first" / "checkpoints" / "step-60"))
    expect(page.locator("#rd-generate")).to_be_visible()
    page.click("#rd-generate")
    page.wait_for_selector("#rd-status .rd-done")
    page.wait_for_selector("#rd-generate:visible")
    assert "step-60" in page.inner_text("#rd-grid")
    page.get_by_role("tab", name="Training").click()
    expect(page.locator("#rd-probe output")).to_be_visible()


def test_runs_are_overlaid_renamed_and_deleted_after_a_question(
    page: Page, runs_dir: Path, write_run: RunWriter, tmp_path: Path
) -> None:
    write_run("other", runs_dir=runs_dir)
    page.wait_for_selector('[data-run="other"]')  # a run that was started elsewhere is noticed
    page.check('[data-overlay="other"]')
    expect(page.locator("#rd-train-plots")).to_contain_text("other")
    page.click('[data-run="other"] button')
    page.wait_for_selector('.rd-opened[data-run="other"]')
    page.click("#rd-run-reuse")
    expect(page.locator("#rd-t-max_train_steps input")).to_have_value("20")
    page.click("#rd-run-rename")
    page.fill("#rd-new-name textarea, #rd-new-name input", "x" * 400)
    page.click("#rd-rename-save")
    expect(page.get_by_text("1 to 80 characters, got 400")).to_be_visible()
    page.click("#rd-run-rename")
    page.fill("#rd-new-name textarea, #rd-new-name input", "my <b>run</b>")
    page.click("#rd-rename-save")
    expect(page.locator("#rd-run-state h2")).to_have_text("my <b>run</b>")
    page.click("#rd-run-delete")
    assert (runs_dir / "other").exists()
    page.click("#rd-delete-confirm")
    page.wait_for_selector('.rd-opened[data-run="first"]')
    assert not (runs_dir / "other").exists()


def test_a_tick_outlives_a_look_that_began_before_it(browser: Browser) -> None:
    page = browser.new_page()
    page.clock.install()
    page.set_content('<div><input type="checkbox" data-overlay="other"></div>')
    page.evaluate("""script => {
      const looks = [];
      const on = (_, look) => looks.push(look);
      new Function("element", "trigger", "watch", script)(document.querySelector("div"), () => {}, on);
      window.look = () => looks.forEach((look) => look());
    }""", SCRIPT)
    page.check("[data-overlay]")
    page.evaluate("look()")  # the list as it was before
    assert page.is_checked("[data-overlay]")
    page.clock.fast_forward(6000)
    page.evaluate("look()")  # the list still says so: another page has taken it away
    assert not page.is_checked("[data-overlay]")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser: Browser, training_url: str, scheme: str) -> None:
    page = browser.new_page(viewport=PHONE, color_scheme=scheme)
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{training_url}?tab=training&run=first")
    page.wait_for_selector("#rd-train-plots svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.close()


def test_every_control_has_a_name(page: Page) -> None:
    for control in page.locator(".rd-page").nth(1).locator("button:visible, input:visible, textarea:visible").all():
        named = control.evaluate(
            "e => (e.ariaLabel || e.innerText || e.title || e.labels?.[0]?.innerText || e.placeholder || '').trim()"
        )
        assert named, control.evaluate("e => e.outerHTML")


def test_a_host_that_does_not_train_shows_runs_and_the_command(
    browser: Browser, engine: Engine, prepared_dir: Path, write_run: RunWriter, tmp_path: Path
) -> None:
    write_run("prepared")
    demo = create_demo(lambda: engine, prepared_dir=prepared_dir, runs_dir=tmp_path / "runs", training=False)
    options = launch_options(runs_dir=tmp_path / "runs")
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, _frontend=False, **options)
    page = browser.new_page(viewport=DESKTOP)
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{address}?tab=training")
    page.wait_for_selector("#rd-train-plots svg")
    for name in ("start", "estimate", "run-stop", "run-restart", "run-delete"):
        assert not page.is_visible(f"#rd-{name}")
    assert "python -m rewardiv train" in page.inner_text("#rd-train-command")
    assert "Prepared runs" in page.inner_text("#rd-runs")
    page.close()
    demo.close()
