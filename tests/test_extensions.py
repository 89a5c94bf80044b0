"""What people add: read from a file or a package, checked key by key, used like the project's own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gradio as gr
import pytest
import torch

from rewardiv import extensions
from rewardiv.cli import main
from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.extensions import BUILT_IN_GAMMAS, Addition
from rewardiv.gamma import SHAPES, Clock, parse_gamma
from rewardiv.hub import Source
from rewardiv.jobs import check_settings
from rewardiv.methods import parse_method
from rewardiv.registry import find_lora, find_model, find_reward, is_here, known
from rewardiv.rewards import load_reward

ROOT = Path(__file__).resolve().parent.parent
HEADING = "## Your own models, LoRAs, rewards and γ shapes"  # of the README, from which the example is run
CURVES = """
def late(progress, start): return 1.0 if progress <= start else (1 - progress) / (1 - start)
def bump(progress): return 1 - progress + 0.2 * (0.3 < progress < 0.4)
def deep(progress): return 1 - 2 * progress
def short(progress): return 1 - 0.9 * progress
def nothing(progress): return float("nan")
def broken(progress): return 1 / 0
answer = 42
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """write(text) puts a registry file in place, beside own.py with some curves."""
    monkeypatch.setenv("REWARDIV_REGISTRY", str(tmp_path / "registry.toml"))
    (tmp_path / "own.py").write_text(CURVES)

    def put(text: str) -> Path:
        path = tmp_path / "registry.toml"
        path.write_text(text)
        return path

    return put


def test_without_a_file_nothing_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWARDIV_REGISTRY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert extensions.registry_file() is None and not extensions.load().models
    (tmp_path / "rewardiv").mkdir()
    (tmp_path / "rewardiv" / "registry.toml").write_text('[models.mine]\nhub = "me/mine@v2"\n')
    assert find_model("mine").sources == (Source("me/mine", "v2", kind="pipeline"),)


def test_additions_are_found_by_name_with_paths_from_the_files_folder(
    write: object, tmp_path: Path, tiny_model_dir: Path, tiny_lora_dir: Path,
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(tiny_model_dir)
    write(f'''
        [models.mine]
        path = "models/mine"
        licence = "MIT"
        family = "sd1"
        [loras.mine]
        path = "{tiny_lora_dir}"
        model = "mine"
        reward = "jpeg"
        [loras.far]
        hub = "me/far/far.safetensors"
    ''')
    model, lora = find_model("mine"), find_lora("mine")
    assert (model.path, model.licence, model.family) == (str(tmp_path / "models" / "mine"), "MIT", "sd1") and is_here(model)
    assert (lora.path, lora.model, lora.reward) == (str(tiny_lora_dir), "mine", "jpeg")
    assert find_model(str(tiny_model_dir)) == model, "the path of an added model means that model"
    assert find_lora("far").sources == (Source("me/far", files=("far.safetensors",)),)
    assert list(known().models)[-1] == "mine" and "emoji" in known().models
    with pytest.raises(UserError, match="did you mean 'mine'"):
        find_model("minee")


def test_a_changed_file_is_read_again(write: object) -> None:
    write('[models.one]\nhub = "me/one"\n')
    assert find_model("one")
    write('[models.other]\nhub = "me/other"\n')
    assert find_model("other")
    with pytest.raises(UserError, match="unknown model 'one'"):
        find_model("one")


def test_an_added_file_that_is_gone_is_named(write: object, tmp_path: Path) -> None:
    write('[models.mine]\npath = "gone"\n')
    with pytest.raises(UserError, match=rf"{tmp_path}/gone has no model_index\.json"):
        find_model("mine")


def test_an_added_reward_is_used_as_any_other(write: object) -> None:
    path = write('[rewards.red]\nfunction = "own.py:red"\n')
    path.with_name("own.py").write_text("def red(images, prompts): return images[:, 0].mean(dim=(1, 2))\n")
    reward, images = load_reward("red"), torch.rand(2, 3, 8, 8, requires_grad=True)
    assert torch.equal(reward(images, ["a", "b"]), images[:, 0].mean(dim=(1, 2)))
    reward(images, ["a", "b"]).sum().backward()
    assert images.grad[:, 0].eq(1 / 64).all() and not images.grad[:, 1:].any()
    path.with_name("own.py").write_text("def red(images, prompts): return images.mean(dim=(2, 3))  # three numbers an image\n")
    with pytest.raises(UserError, match=r"rewards\.red: the rewards of 2 images are a tensor of shape \[2, 3\]; return"):
        load_reward("red")(images, ["a", "b"])


def test_an_added_gamma_is_parsed_evaluated_and_written_like_the_others(write: object) -> None:
    write('[gammas.late]\nfunction = "own.py:late"\nparameters = { F = [0.0, 0.95] }\n')
    gamma, clock = parse_gamma(" Late:0.4@nemo "), Clock.of_steps(11)
    assert str(gamma) == "late:0.4@nemo" and parse_gamma(str(gamma)) == gamma != parse_gamma("late:0.5@nemo")
    assert (gamma(1.0), gamma(0.7), gamma(0.0)) == (1.0, 1.0, 0.0)
    assert gamma(0.3) == pytest.approx(0.5) and gamma.at(clock, 0) == 1
    assert str(parse_method("aig:late:0.4")) == "aig:late:0.4"
    assert [term.weight for term in parse_method("aig:late:0.4").terms(clock, 7)] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("text", "said"), [
    ("late", "late' is written late:F; numbers given: 0"), ("late:0.96", "F = 0.96 in gamma late:F is outside 0 to 0.95"),
    ("bump", r"at progress 0\.30\d+ gamma 'bump' is 0\.\d+, after 0\.\d+; it may only fall"),
    ("deep", r"at progress 0\.50\d+ gamma 'deep' is -0\.0\d+; it must lie in 0 to 1"),
    ("short", "at progress 1 gamma 'short' is 0.1; it must be 0 there"), ("nothing", "is nan; it must lie in 0 to 1"),
    ("broken", "fails at progress 0: ZeroDivisionError"), ("lat:1", "did you mean 'late'"),
    ("absent", r"registry\.toml: gammas\.absent: cannot import 'own\.py:absent'"),
    ("answer", "'own.py:answer' is 42, not a function"), ("lost", "cannot import 'no_such_module:f'"),
])
def test_a_gamma_that_breaks_the_rules_is_refused_with_the_offending_point(write: object, text: str, said: str) -> None:
    names = ("bump", "deep", "short", "nothing", "broken", "absent", "answer")
    tables = "".join(f'[gammas.{name}]\nfunction = "own.py:{name}"\n' for name in names)
    write(f'{tables}[gammas.lost]\nfunction = "no_such_module:f"\n'
          '[gammas.late]\nfunction = "own.py:late"\nparameters = { F = [0.0, 0.95] }\n')
    with pytest.raises(UserError, match=said) as caught:
        parse_gamma(text)
    assert "\n" not in str(caught.value)


