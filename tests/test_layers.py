"""The house as a test: imports point down the table, and only the named rooms touch the big libraries and the disk."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEVELS = (
    {"errors", "runs", "registry", "devices", "hub", "extensions"},
    {"downloads", "gamma", "methods", "metrics", "gram", "panel", "hacking",
     "plots", "config", "command_line", "crew", "records", "verdicts", "train_presets", "lora_mix", "study"},
    {"sampling", "lora", "lora_formats", "framing", "clip_models", "rewards",
     "features", "perceptual", "mixing", "checkpoints", "trackers", "prompts", "pipelines", "memory", "safety", "single_file"},
    {"models", "regularisers"},
    {"generate", "export"},
    {"draft", "probes", "learner", "trainer", "publish", "evaluate", "bench"},
    {"jobs", "sweep_jobs", "sweep_diary", "supervisor", "showcase", "study_page", "pretrain"},
    {"cli", "cli_training", "cli_export", "cli_models", "cli_options", "cli_sweep", "cli_search", "cli_study", "__main__", "ui",
     "app"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms} | {"__init__": 0}
MAY_TOUCH = {
    "matplotlib": {"plots"},
    "peft": {"lora", "lora_formats"},
    "diffusers": {"sampling", "models", "lora_formats", "pipelines", "single_file", "bench", "pretrain"},
    "transformers": {"pipelines", "clip_models", "rewards", "features", "bench", "pretrain"},
    "open_clip": {"clip_models", "rewards", "features", "pretrain"},
    "torchvision": {"features", "pretrain", "cli"},
    "gradio": {"ui", "app"},
    "subprocess": {"jobs", "sweep_jobs", "sweep_diary", "bench", "pretrain", "study_page"},
    "psutil": {"memory", "bench", "jobs", "sweep_jobs", "sweep_diary", "supervisor", "crew"},
    "fcntl": {"runs"},
    "huggingface_hub": {"hub", "study"},
    "pyarrow": {"evaluate", "study"},
    "sqlalchemy": {"study"},
    "evalica": {"study"},
    "optuna": {"evaluate"},
    "starlette": {"study_page"},
    "uvicorn": {"cli_study"},
    "shutil": {"runs", "hub", "pretrain"},
}
NO_TORCH = {
    "__init__", "errors", "config", "runs", "registry", "hub", "extensions", "downloads", "cli_models", "gamma", "methods",
    "train_presets", "command_line", "jobs", "sweep_jobs", "sweep_diary", "records", "verdicts", "lora_mix", "study",
    "study_page", "cli_study", "cli_options",
}
BANNED_ROOMS = {"utils", "common", "helpers", "base"}


def sources() -> Iterator[tuple[str, Path, ast.Module]]:
    """Room, file and syntax tree of every module of the package, and of app.py."""
    for path in [*sorted((ROOT / "rewardiv").rglob("*.py")), *ROOT.glob("app.py")]:
        inside = path.relative_to(ROOT / "rewardiv").parts if path.name != "app.py" else ("app",)
        yield inside[0].removesuffix(".py"), path, ast.parse(path.read_text())


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, those for annotations alone left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name for alias in node.names]
        else:
            yield from imports(node)


def rooms_used(tree: ast.AST) -> set[str]:
    return {name.split(".")[1] for name in imports(tree) if name.startswith("rewardiv.")} - {"__version__"}


def test_every_module_has_its_place_and_says_what_it_is_for() -> None:
    for room, path, tree in sources():
        assert room in LEVEL, f"{path} has no level: add it to the table"
        assert path.stem not in BANNED_ROOMS and ast.get_docstring(tree), path


def test_imports_point_down_the_table() -> None:
    for room, path, tree in sources():
        for used in rooms_used(tree):
            assert LEVEL[used] <= LEVEL[room], f"{path} imports {used}, which lies above it"


def test_rooms_of_one_level_do_not_import_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for room, _, tree in sources():
        graph.setdefault(room, set()).update(used for used in rooms_used(tree) - {room})
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_only_the_named_rooms_touch_the_big_libraries() -> None:
    for room, path, tree in sources():
        libraries = {name.split(".")[0] for name in imports(tree)}
        strangers = {name for name in libraries if room not in MAY_TOUCH.get(name, {room})}
        assert not strangers, f"{path} may not touch {strangers}"
        assert room not in NO_TORCH or "torch" not in libraries, f"{path} must do without torch"


def test_only_runs_opens_files_for_writing() -> None:
    for room, path, tree in sources():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            modes = [node.value for node in [*call.args, *(keyword.value for keyword in call.keywords)]
                     if isinstance(node, ast.Constant) and isinstance(node.value, str)]
            writes = name == "open" and any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes)
            assert room == "runs" or not writes, f"{path}:{call.lineno} opens a file for writing; let runs do it"


def test_import_rewardiv_is_light() -> None:
    script = "import sys, rewardiv; sys.exit(bool({'torch', 'gradio', 'diffusers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
