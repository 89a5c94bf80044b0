"""Measures the built-in base model: is what a prompt asks for there, is its variety that of real scenes; contact sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, pstdev, pvariance

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from rewardiv.clip_models import ClipModel, load_clip
from rewardiv.config import SampleConfig
from rewardiv.export import prompt_grid
from rewardiv.generate import Engine, Result, generate
from rewardiv.gram import frechet_distance, kernel_distance
from rewardiv.metrics import effective_rank, eigenvalues
from rewardiv.pretrain.base_model import World
from rewardiv.pretrain.clip import concept_accuracy
from rewardiv.pretrain.layouts import MOST
from rewardiv.pretrain.referee import Panel, Truth, accuracies, findings
from rewardiv.pretrain.referee import truth as truth_of
from rewardiv.pretrain.scenes import COLOURS, Icons, balanced_icons, compose
from rewardiv.pretrain.wording import caption, countable
from rewardiv.runs import write_atomic


def load_pipeline(folder: Path, device: str) -> StableDiffusionPipeline:
    """The committed folder through plain diffusers, in fp32."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True,
                                                   safety_checker=None).to(device)
    pipe.unet.to(memory_format=torch.channels_last)  # about a third faster on a CPU
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe: StableDiffusionPipeline, concepts: list[str], *, num_images: int, num_inference_steps: int,
         guidance_scale: float) -> Tensor:
    """Images [len(concepts) · num_images, 3, 64, 64] in [0, 1], concept by concept, seeds 0 … num_images − 1 for each."""
    parts = []
    for concept in concepts:
        generators = [torch.Generator().manual_seed(seed) for seed in range(num_images)]
        parts.append(pipe([concept] * num_images, generator=generators, num_inference_steps=num_inference_steps,
                          guidance_scale=guidance_scale, output_type="pt").images.cpu())
    return torch.cat(parts)


@torch.no_grad()
def encode(clip: ClipModel, images: Tensor) -> np.ndarray:
    """The CLIP's features [n, d] of images [n, 3, 64, 64] in [0, 1]."""
    return torch.cat([clip.encode_images(part.to(clip.mean.device)) for part in images.split(128)]).cpu().numpy()


def mean_effective_rank(features: np.ndarray, num_images: int) -> float:
    """Effective rank of the features [n, d] within each run of `num_images` rows, averaged over the runs."""
    return mean(effective_rank(eigenvalues(part)) for part in features.reshape(-1, num_images, features.shape[1]))


def real_scenes(icons: Icons, world: World, num_images: int, generator: torch.Generator) -> Tensor:
    """Scenes as the model was trained on, `num_images` for each concept in turn, styles drawn at random."""
    icon = []
    for concept in icons.concepts:
        of_concept = [i for i, record in enumerate(icons.records) if record["caption"] == concept]
        order = torch.randint(len(of_concept), (num_images,), generator=generator)
        icon += [of_concept[i] for i in order.tolist()]
    return compose(icons, torch.tensor(icon), world.spec, generator).images.float() / 255


