"""Laws of the Training tab without a browser: form and settings, run folders whole or damaged, what a look sends."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from urllib.parse import unquote

import gradio as gr
import pytest

from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.generate import Engine
from rewardiv.jobs import read_job, train_command
from rewardiv.registry import ROOT
from rewardiv.train_presets import TRAIN_PRESETS
from rewardiv.ui import create_demo
from rewardiv.ui.train_apply import apply_config, apply_method
from rewardiv.ui.train_form import COMPOSED, DIRECT, LABELS, OWN, config_of, free_name, preset_values, run_name, values_of
from rewardiv.ui.train_list import list_html, span_text, state_html
from rewardiv.ui.train_plots import plots_html, verdict_html, verdict_of
from rewardiv.ui.train_probe import viewer_value
from rewardiv.ui.train_run import RunData, log_end, read_run, rising
from rewardiv.ui.train_screen import NOTHING, Site, TrainScreen, Watch, build_screen, look

RunWriter = Callable[..., Path]
EVIL = '"><script>alert(1)</script>'


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "runs").mkdir()
    return Site(tmp_path / "runs", demo=False)


@pytest.fixture
def screen() -> TrainScreen:
    with gr.Blocks():
        return build_screen(False, gr.Timer(active=False))[0]


def opened(folder: Path) -> RunData:
    return read_run(read_job(folder))


# --- form

def test_every_setting_has_a_field_and_every_field_a_label() -> None:
    assert set(DIRECT) | set(COMPOSED) == {field.name for field in fields(TrainConfig)}
    assert set(LABELS) == set(DIRECT) | set(OWN)
    config = create_demo(None).get_config_file()
    ids = {part["props"].get("elem_id") for part in config["components"]}
    assert {f"rd-t-{name}" for name in LABELS} <= ids


@pytest.mark.parametrize("settings", [
    {},
    {"rewards": ("calm", "clip=0.5"), "probe_rewards": ("vivid",), "kl_weight": 1.0},
    {"path_kl_weight": 0.1, "lora_norm_weight": 0.01, "path_kl_steps": 3, "algorithm": "draft-lv"},
    {"lora_alpha": 4.0, "checkpoints_total_limit": 2, "lora_targets": "to_q,to_v", "gradient_checkpointing": True},
    {"learning_rate": 2.5e-4, "guidance_scale": 1.0, "device": "cuda:1", "mixed_precision": "fp16", "ema_decay": 0.99},
])
def test_settings_survive_the_form(settings: dict, tmp_path: Path) -> None:
    config = TrainConfig(output_dir=str(tmp_path / "a-run"), **settings)
    assert config_of(values_of(config), tmp_path) == config


def test_numbers_arrive_as_browsers_send_them(tmp_path: Path) -> None:
    sent = {"rank": 8.0, "learning_rate": 1, "lora_alpha": "4.5", "prompts_file": None}
    config = config_of(values_of(TrainConfig(output_dir="x")) | sent, tmp_path)
    assert config.rank == 8 and isinstance(config.rank, int) and config.lora_alpha == 4.5 and config.prompts_file == ""


@pytest.mark.parametrize("name", list(TRAIN_PRESETS))
def test_a_preset_fills_the_form_with_its_settings_and_leaves_name_model_and_rewards(name: str, tmp_path: Path) -> None:
    before = values_of(TrainConfig(output_dir="mine", rewards=("calm",), seed=7))
    config = config_of(before | preset_values(name), tmp_path)
    assert config.rewards == ("calm",) and config.seed == 7 and Path(config.output_dir).name == "mine"
    assert {key: getattr(config, key) for key in TRAIN_PRESETS[name].settings} == TRAIN_PRESETS[name].settings


@pytest.mark.parametrize(("change", "said"), [
    ({"name": " "}, "no name"),
    ({"name": "../etc"}, "can't be called"),
    ({"name": ".hidden"}, "can't be called"),
    ({"rewards": []}, "no reward"),
    ({"rewards": ["vivd"]}, "vivid"),
    ({"rewards": ["vivid", "calm"], "weights": "1"}, "2 rewards and 1 weights"),
    ({"rewards": ["vivid", "calm"], "weights": "1, x"}, "calm=x"),
    ({"rewards": "vivid"}, "list of names"),
    ({"model": "emojy"}, "emoji"),
    ({"max_train_steps": None}, "max_train_steps"),
    ({"lora_alpha": "big"}, "number or empty"),
    ({"checkpoints_total_limit": "2.5"}, "whole number"),
    ({"grad_steps": 11}, "inference steps"),
    ({"regulariser": "kll"}, "did you mean 'kl'"),
    ({"regulariser": "kl", "more_regularisers": "kl=2"}, "twice"),
    ({"more_regularisers": "path-kl"}, "path-kl=0.1"),
    ({"prompts_file": "/no/such/file"}, "prompts"),
    ({"prompts_file": "emoji-compsed"}, "did you mean 'emoji-composed'"),
    ({"device": "cpu", "mixed_precision": "fp16"}, "CUDA"),
])
def test_a_mistake_in_the_form_is_one_sentence(change: dict, said: str, tmp_path: Path) -> None:
    values = values_of(TrainConfig(output_dir="x")) | change
    with pytest.raises(UserError, match=re.escape(said)) as error:
        config_of(values, tmp_path)
    assert "\n" not in str(error.value)


def test_names_of_runs_stay_inside_their_folder(tmp_path: Path) -> None:
    (tmp_path / "vivid-1").mkdir()
    assert free_name(tmp_path, "vivid") == "vivid-2"
    assert run_name(free_name(tmp_path, "/some/../reward model")) == "reward-model-1"


# --- run folders

def test_the_list_shows_each_run_with_its_numbers(write_run: RunWriter) -> None:
    runs = [opened(write_run("one", kl_weight=2.0)), opened(write_run("two", done=10, state="stopped"))]
    page = list_html(runs, "two", {"one"}, demo=False)
    assert page.count("data-run=") == 2 and page.count("checked") == 1 and page.count("aria-current") == 1
    assert "kl 2" in page and "20 / 20" in page and ">12<" in page and ">0.5<" in page and "stopped" in page


def test_the_list_shows_the_rewards_of_a_mixture_on_their_own_scales(write_run: RunWriter) -> None:
    run = opened(write_run("one", rewards=("jpeg", "vivid")))
    last = run.steps[-1] | {"reward_mean": 0.125, "rewards": {"jpeg": -2.5, "vivid": 8.25}}
    page = list_html([replace(run, steps=(last,))], "one", set(), demo=False)
    assert "-2.5, 8.25" in page and "0.125" not in page


def test_what_people_and_files_say_is_text_and_never_markup(write_run: RunWriter) -> None:
    folder = write_run("evil", state="failed")
    (folder / "control.json").write_text(json.dumps({"name": EVIL}))
    state = json.loads((folder / "state.json").read_text())
    state |= {"message": EVIL}
    state["settings"] |= {"model": EVIL, "rewards": [EVIL]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "events.jsonl").write_text(json.dumps({"step": 1, "kind": "rollback", "text": EVIL}) + "\n")
    run = opened(folder)
    page = list_html([run], "evil", (), demo=False) + state_html(run) + verdict_html(run, verdict_of(run))
    assert "<script" not in page and page.count("&lt;script&gt;") >= 5


@pytest.mark.parametrize(("file", "content", "said"), [
    ("metrics.jsonl", b'{"step": 1}\nnot json\n{"step": 2}\n', "metrics.jsonl is damaged"),
    ("metrics.jsonl", b'[1]\n{"step": "x"}\n{"step": 3}\n{"step": 4}\n', "metrics.jsonl is damaged"),
    ("probes.jsonl", b"\xff\xfe\n{}\n{}\n", "probes.jsonl is damaged"),
    ("probes.jsonl", b'{"step": 0}\n{"step": 10}\n', "record 1 lacks"),
    ("probes.jsonl", b'{"step": "x"}\n', "probes.jsonl is damaged"),
    ("events.jsonl", b'{"step": 1}\n', "record 1 lacks"),
    ("config.json", b"{", "config.json is damaged"),
    ("config.json", b"[]", "config.json is damaged"),
    ("state.json", b"{", "Lost"),
    ("state.json", b'{"state": "dancing"}', "Lost"),
    ("control.json", b"[]", ""),
    ("log.txt", b"\xff\xff", ""),
])
def test_a_damaged_folder_leaves_gaps_and_no_error(
    write_run: RunWriter, site: Site, screen: TrainScreen, file: str, content: bytes, said: str
) -> None:
    (write_run("whole") / "log.txt").unlink()
    (write_run("bad") / file).write_bytes(content)
    updates = look(site, screen, NOTHING | {"run": "bad"}, Watch())
    assert updates[screen.runs].count("data-run=") == 2 and said in updates[screen.state]


def test_steps_that_were_rolled_back_are_forgotten() -> None:
    assert [record["step"] for record in rising([{"step": s} for s in (1, 2, 3, 4, 2, 3)])] == [1, 2, 3]


def test_the_end_of_a_log_is_short_and_shows_a_bar_once(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("x" * 100_000 + "\nfirst\n 10%|#\r 20%|##\r 30%|###\nlast\n")
    assert log_end(tmp_path).splitlines()[-3:] == ["first", " 30%|###", "last"] and len(log_end(tmp_path)) < 10_000


def test_a_lost_run_says_so_with_its_last_log_line(write_run: RunWriter) -> None:
    folder = write_run("gone", done=10, state="running")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"heartbeat": 1.0}))
    (folder / "log.txt").write_text("fine\nout of memory\n")
    run = opened(folder)
    assert "out of memory" in state_html(run) and "Lost" in state_html(run)
    assert "out of memory" in list_html([run], None, (), demo=False)


# --- looking

def test_a_second_look_sends_nothing_and_a_change_sends_only_what_changed(
    write_run: RunWriter, site: Site, screen: TrainScreen
) -> None:
    folder = write_run("one")
    watch = Watch()
    first = look(site, screen, NOTHING, watch)
    assert {screen.runs, screen.state, screen.plots, screen.viewer, screen.verdict, screen.log} <= set(first)
    assert look(site, screen, NOTHING, watch) == {screen.runs: gr.skip()}
    (folder / "log.txt").write_text("09:00:00 started\nanother line\n")
    assert set(look(site, screen, NOTHING, watch)) == {screen.runs, screen.log}
    assert set(look(site, screen, NOTHING, Watch())) == set(first)  # a page that was loaded again gets everything


def test_the_open_run_is_the_one_asked_for_else_the_running_else_the_newest(write_run: RunWriter, site: Site) -> None:
    assert site.chosen(NOTHING) is None
    write_run("old")
    write_run("runs", done=10, state="running")
    write_run("new")
    assert site.chosen(NOTHING).name == "runs"
    assert site.chosen(NOTHING | {"run": "old"}).name == "old"
    for junk in ("../old", "gone", ["old"], 7):
        assert site.chosen(NOTHING | {"run": junk if not isinstance(junk, list) else None}).name == "runs"


def test_buttons_fit_the_state(write_run: RunWriter, site: Site, screen: TrainScreen) -> None:
    def shown(state: str) -> set[str]:
        write_run(state, done=10, state=state)
        updates = look(site, screen, NOTHING | {"run": state}, Watch())
        return {name for name, button in screen.buttons.items() if updates.get(button, {}).get("visible")}

    assert shown("running") == {"pause", "save", "probe", "stop"}
    assert shown("paused") == {"resume", "save", "probe", "stop"}
    assert shown("failed") == {"restart", "delete"}
    assert shown("done") == {"delete"}


def test_without_runs_the_page_invites_to_start_one(site: Site, screen: TrainScreen, tmp_path: Path) -> None:
    assert "Start training" in look(site, screen, NOTHING, Watch())[screen.runs]
    nowhere = Site(tmp_path / "missing", demo=True)
    assert "command at home" in look(nowhere, screen, NOTHING, Watch())[screen.runs]


def test_prepared_runs_are_in_order_of_their_names_and_others_newest_first(write_run: RunWriter, site: Site) -> None:
    for name in ("b", "a", "c"):
        write_run(name)
    assert [job.name for job in replace(site, demo=True).jobs()] == ["a", "b", "c"]
    assert site.jobs()[0].name == "c"


def test_overlaid_runs_are_in_every_plot(write_run: RunWriter, site: Site) -> None:
    one, two = opened(write_run("one")), opened(write_run("two", kl_weight=1.0))
    alone, both = plots_html(one, [], verdict_of(one)), plots_html(one, [two], verdict_of(one))
    for few, many in zip(alone, both, strict=True):
        assert few.count("<svg") == many.count("<svg") >= 2
        assert many.count(">two<") == many.count("<svg") and ">two<" not in few
    assert "collapse onset" in alone[0]


def test_looking_at_runs_needs_no_torch(write_run: RunWriter) -> None:
    """It happens in a thread of its own while the models are still on their way; two at once break such imports."""
    script = (
        "import sys; from rewardiv.jobs import read_job; from rewardiv.ui.train_run import read_run; "
        "from rewardiv.ui.train_plots import plots_html, verdict_of; run = read_run(read_job(sys.argv[1])); "
        "verdict = verdict_of(run); plots_html(run, [], verdict); "
        "sys.exit(verdict.onset != 10 or bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script, str(write_run("one"))], cwd=ROOT, check=False).returncode == 0


# --- probes

def test_the_verdict_names_the_onset_and_the_best_checkpoint_with_buttons(write_run: RunWriter) -> None:
    run = opened(write_run("one"))
    verdict = verdict_of(run)
    page = html.unescape(verdict_html(run, verdict))
    assert verdict.onset == 10 and 'data-show-step="10"' in page and "diversity fell" in page
    assert verdict.best in run.checkpoints and f"Best trade-off: step {verdict.best}" in page


def test_every_probe_has_an_address_and_the_checkpoint_that_stands_for_it(write_run: RunWriter) -> None:
    folder = write_run("a run")
    probes = json.loads(viewer_value(opened(folder)))["probes"]
    assert [(probe["step"], probe["checkpoint"]) for probe in probes] == [(0, 0), (10, 0), (20, 20)]
    path = unquote(probes[1]["url"].removeprefix("gradio_api/file=").partition("?")[0])
    assert Path(path) == folder / "probes/step-10/grid.png"
    assert viewer_value(None) == ""


def test_a_method_is_drawn_with_the_checkpoint(write_run: RunWriter, engine: Engine) -> None:
    run = opened(write_run("one"))
    config = apply_config(run, 10, " aig:power_2.0 ", "a cat face", 2)
    assert config.methods == ("base", "finetuned", "aig:power:2") and config.lora.endswith("step-0")
    assert config.num_inference_steps == 2 and config.rewards == ("colorfulness",)
    *_, page = apply_method(lambda: engine, run, 20, "base", "a cat face", 3)
    assert page.count("data:image/png") == 2 * 3 and "checkpoint of step 20" in page and "rd-done" in page
    *_, page = apply_method(lambda: engine, run, 20, "aigg:linear", "a cat face", 2)
    assert "did you mean" in html.unescape(page) and "rd-failed" in page


# --- hosts that don't train

def test_where_training_is_off_there_is_no_button_for_it_and_the_command_is_shown(tmp_path: Path) -> None:
    config = create_demo(None, runs_dir=tmp_path, training=False).get_config_file()
    by_id = {part["props"].get("elem_id"): part for part in config["components"]}
    rows = {part["id"]: part["props"].get("visible", True) for part in config["components"]}

    def hidden(tree: dict, inside: bool, found: dict[int, bool]) -> dict[int, bool]:
        inside = inside or not rows.get(tree["id"], True)
        found[tree["id"]] = inside
        for child in tree.get("children", ()):
            hidden(child, inside, found)
        return found

    found = hidden(config["layout"], False, {})
    assert all(found[by_id[name]["id"]] for name in ("rd-start", "rd-estimate"))
    assert not {f"rd-run-{name}" for name in ("stop", "delete", "restart", "rename", "pause", "save", "probe")} & set(by_id)
    assert by_id["rd-train-command"]["props"]["value"].startswith("python -m rewardiv train --output-dir runs/")


def test_the_command_shown_is_the_one_that_runs(tmp_path: Path) -> None:
    config = config_of(values_of(TrainConfig(output_dir="a b", rewards=("vivid", "clip=0.5"))), tmp_path)
    assert train_command(config)[4:6] == ["--output-dir", str(tmp_path / "a b")] and "clip=0.5" in train_command(config)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (90, "90 s"), (150, "2.5 min"), (9000, "2.5 h"), (400_000, "4.6 days")]
)
def test_spans_of_time_are_short(seconds: float, text: str) -> None:
    assert span_text(seconds) == text
