"""Laws of the learned gamma: it can't but fall from 1 to 0, its gradient is the derivative, it comes to the target."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rewardiv.errors import UserError
from rewardiv.evaluate import learned
from rewardiv.evaluate.learned import (
    PENALTY,
    Annealed,
    Learner,
    constraint_term,
    curve,
    falls_of,
    knot_values,
    learn,
    power_axis,
    search_learned,
    step_weights,
    within_variance,
)
from rewardiv.evaluate.search import LearnStep, Search, Trial
from rewardiv.evaluate.search_families import knots_method
from rewardiv.evaluate.search_settings import SearchConfig
from rewardiv.evaluate.table import collect
from rewardiv.gamma import Clock, parse_gamma
from rewardiv.generate import Engine
from rewardiv.methods import parse_method
from rewardiv.metrics import trace_ratio
from rewardiv.sampling import initial_noise, make_scheduler, sample

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path, tiny_lora_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    return SearchConfig(
        str(tmp_path_factory.mktemp("learned") / "out"), keep=0.8, model=str(tiny_model_dir), lora=str(tiny_lora_dir),
        prompts=("a cat face", "a face"), test_prompts=("a", "b"), seeds=(0, 1, 5), num_inference_steps=4,
        reward="colorfulness", learn_steps=3, learn_prompts=2, learn_seeds=2, num_knots=4, max_evaluations=3,
    )


@pytest.fixture(scope="module")
def learner(config: SearchConfig) -> Learner:
    return Learner(Search(Engine(), config), "aig:power:2")


def with_settings(learner: Learner, **settings: int) -> Learner:
    """The same learner with other settings."""
    other = Learner.__new__(Learner)
    vars(other).update(vars(learner) | {"config": replace(learner.config, **settings)})
    return other


@pytest.fixture(scope="module")
def journal(learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all steps from power:2, done in one go."""
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    assert len(list(learn(learner, path))) == 3
    return path


def logits_of(seed: int, number: int = 4, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(number, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


# --- the curve

@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0, 1000.0])
def test_whatever_the_logits_gamma_falls_from_1_to_0(spread: float) -> None:
    for seed in range(20):
        values = knot_values(logits_of(seed, 7, spread))
        assert values[0] == 1 and values[-1] == 0 and len(values) == 8 and bool((values[1:] <= values[:-1]).all())
        method = knots_method({k / 7: value for k, value in enumerate(values.tolist())})
        gamma = parse_method(method).gamma  # refuses what rises or misses an end
        assert str(parse_method(method)) == method and gamma(1.0) == 1 and gamma(0.0) == 0


def test_logits_of_a_schedule_are_its_falls() -> None:
    gamma = parse_gamma("linear")
    torch.testing.assert_close(knot_values(falls_of(gamma, 5)), torch.linspace(1, 0, 6, dtype=DOUBLE))
    power = knot_values(falls_of(parse_gamma("power:2"), 4))
    torch.testing.assert_close(power, torch.tensor([1 - (k / 4) ** 2 for k in range(5)], dtype=DOUBLE))
    assert knot_values(falls_of(parse_gamma("step:0.5"), 8)).diff().abs().min() > 0.004  # all can grow


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 300.0])
def test_the_curve_is_that_of_a_knots_schedule(spread: float) -> None:
    progress = torch.linspace(0, 1, 101, dtype=DOUBLE)
    for number in (2, 3, 8):
        values = knot_values(logits_of(number, number, spread))
        gamma = parse_gamma("knots:" + ",".join(f"{k / number!r}={value!r}" for k, value in enumerate(values.tolist())))
        expected = torch.tensor([gamma(1 - at) for at in progress.tolist()], dtype=DOUBLE)
        torch.testing.assert_close(curve(values, progress), expected, rtol=0, atol=1e-12)


def test_the_curves_gradient_is_its_derivative() -> None:
    clock = Clock.of_steps(10)
    for seed in range(3):
        assert torch.autograd.gradcheck(lambda logits: step_weights(logits, clock), logits_of(seed, 6).requires_grad_(True))
    weights = step_weights(logits_of(0), clock)
    assert weights[0] == 1 and weights[-1] == 0 and step_weights(logits_of(0), Clock.of_steps(1)) == 1


def test_a_power_of_the_curve_keeps_its_ends_and_moves_it_one_way() -> None:
    values = knot_values(logits_of(3)).tolist()
    axis = power_axis(values)
    at = [parse_method(axis.method(axis.at(share))).gamma for share in (0.0, 0.5, 1.0)]
    assert [gamma(0.0) for gamma in at] == [0, 0, 0] and [gamma(1.0) for gamma in at] == [1, 1, 1]
    assert at[0](0.6) < at[1](0.6) < at[2](0.6)
    assert [y for _, y in at[1].knots] == pytest.approx(values, abs=1e-4)


# --- through the sampler

