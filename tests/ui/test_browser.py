"""The page in a real browser, as a visitor uses it. Chromium is required: without it these tests fail.

The page changes part by part, some time after the event. So nothing is read once: each check waits for the very thing that
it is about, and never for something that an earlier run may have left on the page.
"""

from __future__ import annotations

import re
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from in_browser import PATIENCE_MS, PHONE, chromium, desktop_page
from playwright.sync_api import Browser, Locator, Page, expect

from rewardiv.gamma import Gamma, parse_gamma

SHOWN = ("#rd-prompt", ".rd-examples", "#rd-generate", "#rd-lora", "#rd-methods", "#rd-gamma")
FOLDED = ("#rd-seeds", "#rd-extra")
LOADED = "images => images.length > 0 && images.every(image => image.complete && image.naturalWidth > 0)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser: Browser, url: str) -> Iterator[Page]:
    with desktop_page(browser, url) as page:
        expect(page.locator("#rd-gamma .rd-curve")).to_be_visible()
        yield page


def eventually(page: Page, holds: Callable[[], bool]) -> None:
    """Ask again until it holds."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        page.wait_for_timeout(100)


def field(page: Page, group: str) -> Locator:
    return page.locator(f"{group} textarea, {group} input").first


def labelled(page: Page, label: str) -> Locator:
    """A field of the Compare tab, which comes first, by its label."""
    return page.locator(f'input[aria-label="{label}"]').first


def unfold(page: Page, title: str, inside: Locator) -> None:
    """Open an accordion, unless what lies in it is there to see."""
    if not inside.is_visible():
        page.get_by_text(title, exact=True).first.click()
        expect(inside).to_be_visible()
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")  # it listens


def set_seeds_and_steps(page: Page, seeds: str, steps: int) -> None:
    unfold(page, "Seeds, steps, guidance", field(page, "#rd-seeds"))
    field(page, "#rd-seeds").fill(seeds)
    box = labelled(page, "number input for Denoising steps")
    box.fill(str(steps))
    box.press("Tab")


def choose(box: Locator, value: str) -> None:
    """Type something into a drop-down list that takes what isn't in it."""
    box.fill(value)
    box.press("Enter")


def expect_run(page: Page, kind: str, sentence: str | re.Pattern[str]) -> None:
    """The run under way ends as `kind` and says `sentence`, which the run before didn't, and the page is idle again."""
    expect(page.locator("#rd-status .rd-status")).to_contain_text(sentence)
    expect(page.locator(f"#rd-status .rd-{kind}")).to_be_visible()
    expect(page.locator("#rd-generate")).to_be_visible()


def expect_images(page: Page, seeds: Sequence[int], *, num_methods: int = 4) -> None:
    """Final images at these seeds, which the run before didn't have."""
    grid = "#rd-grid .rd-grid:not(.live)"
    expect(page.locator(f"{grid} .rd-seeds span")).to_have_text([str(seed) for seed in seeds])
    expect(page.locator(f"{grid} .rd-cell:not(.rd-empty)")).to_have_count(num_methods * len(seeds))
    eventually(page, lambda: page.locator(f"{grid} .rd-cell img").evaluate_all(LOADED))


def gamma_on(page: Page) -> Gamma:
    return parse_gamma(page.inner_text("#rd-gamma .rd-gamma-text").removeprefix("γ = "))


def pick_shape(page: Page, shape: str) -> None:
    page.click(f'#rd-gamma [data-shape="{shape}"]')
    expect(page.locator("#rd-gamma .rd-gamma-text")).to_have_text(re.compile(rf"^γ = {shape}\b"))


# --- before the first click, and the γ editor

def test_a_result_is_there_before_the_first_click_with_few_controls(page: Page) -> None:
    expect_images(page, (0, 1, 2))
    expect(page.locator("#rd-plots svg")).to_have_count(2)
    for group in SHOWN:
        expect(page.locator(group)).to_be_visible()
    for group in FOLDED:
        expect(page.locator(group)).not_to_be_visible()


@pytest.mark.parametrize("shape", ["power", "linear", "cosine", "sigmoid", "step", "knots"])
def test_the_drawn_curve_is_the_one_that_the_engine_follows(page: Page, shape: str) -> None:
    pick_shape(page, shape)
    gamma = gamma_on(page)
    assert gamma.shape == shape
    points = page.get_attribute("#rd-gamma .rd-curve", "points").split()  # drawn together with the text
    assert len(points) == 201
    for i, point in enumerate(points):
        share = 1 - (float(point.split(",")[1]) - 6) / 156
        if shape != "step" or abs(i / 200 - gamma.params[0]) > 0.01:
            assert share == pytest.approx(gamma(1 - i / 200), abs=2e-3)


