"""A sampling method tried on a checkpoint: base, finetuned and that method at a few seeds."""

from __future__ import annotations

import html
import logging
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from rewardiv.config import SampleConfig, TrainConfig
from rewardiv.errors import UserError
from rewardiv.methods import parse_method
from rewardiv.ui.live import GRID_EVERY_S, LiveRun, status_html
from rewardiv.ui.train_run import RunData

if TYPE_CHECKING:  # torch stays out of the page's start
    from collections.abc import Callable

    from rewardiv.generate import Engine

log = logging.getLogger(__name__)


def apply_config(run: RunData | None, step: int, method: str, prompt: str, num_seeds: int) -> SampleConfig:
    """Settings of the drawing: the run's model, guidance, steps and rewards, and the checkpoint that stands for `step`.

    Raises:
        UserError: If there is no checkpoint, or the method or the prompt cannot be used.
    """
    checkpoint = None if run is None else run.checkpoint_for(step)
    if checkpoint is None:
        raise UserError("this run has no checkpoint yet; wait for the first one or press Save now")
    train = TrainConfig.from_dict(run.job.settings)
    asked = str(parse_method(method.strip()))
    return SampleConfig(
        model=train.model, lora=str(run.checkpoints[checkpoint]), prompt=prompt,
        methods=tuple(dict.fromkeys(("base", "finetuned", asked))), seeds=tuple(range(num_seeds)),
        num_inference_steps=train.num_inference_steps, guidance_scale=train.guidance_scale, scheduler=train.scheduler,
        rewards=tuple(train.reward_weights),
    )


def apply_method(open_engine: Callable[[], Engine], run: RunData | None, step: int, method: str, prompt: str,
                 num_seeds: int) -> Iterator[str]:
    """The drawing as HTML that fills while it runs; a mistake is one sentence in it."""
    try:
        config = apply_config(run, step, method, prompt, num_seeds)
        yield status_html("Loading the model…", 0, "running")
        yield from _drawn(open_engine(), config, f"checkpoint of step {run.checkpoint_for(step)}")
    except UserError as error:
        yield status_html(str(error), 0, "failed")
    except Exception:
        log.exception("drawing with a checkpoint failed")
        yield status_html("Unexpected error; the log has the details.", 0, "failed")


def _drawn(engine: Engine, config: SampleConfig, caption: str) -> Iterator[str]:
    from rewardiv.generate import Progress, generate

    live = LiveRun(config, "")
    note = f'<p class="rd-note">{html.escape(caption)}</p>'
    with closing(generate(engine, config)) as records:
        for record in records:
            if isinstance(record, Progress):
                live.add(record)
                if live.due("grid", GRID_EVERY_S):
                    yield live.status() + live.grid()
            else:
                live.finish(record)
    yield status_html(live.note, 1, "done") + live.grid("") + live.table() + note
