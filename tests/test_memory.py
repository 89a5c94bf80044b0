"""The memory plan against what torch's allocator really gives out, and what follows from it: rows, tiles, refusals."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from rewardiv import memory
from rewardiv.config import SampleConfig
from rewardiv.errors import UserError
from rewardiv.generate import Engine, generate, memory_plan
from rewardiv.models import load_model

TINY = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SD = {  # Stable Diffusion 1's layout at a fifth of its width
    "block_out_channels": (64, 128, 256, 256), "layers_per_block": 2, "cross_attention_dim": 64, "norm_num_groups": 16,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
XL = {  # XL's: no attention at full size, deep transformers below
    "block_out_channels": (64, 128, 256), "layers_per_block": 2, "cross_attention_dim": 64, "norm_num_groups": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 4),
}
LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def measured(work: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator had given out at once while `work` ran."""
    gc.collect()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(("settings", "rows", "height", "width", "lora"), [
    (TINY, 3, 16, 16, False), (TINY, 2, 16, 16, True), (SD, 2, 32, 24, False), (SD, 1, 27, 35, True), (XL, 2, 32, 40, True),
])
def test_the_unet_s_peak_is_as_counted(settings: dict, rows: int, height: int, width: int, lora: bool) -> None:
    with torch.random.fork_rng():
        unet = UNet2DConditionModel(sample_size=32, attention_head_dim=8, **settings).eval()
        if lora:
            unet.add_adapter(LoraConfig(r=4, target_modules=[*LINEAR, "conv1", "conv2"]))
        unet.to(memory_format=torch.channels_last)
        latents, embeds = torch.randn(rows, 4, height, width), torch.randn(rows, 16, settings["cross_attention_dim"])
    peak = measured(lambda: unet(latents, 500, embeds).sample)
    counted = rows * memory.unet_row_bytes(unet.config, height, width, torch.float32, lora=lora)
    assert counted == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(("widths", "depth", "rows"), [((16, 32), 1, 3), ((32, 64, 64), 2, 1)])
def test_the_decoder_s_peak_is_as_counted(widths: tuple[int, ...], depth: int, rows: int) -> None:
    with torch.random.fork_rng():
        vae = AutoencoderKL(
            block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * len(widths), norm_num_groups=8,
            up_block_types=("UpDecoderBlock2D",) * len(widths), layers_per_block=depth, latent_channels=4,
        ).eval().to(memory_format=torch.channels_last)
        latents = torch.randn(rows, 4, 32, 24)
    peak = measured(lambda: vae.decode(latents).sample)
    assert rows * memory.decode_row_bytes(vae.config, 32, 24, torch.float32) == pytest.approx(peak, rel=0.1)


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path, tiny_lora_dir: Path) -> SampleConfig:
    return SampleConfig(model=str(tiny_model_dir), lora=str(tiny_lora_dir), rewards=("colorfulness",), seeds=(0, 1, 2))


def plan_of(
    config: SampleConfig, free: float, *, offload: bool = False, dtype: torch.dtype = torch.float32,
) -> memory.MemoryPlan:
    return memory.plan(config, Path(config.model), [], device="cuda", dtype=dtype, offload=offload, free=int(free))


