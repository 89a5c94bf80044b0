"""The engine, loaded in the background: the page is served while torch and the models are still on their way."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from rewardiv.devices import pick_dtype
from rewardiv.errors import UserError

if TYPE_CHECKING:  # importing it takes as long as the page's whole start
    from rewardiv.generate import Engine

log = logging.getLogger(__name__)


class LazyEngine:
    """Call it for the engine; the first call waits until everything heavy has been imported.

    Args:
        device: Where models run, such as cpu or cuda.
        dtype: Of the base model, such as float16.
        offload: As Engine's.
    """

    def __init__(self, device: str = "cpu", dtype: str = "float32", offload: bool = False) -> None:
        self.device, self.dtype, self.offload = device, dtype, offload
        self._lock = threading.Lock()
        self._engine: Engine | None = None

    def __call__(self) -> Engine:
        with self._lock:
            if self._engine is None:
                from rewardiv.generate import Engine

                self._engine = Engine(self.device, pick_dtype(self.dtype), offload=self.offload)
            return self._engine

    @property
    def ready(self) -> bool:
        """Whether a call returns at once."""
        return self._engine is not None

    def warm_up(self, model: str, reward: str) -> threading.Thread:
        """Load a model, a reward and the features in a thread, so that the first click doesn't wait for them."""
        thread = threading.Thread(target=self._warm_up, args=(model, reward), name="warm-up", daemon=True)
        thread.start()
        return thread

    def _warm_up(self, model: str, reward: str) -> None:
        try:
            engine = self()
            engine.model(model)
            engine.reward(reward)
            engine.features()
        except UserError as error:  # said on the page as well, at the first click
            log.warning("%s", error)
        except Exception:
            log.exception("could not load %s ahead of time", model)
