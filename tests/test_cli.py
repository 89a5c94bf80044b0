"""Laws of the command line: commands do what they say, mistakes are one sentence and exit code 2, startup is light."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from rewardiv import registry
from rewardiv.cli import build_parser, main
from rewardiv.cli_training import TRAIN_HELP, TRAIN_OPTIONS, duration, train_config
from rewardiv.config import ALGORITHMS, SampleConfig, TrainConfig
from rewardiv.export import read_settings
from rewardiv.jobs import flag_of
from rewardiv.train_presets import TRAIN_PRESETS


@pytest.fixture
def clip_as_built_in(monkeypatch: pytest.MonkeyPatch, tiny_clip_dir: Path) -> None:
    """The tiny CLIP stands where the built-in one does, as reward and as features."""
    monkeypatch.setitem(registry.REWARDS, "clip", replace(registry.REWARDS["clip"], path=str(tiny_clip_dir)))
    monkeypatch.setattr("rewardiv.generate.FEATURES_PATH", str(tiny_clip_dir))


@pytest.fixture
def small(tiny_model_dir: Path, tiny_lora_dir: Path) -> list[str]:
    names = ["--model", str(tiny_model_dir), "--lora", str(tiny_lora_dir)]
    return [*names, "--num-inference-steps", "2", "--device", "cpu"]


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one sentence with which the words are refused."""
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_importing_the_command_line_is_light() -> None:
    heavy = "('torch', 'diffusers', 'transformers', 'gradio', 'matplotlib', 'PIL')"
    code = f"import sys, rewardiv.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_command_prints_help() -> None:
    done = subprocess.run([sys.executable, "-m", "rewardiv"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("list", "sample", "score", "train", "runs", "pretrain", "bench"))


def test_sample_writes_the_promised_files(small: list[str], tmp_path: Path, clip_as_built_in: None,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["sample", *small, "--prompt", "a cat face", "--seeds", "0-2,9", "--method", "base",
             "--method", "aig:power:2", "--guidance-scale", "3", "--reward", "clip",
             "--reward", "colorfulness", "--output-dir", str(out)]
    assert main(words) == 0
    assert "grid.png" in capsys.readouterr().out
    found = json.loads((out / "report.json").read_text())
    assert list(found["methods"]) == ["base", "aig:power:2"]
    assert found["methods"]["base"]["scd"]["value"] == 0
    assert len(found["methods"]["aig:power:2"]["rewards"]["colorfulness"]) == 4
    assert {path.stem for path in (out / "images" / "aig-power-2").iterdir()} == {"0", "1", "2", "9"}
    assert read_settings(out / "grid.png").seeds == (0, 1, 2, 9)

    assert main([*words[:-1], str(tmp_path / "again")]) == 0
    for picture in out.rglob("images/*/*.png"):
        assert picture.read_bytes() == (tmp_path / "again" / picture.relative_to(out)).read_bytes()


def test_scoring_the_saved_pictures_gives_the_reported_rewards(small: list[str], tmp_path: Path, clip_as_built_in: None,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["sample", *small, "--prompt", "a face", "--seeds", "4-5", "--method", "finetuned", "--reward", "clip",
                 "--output-dir", str(out)]) == 0
    capsys.readouterr()
    pictures = [str(out / "images" / "finetuned" / f"{seed}.png") for seed in (4, 5)]
    words = ["score", "--model", small[1], "--reward", "clip", "--prompt", "a face", "--device", "cpu"]
    assert main([*words, *pictures]) == 0
    scored = json.loads(capsys.readouterr().out)
    reported = json.loads((out / "report.json").read_text())["methods"]["finetuned"]["rewards"]["clip"]
    assert scored["rewards"]["clip"] == pytest.approx(reported, abs=1e-5)
    assert scored["images"] == pictures and scored["preprocessing"] == "differentiable" and scored["versions"]["torch"]
    assert main([*words, "--official", *pictures]) == 0
    official = json.loads(capsys.readouterr().out)
    assert official["preprocessing"] == "official"
    assert official["rewards"]["clip"] == pytest.approx(reported, abs=0.02) and official["rewards"] != scored["rewards"]


def test_score_takes_images_of_any_size_and_kind(tmp_path: Path, small: list[str],
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.jpg", quality=95)
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (7, 5), 128).save(tmp_path / "grey.png")
    names = [str(tmp_path / name) for name in ("red.jpg", "clear.png", "grey.png")]
    assert main(["score", "--model", small[1], "--reward", "colorfulness", "--prompt", "x", *names]) == 0
    red, clear, grey = json.loads(capsys.readouterr().out)["rewards"]["colorfulness"]
    assert red > 50 and clear == pytest.approx(0, abs=1e-2) and grey == pytest.approx(0, abs=1e-2)


def test_list_tells_where_everything_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    rows = {(row["kind"], row["name"]): row for row in json.loads(capsys.readouterr().out)}
    assert rows[("reward", "colorfulness")]["here"] is True
    assert rows[("lora", "vivid")]["reward"] == "vivid" and rows[("model", "emoji")]["path"] == "checkpoints/emoji"
    assert main(["list"]) == 0
    assert "colorfulness" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "ag:power:2"], "'aig'"),
        (["--method", "aig:powr:2"], "'power'"),
        (["--method", "aig:knots:0=1,0.2=0.1,0.5=0.4,1=0"], "rises"),
        (["--model", "emojy"], "'emoji'"),
        (["--lora", "vivd"], "'vivid'"),
        (["--reward", "colorfullness"], "'colorfulness'"),
        (["--prompt", " "], "prompt is empty"),
        (["--seeds", "0-x"], "'0-x'"),
        (["--num-inference-steps", "0"], "1 to 1000"),
        (["--num-inference-steps", "two"], "two"),
        (["--guidance-scale", "31"], "30"),
        (["--guidance-rescale", "1.5"], "0 (off) to 1"),
        (["--scheduler", "ddmi"], "'ddim'"),
        (["--height", "100"], "multiple of 8, such as 96"),
        (["--width", "wide"], "wide"),
        (["--device", "tpu"], "tpu"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--dtype", "float8"], "float8"),
        (["--sedes", "1"], "--sedes"),
    ],
)
def test_sample_refuses_mistakes_in_one_sentence(words: list[str], said: str, small: list[str], tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, ["sample", *small, "--output-dir", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_holds_something_is_refused_before_anything_loads(
        small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr("rewardiv.generate.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert "exists already" in refused(capsys, ["sample", *small, "--output-dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_lora_for_another_model_is_refused(small: list[str], wide_model_dir: Path, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", *small, "--model", str(wide_model_dir), "--seeds", "0", "--output-dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert "made for" in capsys.readouterr().err.splitlines()[-1]  # after the bars of the loading libraries


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reward", "vivd", "--prompt", "x", "a.png"], "'vivid'"),
        (["--reward", "colorfulness", "--prompt", "", "a.png"], "prompt is empty"),
        (["--reward", "colorfulness", "--prompt", "x", "none.png"], "none.png"),
        (["--reward", "colorfulness", "--prompt", "x"], "IMAGE"),
        (["--model", "emojy", "--reward", "colorfulness", "--prompt", "x", "a.png"], "'emoji'"),
    ],
)
def test_score_refuses_mistakes_in_one_sentence(words: list[str], said: str, small: list[str],
                                                capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, ["score", "--model", small[1], *words])


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "smaple" in refused(capsys, ["smaple"])


def test_unexpected_errors_keep_their_traceback(small: list[str], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("rewardiv.generate.load_model", broken)
    with pytest.raises(ZeroDivisionError):
        main(["sample", *small, "--seeds", "0", "--output-dir", str(tmp_path / "out")])


def train_settings(*words: str) -> TrainConfig:
    return train_config(build_parser().parse_args(["train", "--output-dir", "x", "--device", "cpu", *words]))


def test_train_has_an_option_for_each_setting_and_its_defaults_are_the_settings_defaults() -> None:
    assert set(TRAIN_HELP) == {field.name for field in fields(TrainConfig)}
    assert train_settings() == TrainConfig("x")
    assert train_settings("--lora-alpha", "4", "--grad-steps", "2") == TrainConfig("x", lora_alpha=4.0, grad_steps=2)
    several = ["--reward", "vivid=0.5", "--reward", "clip", "--probe-reward", "calm", "--gradient-checkpointing"]
    assert train_settings(*several) == TrainConfig(
        "x", rewards=("vivid=0.5", "clip"), probe_rewards=("calm",), gradient_checkpointing=True)


def test_paths_count_from_where_the_command_was_given_and_a_restart_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine/model", "mine/reward", "emoji", "vivid"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "prompts.txt").write_text("a cat")
    monkeypatch.chdir(tmp_path)
    paths = ("--model", "mine/model", "--prompts-file", "prompts.txt", "--reward", "mine/reward=0.5", "--probe-reward", "mine")
    assert train_settings(*paths) == TrainConfig(
        "x", model=f"{tmp_path}/mine/model", prompts_file=f"{tmp_path}/prompts.txt", rewards=(f"{tmp_path}/mine/reward=0.5",),
        probe_rewards=(f"{tmp_path}/mine",))
    names = ("--model", "emoji", "--reward", "vivid", "--reward", "clip:ViT-B-32:openai")
    assert train_settings(*names) == TrainConfig("x", model="emoji", rewards=("vivid", "clip:ViT-B-32:openai"))


def test_options_win_over_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    preset = TRAIN_PRESETS["draft-sdxl"].settings
    plain = train_settings("--preset", "draft-sdxl")
    assert all(getattr(plain, name) == value for name, value in preset.items()) and plain.output_dir == "x"
    changed = train_settings("--preset", "draft-sdxl", "--rank", "2", "--no-gradient-checkpointing", "--reward", "calm")
    assert changed == replace(plain, rank=2, gradient_checkpointing=False, rewards=("calm",))
    assert "'draft-sdxl'" in refused(capsys, ["train", "--output-dir", "x", "--preset", "draft-sdlx"])


def test_train_help_tells_of_each_option_algorithm_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert all(flag_of(name) in said for name in TRAIN_HELP) and all(f"\n{group}:\n" in said for group in TRAIN_OPTIONS)
    assert all(f"\n  {name}" in said for name in (*ALGORITHMS, *TRAIN_PRESETS))


@pytest.fixture
def tiny_training(small: list[str], tmp_path: Path) -> list[str]:
    """Words of `train` for a run of two steps in tmp_path/run."""
    (tmp_path / "prompts.txt").write_text("a cat\na face\n")
    return ["train", "--model", small[1], "--reward", "colorfulness", "--prompts-file", str(tmp_path / "prompts.txt"),
            "--device", "cpu", "--max-train-steps", "2", "--train-batch-size", "2", "--probe-every", "0",
            "--num-inference-steps", "2", "--rank", "2", "--output-dir", str(tmp_path / "run")]


def test_train_makes_a_lora_that_sample_takes_and_a_run_that_runs_lists(
        small: list[str], tiny_training: list[str], tmp_path: Path, clip_as_built_in: None,
        capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(tiny_training) == 0
    assert f"{run}: trained 2 steps on colorfulness" in capsys.readouterr().out
    assert (run / "pytorch_lora_weights.safetensors").is_file()
    assert main(["runs", "--runs-dir", str(tmp_path), "--json"]) == 0
    [job] = json.loads(capsys.readouterr().out)
    assert (job["name"], job["state"], job["step"], job["folder"]) == ("run", "done", 2, str(run))
    sample = ["sample", *small, "--lora", str(run), "--seeds", "0", "--method", "finetuned", "--output-dir", str(out)]
    assert main(sample) == 0
    capsys.readouterr()
    assert "exists already" in refused(capsys, tiny_training)
    assert main([*tiny_training, "--max-train-steps", "3", "--resume-from-checkpoint", "latest"]) == 0


def test_a_run_that_is_stopped_in_its_terminal_ends_with_130_and_a_checkpoint(
        tiny_training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ctrl_c = partial(os.kill, os.getpid(), signal.SIGINT)
    monkeypatch.setattr("rewardiv.supervisor.append_text", lambda _, text: "step 1/" in text and ctrl_c())
    assert main([*tiny_training, "--max-train-steps", "90"]) == 130
    assert "--resume-from-checkpoint latest" in capsys.readouterr().err
    [step] = [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir() if folder.name != "step-0"]
    assert step == "step-1" and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_estimate_says_what_a_run_takes_and_trains_nothing(tiny_training: list[str], tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny_training, "--estimate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total_s"] == pytest.approx(2 * found["step_s"]) and found["peak_gib"] > 0.1
    assert not (tmp_path / "run").exists()
    assert [duration(seconds) for seconds in (3.2, 119, 3000, 11100, 9e5)] == ["3 s", "2 min", "50 min", "3 h 5 min", "10 days"]


def test_train_refuses_mistakes_in_one_sentence_and_leaves_no_folder(small: list[str], tmp_path: Path,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    start = ["train", "--model", small[1], "--reward", "colorfulness", "--output-dir", str(tmp_path / "run")]
    for words, said in (
        (["--grad-steps", "99"], "grad_steps"), (["--rank", "0"], "rank"), (["--model", "emojy"], "'emoji'"),
        (["--learning-rate", "much"], "much"), (["--reward", "vivd"], "'vivid'"), (["--probe-reward", "clipp"], "'clip'"),
        (["--prompts-file", "none.txt"], "none.txt"), (["--device", "tpu"], "tpu"), (["--algorithm", "draft"], "draft-k"),
    ):
        assert said in refused(capsys, [*start, *words])
    assert not (tmp_path / "run").exists()


def test_runs_are_listed_and_ordered_by_name_or_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["runs", "--runs-dir", str(tmp_path)]
    assert main(words) == 0 and capsys.readouterr().out == "no runs\n"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        state = {"state": "failed", "message": "no room", "step": 3, "num_steps": 60, "reward": 0.25}
        state["created"] = time.time() - 300
        (tmp_path / name / "state.json").write_text(json.dumps(state))
    assert main([*words, "rename", "a", "--name", "best"]) == 0
    assert main([*words, "delete", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["best", "failed", "3/60", "0.25", "5", "min", "no", "room"]
    for order, said in ((["stop", "a"], "best is failed; it can't stop"), (["pause", "none"], "no training run"),
                        (["stop"], "which runs"), (["rename", "a"], "--name"), (["stpo", "a"], "stpo")):
        assert said in refused(capsys, [*words, *order])


def test_sample_tells_what_it_takes_before_it_starts(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*small, "--reward", "colorfulness", "--seeds", "0", "--method", "base", "--width", "40", "--scheduler", "unipc",
             "--guidance-rescale", "0.5", "--offload", "--no-safety", "--output-dir", str(tmp_path / "out")]
    assert main(["sample", *words]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("weights: UNet")] and [line for line in lines if line.startswith("peak")]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["methods"]["base"]["nfe"] == 2 * 2 and report["safety"] == {"state": "off", "flagged": {}}
    assert Image.open(tmp_path / "out" / "images" / "base" / "0.png").size == (40, 16)
    assert read_settings(tmp_path / "out" / "grid.png").guidance_rescale == 0.5


def test_several_loras_are_one_text() -> None:
    from rewardiv.cli import sample_config

    words = ["sample", "--output-dir", "x", "--lora", "vivid", "--lora", "calm=0.5"]
    assert sample_config(build_parser().parse_args(words)).lora == "vivid+calm=0.5"


def test_sample_defaults_are_the_settings_defaults() -> None:
    from rewardiv.cli import sample_config

    assert sample_config(build_parser().parse_args(["sample", "--output-dir", "x"])) == SampleConfig()