def test_the_projects_own_gammas_cannot_be_replaced() -> None:
    assert BUILT_IN_GAMMAS == set(SHAPES)


@pytest.mark.parametrize(("text", "said"), [
    ("[models.x]\nhub = a/b\n", r"registry\.toml cannot be read: .*line 2"), ("models = 3", r"models must be tables such as"),
    ("[model.x]\nhub = 'a/b'", r"unknown table \[model\]; did you mean 'models'"),
    ("[models]\nx = 'a/b'", r"models\.x must be a table with path or hub, got 'a/b'"),
    ("[models.x]\nhubb = 'a/b'", r"models\.x: unknown key 'hubb'; did you mean 'hub'"),
    ("[models.x]\nhub = 3", r"models\.x\.hub is 3; it must be text"), ("[models.x]\nhub = ''", "it must be text"),
    ("[models.x]\nhub = 'a'", r"models\.x\.hub is 'a'; write owner/name"), ("[models.x]\nabout = 'a'", "needs path or hub"),
    ("[models.x]\nhub = 'a/b'\npath = 'c'", "only one of them"), ("[models.'a b']\nhub = 'a/b'", "must be made of letters"),
    ("[models.emoji]\nhub = 'a/b'", r"models\.emoji: the project itself has 'emoji'"),
    ("[rewards.x]\nfunction = 'f'", r"rewards\.x\.function is 'f'; write module:function or file\.py:function"),
    ("[gammas.Late]\nfunction = 'a:b'", "made of small letters"), ("[gammas.power]\nfunction = 'a:b'", "itself has 'power'"),
    ("[gammas.x]\nfunction = 'a:b'\nparameters = 3", r"gammas\.x\.parameters must name ranges such as"),
    ("[gammas.x]\nfunction = 'a:b'\nparameters = { P = [2, 1] }", "must name ranges"),
])
def test_a_wrong_file_is_refused_with_the_file_and_the_key(write: object, text: str, said: str) -> None:
    path = write(text)
    with pytest.raises(UserError, match=said) as caught:
        known()
    assert str(path) in str(caught.value)


def test_a_file_that_is_named_and_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARDIV_REGISTRY", "/nowhere/registry.toml")
    with pytest.raises(UserError, match="REWARDIV_REGISTRY names /nowhere/registry.toml, and there is no such file"):
        find_model("emoji")


def test_a_function_itself_may_stand_in_a_packages_tables() -> None:
    assert Addition("x", {"function": max}, "a package", None).function() is max


