"""The referee of the base model: which concepts a picture shows, how many drawings, in whose style, on which colour.

It takes no part in training what it judges. It is a panel: each member is trained on scenes of all packs but one drawing of
each concept, another one than the other member's, and measured on scenes of those drawings, which it never saw. They judge
together, so every drawing of the model's world is known to one of them at least; what the panel finds in real scenes is the
ceiling of what it can find in generated pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rewardiv.pretrain.clip import augment
from rewardiv.pretrain.data import PACKS
from rewardiv.pretrain.layouts import MOST, PAIRED, SceneSpec
from rewardiv.pretrain.loop import Recipe, train
from rewardiv.pretrain.scenes import COLOURS, Icons, Scenes, balanced_icons, compose, load_icons
from rewardiv.runs import write_atomic

SPEC = SceneSpec(min_size=0.55, max_size=1.0, shift=1.0, mirror=0.5, small=0.1, large=0.05, counted=0.25, paired=0.35)
STYLES = tuple(pack.style for pack in PACKS)
NUM_SCENES, NUM_TEST = 32_768, 2048
NUM_MEMBERS = 2
REFEREE_NAME = "referee.safetensors"
BORDER = 3  # px of the frame in which the background is read
DRAWING_OF = {"fluent-flat": "fluent", "fluent-3d": "fluent"}  # three renderings of one drawing


class Referee(nn.Module):
    """Images [n, 3, 64, 64] in [0, 1] to logits of concepts [n, C], numbers [n, 4] and styles [n, 9].

    A concept's logit is the log-sum-exp of those of 4 × 4 places, so that of two things side by side each can be sure.
    """

    def __init__(self, num_concepts: int, width: int = 48) -> None:
        super().__init__()
        sizes = (width, width, 2 * width, 4 * width, 4 * width)
        self.stem = nn.Conv2d(3, width, 5, 2, 2)
        self.blocks = nn.ModuleList(Block(a, b, halves=a < sizes[-1]) for a, b in zip(sizes, sizes[1:], strict=False))
        self.heads = nn.ModuleList(nn.Linear(sizes[-1], num) for num in (num_concepts, MOST, len(STYLES)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem((images - 0.5) * 4)
        for block in self.blocks:
            x = block(x)
        places = F.silu(x).flatten(2).transpose(1, 2)
        concepts, numbers, styles = (head(seen) for head, seen in zip(self.heads, (places, *[places.mean(1)] * 2), strict=True))
        return concepts.float().logsumexp(1), numbers, styles


class Panel(nn.Module):
    """Referees that judge together, in the form of one: logarithms of their mean probabilities."""

    def __init__(self, num_concepts: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(Referee(num_concepts) for _ in range(NUM_MEMBERS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = zip(*(member(images) for member in self.members), strict=True)
        concepts, numbers, styles = (torch.stack(head).log_softmax(2).logsumexp(0) - math.log(NUM_MEMBERS) for head in heads)
        return concepts, numbers, styles


class Block(nn.Module):
    """Two convolutions and a way around them; may halve the size."""

    def __init__(self, channels: int, out_channels: int, *, halves: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, size) for size in (channels, out_channels))
        self.first = nn.Conv2d(channels, out_channels, 3, 1, 1)
        self.second = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.around = nn.Conv2d(channels, out_channels, 1)
        self.shrink = nn.AvgPool2d(2) if halves else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inside = self.shrink(self.first(F.silu(self.norms[0](x))))
        return self.second(F.silu(self.norms[1](inside))) + self.around(self.shrink(x))


@dataclass(frozen=True)
class Truth:
    """What n scenes show: concepts, bool [n, C]; numbers of drawings and styles, int64 [n]."""

    concepts: Tensor
    number: Tensor
    style: Tensor


def truth(icons: Icons, scenes: Scenes, concepts: list[str]) -> Truth:
    """Of composed scenes."""
    place = {concept: k for k, concept in enumerate(concepts)}
    own = torch.tensor([place[record["caption"]] for record in icons.records])
    style = torch.tensor([STYLES.index(record["style"]) for record in icons.records])
    shown = F.one_hot(own[scenes.icon], len(concepts)).bool()
    paired = scenes.kind == PAIRED
    shown[paired] |= F.one_hot(own[scenes.other[paired]], len(concepts)).bool()
    return Truth(shown, scenes.number, style[scenes.icon])


def split_drawings(icons: Icons, member: int) -> tuple[Icons, Icons]:
    """Icons to train a member on, and those held out: of each concept all renderings of one drawing, another artist's in turn
    and for each member."""
    drawing = [DRAWING_OF.get(record["style"], record["style"]) for record in icons.records]
    held = []
    for k, concept in enumerate(icons.concepts):
        own = [i for i, record in enumerate(icons.records) if record["caption"] == concept]
        artists = list(dict.fromkeys(drawing[i] for i in own))
        held += [i for i in own if drawing[i] == artists[(k + member) % len(artists)]]
    kept = sorted(set(range(len(icons.records))) - set(held))
    return icons.where(kept), icons.where(held)


def losses(referee: Referee, images: Tensor, target: Truth) -> dict[str, Tensor]:
    """Cross-entropies: the two concepts of a pair share the target."""
    concepts, numbers, styles = referee(images)
    share = target.concepts.float() / target.concepts.sum(1, keepdim=True)
    terms = {"concept": F.cross_entropy(concepts, share), "number": F.cross_entropy(numbers, target.number - 1),
             "style": F.cross_entropy(styles, target.style)}
    return {"loss": terms["concept"] + 0.5 * terms["number"] + 0.3 * terms["style"], **terms}


@dataclass(frozen=True)
class Findings:
    """What the referee sees in n images: the likeliest concepts, best first, [n, 2]; number, style, colour [n]; int64."""

    concepts: Tensor
    number: Tensor
    style: Tensor
    colour: Tensor


@torch.no_grad()
def findings(referee: Referee | Panel, images: Tensor) -> Findings:
    """Of images [n, 3, 64, 64] in [0, 1]."""
    parts = [referee(part) for part in images.split(256)]
    concepts, numbers, styles = (torch.cat(list(one)) for one in zip(*parts, strict=True))
    return Findings(concepts.topk(2).indices, numbers.argmax(1) + 1, styles.argmax(1), background(images))


def background(images: Tensor) -> Tensor:
    """The named colour nearest to the median of the frame's pixels, in sRGB: positions in COLOURS, int64 [n]."""
    inside = torch.zeros(images.shape[2:], dtype=torch.bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    median = images[:, :, ~inside].median(2).values * 255
    palette = torch.tensor(list(COLOURS.values()), dtype=median.dtype)
    return torch.cdist(median.cpu(), palette).argmin(1)


def accuracies(found: Findings, target: Truth, colour: Tensor) -> dict[str, float]:
    """Shares of images that are right: one concept; the number and its concept; both of two; style; background."""
    single = target.number == 1
    best = target.concepts.gather(1, found.concepts)
    paired = target.concepts.sum(1) == 2
    counted = ~single & ~paired
    shares = {
        "concept": best[single, 0], "count": best[counted, 0] & (found.number == target.number)[counted],
        "both": best[paired].all(1), "style": (found.style == target.style)[single], "colour": found.colour == colour,
    }
    return {name: round(float(values.float().mean()), 4) for name, values in shares.items()}


def run(recipe: Recipe, *, max_tier: int, work_dir: Path, seed: int, resume: bool, device: str) -> dict[str, float]:
    """Train the panel, measure each member on drawings that it never saw, and write `work_dir`/referee.safetensors: it isn't
    shipped.

    Returns:
        The members' mean accuracies on scenes of unseen drawings.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    torch.manual_seed(seed + 1)  # initial weights
    icons = load_icons(max_tier=max_tier)
    kept, held = zip(*(split_drawings(icons, member) for member in range(NUM_MEMBERS)), strict=True)
    scenes = [compose(own, balanced_icons(own, NUM_SCENES, generator), SPEC, generator) for own in kept]
    targets = [truth(own, shown, icons.concepts) for own, shown in zip(kept, scenes, strict=True)]
    panel = Panel(len(icons.concepts)).to(device)

    def loss_fn(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        terms = []
        for member, shown, target in zip(panel.members, scenes, targets, strict=True):
            rows = torch.randint(len(shown.images), (recipe.batch_size,), generator=generator)
            own = Truth(*(one[rows].to(device) for one in (target.concepts, target.number, target.style)))
            terms.append(losses(member, augment(shown.images[rows], generator).to(device), own))
        return {name: sum(one[name] for one in terms) / NUM_MEMBERS for name in terms[0]}

    average = train("referee", panel, loss_fn, recipe, folder=work_dir, seed=seed, resume=resume).cpu().eval()
    write_atomic(work_dir / REFEREE_NAME, lambda partial: save_file(average.state_dict(), partial))
    found = []
    for member, own in zip(average.members, held, strict=True):
        test = compose(own, balanced_icons(own, NUM_TEST, generator), SPEC, generator)
        found.append(accuracies(findings(member, test.images.float() / 255), truth(own, test, icons.concepts), test.colour))
    return {name: round(mean(one[name] for one in found), 4) for name in found[0]}


def load_referee(folder: Path, num_concepts: int) -> Panel:
    """The panel that `run` has written."""
    panel = Panel(num_concepts)
    panel.load_state_dict(load_file(folder / REFEREE_NAME))
    return panel.eval()