def test_dragging_a_dot_bends_the_curve_and_it_never_rises(page: Page) -> None:
    pick_shape(page, "linear")
    dot = page.locator('#rd-gamma [data-k="2"]')
    dot.scroll_into_view_if_needed()
    box, plot = dot.bounding_box(), page.locator(".rd-gamma-plot").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 12, plot["y"] + plot["height"] * 1.5, steps=6)  # far below its right neighbour
    page.mouse.up()
    expected = pytest.approx(0.25)  # gamma_on raises where the curve rises
    eventually(page, lambda: len(knots := gamma_on(page).knots) > 3 and knots[2][1] == knots[3][1] == expected)


def test_the_curve_can_be_edited_with_the_keyboard_alone(page: Page) -> None:
    pick_shape(page, "linear")
    page.locator('#rd-gamma [data-k="2"]').focus()
    page.keyboard.press("ArrowUp")
    eventually(page, lambda: len(gamma_on(page).knots) == 5)
    page.keyboard.press("ArrowUp")
    eventually(page, lambda: gamma_on(page).knots[2] == (0.5, pytest.approx(0.54)))
    page.get_by_text("add a knot").press("Enter")
    eventually(page, lambda: len(gamma_on(page).knots) == 6)
    page.locator('#rd-gamma [data-k="1"]').focus()
    page.keyboard.press("Delete")
    eventually(page, lambda: len(gamma_on(page).knots) == 5)


# --- runs

def test_generate_with_a_chosen_lora_and_curve_then_download(page: Page, second_lora_dir: Path, tmp_path: Path) -> None:
    page.evaluate("""() => {  // how the grid looked, at every change
        window.rdStages = new Set();
        new MutationObserver(() => window.rdStages.add(document.querySelector("#rd-grid .rd-grid")?.className))
            .observe(document.querySelector("#rd-grid"), { subtree: true, childList: true, attributes: true });
    }""")
    pick_shape(page, "cosine")
    choose(labelled(page, "LoRA, with the reward it was trained on"), str(second_lora_dir))
    set_seeds_and_steps(page, "4-6", 6)
    field(page, "#rd-prompt").fill("a face")
    page.keyboard.press("Control+Enter")
    expect_run(page, "done", "12 images")
    expect_images(page, (4, 5, 6))
    assert any("live" in stage for stage in page.evaluate("[...window.rdStages]"))  # previews came first
    expect(page.locator("#rd-grid h2")).to_have_text("a face")
    expect(page.locator("#rd-grid")).to_contain_text("AIG cosine")
    expect(page.locator("#rd-history button")).to_have_count(2)
    command = page.locator("#rd-command .cm-content")
    expect(command).to_contain_text("aig:cosine")
    eventually(page, lambda: str(second_lora_dir) in re.sub(r"\s", "", command.inner_text()))
    with page.expect_download() as download:
        page.click("#rd-bundle")
    bundle = zipfile.ZipFile(download.value.path())
    assert "images/aig-cosine/4.png" in bundle.namelist()
    bundle.extract("images/aig-cosine/4.png", tmp_path)
    pick_shape(page, "linear")
    with page.expect_file_chooser() as chooser:
        page.click("#rd-load")
    chooser.value.set_files(tmp_path / "images/aig-cosine/4.png")
    expect(page.locator("#rd-gamma .rd-gamma-text")).to_have_text("γ = cosine")


def test_a_cell_enlarges_moves_by_arrow_keys_and_gives_the_focus_back(page: Page) -> None:
    page.locator("#rd-grid .rd-cell").first.focus()
    page.keyboard.press("Enter")
    caption = page.locator("#rd-viewer figcaption")
    expect(caption).to_contain_text("Base · seed 4")
    page.keyboard.press("ArrowRight")
    expect(caption).to_contain_text("Base · seed 5")
    page.keyboard.press("ArrowDown")
    expect(caption).to_contain_text("Finetuned · seed 5")
    page.keyboard.press("Escape")
    expect(page.locator("#rd-viewer")).not_to_be_visible()
    expect(page.locator('#rd-grid .rd-cell[data-caption^="Finetuned · seed 5"]')).to_be_focused()


def test_stop_keeps_the_previews_and_the_next_run_works(page: Page) -> None:
    set_seeds_and_steps(page, "0-15", 100)  # long enough for a person, or a busy machine, to stop it
    page.click("#rd-generate")
    expect(page.locator("#rd-grid .rd-grid.live .rd-seeds span")).to_have_count(16)
    page.keyboard.press("Escape")
    expect_run(page, "stopped", re.compile(r"Stopped at step \d+ of 100"))
    expect_images(page, range(16))
    set_seeds_and_steps(page, "7-9", 1)
    page.click("#rd-generate")
    expect_run(page, "done", "12 images")
    expect_images(page, (7, 8, 9))


