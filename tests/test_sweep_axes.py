"""What a sweep crosses: methods with lists and ranges, checkpoints, prompt sets; the same settings as flags and as TOML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewardiv.cli import build_parser
from rewardiv.cli_sweep import sweep_config
from rewardiv.config import TrainConfig
from rewardiv.errors import UserError
from rewardiv.evaluate.axes import Arm, expand_loras, expand_methods
from rewardiv.evaluate.prompt_sets import Prompt, read_prompt_sets
from rewardiv.evaluate.settings import SweepConfig, read_toml


@pytest.mark.parametrize(("texts", "methods"), [
    (["base", "finetuned"], ["base", "finetuned"]),
    (["lora:0..1/5"], ["lora:0", "lora:0.25", "lora:0.5", "lora:0.75", "lora:1"]),
    (["lora:1..0/3"], ["lora:1", "lora:0.5", "lora:0"]),
    (["aig:power:1..8/4log"], ["aig:power:1", "aig:power:2", "aig:power:4", "aig:power:8"]),
    (["aig:power:1,2..4/2, 8@nemo"], ["aig:power:1@nemo", "aig:power:2@nemo", "aig:power:4@nemo", "aig:power:8@nemo"]),
    (["aig:sigmoid:8,16:0.3..0.7/3"], [f"aig:sigmoid:{k}:{c}" for k in (8, 16) for c in (0.3, 0.5, 0.7)]),
    (["aig:linear,cosine"], ["aig:linear", "aig:cosine"]),
    (["aig:knots:0=1,0.3=0.9,1=0"], ["aig:knots:0=1,0.3=0.9,1=0"]),
    (["lora:0.5", "lora:0..1/3", "blend:0.50"], ["lora:0.5", "lora:0", "lora:1", "blend:0.5"]),  # each once
])
def test_lists_and_ranges_stand_for_methods(texts: list[str], methods: list[str]) -> None:
    assert list(expand_methods(texts)) == methods


@pytest.mark.parametrize(("text", "said"), [
    ("aig:power:1..8", "cannot read the range '1..8'"), ("aig:power:1..8/1", "count of 2 to 100"),
    ("aig:power:1..8/x", "1..8/4"), ("aig:power:0..8/4log", "both ends must be above 0"),
    ("lora:a..1/3", "not a finite number"),
    ("lora:0..3/4", "0 to 2"), ("lora:0.5,", "cannot read method"), ("aig:sigmoid:1..9/20:0..1/20", "more than 256"),
])
def test_an_axis_that_cannot_be_read_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        expand_methods([text])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A training run's folder, as far as a sweep looks at it."""
    folder = tmp_path / "runs" / "mine"
    for step in (0, 10, 20):
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
    settings = TrainConfig(str(folder), rewards=("vivid=0.5", "jpeg")).to_dict()
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    return folder


def test_checkpoints_of_a_run_are_loras(run_dir: Path) -> None:
    found = expand_loras(["vivid"], [str(run_dir)])
    assert [lora.label for lora in found] == ["vivid", "mine step 0", "mine step 10", "mine step 20"]
    assert found[2].text == str(run_dir / "checkpoints" / "step-10") and found[2].rewards == ("vivid", "jpeg")
    assert [lora.label for lora in expand_loras([], [f"{run_dir}=20,0"])] == ["mine step 20", "mine step 0"]
    for given, said in (([f"{run_dir}=15"], "no checkpoint of step 15; there are 0, 10, 20"), (["nowhere"], "no checkpoints"),
                        ([str(run_dir)] * 2, "given twice")):
        with pytest.raises(UserError, match=said):
            expand_loras([], given)


def test_loras_are_told_apart_by_their_labels(tmp_path: Path) -> None:
    names = ["a/x", "b/x", "b/y", "vivid+calm=0.5"]
    assert [lora.label for lora in expand_loras(names, [])] == ["a/x", "b/x", "y", "vivid+calm=0.5"]


def test_base_is_an_arm_once_and_first() -> None:
    config = SweepConfig("DIR", loras=("vivid", "calm"), methods=("finetuned", "base", "lora:0.5"))
    assert config.arms == (Arm("base", ""), Arm("finetuned", "vivid"), Arm("lora:0.5", "vivid"), Arm("finetuned", "calm"),
                           Arm("lora:0.5", "calm"))


def test_prompt_sets_have_categories() -> None:
    emoji = read_prompt_sets(["emoji"])
    assert len(emoji) == 50 and all(prompt.category for prompt in emoji)
    assert len(read_prompt_sets(["emoji", "emoji-composed"])) == 100
    animals = read_prompt_sets(["emoji"], categories=["Animal"])
    assert 1 < len(animals) < 50 and {prompt.category for prompt in animals} == {"animal"}
    assert set(animals) <= set(emoji)