@pytest.mark.parametrize("model", ["tiny_model_dir", "tiny_xl_dir"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_those_of_the_loaded_model(
    request: pytest.FixtureRequest, config: SampleConfig, model: str, dtype: torch.dtype,
) -> None:
    folder = str(request.getfixturevalue(model))
    loaded = load_model(folder, dtype=dtype)
    texts = [tower.encoder for tower in loaded.towers]
    expected = {
        name: sum(weight.numel() * weight.element_size() for part in parts for weight in part.parameters())
        for name, parts in {"UNet": [loaded.unet], "text encoders": texts, "autoencoder": [loaded.vae]}.items()
    }
    weights = plan_of(replace(config, model=folder), 1e9, dtype=dtype).weights
    assert {name: weights[name] for name in expected} == pytest.approx(expected, rel=0.01)


def test_fewer_rows_are_taken_where_memory_is_short_and_none_are_refused(config: SampleConfig) -> None:
    roomy = plan_of(config, 1e12)
    assert roomy.fits and not roomy.tiles and roomy.max_rows == 2 * 3 * 2 * len(config.methods)
    row = roomy.steps // roomy.max_rows
    short = plan_of(config, (roomy.resident + 7.5 * row) / memory.USABLE)
    assert short.max_rows == 7 and short.peak < roomy.peak
    none = plan_of(config, (roomy.resident + 1.5 * row) / memory.USABLE)
    assert none.max_rows == 0 and not none.fits
    with pytest.raises(UserError, match="are free on cuda; try --offload or --dtype float16 or smaller") as caught:
        memory.check_fits(none, device="cuda", dtype=torch.float32, offload=False)
    assert "\n" not in str(caught.value)
    memory.check_fits(roomy, device="cuda", dtype=torch.float32, offload=False)


def test_offloading_leaves_the_unet_alone_on_the_device(config: SampleConfig) -> None:
    kept, offloaded = plan_of(config, 1e12), plan_of(config, 1e12, offload=True)
    assert kept.resident - offloaded.resident == kept.weights["text encoders"] + kept.weights["autoencoder"]
    assert offloaded.peak < kept.peak


def test_size_and_guidance_count(config: SampleConfig) -> None:
    small, large = (plan_of(replace(config, height=side, width=side), 1e12) for side in (64, 128))
    assert large.steps == pytest.approx(4 * small.steps, rel=0.01) and large.decode > 3.9 * small.decode
    assert plan_of(replace(config, guidance_scale=1.0), 1e12).max_rows * 2 == plan_of(config, 1e12).max_rows
    base_only = replace(config, methods=("base",))
    assert plan_of(base_only, 1e12).steps / plan_of(base_only, 1e12).max_rows < small.steps / small.max_rows


def test_loras_rewards_and_features_count(config: SampleConfig, tiny_clip_dir: Path) -> None:
    engine = Engine(features_path=str(tiny_clip_dir))
    clip, lora = (sum(tensor.numel() for tensor in load_file(file).values()) for file in (
        tiny_clip_dir / "open_clip_model.safetensors", Path(config.lora) / "pytorch_lora_weights.safetensors"))
    rewards = replace(config, rewards=(str(tiny_clip_dir), "colorfulness"))
    few, base = replace(rewards, seeds=(0,)), replace(config, lora="", methods=("base",))
    for settings, numbers in ((config, lora + clip), (rewards, lora + 2 * clip), (few, lora + clip), (base, clip)):
        assert memory_plan(engine, settings).weights["LoRA, rewards, features"] == 4 * numbers


def test_the_table_names_every_part(config: SampleConfig) -> None:
    table = memory_plan(Engine(), config).table()
    for name in ("UNet", "text encoders", "autoencoder", "LoRA, rewards, features", "rows at once", "decoding", "peak", "free"):
        assert name in table


def test_a_run_that_does_not_fit_is_refused_before_anything_is_loaded(
    config: SampleConfig, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr("rewardiv.generate.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="1.0 MiB are free on cpu; try smaller --height and --width or fewer seeds"):
        next(generate(Engine(), config))


def test_rows_follow_what_is_free_once_the_model_is_there(
    config: SampleConfig, monkeypatch: pytest.MonkeyPatch, tiny_clip_dir: Path,
) -> None:
    engine = Engine(features_path=str(tiny_clip_dir))
    model = engine.model(config.model)
    config = replace(config, num_inference_steps=1)
    *_, expected = generate(engine, config)
    row = memory.unet_row_bytes(model.unet.config, 8, 8, torch.float32, lora=True)
    seen: list[int] = []
    hook = model.unet.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(4.5 * row / memory.USABLE))
    *_, result = generate(engine, config)
    assert max(seen) == 4 and result.scores.keys() == expected.scores.keys()
    monkeypatch.setattr(memory, "free_bytes", lambda device: row)
    with pytest.raises(UserError, match="one image needs about .* on cpu beside the weights"):
        next(generate(engine, config))
    hook.remove()