def test_the_history_shows_an_earlier_run_again(page: Page) -> None:
    cards = page.locator("#rd-history button")
    expect(cards).to_have_count(4)  # newest first; the last one is the prepared result
    cards.nth(2).click()
    expect_images(page, (4, 5, 6))
    expect(page.locator("#rd-grid")).to_contain_text("AIG cosine")
    cards.nth(3).click()
    expect_images(page, (0, 1, 2))
    expect(page.locator("#rd-grid h2")).to_have_text("a cat face")


# --- mistakes: one sentence, the images stay, and the next run works

@pytest.fixture
def mistaken(page: Page) -> Callable[[str], None]:
    """mistaken(sentence): press Generate; it is said, and the images that are shown stay."""
    shown = page.inner_html("#rd-grid")

    def press(sentence: str) -> None:
        page.click("#rd-generate")
        expect_run(page, "failed", sentence)
        assert page.inner_html("#rd-grid") == shown

    return press


def test_seeds_that_mean_nothing_or_come_twice(page: Page, mistaken: Callable[[str], None]) -> None:
    for seeds, sentence in (("9-x", "cannot read '9-x'"), ("1,1", "seed 1 is given twice"), ("", "cannot read")):
        set_seeds_and_steps(page, seeds, 1)
        mistaken(sentence)
    set_seeds_and_steps(page, "0-2", 1)


def test_an_empty_prompt(page: Page, mistaken: Callable[[str], None]) -> None:
    field(page, "#rd-prompt").fill("  ")
    mistaken("the prompt is empty")
    field(page, "#rd-prompt").fill("a face")


def test_methods_that_are_unknown_or_none(page: Page, mistaken: Callable[[str], None]) -> None:
    extra = field(page, "#rd-extra")
    unfold(page, "More settings", extra)
    for typed, sentence in (("aigg:linear", "did you mean 'aig'"), ("aig:powr:2", "did you mean 'power'")):
        extra.fill(typed)
        mistaken(sentence)
    extra.fill("")
    boxes = page.locator("#rd-methods input[type=checkbox]:checked")
    expect(boxes).to_have_count(4)
    for left in (3, 2, 1, 0):
        boxes.first.uncheck()
        expect(boxes).to_have_count(left)
    mistaken("no method")
    for name in ("Base model", "Finetuned, full LoRA", "LoRA scaled down", "AIG, the curve below"):
        page.locator("#rd-methods").get_by_label(name).check()
    expect(boxes).to_have_count(4)


def test_loras_that_are_unknown_damaged_or_of_another_model(
    page: Page, mistaken: Callable[[str], None], tiny_lora_dir: Path, damaged_lora_dir: Path, wide_lora_dir: Path
) -> None:
    box = labelled(page, "LoRA, with the reward it was trained on")
    for value, sentence in (
        ("vivd", "unknown LoRA 'vivd', and no such folder or .safetensors file; did you mean 'vivid'?"),
        (str(damaged_lora_dir), "is damaged"),
        (str(wide_lora_dir), "was made for another model than"),
    ):
        choose(box, value)
        mistaken(sentence)
    choose(box, str(tiny_lora_dir))


def test_models_that_are_unknown_or_damaged(
    page: Page, mistaken: Callable[[str], None], tiny_model_dir: Path, damaged_model_dir: Path
) -> None:
    box = labelled(page, "Base model")
    unfold(page, "More settings", box)
    for value, sentence in (("emojy", "did you mean 'emoji'"), (str(damaged_model_dir), "diffusion_pytorch_model.safetensors")):
        choose(box, value)
        mistaken(sentence)
    choose(box, str(tiny_model_dir))


def test_after_all_mistakes_a_run_works_and_says_what_it_cut_from_a_long_prompt(page: Page) -> None:
    field(page, "#rd-prompt").fill("a cat face " * 20)
    set_seeds_and_steps(page, "21-23", 1)
    page.click("#rd-generate")
    expect_run(page, "done", re.compile("12 images .*the prompt is longer than the model reads; left out: “.*cat face"))
    expect_images(page, (21, 22, 23))


# --- small screens

@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser: Browser, url: str, scheme: str) -> None:
    page = browser.new_page(viewport=PHONE, color_scheme=scheme)
    page.set_default_timeout(PATIENCE_MS)
    page.goto(url)
    expect(page.locator("#rd-gamma .rd-curve")).to_be_visible()
    expect_images(page, (0, 1, 2))
    expect(page.locator("#rd-plots svg")).to_have_count(2)
    eventually(page, lambda: page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark"))
    eventually(page, lambda: page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"])
    page.close()
