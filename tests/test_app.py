"""`python app.py`: the page is served at the address asked for, before anything heavy is loaded, and models come behind it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from rewardiv.ui import lazy_engine
from rewardiv.ui.lazy_engine import LazyEngine

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_app_serves_its_page_where_it_is_told_to() -> None:
    port = free_port()
    environment = os.environ | {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        page = fetched(f"http://127.0.0.1:{port}/", process, patience_s=180)
    finally:
        process.terminate()
        process.wait(60)
    assert "rewardiv" in page and "rd-generate" in page


def test_a_damaged_registry_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "registry.toml").write_text("[models.x\n")
    environment = os.environ | {"REWARDIV_REGISTRY": str(tmp_path / "registry.toml")}
    ended = subprocess.run([sys.executable, "app.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'registry.toml'} cannot be read")


def fetched(url: str, process: subprocess.Popen, patience_s: float) -> str:
    deadline = time.monotonic() + patience_s
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            return urllib.request.urlopen(url, timeout=60).read().decode()
        except OSError:
            time.sleep(0.5)


def test_building_the_page_needs_no_torch() -> None:
    script = (
        "import sys; from rewardiv.ui import create_demo, launch_options; create_demo(None); launch_options(); "
        "sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_the_app_fits_on_a_screen() -> None:
    assert len((ROOT / "app.py").read_text().splitlines()) < 40


def test_a_lazy_engine_is_made_once_whoever_asks() -> None:
    lazy = LazyEngine()
    assert not lazy.ready
    assert lazy() is lazy() and lazy.ready


def test_a_failing_warm_up_is_logged_and_leaves_the_engine_usable(caplog: pytest.LogCaptureFixture) -> None:
    lazy = LazyEngine()
    with caplog.at_level("WARNING", logger=lazy_engine.__name__):
        lazy.warm_up("no such model", "vivid").join()
    assert "no such model" in caplog.text and lazy.ready
