"""One side of the sampling benchmark: `python -m rewardiv.bench.sample_cell WAY TASK FILE`, JSON as in rewardiv.bench.sample.

Makes the images of all methods, in one batched run ("rewardiv") or with plain diffusers calls ("plain"), saves them in FILE
and prints what that took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor

from rewardiv.bench.meter import Meter
from rewardiv.config import SampleConfig
from rewardiv.gamma import Clock
from rewardiv.generate import Engine, decode, open_run
from rewardiv.methods import Method, parse_methods
from rewardiv.registry import LORA_FILE, find_lora
from rewardiv.runs import write_atomic
from rewardiv.sampling import initial_noise, make_scheduler

ADAPTER = "bench"
Images = NDArray[np.uint8]  # [methods, S, H, W, 3]


class Batched:
    """All methods in one run of the engine."""

    def __init__(self, config: SampleConfig, device: str, dtype: torch.dtype) -> None:
        self.engine, self.rows = Engine(device=device, dtype=dtype), 0
        open_run(self.engine, config, parse_methods(config.methods))  # loads; computes nothing yet

    def images(self, config: SampleConfig) -> Images:
        """Of all methods."""
        run = open_run(self.engine, config, parse_methods(config.methods))
        *_, last = run.steps
        self.rows = last.rows
        return np.stack([one.permute(0, 2, 3, 1).cpu().numpy() for one in decode(run.model, last.latents)])


class Plain:
    """Method after method: a diffusers pipeline with its LoRA, and for AIG a second UNet beside it, as the authors do."""

    def __init__(self, config: SampleConfig, device: str, dtype: torch.dtype) -> None:
        index = json.loads((Path(config.model) / "model_index.json").read_text())
        self.is_xl = index["_class_name"] == "StableDiffusionXLPipeline"
        kind = StableDiffusionXLPipeline if self.is_xl else StableDiffusionPipeline
        self.pipe = kind.from_pretrained(config.model, torch_dtype=dtype, use_safetensors=True).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.base_unet = UNet2DConditionModel.from_pretrained(config.model, subfolder="unet", torch_dtype=dtype).to(device)
        file = Path(find_lora(config.lora).path)
        file = file / LORA_FILE if file.is_dir() else file
        self.pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER)
        self.rows = 0

    @torch.no_grad()
    def images(self, config: SampleConfig) -> Images:
        """Of all methods."""
        self.rows = 0
        self.pipe.scheduler = make_scheduler(self.pipe.scheduler.config, config.scheduler, 1, self.pipe.device)
        unet = self.pipe.unet.config
        shape = (unet.in_channels, unet.sample_size, unet.sample_size)
        noise = initial_noise(config.seeds, shape, device=self.pipe.device, dtype=self.pipe.dtype)
        made = [self._aig(config, noise, method) if method.kind == "aig" else self._constant(config, noise, method)
                for method in parse_methods(config.methods)]
        return np.stack([(one * 255).round().astype(np.uint8) for one in made])

    def _constant(self, config: SampleConfig, noise: Tensor, method: Method) -> NDArray[np.float32]:
        if method.kind == "base":
            self.pipe.disable_lora()
        else:
            self.pipe.enable_lora()
            self.pipe.set_adapters([ADAPTER], [1.0 if method.kind == "finetuned" else method.value])
        self.rows += 2 * len(noise) * config.num_inference_steps
        return self.pipe(
            [config.prompt] * len(noise), latents=noise, num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale, output_type="np",
        ).images

    def _aig(self, config: SampleConfig, noise: Tensor, method: Method) -> NDArray[np.float32]:
        pipe, scheduler = self.pipe, self.pipe.scheduler
        pipe.enable_lora()
        pipe.set_adapters([ADAPTER], [1.0])
        conditions = self._conditions(config.prompt, len(noise))
        scheduler.set_timesteps(config.num_inference_steps, device=pipe.device)
        clock = Clock.of_steps(config.num_inference_steps)
        latents = noise * scheduler.init_noise_sigma

        def guided(unet: UNet2DConditionModel, inputs: Tensor, t: Tensor) -> Tensor:
            self.rows += len(inputs)
            negative, positive = unet(inputs, t, **conditions).sample.chunk(2)
            return negative + config.guidance_scale * (positive - negative)

        for i, t in enumerate(scheduler.timesteps):
            inputs = scheduler.scale_model_input(torch.cat([latents, latents]), t)
            weight = method.gamma.at(clock, i)
            mixture = weight * guided(self.base_unet, inputs, t) + (1 - weight) * guided(pipe.unet, inputs, t)
            latents = scheduler.step(mixture, t, latents).prev_sample
        vae = pipe.vae.float() if self.is_xl and pipe.vae.config.force_upcast else pipe.vae  # as the pipeline itself
        decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        return pipe.image_processor.postprocess(decoded, output_type="np")

    def _conditions(self, prompt: str, size: int) -> dict[str, object]:
        """What the UNet is told beside latents and time, the unconditional rows first."""
        pipe = self.pipe
        if not self.is_xl:
            positive, negative = pipe.encode_prompt([prompt] * size, pipe.device, 1, True)
            return {"encoder_hidden_states": torch.cat([negative, positive])}
        positive, negative, pooled, negative_pooled = pipe.encode_prompt([prompt] * size, device=pipe.device)
        side = pipe.default_sample_size * pipe.vae_scale_factor
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * 2 * size, device=pipe.device, dtype=positive.dtype)
        return {"encoder_hidden_states": torch.cat([negative, positive]),
                "added_cond_kwargs": {"text_embeds": torch.cat([negative_pooled, pooled]), "time_ids": sizes}}


WAYS = {"rewardiv": Batched, "plain": Plain}


def main(way: str, task: dict, file: str) -> str:
    """Make the images once to warm up, for one step, then `repeat` times."""
    torch.set_num_threads(task["num_threads"] or os.cpu_count() or 1)
    config = SampleConfig(model=task["model"], lora=task["lora"], seeds=tuple(range(task["num_seeds"])),
                          num_inference_steps=task["num_inference_steps"], guidance_scale=task["guidance_scale"],
                          scheduler=task["scheduler"])
    maker = WAYS[way](config, task["device"], getattr(torch, task["dtype"]))
    meter = Meter(task["device"])
    maker.images(SampleConfig.from_dict(config.to_dict() | {"num_inference_steps": 1}))
    meter.step_done()
    seconds = []
    for _ in range(task["repeat"]):
        started = time.perf_counter()
        images = maker.images(config)
        seconds.append(time.perf_counter() - started)
        meter.step_done()
    write_atomic(file, lambda partial: np.save(partial, images))
    return meter.report(seconds=min(seconds), rows=maker.rows)


if __name__ == "__main__":
    print(main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]))
