"""Stage 4: preference rewards of PickScore's form, learned from synthetic judges (no person was asked).

A judge compares two images of one prompt and votes by chance, more surely the larger the difference. Two judges have a taste, a
documented formula; in some of their pairs one image shows another concept, and they then prefer the one that fits the prompt.
The third, `exact`, looks only at whether the prompt holds: which things, how many, on what colour. The reward is the CLIP of
stage 3, fine-tuned so that softmax(exp(logit_scale) · cos) predicts the votes.

Source: Kirstain et al., "Pick-a-Pic", arXiv 2305.01569 (the form and the loss). Differs: synthetic votes, no ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rewardiv.clip_models import ClipModel, load_clip, save_clip
from rewardiv.pretrain.clip import SINGLE, augment
from rewardiv.pretrain.layouts import SceneSpec
from rewardiv.pretrain.loop import Recipe, train
from rewardiv.pretrain.scenes import COLOURS, Icons, Scenes, balanced_icons, captions, compose, load_icons

LUMA = (0.299, 0.587, 0.114)
SURENESS = 12.0  # votes follow sigmoid(SURENESS · difference of the judge's scores)
MISFIT = 0.5  # what the judge takes off an image of another concept
MISFIT_ODDS = 0.25
ASKED = SceneSpec(min_size=0.6, max_size=1.0, shift=1.0, small=0.05, large=0.05, counted=0.45, paired=0.25)
SAME_ICON_ODDS, SAME_COLOUR_ODDS, SAID_COLOUR_ODDS = 0.65, 0.5, 0.5  # of the second image, and of the prompt, for `exact`
NUM_TEST = 1024


def luma(images: Tensor) -> Tensor:
    """Brightness [n, H, W] of images [n, 3, H, W] in [0, 1]."""
    return torch.einsum("nchw,c->nhw", images, torch.tensor(LUMA).to(images))


def chroma(images: Tensor) -> Tensor:
    """Mean colour strength [n]: the largest minus the smallest channel, in [0, 1]."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def vivid(images: Tensor) -> Tensor:
    """Likes strong colours and glossy contrast: mean chroma + the standard deviation of brightness. [n]."""
    return chroma(images) + luma(images).flatten(1).std(1)


def calm(images: Tensor) -> Tensor:
    """Likes flat, muted, light pictures: minus chroma, minus 2 × mean brightness step between pixels, minus distance
    of the mean brightness from 0.75. [n]."""
    bright = luma(images)
    steps = bright.diff(dim=1).abs().mean((1, 2)) + bright.diff(dim=2).abs().mean((1, 2))
    return -chroma(images) - 2 * steps - (bright.mean((1, 2)) - 0.75).abs()


@dataclass(frozen=True)
class Pairs:
    """Two images of one prompt each: `left`, `right` [n, 3, H, W] in [0, 1], prompts, by how much the judge likes the left one
    more, `difference` [n], and the `vote` [n] that came of it (1: left)."""

    left: Tensor
    right: Tensor
    prompts: list[str]
    difference: Tensor
    vote: Tensor


