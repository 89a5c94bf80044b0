"""Laws of the built-in data and of the training that makes the built-in models."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from rewardiv.errors import UserError
from rewardiv.pretrain import autoencoder, base_model, clip, preferences, referee
from rewardiv.pretrain.cards import write_cards
from rewardiv.pretrain.data import ASSETS, CELL, PACKS, attribution, read_concepts, render_svg
from rewardiv.pretrain.families import composed_prompts
from rewardiv.pretrain.layouts import COUNTED, LARGE, PAIRED, SMALL, SceneSpec, arrange
from rewardiv.pretrain.loop import Recipe, train
from rewardiv.pretrain.presets import PRESETS
from rewardiv.pretrain.scenes import (
    COLOURS,
    MIN_CONTRAST,
    balanced_icons,
    captions,
    compose,
    contrasting_colours,
    load_icons,
)
from rewardiv.pretrain.tokenizer import build_tokenizer, caption_words
from rewardiv.pretrain.wording import caption, countable, counted
from rewardiv.registry import CHECKPOINTS


@pytest.fixture(scope="module")
def icons():
    return load_icons(max_tier=1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- data ---------------------------------------------------------------------------------------------------------


def test_first_tier_has_48_concepts_with_5_drawings_each(icons):
    drawings = {"fluent-flat": "fluent", "fluent-3d": "fluent"}  # three renderings of one drawing
    for concept in icons.concepts:
        styles = {drawings.get(r["style"], r["style"]) for r in icons.records if r["caption"] == concept}
        assert len(styles) >= 5, concept
    assert len(icons.concepts) >= 48


def test_every_image_states_its_licence_and_every_pack_is_credited():
    licence_of = {pack.style: pack.licence for pack in PACKS}
    text = (ASSETS / "ATTRIBUTION.md").read_text()
    assert text == attribution()
    for line in (ASSETS / "icons.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["licence"] == licence_of[record["style"]]
        assert f"## {record['file']}" in text


def test_no_icon_is_empty_and_alpha_bounds_premultiplied_colour(icons):
    area = icons.rgba[:, 3].mean((1, 2))
    assert area.min() > 0.05
    assert (icons.rgba[:, :3] <= icons.rgba[:, 3:] + 1e-6).all()


def test_a_concept_is_found_under_an_alias_and_drawn_at_the_cell_size():
    body = '<rect width="16" height="16" fill="#ff0000"/>'
    image = render_svg({"prefix": "tiny", "icons": {"red": {"body": body}}, "aliases": {"rot": {"parent": "red"}}}, "rot")
    assert image.size == (CELL, CELL)
    assert image.getpixel((CELL // 2, CELL // 2)) == (255, 0, 0, 255)
    with pytest.raises(UserError, match="has no icon 'blue'"):
        render_svg({"prefix": "tiny", "icons": {}}, "blue")


def test_concept_slugs_are_unique():
    slugs = [row["slug"] for row in read_concepts()]
    assert len(slugs) == len(set(slugs)) > 200


# --- scenes -------------------------------------------------------------------------------------------------------


def test_same_seed_same_scenes_and_other_seed_other_scenes(icons):
    first, again, other = (compose(icons, balanced_icons(icons, 8, seeded(s)), SceneSpec(), seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_mirrored_scene_is_the_mirror_image(icons):
    icon, colour = torch.tensor([3]), torch.tensor([0])
    plain, mirrored = (compose(icons, icon, SceneSpec(0.8, 0.8, shift=0, mirror=m), seeded(), colour).images for m in (0, 1))
    assert (plain.flip(3).int() - mirrored.int()).abs().max() <= 1


def test_backgrounds_contrast_with_the_icon(icons):
    palette = torch.tensor(list(COLOURS.values())).float()
    allowed = contrasting_colours(icons)
    assert allowed.any(1).all()
    mean = icons.rgba[:, :3].sum((2, 3)) / icons.rgba[:, 3].sum((1, 2))[:, None] * 255
    for row in range(0, len(mean), 37):
        distance = (palette - mean[row]).norm(dim=1)
        assert (distance[allowed[row]] >= MIN_CONTRAST - 1e-3).all()


def test_corner_pixel_is_the_named_background(icons):
    scenes = compose(icons, torch.zeros(len(COLOURS), dtype=torch.long), SceneSpec(0.5, 0.5, shift=0), seeded(),
                     torch.arange(len(COLOURS)))
    corners = scenes.images[:, :, 0, 0].float()
    palette = torch.tensor(list(COLOURS.values())).float()
    assert (corners - palette).abs().max() < 60  # four standard deviations of the jitter
    assert torch.cdist(corners, palette).argmin(1).tolist() == list(range(len(COLOURS)))


def test_balanced_icons_shows_each_equally_often(icons):
    counts = torch.bincount(balanced_icons(icons, 3 * len(icons.records), seeded()))
    assert (counts == 3).all()


def test_captions_say_only_what_is_asked_for(icons):
    scenes = compose(icons, torch.arange(40), SceneSpec(), seeded(), torch.arange(40) % len(COLOURS))
    bare, full = (captions(icons, scenes, torch.arange(40), seeded(), colour_odds=p, style_odds=p) for p in (0, 1.1))
    assert bare == [icons.records[i]["caption"] for i in range(40)]
    assert all(" style on a" in text and text.endswith(" background") for text in full)
    assert caption("a bus", colour="orange") == "a bus on an orange background"


@pytest.mark.parametrize(("concept", "number", "text"), [
    ("a lemon", 3, "three lemons"), ("an ear of corn", 2, "two ears of corn"), ("a mouse face", 4, "four mouse faces"),
    ("a loaf of bread", 2, "two loaves of bread"), ("a face with heart eyes", 3, "three faces with heart eyes"),
])
def test_counted_concepts_are_plural_in_their_head(concept, number, text):
    assert counted(concept, number) == text and countable(concept)


def test_captions_join_sizes_and_pairs_in_one_grammar():
    assert caption("an orange", size="small", colour="blue") == "a small orange on a blue background"
    assert caption("grapes", size="large") == "large grapes" and not countable("grapes")
    assert caption("a cat face", "a rocket", style="blob") == "a cat face and a rocket in blob style"


def test_drawings_of_a_scene_stay_inside_and_apart():
    spec = SceneSpec(mirror=0.5, small=0.2, large=0.2, counted=0.3, paired=0.3)
    layout = arrange(spec, torch.ones(2000, dtype=torch.bool), seeded())
    for kind in (SMALL, LARGE, COUNTED, PAIRED):
        assert (layout.kind == kind).float().mean() > 0.15
    for row in range(2000):
        number = int(layout.number[row])
        centre, side = layout.centre[row, :number], layout.side[row, :number, None]
        assert (centre.abs() + side <= 1 + 1e-5).all()
        gap = (centre[:, None] - centre[None]).abs().amax(2) - (side + side.T)  # above 0 where two squares are apart
        assert gap.fill_diagonal_(1.0).min() > -0.2  # drawings don't fill their squares' corners
    never = arrange(spec, torch.zeros(500, dtype=torch.bool), seeded())
    assert not (never.kind == COUNTED).any() and set(never.number.tolist()) == {1, 2}


def test_a_counted_scene_shows_its_drawing_that_many_times(icons):
    spec = SceneSpec(counted=1.0)
    scenes = compose(icons, balanced_icons(icons, 60, seeded()), spec, seeded(1))
    texts = captions(icons, scenes, torch.arange(60), seeded(), colour_odds=0, style_odds=0)
    for number, text in zip(scenes.number.tolist(), texts, strict=True):
        assert text.startswith({1: ("a", "g", "c", "p", "s"), 2: "two ", 3: "three ", 4: "four "}[number])
    four = int(torch.nonzero(scenes.number == 4)[0])
    corners = scenes.images[four].float().unfold(1, 32, 32).unfold(2, 32, 32)  # [3, 2, 2, 32, 32]
    background = scenes.images[four, :, 0, 0].float()[:, None, None, None, None]
    assert ((corners - background).abs().amax(0) > 25).float().mean((2, 3)).min() > 0.05


def test_a_pair_is_two_concepts_of_one_artist(icons):
    scenes = compose(icons, balanced_icons(icons, 60, seeded()), SceneSpec(paired=1.0), seeded())
    first, second = ([icons.records[i] for i in column.tolist()] for column in (scenes.icon, scenes.other))
    assert all(a["caption"] != b["caption"] and a["style"] == b["style"] for a, b in zip(first, second, strict=True))


def test_of_a_pair_the_left_one_is_named_first_where_order_counts(icons):
    left, right = (next(i for i, record in enumerate(icons.records) if record["caption"] == name and record["style"] == "noto")
                   for name in ("a strawberry", "a whale"))
    two = icons.where([left, right])
    scenes = compose(two, torch.zeros(40, dtype=torch.long), SceneSpec(paired=1.0), seeded(), torch.zeros(40, dtype=torch.long))
    redness = [(half[:, 0].float() - half[:, 2].float()).mean((1, 2)) for half in scenes.images.split(32, dim=3)]
    assert (redness[0] > redness[1] + 20).all()
    ordered, either = (set(captions(two, scenes, torch.arange(40), seeded(), colour_odds=0, style_odds=0, in_order=order))
                       for order in (True, False))
    assert ordered == {"a strawberry and a whale"} and len(either) == 2


# --- tokenizer ----------------------------------------------------------------------------------------------------


def test_every_caption_word_is_one_token_and_any_text_encodes():
    tokenizer = build_tokenizer()
    assert [word for word in caption_words() if len(tokenizer.tokenize(word)) != 1] == []
    ids = tokenizer("Zürich 漢字 !?").input_ids
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == max(ids) == len(tokenizer) - 1


def test_tokenizer_is_deterministic():
    assert build_tokenizer().get_vocab() == build_tokenizer().get_vocab()


# --- training loop ------------------------------------------------------------------------------------------------


def test_rate_warms_up_holds_and_falls_to_zero():
    recipe = Recipe(num_steps=1000, batch_size=1, learning_rate=1, hold=0.4, num_warmup_steps=100)
    assert recipe.rate(0) == pytest.approx(0.01)
    assert recipe.rate(100) == recipe.rate(400) == 1
    assert recipe.rate(700) == pytest.approx(0.5)
    assert 0 < recipe.rate(999) < 0.01


def fit_line(folder, num_steps, resume=False, stop_after=None):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)

    def loss_fn(step, generator):
        if step == stop_after:
            raise KeyboardInterrupt
        x = torch.randn(16, 2, generator=generator)
        return {"loss": (model(x)[:, 0] - x.sum(1)).square().mean()}

    recipe = Recipe(num_steps=num_steps, batch_size=16, learning_rate=0.05, num_warmup_steps=1, ema_decay=0.9)
    return train("line", model, loss_fn, recipe, folder=folder, seed=3, resume=resume)


def test_killed_and_resumed_training_equals_uninterrupted(tmp_path, monkeypatch):
    whole = fit_line(tmp_path / "whole", 60)
    monkeypatch.setattr("rewardiv.pretrain.loop.SAVE_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "parts", 60, stop_after=25)
    resumed = fit_line(tmp_path / "parts", 60, resume=True)
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)
    assert (whole.weight - 1).abs().max() < 0.1  # and it learned y = x1 + x2


def test_an_earlier_run_is_not_overwritten(tmp_path):
    fit_line(tmp_path, 2)
    with pytest.raises(UserError, match="--resume"):
        fit_line(tmp_path, 2)


def test_a_damaged_state_is_named(tmp_path):
    fit_line(tmp_path, 2)
    state = tmp_path / "line.pt"
    state.write_bytes(state.read_bytes()[:300])
    with pytest.raises(UserError, match="line.pt is damaged"):
        fit_line(tmp_path, 4, resume=True)


def test_a_loss_that_is_not_finite_stops_the_stage(tmp_path):
    model = nn.Linear(1, 1)
    with pytest.raises(UserError, match="not finite at step 0"):
        train("nan", model, lambda step, generator: {"loss": model.weight.sum() * math.nan}, Recipe(3, 1, 0.1),
              folder=tmp_path, seed=0, resume=False)


# --- stages -------------------------------------------------------------------------------------------------------


def test_psnr_closed_form():
    class OffByOne(nn.Module):
        def encode(self, x):
            return type("E", (), {"latent_dist": type("D", (), {"mean": x})})

        def decode(self, z):
            return type("S", (), {"sample": z + 0.2})

    images = torch.full((3, 3, 64, 64), 100, dtype=torch.uint8)
    assert autoencoder.psnr(OffByOne(), images) == pytest.approx(20.0, abs=1e-3)  # error 0.1 of the range [0, 1]


def test_evening_out_the_latents_leaves_decoding_as_it_was_and_takes_the_root_of_each_spread(icons):
    torch.manual_seed(0)
    model = autoencoder.build().eval()
    images = compose(icons, balanced_icons(icons, 64, seeded()), SceneSpec(), seeded()).images
    with torch.no_grad():
        before = model.encode(autoencoder.to_model(images)).latent_dist.mean
        decoded = model.decode(before).sample
        autoencoder.even_out(model, images)
        after = model.encode(autoencoder.to_model(images)).latent_dist.mean
        assert torch.allclose(model.decode(after).sample, decoded, atol=1e-4)
    points = [x.permute(0, 2, 3, 1).flatten(0, 2).double() for x in (before, after)]
    covariance = torch.cov(points[1].T)
    spread = torch.linalg.eigvalsh(torch.cov(points[0].T)).clamp_min(1e-8).sqrt()
    assert points[1].mean(0).abs().max() < 1e-3
    assert torch.allclose(covariance, torch.diag(spread), atol=1e-3 * float(spread.max()))


def test_held_out_concepts_are_never_trained_on():
    kept, held = autoencoder.split_icons()
    assert not set(kept.concepts) & set(held.concepts)
    assert all(record["tier"] > 1 for record in held.records) and len(held.concepts) > 15


def test_velocity_loss_is_zero_for_a_network_that_knows_the_noise():
    scheduler = base_model.build_scheduler()
    latents = torch.randn(4, 8, 16, 16, generator=seeded(1))

    class Knows(nn.Module):
        def forward(self, noisy, timesteps, encoder_hidden_states):
            alpha, sigma = (scheduler.alphas_cumprod[timesteps][:, None, None, None].sqrt(),
                            (1 - scheduler.alphas_cumprod[timesteps])[:, None, None, None].sqrt())
            noise = (noisy - alpha * latents) / sigma
            return type("Out", (), {"sample": alpha * noise - sigma * latents})

    class Words(nn.Module):
        def forward(self, tokens):
            return (torch.zeros(len(tokens), 32, 128),)

    model = nn.ModuleDict({"unet": Knows(), "text_encoder": Words()})
    loss = base_model.v_loss(model, scheduler, latents, torch.zeros(4, 32, dtype=torch.long), seeded())["loss"]
    assert loss < 1e-9


class Guided(nn.ModuleDict):
    """Predicts 5 and 2 of what it sees with and without a caption; with a caption at a share of the difference."""

    def __init__(self, share=lambda timesteps: torch.ones(len(timesteps))):
        class Words(nn.Module):
            def forward(self, tokens):
                return (tokens[..., None].float(),)

        class Draws(nn.Module):
            def forward(self, noisy, timesteps, encoder_hidden_states):
                said = (encoder_hidden_states[:, 0, 0] > 0).float()
                factor = 2 + 3 * said * share(timesteps)
                return type("Out", (), {"sample": factor[:, None, None, None] * noisy})

        super().__init__({"unet": Draws(), "text_encoder": Words()})


@pytest.mark.parametrize(("share", "is_zero"), [
    (base_model.guidance_share, True), (lambda timesteps: torch.ones(len(timesteps)), False)])
def test_tempered_model_keeps_a_share_of_the_guidance_where_the_drawing_is_chosen(share, is_zero):
    tokens = torch.ones(20, 4, dtype=torch.long)
    loss = base_model.temper_loss(Guided(share), Guided(), base_model.build_scheduler(), torch.zeros(20, 8, 16, 16), tokens,
                                  torch.zeros(4, dtype=torch.long), seeded())["loss"]
    assert (loss < 1e-9) == is_zero


def test_tempering_changes_nothing_without_a_caption():
    tokens = torch.zeros(20, 4, dtype=torch.long)
    loss = base_model.temper_loss(Guided(), Guided(), base_model.build_scheduler(), torch.zeros(20, 8, 16, 16), tokens,
                                  tokens[0], seeded())["loss"]
    assert loss < 1e-9


def test_guidance_is_weakened_where_there_is_more_noise():
    share = base_model.guidance_share(torch.arange(1000))
    assert 0 < share[-1] < 1 < share[0] and (share.diff() <= 0).all()


def test_text_encoder_pools_where_the_text_ends():
    tokenizer = build_tokenizer()
    encoder = base_model.build_text_encoder(tokenizer).eval()
    tokens = tokenizer(["a cat face", "a cat face on a blue background"], padding="max_length", return_tensors="pt").input_ids
    out = encoder(tokens)
    ends = (tokens == tokenizer.eos_token_id).int().argmax(1)
    assert torch.allclose(out.pooler_output, out.last_hidden_state[torch.arange(2), ends])


def test_true_pairs_are_those_whose_caption_holds(icons):
    by_caption = [i for i, r in enumerate(icons.records) if r["caption"] == "a bus"]
    icon = torch.tensor([by_caption[0], by_caption[0], by_caption[1], 0])
    colour = torch.tensor([1, 2, 1, 1])
    plain, said = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    bus = [[True] * 3 + [False]] * 3 + [[False] * 3 + [True]]
    scenes, rows = compose(icons, icon, SceneSpec(), seeded(), colour), torch.arange(4)
    assert clip.true_pairs(icons, scenes, rows, plain, plain).tolist() == bus
    assert clip.true_pairs(icons, scenes, rows, said, said).tolist() == torch.eye(4, dtype=torch.bool).tolist()


def test_a_caption_of_three_is_not_true_of_two_and_a_pair_is_true_either_way_round(icons):
    bus, cat = (next(i for i, r in enumerate(icons.records) if r["caption"] == name) for name in ("a bus", "a cat face"))
    scenes = compose(icons, torch.tensor([bus, cat, bus, bus, bus]), SceneSpec(), seeded(), torch.zeros(5, dtype=torch.long))
    scenes = replace(scenes, other=torch.tensor([cat, bus, -1, -1, -1]), number=torch.tensor([2, 2, 2, 3, 1]),
                     kind=torch.tensor([PAIRED, PAIRED, COUNTED, COUNTED, SMALL]))
    none = torch.zeros(5, dtype=torch.bool)
    true = clip.true_pairs(icons, scenes, torch.arange(5), none, none)
    assert true[:2, :2].all() and true.sum() == 4 + 3


def test_the_referee_reads_backgrounds_and_never_trains_on_the_drawings_that_measure_it(icons):
    scenes = compose(icons, balanced_icons(icons, 80, seeded()), referee.SPEC, seeded())
    right = referee.background(scenes.images.float() / 255) == scenes.colour
    assert right.float().mean() > 0.9
    unseen = []
    for member in range(referee.NUM_MEMBERS):
        kept, held = referee.split_drawings(icons, member)
        assert len(kept.records) + len(held.records) == len(icons.records) and set(held.concepts) == set(icons.concepts)
        for concept in icons.concepts:
            drawings = [{referee.DRAWING_OF.get(r["style"], r["style"]) for r in part.records if r["caption"] == concept}
                        for part in (kept, held)]
            assert len(drawings[1]) == 1 and not drawings[0] & drawings[1]
        unseen.append({(r["caption"], r["style"]) for r in held.records})
    assert not unseen[0] & unseen[1]  # what one member hasn't seen the other one knows


def test_a_panel_judges_by_its_members_mean_probability():
    panel, images = referee.Panel(num_concepts=5).eval(), torch.rand(3, 3, 64, 64, generator=seeded())
    with torch.no_grad():
        heads, alone = panel(images), [member(images) for member in panel.members]
    for head, *each in zip(heads, *alone, strict=True):
        expected = sum(one.softmax(1) for one in each) / len(each)
        torch.testing.assert_close(head.exp(), expected)


def test_accuracies_count_what_is_right(icons):
    concepts = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1]]).bool()
    target = referee.Truth(concepts, torch.tensor([1, 3, 2, 2]), torch.tensor([0, 0, 1, 1]))
    best = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1]])
    found = referee.Findings(best, torch.tensor([1, 2, 2, 2]), torch.tensor([0, 0, 0, 0]), torch.tensor([4, 5, 6, 7]))
    assert referee.accuracies(found, target, torch.tensor([4, 5, 6, 0])) == {
        "concept": 1.0, "count": 0.0, "both": 0.5, "style": 1.0, "colour": 0.75}


def test_warping_by_nothing_gives_the_image_or_its_mirror_image(icons, monkeypatch):
    monkeypatch.setattr(clip, "WARP_SCALE", (1.0, 1.0))
    monkeypatch.setattr(clip, "WARP_SHIFT", 0.0)
    images = compose(icons, balanced_icons(icons, 16, seeded()), SceneSpec(), seeded()).images.float() / 255
    warped = clip.warp(images, seeded())
    kept, mirrored = (torch.isclose(warped, other, atol=1e-3).flatten(1).all(1) for other in (images, images.flip(3)))
    assert (kept ^ mirrored).all() and kept.any() and mirrored.any()


def test_a_batch_has_a_timestep_in_each_part_of_the_schedule():
    seen = []

    class Sees(nn.Module):
        def forward(self, noisy, timesteps, encoder_hidden_states):
            seen.append(timesteps)
            return type("Out", (), {"sample": noisy})

    class Words(nn.Module):
        def forward(self, tokens):
            return (torch.zeros(len(tokens), 32, 128),)

    model = nn.ModuleDict({"unet": Sees(), "text_encoder": Words()})
    for seed in range(8):
        base_model.v_loss(model, base_model.build_scheduler(), torch.zeros(20, 8, 16, 16),
                          torch.zeros(20, 32, dtype=torch.long), seeded(seed))
    assert all((timesteps // 50).tolist() == list(range(20)) for timesteps in seen)
    assert len({tuple(timesteps.tolist()) for timesteps in seen}) == 8


def test_the_text_encoder_begins_as_the_clips_text_tower():
    tokenizer, net = build_tokenizer(), clip.build(width=8).eval()
    encoder = base_model.build_text_encoder(tokenizer).eval()
    base_model.take_over(net.net, encoder)
    texts = ["a cat face", "three lemons on a blue background", ""]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    ends = (ids == tokenizer.eos_token_id).int().argmax(1)
    with torch.no_grad():
        said = encoder(ids)[0][torch.arange(len(texts)), ends] @ net.net.text_projection
        torch.testing.assert_close(said, net.encode_texts(texts), atol=1e-5, rtol=1e-5)


def test_nearly_clean_latents_count_less_and_pure_noise_in_full():
    model = nn.ModuleDict({"unet": base_model.build_unet((16, 16, 16)),
                           "text_encoder": base_model.build_text_encoder(build_tokenizer())})
    nn.init.zeros_(model["unet"].conv_out.weight)
    nn.init.zeros_(model["unet"].conv_out.bias)  # predicts 0, so that a loss is the weighted square of v
    scheduler, latents = base_model.build_scheduler(), torch.randn(1, 8, 16, 16, generator=seeded())
    for seed in range(20):
        with torch.no_grad():
            tokens = torch.zeros(1, 32, dtype=torch.long)
            loss = float(base_model.v_loss(model, scheduler, latents, tokens, seeded(seed))["loss"])
        generator = seeded(seed)
        timestep = (torch.rand(1, generator=generator, dtype=torch.float64) * 1000).long()
        noise = torch.randn(latents.shape, generator=generator)
        kept = float(scheduler.alphas_cumprod[timestep])
        weight = min(1.0, (base_model.MAX_SNR + 1) / (kept / (1 - kept) + 1))
        square = float(scheduler.get_velocity(latents, noise, timestep).square().mean())
        assert loss == pytest.approx(weight * square, rel=1e-4), int(timestep)


def test_judges_have_the_documented_tastes():
    picture = torch.rand(1, 3, 32, 32, generator=seeded()) * 0.6 + 0.2
    grey = preferences.luma(picture)[:, None].expand_as(picture)
    flat = torch.full_like(picture, 0.75)
    assert preferences.vivid(picture) > preferences.vivid(grey) > preferences.vivid(flat)
    assert preferences.calm(flat) > preferences.calm(grey) > preferences.calm(picture)
    assert float(preferences.vivid(flat)) == pytest.approx(0, abs=1e-6)
    assert float(preferences.calm(flat)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", list(preferences.DRAW))
def test_votes_follow_the_judge_and_no_side_is_favoured(icons, name):
    pairs = preferences.DRAW[name](icons, 400, seeded())
    assert 0.4 < float(pairs.vote.mean()) < 0.6 and abs(float(pairs.difference.mean())) < 0.1
    told = pairs.difference != 0
    assert ((pairs.difference > 0) == pairs.vote.bool())[told].float().mean() > 0.65
    assert len(pairs.prompts) == len(pairs.left) == len(pairs.right) == 400


def test_the_exact_judge_takes_off_the_same_for_every_statement_that_does_not_hold(icons):
    difference = preferences.exact_pairs(icons, 400, seeded()).difference
    wrong = (difference.abs() / preferences.MISFIT).round()
    assert torch.equal(wrong * preferences.MISFIT, difference.abs()) and set(wrong.tolist()) == {0, 1, 2, 3}


def test_the_composed_prompts_are_made_of_the_plain_ones_and_ask_for_everything():
    plain = (ASSETS / "prompts.txt").read_text().splitlines()
    composed = (ASSETS / "prompts-composed.txt").read_text().splitlines()
    assert composed == composed_prompts(plain) and len(set(composed)) == len(plain)
    for word in (*COLOURS, "two", "three", "four", "and"):
        assert any(re.search(rf"\b{word}\b", prompt) for prompt in composed), word


def test_presets_fit_the_limits_on_shipped_files():
    for preset in PRESETS.values():
        weights = sum(p.numel() for p in base_model.build_unet(preset.channels).parameters())
        assert 2 * weights < 37e6, "the UNet in half precision leaves no room for the rest under 40 MB"


def test_a_card_without_the_referee_keeps_quiet_about_what_an_earlier_one_has_found(tmp_path):
    (tmp_path / "emoji").mkdir()
    figures = json.loads((CHECKPOINTS / "figures.json").read_text())
    write_cards(tmp_path, figures)
    assert "A referee" in (tmp_path / "emoji" / "README.md").read_text()
    plain = {name: value for name, value in figures["evaluate"].items() if not name.startswith("referee")}
    write_cards(tmp_path, figures | {"evaluate": plain})
    assert "A referee" not in (tmp_path / "emoji" / "README.md").read_text()
