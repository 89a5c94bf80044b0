"""The Training form's fields as Gradio components: a few at first, the rest folded away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import gradio as gr

from rewardiv.config import ALGORITHMS, LORA_TARGETS, PRECISIONS, TRACKERS, TRAIN_SCHEDULERS, TrainConfig
from rewardiv.registry import known
from rewardiv.train_presets import TRAIN_PRESETS
from rewardiv.ui.train_form import LABELS, OPTIONAL, REGULARISERS, Values

REGULARISER_NAMES = {
    "none": "none",
    "kl": "KL, as the authors code it",
    "path-kl": "KL between the sampling processes",
    "lora-norm": "norm of the weight change",
}
ALGORITHM_NAMES = {
    "draft-k": "DRaFT-K", "draft-lv": "DRaFT-LV: several noisings of the end", "refl": "ReFL: one random late step",
}
FOLDED = {
    "Images and gradients": (
        ("num_inference_steps", "guidance_scale"), ("train_batch_size", "gradient_accumulation_steps"),
        ("grad_steps", "lv_noisings"), ("refl_window", "grad_batch_size"), ("scheduler", "prompts_file"),
    ),
    "LoRA": (("rank", "lora_alpha"), ("lora_targets", "lora_dropout")),
    "Optimiser": (
        ("lr_warmup_steps", "max_grad_norm"), ("adam_beta1", "adam_beta2"), ("adam_weight_decay", "ema_decay"),
        ("mixed_precision", "max_rollbacks"), ("gradient_checkpointing",),
    ),
    "More regularisers, early stop": (("more_regularisers",), ("path_kl_steps", "diversity_floor")),
    "Probes": (("num_probe_prompts", "num_probe_seeds"), ("probe_rewards",)),
    "Checkpoints, seed, device": (
        ("checkpointing_steps", "checkpoints_total_limit"), ("seed", "device"), ("report_to", "resume_from_checkpoint"),
    ),
}
CHOICES: Mapping[str, list[tuple[str, str]]] = {
    "algorithm": [(ALGORITHM_NAMES.get(name, name), name) for name in ALGORITHMS],
    "regulariser": [(REGULARISER_NAMES[name], name) for name in REGULARISERS],
    "scheduler": [(name, name) for name in TRAIN_SCHEDULERS],
    "lora_targets": [(name, name) for name in LORA_TARGETS],
    "mixed_precision": [(name, name) for name in PRECISIONS],
    "report_to": [("nothing else", ""), *((name, name) for name in TRACKERS)],
    "device": [(name, name) for name in ("cpu", "cuda")],
}
OPEN_CHOICES = ("lora_targets", "device")  # take names that aren't listed, too
LISTS = ("rewards", "probe_rewards")
TEXTS = (*OPTIONAL, "name", "weights", "more_regularisers", "prompts_file", "resume_from_checkpoint")
WHOLE = {field.name for field in fields(TrainConfig) if "int" in str(field.type)}
Fields = dict[str, gr.components.Component]


def preset_field() -> gr.Dropdown:
    """The presets by name."""
    names = list(TRAIN_PRESETS)
    return gr.Dropdown(names, value=names[0], label="Preset", elem_id="rd-preset")


def preset_note(name: str | None) -> str:
    """Where a preset is from, not yet escaped."""
    return TRAIN_PRESETS[name].source if name in TRAIN_PRESETS else ""


def visible_fields(values: Values) -> Fields:
    """What most runs change, in the order in which it is thought of."""
    several = len(values["rewards"]) > 1
    made: Fields = {"rewards": _field("rewards", values), "weights": _field("weights", values, visible=several)}
    for row in (("model", "algorithm"), ("regulariser", "regulariser_weight"), ("max_train_steps", "learning_rate"),
                ("probe_every", "name")):
        made |= _row(row, values)
    return made


def folded_fields(values: Values) -> Fields:
    """Everything else, in accordions."""
    made: Fields = {}
    for title, rows in FOLDED.items():
        with gr.Accordion(title, open=False):
            for row in rows:
                made |= _row(row, values)
    return made


def _row(names: tuple[str, ...], values: Values) -> Fields:
    if len(names) == 1:
        return {names[0]: _field(names[0], values)}
    with gr.Row(elem_classes="rd-pair"):
        return {name: _field(name, values) for name in names}


def _field(name: str, values: Values, **more: object) -> gr.components.Component:
    """One field; its kind follows from what its setting takes."""
    label = LABELS[name]
    settings = {"value": values[name], "label": label.text, "info": label.hint or None, "min_width": 120, **more}
    settings["elem_id"] = f"rd-t-{name}"
    if name == "model":
        return gr.Dropdown(list(known().models), allow_custom_value=True, **settings)
    if name in CHOICES:
        return gr.Dropdown(CHOICES[name], allow_custom_value=name in OPEN_CHOICES, **settings)
    if name in LISTS:
        return gr.Dropdown(list(known().rewards), multiselect=True, allow_custom_value=True, **settings)
    if name in TEXTS:
        return gr.Textbox(lines=1, max_lines=1, **settings)
    if isinstance(values[name], bool):
        return gr.Checkbox(**settings)
    return gr.Number(precision=0 if name in WHOLE else None, **settings)
