"""Composes training scenes: emoji on a coloured background, with a caption.

The icons come from assets/emoji (see `data`). A scene is a background colour that contrasts with what stands on it, as
`layouts` puts it there; a caption (see `wording`) says what is there and sometimes the background and the drawing style.
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
from rewardiv.pretrain.layouts import COUNTED, KINDS, PAIRED, SIDES, SceneSpec, arrange
from rewardiv.pretrain.wording import caption, countable

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
class Scenes:
    """Composed scenes: `images` [n, 3, 64, 64] uint8; of each, int64 [n]: the positions of its `icon` and of the `other` one
    (-1 without), of the background `colour`, its `kind` (see layouts) and the `number` of drawings."""

    images: Tensor
    icon: Tensor
    other: Tensor
    colour: Tensor
    kind: Tensor
    number: Tensor


def load_icons(*, max_tier: int = 3, styles: tuple[str, ...] | None = None) -> Icons:
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
        n scenes; the second concept of a pair is drawn in the first one's style where that artist has drawn it.
    """
    num = len(icon)
    layout = arrange(spec, torch.tensor([countable(r["caption"]) for r in icons.records])[icon], generator)
    other = torch.where(layout.kind == PAIRED, partners(icons, icon, generator), -1)
    if colour is None:
        allowed = contrasting_colours(icons)
        both = allowed[icon] & (allowed[other] | (other < 0)[:, None])
        both = torch.where(both.any(1, keepdim=True), both, allowed[icon])
        colour = torch.multinomial(both.float(), 1, generator=generator)[:, 0]
    palette = torch.tensor(list(COLOURS.values())).float()
    background = (palette[colour] + COLOUR_JITTER * torch.randn(num, 3, generator=generator)).clamp(0, 255) / 255
    images = torch.empty(num, 3, SIZE, SIZE, dtype=torch.uint8)
    for part in torch.arange(num).split(256):
        canvas = torch.zeros(len(part), 4, 2 * SIZE, 2 * SIZE)
        for place in range(int(layout.number[part].max())):
            rows = torch.nonzero(layout.number[part] > place)[:, 0]
            own = part[rows]
            shown = torch.where((layout.kind[own] == PAIRED) & (place == 1), other[own], icon[own])
            layer = placed(icons.rgba[shown], layout.centre[own, place], layout.side[own, place], layout.flip[own, place])
            canvas[rows] = layer + (1 - layer[:, 3:]) * canvas[rows]
        rgba = F.avg_pool2d(canvas, 2)
        scene = rgba[:, :3] + (1 - rgba[:, 3:]) * background[part][:, :, None, None]
        images[part] = (scene.clamp(0, 1) * 255).round().to(torch.uint8)
    return Scenes(images, icon, other, colour, layout.kind, layout.number)


def placed(rgba: Tensor, centre: Tensor, side: Tensor, flip: Tensor) -> Tensor:
    """Icons [n, 4, h, w] on empty scenes of twice the size: centres [n, 2] in [-1, 1], sides [n] as shares, flips [n]."""
    theta = torch.zeros(len(rgba), 2, 3)  # output coordinates -> icon coordinates
    theta[:, 0, 0], theta[:, 1, 1] = flip / side, 1 / side
    theta[:, :, 2] = -centre / side[:, None] * torch.stack([flip, torch.ones(len(rgba))], dim=1)
    grid = F.affine_grid(theta, [len(rgba), 4, 2 * SIZE, 2 * SIZE], align_corners=False)
    return F.grid_sample(rgba, grid, align_corners=False)


def partners(icons: Icons, icon: Tensor, generator: torch.Generator) -> Tensor:
    """For each icon one of another concept in the same style, or in any where its artist drew no other: int64 [n]."""
    styles = sorted({record["style"] for record in icons.records})
    style = torch.tensor([styles.index(record["style"]) for record in icons.records])
    concepts = {caption: k for k, caption in enumerate(icons.concepts)}
    concept = torch.tensor([concepts[record["caption"]] for record in icons.records])
    found = torch.empty_like(icon)
    for i in torch.unique(icon).tolist():
        rows = torch.nonzero(icon == i)[:, 0]
        differs = concept != concept[i]
        pool = torch.nonzero(differs & (style == style[i]))[:, 0]
        pool = pool if len(pool) else torch.nonzero(differs)[:, 0]
        if len(pool):
            found[rows] = pool[torch.randint(len(pool), (len(rows),), generator=generator)]
        else:
            found[rows] = i
    return found


def captions(icons: Icons, scenes: Scenes, rows: Tensor, generator: torch.Generator, *, colour_odds: float,
             style_odds: float, in_order: bool = False) -> list[str]:
    """A caption for each of the scenes' rows: what is there, sometimes with the background colour, the style, or both.

    Of a pair either one is named first, or, `in_order`, the left one.
    """
    draw = torch.rand(len(rows), 3, generator=generator).tolist()
    words, columns = list(COLOURS), (scenes.icon, scenes.other, scenes.colour, scenes.kind, scenes.number)
    found = []
    for (i, j, c, kind, number), (u, v, w) in zip(
            zip(*(column[rows].tolist() for column in columns), strict=True), draw, strict=True):
        record = icons.records[i]
        names = [record["caption"]] + ([icons.records[j]["caption"]] if j >= 0 else [])
        found.append(caption(*(names[::-1] if w < 0.5 and not in_order else names), number=number if kind == COUNTED else 1,
                             size=KINDS[kind] if kind in SIDES else "", colour=words[c] if u < colour_odds else None,
                             style=STYLE_WORDS[record["style"]] if v < style_odds else None))
    return found


def balanced_icons(icons: Icons, num: int, generator: torch.Generator) -> Tensor:
    """Positions of `num` icons, int64, every icon equally often (up to one), in random order."""
    rounds = [torch.randperm(len(icons.records), generator=generator) for _ in range(-(-num // len(icons.records)))]
    return torch.cat(rounds)[:num]
