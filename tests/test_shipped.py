"""What ships is whole, small, and does what its cards say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from rewardiv.clip_models import load_clip
from rewardiv.config import SampleConfig
from rewardiv.generate import Engine, generate
from rewardiv.jobs import list_jobs
from rewardiv.pretrain.clip import concept_accuracy
from rewardiv.pretrain.families import member
from rewardiv.pretrain.presets import PRESETS
from rewardiv.records import list_checkpoints
from rewardiv.registry import CHECKPOINTS, LORAS, MODELS, REWARDS, ROOT, is_here
from rewardiv.runs import read_jsonl
from rewardiv.ui import PREPARED_RUNS
from rewardiv.verdicts import ProbeRecord, best_tradeoff, collapse_onset

FAMILIES = PRESETS["cpu"].families
TOP_LEVEL = {"app.py", "rewardiv", "assets", "checkpoints", "tests", "requirements.txt", "README.md", "LICENSE"}


@pytest.fixture(scope="module")
def engine():
    return Engine()


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(CHECKPOINTS / "emoji", torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def last(records):
    *_, result = records
    return result


def test_visible_top_level_is_exactly_the_agreed_one():
    seen = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert seen - {"runs", "sweeps", "studies", "outputs", "__pycache__"} == TOP_LEVEL


def test_everything_in_the_registry_that_isnt_downloaded_is_here():
    for entries in (MODELS, LORAS, REWARDS):
        assert all(is_here(entry) for entry in entries.values() if not entry.sources)


def test_shipped_files_are_small_and_weights_are_half_precision():
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 16 * 2**20
    assert sum(path.stat().st_size for path in files) < 60e6
    for path in CHECKPOINTS.glob("emoji/**/*.safetensors"):
        with safe_open(path, "pt") as weights:
            assert all(weights.get_tensor(name).dtype == torch.float16 for name in list(weights.keys())[:5])


def test_no_shipped_config_names_a_place_on_one_machine():
    for path in [*CHECKPOINTS.rglob("*.json"), *CHECKPOINTS.rglob("*.md")]:
        assert "_name_or_path" not in path.read_text(), path


def test_every_folder_has_a_card_with_the_recorded_figures():
    figures = json.loads((CHECKPOINTS / "figures.json").read_text())
    evaluate, asked = figures["evaluate"], figures["evaluate-asked"]
    assert evaluate["num_concepts"] >= 160 and evaluate["referee_concept"] >= 0.85 and evaluate["concept_accuracy"] >= 0.8
    assert evaluate["effective_rank_share"] >= 0.8 and evaluate["styles"] >= 0.8 * evaluate["styles_real"]
    assert asked["colour"] >= 0.95 and asked["count"] >= 0.7 and asked["both"] >= 0.6
    assert min(figures[stage]["psnr_held_out_db"] for stage in ("autoencoder", "decoder")) >= 29
    for name in ("vivid", "calm", "exact"):
        assert f"{figures[f'reward-{name}']['pair_accuracy_held_out']:.1%}" in card(f"emoji-rewards/{name}")
    for name in FAMILIES:
        assert figures[f"evaluate-{name}"]["gain_in_base_std_within_prompt"] >= 1.5
        assert str(figures[f"evaluate-{name}"]["base_reward_mean"]) in card(f"emoji-{name}")
    assert str(figures["decoder"]["psnr_held_out_db"]) in card("emoji")


def card(folder):
    return (CHECKPOINTS / folder / "README.md").read_text()


def test_plain_diffusers_draws_concepts_that_the_clip_recognises(pipe):
    """The card's figure is measured on all concepts; this small draw guards against shipping the wrong files."""
    concepts = (ROOT / "assets" / "emoji" / "prompts.txt").read_text().splitlines()
    prompts = concepts[::4]
    noise = torch.randn(len(prompts), 8, 16, 16, generator=torch.Generator().manual_seed(0))
    images = pipe(prompts, latents=noise, num_inference_steps=12, guidance_scale=3.0, output_type="pt").images
    assert images.shape[1:] == (3, 64, 64)
    clip = load_clip(CHECKPOINTS / "emoji-clip")
    accuracy = concept_accuracy(clip, images, torch.arange(len(concepts))[::4], concepts)
    assert accuracy > 0.5, "chance is 2 %"


