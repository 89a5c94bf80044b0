"""One seeded, resumable training loop for every stage of pretraining.

The randomness of a step derives from (seed, step) alone and everything that carries state is saved, so a run that was
killed and resumed equals one that never stopped.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.utils import save_image
from tqdm import tqdm

from rewardiv.errors import UserError
from rewardiv.runs import append_jsonl, write_atomic

SAVE_EVERY_S = 120.0
SHEETS = 12  # sample sheets over a whole run
LOG_EVERY = 20


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a stage trains: the rate is held for a share `hold` of the steps, then falls to zero.

    `bf16` runs the forward pass under autocast and `compiled` the networks through torch.compile: on a CPU with AMX twice
    as fast together, on one with AVX-512 BF16 `bf16` alone 1.6 times, without either far slower. The weights, their averages
    and the optimiser stay fp32.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    hold: float = 0.4
    num_warmup_steps: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    bf16: bool = False
    compiled: bool = False

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step: linear warm-up, constant, linear decay."""
        decay = (self.num_steps - step) / max(self.num_steps * (1 - self.hold), 1)
        return min(1.0, (step + 1) / self.num_warmup_steps, decay)


def averaging(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """Exponential moving average whose decay rises to `decay`, so that early averages forget the initial weights."""
    def update(averages: list[Tensor], weights: list[Tensor], num_averaged: Tensor) -> None:
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + int(num_averaged)) / (10 + int(num_averaged))))
    return update


Loss = Callable[[int, torch.Generator], dict[str, Tensor]]


def train(stage: str, model: nn.Module, loss_fn: Loss, recipe: Recipe, *, folder: Path, seed: int, resume: bool,
          sheet: Callable[[nn.Module], Tensor] | None = None) -> nn.Module:
    """Train `model` and return its exponential moving average.

    Args:
        stage: Name of the stage: of its files and its progress bar.
        model: What is trained, on its device.
        loss_fn: From a step number and a CPU generator of that step to named terms; their "loss" is minimised.
        recipe: Steps, batch, rates.
        folder: Work folder: `<stage>.pt` (state), `<stage>.jsonl` (losses), `<stage>-<step>.png` (sample sheets).
        seed: Seed of all randomness.
        resume: Go on from the state in `folder` instead of refusing to overwrite it.
        sheet: Draws the averaged model's samples as one [3, H, W] image in [0, 1].

    Raises:
        UserError: If an earlier run's state is there and `resume` is off, or the loss is no longer finite.
    """
    state_path = folder / f"{stage}.pt"
    if state_path.exists() and not resume:
        raise UserError(f"{state_path} holds an earlier run; add --resume to go on with it or remove it to start anew")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay,
                                  betas=(0.9, 0.99), fused=True)
    average = AveragedModel(model, multi_avg_fn=averaging(recipe.ema_decay), use_buffers=False)
    device = next(model.parameters()).device.type
    parts = {"model": model, "average": average, "optimizer": optimizer}
    step, elapsed_s = restore(state_path, parts) if state_path.exists() else (0, 0.0)

    started = saved = time.monotonic()
    sheet_every = max(recipe.num_steps // SHEETS, 1)
    bar = tqdm(total=recipe.num_steps, initial=step, desc=stage, unit="step", mininterval=5)
    while step < recipe.num_steps:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * recipe.rate(step)
        with torch.autocast(device, torch.bfloat16, enabled=recipe.bf16):
            terms = loss_fn(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        if not torch.isfinite(terms["loss"]):
            raise UserError(f"the loss of {stage} is not finite at step {step}; lower the learning rate and resume")
        optimizer.zero_grad()
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        average.update_parameters(model)
        step += 1
        bar.update()
        now = time.monotonic()
        if step % LOG_EVERY == 0 or step == recipe.num_steps:
            record = {name: round(float(value.detach()), 6) for name, value in terms.items()}
            append_jsonl(folder / f"{stage}.jsonl", {"step": step, **record, "grad_norm": round(float(norm), 4),
                                                     "elapsed_s": round(elapsed_s + now - started, 1)})
            bar.set_postfix(record, refresh=False)
        if now - saved > SAVE_EVERY_S or step == recipe.num_steps:
            saved = now
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "elapsed_s": elapsed_s + now - started}
            write_atomic(state_path, lambda partial, state=state: torch.save(state, partial))
        if sheet is not None and (step % sheet_every == 0 or step == recipe.num_steps):
            write_atomic(folder / f"{stage}-{step:06d}.png", lambda partial: save_image(sheet(average.module), partial))
    bar.close()
    return average.module.eval()


def restore(path: Path, parts: dict[str, nn.Module | torch.optim.Optimizer]) -> tuple[int, float]:
    """Put a saved state into the model, its average and the optimiser; the number of steps done and their time.

    Raises:
        UserError: If the file is damaged or of another preset.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or of another preset ({error}); remove it to start anew") from error
    return state["step"], state["elapsed_s"]
