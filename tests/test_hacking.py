"""Laws of the hacking check: clean models show no sign, damage is caught, named and shown, chance is what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rewardiv.errors import UserError
from rewardiv.hacking import (
    HackingReport,
    Pictures,
    grid,
    hacking_report,
    high_frequency,
    saturation,
    sharpness,
)
from rewardiv.metrics import Array
from rewardiv.panel import ImageSet

PROMPTS, SIZE, SIDE = 2, 8, 64
RESAMPLES = 1000


def scenes(seed: int, size: int = SIZE) -> Pictures:
    """Soft coloured pictures, noisy as photographs are, with two rewards that know nothing of them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 216, (PROMPTS * size, 5, 5, 3), dtype=np.uint8)
    soft = np.stack([np.array(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in coarse])
    pixels = (soft + rng.normal(0, 4, soft.shape)).clip(0, 255).astype(np.uint8).reshape(PROMPTS, size, SIDE, SIDE, 3)
    rewards = {name: rng.normal(size=(PROMPTS, size)) for name in ("vivid", "clip")}
    return Pictures(pixels, ImageSet(features(pixels), rewards))


def features(pixels: Array) -> Array:
    """Means of 8 x 8 blocks, which is about what a network sees of such pictures."""
    blocks = pixels.reshape(*pixels.shape[:2], SIDE // 8, 8, SIDE // 8, 8, 3).mean((3, 5))
    return blocks.reshape(*pixels.shape[:2], -1)


def changed(pictures: Pictures, change: Callable[[Array], Array], which: list[int]) -> Pictures:
    """The same with some pictures changed, counted prompt by prompt."""
    pixels = pictures.pixels.reshape(-1, SIDE, SIDE, 3).astype(float)
    pixels[which] = change(pixels[which])
    pixels = pixels.clip(0, 255).astype(np.uint8).reshape(pictures.pixels.shape)
    return Pictures(pixels, replace(pictures.measured, features=features(pixels)))


def report(images: Pictures, base: Pictures, trained: tuple[str, ...] = ("vivid",), **settings: float) -> HackingReport:
    return hacking_report(images, base, trained=trained, **{"seed": 0, "num_resamples": RESAMPLES, **settings})


def names(found: HackingReport) -> set[str]:
    return {sign.name for sign in found.found}


def test_unchanged_images_show_no_sign() -> None:
    base = scenes(1)
    found = report(base, base)
    assert found.verdict == "No sign of reward hacking in 16 pictures: nothing that was looked for goes beyond chance."
    assert found.found == () == found.images and found.notes == ()
    assert all(sign.shift == pytest.approx(0, abs=1e-12) and sign.images == () for sign in found.signs)


def test_other_seeds_of_the_base_hardly_ever_do() -> None:
    """5 % of the reports may name a sign; 4 of 12 a chance of 0.2 %."""
    alarms = [bool(report(scenes(2 * i), scenes(2 * i + 1, 2 * SIZE)).found) for i in range(12)]
    assert sum(alarms) <= 3


def colourful(pixels: Array) -> Array:
    grey = pixels.mean(3, keepdims=True)
    return grey + 2.5 * (pixels - grey)


def blurred(pixels: Array) -> Array:
    return sum(np.roll(pixels, (x, y), (1, 2)) for x in (-1, 0, 1) for y in (-1, 0, 1)) / 9


def gridded(period: int) -> Callable[[Array], Array]:
    lines = 12.0 * ((np.arange(SIDE) % period == 0)[:, None] | (np.arange(SIDE) % period == 0))
    return lambda pixels: pixels + lines[:, :, None]


def speckled(pixels: Array) -> Array:
    return pixels + np.random.default_rng(0).normal(0, 20, pixels.shape)


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        pytest.param(colourful, "saturation", "saturation rose by", id="saturated"),
        pytest.param(lambda pixels: pixels.mean(3, keepdims=True).repeat(3, 3), "saturation", "saturation fell by", id="grey"),
        pytest.param(blurred, "sharpness", "sharpness fell by", id="blurred"),
        pytest.param(lambda pixels: 2.5 * pixels - 1.5 * blurred(pixels), "sharpness", "sharpness rose by", id="sharpened"),
        pytest.param(speckled, "high-frequency energy", "high-frequency energy rose by", id="speckled"),
        pytest.param(gridded(8), "grid", "a grid pattern stands out by", id="grid of 8"),
        pytest.param(gridded(4), "grid", "a grid pattern stands out by", id="grid of 4"),
    ],
)
def test_damage_is_caught_named_and_shown(change: Callable[[Array], Array], name: str, said: str) -> None:
    """Of pictures that differ from the base's by this alone, and in half of them only: those are the ones to see.

    One other at most: chance puts one above all of the base's now and then.
    """
    base, which = scenes(1, 2 * SIZE), [0, 1, 4, 5, 9, 10, 14, 15]
    found = report(changed(scenes(2), change, which), base)
    assert name in names(found) and said in found.verdict and "Look at picture" in found.verdict
    sign = next(sign for sign in found.signs if sign.name == name)
    assert sign.images[0] in which and len(set(sign.images) - set(which)) <= 1 < len(sign.images)
    assert not sign.null[0] <= sign.shift <= sign.null[1]
    assert 1 <= len(found.images) <= 8


