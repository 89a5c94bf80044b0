"""The processes of one run: who they are, errors and results that all of them share, the mean of their gradients.

Under a launcher that sets WORLD_SIZE and RANK (accelerate launch, torchrun) accelerate joins them; alone there is
nothing to set up and nothing of torch.distributed is touched. Importing this module does not import torch.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

import psutil

from rewardiv.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(hours=6)  # that processes wait for another one, which may be drawing a probe
Result = TypeVar("Result")


@dataclass(frozen=True)
class Crew:
    """This process among those of a run; process 0 leads: it alone reads and writes the run's folder."""

    device: str
    rank: int = 0
    world_size: int = 1

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Every process does its own work and gets the results of all, by rank; `work` must not wait for others.

        Raises:
            Exception: In all processes, where the work of one failed; a UserError with the same sentence.
        """
        if self.world_size == 1:
            return [work()]
        import torch.distributed as dist

        answer, error = _tried(work)
        answers: list[tuple[Result, str, bool]] = [None] * self.world_size
        dist.all_gather_object(answers, answer)
        for rank, (_, sentence, known) in enumerate(answers):
            if sentence:
                _fail(error, rank, sentence, known)
        return [result for result, _, _ in answers]

    def lead(self, work: Callable[[], Result]) -> Result:
        """The leader does the work, and all get its result.

        Raises:
            Exception: In all processes, where it failed; a UserError with the same sentence.
        """
        if self.world_size == 1:
            return work()
        import torch.distributed as dist

        answer, error = _tried(work) if self.is_leader else (None, None)
        shared = [answer]
        dist.broadcast_object_list(shared, src=0)
        result, sentence, known = shared[0]
        if sentence:
            _fail(error, 0, sentence, known)
        return result

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over all processes into each tensor, in one transfer."""
        if self.world_size == 1:
            return
        import torch
        import torch.distributed as dist

        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world_size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def join_crew(device: str) -> Crew:
    """Join the other processes of the run, if a launcher started several; each takes its own GPU where device is cuda."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Crew(device)
    from accelerate import PartialState

    on_gpu = device.startswith("cuda")
    state = PartialState(cpu=not on_gpu, timeout=PATIENCE)
    own = f"cuda:{state.local_process_index}" if on_gpu else device
    return Crew(own, state.process_index, state.num_processes)


def relaunch_if_alone() -> None:
    """Start the command again in as many processes as `accelerate launch --num_processes N` was asked for on a CPU.

    Differs: accelerate itself starts a single process there, whatever N is, unless MPI is installed.

    Raises:
        UserError: If several were asked for and N cannot be found out.
    """
    alone = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if not alone:
        return
    asked = re.search(r"\s--num[-_]processes[\s=](\d+)\s", " ".join(psutil.Process(os.getppid()).cmdline()))
    if asked is None:
        raise UserError("accelerate launch started one process of several; use torchrun --nproc-per-node N -m rewardiv train")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={asked[1]}",
               f"--master-port={os.environ['MASTER_PORT']}", "-m", "rewardiv", *sys.argv[1:]]
    os.execv(sys.executable, command)


def _tried(work: Callable[[], Result]) -> tuple[tuple[Result | None, str, bool], Exception | None]:
    """(result, what went wrong, whether that is a UserError) to be sent to the others, and the error itself."""
    try:
        return (work(), "", False), None
    except Exception as error:  # sent to the other processes, then raised here
        return (None, str(error) or type(error).__name__, isinstance(error, UserError)), error


def _fail(error: Exception | None, rank: int, sentence: str, known: bool) -> NoReturn:
    if error is not None:
        raise error
    raise UserError(sentence) if known else RuntimeError(f"process {rank} of the run failed: {sentence}")