def test_our_base_and_finetuned_equal_plain_diffusers_on_the_built_in_model(pipe, engine):
    config = SampleConfig(prompt="a rocket", methods=("base", "finetuned"), seeds=(5, 6), num_inference_steps=6)
    ours = last(generate(engine, config)).images
    noise = torch.stack([torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in config.seeds])
    settings = {"latents": noise, "num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "np"}
    base = pipe(["a rocket"] * 2, **settings).images
    pipe.load_lora_weights(CHECKPOINTS / "emoji-vivid")
    tuned = pipe(["a rocket"] * 2, **settings).images
    pipe.unload_lora_weights()
    for mine, plain in ((ours["base"], base), (ours["finetuned"], tuned)):
        assert np.abs(mine.astype(float) - plain * 255).max() <= 2
    assert np.abs(base - tuned).max() > 0.1


@pytest.mark.parametrize(("name", "prompt"), [
    ("vivid", "a tulip"), ("calm", "a tulip"), ("exact", "three rockets"), ("mixed", "three rockets"),
])
def test_a_reward_lora_raises_its_reward_and_lowers_variety(engine, name, prompt):
    config = SampleConfig(lora=name, prompt=prompt, methods=("base", "finetuned"), num_inference_steps=10)
    scores = last(generate(engine, config)).scores
    base, tuned = scores["base"], scores["finetuned"]
    assert tuned.reward_mean > base.reward_mean + np.std(base.rewards)
    assert tuned.spectral.pairwise_distance < base.spectral.pairwise_distance


def test_readme_names_every_command_and_its_header_fits_the_requirements():
    readme = (ROOT / "README.md").read_text()
    for command in ("list", "sample", "score", "train", "pretrain", "bench"):
        assert f"python -m rewardiv {command}" in readme
    assert "pip install -r requirements.txt && python app.py" in readme
    assert "pip install -r requirements.txt -r tests/requirements.txt && pytest" in readme
    header = dict(re.findall(r"^(\w+): (.+)$", readme.split("---")[1], re.MULTILINE))
    assert header["sdk"] == "gradio" and header["app_file"] == "app.py" and Path(ROOT / header["app_file"]).exists()
    low, high = re.search(r"^gradio>=([\d.]+),<(\d+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE).groups()
    version = tuple(map(int, header["sdk_version"].split(".")))
    assert tuple(map(int, low.split("."))) <= version < (int(high),)


def test_links_in_the_readme_lead_to_files():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link


def test_the_prepared_runs_can_be_read_and_show_collapse_and_what_holds_it_back():
    runs = {job.name: job for job in list_jobs(PREPARED_RUNS)}
    assert {job.state for job in runs.values()} == {"done"} and not any(job.host or job.pid for job in runs.values())
    probes = {name: [ProbeRecord.from_dict(record) for record in read_jsonl(job.folder / "probes.jsonl")]
              for name, job in runs.items()}
    weights = PRESETS["cpu"].kl_weights
    assert set(runs) == {member(name, weight) for name in FAMILIES for weight in weights}
    for name, job in runs.items():
        steps, end = list_checkpoints(job.folder), probes[name][-1]
        assert {best_tradeoff(probes[name], steps).step, end.step} <= set(steps)
    for name in FAMILIES:
        assert probes[name][-1].gain > 0 and len(list_checkpoints(runs[name].folder)) >= 4
    assert all(collapse_onset(probes[name]) for name in FAMILIES)
    free, held = probes["mixed"][-1], probes[member("mixed", weights[-1])][-1]
    assert held.trace_ratio > free.trace_ratio and held.gain < free.gain
