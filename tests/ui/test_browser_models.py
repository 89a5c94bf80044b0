"""The Models tab in a real browser, over real connections to a tiny hub. Chromium is required: without it these tests fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_browser import PATIENCE_MS, PHONE, chromium, desktop_page
from playwright.sync_api import Browser, Locator, Page, expect
from tiny_hub import TinyHub, pipeline_files, tiny_hub, use_hub

from rewardiv import hub
from rewardiv.downloads import Downloads
from rewardiv.generate import Engine
from rewardiv.registry import MODELS, REWARDS, known
from rewardiv.ui import create_demo, launch_options
from rewardiv.ui.models_tab import page_html

TURBO, GATED, REWARD = "model sd-turbo", "model sd14", "reward hpsv2.1"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyHub]:
    """The hub that the page's process talks to, with three of the known repositories; one is gated."""
    cache = tmp_path_factory.mktemp("hub") / "cache"
    with tiny_hub() as site, pytest.MonkeyPatch.context() as patch:
        use_hub(patch, site, cache)
        patch.setattr(hub, "CHUNK", 10_000)
        patch.setenv("XDG_CONFIG_HOME", str(cache.parent))
        for name in ("sd-turbo", "sd14"):
            site.repos[MODELS[name].path] = pipeline_files(weights=300_000)
        site.repos["xswu/HPSv2"] = {"HPS_v2.1_compressed.pt": os.urandom(100_000)}
        site.refusals[MODELS["sd14"].path] = (403, "GatedRepo")
        yield site
        site.hold.clear()


@pytest.fixture(scope="module")
def models_url(site: TinyHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    runs_dir = tmp_path_factory.mktemp("runs")
    engine = Engine()
    engine.reward("colorfulness")
    demo = create_demo(lambda: engine, runs_dir=runs_dir)
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, _frontend=False, **launch_options(runs_dir=runs_dir))
    yield address
    demo.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser: Browser, models_url: str) -> Iterator[Page]:
    with desktop_page(browser, models_url) as page:
        page.get_by_role("tab", name="Models").click()
        expect(row(page, TURBO)).to_be_visible()
        yield page


def row(page: Page, key: str) -> Locator:
    return page.locator(f'#rd-models [data-key="{key}"]')


def order(page: Page, key: str, do: str) -> None:
    row(page, key).locator(f'[data-do="{do}"]').click()


def test_loaded_rewards_are_released_on_demand(page: Page) -> None:
    for said in ("Freed: colorfulness", "No reward was loaded"):
        page.locator("#rd-models-release").click()
        expect(page.get_by_text(said)).to_be_visible()


def test_everything_known_is_there_with_its_source_licence_and_size(page: Page) -> None:
    expect(page.locator("#rd-models tr[data-key]")).to_have_count(len(known().entries()))
    for model in MODELS.values():
        expect(row(page, f"model {model.name}")).to_contain_text(model.licence)
    link = row(page, TURBO).get_by_role("link")
    expect(link).to_have_attribute("href", "https://huggingface.co/stabilityai/sd-turbo")
    expect(row(page, TURBO)).to_contain_text("~4.8 GiB")
    expect(row(page, "model emoji").locator(".rd-is-here")).to_be_visible()
    assert row(page, "model emoji").locator("button").count() == 0, "what ships cannot be removed here"


def test_a_download_moves_stops_and_goes_on_with_what_was_there(page: Page, site: TinyHub) -> None:
    site.hold.set()
    order(page, TURBO, "download")
    expect(row(page, TURBO).get_by_role("progressbar")).to_be_visible()
    order(page, REWARD, "download")
    expect(row(page, REWARD)).to_contain_text("waiting for its turn")
    row(page, TURBO).locator('[data-do="stop"]').focus()
    page.wait_for_timeout(1000)  # the table is redrawn meanwhile
    expect(row(page, TURBO).locator('[data-do="stop"]')).to_be_focused()
    order(page, TURBO, "stop")
    expect(row(page, TURBO)).to_contain_text("stopping")
    site.hold.clear()
    expect(row(page, TURBO)).to_contain_text("a part is here")
    expect(row(page, REWARD).locator(".rd-is-here")).to_be_visible()
    order(page, TURBO, "download")
    expect(row(page, TURBO).locator(".rd-is-here")).to_be_visible()
    expect(row(page, TURBO).locator(".rd-m-size")).to_have_text(hub.gib_text(hub.size_on_disk(MODELS["sd-turbo"].sources[0])))


def test_a_download_goes_on_without_the_page_and_a_reload_comes_back_to_it(page: Page, site: TinyHub) -> None:
    order(page, TURBO, "ask")
    order(page, TURBO, "remove")
    expect(row(page, TURBO)).to_contain_text("not here")
    site.hold.set()
    order(page, TURBO, "download")
    expect(row(page, TURBO).get_by_role("progressbar")).to_be_visible()
    page.reload()
    expect(row(page, TURBO).get_by_role("progressbar")).to_be_visible()  # the same tab
    site.hold.clear()
    expect(row(page, TURBO).locator(".rd-is-here")).to_be_visible()


def test_a_refusal_is_said_in_its_row(page: Page) -> None:
    order(page, GATED, "download")
    expect(row(page, GATED).locator(".rd-wrong")).to_contain_text("is gated: accept its terms at https://huggingface.co/CompVis")
    expect(row(page, GATED).locator('[data-do="download"]')).to_be_visible()


def test_removing_asks_first(page: Page) -> None:
    order(page, REWARD, "ask")
    expect(row(page, REWARD)).to_contain_text("Delete the files?")
    order(page, REWARD, "keep")
    expect(row(page, REWARD).locator(".rd-is-here")).to_be_visible()
    assert hub.find_local(REWARDS["hpsv2.1"].sources[0])
    order(page, REWARD, "ask")
    order(page, REWARD, "remove")
    expect(row(page, REWARD)).to_contain_text("not here")
    assert not hub.find_local(REWARDS["hpsv2.1"].sources[0])


def test_a_phone_needs_no_sideways_scrolling(browser: Browser, models_url: str) -> None:
    page = browser.new_page(viewport=PHONE, color_scheme="dark")
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{models_url}?tab=models")
    expect(row(page, REWARD).locator('[data-do="download"]')).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.close()


def test_a_host_that_only_shows_has_no_buttons_and_takes_no_orders(site: TinyHub, tmp_path: Path) -> None:
    orders = {}
    for training in (True, False):
        demo = create_demo(lambda: None, runs_dir=tmp_path, training=training)
        table = next(block for block in demo.blocks.values() if block.elem_id == "rd-models")
        orders[training] = {event for fn in demo.fns.values() for block, event in fn.targets if block == table._id}
    assert orders == {True: {"download", "stop", "ask", "keep", "remove"}, False: set()}
    assert "<button" in page_html(Downloads()) and "<button" not in (shown := page_html(None)) and "~12.9 GiB" in shown


def test_what_people_added_is_escaped_and_a_mistake_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "registry.toml"
    monkeypatch.setenv("REWARDIV_REGISTRY", str(path))
    path.write_text('[models.mine]\nhub = "me/mine"\nabout = "<script>alert(1)</script>"\n')
    assert "&lt;script&gt;" in (shown := page_html(Downloads())) and "<script>" not in shown and "me/mine" in shown
    path.write_text("[models.mine]\nabout = '<b>'\n")
    assert "models.mine needs path or hub" in (shown := page_html(Downloads())) and 'role="alert"' in shown