def test_tensor_weights_sample_as_the_schedule_does(learner: Learner) -> None:
    values = knot_values(logits_of(1)).tolist()
    method = parse_method("aig:knots:" + ",".join(f"{k / 4!r}={value!r}" for k, value in enumerate(values)))
    model, config = learner.model, learner.config
    scheduler = make_scheduler(model.scheduler_config, "model", 4)
    predict = model.predictor(model.encode_prompts(["a face"]), model.encode_prompts([""]), guidance_scale=3.0,
                              adapter=learner.adapters)
    noise = initial_noise([0, 1], model.latent_shape)
    with torch.no_grad():
        *_, own = sample(predict, noise, [Annealed(step_weights(logits_of(1), learner.clock).float())], scheduler)
        *_, last = sample(predict, noise, [method], scheduler)
    torch.testing.assert_close(own.latents[0], last.latents[0], rtol=1e-5, atol=1e-5)
    assert own.rows == last.rows == (2 * 4 - 2) * 2 * 2  # the ends take one network, not two
    with torch.no_grad():
        torch.testing.assert_close(learner._images(step_weights(logits_of(1), learner.clock), ["a face"] * 2, [0, 1]),
                                   model.decode_latents(last.latents[0]), rtol=0, atol=1e-4)
    assert config.num_inference_steps == len(learner.clock)


def test_the_gradient_through_the_sampler_is_the_finite_difference(learner: Learner) -> None:
    """Of the loss, in which reward and diversity both count, along a direction between the gradient's and one of chance."""
    logits, multiplier = logits_of(5).requires_grad_(True), 4.0
    loss, _, share = learner.objective(logits, 0, multiplier)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert multiplier + PENALTY * (learner.keep - float(share.detach())) > 0  # so that diversity counts
    unit = gradient / gradient.norm() + 0.5 * logits_of(6) / logits_of(6).norm()
    with torch.no_grad():
        ahead, behind = (float(learner.objective(logits + step * unit, 0, multiplier)[0]) for step in (0.05, -0.05))
    assert float(gradient @ unit) == pytest.approx((ahead - behind) / 0.1, rel=0.03, abs=2e-4)
    assert gradient.abs().max() > 1e-3


