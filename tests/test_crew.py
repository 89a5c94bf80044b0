"""Several processes as one: results, errors and means are the same in all; alone nothing is set up."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rewardiv.crew import Crew, join_crew, relaunch_if_alone
from rewardiv.errors import UserError

CONTEXT = multiprocessing.get_context("forkserver")
LAUNCHER = ("ACCELERATE_MIXED_PRECISION", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def member(work: Callable[[Crew], object], rank: int, size: int, port: int, answers: multiprocessing.Queue) -> None:
    """One process of a crew, as a launcher starts it; answers what its work gives or raises."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    try:
        answers.put((rank, work(join_crew("cpu"))))
    except Exception as error:
        answers.put((rank, (type(error).__name__, str(error))))


def in_crew(work: Callable[[Crew], object], size: int = 2) -> list[object]:
    """What `work` gives in each of the processes of a crew."""
    answers, port = CONTEXT.Queue(), free_port()
    processes = [CONTEXT.Process(target=member, args=(work, rank, size, port, answers)) for rank in range(size)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(size)]


def share(crew: Crew) -> object:
    tensors = [torch.full((2, 3), float(crew.rank)), torch.tensor([10.0 * crew.rank])]
    crew.average(tensors)
    return (crew.is_leader, crew.together(lambda: crew.rank * 11), crew.lead(lambda: f"from {crew.rank}"),
            [tensor.tolist() for tensor in tensors])


def test_all_processes_get_the_results_of_all_the_leaders_and_the_mean() -> None:
    mean = [[[0.5] * 3] * 2, [5.0]]
    assert in_crew(share) == [(True, [0, 11], "from 0", mean), (False, [0, 11], "from 0", mean)]


def refuse(crew: Crew) -> object:
    def work() -> None:
        if crew.rank == 1:
            raise UserError("the second process has no room")

    return crew.together(work)


def refuse_to_lead(crew: Crew) -> object:
    def work() -> None:
        raise KeyError("not known") if crew.is_leader else AssertionError("only the leader works")

    try:
        return crew.lead(work)
    except KeyError as error:
        return type(error).__name__, str(error)


def test_an_error_in_one_process_is_raised_in_all() -> None:
    assert in_crew(refuse) == [("UserError", "the second process has no room")] * 2
    assert in_crew(refuse_to_lead) == [
        ("KeyError", "'not known'"), ("RuntimeError", "process 0 of the run failed: 'not known'"),
    ]


def test_alone_nothing_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    crew = join_crew("cpu")
    tensor = torch.ones(2)
    crew.average([tensor])
    assert crew == Crew("cpu", 0, 1) and crew.is_leader
    assert crew.together(lambda: 3) == [3] and crew.lead(lambda: 4) == 4 and tensor.tolist() == [1, 1]
    assert not torch.distributed.is_initialized()
    relaunch_if_alone()  # does nothing: no launcher started this


def test_processes_that_a_launcher_left_out_are_started(tmp_path: Path) -> None:
    """As under `accelerate launch --num_processes 2` without GPUs: one process, started by a command that asks for two."""
    package = tmp_path / "rewardiv"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, pathlib, sys\n"  # a file each: two processes may write to one pipe at once
        "pathlib.Path('rank' + os.environ['RANK']).write_text(' '.join([os.environ['WORLD_SIZE'], *sys.argv[1:]]))\n")
    root = Path(__file__).resolve().parent.parent
    alone = ("import sys; sys.path.insert(0, sys.argv.pop()); from rewardiv.crew import relaunch_if_alone; relaunch_if_alone()")
    launcher = ("import subprocess, sys; at = sys.argv.index('train'); "
                "sys.exit(subprocess.run([sys.executable, '-c', *sys.argv[at - 1:]]).returncode)")
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    env |= {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", launcher, "--num_processes", "2", alone, "train", str(root)],
                   env=env, cwd=tmp_path, check=True)
    assert {path.name: path.read_text() for path in tmp_path.glob("rank*")} == {"rank0": "2 train", "rank1": "2 train"}


def test_a_launcher_that_does_not_say_how_many_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="torchrun"):
        relaunch_if_alone()
