"""Laws of `rewardiv pretrain` as a person runs it: every stage for real, on a tiny world of eleven made-up drawings."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rewardiv.cli import main
from rewardiv.pretrain import autoencoder, clip, data, evaluate, families, loop, preferences, presets, referee, scenes
from rewardiv.pretrain.base_model import World
from rewardiv.pretrain.families import Family
from rewardiv.pretrain.layouts import SceneSpec
from rewardiv.pretrain.loop import Recipe
from rewardiv.pretrain.presets import Preset
from rewardiv.publish import read_source
from rewardiv.records import list_checkpoints

TIERS = {"cat face": 1, "dog face": 1, "rocket": 1} | dict.fromkeys(
    ("bus", "tree", "apple", "ghost", "key", "boat", "egg", "drum"), 2
)
COLOURS = ("#d22", "#2a2", "#22d", "#dd2", "#d2d", "#2dd", "#333", "#e83", "#8e3", "#38e", "#eee")
NUM_STEPS = 3
RECIPE = Recipe(num_steps=NUM_STEPS, batch_size=4, learning_rate=1e-3, num_warmup_steps=1)
SETTINGS = {"max_train_steps": NUM_STEPS, "train_batch_size": 2, "num_inference_steps": 2, "checkpointing_steps": 1,
            "probe_every": NUM_STEPS, "num_probe_prompts": 1, "num_probe_seeds": 2}
PRESET = Preset(
    device="cpu", world=World(max_tier=1, styles=("noto", "twemoji"), spec=SceneSpec(counted=0.3, paired=0.3),
                              num_scenes=32),
    clip_spec=SceneSpec(counted=0.3, paired=0.3), channels=(16, 16, 16),
    autoencoder=RECIPE, decoder=RECIPE, base=RECIPE, refine=RECIPE, settle=RECIPE, temper=RECIPE,
    clip=RECIPE, reward=RECIPE, referee=RECIPE,
    families={"vivid": Family(("vivid",), settings=SETTINGS), "calm": Family(("calm",), settings=SETTINGS)},
    kl_weights=(0.0, 1.0),
)
BASE_STAGES = ("base", "refine", "settle", "temper")
STAGES = ("autoencoder", "decoder", "clip", *BASE_STAGES, "rewards", "loras", "referee", "evaluate")
FIGURES = {
    "autoencoder", "decoder", *BASE_STAGES, "clip", "reward-vivid", "reward-calm", "lora-vivid", "lora-calm",
    "lora-vivid-kl1", "lora-calm-kl1", "referee", "evaluate", "evaluate-vivid", "evaluate-calm", "evaluate-asked",
}
CARDS = ("emoji", "emoji-clip", "emoji-rewards/vivid", "emoji-rewards/calm", "emoji-vivid", "emoji-calm")


@dataclass(frozen=True)
class Places:
    """Where one builder's files go."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "checkpoints"

    @property
    def assets(self) -> Path:
        return self.root / "assets"

    @property
    def work(self) -> Path:
        return self.root / "work"

    def pretrain(self, stage: str, *options: str) -> int:
        """The exit code of the command."""
        places = ["--output-dir", os.path.relpath(self.out), "--work-dir", str(self.work), "--assets-dir", str(self.assets),
                  "--packages-dir", str(data.ASSETS / "packages")]
        return main(["pretrain", stage, *places, *options])

    def weights(self) -> dict[str, torch.Tensor]:
        """Every weight of every finished file; the files' bytes vary, because safetensors shuffles the metadata."""
        files = {path.relative_to(self.out): load_file(path) for path in sorted(self.out.rglob("*.safetensors"))}
        return {f"{path}: {name}": tensor for path, tensors in files.items() for name, tensor in tensors.items()}


