"""Laws of a run to show: small, nothing of the machine in it, its LoRAs draw the same, and only what is whole is exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rewardiv.cli import main
from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.jobs import list_jobs
from rewardiv.publish import write_card
from rewardiv.records import list_checkpoints, list_steps
from rewardiv.registry import LORA_FILE, PROMPTS, prompts_path
from rewardiv.runs import read_jsonl
from rewardiv.showcase import export_run
from rewardiv.trainer import read_prompts, train

RECORDS = ("config.json", "metrics.jsonl", "probes.jsonl")


@pytest.fixture(scope="module")
def run_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of 4 steps with a probe and a checkpoint after each."""
    folder = tmp_path_factory.mktemp("runs") / "red"
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a cat face\na red cat\n")
    config = TrainConfig(
        output_dir=str(folder), model=str(tiny_model_dir), rewards=("colorfulness",), prompts_file=str(prompts),
        max_train_steps=4, train_batch_size=2, num_inference_steps=2, rank=2, probe_every=1, num_probe_prompts=2,
        num_probe_seeds=3, checkpointing_steps=1, lr_warmup_steps=0,
    )
    assert [record.step for record in train(config) if hasattr(record, "reward_mean")] == [1, 2, 3, 4]
    return folder


def test_a_shown_run_reads_like_the_run(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run_dir), "--format", "run", "--output-dir", str(tmp_path / "runs" / "shown")]) == 0
    (job,), shown = list_jobs(tmp_path / "runs"), tmp_path / "runs" / "shown"
    assert capsys.readouterr().out.strip() == str(shown)
    assert job.state == "done" and job.name == "shown" and not job.pid and not job.host
    for name in ("metrics.jsonl", "probes.jsonl"):
        assert list(read_jsonl(shown / name)) == list(read_jsonl(run_dir / name))
    assert 4 in list_checkpoints(shown) and set(list_checkpoints(shown)) <= set(list_checkpoints(run_dir))
    for step, folder in list_steps(run_dir / "probes").items():
        sizes = [Image.open(place / "grid.png").size for place in (folder, shown / "probes" / f"step-{step}")]
        assert sizes[0] == sizes[1]
    ours, theirs = load_file(shown / LORA_FILE), load_file(run_dir / LORA_FILE)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor.float(), theirs[key], rtol=1e-3, atol=1e-6)


def test_nothing_of_the_machine_comes_along(run_dir: Path, tmp_path: Path) -> None:
    shown = export_run(run_dir, tmp_path / "shown")
    texts = [path.read_text() for path in shown.rglob("*.json*")]
    assert texts and not any(str(place) in text for text in texts for place in (run_dir.parent, Path.home()))
    settings = json.loads((shown / "config.json").read_text())["settings"]
    assert settings["prompts_file"] == "prompts.txt" and settings["model"] == Path(settings["model"]).name
    assert not any(shown.rglob("state.pt")) and not (shown / "log.txt").exists()


def test_prompts_that_ship_go_by_their_name_and_are_found_by_it(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    saved["settings"]["prompts_file"] = PROMPTS["emoji-composed"].path
    path.write_text(json.dumps(saved))
    shown = export_run(tmp_path / "run", tmp_path / "shown")
    name = json.loads((shown / "config.json").read_text())["settings"]["prompts_file"]
    assert name == "emoji-composed" and read_prompts(prompts_path(name)) == Path(PROMPTS[name].path).read_text().splitlines()


@pytest.mark.parametrize("place", ["/home/someone/rewards/warm", "/home/someoné/rewards/warm"])
def test_of_a_local_reward_its_own_name_is_left_in_settings_records_and_card(run_dir: Path, tmp_path: Path, place: str) -> None:
    source = shutil.copytree(run_dir, tmp_path / "source")
    for path, name in [(source / file, name) for file in RECORDS for name in ("colorfulness", "clip")]:
        path.write_text(path.read_text().replace(f'"{name}"', json.dumps(f"{place}-{name}")))
    settings = json.loads((source / "config.json").read_text())
    settings["settings"]["probe_rewards"] = [f"{place}-clip"]
    (source / "config.json").write_text(json.dumps(settings))
    shown = export_run(source, tmp_path / "shown")
    texts = [path.read_text() for path in shown.rglob("*.json*")] + [write_card(source).read_text()]
    assert not any("someon" in text for text in texts) and "warm-clip (held out)" in texts[-1]
    settings = json.loads((shown / "config.json").read_text())["settings"]
    assert settings["rewards"] == ["warm-colorfulness"] and settings["probe_rewards"] == ["warm-clip"]
    for name in ("metrics.jsonl", "probes.jsonl"):
        assert all(record["rewards"].keys() == {"warm-colorfulness"} for record in read_jsonl(shown / name))


def test_what_is_not_whole_is_refused(run_dir: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return export_run(run_dir, tmp_path / name)

    with pytest.raises(UserError, match="no training run"):
        export_run(tmp_path, tmp_path / "a")
    unfinished = copied("unfinished")
    state = json.loads((unfinished / "state.json").read_text())
    (unfinished / "state.json").write_text(json.dumps(state | {"state": "stopped"}))
    with pytest.raises(UserError, match="is stopped; only a finished one"):
        export_run(unfinished, tmp_path / "b")
    large = copied("large")
    weights = load_file(large / LORA_FILE)
    save_file({key: tensor.float() + 1e6 for key, tensor in weights.items()}, large / LORA_FILE)
    with pytest.raises(UserError, match="too large for fp16"):
        export_run(large, tmp_path / "c")
    with pytest.raises(UserError, match="holds|exists|empty"):
        export_run(run_dir, large)


