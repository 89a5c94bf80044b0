"""DRaFT: gradients of the steps they should pass and no others, regularisers that hold, numbers from (seed, step) alone."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from rewardiv import lora
from rewardiv.config import TRAIN_SCHEDULERS, TrainConfig
from rewardiv.draft import (
    ADAPTER,
    Part,
    Trainee,
    accumulate,
    draw_batches,
    forward_noised,
    late_step,
    new_trainee,
    noising_seeds,
    path_steps,
)
from rewardiv.errors import UserError
from rewardiv.methods import parse_method
from rewardiv.mixing import RewardMix
from rewardiv.models import load_model
from rewardiv.regularisers import lora_norm
from rewardiv.sampling import initial_noise, make_scheduler, sample

PROMPTS = ["a cat face", "a red cat", "face"]
SEEDS = [3, 14, 15]


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """A toy reward: the mean of the red channel."""
    return images[:, 0].mean((1, 2))


MIX = RewardMix({"redness": redness}, {"redness": 1.0})
NO_REWARD = RewardMix({"none": lambda images, prompts: 0 * redness(images, prompts)}, {"none": 1.0})


@pytest.fixture
def config(tiny_model_dir: Path) -> TrainConfig:
    """Three steps on the tiny model."""
    return TrainConfig(
        output_dir="run", model=str(tiny_model_dir), rewards=("colorfulness",), probe_every=0, train_batch_size=2,
        num_inference_steps=3, rank=2, learning_rate=0.01,
    )


def trainee_of(config: TrainConfig, dtype: torch.dtype = torch.float32, *, shaken: bool = True) -> Trainee:
    """A trainee away from its start, where the adapter has no effect and half of its gradients vanish."""
    trainee = new_trainee(load_model(config.model, dtype=dtype), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainee.parameters if shaken else ():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return trainee


def gradient_of(trainee: Trainee, config: TrainConfig, mix: RewardMix = MIX, **where: int) -> tuple[Tensor, Part]:
    """The gradient of one part on PROMPTS and SEEDS, all parameters in one vector."""
    trainee.optimizer.zero_grad()
    part = accumulate(trainee.model, mix, PROMPTS, SEEDS, config, **{"step": 0, "part": 0, **where})
    return gathered(trainee), part


def gathered(trainee: Trainee) -> Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trainee.parameters])


def steps_of(trainee: Trainee, config: TrainConfig, num_steps: int, mix: RewardMix = MIX) -> list[Part]:
    """A bare training loop."""
    parts = []
    for step in range(num_steps):
        trainee.optimizer.zero_grad()
        parts += [accumulate(trainee.model, mix, prompts, seeds, config, step=step, part=part)
                  for part, (prompts, seeds) in enumerate(draw_batches(PROMPTS, config, step))]
        trainee.optimizer.step()
    return parts


class Definition:
    """The algorithms written down plainly, without rewardiv's loop: for comparison, and for finite differences."""

    def __init__(self, trainee: Trainee, config: TrainConfig) -> None:
        self.model, self.config = trainee.model, config
        self.scheduler = make_scheduler(self.model.scheduler_config, config.scheduler, config.num_inference_steps, "cpu")
        self.timesteps = self.scheduler.timesteps.tolist()
        embeds = self.model.encode_prompts(PROMPTS)
        self.predict = self.model.predictor(embeds, self.model.encode_prompts([""] * 3),
                                            guidance_scale=config.guidance_scale, adapter=ADAPTER)

    @torch.no_grad()
    def trajectory(self) -> list[Tensor]:
        """Latents before each step and after the last, with the weights of now."""
        noise = initial_noise(SEEDS, self.model.latent_shape, device="cpu", dtype=self.model.dtype)
        steps = sample(self.predict, noise, [parse_method("finetuned")], self.scheduler)
        return [noise.clone(), *(state.latents[0].clone() for state in steps)]

    def output(self, latents: Tensor, t: int, scale: float = 1.0) -> Tensor:
        return self.predict(latents, torch.tensor(t), torch.full((3,), scale, dtype=torch.float64), torch.arange(3))

    def step(self, latents: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """The next latents and the estimate of the final ones."""
        result = self.scheduler.step(self.output(latents, t), t, latents)
        return result.prev_sample, result.pred_original_sample

    def loss(self, latents: Tensor) -> Tensor:
        decoded = self.model.vae.decode(latents / self.model.vae.config.scaling_factor).sample  # in float64
        return -redness((decoded / 2 + 0.5).clamp(0, 1), PROMPTS).mean()


def check_by_finite_differences(trainee: Trainee, loss: Callable[[], float]) -> None:
    """The gradient that the parameters hold, against differences of `loss` in the largest entries of some of them."""
    for parameter in (trainee.parameters[0], trainee.parameters[-1]):
        place = int(parameter.grad.abs().argmax())
        weight, h = parameter.data.view(-1), 1e-5
        before = float(weight[place])
        weight[place] = before + h
        above = loss()
        weight[place] = before - h
        below = loss()
        weight[place] = before
        gradient = float(parameter.grad.view(-1)[place])
        assert abs(gradient) > 1e-7
        assert gradient == pytest.approx((above - below) / (2 * h), rel=1e-3)


def same_gradient(first: Tensor, second: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to a share of the gradient's norm (images are fp32), which isn't 0."""
    assert float(second.norm()) > 1e-6
    return float((first - second).norm() / second.norm()) < tolerance


@pytest.mark.parametrize("grad_steps", [1, 2, 3])
def test_gradient_is_that_of_the_last_steps_alone(config: TrainConfig, grad_steps: int) -> None:
    """DRaFT-K: minus the mean reward as a function of the weights used in the last steps, what went before held."""
    config = replace(config, grad_steps=grad_steps)
    trainee = trainee_of(config, torch.float64)
    plain = Definition(trainee, config)
    held = plain.trajectory()[-1 - grad_steps]

    @torch.no_grad()
    def loss() -> float:
        latents = held
        for t in plain.timesteps[-grad_steps:]:
            latents, _ = plain.step(latents, t)
        return float(plain.loss(latents))

    _, part = gradient_of(trainee, config)
    assert part.loss == pytest.approx(loss(), rel=1e-5)
    check_by_finite_differences(trainee, loss)


@pytest.mark.parametrize("algorithm", ["draft-k", "draft-lv", "refl"])
def test_every_algorithm_is_its_definition_differentiated(config: TrainConfig, algorithm: str) -> None:
    """All parameters' gradients, of full DRaFT, of the average over LV's noisings one by one, and of ReFL's step."""
    config = replace(config, algorithm=algorithm, grad_steps=3, lv_noisings=3, refl_window=1.0)
    trainee = trainee_of(config, torch.float64)
    ours, part = gradient_of(trainee, config)
    plain = Definition(trainee, config)
    states, last, gradients, losses = plain.trajectory(), plain.timesteps[-1], [], []

    def ends() -> Iterator[Tensor]:
        if algorithm == "draft-k":
            latents = states[0]
            for t in plain.timesteps:
                latents, _ = plain.step(latents, t)
            yield latents
        elif algorithm == "draft-lv":
            signal = float(plain.scheduler.alphas_cumprod[last])
            for k in range(3):
                noise = initial_noise(noising_seeds(SEEDS, k), plain.model.latent_shape, dtype=torch.float64)
                yield plain.step(signal**0.5 * states[-1] + (1 - signal) ** 0.5 * noise, last)[0]
        else:  # which step it drew is seen by its loss
            i = min(range(3), key=lambda i: abs(part.loss - float(plain.loss(plain.step(states[i], plain.timesteps[i])[1]))))
            yield plain.step(states[i], plain.timesteps[i])[1]

    for latents in ends():
        trainee.optimizer.zero_grad()
        loss = plain.loss(latents)
        loss.backward()
        losses.append(float(loss))
        gradients.append(gathered(trainee))
    assert part.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert same_gradient(ours, torch.stack(gradients).mean(0))
    if len(gradients) > 1:
        assert not same_gradient(ours, gradients[0], 1e-2)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_refl_s_gradient_at_every_step_is_the_finite_difference(config: TrainConfig, i: int) -> None:
    config = replace(config, algorithm="refl", refl_window=1.0)
    trainee = trainee_of(config, torch.float64)
    plain = Definition(trainee, config)
    before = plain.trajectory()[i]

    @torch.no_grad()
    def loss() -> float:
        return float(plain.loss(plain.step(before, plain.timesteps[i])[1]))

    wanted = pytest.approx(loss(), rel=1e-6)
    assert any(gradient_of(trainee, config, step=step)[1].loss == wanted for step in range(12))  # stops at the one that draws i
    check_by_finite_differences(trainee, loss)


@pytest.mark.parametrize(("num_steps", "window", "expected"), [(40, 0.25, range(30, 40)), (3, 1e-3, [2]), (4, 1.0, range(4))])
def test_refl_draws_its_step_from_the_window(config: TrainConfig, num_steps: int, window: float, expected: range) -> None:
    config = replace(config, num_inference_steps=num_steps, refl_window=window)
    generator = torch.Generator().manual_seed(0)
    assert {late_step(config, generator) for _ in range(400)} == set(expected)


@pytest.mark.parametrize("name", TRAIN_SCHEDULERS)
def test_noised_latents_have_the_last_step_s_mean_and_deviation(config: TrainConfig, name: str) -> None:
    scheduler = make_scheduler(load_model(config.model).scheduler_config, name, 5)
    seeds = [seed for k in range(40) for seed in noising_seeds(SEEDS, k)]
    assert len(set(seeds)) == 120
    final = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(120, -1, -1, -1)
    noised = forward_noised(scheduler, final, initial_noise(seeds, (4, 8, 8)))
    share = float(scheduler.alphas_cumprod[int(scheduler.timesteps[-1])])
    scale = 1 if name == "euler" else share**0.5  # Euler's latents are x_0 + sigma · noise
    deviation = ((1 - share) / share) ** 0.5 * scale
    torch.testing.assert_close(noised.mean(0), scale * final[0], rtol=0, atol=5 * deviation / 120**0.5)
    assert float((noised - scale * final).std()) == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("name", ["euler", "dpm++2m"])
@pytest.mark.parametrize("algorithm", ["draft-lv", "refl"])
def test_every_scheduler_can_begin_late(config: TrainConfig, name: str, algorithm: str) -> None:
    """On the eps model too; a step taken from the rollout's own latents gives the rollout's own estimate."""
    config = replace(config, algorithm=algorithm, scheduler=name, path_kl_weight=1.0, kl_weight=1.0)
    trainee = trainee_of(config)
    gradient, part = gradient_of(trainee, config)
    assert gradient.isfinite().all() and gradient.any() and part.kl > 0 and part.path_kl > 0


def test_an_adapter_at_its_start_has_no_kl_and_no_gradient_of_it(config: TrainConfig) -> None:
    trainee = trainee_of(config, shaken=False)
    plain, without = gradient_of(trainee, config)
    weighted, part = gradient_of(trainee, replace(config, kl_weight=10.0, path_kl_weight=10.0))
    assert part.kl == part.path_kl == 0 and part.loss == pytest.approx(without.loss)
    assert torch.equal(plain, weighted)


@pytest.mark.parametrize("model_dir", ["tiny_model_dir", "tiny_eps_model_dir"])
def test_both_kls_equal_those_of_two_separate_networks(
    config: TrainConfig, model_dir: str, tmp_path: Path, request: pytest.FixtureRequest,
) -> None:
    """One UNet is plain, one has the LoRA fused by diffusers; their guided eps at our latents, the formulas written out."""
    config = replace(config, model=str(request.getfixturevalue(model_dir)), grad_steps=2, kl_weight=1.0, path_kl_weight=1.0)
    trainee = trainee_of(config)
    _, part = gradient_of(trainee, config)
    lora.save_adapter(trainee.model.unet, ADAPTER, tmp_path)
    pipes = [StableDiffusionPipeline.from_pretrained(config.model, safety_checker=None) for _ in range(2)]
    pipes[1].load_lora_weights(str(tmp_path))
    pipes[1].fuse_lora()
    plain = Definition(trainee, config)
    states, shares = plain.trajectory(), plain.scheduler.alphas_cumprod.double()
    embeds = trainee.model.encode_prompts([""] * 3 + PROMPTS).embeds
    gaps, path = [], 0.0
    for i, t in enumerate(plain.timesteps):
        now = float(shares[t])
        after = float(shares[plain.timesteps[i + 1]]) if i < 2 else float(plain.scheduler.final_alpha_cumprod)
        eps = []
        for pipe in pipes:
            with torch.no_grad():
                negative, positive = pipe.unet(torch.cat([states[i]] * 2), t, embeds).sample.chunk(2)
            output = negative + config.guidance_scale * (positive - negative)
            is_eps = pipe.scheduler.config.prediction_type == "epsilon"
            eps.append(output if is_eps else now**0.5 * output + (1 - now) ** 0.5 * states[i])
        gaps.append(float((eps[1] - eps[0]).square().mean()))
        if now > 0:  # at no signal at all the two means are functions of x_0 alone: see the regularisers' own test
            ratio = now / after
            path += (1 - ratio) / (2 * ratio * (1 - now)) * gaps[-1]
        else:
            output_gap = plain.output(states[i], t) - plain.output(states[i], t, 0.0)
            path += after / 2 * float(output_gap.square().mean().detach())
    assert part.kl == pytest.approx(sum(gaps[-2:]) / 2, rel=1e-3) and part.kl > 1e-5
    assert part.path_kl == pytest.approx(path, rel=1e-3)


@pytest.mark.parametrize("name", ["kl_weight", "path_kl_weight", "lora_norm_weight"])
def test_a_regulariser_s_gradient_is_the_finite_difference(config: TrainConfig, name: str) -> None:
    """Alone, with a reward that is always 0; the authors' KL through the last two steps, the latents' way included."""
    config = replace(config, grad_steps=2, **{name: 0.7})
    trainee = trainee_of(config, torch.float64)
    plain = Definition(trainee, config)
    states = plain.trajectory()
    shares = [float(share) for share in plain.scheduler.alphas_cumprod[plain.timesteps]] + [1.0]

    @torch.no_grad()
    def loss() -> float:
        if name == "lora_norm_weight":
            return 0.7 * float(lora_norm(trainee.model.unet, ADAPTER))
        total, latents = 0.0, states[1]
        for i, t in enumerate(plain.timesteps):
            if name == "path_kl_weight":
                gap = (plain.output(states[i], t) - plain.output(states[i], t, 0.0)).square().mean()
                total += 0.7 * float(gap) * (shares[i + 1] - shares[i]) / (2 * (1 - shares[i]))  # for v
            elif i >= 1:
                base = plain.output(bases[i - 1], t, 0.0)
                total += 0.7 * shares[i] * float((plain.output(latents, t) - base).square().mean()) / 2
                latents, _ = plain.step(latents, t)
        return total

    bases = states[1:3]  # where the base looks: at the latents of now, without gradient
    ours, part = gradient_of(trainee, config, NO_REWARD)
    assert part.loss == pytest.approx(loss(), rel=1e-4) and ours.any()
    check_by_finite_differences(trainee, loss)


def test_what_is_minimised_is_the_weighted_sum(config: TrainConfig) -> None:
    config = replace(config, kl_weight=0.3, path_kl_weight=0.2, lora_norm_weight=0.1, algorithm="draft-lv")
    _, part = gradient_of(trainee_of(config), config)
    expected = -float(part.mixed.mean()) + 0.3 * part.kl + 0.2 * part.path_kl + 0.1 * part.lora_norm
    assert part.loss == pytest.approx(expected, rel=1e-5)
    assert torch.equal(part.mixed, part.raw["redness"]) and min(part.kl, part.path_kl, part.lora_norm) > 0


@pytest.mark.parametrize(("name", "measure"), [
    ("kl_weight", "kl"), ("path_kl_weight", "path_kl"), ("lora_norm_weight", "lora_norm"),
])
def test_the_heavier_the_weight_the_nearer_to_the_base(config: TrainConfig, name: str, measure: str) -> None:
    """The same seeds and steps at weights of 0.1, 1 and 10; the distance is measured at the end."""
    config, distances = replace(config, learning_rate=3e-3), []
    for weight in (0.1, 1.0, 10.0):
        trainee = trainee_of(config, shaken=False)
        parts = steps_of(trainee, replace(config, **{name: weight}), 8)
        assert all(math.isfinite(part.loss) for part in parts)
        distances.append(getattr(gradient_of(trainee, replace(config, **{name: 1e-9}))[1], measure))
    assert distances == sorted(distances, reverse=True) and distances[-1] < distances[0] / 2


def test_choosing_steps_of_the_path_is_uniform_and_without_repeats(config: TrainConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [path_steps(replace(config, path_kl_steps=2), generator) for _ in range(600)]
    assert {tuple(steps) for steps in drawn} == {(0, 1), (0, 2), (1, 2)}
    assert all(abs(sum(i in steps for steps in drawn) - 400) < 60 for i in range(3))
    assert path_steps(replace(config, path_kl_steps=0), generator) == [0, 1, 2]


def test_the_base_s_predictions_need_no_second_network(config: TrainConfig) -> None:
    trainee = trainee_of(config)
    parts = (trainee.model.unet, trainee.model.vae, trainee.model.text_encoder)
    before = [id(parameter) for part in parts for parameter in part.parameters()]
    gradient_of(trainee, replace(config, kl_weight=1.0, path_kl_weight=1.0))
    assert [id(parameter) for part in parts for parameter in part.parameters()] == before


class Kept:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def peak_of(trainee: Trainee, config: TrainConfig) -> int:
    """Most bytes that graphs kept at once while one part was accumulated."""
    now = peak = 0

    def pack(tensor: Tensor) -> Kept:
        nonlocal now, peak
        kept, size = Kept(tensor), tensor.nbytes
        now += size
        peak = max(peak, now)

        def gone() -> None:
            nonlocal now
            now -= size

        weakref.finalize(kept, gone)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        gradient_of(trainee, config)
    return peak


@pytest.mark.parametrize("algorithm", ["draft-k", "draft-lv", "refl"])
def test_memory_is_flat_in_the_number_of_steps_and_noisings(config: TrainConfig, algorithm: str) -> None:
    """With all regularisers on, the path's over all steps; one more step of gradients costs a lot."""
    trainee = trainee_of(config)
    config = replace(config, algorithm=algorithm, kl_weight=1.0, path_kl_weight=1.0, lora_norm_weight=1.0)
    few = peak_of(trainee, replace(config, lv_noisings=1))
    many = peak_of(trainee, replace(config, lv_noisings=4, num_inference_steps=9))
    assert 0 < many <= 1.01 * few
    if algorithm == "draft-k":
        assert peak_of(trainee, replace(config, grad_steps=2)) > 1.3 * few


@pytest.mark.parametrize("scheduler", TRAIN_SCHEDULERS)
@pytest.mark.parametrize("algorithm", ["draft-k", "draft-lv", "refl"])
def test_taking_gradients_of_a_few_images_at_once_changes_nothing(config: TrainConfig, algorithm: str, scheduler: str) -> None:
    """Lots of 2 and 1 equal all 3 images, also for a solver that remembers the steps before; but for rounding."""
    config = replace(config, algorithm=algorithm, scheduler=scheduler, grad_steps=2, kl_weight=1.0, path_kl_weight=1.0)
    trainee = trainee_of(config, torch.float64)
    whole, expected = gradient_of(trainee, replace(config, grad_batch_size=3))
    lots, part = gradient_of(trainee, replace(config, grad_batch_size=2))
    assert same_gradient(lots, whole)
    torch.testing.assert_close(part.mixed, expected.mixed)
    for name in ("loss", "kl", "path_kl"):
        assert getattr(part, name) == pytest.approx(getattr(expected, name), rel=1e-5) and getattr(part, name)


@pytest.mark.parametrize("algorithm", ["draft-k", "draft-lv", "refl"])
def test_graphs_are_of_grad_batch_size_images_whatever_the_batch(config: TrainConfig, algorithm: str) -> None:
    """Of three images; what graphs keep besides are the weights."""
    config = replace(config, algorithm=algorithm, kl_weight=1.0, path_kl_weight=1.0)
    trainee = trainee_of(config)
    one, two, three = (peak_of(trainee, replace(config, grad_batch_size=size)) for size in (1, 2, 3))
    assert one < two and three - two == pytest.approx(two - one, rel=0.05)


def test_the_last_steps_are_those_of_sampling(config: TrainConfig) -> None:
    """With a solver that remembers the step before: the images trained on are the images sampled."""
    config = replace(config, scheduler="dpm++2m", num_inference_steps=4)
    trainee = trainee_of(config, torch.float64)
    _, part = gradient_of(trainee, config)
    images = trainee.model.decode_latents(Definition(trainee, config).trajectory()[-1])
    torch.testing.assert_close(part.mixed, redness(images, PROMPTS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["draft-k", "draft-lv", "refl"])
def test_a_batch_in_parts_has_the_same_gradient(config: TrainConfig, algorithm: str) -> None:
    """Gradient accumulation: 2 parts of 2 images equal one batch of 4; and so do 2 processes' means."""
    config = replace(config, algorithm=algorithm, kl_weight=1.0, path_kl_weight=1.0, path_kl_steps=1, lora_norm_weight=0.1,
                     refl_window=1.0)
    trainee, gradients = trainee_of(config, torch.float64), []
    for size, num_parts, world_size in ((4, 1, 1), (2, 2, 1), (2, 1, 2)):
        settings = replace(config, train_batch_size=size, gradient_accumulation_steps=num_parts)
        trainee.optimizer.zero_grad()
        for rank in range(world_size):
            for part, (prompts, seeds) in enumerate(draw_batches(PROMPTS, settings, 5, rank=rank, world_size=world_size)):
                accumulate(trainee.model, MIX, prompts, seeds, settings, step=5, part=part, rank=rank)
        gradients.append(gathered(trainee) / world_size)
    assert same_gradient(gradients[1], gradients[0]) and same_gradient(gradients[2], gradients[0])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_together_draw_one_process_s_batch(config: TrainConfig, world_size: int) -> None:
    config = replace(config, train_batch_size=2, gradient_accumulation_steps=2)
    whole = replace(config, train_batch_size=2 * world_size)
    for step in range(3):
        shares = [list(draw_batches(PROMPTS, config, step, rank=rank, world_size=world_size)) for rank in range(world_size)]
        rows = [row for share in shares for prompts, seeds in share for row in zip(prompts, seeds, strict=True)]
        expected = [row for prompts, seeds in draw_batches(PROMPTS, whole, step) for row in zip(prompts, seeds, strict=True)]
        assert sorted(rows) == sorted(expected) and len(set(rows)) == 4 * world_size
        assert all([len(prompts) for prompts, _ in share] == [2, 2] for share in shares)


def test_prompts_and_noise_depend_on_seed_and_step_only(config: TrainConfig) -> None:
    first = [list(draw_batches(PROMPTS, config, step)) for step in range(3)]
    assert first == [list(draw_batches(PROMPTS, config, step)) for step in range(3)]
    other = [list(draw_batches(PROMPTS, replace(config, seed=1), step)) for step in range(3)]
    seeds = [seed for batches in first + other for _, seeds in batches for seed in seeds]
    assert len(set(seeds)) == len(seeds) == 12


def test_chance_comes_from_seed_step_part_and_rank_alone(config: TrainConfig) -> None:
    """Dropout's, and that of the path's steps, which are the same in all parts; torch's own generator stays where it was."""
    config = replace(config, lora_dropout=0.3, path_kl_weight=1.0, path_kl_steps=1)
    trainee = trainee_of(config)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, _ = gradient_of(trainee, config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(gradient_of(trainee, config)[0], first)
    for chance in ({"path_kl_weight": 0.0}, {"lora_dropout": 0.0}):  # dropout alone, then the choice alone
        settings = replace(config, **chance)
        trainee = trainee_of(settings)
        drawn = [gradient_of(trainee, replace(settings, seed=seed), **where)[0] for seed in (0, 1)
                 for where in ({}, {"step": 1}, {"part": 1}, {"rank": 1})]
        distinct = {tuple(gradient.tolist()) for gradient in drawn}
        if "path_kl_weight" in chance:
            assert len(distinct) == 8
        else:
            assert 1 < len(distinct) <= 3 and torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[0], drawn[3])


def test_dropout_drops_in_training_only(config: TrainConfig) -> None:
    config = replace(config, lora_dropout=0.5)
    trainee = trainee_of(config)
    without, _ = gradient_of(trainee, replace(config, lora_dropout=0.0))
    plain = trainee_of(replace(config, lora_dropout=0.0))
    assert not same_gradient(without, gradient_of(plain, config)[0], 1e-3)
    ours, theirs = (Definition(each, config).trajectory()[-1] for each in (trainee, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("algorithm", "dropout"), [("draft-k", 0.0), ("draft-k", 0.4), ("draft-lv", 0.0), ("refl", 0.0)])
def test_checkpointing_gives_the_same_gradients_in_less_memory(
    config: TrainConfig, algorithm: str, dropout: float,
) -> None:
    config = replace(config, algorithm=algorithm, grad_steps=2, lora_dropout=dropout, kl_weight=1.0, path_kl_weight=0.1)
    thrifty = replace(config, gradient_checkpointing=True)
    first, second = trainee_of(config), trainee_of(thrifty)
    assert same_gradient(gradient_of(second, thrifty)[0], gradient_of(first, config)[0], 1e-4)
    assert peak_of(second, thrifty) < 0.7 * peak_of(first, config)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_is_near_fp32_with_the_adapter_in_fp32(config: TrainConfig, checkpointing: bool) -> None:
    config = replace(config, guidance_scale=1.5, kl_weight=0.1)
    half = replace(config, mixed_precision="bf16", gradient_checkpointing=checkpointing)
    full, trainee = trainee_of(config), trainee_of(half)
    assert {parameter.dtype for parameter in trainee.parameters} == {torch.float32}
    assert trainee.model.dtype == torch.bfloat16
    exact, part = gradient_of(full, config)
    rough, rough_part = gradient_of(trainee, half)
    assert rough.isfinite().all() and all(bool(parameter.grad.any()) for parameter in trainee.parameters)
    assert float(torch.cosine_similarity(rough, exact, dim=0)) > 0.98
    assert rough_part.loss == pytest.approx(part.loss, rel=0.02)


def test_the_scaler_scales_the_gradient_and_not_the_loss(config: TrainConfig) -> None:
    config = replace(config, kl_weight=0.1, lora_norm_weight=0.1)
    trainee = trainee_of(config)
    plain, part = gradient_of(trainee, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainee.optimizer.zero_grad()
    scaled = accumulate(trainee.model, MIX, PROMPTS, SEEDS, config, step=0, part=0, scaler=scaler)
    assert same_gradient(gathered(trainee), 8 * plain) and scaled.loss == part.loss


@pytest.mark.parametrize("algorithm", ["draft-k", "draft-lv", "refl"])
def test_a_loss_that_is_not_finite_is_said(config: TrainConfig, algorithm: str) -> None:
    broken = RewardMix({"broken": lambda images, prompts: redness(images, prompts) / 0 - float("inf")}, {"broken": 1.0})
    gradient, part = gradient_of(trainee_of(config), replace(config, algorithm=algorithm), broken)
    assert math.isnan(part.loss) and not gradient.any()


def test_several_rewards_are_mixed_and_their_raw_values_told(config: TrainConfig) -> None:
    rewards = {"red": redness, "blue": lambda images, prompts: 100 * images[:, 2].mean((1, 2))}
    trainee = trainee_of(config)
    _, part = gradient_of(trainee, config, RewardMix(rewards, {"red": 1.0, "blue": 1.0}))
    assert part.raw["blue"].shape == (3,) and not part.raw["red"].requires_grad
    assert part.loss == pytest.approx(0, abs=1e-5)  # standardised by the batch itself
    assert float(part.raw["blue"].mean()) > 10 * float(part.raw["red"].mean())


def test_the_reward_rises_and_only_the_adapter_changes(config: TrainConfig) -> None:
    config = replace(config, train_batch_size=4, learning_rate=0.02)
    trainee = trainee_of(config, shaken=False)
    parts = (trainee.model.unet, trainee.model.vae, trainee.model.text_encoder)
    learning = {id(parameter) for parameter in trainee.parameters}
    frozen = [parameter for part in parts for parameter in part.parameters() if id(parameter) not in learning]
    before = [parameter.clone() for parameter in frozen]
    shown = steps_of(trainee, config, 12)
    assert shown[-1].mixed.mean() > shown[0].mixed.mean() + 2 * shown[0].mixed.std()
    assert all(torch.equal(old, new) for old, new in zip(before, frozen, strict=True))
    assert all(parameter.grad is None for parameter in frozen)
    assert all(bool(parameter.any()) for parameter in trainee.parameters)


@pytest.mark.parametrize("algorithm", ["draft-lv", "refl"])
def test_the_reward_rises_with_the_other_algorithms_too(config: TrainConfig, algorithm: str) -> None:
    config = replace(config, algorithm=algorithm, train_batch_size=4, learning_rate=0.02)
    trainee = trainee_of(config, shaken=False)
    before = redness(trainee.model.decode_latents(Definition(trainee, config).trajectory()[-1]), PROMPTS)
    steps_of(trainee, config, 12)
    after = redness(trainee.model.decode_latents(Definition(trainee, config).trajectory()[-1]), PROMPTS)
    assert (after > before).all()


def test_plain_diffusers_loads_the_result(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, lora_alpha=6.0)  # three times the rank: the file has to say so
    trainee = trainee_of(config)
    lora.save_adapter(trainee.model.unet, ADAPTER, tmp_path / "saved")
    pipe = StableDiffusionPipeline.from_pretrained(config.model, safety_checker=None)
    latents, embeds = torch.randn(2, 4, 8, 8), trainee.model.encode_prompts(PROMPTS[:2]).embeds
    with torch.no_grad():
        base = pipe.unet(latents, 500, embeds).sample
        pipe.load_lora_weights(str(tmp_path / "saved"))
        theirs = pipe.unet(latents, 500, embeds).sample
        with lora.lora_scale(trainee.model.unet, ADAPTER, 1.0):
            ours = trainee.model.unet(latents, 500, embeds).sample
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert (theirs - base).abs().max() > 1e-3


def test_a_target_that_matches_nothing_is_refused(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="to_nothing"):
        trainee_of(replace(config, lora_targets="to_q,to_nothing"))


@pytest.mark.parametrize(("change", "message"), [
    ({"grad_steps": 4}, "only 3 inference steps"),
    ({"rank": 0}, "rank"),
    ({"learning_rate": float("nan")}, "learning_rate"),
    ({"train_batch_size": 2.5}, "whole number"),
    ({"scheduler": "dim"}, "did you mean 'ddim'"),
    ({"lora_targets": ","}, "lora_targets is empty"),
])
def test_settings_out_of_range_are_refused(config: TrainConfig, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(config, **change)