def test_a_blur_is_no_fine_detail_and_noise_is_no_grid() -> None:
    blur, noise = (names(report(changed(scenes(2), change, list(range(16))), scenes(1, 2 * SIZE)))
                   for change in (blurred, speckled))
    assert blur == {"sharpness"} and noise >= {"sharpness", "high-frequency energy"}
    assert not {"grid", "near-duplicates"} & noise


def test_near_duplicates_are_found_and_shown() -> None:
    images = scenes(2)
    pixels = images.pixels.copy()
    for copy in (1, 6):
        pixels[1, copy] = np.minimum(pixels[1, 3], 254) + 1
    images = Pictures(pixels, replace(images.measured, features=features(pixels)))
    found = report(images, scenes(1, 2 * SIZE))
    assert names(found) == {"near-duplicates"} and set(found.images) == {9, 11, 14}
    assert "3 of 16 pictures have a near-duplicate of the same prompt" in found.verdict
    assert "deviations" not in found.verdict


def test_what_the_base_repeats_itself_is_no_sign() -> None:
    """Both sides draw from the same four pictures of a prompt."""
    four = scenes(3, 4)

    def draws(seed: int, size: int) -> Pictures:
        rows = np.random.default_rng(seed).integers(0, 4, (PROMPTS, size))
        pixels = np.take_along_axis(four.pixels, rows[:, :, None, None, None], axis=1)
        return Pictures(pixels, ImageSet(features(pixels)))

    found = [report(draws(2 * i, SIZE), draws(2 * i + 1, 2 * SIZE), ()) for i in range(6)]
    assert sum("near-duplicates" in names(one) for one in found) <= 1


def test_a_proxy_that_rises_while_a_held_out_reward_falls() -> None:
    images, base = scenes(2), scenes(1, 2 * SIZE)

    def with_rewards(vivid: float, clip: float) -> Pictures:
        rewards = {"vivid": images.measured.rewards["vivid"] + vivid, "clip": images.measured.rewards["clip"].copy()}
        rewards["clip"][0] += 2 * clip  # the first prompt's pictures alone
        return replace(images, measured=replace(images.measured, rewards=rewards))

    found = report(with_rewards(3, -3), base)
    assert names(found) == {"held-out clip"} and set(found.images) <= set(range(8))
    assert "the trained reward vivid rose by" in found.verdict and "clip, held out, fell by" in found.verdict
    for vivid, clip in ((3, 3), (3, 0), (0, -3), (-3, -3)):
        assert report(with_rewards(vivid, clip), base).found == ()
    for trained in ((), ("vivid", "clip")):
        blind = report(with_rewards(3, -3), base, trained)
        assert blind.found == () and "whether the reward was gamed isn't known" in blind.notes[0]


def test_chance_has_the_textbook_width_and_shares_its_alarms() -> None:
    """Six signs: each gets 5 / 6 % of the normal's tails, with the scatter of 16 pictures and of 64 of the base's."""
    images, base = scenes(2), scenes(1, 4 * SIZE)
    sign = report(images, base, num_resamples=12000).signs[1]
    half = 2.638 * (1 / (PROMPTS * SIZE) + 1 / (PROMPTS * 4 * SIZE)) ** 0.5
    assert len(report(images, base).signs) == 6 and sign.null == pytest.approx((-half, half), rel=0.08)
    loose = report(images, base, level=0.5).signs[1].null
    assert np.ptp(loose) < np.ptp(sign.null)