def test_the_pages_offer_what_was_added_and_keep_its_curves_as_they_are_typed(write: object) -> None:
    from rewardiv.config import SampleConfig
    from rewardiv.ui.form import Form
    from rewardiv.ui.train_fields import visible_fields
    from rewardiv.ui.train_form import values_of

    write('[models.mine]\nhub = "me/mine"\n[rewards.red]\nfunction = "own.py:late"\n'
          '[gammas.late]\nfunction = "own.py:late"\nparameters = { F = [0.0, 0.95] }\n')
    form = Form.of(SampleConfig(methods=("base", "aig:late:0.4", "anneal-lora:cosine")))
    assert (form.gamma, form.extra_methods) == ("cosine", "aig:late:0.4"), "the editor draws the project's own curves only"
    with gr.Blocks():
        fields = visible_fields(values_of(TrainConfig(output_dir="x")))
    assert ("mine", "mine") in fields["model"].choices and ("red", "red") in fields["rewards"].choices


def test_training_on_what_is_not_here_is_refused_at_the_start(write: object) -> None:
    write('[models.mine]\nhub = "me/mine"\n')
    with pytest.raises(UserError, match="mine .me/mine. isn't on this machine.*download mine"):
        check_settings(TrainConfig(output_dir="x", model="mine"))


# --- packages

def make_package(folder: Path, entry: str, code: str) -> None:
    """An installed package `mine` with an entry point, and what is in its module."""
    info = folder / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[rewardiv]\nadded = {entry}\n")
    (folder / "mine_additions.py").write_text(code)


def test_an_installed_package_adds_the_same_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object) -> None:
    tables = {"models": {"theirs": {"hub": "me/theirs"}}, "gammas": {"late": {"function": "mine_additions:late",
                                                                             "parameters": {"F": [0, 0.9]}}}}
    make_package(tmp_path / "site", "mine_additions:TABLES", f"TABLES = {tables!r}\n{CURVES}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    write('[models.mine]\nhub = "me/mine"\n')
    assert {"mine", "theirs"} < set(known().models)
    assert parse_gamma("late:0.5")(0.25) == pytest.approx(0.5)
    write('[models.theirs]\nhub = "me/mine"\n')
    with pytest.raises(UserError, match=r"models\.theirs: the name is taken by package mine, entry point added"):
        known()


@pytest.mark.parametrize(("entry", "said"), [
    ("mine_additions:GONE", r"package mine: its entry point 'added = mine_additions:GONE' cannot be loaded \(AttributeError"),
    ("mine_additions:TABLES", "is 3, not a dict of tables"),
    ("mine_additions:WRONG", r"package mine, entry point added: unknown table \[x\]"),
])
def test_a_wrong_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, said: str) -> None:
    make_package(tmp_path / "site", entry, "TABLES = 3\nWRONG = {'x': {}}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "mine_additions", raising=False)
    with pytest.raises(UserError, match=said):
        known()


def test_a_mistake_in_the_file_is_one_sentence_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "registry.toml").write_text("[models.x]\nabout = 'nothing else'\n")
    environment = os.environ | {"REWARDIV_REGISTRY": str(tmp_path / "registry.toml")}
    done = subprocess.run([sys.executable, "-m", "rewardiv", "list"], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {tmp_path}/registry.toml")


# --- the README's example

def example() -> dict[str, str]:
    """The blocks of the README's section by the name in their first line."""
    section = (ROOT / "README.md").read_text().partition(HEADING)[2].partition("\n## ")[0]
    return {name: text for name, text in re.findall(r"^```\w+\n# ([\w./]+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)}


def test_the_readmes_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model_dir: Path,
    tiny_lora_dir: Path,
) -> None:
    blocks = example()
    for name in ("registry.toml", "own.py"):
        (tmp_path / name).write_text(blocks[name])
    for folder in ("models", "loras"):
        (tmp_path / folder).mkdir()
    (tmp_path / "models" / "portraits").symlink_to(tiny_model_dir)
    (tmp_path / "loras" / "bright.safetensors").symlink_to(tiny_lora_dir / "pytorch_lora_weights.safetensors")
    monkeypatch.chdir(tmp_path)
    for command in blocks["run"].replace("\\\n", " ").strip().splitlines():
        variable, *words = shlex.split(command)
        monkeypatch.setenv(*variable.split("="))
        assert words[:3] == ["python", "-m", "rewardiv"] and main(words[3:]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("portraits", "bright", "brightness", "late", "aig:late:0.4"))
    assert is_here(find_model("portraits")) and find_lora("bright").model == "portraits"
    assert find_reward("brightness").about == "mean brightness of the picture"
    assert (tmp_path / "out" / "own" / "grid.png").is_file()
