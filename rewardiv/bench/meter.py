"""What a training process takes: the seconds of its steps and the most memory, read the same way on both sides.

Needs nothing but the standard library (and torch, on CUDA), because it also runs in the other trainer's environment.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

MIB = 2**20
STATUS = Path("/proc/self/status")


class Meter:
    """Made when everything is loaded and no step has been taken; `step_done` after each step, then `report`.

    On Linux the peak counts from then on, so that what loading took for a moment isn't in it, and memory of the process
    that started this one isn't either (ru_maxrss holds both). Elsewhere the peak is ru_maxrss. On CUDA both numbers are
    what torch has allocated on the device.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.on_cuda = device.startswith("cuda")
        self.step_s: list[float] = []
        self.step_cpu_s: list[float] = []
        if self.on_cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
        self.loaded_mib, _ = self._memory()
        self._last = time.perf_counter(), time.process_time()

    def step_done(self) -> None:
        """Note a finished step."""
        if self.on_cuda:
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        for kept, last, time_s in zip((self.step_s, self.step_cpu_s), self._last, now, strict=True):
            kept.append(time_s - last)
        self._last = now

    def report(self, **facts: object) -> str:
        """One line of JSON: `step_s`, `step_cpu_s`, `loaded_mib`, `peak_mib` and the given facts.

        step_cpu_s is processor time, all threads together: it hardly changes when others use the machine too.
        """
        _, peak_mib = self._memory()
        measured = {"step_s": self.step_s, "step_cpu_s": self.step_cpu_s, "loaded_mib": self.loaded_mib, "peak_mib": peak_mib}
        return json.dumps(measured | facts)

    def _memory(self) -> tuple[float, float]:
        """MiB held now and at most."""
        if self.on_cuda:
            import torch

            return torch.cuda.memory_allocated() / MIB, torch.cuda.max_memory_allocated() / MIB
        if STATUS.exists():
            lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
            now, peak = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
            return now, peak
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)
        return peak, peak
