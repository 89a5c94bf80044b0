"""One process's learner: weights, optimiser and running statistics; takes a step, or leaves all as it is and says why not.

Nothing here touches the disk. `state` and `restore` are all that a checkpoint needs: batches, noise and dropout derive from
(seed, step) alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor, nn

from rewardiv.checkpoints import State
from rewardiv.config import TrainConfig
from rewardiv.crew import Crew
from rewardiv.draft import Part, Trainee, accumulate, draw_batches, new_trainee
from rewardiv.errors import UserError
from rewardiv.mixing import RewardMix, load_mix
from rewardiv.models import load_model
from rewardiv.records import StepRecord

WINDOW, MIN_KNOWN = 50, 10  # accepted steps that a new one is compared with: at most, at least
EXPLODING = 100.0  # times what is usual
SMALL_SHARE = 0.01  # of the usual loss: what counts as its spread at least


@dataclass
class Learner:
    """What changes while a run trains; the same in all of its processes.

    Attributes:
        crew: The run's processes.
        prompts: What steps draw from.
        trainee: The model with the adapter that learns, its optimiser, the finished steps and the time they took.
        mix: The rewards with their running statistics.
        average: The averaged weights that are saved and probed; [] where ema_decay is 0.
        rate_factor: Halved by each of the `rollbacks`.
        norms: Gradient norms of the last accepted steps, and `losses` their losses.
    """

    config: TrainConfig
    crew: Crew
    prompts: list[str]
    trainee: Trainee
    mix: RewardMix
    average: list[Tensor] = field(default_factory=list)
    rate_factor: float = 1.0
    rollbacks: int = 0
    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.trainee.step

    def state(self) -> State:
        """All that training goes on from."""
        trainee = self.trainee
        return {
            "step": trainee.step, "elapsed_s": trainee.elapsed_s, "rate_factor": self.rate_factor, "rollbacks": self.rollbacks,
            "norms": self.norms, "losses": self.losses, "parameters": [weight.detach() for weight in trainee.parameters],
            "average": self.average, "optimizer": trainee.optimizer.state_dict(), "scaler": trainee.scaler.state_dict(),
            "mix": self.mix.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Go back (or on) to a state.

        Raises:
            UserError: If it is of another model.
        """
        trainee = self.trainee
        try:
            for values, kept in ((trainee.parameters, state["parameters"]), (self.average, state["average"])):
                for value, own in zip(values, kept, strict=True):
                    value.copy_(own)
            trainee.optimizer.load_state_dict(state["optimizer"])
            trainee.scaler.load_state_dict(state["scaler"])
            self.mix.load_state_dict(state["mix"])
            trainee.step, trainee.elapsed_s = state["step"], state["elapsed_s"]
            self.rate_factor, self.rollbacks = state["rate_factor"], state["rollbacks"]
            self.norms, self.losses = list(state["norms"]), list(state["losses"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the checkpoint of step {state.get('step')} is damaged or of another model ({error}); resume from "
                            "another one") from error

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time inside as the run's."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.trainee.elapsed_s += time.monotonic() - started

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the adapter has the averaged weights, where they are kept."""
        learning = [weight.detach().clone() for weight in self.trainee.parameters] if self.average else []
        self._put(self.average)
        try:
            yield
        finally:
            self._put(learning)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.trainee.parameters, values, strict=bool(values)):
            weight.copy_(value)


def new_learner(config: TrainConfig, crew: Crew, prompts: list[str]) -> Learner:
    """Load the rewards and the model, with a fresh adapter.

    Raises:
        UserError: If something is missing or damaged, or a LoRA target matches nothing.
    """
    mix = load_mix(config, crew.device)
    model = load_model(config.model, device=crew.device)
    learner = Learner(config, crew, prompts, new_trainee(model, config), mix)
    if config.ema_decay:
        learner.average = [weight.detach().clone() for weight in learner.trainee.parameters]
    return learner


def take_step(learner: Learner) -> StepRecord | str:
    """Change the weights by one step, or leave them and say what is wrong with it."""
    trainee, scaler, mix = learner.trainee, learner.trainee.scaler, learner.mix
    is_first = len(mix.rewards) > 1 and not mix.num_updates
    with learner.timed():
        if is_first:  # what standardises the first step's rewards: its own images, those of all parts and processes
            mix.update(joined(gradients(learner)))
        while True:
            parts = gradients(learner)
            loss, norm = statistics.fmean(part.loss for part in parts), math.nan
            if math.isfinite(loss):
                norm = clipped_norm(learner)
            if math.isfinite(norm) or not math.isfinite(loss) or not scaler.is_enabled() or scaler.get_scale() <= 1:
                break
            scaler.update(scaler.get_scale() / 2)  # fp16 overflowed: the same step again, scaled less
        if trouble := find_trouble(loss, norm, learner.losses, learner.norms):
            if scaler.is_enabled() and math.isfinite(loss):  # it has unscaled gradients, and would refuse to again
                scaler.update(scaler.get_scale())
            return trouble
        raw = joined(parts)
        rate = learning_rate(learner)
        trainee.optimizer.param_groups[0]["lr"] = rate
        scaler.step(trainee.optimizer)
        scaler.update()
        trainee.step += 1
        if not is_first:
            mix.update(raw)
        blend_average(learner)
    learner.losses, learner.norms = [*learner.losses, loss][-WINDOW:], [*learner.norms, norm][-WINDOW:]
    return step_record(learner, parts, norm, rate)


def gradients(learner: Learner) -> list[Part]:
    """Put the gradients of this process's share of a step into the weights; gives the parts of all processes."""
    trainee, config, crew = learner.trainee, learner.config, learner.crew
    trainee.optimizer.zero_grad()
    batches = draw_batches(learner.prompts, config, learner.step, attempt=learner.rollbacks, rank=crew.rank,
                           world_size=crew.world_size)
    shares = crew.together(lambda: [
        on_cpu(accumulate(trainee.model, learner.mix, prompts, seeds, config, step=learner.step, part=k, rank=crew.rank,
                          scaler=trainee.scaler))
        for k, (prompts, seeds) in enumerate(batches)
    ])
    return list(chain.from_iterable(shares))


def on_cpu(part: Part) -> Part:
    """The same part, to be sent to other processes."""
    return replace(part, raw={name: values.cpu() for name, values in part.raw.items()}, mixed=part.mixed.cpu())


def joined(parts: list[Part]) -> dict[str, Tensor]:
    """Each reward of all images of a step."""
    return {name: torch.cat([part.raw[name] for part in parts]) for name in parts[0].raw}


def clipped_norm(learner: Learner) -> float:
    """Average the gradients over all processes and clip them; gives their norm before."""
    trainee = learner.trainee
    learner.crew.average([weight.grad for weight in trainee.parameters])
    trainee.scaler.unscale_(trainee.optimizer)
    return float(nn.utils.clip_grad_norm_(trainee.parameters, learner.config.max_grad_norm))


def learning_rate(learner: Learner) -> float:
    """The next step's: rising over the first lr_warmup_steps, then constant, halved by each rollback."""
    config = learner.config
    return config.learning_rate * min(1.0, (learner.step + 1) / (config.lr_warmup_steps + 1)) * learner.rate_factor


def find_trouble(loss: float, norm: float, losses: list[float], norms: list[float]) -> str:
    """What forbids a step with this loss and gradient norm; "" if nothing does.

    Not finite, or exploding, judged by the last accepted steps (at most WINDOW) once there are MIN_KNOWN: a norm above
    EXPLODING times their median, or a loss above their median by EXPLODING times its spread, which is the median absolute
    deviation, or SMALL_SHARE of the median's size where that is more. Medians, so that a few odd steps don't move what is
    usual; a factor that the ordinary heavy tails of gradients don't reach; and no limit to how fast a loss falls.
    """
    if not math.isfinite(loss):
        return "the loss is not a finite number"
    if not math.isfinite(norm):
        return "the gradient is not finite"
    if len(norms) < MIN_KNOWN:
        return ""
    usual = statistics.median(norms)
    if norm > EXPLODING * usual > 0:
        return f"the gradient's norm is {norm:.3g}, and {usual:.3g} was usual"
    middle = statistics.median(losses)
    spread = max(statistics.median(abs(known - middle) for known in losses), SMALL_SHARE * abs(middle))
    if loss - middle > EXPLODING * spread > 0:
        return f"the loss is {loss:.3g}, and {middle:.3g} ± {spread:.2g} was usual"
    return ""


@torch.no_grad()
def blend_average(learner: Learner) -> None:
    """Move the averaged weights, if they are kept, towards those of now.

    Differs from a constant decay d: step n takes min(d, (1 + n) / (10 + n)), as diffusers' EMAModel, lest a short run's
    average stay at its start.
    """
    decay = min(learner.config.ema_decay, (1 + learner.step) / (10 + learner.step))
    for kept, weight in zip(learner.average, learner.trainee.parameters, strict=bool(learner.average)):
        kept.lerp_(weight, 1 - decay)


def step_record(learner: Learner, parts: list[Part], norm: float, rate: float) -> StepRecord:
    """What a finished step tells."""
    raw = joined(parts)
    aim = torch.cat([part.mixed for part in parts]) if len(raw) > 1 else next(iter(raw.values()))
    means = {name: statistics.fmean(getattr(part, name) for part in parts) for name in ("loss", "kl", "path_kl", "lora_norm")}
    return StepRecord(step=learner.step, reward_mean=float(aim.mean()), reward_std=float(aim.std(correction=0)),
                      rewards={name: float(values.mean()) for name, values in raw.items()}, **means, grad_norm=norm,
                      learning_rate=rate, elapsed_s=learner.trainee.elapsed_s)
