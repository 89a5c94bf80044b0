"""Composes training scenes on the fly: one emoji on a coloured background, with a caption.

The icons come from assets/emoji (see `data`). A scene is an icon, a background colour that contrasts with it, a size,
a place and perhaps a mirror image; a caption names the concept and sometimes the background and the drawing style.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from rewardiv.errors import UserError
from rewardiv.pretrain.data import ASSETS, CELL, COLUMNS, PACKS

SIZE = 64  # pixels of a scene's side
STYLE_WORDS = {pack.style: pack.word for pack in PACKS}
COLOURS = {  # word: sRGB in 0..255
    "white": (245, 245, 242), "grey": (150, 152, 156), "black": (32, 33, 38), "red": (205, 52, 52),
    "orange": (243, 145, 46), "yellow": (250, 214, 82), "green": (86, 168, 82), "blue": (62, 122, 214),
    "purple": (132, 86, 190), "pink": (246, 168, 196),
}
COLOUR_JITTER = 14.0  # standard deviation of a background around its named colour, in 0..255
MIN_CONTRAST = 70.0  # Euclidean sRGB distance between a background and the icon's mean colour


@dataclass(frozen=True)
class Icons:
    """Icons in memory: `rgba` [n, 4, CELL, CELL] in [0, 1] with colour premultiplied by alpha; one record each."""

    rgba: Tensor
    records: tuple[dict, ...]

    def where(self, keep: list[int]) -> Icons:
        """The icons at these positions."""
        return Icons(self.rgba[keep], tuple(self.records[i] for i in keep))

    @property
    def concepts(self) -> list[str]:
        """The captions of the concepts, each once, in order of appearance."""
        return list(dict.fromkeys(record["caption"] for record in self.records))


@dataclass(frozen=True)
class SceneSpec:
    """How scenes vary: an icon's side as a share of the scene's, its shift as a share of the free room, mirror odds."""

    min_size: float = 0.78
    max_size: float = 0.95
    shift: float = 0.6
    mirror: float = 0.0


@dataclass(frozen=True)
class Scenes:
    """Composed scenes: `images` [n, 3, 64, 64] uint8, the icon and the background colour (index) of each."""

    images: Tensor
    icon: Tensor
    colour: Tensor


def load_icons(*, max_tier: int = 2, styles: tuple[str, ...] | None = None) -> Icons:
    """Read the committed atlases: concepts up to a tier, in the named styles (default all).

    Raises:
        UserError: If assets/emoji is missing or damaged.
    """
    index = ASSETS / "icons.jsonl"
    if not index.exists():
        raise UserError(f"{index} is missing; restore it from the repository or run: python -m rewardiv pretrain data")
    records = [json.loads(line) for line in index.read_text().splitlines()]
    records = [r for r in records if r["tier"] <= max_tier and (styles is None or r["style"] in styles)]
    atlases = {name: read_atlas(name) for name in sorted({r["file"] for r in records})}
    icons = []
    for record in records:
        top, left = record["cell"] // COLUMNS * CELL, record["cell"] % COLUMNS * CELL
        icons.append(atlases[record["file"]][:, top:top + CELL, left:left + CELL])
    return Icons(torch.stack(icons), tuple(records))


def read_atlas(name: str) -> Tensor:
    """One atlas as [4, H, W] in [0, 1], colour premultiplied by alpha."""
    try:
        image = Image.open(ASSETS / name).convert("RGBA")
    except OSError as error:
        raise UserError(f"cannot read {ASSETS / name}: {error}") from error
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    rgba = flat.view(image.height, image.width, 4).permute(2, 0, 1).float() / 255
    return torch.cat([rgba[:3] * rgba[3:], rgba[3:]])


def contrasting_colours(icons: Icons) -> Tensor:
    """Which of COLOURS stand out behind which icon: bool [n, len(COLOURS)], at least one a row."""
    area = icons.rgba[:, 3].sum((1, 2)).clamp_min(1)
    mean = icons.rgba[:, :3].sum((2, 3)) / area[:, None] * 255
    distance = torch.cdist(mean, torch.tensor(list(COLOURS.values())).float())
    return (distance >= MIN_CONTRAST) | (distance == distance.amax(1, keepdim=True))


def compose(icons: Icons, icon: Tensor, spec: SceneSpec, generator: torch.Generator,
            colour: Tensor | None = None) -> Scenes:
    """Put the chosen icons on backgrounds.

    Args:
        icons: What to choose from.
        icon: Positions in `icons`, int64 [n].
        spec: How much scenes vary.
        generator: CPU generator; the only randomness.
        colour: Backgrounds as positions in COLOURS, int64 [n]; default a random contrasting one for each.

    Returns:
        n scenes.
    """
    num = len(icon)
    if colour is None:
        colour = torch.multinomial(contrasting_colours(icons)[icon].float(), 1, generator=generator)[:, 0]
    palette = torch.tensor(list(COLOURS.values())).float()
    background = (palette[colour] + COLOUR_JITTER * torch.randn(num, 3, generator=generator)).clamp(0, 255) / 255
    size = spec.min_size + (spec.max_size - spec.min_size) * torch.rand(num, generator=generator)
    shift = (torch.rand(num, 2, generator=generator) * 2 - 1) * spec.shift * (1 - size)[:, None]
    flip = 1 - 2 * (torch.rand(num, generator=generator) < spec.mirror).float()

    theta = torch.zeros(num, 2, 3)  # output coordinates -> icon coordinates
    theta[:, 0, 0], theta[:, 1, 1] = flip / size, 1 / size
    theta[:, :, 2] = -shift / size[:, None] * torch.stack([flip, torch.ones(num)], dim=1)
    images = torch.empty(num, 3, SIZE, SIZE, dtype=torch.uint8)
    for part in torch.arange(num).split(256):
        grid = F.affine_grid(theta[part], [len(part), 4, 2 * SIZE, 2 * SIZE], align_corners=False)
        rgba = F.avg_pool2d(F.grid_sample(icons.rgba[icon[part]], grid, align_corners=False), 2)
        scene = rgba[:, :3] + (1 - rgba[:, 3:]) * background[part][:, :, None, None]
        images[part] = (scene.clamp(0, 1) * 255).round().to(torch.uint8)
    return Scenes(images, icon, colour)


def captions(icons: Icons, icon: Tensor, colour: Tensor, generator: torch.Generator, *, colour_odds: float,
             style_odds: float) -> list[str]:
    """A caption for each scene: "a cat face", sometimes with its background colour, its drawing style, or both."""
    draw = torch.rand(len(icon), 2, generator=generator).tolist()
    words = list(COLOURS)
    records = [icons.records[i] for i in icon.tolist()]
    return [caption(record["caption"], colour=words[c] if u < colour_odds else None,
                    style=STYLE_WORDS[record["style"]] if v < style_odds else None)
            for record, c, (u, v) in zip(records, colour.tolist(), draw, strict=True)]


def caption(concept: str, *, colour: str | None = None, style: str | None = None) -> str:
    """The caption grammar in one place: "a cat face in glossy style on a blue background"."""
    article = "an" if colour and colour[0] in "aeiou" else "a"
    return (concept + (f" in {style} style" if style else "")
            + (f" on {article} {colour} background" if colour else ""))


def balanced_icons(icons: Icons, num: int, generator: torch.Generator) -> Tensor:
    """Positions of `num` icons, int64, every icon equally often (up to one), in random order."""
    rounds = [torch.randperm(len(icons.records), generator=generator) for _ in range(-(-num // len(icons.records)))]
    return torch.cat(rounds)[:num]