def test_one_picture_a_prompt_is_enough() -> None:
    """Then nothing can be a near-duplicate, and all else is looked for."""
    def turned(pictures: Pictures) -> Pictures:
        return Pictures(np.swapaxes(pictures.pixels, 0, 1), ImageSet(np.swapaxes(pictures.measured.features, 0, 1)))

    base, images = turned(scenes(1)), turned(changed(scenes(2), colourful, list(range(16))))
    images = Pictures(images.pixels[:, :1], ImageSet(images.measured.features[:, :1]))
    found = names(report(images, base, ()))
    assert "saturation" in found and not {"grid", "near-duplicates"} & found


def test_the_seed_decides() -> None:
    images, base = scenes(2), scenes(1, 2 * SIZE)
    assert report(images, base, seed=3) == report(images, base, seed=3)
    assert report(images, base, seed=3).signs[1].null != report(images, base, seed=4).signs[1].null
    assert "16 base pictures" not in str(report(images, scenes(1)).notes)
    few = report(Pictures(images.pixels[:, :4], ImageSet(images.measured.features[:, :4])),
                 Pictures(base.pixels[:, :4], ImageSet(base.measured.features[:, :4])), ())
    assert "8 base pictures are few" in few.notes[0]


def wave(period: int, amplitude: float) -> Array:
    """A grey picture with a wave along one axis."""
    line = 128 + amplitude * np.cos(2 * np.pi * np.arange(64) / period)
    return np.broadcast_to(line[:, None, None], (64, 64, 3)).round().astype(np.uint8)[None]


def test_what_the_measures_measure() -> None:
    grey, red = np.full((1, 32, 32, 3), 90, np.uint8), np.zeros((1, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    assert saturation(grey) == 0 and saturation(red) == 1
    assert sharpness(grey) == high_frequency(grey) == np.log((1 / 255) ** 2) and grid(grey) == 0
    # The Laplacian of cos(k x) is -2 (1 - cos k) times it; half of its square is its power.
    power = (20 / 255 * 2 * (1 - np.cos(np.pi / 2))) ** 2 / 2
    assert sharpness(wave(4, 20)) == pytest.approx(np.log(power), abs=0.02)
    assert high_frequency(wave(3, 20)) == pytest.approx(np.log((20 / 255) ** 2 / 2), abs=0.05)
    assert high_frequency(wave(8, 20)) < high_frequency(wave(3, 20)) - 2
    assert grid(wave(8, 20)) > 5 and grid(np.swapaxes(wave(8, 20), 1, 2)) == pytest.approx(grid(wave(8, 20)))
    assert grid(wave(16, 20)) < 1, "slower than a latent pixel"
    wide = np.concatenate([wave(8, 20)] * 2, axis=2)
    assert grid(wide) == pytest.approx(grid(wave(8, 20)), abs=0.1), "not square"
    assert grid(np.zeros((1, 4, 4, 3), np.uint8)) == 0


def cut(pictures: Pictures, pixels: Array) -> Pictures:
    return replace(pictures, pixels=pixels)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda a, b: report(a, b, level=1.0), "the level is 1.0"),
        (lambda a, b: report(a, b, ("calm",)), "no reward 'calm' was measured"),
        (lambda a, b: report(cut(a, a.pixels / 255), b), "pictures must be uint8 [2, 8, H, W, 3]"),
        (lambda a, b: report(cut(a, a.pixels[:, :4]), b), "got uint8 [2, 4, 64, 64, 3]"),
        (lambda a, b: report(cut(a, a.pixels[:, :, :16]), b), "must be of one size"),
        (lambda a, b: report(Pictures(a.pixels[:, :2], ImageSet(a.measured.features[:, :2])),
                             Pictures(b.pixels[:, :2], ImageSet(b.measured.features[:, :2])), ()), "can't be told from 4 base"),
        (lambda a, b: report(a, Pictures(b.pixels[:1], ImageSet(b.measured.features[:1])), ()), "the same prompts"),
        (lambda a, b: report(a, Pictures(b.pixels, ImageSet(b.measured.features))), "'clip' wasn't measured of the base"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(call: Callable[[Pictures, Pictures], object], said: str) -> None:
    with pytest.raises(UserError) as error:
        call(scenes(2), scenes(1))
    assert said in str(error.value)
