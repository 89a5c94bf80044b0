"""The form of a sweep: what its fields mean as a SweepConfig, a SweepConfig as values for them, and their components."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import gradio as gr

from rewardiv.config import SCHEDULERS, parse_seeds
from rewardiv.errors import UserError
from rewardiv.evaluate.prompt_sets import BUILT_IN
from rewardiv.evaluate.settings import DISTANCES, DIVERSITIES, DTYPES, SEEDS, SweepConfig
from rewardiv.registry import PROMPTS, known
from rewardiv.ui.form import text_of
from rewardiv.ui.train_form import Label, run_name

Values = dict[str, object]
Fields = dict[str, gr.components.Component]

LISTS = ("loras", "checkpoints", "prompt_sets", "rewards", "held_out", "distances")  # several may be chosen
WORDS = ("methods",)  # separated by spaces or new lines
LINES = ("prompts", "categories")  # one a line
LABELS: dict[str, Label] = {
    "methods": Label("Methods, with lists and ranges", "lora:0.25,0.5 is two, aig:power:1..8/4log is 1, 2, 4 and 8"),
    "loras": Label("LoRAs"),
    "prompt_sets": Label("Prompt sets", "or a file of prompts"),
    "max_prompts": Label("At most … prompts", "0 is all"),
    "prompts": Label("Own prompts", "one a line"),
    "seeds": Label("Seeds", "such as 0-3; 2 or more"),
    "held_out": Label("Held-out rewards", "nothing was trained on them"),
    "name": Label("Name of the sweep"),
    "model": Label("Base model"),
    "checkpoints": Label("Checkpoints of training runs", "RUN is all of them, RUN=10,20 those steps"),
    "rewards": Label("Rewards", "none: what the LoRAs were trained on"),
    "num_inference_steps": Label("Denoising steps"),
    "guidance_scale": Label("Guidance", "1 is off"),
    "diversity": Label("Diversity of the report"),
    "reference_seeds": Label("Reference seeds", "of more base images: for the report's panel and hacking check"),
    "categories": Label("Categories of the prompt sets", "one a line; none is all"),
    "scheduler": Label("Scheduler"),
    "guidance_rescale": Label("Guidance rescale", "0 is off"),
    "negative_prompt": Label("Negative prompt"),
    "height": Label("Height, px", "0: the model's own"),
    "width": Label("Width, px", "0: the model's own"),
    "dtype": Label("Precision"),
    "features": Label("Features", "clip, dinov2:SIZE, inception or a folder"),
    "distances": Label("Learned distances", "for the report's panel, with their packages"),
}
FOLDED = {
    "Model, checkpoints, rewards": (("model",), ("checkpoints",), ("rewards",)),
    "Steps, guidance, size": (("num_inference_steps", "guidance_scale"), ("guidance_rescale", "scheduler"), ("height", "width"),
                              ("negative_prompt",), ("dtype",)),
    "Report": (("diversity",), ("features", "reference_seeds"), ("distances",), ("categories",)),
}
VISIBLE = (("methods",), ("loras",), ("prompt_sets", "max_prompts"), ("prompts",), ("seeds", "name"), ("held_out",))


def first_values(name: str) -> Values:
    """A sweep of about a minute or two with the built-in model on two cores."""
    methods = ("finetuned", "lora:0.25..0.75/3", "aig:power:1..8/4log")
    return values_of(SweepConfig("x", methods=methods, held_out=("clip",), max_prompts=6)) | {"name": name}


def config_of(values: Mapping[str, object], sweeps_dir: Path) -> SweepConfig:
    """The settings that the fields stand for; all sweeps of a folder share the store in it.

    Raises:
        UserError: If a field cannot be used. Models, LoRAs, rewards and prompts aren't looked up.
    """
    name = text_of("name", values["name"]).strip()
    if name.lower() == "store":
        raise UserError("a sweep can't be called 'store', where all sweeps keep their images; choose another name")
    if not name:
        raise UserError("the sweep has no name; call it something, such as sweep-1")
    folder = sweeps_dir / run_name(name)
    settings: Values = {"output_dir": _short(folder), "store": _short(sweeps_dir / "store")}
    for field, value in values.items():
        if field in SEEDS:
            text = text_of(LABELS[field].text, value).strip()
            settings[field] = parse_seeds(text) if text or field == "seeds" else ()
        elif field in LISTS:
            settings[field] = tuple(value or ()) if isinstance(value, list | tuple | None) else value
        elif field in WORDS:
            settings[field] = tuple(text_of(LABELS[field].text, value).split())
        elif field in LINES:
            settings[field] = tuple(line.strip() for line in text_of(LABELS[field].text, value).splitlines() if line.strip())
        elif field != "name":
            settings[field] = _fitting(field, value)
    if not settings["methods"]:
        raise UserError("no method is given; write some, such as finetuned lora:0.5 aig:power:1..8/4log")
    return SweepConfig(**settings)


def values_of(config: SweepConfig) -> Values:
    """Fields that stand for `config`, whatever its name."""
    found: Values = {field: getattr(config, field) for field in LABELS if field != "name"}
    found |= {field: list(found[field]) for field in LISTS}
    found |= {field: " ".join(found[field]) for field in WORDS} | {field: "\n".join(found[field]) for field in LINES}
    return found | dict(zip(SEEDS, config.seed_texts, strict=True)) | {"name": config.folder.name}


def size_text(config: SweepConfig) -> str:
    """How many images the settings make, where that is known without looking far."""
    methods = f"{len(config.seeds)} seeds × {len(config.arms)} methods"
    if any(name not in BUILT_IN and not Path(name).exists() for name in config.prompt_sets):
        return f"{methods} a prompt."
    prompts = len(config.prompt_list)
    more = f", and {prompts * len(config.reference_seeds)} at the reference seeds" if config.reference_seeds else ""
    return f"{prompts} prompts × {methods} = {prompts * len(config.seeds) * len(config.arms)} images{more}."


def build_fields(values: Values, checkpoints: list[tuple[str, str]]) -> Fields:
    """Everything most sweeps change, then the rest in accordions."""
    made: Fields = {}
    for row in VISIBLE:
        made |= _row(row, values, checkpoints)
    for title, rows in FOLDED.items():
        with gr.Accordion(title, open=False):
            for row in rows:
                made |= _row(row, values, checkpoints)
    return made


def _row(names: tuple[str, ...], values: Values, checkpoints: list[tuple[str, str]]) -> Fields:
    if len(names) == 1:
        return {names[0]: _field(names[0], values, checkpoints)}
    with gr.Row(elem_classes="rd-pair"):
        return {name: _field(name, values, checkpoints) for name in names}


def _field(name: str, values: Values, checkpoints: list[tuple[str, str]]) -> gr.components.Component:
    """One field; its kind follows from what its setting takes."""
    label = LABELS[name]
    settings = {"value": values[name], "label": label.text, "info": label.hint or None, "min_width": 120}
    settings["elem_id"] = f"rd-s-{name}"
    choices: dict[str, list] = {
        "loras": list(known().loras), "model": list(known().models), "prompt_sets": list(PROMPTS), "checkpoints": checkpoints,
        "rewards": list(known().rewards), "held_out": list(known().rewards), "features": ["clip"],
        "scheduler": list(SCHEDULERS), "dtype": list(DTYPES), "distances": list(DISTANCES),
        "diversity": [(about, key) for key, about in DIVERSITIES.items()],
    }
    if name in choices:
        open_ended = name not in ("scheduler", "dtype", "diversity", "distances")
        return gr.Dropdown(choices[name], multiselect=name in LISTS, allow_custom_value=open_ended, **settings)
    if isinstance(values[name], str):
        lines = 3 if name == "prompts" else 2 if name in (*WORDS, *LINES) else 1
        return gr.Textbox(lines=lines, max_lines=8 if lines > 1 else 1, **settings)
    return gr.Number(precision=None if isinstance(values[name], float) else 0, **settings)


def _fitting(field: str, value: object) -> object:
    """The value as its setting wants it: 20 for 20.0, "" for an emptied text; what doesn't fit, SweepConfig refuses."""
    default = getattr(SweepConfig, field)
    if isinstance(default, str):
        return text_of(LABELS[field].text, value).strip()
    if isinstance(value, float) and value.is_integer() and not isinstance(default, float):
        return int(value)
    return value


def _short(path: Path) -> str:
    """From the current folder, where the path lies below it: so the command that is shown can be typed elsewhere."""
    inside = path.is_relative_to(Path.cwd())
    return os.path.relpath(path) if inside else str(path)