def write_packages(folder: Path) -> None:
    """Every artist's package, as npm packs it: one drawing for each concept."""
    folder.mkdir()
    for shape, pack in enumerate(data.PACKS):
        files: dict[str, bytes] = {}
        icons = {}
        for slug, colour in zip(TIERS, COLOURS, strict=True):
            name = slug.replace(" ", "-")
            icons[name] = {"body": f'<rect x="{shape % 3}" y="1" width="{10 + shape % 4}" height="13" fill="{colour}"/>'}
            picture = io.BytesIO()
            Image.new("RGBA", (32, 32), colour).save(picture, "WEBP")
            files[f"package/assets/{name}.webp"] = picture.getvalue()
        if pack.style != "fluent-3d":
            files = {"package/icons.json": json.dumps({"prefix": pack.style, "icons": icons}).encode()}
        archive = folder / f"{pack.package.removeprefix('@').replace('/', '-')}-{pack.version}.tgz"
        with tarfile.open(archive, "w:gz") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def write_concepts(folder: Path) -> None:
    """concepts.tsv and prompts.txt of the tiny world."""
    columns = ["family", "caption", "emoji", "slug", "tier", *(pack.style for pack in data.PACKS)]
    with (folder / "concepts.tsv").open("w", newline="") as file:
        table = csv.DictWriter(file, columns, delimiter="\t")
        table.writeheader()
        for concept, tier in TIERS.items():
            name = concept.replace(" ", "-")
            names = {pack.style: f"{name}.webp" if pack.style == "fluent-3d" else name for pack in data.PACKS}
            table.writerow({"family": "made up", "caption": f"a {concept}", "emoji": "", "slug": name, "tier": tier, **names})
    (folder / "prompts.txt").write_text("a cat face\na rocket\n")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny world in place of the built-in one, and stages that take a second each."""
    folder = tmp_path_factory.mktemp("world") / "emoji"
    folder.mkdir()
    write_concepts(folder)
    write_packages(folder / "packages")
    with pytest.MonkeyPatch.context() as patch:
        for module in (data, scenes, families):
            patch.setattr(module, "ASSETS", folder)
        for module in (autoencoder, clip, referee):
            patch.setattr(module, "NUM_SCENES", 48)
            patch.setattr(module, "NUM_TEST", 16)
        patch.setattr(preferences, "NUM_TEST", 16)
        patch.setattr(loop, "SHEETS", 1)
        patch.setattr(evaluate, "measure", partial(evaluate.measure, num_images=3, num_inference_steps=2))
        patch.setattr(evaluate, "NUM_ASKED", 2)
        patch.setattr(evaluate, "NUM_REAL", 32)
        patch.setattr(evaluate, "measure_asked", partial(evaluate.measure_asked, num_images=2, num_inference_steps=2))
        patch.setattr(evaluate, "measure_lora", partial(evaluate.measure_lora, num_seeds=3, num_inference_steps=2))
        patch.setitem(presets.PRESETS, "cpu", PRESET)
        yield folder


@pytest.fixture(scope="module")
def built(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Places:
    """What `pretrain all` leaves when nothing stops it."""
    places = Places(tmp_path_factory.mktemp("built"))
    assert places.pretrain("all") == 0
    return places


def test_data_makes_an_atlas_for_each_artist_and_says_whose_it_is(built: Places, assets: Path) -> None:
    lines = [json.loads(line) for line in (assets / "icons.jsonl").read_text().splitlines()]
    assert len(lines) == len(TIERS) * len(data.PACKS)
    assert {line["file"] for line in lines} == {path.name for path in assets.glob("*.webp")}
    assert (assets / "ATTRIBUTION.md").read_text() == data.attribution()


def test_all_leaves_what_every_stage_promises(built: Places) -> None:
    for name in ("model_index.json", "vae/config.json", "unet/config.json", "text_encoder/config.json"):
        assert (built.out / "emoji" / name).is_file(), name
    assert {"contact-sheet.webp", "contact-sheet-composed.webp"} <= names_in(built.assets)
    for name in ("emoji-clip", "emoji-rewards/vivid", "emoji-rewards/calm"):
        assert {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer"} <= names_in(built.out / name)
    for name in ("vivid", "calm"):
        assert names_in(built.out / f"emoji-{name}") == {"README.md", "pytorch_lora_weights.safetensors"}
        free, held = (read_source(built.assets / "runs" / own).config.to_dict() for own in (name, f"{name}-kl1"))
        assert (free["kl_weight"], held["kl_weight"], free["model"], free["rewards"]) == (0, 1, "emoji", [name])
        assert {1, NUM_STEPS} <= set(list_checkpoints(built.assets / "runs" / name))
    logs = {f"{stage}.jsonl" for stage in ("autoencoder", "decoder", *BASE_STAGES, "clip", "reward-vivid")}
    sheets = {f"{stage}-{NUM_STEPS:06d}.png" for stage in ("autoencoder", "decoder", *BASE_STAGES)}
    assert logs | sheets <= names_in(built.work)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_figures_and_cards_of_every_stage_are_written(built: Places) -> None:
    figures = json.loads((built.out / "figures.json").read_text())
    assert set(figures) == FIGURES
    assert all(figures[name]["seed"] == 0 and figures[name]["preset"] == "cpu" for name in FIGURES)
    trained = [name for name in FIGURES if not name.startswith("evaluate")]
    assert all(figures[name]["num_steps"] == NUM_STEPS and figures[name]["training_s"] >= 0 for name in trained)
    for name in CARDS:
        card = (built.out / name / "README.md").read_text()
        assert f"{NUM_STEPS} steps in" in card and "not recorded" not in card, name
    assert f"{figures['decoder']['psnr_held_out_db']} dB" in (built.out / "emoji" / "README.md").read_text()
    for name in ("vivid", "calm"):
        assert str(figures[f"evaluate-{name}"]["base_reward_mean"]) in (built.out / f"emoji-{name}" / "README.md").read_text()


class Killer:
    """An AdamW that a person interrupts in the last of NUM_STEPS steps, once."""

    def __init__(self) -> None:
        self.steps_left: int | None = NUM_STEPS - 1
        self.step = torch.optim.AdamW.step

    def __call__(self, optimizer: torch.optim.AdamW, *args: object) -> object:
        if self.steps_left == 0:
            self.steps_left = None
            raise KeyboardInterrupt
        if self.steps_left is not None:
            self.steps_left -= 1
        return self.step(optimizer, *args)


def test_stages_in_turn_each_killed_and_resumed_equal_all_at_once(
    built: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    parts = Places(tmp_path)
    for stage in STAGES:
        killer = Killer()
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", lambda optimizer, *args, killer=killer: killer(optimizer, *args))
            assert parts.pretrain(stage) == (0 if stage == "evaluate" else 130), stage
        if stage != "evaluate":
            assert killer.steps_left is None and parts.pretrain(stage, "--resume") == 0, stage
    whole, resumed = built.weights(), parts.weights()
    assert list(whole) == list(resumed) and len(whole) > 100
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert set(json.loads((parts.out / "figures.json").read_text())) == FIGURES


def test_tempering_for_longer_has_the_teacher_that_it_began_with(
    built: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = ("--resume", "--num-steps", str(NUM_STEPS + 2))
    results = []
    for name in ("tempered", "settled"):
        places = Places(tmp_path / name)
        shutil.copytree(built.root, places.root)
        if name == "settled":  # the base model as it was when the stage began
            assert places.pretrain("settle", "--resume") == 0
        assert places.pretrain("temper", *longer) == 0
        results.append(places.weights())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert any(not torch.equal(value, results[0][name]) for name, value in built.weights().items())
    (places.work / "temper-teacher.pt").unlink()
    assert places.pretrain("temper", "--resume", "--num-steps", str(NUM_STEPS + 4)) == 2
    assert "temper-teacher.pt, the model as it was when" in capsys.readouterr().err


def test_loras_that_are_done_go_on_when_more_steps_are_asked_for(built: Places, tmp_path: Path) -> None:
    places, logs = Places(tmp_path / "longer"), []
    shutil.copytree(built.out, places.out)
    for num_steps in (NUM_STEPS, NUM_STEPS + 1):
        assert places.pretrain("loras", "--resume", "--num-steps", str(num_steps)) == 0
        logs.append([(places.assets / "runs" / name / "metrics.jsonl").read_text() for name in ("vivid", "vivid-kl1")])
        assert read_source(places.assets / "runs" / "vivid").config.max_train_steps == num_steps
    for before, after in zip(*logs, strict=True):
        assert after.startswith(before) and len(after.splitlines()) == NUM_STEPS + 1


def test_a_finished_run_is_not_overwritten_without_being_told(built: Places, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in built.out.rglob("*.safetensors")}
    for stage in STAGES[:-1]:
        assert built.pretrain(stage) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: ") and ("--resume" in said or "exists already" in said), stage
    assert {path: path.read_bytes() for path in built.out.rglob("*.safetensors")} == before


def test_training_the_decoder_alone_leaves_every_latent_as_it_is(assets: Path, tmp_path: Path) -> None:
    places, weights = Places(tmp_path), []
    for stage in ("autoencoder", "decoder"):
        assert places.pretrain(stage) == 0
        weights.append({name.partition(": ")[2]: value for name, value in places.weights().items()})
    same = {name for name, value in weights[0].items() if torch.equal(value, weights[1][name])}
    assert {name.split(".")[0] for name in same} == {"encoder", "quant_conv"}
    assert {name.split(".")[0] for name in set(weights[0]) - same} == {"decoder", "post_quant_conv"}


@pytest.mark.parametrize(("stage", "missing", "maker"), [
    ("decoder", "emoji/vae/config.json", "autoencoder"),
    ("base", "emoji/vae/config.json", "autoencoder"),
    ("base", "emoji-clip/open_clip_config.json", "clip"),
    ("refine", "emoji/model_index.json", "base"),
    ("settle", "emoji/model_index.json", "base"),
    ("temper", "emoji/model_index.json", "base"),
    ("rewards", "emoji-clip/open_clip_config.json", "clip"),
    ("loras", "emoji/model_index.json", "base"),
    ("loras", "emoji-rewards/calm/open_clip_config.json", "rewards"),
    ("evaluate", "emoji/model_index.json", "base"),
    ("evaluate", "emoji-clip/open_clip_config.json", "clip"),
    ("evaluate", "emoji-rewards/vivid/open_clip_config.json", "rewards"),
])
def test_a_missing_earlier_stage_is_named_before_anything_is_done(
    built: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, missing: str, maker: str
) -> None:
    places = Places(tmp_path)
    places.out.mkdir()
    for path in built.out.iterdir():
        (places.out / path.name).symlink_to(path)
    top, _, rest = missing.partition("/")
    (places.out / top).unlink()
    hidden = places.out / top / rest
    for path in (path for path in (built.out / top).rglob("*") if path.is_file()):
        copy = places.out / top / path.relative_to(built.out / top)
        if copy != hidden:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    assert places.pretrain(stage) == 2
    expected = f"error: {os.path.relpath(hidden)} is missing; build it first: python -m rewardiv pretrain {maker}"
    assert capsys.readouterr().err.strip() == expected
    assert not places.work.exists()


@pytest.mark.parametrize(("arguments", "said"), [
    (("all", "--num-steps", "5"), "a stage that trains"),
    (("evaluate", "--num-steps", "5"), "a stage that trains"),
    (("clip", "--num-steps", "0"), "a positive number"),
])
def test_a_number_of_steps_that_means_nothing_is_refused(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert Places(tmp_path).pretrain(*arguments) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_preset_for_a_device_that_is_not_here_is_refused(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Places(tmp_path).pretrain("autoencoder", "--preset", "gpu") == 2
    assert "isn't there" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_the_drawings_the_first_stage_says_how_to_get_them(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "ASSETS", tmp_path)
    assert Places(tmp_path / "run").pretrain("autoencoder") == 2
    assert "pretrain data" in capsys.readouterr().err
