"""Settings of finetuning runs that others have published, and the built-in model's, as data; each says where it is from.

A preset names no model and no reward: those are chosen apart. Batches are counted for one process on one device; the
authors' spread over several devices, so theirs is in gradient_accumulation_steps.
"""

from __future__ import annotations

from typing import NamedTuple

from rewardiv.config import TrainConfig
from rewardiv.errors import UserError, nearest

Setting = str | int | float | bool


class TrainPreset(NamedTuple):
    """Where the settings are from (and what of it couldn't be taken over), and the TrainConfig fields that they set."""

    source: str
    settings: dict[str, Setting]


AUTHORS = {
    "algorithm": "draft-k", "grad_steps": 1, "rank": 32, "lora_targets": "authors", "lora_dropout": 0.0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "max_grad_norm": 10.0, "mixed_precision": "bf16",
}
SD1 = {"scheduler": "ddim", "guidance_scale": 7.5}
SDXL = {"scheduler": "euler", "guidance_scale": 5.0}

TRAIN_PRESETS: dict[str, TrainPreset] = {
    "emoji": TrainPreset(
        "Ours, for the built-in model, as the prepared runs: minutes on two CPU cores, far enough to over-optimise. K is 6 of "
        "6 denoising steps: through the last ones alone the reward is hacked too, but pictures stay as various.",
        {"algorithm": "draft-k", "grad_steps": 6, "num_inference_steps": 6, "guidance_scale": 3.0, "scheduler": "ddim",
         "rank": 4, "lora_targets": "all", "learning_rate": 3e-3, "lr_warmup_steps": 10, "train_batch_size": 8,
         "grad_batch_size": 8, "gradient_accumulation_steps": 1, "max_train_steps": 80, "max_grad_norm": 1.0,
         "mixed_precision": "no", "checkpointing_steps": 10},
    ),
    "draft-sd1": TrainPreset(
        "Jena et al. (arXiv:2409.06493), the authors' launch scripts for SD 1.x: batch 2 x 8 GPUs x 4 = 64, PickScore or "
        "HPSv2, 50 000 Pick-a-Pic captions; their KL weights sweep 0, 0.1, 0.5, 1, 2, 5, 10, 20, 50.",
        {**AUTHORS, **SD1, "num_inference_steps": 25, "learning_rate": 2.5e-4, "lr_warmup_steps": 0,
         "adam_weight_decay": 0.005, "train_batch_size": 2, "gradient_accumulation_steps": 32, "kl_weight": 1.0,
         "max_train_steps": 4000, "checkpointing_steps": 100, "probe_every": 100},
    ),
    "draft-sdxl": TrainPreset(
        "Jena et al. (arXiv:2409.06493), the authors' launch scripts for SDXL: batch 1 x 8 GPUs x 4 = 32, PickScore or "
        "HPSv2, 50 000 Pick-a-Pic captions; their KL weights sweep 0, 0.1, 0.5, 1, 2, 5, 10, 20, 50.",
        {**AUTHORS, **SDXL, "num_inference_steps": 25, "learning_rate": 2.5e-4, "lr_warmup_steps": 0,
         "adam_weight_decay": 0.0005, "train_batch_size": 1, "gradient_accumulation_steps": 32, "kl_weight": 1.0,
         "gradient_checkpointing": True, "max_train_steps": 10000, "checkpointing_steps": 200, "probe_every": 200},
    ),
    "nemo-sd1": TrainPreset(
        "NeMo-Aligner's draftp_sd.yaml (DRaFT+ for SD 1.x): batch 1, 4 over all devices.",
        {**AUTHORS, **SD1, "num_inference_steps": 50, "learning_rate": 1e-4, "lr_warmup_steps": 10,
         "adam_weight_decay": 0.0, "train_batch_size": 1, "gradient_accumulation_steps": 4, "kl_weight": 1.0},
    ),
    "nemo-sdxl": TrainPreset(
        "NeMo-Aligner's draftp_sdxl.yaml (DRaFT+ for SDXL): its warm-up of 10 000 steps is kept.",
        {**AUTHORS, **SDXL, "num_inference_steps": 40, "learning_rate": 1e-4, "lr_warmup_steps": 10000,
         "adam_weight_decay": 0.0, "train_batch_size": 1, "gradient_accumulation_steps": 1, "kl_weight": 1.0,
         "gradient_checkpointing": True},
    ),
    "alignprop": TrainPreset(
        "The defaults of TRL 0.23.1's AlignPropConfig (Prabhudesai et al., arXiv:2310.03739) with its fixed truncation at step "
        "49 of 50, and LoRA rank 4 on attention. Its default instead cuts gradients at random steps and samples with eta 1; "
        "its fp16 is bf16 here, which needs no CUDA.",
        {"algorithm": "draft-k", "grad_steps": 1, "num_inference_steps": 50, "guidance_scale": 5.0, "scheduler": "ddim",
         "rank": 4, "lora_targets": "attention", "learning_rate": 1e-3, "lr_warmup_steps": 0, "adam_beta1": 0.9,
         "adam_beta2": 0.999, "adam_weight_decay": 1e-4, "max_grad_norm": 1.0, "train_batch_size": 1,
         "gradient_accumulation_steps": 1, "mixed_precision": "bf16", "gradient_checkpointing": True,
         "checkpoints_total_limit": 5},
    ),
    "refl": TrainPreset(
        "The defaults of ImageReward's ReFL.py (Xu et al., arXiv:2304.05977): one of steps 30 to 39 of 40, no guidance. It "
        "trains the whole UNet, adds a loss on real images, and caps the reward; here a LoRA learns from the reward alone.",
        {"algorithm": "refl", "num_inference_steps": 40, "refl_window": 0.25, "guidance_scale": 1.0, "scheduler": "ddim",
         "learning_rate": 1e-5, "lr_warmup_steps": 0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.01,
         "max_grad_norm": 1.0, "train_batch_size": 2, "gradient_accumulation_steps": 4, "max_train_steps": 100,
         "checkpointing_steps": 100},
    ),
}


def preset_config(name: str, **settings: object) -> TrainConfig:
    """A run's settings from a preset; `settings` go before it, and must hold output_dir.

    Raises:
        UserError: If the preset is unknown or a setting cannot be used.
    """
    if name not in TRAIN_PRESETS:
        raise UserError(f"unknown preset '{name}'{nearest(name, TRAIN_PRESETS)}")
    return TrainConfig.from_dict(TRAIN_PRESETS[name].settings | settings)