def test_computing_again_changes_nothing_but_memory(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient() -> Tensor:
        logits = logits_of(5).requires_grad_(True)
        return torch.autograd.grad(learner.objective(logits, 1, 1.0)[0], logits)[0]

    before = gradient()
    monkeypatch.setattr(learned, "_computed_again", lambda predict: predict)
    torch.testing.assert_close(gradient(), before, rtol=1e-5, atol=1e-9)


def test_base_and_lora_stay_as_they_are(learner: Learner, tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in learner.model.unet.state_dict().items()}
    assert len(list(learn(with_settings(learner, learn_steps=1), tmp_path / "metrics.jsonl"))) == 1
    assert all(torch.equal(weight, before[name]) for name, weight in learner.model.unet.state_dict().items())
    parts = (learner.model.unet, learner.model.vae, learner.model.text_encoder)
    assert not any(weight.requires_grad or weight.grad is not None for part in parts for weight in part.parameters())


def test_diversity_is_the_share_of_the_bases_variance_within_prompts(learner: Learner) -> None:
    """A schedule that is the base but in the last step keeps what a trial of the same images says."""
    features = torch.randn(3, 5, 7, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    expected = [np.cov(own.T.numpy()).trace() for own in features]
    np.testing.assert_allclose(within_variance(features), expected)
    assert float(within_variance(features)[0] / within_variance(features)[1]) == pytest.approx(trace_ratio(*features[:2]))
    whole = with_settings(learner, learn_seeds=3)  # all of the search's images
    logits = logits_of(2)
    with torch.no_grad():
        _, reward, share = whole.objective(logits, 0, 0.0)
    method = knots_method({k / 4: value for k, value in enumerate(knot_values(logits).tolist())})
    trial = learner.search.look(method)  # the 8-bit images
    assert float(reward) == pytest.approx(trial.reward, rel=0.01)
    assert float(share) == pytest.approx(trial.diversity, rel=0.02)


def test_which_images_a_step_looks_at_hardly_matters_near_the_start(learner: Learner) -> None:
    """Where gamma is the start, every step's estimate is the trial's, though the steps' own images differ widely."""
    start, first = learner.search.look("aig:power:2"), learner.first_logits()
    with torch.no_grad():
        estimates = [[float(value) for value in learner.objective(first, step, 0.0)[1:]] for step in range(3)]
    rows = [within_variance(learner.start_features[rows][:, columns]).mean() for rows, columns in map(learner.draw, range(3))]
    assert np.ptp(rows) / learner.base_variance > 0.05
    assert all(one == pytest.approx([start.reward, start.diversity], rel=0.01) for one in estimates)


def test_another_diversity_keeps_the_variance_of_the_start(learner: Learner) -> None:
    other = replace(learner.config, diversity="vendi-within", keep=0.9)
    found = Learner(Search(learner.search.engine, other), "aig:power:2")
    assert found.keep == pytest.approx(learner.search.look("aig:power:2").diversity) and learner.keep == 0.8
    assert found.start.diversity != found.keep


def test_a_step_draws_its_images_by_its_number(learner: Learner) -> None:
    drawn = [learner.draw(step) for step in range(30)]
    assert drawn == [learner.draw(step) for step in range(30)]
    assert {row for rows, _ in drawn for row in rows} == {0, 1} and {c for _, columns in drawn for c in columns} == {0, 1, 2}
    assert all(len(rows) == 2 and len(set(columns)) == 2 for rows, columns in drawn)


def test_a_reward_without_a_gradient_is_named(learner: Learner) -> None:
    blind = Learner.__new__(Learner)
    vars(blind).update(vars(learner) | {"reward": lambda images, prompts: images.detach().mean((1, 2, 3))})
    with pytest.raises(UserError, match="'colorfulness' has no gradient, so no gamma can be learned"):
        blind.objective(logits_of(0).requires_grad_(True), 0, 0.0)


# --- the optimiser

class Formula:
    """In place of a learner: reward and diversity are linear in gamma's mean at each knot, with a known optimum."""

    def __init__(self, config: SearchConfig) -> None:
        self.config, self.keep = config, config.keep

    def first_logits(self) -> Tensor:
        return falls_of(parse_gamma("linear"), self.config.num_knots)

    def objective(self, logits: Tensor, step: int, multiplier: float) -> tuple[Tensor, Tensor, Tensor]:
        weights = knot_values(logits)[1:-1]
        reward = ((1 - weights) * torch.tensor([0.0, 0.5, 2.0], dtype=DOUBLE)).sum() / 2.5
        share = weights.mean()
        return constraint_term(self.config.keep - share, multiplier) - reward, reward, share


def test_it_comes_to_the_target_and_puts_the_fall_where_it_pays(config: SearchConfig, tmp_path: Path) -> None:
    """Mean weight 2/3 or more and most reward: fall before the last knot alone (weights 1, 1, 0)."""
    formula = Formula(replace(config, keep=2 / 3, learn_steps=300))
    *_, last = learn(formula, tmp_path / "metrics.jsonl")
    weights = knot_values(torch.tensor(last.logits, dtype=DOUBLE))[1:-1].tolist()
    assert last.diversity == pytest.approx(2 / 3, abs=0.01) and last.multiplier > 0.5
    assert weights[0] > 0.95 and weights[1] > 0.9 and weights[2] < 0.15
    assert last.reward > 0.7  # linear: 0.7 with mean weight 0.5


def test_the_constraints_term_is_that_of_the_augmented_lagrangian() -> None:
    lacks = torch.tensor([-1.0, -0.3, 0.0, 0.2], dtype=DOUBLE, requires_grad=True)
    for multiplier in (0.0, 0.8):
        term = constraint_term(lacks, multiplier)
        (slope,) = torch.autograd.grad(term.sum(), lacks)
        for lack, value, gradient in zip(lacks.tolist(), term.tolist(), slope.tolist(), strict=True):
            active = multiplier + PENALTY * lack > 0
            expected = multiplier * lack + PENALTY / 2 * lack**2 if active else -(multiplier**2) / (2 * PENALTY)
            assert value == pytest.approx(expected) and gradient == pytest.approx(max(0, multiplier + PENALTY * lack))


def test_stopped_and_resumed_it_is_the_run_that_never_stopped(learner: Learner, journal: Path, tmp_path: Path) -> None:
    whole = list(learn(learner, journal))
    (tmp_path / "cut.jsonl").write_text(journal.read_text().splitlines(keepends=True)[0])
    stopped: Iterator[LearnStep] = learn(learner, tmp_path / "cut.jsonl")
    assert [next(stopped).step, next(stopped).step] == [1, 2]
    stopped.close()
    with (tmp_path / "cut.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')  # as a killed process leaves it
    assert list(learn(learner, tmp_path / "cut.jsonl")) == whole
    assert (tmp_path / "cut.jsonl").read_text() == journal.read_text()
    assert [step.step for step in whole] == [1, 2, 3] and all(math.isfinite(step.loss) for step in whole)
    assert whole[0].logits != whole[1].logits


def test_a_journal_of_another_version_is_named(learner: Learner, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "speed": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl holds other records than this version's"):
        list(learn(learner, tmp_path / "metrics.jsonl"))


def test_what_is_learned_is_brought_to_the_target_or_its_start_is_kept(learner: Learner, journal: Path) -> None:
    looking, trials = search_learned(learner.search, "aig:power:2", journal), []
    while True:
        try:
            record = next(looking)
            trials += [record] * isinstance(record, Trial)
        except StopIteration as end:
            found = end.value
            break
    assert trials and set(trials) <= set(found.trials) and found.trials[0].method == "aig:power:2"
    enough = [trial for trial in found.trials if trial.diversity >= 0.8]
    assert found.reached == bool(enough) and (not enough or found.trial == max(enough, key=lambda trial: trial.reward))
    sweep = learner.search._sweep([found.trial.method])
    assert collect(sweep).frontiers()["colorfulness"].points[1].diversity == pytest.approx(found.trial.diversity)
    assert str(parse_method(found.trial.method)) == found.trial.method and "3 steps from aig:power:2" in found.note
