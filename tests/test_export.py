"""Laws of what a run leaves: settings read back from every picture, files that agree, and a command that repeats it."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewardiv.cli import build_parser, sample_config
from rewardiv.config import SampleConfig
from rewardiv.errors import UserError
from rewardiv.export import (
    MAX_COLUMNS,
    bundle_zip,
    command_line,
    files,
    grid_image,
    image_path,
    image_png,
    read_settings,
    report,
    save_result,
    scores_csv,
)
from rewardiv.generate import CurvePoint, MethodScore, Result
from rewardiv.metrics import spectral_report

CONFIG = SampleConfig(
    prompt="a “naïve” 猫 face", negative_prompt="it's grey", methods=("base", "aig:power:2@nemo"), seeds=(3, 1, 7),
    num_inference_steps=5, guidance_scale=2.5, rewards=("vivid", "clip"),
)


def made(config: SampleConfig = CONFIG, side: int = 16) -> Result:
    rng = np.random.default_rng(0)
    num = len(config.seeds)
    images = {method: rng.integers(0, 256, (num, side, side, 3), dtype=np.uint8) for method in config.methods}
    base = rng.normal(size=(num, 8))
    scores = {
        method: MethodScore(
            rewards=tuple(rng.normal(20, 1, num).tolist()), reward_mean=20.0, reward_interval=(19.0, 21.0),
            spectral=spectral_report(base * (1 + k), base, seed=0) if num > 2 else None, nfe=10, seconds=0.5,
            other_rewards={"clip": tuple(rng.normal(0.2, 0.1, num).tolist())}, note="" if num > 2 else "too few",
        )
        for k, method in enumerate(config.methods)
    }
    curves = {method: (CurvePoint(1, 18.5, None), CurvePoint(5, 20.0, 0.25 * k)) for k, method in enumerate(config.methods)}
    return Result(
        config, images, scores, rows=60, elapsed_s=1.25, step=config.num_inference_steps, reward="vivid", curves=curves,
    )


def test_settings_read_back_from_every_picture(tmp_path: Path) -> None:
    folder = save_result(made(), tmp_path / "out")
    pictures = list(folder.rglob("*.png"))
    assert len(pictures) == 1 + 2 * 3
    assert all(read_settings(picture) == CONFIG for picture in pictures)


def test_pictures_know_their_own_method_and_seed_and_keep_their_pixels(tmp_path: Path) -> None:
    result = made()
    folder = save_result(result, tmp_path / "out")
    for method, images in result.images.items():
        for k, seed in enumerate(CONFIG.seeds):
            with Image.open(folder / image_path(method, seed)) as picture:
                own = json.loads(picture.text["rewardiv"])
                np.testing.assert_array_equal(np.asarray(picture), images[k])
            assert (own["method"], own["seed"], own["steps_done"]) == (method, seed, 5)


def test_the_folder_holds_what_the_design_says(tmp_path: Path) -> None:
    folder = save_result(made(), tmp_path / "deep" / "out")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    images = {f"images/{name}/{seed}.png" for name in ("base", "aig-power-2@nemo") for seed in (3, 1, 7)}
    assert names == {"grid.png", "report.json", "scores.csv", "command.txt"} | images


def test_a_report_means_the_rest_is_there() -> None:
    assert [name for name, _ in files(made())][-1] == "report.json"


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        save_result(made(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_the_report_has_the_promised_form() -> None:
    result = made()
    found = json.loads(json.dumps(report(result), allow_nan=False))
    assert SampleConfig.from_dict(found["settings"]) == CONFIG
    assert found["rows"] == 60 and found["elapsed_s"] == 1.25 and found["versions"]["torch"]
    method, score = found["methods"]["aig:power:2@nemo"], result.scores["aig:power:2@nemo"]
    assert method["rewards"] == {"vivid": list(score.rewards), "clip": list(score.other_rewards["clip"])}
    assert method["scd"] == {
        "value": score.spectral.scd, "null": list(score.spectral.null), "interval": list(score.spectral.interval),
    }
    assert method["trace_ratio"] == pytest.approx(4) and method["nfe"] == 10 and method["seconds"] == 0.5
    assert method["effective_rank"] == score.spectral.effective_rank
    assert method["curve"] == {"steps": [1, 5], "reward_mean": [18.5, 20.0], "scd": [None, 0.25]}


def test_what_is_not_known_is_null_in_the_report() -> None:
    alone = report(made(replace(CONFIG, seeds=(1,))))["methods"]["base"]
    assert alone["scd"] == {"value": None, "null": None, "interval": None}
    assert alone["trace_ratio"] is None and alone["note"] == "too few"
    result = made()
    score = result.scores["base"]
    flat = replace(score, spectral=replace(score.spectral, trace_ratio=math.nan, effective_rank_ratio=math.nan))
    damaged = replace(result, scores={**result.scores, "base": flat})
    assert report(damaged)["methods"]["base"]["trace_ratio"] is None
    assert grid_image(damaged).width > 0


def test_the_table_has_a_line_an_image() -> None:
    result = made()
    rows = list(csv.DictReader(io.StringIO(scores_csv(result))))
    assert [(row["method"], int(row["seed"])) for row in rows] == [(m, s) for m in CONFIG.methods for s in CONFIG.seeds]
    assert [float(row["clip"]) for row in rows[:3]] == list(result.scores["base"].other_rewards["clip"])
    assert rows[4]["file"] == image_path("aig:power:2@nemo", 1)


def test_the_zip_holds_the_folder(tmp_path: Path) -> None:
    result = made()
    folder = save_result(result, tmp_path / "out")
    with zipfile.ZipFile(bundle_zip(result, tmp_path / "all.zip")) as bundle:
        assert bundle.testzip() is None
        for name in bundle.namelist():
            assert bundle.read(name) == (folder / name).read_bytes()
        assert len(bundle.namelist()) == sum(path.is_file() for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        SampleConfig(),
        SampleConfig(lora="", methods=("base",), prompt="--odd \"quoted\" $HOME `x` \\", guidance_scale=1),
        SampleConfig(prompt="-", guidance_scale=1.0000000001, seeds=(9, 8, 10, 11), scheduler="dpm++2m", guidance_rescale=0.35,
                     height=24),
    ],
)
def test_the_command_line_repeats_the_run(config: SampleConfig) -> None:
    words = shlex.split(command_line(config))
    assert words[:3] == ["python", "-m", "rewardiv"]
    assert sample_config(build_parser().parse_args(words[3:])) == config


def test_a_file_without_settings_says_so(tmp_path: Path) -> None:
    plain, text, broken = tmp_path / "plain.png", tmp_path / "text.png", tmp_path / "broken.png"
    Image.new("RGB", (4, 4)).save(plain)
    text.write_text("hello")
    broken.write_bytes(image_png(made(), "base", 0)[:200])
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg")
    for path, said in (
        (plain, "no rewardiv settings"), (text, "isn't a picture"), (tmp_path / "photo.jpg", "no rewardiv"),
        (tmp_path / "none.png", "cannot read"), (broken, "cannot read|no rewardiv|damaged"),
    ):
        with pytest.raises(UserError, match=said):
            read_settings(path)


def test_settings_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    for k, text in enumerate(["{", "[]", "{}", '{"settings": {"prompt": ""}}', '{"settings": {"hat": 1}}']):
        info = PngInfo()
        info.add_text("rewardiv", text)
        Image.new("RGB", (4, 4)).save(tmp_path / f"{k}.png", pnginfo=info)
        with pytest.raises(UserError):
            read_settings(tmp_path / f"{k}.png")


def test_the_grid_shows_each_image_in_its_place() -> None:
    config = replace(CONFIG, methods=("base", "finetuned"), seeds=(0, 1, 2))
    result = made(config)
    colours = iter([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)])
    images = {m: np.stack([np.full((16, 16, 3), next(colours), np.uint8) for _ in range(3)]) for m in config.methods}
    grid = np.asarray(grid_image(replace(result, images=images))).astype(int)
    centres = {}
    for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]:
        ys, xs = np.nonzero((grid == colour).all(-1))
        assert len(ys) == 96 * 96
        centres[colour] = (ys.mean(), xs.mean())
    rows = list(centres.values())
    assert len({y for y, _ in rows[:3]}) == 1 and len({y for y, _ in rows[3:]}) == 1 and rows[0][0] < rows[3][0]
    assert [x for _, x in rows[:3]] == [x for _, x in rows[3:]] == sorted(x for _, x in rows[:3])


def test_the_grid_stays_printable_for_many_seeds_and_long_names() -> None:
    knots = ",".join(f"{k / 20}={1 - k / 20}" for k in range(21))
    config = replace(CONFIG, seeds=tuple(range(60)), methods=("base", f"aig:knots:{knots}"), prompt="long " * 500)
    result = made(config)
    grid = grid_image(result)
    assert MAX_COLUMNS * 100 < grid.width < 500 + MAX_COLUMNS * 110


def test_a_stopped_run_says_so(tmp_path: Path) -> None:
    stopped = replace(made(), step=2)
    assert report(stopped)["steps_done"] == 2
    assert grid_image(stopped).tobytes() != grid_image(made()).tobytes()
