"""Speed of one batched run against the same images made one method after another with plain diffusers calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor

from rewardiv.config import SampleConfig
from rewardiv.errors import UserError
from rewardiv.gamma import Clock
from rewardiv.generate import Engine, Images, check, decode, open_run
from rewardiv.methods import Method, parse_methods
from rewardiv.registry import LORA_FILE, find_lora, find_model
from rewardiv.sampling import initial_noise, make_scheduler

ADAPTER = "bench"
Array = NDArray[np.float32]  # [S, H, W, 3] in [0, 1]
Made = TypeVar("Made")


@dataclass(frozen=True)
class SampleBench:
    """What `bench sample` measured.

    Attributes:
        model: As given.
        lora: As given.
        methods: Compared, in this order.
        num_seeds: Images a method.
        num_inference_steps: Denoising steps.
        batched_s: One batched run of all methods, with decoding, without scores; the fastest.
        plain_s: The same images with plain calls; the fastest.
        batched_rows: Network rows of the batched run.
        plain_rows: Network rows of the plain calls.
        max_difference: Of any colour value of any image, in 1/255.
    """

    model: str
    lora: str
    methods: tuple[str, ...]
    num_seeds: int
    num_inference_steps: int
    batched_s: float
    plain_s: float
    batched_rows: int
    plain_rows: int
    max_difference: int

    @property
    def ratio(self) -> float:
        """How many times faster the batched run is."""
        return self.plain_s / self.batched_s

    def to_dict(self) -> dict[str, object]:
        """The fields and the ratio, as JSON can hold them."""
        return asdict(self) | {"methods": list(self.methods), "ratio": self.ratio}


def bench_sample(
    model: str, lora: str, *, num_seeds: int = 8, num_inference_steps: int = 20, repeat: int = 1, device: str = "cpu"
) -> SampleBench:
    """Time the four default methods both ways in this process, after one warm-up step each, and compare the images.

    Plain: one StableDiffusionPipeline call for base, one for the LoRA at scale 1, one at 0.5, each with all seeds in
    its batch; for AIG a loop of two UNet calls a step, adapters off and on. Loading isn't counted, on either side.

    Raises:
        UserError: If a number is out of range, a name is unknown, or files are missing or damaged.
    """
    if num_seeds < 1 or repeat < 1:
        raise UserError(f"num_seeds is {num_seeds} and repeat is {repeat}; both must be at least 1")
    seeds = tuple(range(num_seeds))
    config = SampleConfig(model=model, lora=lora, seeds=seeds, num_inference_steps=num_inference_steps)
    check(config)
    engine = Engine(device=device)
    methods = parse_methods(config.methods)
    plain = Plain(engine, config)
    warm_up = replace(config, num_inference_steps=1)
    _batched(engine, warm_up, methods)
    plain.images(warm_up, methods)
    batched_s, plain_s = [], []
    for _ in range(repeat):
        (batched, rows), seconds = _timed(lambda: _batched(engine, config, methods))
        batched_s.append(seconds)
        one_by_one, seconds = _timed(lambda: plain.images(config, methods))
        plain_s.append(seconds)
    differences = [np.abs(ours.astype(int) - theirs).max() for ours, theirs in zip(batched, one_by_one, strict=True)]
    passes = sum(2 if method.kind == "aig" else 1 for method in methods)
    return SampleBench(
        model=model, lora=lora, methods=config.methods, num_seeds=num_seeds, num_inference_steps=num_inference_steps,
        batched_s=min(batched_s), plain_s=min(plain_s), batched_rows=rows,
        plain_rows=2 * passes * num_seeds * num_inference_steps, max_difference=int(max(differences)),
    )


def table(bench: SampleBench) -> str:
    """The figures as text."""
    size = f"{len(bench.methods)} methods × {bench.num_seeds} seeds × {bench.num_inference_steps} steps"
    return "\n".join([
        f"{size}, {bench.model} with {bench.lora}: {', '.join(bench.methods)}",
        f"{'':24} {'seconds':>9} {'rows':>7}",
        f"{'one batched run':24} {bench.batched_s:9.2f} {bench.batched_rows:7}",
        f"{'plain diffusers calls':24} {bench.plain_s:9.2f} {bench.plain_rows:7}",
        f"{bench.ratio:.2f} times faster; images differ by at most {bench.max_difference}/255",
    ])


class Plain:
    """The same images the plain way: a StableDiffusionPipeline with its LoRA, one method after another."""

    def __init__(self, engine: Engine, config: SampleConfig) -> None:
        model, file = engine.model(config.model), Path(find_lora(config.lora).path)
        file = file / LORA_FILE if file.is_dir() else file
        self.latent_shape = model.latent_shape
        self.pipe = StableDiffusionPipeline.from_pretrained(
            find_model(config.model).path, dtype=engine.dtype, use_safetensors=True
        ).to(engine.device)
        self.pipe.scheduler = make_scheduler(model.scheduler_config, config.scheduler, 1, engine.device)
        self.pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER)
        self.pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def images(self, config: SampleConfig, methods: Sequence[Method]) -> list[Images]:
        """8-bit images [S, H, W, 3] of each method: base, finetuned, lora or aig."""
        noise = initial_noise(config.seeds, self.latent_shape, device=self.pipe.device, dtype=self.pipe.dtype)
        made = [
            self._aig(config, noise, method) if method.kind == "aig" else self._constant(config, noise, method)
            for method in methods
        ]
        return [(one * 255).round().astype(np.uint8) for one in made]

    def _constant(self, config: SampleConfig, noise: Tensor, method: Method) -> Array:
        if method.kind == "base":
            self.pipe.disable_lora()
        else:
            self.pipe.enable_lora()
            self.pipe.set_adapters([ADAPTER], [1.0 if method.kind == "finetuned" else method.value])
        return self.pipe(
            [config.prompt] * len(noise), latents=noise, num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale, output_type="np",
        ).images

    def _aig(self, config: SampleConfig, noise: Tensor, method: Method) -> Array:
        pipe, scheduler = self.pipe, self.pipe.scheduler
        embeds, negative_embeds = pipe.encode_prompt([config.prompt] * len(noise), pipe.device, 1, True)
        both = torch.cat([negative_embeds, embeds])
        pipe.set_adapters([ADAPTER], [1.0])
        scheduler.set_timesteps(config.num_inference_steps, device=pipe.device)
        clock = Clock.of_steps(config.num_inference_steps)
        latents = noise * scheduler.init_noise_sigma

        def guided(inputs: Tensor, t: Tensor) -> Tensor:
            negative, positive = pipe.unet(inputs, t, encoder_hidden_states=both).sample.chunk(2)
            return negative + config.guidance_scale * (positive - negative)

        for i, t in enumerate(scheduler.timesteps):
            inputs = scheduler.scale_model_input(torch.cat([latents, latents]), t)
            pipe.disable_lora()
            base = guided(inputs, t)
            pipe.enable_lora()
            weight = method.gamma.at(clock, i)
            latents = scheduler.step(weight * base + (1 - weight) * guided(inputs, t), t, latents).prev_sample
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        return pipe.image_processor.postprocess(decoded, output_type="np")


def _batched(engine: Engine, config: SampleConfig, methods: Sequence[Method]) -> tuple[list[Images], int]:
    """8-bit images of each method from one run of the engine, and its network rows."""
    run = open_run(engine, config, methods)
    *_, last = run.steps
    return [one.permute(0, 2, 3, 1).cpu().numpy() for one in decode(run.model, last.latents)], last.rows


def _timed(work: Callable[[], Made]) -> tuple[Made, float]:
    """What `work` makes and the seconds it takes; both ways end with the images on the host, so nothing is pending."""
    start = time.perf_counter()
    made = work()
    return made, time.perf_counter() - start
