"""Single-file checkpoints: tiny models written in the layout of the original files load to the same numbers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewardiv.config import SampleConfig
from rewardiv.errors import UserError
from rewardiv.generate import Engine, generate, memory_plan
from rewardiv.models import load_model

State = dict[str, Tensor]
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}


def original_unet_key(key: str, depth: int, attention_up: list[bool]) -> str:
    """A diffusers UNet's key as the latent diffusion code names it."""
    for ours, theirs in UNET.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    if match := re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.*)", key):
        part, number, rest = match.groups()
        return f"middle_block.1.{rest}" if part == "attentions" else f"middle_block.{2 * int(number)}.{resnet_key(rest)}"
    way, level, part, number, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key).groups()
    level, number, each = int(level), int(number), depth + 1
    if part == "downsamplers":
        return f"input_blocks.{(level + 1) * each}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{level * each + depth}.{1 + attention_up[level]}.{rest}"
    block = f"input_blocks.{1 + level * each + number}" if way == "down" else f"output_blocks.{level * each + number}"
    return f"{block}.1.{rest}" if part == "attentions" else f"{block}.0.{resnet_key(rest)}"


def resnet_key(rest: str) -> str:
    layer, _, name = rest.partition(".")
    return f"{RESNET[layer]}.{name}"


def original_vae_key(key: str, num_levels: int) -> str:
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(.*)", key):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    match = re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets|\w+samplers)\.(\d+)\.(.*)", key)
    if not match:
        return key
    side, way, level, part, number, rest = match.groups()
    place = f"{side}.{way}.{level if way == 'down' else num_levels - 1 - int(level)}"
    return f"{place}.block.{number}.{rest}" if part == "resnets" else f"{place}.{way}sample.{rest}"


def open_clip_state(state: State) -> State:
    """A transformers text encoder's weights as open_clip names and stacks them."""
    state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    original = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
    }
    for key, tensor in state.items():
        if key.startswith("final_layer_norm."):
            original[key.replace("final_layer_norm", "ln_final")] = tensor
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", key):
            layer, name, kind = match.groups()
            block = f"transformer.resblocks.{layer}"
            if name in OPEN_CLIP:
                original[f"{block}.{OPEN_CLIP[name]}.{kind}"] = tensor
            elif name == "self_attn.q_proj":
                parts = [state[f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                original[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
    return original


def write_original(folder: Path, file: Path) -> Path:
    """A tiny diffusers pipeline as one file in the original layout, its configs in the folder beside it."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    attention_up = ["CrossAttn" in kind for kind in config["up_block_types"]]
    unet, vae = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae"))
    text = {key.removeprefix("text_model."): tensor
            for key, tensor in load_file(folder / "text_encoder" / "model.safetensors").items()}
    is_xl = (folder / "text_encoder_2").is_dir()
    clip = "conditioner.embedders.0" if is_xl else "cond_stage_model"
    state = {f"model.diffusion_model.{original_unet_key(key, 1, attention_up)}": tensor for key, tensor in unet.items()}
    state |= {f"first_stage_model.{original_vae_key(key, 2)}": tensor for key, tensor in vae.items()}
    state |= {f"{clip}.transformer.text_model.{key}": tensor for key, tensor in text.items()}
    if is_xl:
        second = open_clip_state(load_file(folder / "text_encoder_2" / "model.safetensors"))
        state |= {f"conditioner.embedders.1.model.{key}": tensor for key, tensor in second.items()}
    save_file(state, file)
    shutil.copytree(folder, file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    return file


@pytest.fixture(params=["tiny_eps_model_dir", "tiny_xl_dir"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_a_checkpoint_is_the_pipeline_it_was_written_from(folder: Path, tmp_path: Path) -> None:
    ours, plain = load_model(str(write_original(folder, tmp_path / "model.safetensors"))), load_model(str(folder))
    pairs = [(ours.unet, plain.unet), (ours.vae, plain.vae)]
    pairs += [(a.encoder, b.encoder) for a, b in zip(ours.towers, plain.towers, strict=True)]
    for network, expected in pairs:
        state = expected.state_dict()
        assert network.state_dict().keys() == state.keys() and not network.training
        assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())
    assert (ours.family, ours.latent_shape, ours.zero_empty) == (plain.family, plain.latent_shape, plain.zero_empty)
    same = ("_class_name", "prediction_type", "timestep_spacing", "steps_offset", "beta_end")
    assert all(ours.scheduler_config.get(name) == plain.scheduler_config.get(name) for name in same)
    for prompt in ("a cat", ""):
        assert torch.equal(ours.encode_prompts([prompt]).embeds, plain.encode_prompts([prompt]).embeds)


def test_it_is_sampled_like_any_model(folder: Path, tmp_path: Path, tiny_clip_dir: Path) -> None:
    engine = Engine(features_path=str(tiny_clip_dir))
    config = SampleConfig(model=str(write_original(folder, tmp_path / "model.safetensors")), lora="", methods=("base",),
                          seeds=(0,), num_inference_steps=1, rewards=("colorfulness",))
    assert memory_plan(engine, config) is None
    *_, result = generate(engine, config)
    assert result.images["base"].shape == (1, 16, 16, 3) and result.images["base"].std() > 10


def test_half_precision_is_converted_on_the_way(tiny_xl_dir: Path, tmp_path: Path) -> None:
    model = load_model(str(write_original(tiny_xl_dir, tmp_path / "model.safetensors")), dtype=torch.float16)
    assert model.dtype == torch.float16 and model.vae.dtype == torch.float32


def test_what_cannot_be_read_is_said_in_one_sentence(tiny_eps_model_dir: Path, tmp_path: Path) -> None:
    file = write_original(tiny_eps_model_dir, tmp_path / "model.safetensors")
    state = load_file(file)
    cases = {
        "damaged": (b"no safetensors", "is damaged"),
        "lora": ({"unet.down.lora_A.weight": torch.zeros(2, 2)}, r"no Stable Diffusion 1, 2 or XL checkpoint .* into --lora"),
        "unet alone": ({key: t for key, t in state.items() if key.startswith("model.")}, "with its text encoders"),
        "no end": ({key: t for key, t in state.items() if "out.2" not in key}, "is damaged: it lacks weights"),
        "no words": ({key: t for key, t in state.items() if "token_embedding" not in key}, "is damaged: it lacks weights"),
        "no decoder": ({key: t for key, t in state.items() if "decoder.mid" not in key}, "is damaged: it lacks weights"),
    }
    for name, (content, said) in cases.items():
        broken = tmp_path / f"{name}.safetensors"
        broken.write_bytes(content) if isinstance(content, bytes) else save_file(content, broken)
        shutil.copytree(file.with_suffix(""), broken.with_suffix(""))
        with pytest.raises(UserError, match=said) as caught:
            load_model(str(broken))
        assert "\n" not in str(caught.value)


def test_without_configs_and_network_the_remedy_is_said(
    tiny_eps_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    file = write_original(tiny_eps_model_dir, tmp_path / "model.safetensors")
    shutil.rmtree(file.with_suffix(""))
    with pytest.raises(UserError, match="put the configs of its pipeline into a folder .*model, or try again with a network"):
        load_model(str(file))
