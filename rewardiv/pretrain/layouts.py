"""Where the drawings of a scene stand: one, a small or a large one, two to four of the same, or two different ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 4  # drawings in a scene
KINDS = ("plain", "small", "large", "counted", "paired")
PLAIN, SMALL, LARGE, COUNTED, PAIRED = range(len(KINDS))
SIDES = {SMALL: (0.36, 0.5), LARGE: (0.9, 1.0)}
CELLS = {  # centres of 2, 3 and 4 drawings, in [-1, 1]
    2: ((-0.49, 0.0), (0.49, 0.0)),
    3: ((-0.49, 0.49), (0.49, 0.49), (0.0, -0.47)),
    4: ((-0.49, -0.49), (0.49, -0.49), (-0.49, 0.49), (0.49, 0.49)),
}
CELL_SIDES = {2: (0.45, 0.5), 3: (0.44, 0.48), 4: (0.44, 0.48)}
CELL_SHIFT = 0.03


@dataclass(frozen=True)
class SceneSpec:
    """How scenes vary.

    Attributes:
        min_size: Of a single drawing's side, as a share of the scene's.
        max_size: Likewise.
        shift: A single drawing's largest shift, as a share of the free room.
        mirror: Odds that a drawing is mirrored.
        small: Share of scenes with one small drawing, and `large` with one that fills it.
        counted: Share of scenes with two to four of one drawing.
        paired: Share of scenes with two concepts.
    """

    min_size: float = 0.78
    max_size: float = 0.95
    shift: float = 0.6
    mirror: float = 0.0
    small: float = 0.0
    large: float = 0.0
    counted: float = 0.0
    paired: float = 0.0


@dataclass(frozen=True)
class Layout:
    """Of n scenes: `kind` and `number` of drawings, int64 [n]; `centre` [n, MOST, 2] in [-1, 1], `side` [n, MOST] as a share
    of the scene's, `flip` [n, MOST], 1 or -1 where mirrored. What stands beyond `number` means nothing."""

    kind: Tensor
    number: Tensor
    centre: Tensor
    side: Tensor
    flip: Tensor


def arrange(spec: SceneSpec, countable: Tensor, generator: torch.Generator) -> Layout:
    """Lay out scenes, one for each entry of countable, bool [n]: whether the scene's drawing may be counted.

    No two drawings of a scene cover each other, and none leaves the scene.
    """
    num = len(countable)
    kind = draw_kinds(spec, countable, generator)
    number = torch.where(kind == COUNTED, torch.randint(2, MOST + 1, (num,), generator=generator), 1)
    number[kind == PAIRED] = 2
    low, high = torch.full((num,), spec.min_size), torch.full((num,), spec.max_size)
    for word, (least, most) in SIDES.items():
        low[kind == word], high[kind == word] = least, most
    side = low + (high - low) * torch.rand(num, generator=generator)
    room = torch.where(kind == SMALL, 1.0, spec.shift) * (1 - side)
    side = side[:, None].repeat(1, MOST)
    centre = torch.zeros(num, MOST, 2)
    centre[:, 0] = (torch.rand(num, 2, generator=generator) * 2 - 1) * room[:, None]
    for many, cells in CELLS.items():
        own = torch.nonzero(number == many)[:, 0]
        centre[own, :many], side[own, :many] = in_cells(many, torch.tensor(cells), len(own), generator)
    flip = 1 - 2 * (torch.rand(num, MOST, generator=generator) < spec.mirror).float()
    return Layout(kind, number, centre, side, flip)


def draw_kinds(spec: SceneSpec, countable: Tensor, generator: torch.Generator) -> Tensor:
    """The kind of each scene, int64 [n]; what can't be counted is plain instead."""
    odds = torch.tensor([spec.small, spec.large, spec.counted, spec.paired])
    drawn = torch.rand(len(countable), generator=generator)
    ends = torch.cat([1 - odds.sum()[None], odds]).cumsum(0)
    kind = torch.searchsorted(ends[:-1].contiguous(), drawn, right=True)
    return torch.where((kind == COUNTED) & ~countable, PLAIN, kind)


def in_cells(many: int, cells: Tensor, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres [num, many, 2] and sides [num, many] of drawings in their cells, all of a scene about as large."""
    low, high = CELL_SIDES[many]
    side = low + (high - low) * torch.rand(num, 1, generator=generator).repeat(1, many)
    centre = cells.repeat(num, 1, 1)
    if many == 3:
        centre[:, :, 1] *= (1 - 2 * (torch.rand(num, generator=generator) < 0.5).float())[:, None]
    free = (torch.rand(centre.shape, generator=generator) * 2 - 1) * CELL_SHIFT
    limit = (1 - side).clamp_min(0)[..., None]
    return (centre + free).clamp(-limit, limit), side
