"""Stage 3: a small CLIP over the same world: the `clip` reward, the features of every diversity number, the concept check.

Contrast of images and captions (Radford et al., arXiv 2103.00020). Differs: in a batch several captions may be true of
an image ("a cat face" and "a cat face on a blue background"), so the targets are spread evenly over all true pairs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rewardiv.clip_models import ClipModel, new_clip, save_clip
from rewardiv.pretrain.layouts import LARGE, SMALL, SceneSpec
from rewardiv.pretrain.loop import Recipe, train
from rewardiv.pretrain.scenes import Icons, Scenes, balanced_icons, captions, compose, load_icons
from rewardiv.pretrain.tokenizer import MAX_LENGTH, build_tokenizer

EMBED_DIM = 128
SINGLE = SceneSpec(min_size=0.6, max_size=1.0, shift=1.0, mirror=0.5)
COLOUR_ODDS, STYLE_ODDS = 0.4, 0.3
NUM_SCENES, NUM_TEST = 32_768, 1024
WARP_SCALE, WARP_SHIFT = (0.8, 1.1), 0.1


def build(width: int = 24) -> ClipModel:
    """The untrained model: a small ModifiedResNet at 64 px and a two-layer text transformer."""
    tokenizer = build_tokenizer()
    config = {
        "model_cfg": {
            "embed_dim": EMBED_DIM,
            "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": width},
            "text_cfg": {"context_length": MAX_LENGTH, "vocab_size": len(tokenizer), "width": 128, "heads": 4, "layers": 2},
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic",
                           "resize_mode": "shortest"},
    }
    return new_clip(config, tokenizer)


def true_pairs(icons: Icons, scenes: Scenes, rows: Tensor, says_colour: Tensor, says_style: Tensor) -> Tensor:
    """bool [n, n]: row image, column caption; true where everything that the caption says holds of the image.

    A caption always says which concepts and how many drawings there are, and their size where they are small or large.
    """
    concept_of = {concept: i for i, concept in enumerate(icons.concepts)}
    concept = torch.tensor([concept_of[record["caption"]] for record in icons.records])
    icon, other = scenes.icon[rows], scenes.other[rows]
    pair = torch.stack([concept[icon], torch.where(other >= 0, concept[other], -1)], 1).sort(1).values
    colour, number, size = scenes.colour[rows], scenes.number[rows], said_size(scenes.kind[rows])
    styles = [icons.records[i]["style"] for i in icon.tolist()]
    style = torch.tensor([sorted(set(styles)).index(s) for s in styles])
    return ((pair[:, None] == pair[None]).all(2) & (number[:, None] == number[None])
            & ((size[:, None] == size[None]) | (size[None] < 0))
            & ((colour[:, None] == colour[None]) | ~says_colour[None])
            & ((style[:, None] == style[None]) | ~says_style[None]))


def said_size(kind: Tensor) -> Tensor:
    """The kind where its caption says a size, else -1."""
    return torch.where((kind == SMALL) | (kind == LARGE), kind, -1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 scenes to float in [0, 1], each warped, so that a few scenes of a drawing do; some blurred, some noisy: generated
    images are a little of both."""
    images = warp(images.float() / 255, generator)
    soft = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    amount = torch.rand(len(images), 2, 1, 1, 1, generator=generator)
    images = torch.lerp(images, soft, (amount[:, 0] * 2 - 1).clamp_min(0))
    noise = torch.randn(images.shape, generator=generator) * 0.08 * (amount[:, 1] * 2 - 1).clamp_min(0)
    return (images + noise).clamp(0, 1)


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images at WARP_SCALE times their size, moved by WARP_SHIFT of half their side at most, half of them mirrored; what comes
    into sight repeats the border."""
    draw = torch.rand(4, len(images), generator=generator)
    low, high = WARP_SCALE
    scale = 1 / (low + (high - low) * draw[0])
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * torch.where(draw[3] < 0.5, -1.0, 1.0), scale
    theta[:, :, 2] = (draw[1:3].T * 2 - 1) * WARP_SHIFT
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def contrast(model: ClipModel, images: Tensor, texts: list[str], true: Tensor) -> Tensor:
    """Symmetric cross-entropy with targets spread over the true pairs."""
    image, text = F.normalize(model.encode_images(images).float()), F.normalize(model.encode_texts(texts).float())
    with torch.autocast(images.device.type, enabled=False):  # cosines that differ little are magnified a hundredfold
        logits = model.logit_scale.exp().clamp_max(100) * image @ text.T
    targets = true.float()
    return 0.5 * (F.cross_entropy(logits, targets / targets.sum(1, keepdim=True))
                  + F.cross_entropy(logits.T, targets.T / targets.T.sum(1, keepdim=True)))


@torch.no_grad()
def concept_accuracy(model: ClipModel, images: Tensor, concept: Tensor, concepts: list[str]) -> float:
    """Share of images [n, 3, H, W] in [0, 1] whose own concept has the highest cosine among all `concepts`."""
    text = F.normalize(model.encode_texts(concepts))
    image = torch.cat([F.normalize(model.encode_images(part)) for part in images.split(128)])
    return float(((image @ text.T).argmax(1) == concept).float().mean())


def labelled_scenes(icons: Icons, num: int, generator: torch.Generator) -> tuple[Scenes, Tensor]:
    """Scenes of one drawing and the position of each one's concept in `icons.concepts`."""
    scenes = compose(icons, balanced_icons(icons, num, generator), SINGLE, generator)
    concept_of = {concept: i for i, concept in enumerate(icons.concepts)}
    return scenes, torch.tensor([concept_of[icons.records[i]["caption"]] for i in scenes.icon.tolist()])


def run(recipe: Recipe, *, max_tier: int, spec: SceneSpec, work_dir: Path, output_dir: Path, seed: int, resume: bool,
        device: str) -> dict[str, float]:
    """Train on every style of the concepts up to a tier, in scenes of a spec, and write `output_dir`.

    Returns:
        The share of new scenes (other backgrounds, sizes, places of the same drawings) whose concept is named rightly.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # initial weights
    icons = load_icons(max_tier=max_tier)
    scenes = compose(icons, balanced_icons(icons, NUM_SCENES, generator), spec, generator)
    test, test_concept = labelled_scenes(icons, NUM_TEST, generator)
    model = build().to(device)

    def loss_fn(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(scenes.images), (recipe.batch_size,), generator=generator)
        texts = captions(icons, scenes, chosen, generator, colour_odds=COLOUR_ODDS, style_odds=STYLE_ODDS)
        says_colour = torch.tensor([" background" in text for text in texts])
        says_style = torch.tensor([" style" in text for text in texts])
        true = true_pairs(icons, scenes, chosen, says_colour, says_style).to(device)
        return {"loss": contrast(model, augment(scenes.images[chosen], generator).to(device), texts, true)}

    average = train("clip", model, loss_fn, recipe, folder=work_dir, seed=seed, resume=resume)
    accuracy = concept_accuracy(average, test.images.float().to(device) / 255, test_concept.to(device), icons.concepts)
    save_clip(average.net, average.config, average.tokenizer, output_dir)
    return {"concept_accuracy_new_scenes": round(accuracy, 4), "max_tier": max_tier}
