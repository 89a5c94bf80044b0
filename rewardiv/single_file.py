"""Single-file checkpoints in the layout that Stable Diffusion 1, 2 and XL were published in, to a pipeline's parts."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open

from rewardiv.errors import UserError
from rewardiv.pipelines import SD, XL, Parts, checked_parts, corrected, family_of
from rewardiv.prompts import TextTower
from rewardiv.registry import MODELS

TEXT_PREFIXES = {  # how the keys of a family's text encoders begin
    "cond_stage_model.transformer.": "sd1", "cond_stage_model.model.": "sd2", "conditioner.embedders.1.": "sdxl",
}
UNET_PREFIX = "model.diffusion_model."
LACKING = "is damaged: it lacks weights that its configs name; restore it"
CONFIGS = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}  # the known model whose configs stand for a family's


def read_single_file(file: str | Path, dtype: torch.dtype) -> Parts:
    """The parts of a .safetensors checkpoint in the original layout, by diffusers' own conversion.

    The configs come from a folder beside the file that has its name without the ending and a model_index.json, as a
    pipeline in diffusers' layout has it; else from the hub (a few kB), as those of the family's known model. Stable
    Diffusion 2's files that predict epsilon can't be told from those that predict v, which is assumed: they need the folder.

    Raises:
        UserError: If the file is damaged, no whole checkpoint, or its configs can't be had.
    """
    file = Path(file)
    family = checkpoint_family(file)
    beside = file.with_suffix("")
    known = MODELS[CONFIGS[family]].path
    config = str(beside) if (beside / "model_index.json").is_file() else known
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    try:
        pipe = kind.from_single_file(str(file), config=config, dtype=dtype, **unused(family))
    except NotImplementedError as error:  # torch's, about weights that were never filled
        raise UserError(f"{file} {LACKING}") from error
    except Exception as error:  # diffusers and the hub client raise bare Exception types of their own
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"cannot read {file} with the configs of {config}: {type(error).__name__}: {reason}; put the configs "
                        f"of its pipeline into a folder {beside}, or try again with a network") from error
    towers = [TextTower(pipe.tokenizer, pipe.text_encoder)]
    if family == "sdxl":
        towers.append(TextTower(pipe.tokenizer_2, pipe.text_encoder_2))
    networks = (pipe.unet, pipe.vae, *(tower.encoder for tower in towers))
    if any(weight.is_meta for network in networks for weight in network.parameters()):
        raise UserError(f"{file} {LACKING}")
    if family == "sdxl" and dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)
    scheduler = dict(pipe.scheduler.config) | {"_class_name": type(pipe.scheduler).__name__}
    return checked_parts(
        Parts(pipe.unet, pipe.vae, tuple(towers), corrected(scheduler, XL if family == "sdxl" else SD),
              family_of(pipe.unet, tuple(towers)), bool(pipe.config.get("force_zeros_for_empty_prompt", False))), file)


def checkpoint_family(file: Path) -> str:
    """Which family's checkpoint it is, by its keys.

    Raises:
        UserError: If it is damaged or no whole checkpoint.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); restore it") from error
    for prefix, family in TEXT_PREFIXES.items():
        if any(key.startswith(prefix) for key in keys) and any(key.startswith(UNET_PREFIX) for key in keys):
            return family
    raise UserError(f"{file} is no Stable Diffusion 1, 2 or XL checkpoint with its text encoders (its first key is "
                    f"'{keys[0] if keys else ''}'); a LoRA belongs into --lora")


def unused(family: str) -> dict[str, None]:
    """Components that from_single_file leaves out."""
    return {"image_encoder": None, "feature_extractor": None} | ({} if family == "sdxl" else {"safety_checker": None})