def measure(world: World, referee: Panel | None, *, base_dir: Path, clip_dir: Path, sheet_path: Path, num_images: int = 16,
            seed: int = 0, num_inference_steps: int = 25, guidance_scale: float = 3.0, device: str = "cpu") -> dict[str, float]:
    """Draw "a CONCEPT" for every concept, write the contact sheet, and return the figures for the model card.

    Returns:
        Concept accuracies by the CLIP that ships, and by the referee where there is one, each also of real scenes; effective
        ranks within a prompt and their ratio; the squared Fréchet and the kernel distance of all images' CLIP features to real
        scenes, and that of as many other real scenes (the floor); the referee's numbers of styles among `num_images`.
    """
    icons, clip = world.icons(), load_clip(clip_dir, device)
    images = draw(load_pipeline(base_dir, device), icons.concepts, num_images=num_images,
                  num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    concept = torch.arange(len(icons.concepts)).repeat_interleave(num_images)
    generator = torch.Generator().manual_seed(seed)
    single = replace(world, spec=replace(world.spec, small=0.0, large=0.0, counted=0.0, paired=0.0))
    real, again = (real_scenes(icons, single, num_images, generator) for _ in range(2))
    write_atomic(sheet_path, lambda partial: mosaic(images, num_images).save(partial, "WEBP", quality=90))
    features = {name: encode(clip, x) for name, x in (("drawn", images), ("real", real), ("again", again))}
    rank, real_rank = (mean_effective_rank(features[name], num_images) for name in ("drawn", "real"))
    figures = {
        "concept_accuracy": round(concept_accuracy(clip, images.to(device), concept.to(device), icons.concepts), 4),
        "concept_accuracy_real": round(concept_accuracy(clip, real.to(device), concept.to(device), icons.concepts), 4),
        "effective_rank": round(rank, 3), "effective_rank_real": round(real_rank, 3),
        "effective_rank_share": round(rank / real_rank, 4),
        "frechet": round(frechet_distance(features["drawn"], features["real"]), 4),
        "frechet_floor": round(frechet_distance(features["again"], features["real"]), 4),
        "kernel": round(kernel_distance(features["drawn"], features["real"]), 5),
        "kernel_floor": round(kernel_distance(features["again"], features["real"]), 5),
        "num_concepts": len(icons.concepts), "num_images": num_images, "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    if referee:
        for name, seen in (("", findings(referee, images)), ("_real", findings(referee, real))):
            figures[f"referee_concept{name}"] = round(float((seen.concepts[:, 0] == concept).float().mean()), 4)
            figures[f"styles{name}"] = distinct(seen.style, num_images)
    return figures


def mosaic(images: Tensor, num_images: int) -> Image.Image:
    """The first SHEET_SEEDS of each run of `num_images`, SHEET_CONCEPTS runs side by side."""
    own = torch.cat([part[:SHEET_SEEDS] for part in images.split(num_images)])
    return to_pil_image(make_grid(own, nrow=SHEET_CONCEPTS * min(SHEET_SEEDS, num_images)))


@dataclass(frozen=True)
class Asked:
    """Prompts of one kind and what their pictures must show: `truth` for the referee, and the `colour` of the background."""

    prompts: list[str]
    truth: Truth
    colour: Tensor


def asked(kind: str, concepts: list[str], num: int, generator: torch.Generator) -> Asked:
    """Prompts of a kind of ASKED for `num` of the concepts at most."""
    order = torch.randperm(len(concepts), generator=generator).tolist()
    order = [i for i in order if kind != "counted" or countable(concepts[i])][:num]
    number = torch.ones(len(order), dtype=torch.long)
    if kind == "counted":
        number = torch.randint(2, MOST + 1, (len(order),), generator=generator)
    colour = torch.randint(len(COLOURS), (len(order),), generator=generator)
    shown = F.one_hot(torch.tensor(order), len(concepts)).bool()
    prompts = []
    for k, i in enumerate(order):
        other = ""
        if kind == "paired":
            shown[k, order[k - 1]], number[k], other = True, 2, concepts[order[k - 1]]
        said = list(COLOURS)[colour[k]] if kind == "colour" else None
        prompts.append(caption(concepts[i], other, number=1 if other else int(number[k]), colour=said))
    return Asked(prompts, Truth(shown, number, torch.zeros_like(number)), colour)


ASKED = {"colour": "colour", "counted": "count", "paired": "both"}  # kinds of prompts, and what is right then
NUM_ASKED, NUM_REAL = 40, 2048  # prompts of a kind, real scenes
SHEET_PROMPTS, SHEET_SEEDS, SHEET_CONCEPTS = 8, 4, 4  # prompts of a kind on the sheet; seeds and concepts in a mosaic's row


def measure_asked(referee: Panel, world: World, *, base_dir: Path, sheet_path: Path, num_images: int = 16, seed: int = 0,
                  num_inference_steps: int = 25, guidance_scale: float = 3.0, device: str = "cpu") -> dict[str, float]:
    """What share of the pictures shows what their prompts ask for, by the referee; only what the world has is asked for.

    Writes a sheet of the first prompts of each kind.

    Returns:
        colour, count, both: shares of pictures, and with _real those of the referee on scenes of the model's world.
    """
    icons, generator = world.icons(), torch.Generator().manual_seed(seed)
    pipe, concepts = load_pipeline(base_dir, device), icons.concepts
    kinds = [kind for kind in ASKED if kind == "colour" or getattr(world.spec, kind) > 0]
    found, shown, prompts = {}, [], []
    for kind in kinds:
        own = asked(kind, concepts, NUM_ASKED, generator)
        images = draw(pipe, own.prompts, num_images=num_images, num_inference_steps=num_inference_steps,
                      guidance_scale=guidance_scale)
        rows = torch.arange(len(own.prompts)).repeat_interleave(num_images)
        truth = Truth(own.truth.concepts[rows], own.truth.number[rows], own.truth.style[rows])
        found[ASKED[kind]] = accuracies(findings(referee, images), truth, own.colour[rows])[ASKED[kind]]
        shown += [part[: 2 * SHEET_SEEDS] for part in images.split(num_images)[:SHEET_PROMPTS]]
        prompts += own.prompts[:SHEET_PROMPTS]
    scenes = compose(icons, balanced_icons(icons, NUM_REAL, generator), world.spec, generator)
    real = accuracies(findings(referee, scenes.images.float() / 255), truth_of(icons, scenes, concepts), scenes.colour)
    found |= {f"{name}_real": real[name] for name in found}
    pixels = (torch.stack(shown).permute(0, 1, 3, 4, 2) * 255).round().to(torch.uint8).numpy()
    sheet = prompt_grid(pixels, prompts, range(pixels.shape[1]), "The built-in model, by prompt and seed")
    write_atomic(sheet_path, lambda partial: sheet.save(partial, "WEBP", quality=90))
    return found | {"num_prompts": NUM_ASKED, "num_images": num_images, "num_inference_steps": num_inference_steps,
                    "guidance_scale": guidance_scale}


def distinct(styles: Tensor, num_images: int) -> float:
    """How many different styles [n] are in each run of `num_images`, mean over the runs."""
    return round(mean(len(set(part.tolist())) for part in styles.split(num_images)), 3)


METHODS = ("base", "finetuned", "lora:0.5", "aig:power:2")
EVERY = 6  # each EVERY-th prompt of the list is one of the LoRA's measurement


def measure_lora(lora_dir: Path, reward_dir: Path, prompts_path: Path, *, base_dir: Path, clip_dir: Path, device: str,
                 num_seeds: int = 8, num_inference_steps: int = 20, guidance_scale: float = 3.0) -> dict[str, object]:
    """What a LoRA does to reward and diversity, by method: each EVERY-th prompt of a file, `num_seeds` seeds.

    Returns:
        The base's mean reward; its standard deviation over all images, and within a prompt (rewards are made to compare
        images of one prompt; the rest is how well the prompts go); the finetuned model's gain in each of the two; and for
        each method the mean reward and, averaged over prompts, pairwise distance, effective rank and SCD; the typical prompt,
        of which the finetuned model keeps the median share of the base's variance (the lower one of two).
    """
    engine = Engine(device, features_path=str(clip_dir))
    prompts = prompts_path.read_text().splitlines()[::EVERY]
    results = []
    for prompt in tqdm(prompts, desc=f"measuring {lora_dir.name}", unit="prompt"):
        config = SampleConfig(model=str(base_dir), lora=str(lora_dir), prompt=prompt, methods=METHODS,
                              seeds=tuple(range(num_seeds)), num_inference_steps=num_inference_steps,
                              guidance_scale=guidance_scale, rewards=(str(reward_dir),))
        *_, result = generate(engine, config, preview_every=num_inference_steps)
        results.append(result)
    base = [value for result in results for value in result.scores["base"].rewards]
    tuned = [value for result in results for value in result.scores["finetuned"].rewards]
    kept = sorted((result.scores["finetuned"].spectral.trace_ratio, result.config.prompt) for result in results)
    gain, within = mean(tuned) - mean(base), mean(pvariance(result.scores["base"].rewards) for result in results) ** 0.5
    return {
        "num_prompts": len(prompts), "num_seeds": num_seeds, "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale, "base_reward_mean": round(mean(base), 3),
        "base_reward_std": round(pstdev(base), 3), "gain_in_base_std": round(gain / pstdev(base), 2),
        "base_reward_std_within_prompt": round(within, 3), "gain_in_base_std_within_prompt": round(gain / within, 2),
        "typical_prompt": kept[(len(kept) - 1) // 2][1],
        "methods": {method: method_figures(results, method) for method in METHODS},
    }


def method_figures(results: list[Result], method: str) -> dict[str, float]:
    """Mean reward over all images, and diversity within a prompt averaged over the prompts."""
    scores = [result.scores[method] for result in results]
    return {
        "reward": round(mean(value for score in scores for value in score.rewards), 3),
        "pairwise_distance": round(mean(score.spectral.pairwise_distance for score in scores), 3),
        "effective_rank": round(mean(score.spectral.effective_rank for score in scores), 3),
        "trace_ratio": round(mean(score.spectral.trace_ratio for score in scores), 3),
        "scd": round(mean(score.spectral.scd for score in scores), 4),
    }