def test_prompt_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "parti.tsv").write_text(
        'Prompt\tCategory\tNote\na "red" cat\tAnimals\tx\na bus\tVehicles\ty\na bus\tVehicles\tz\n')
    (tmp_path / "own.csv").write_text('prompt,category\n"a dog, sitting",Animals\n')
    (tmp_path / "hps").mkdir()
    (tmp_path / "hps" / "anime.json").write_text('["a girl", "a boy"]')
    (tmp_path / "hps" / "photo.txt").write_text("a street\n")
    (tmp_path / "objects.json").write_text('[{"id": 1, "prompt": "a tree "}]')
    parti = [Prompt('a "red" cat', "Animals"), Prompt("a bus", "Vehicles")]
    assert list(read_prompt_sets([f"partiprompts:{tmp_path}/parti.tsv"])) == parti  # a published list's repetition counts once
    assert list(read_prompt_sets([f"{tmp_path}/own.csv"])) == [Prompt("a dog, sitting", "Animals")]
    hps = [Prompt("a girl", "anime"), Prompt("a boy", "anime"), Prompt("a street", "photo")]
    assert list(read_prompt_sets([f"hpsv2:{tmp_path}/hps"])) == hps
    assert list(read_prompt_sets([f"{tmp_path}/objects.json"], ["a girl"])) == [Prompt("a girl"), Prompt("a tree")]
    both = read_prompt_sets([f"{tmp_path}/own.csv", f"hpsv2:{tmp_path}/hps"], ["mine"], categories=["animals", "photo"])
    assert [prompt.text for prompt in both] == ["mine", "a dog, sitting", "a street"]  # one's own belong to no set
    (tmp_path / "windows.txt").write_bytes("\ufeffa cat\r\na \u2028dog\r\n".encode())
    assert [prompt.text for prompt in read_prompt_sets([f"{tmp_path}/windows.txt"])] == ["a cat", "a \u2028dog"]


def test_some_of_the_prompts_are_spread_over_all() -> None:
    all_of_them = read_prompt_sets(["emoji"])
    assert read_prompt_sets(["emoji"], max_prompts=5) == all_of_them[::10]
    assert read_prompt_sets(["emoji"], max_prompts=90) == all_of_them


@pytest.mark.parametrize(("name", "text", "said"), [
    ("own.txt", "a cat\n\na dog\n", "own.txt, line 2, is empty"),
    ("own.txt", "a cat\na dog\na cat \n", "line 3, repeats .*line 1,"), ("own.csv", "text\na cat\n", "no column 'prompt'"),
    ("own.json", "{", "is not JSON"), ("own.json", '[{"text": "a"}]', "list of"),
    ("own.txt", "", "own.txt holds no prompt"), ("own.txt", "a cat\n\n", "line 2, is empty"),
    ("own.csv", "prompt\n", "own.csv holds no prompt"), ("own.csv", "prompt\n" + "x" * 200_000, "field larger than"),
    ("own.tsv", "prompt\ncat\n\tx\n", "line 3, is empty"),
])
def test_a_prompt_file_that_is_wrong_is_refused_with_the_place(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        read_prompt_sets([str(tmp_path / name)])


@pytest.mark.parametrize(("sets", "settings", "said"), [
    (["emojy"], {}, "did you mean"), (["emoji:x"], {}, "unknown prompt set 'emoji:x'"),
    (["emoji"], {"categories": ["metal"]}, "no prompt has the category 'metal'; there are .*animal"),
    ([], {"prompts": ["a cat"], "categories": ["x"]}, "the category 'x' chooses among the prompts of a set"),
    ([], {"prompts": ["a", "a"]}, "given twice"),
    ([], {"prompts": [" "]}, "a prompt is empty"),
])
def test_prompt_sets_that_are_wrong_are_refused(sets: list[str], settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_prompt_sets(sets, **settings)


def parsed(words: list[str]) -> SweepConfig:
    return sweep_config(build_parser().parse_args(["sweep", *words]))


def test_flags_and_toml_say_the_same(tmp_path: Path) -> None:
    words = ["--prompt-set", "emoji", "--prompt", "a \"blue\" cat ü", "--max-prompts", "4", "--method", "lora:0.25..0.75/3",
             "--method", "aig:power:1,2", "--seeds", "0-2,9", "--lora", "calm", "--guidance-scale", "4", "--held-out", "clip",
             "--num-inference-steps", "10", "--output-dir", "DIR", "--category", "animal", "--diversity", "vendi-within"]
    config = parsed(words)
    assert config.seeds == (0, 1, 2, 9) and config.methods == ("lora:0.25..0.75/3", "aig:power:1,2")
    (tmp_path / "a.toml").write_text(config.to_toml())
    assert parsed(["--config", str(tmp_path / "a.toml"), "--output-dir", "DIR"]) == config
    assert 'prompt-set = ["emoji"]' in config.to_toml()
    (tmp_path / "b.toml").write_text(
        'prompts = "emoji"\nprompt = ["a \\"blue\\" cat ü"]\nmax_prompts = 4\nmethod = ["lora:0.25..0.75/3", "aig:power:1,2"]\n'
        'seeds = [0, 1, 2, 9]\nlora = "calm"\nguidance-scale = 4\nheld-out = "clip"\nnum-inference-steps = 10\n'
        'output-dir = "DIR"\ncategory = "animal"\ndiversity = "vendi-within"\n')
    assert parsed(["--config", str(tmp_path / "b.toml")]) == config
    assert parsed(["--config", str(tmp_path / "b.toml"), "--lora", "vivid"]).loras == ("vivid",)  # flags win


@pytest.mark.parametrize(("text", "said"), [
    ("sedes = 3", "unknown setting 'sedes'.*seeds"), ("seeds = ", "cannot read the sweep"),
    ("seeds = \"3\"", "at least 2 seeds"),
    ("method = \"lora:9\"", "0 to 2"), ("reward = [1]", "reward holds 1"), ("diversity = \"fid\"", "unknown diversity 'fid'"),
    ("dtype = \"float\"", "unknown dtype"), ("max-prompts = -1", "max_prompts is -1"),
    ("reward = \"clip\"\nheld-out = \"clip\"", "'clip' is given as held out too"),
    ("guidance-scale = 0", "guidance scale is 0"),
])
def test_a_toml_file_that_is_wrong_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "sweep.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        SweepConfig(**({"output_dir": "DIR"} | read_toml(tmp_path / "sweep.toml")))
    with pytest.raises(UserError, match="--output-dir"):
        parsed(["--seeds", "0-3"])