def voted(left: Tensor, right: Tensor, prompts: list[str], difference: Tensor, generator: torch.Generator) -> Pairs:
    """Let the judge vote, and change sides by chance: the fitting image must not always be left."""
    vote = torch.bernoulli(torch.sigmoid(SURENESS * difference), generator=generator)
    swap = torch.rand(len(prompts), generator=generator) < 0.5
    over = swap[:, None, None, None]
    return Pairs(torch.where(over, right, left), torch.where(over, left, right), prompts,
                 torch.where(swap, -difference, difference), torch.where(swap, 1 - vote, vote))


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Vary saturation, contrast, brightness and sharpness, so that judges see more than the artists drew."""
    saturation, contrast, shift, blur = torch.rand(4, len(images), 1, 1, 1, generator=generator)
    grey = luma(images)[:, None]
    images = grey + (images - grey) * (0.2 + 1.6 * saturation)
    images = 0.5 + (images - 0.5) * (0.5 + 0.9 * contrast) + 0.3 * (shift - 0.5)
    soft = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    return torch.lerp(images, soft, (2 * blur - 1).clamp_min(0)).clamp(0, 1)


def taste_pairs(judge: Callable[[Tensor], Tensor], icons: Icons, num: int, generator: torch.Generator) -> Pairs:
    """`num` pairs: two scenes of one concept, or in MISFIT_ODDS of them a right scene of any concept."""
    icon = balanced_icons(icons, num, generator)
    of_concept: dict[str, list[int]] = {}
    for position, record in enumerate(icons.records):
        of_concept.setdefault(record["caption"], []).append(position)
    prompts = [icons.records[i]["caption"] for i in icon.tolist()]
    draw = torch.rand(num, 2, generator=generator).tolist()
    other = [int(u * len(icons.records)) if misfit < MISFIT_ODDS else of_concept[p][int(u * len(of_concept[p]))]
             for p, (u, misfit) in zip(prompts, draw, strict=True)]
    left = compose(icons, icon, SINGLE, generator).images.float() / 255
    right = compose(icons, torch.tensor(other), SINGLE, generator).images.float() / 255
    left, right = recolour(left, generator), recolour(right, generator)
    fits = torch.tensor([icons.records[o]["caption"] == p for o, p in zip(other, prompts, strict=True)])
    return voted(left, right, prompts, judge(left) - judge(right) + MISFIT * (~fits).float(), generator)


def exact_pairs(icons: Icons, num: int, generator: torch.Generator) -> Pairs:
    """`num` pairs: a scene with its caption, and one that often has the same drawing or background but another number,
    partner or colour. The judge takes MISFIT off for each statement of the caption that doesn't hold."""
    icon = balanced_icons(icons, num, generator)
    asked = compose(icons, icon, ASKED, generator)
    draw = torch.rand(2, num, generator=generator)
    any_icon = torch.randint(len(icons.records), (num,), generator=generator)
    any_colour = torch.randint(len(COLOURS), (num,), generator=generator)
    shown = compose(icons, torch.where(draw[0] < SAME_ICON_ODDS, icon, any_icon), ASKED, generator,
                    torch.where(draw[1] < SAME_COLOUR_ODDS, asked.colour, any_colour))
    prompts = captions(icons, asked, torch.arange(num), generator, colour_odds=SAID_COLOUR_ODDS, style_odds=0.0)
    says_colour = torch.tensor([" background" in prompt for prompt in prompts])
    wrong = ((things(icons, asked) != things(icons, shown)).any(1).float() + (asked.number != shown.number).float()
             + (says_colour & (asked.colour != shown.colour)).float())
    left, right = augment(asked.images, generator), augment(shown.images, generator)
    return voted(left, right, prompts, MISFIT * wrong, generator)


def things(icons: Icons, scenes: Scenes) -> Tensor:
    """Which concepts each scene shows, int64 [n, 2], in order; -1 where there is no second one."""
    place = {concept: k for k, concept in enumerate(icons.concepts)}
    concept = torch.tensor([place[record["caption"]] for record in icons.records])
    other = torch.where(scenes.other >= 0, concept[scenes.other], -1)
    return torch.stack([concept[scenes.icon], other], dim=1).sort(dim=1).values


DRAW: dict[str, Callable[[Icons, int, torch.Generator], Pairs]] = {  # by reward
    "vivid": partial(taste_pairs, vivid), "calm": partial(taste_pairs, calm), "exact": exact_pairs,
}


def vote_logits(model: ClipModel, pairs: Pairs) -> Tensor:
    """Log odds [n] that the left image wins: the difference of the two rewards (Bradley–Terry)."""
    num, device = len(pairs.prompts), model.mean.device
    with torch.autocast(device.type, enabled=False):  # cosines that differ little are magnified a hundredfold
        cosines = model.cosines(torch.cat([pairs.left, pairs.right]).to(device), pairs.prompts * 2)
    return model.logit_scale.exp().clamp_max(100) * (cosines[:num] - cosines[num:])


@torch.no_grad()
def pair_accuracy(model: ClipModel, pairs: Pairs) -> float:
    """Share of votes that the reward predicts."""
    return float(((vote_logits(model, pairs) > 0).cpu() == pairs.vote.bool()).float().mean())


def run(name: str, recipe: Recipe, *, max_tier: int, clip_dir: Path, work_dir: Path, output_dir: Path, seed: int,
        resume: bool, device: str) -> dict[str, float]:
    """Fine-tune the CLIP in `clip_dir` on one judge's votes and write `output_dir`.

    Returns:
        Held-out pair accuracy, and that of the judge's own score (about the best possible: votes are by chance).
    """
    draw_pairs = DRAW[name]
    icons = load_icons(max_tier=max_tier)
    model = load_clip(clip_dir, device).requires_grad_(True)
    for module in model.modules():  # keep the running statistics that the CLIP was trained to: pairs are recoloured
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    test = draw_pairs(icons, NUM_TEST, torch.Generator().manual_seed(seed + 1))

    def loss_fn(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        pairs = draw_pairs(icons, recipe.batch_size, generator)
        return {"loss": F.binary_cross_entropy_with_logits(vote_logits(model, pairs), pairs.vote.to(device))}

    average = train(f"reward-{name}", model, loss_fn, recipe, folder=work_dir, seed=seed, resume=resume)
    save_clip(average.net, average.config, average.tokenizer, output_dir)
    judged = ((test.difference > 0) == test.vote.bool()).float().mean()
    return {"pair_accuracy_held_out": round(pair_accuracy(average, test), 4),
            "pair_accuracy_of_the_judge": round(float(judged), 4)}
