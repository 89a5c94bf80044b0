"""Tiny random checkpoints in the layouts in which the rewards' real ones come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from rewardiv.rewards.aesthetic import load_aesthetic
from rewardiv.rewards.clip import ClipScore, load_open_clip
from rewardiv.rewards.hpsv2 import load_hpsv2
from rewardiv.rewards.imagereward import load_imagereward
from rewardiv.rewards.linear_head import linear_head
from rewardiv.rewards.pickscore import load_pickscore
from rewards.tiny_rewards import CLIP_SIZES, TINY_ARCH, WORDS, imagereward_state, new_clip_model, seeded


@pytest.fixture(scope="session")
def pickscore_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """yuvalkirstain/PickScore_v1's layout: config.json and model.safetensors of a transformers CLIPModel."""
    folder = tmp_path_factory.mktemp("pickscore")
    new_clip_model("gelu", 1).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    for part in (settings, settings["text_config"], settings["vision_config"]):
        part["dtype"] = "float16"  # what the weights were made in, not what is computed in
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def aesthetic_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shunk031/aesthetics-predictor-v2's layout: settings of a vision tower, its weights and the head's in one file."""
    folder = tmp_path_factory.mktemp("aesthetic")
    width = CLIP_SIZES["projection_dim"]
    config = CLIPVisionConfig(**CLIP_SIZES["vision_config"], projection_dim=width, hidden_act="quick_gelu")
    vision, head = seeded(lambda: CLIPVisionModelWithProjection(config), 2), seeded(lambda: linear_head(width), 3, gain=1.5)
    settings = config.to_dict() | {
        "model_type": "aesthetics_predictor", "architectures": ["AestheticsPredictorV2Linear"], "dtype": "float16",
        "auto_map": {"AutoModel": "modeling_v2.AestheticsPredictorV2Linear"}, "dropout": 0.0, "_name_or_path": "x/y",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(vision.state_dict() | {f"layers.{name}": tensor for name, tensor in head.state_dict().items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_arch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a tiny ViT in open_clip's table of architectures."""
    file = tmp_path_factory.mktemp("archs") / f"{TINY_ARCH}.json"
    file.write_text(json.dumps({
        "embed_dim": 24,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }))
    open_clip.add_model_config(file)
    return TINY_ARCH


@pytest.fixture(scope="session")
def hpsv2_dir(tiny_arch: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """xswu/HPSv2's layout: both versions' files, the weights under "state_dict"."""
    folder = tmp_path_factory.mktemp("hpsv2")
    for seed, name in enumerate(("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt")):
        net = seeded(lambda: open_clip.CLIP(**open_clip.get_model_config(tiny_arch)), seed)
        torch.save({"epoch": 1, "name": "tiny", "state_dict": net.state_dict()}, folder / name)
    return folder


@pytest.fixture(scope="session")
def open_clip_dir(tiny_arch: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with open_clip_model.safetensors."""
    folder = tmp_path_factory.mktemp("open_clip")
    net = seeded(lambda: open_clip.CLIP(**open_clip.get_model_config(tiny_arch)), 7)
    save_file(net.state_dict(), folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def open_clip_tag(tiny_arch: str) -> Iterator[Callable[..., str]]:
    """open_clip_tag(tag, **settings) -> name `clip:ARCH:TAG` of weights in open_clip's table."""
    tags: dict[str, dict] = {}

    def register(tag: str, **settings: object) -> str:
        tags[tag] = open_clip.get_pretrained_cfg("ViT-H-14", "laion2b_s32b_b79k") | {"hf_hub": "owner/tiny/"} | settings
        return f"clip:{tiny_arch}:{tag}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(open_clip.pretrained._PRETRAINED, tiny_arch, tags)
        yield register


@pytest.fixture(scope="session")
def imagereward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """zai-org/ImageReward's layout, every weight under the reference's name, and google-bert/bert-base-uncased's."""
    folder = tmp_path_factory.mktemp("imagereward")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    settings = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2,
                "vocab_size": len(WORDS) + 2}
    (folder / "med_config.json").write_text(json.dumps({
        "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
        "model_type": "bert", "pad_token_id": 0, "type_vocab_size": 2, "encoder_width": 768,
        "add_cross_attention": True, **settings,
    }))
    torch.save(imagereward_state(128, 32, 2, **settings), folder / "ImageReward.pt")
    return folder


@pytest.fixture(scope="session")
def load(pickscore_dir: Path, hpsv2_dir: Path, imagereward_dir: Path, aesthetic_dir: Path, open_clip_dir: Path,
         open_clip_tag: Callable[..., str], tiny_arch: str) -> Callable[[str], nn.Module]:
    """load(name) -> a new tiny network of this reward, ready to use."""
    loaders = {
        "pickscore": lambda: load_pickscore(pickscore_dir),
        "hpsv2": lambda: load_hpsv2(hpsv2_dir, "hpsv2", tiny_arch),
        "hpsv2.1": lambda: load_hpsv2(hpsv2_dir / "HPS_v2.1_compressed.pt", "hpsv2.1", tiny_arch),
        "imagereward": lambda: load_imagereward(imagereward_dir, imagereward_dir),
        "aesthetic": lambda: load_aesthetic(aesthetic_dir),
        "clip": lambda: ClipScore(load_open_clip(open_clip_dir, open_clip_tag("tag"))),
    }
    return lambda name: loaders[name]().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def loaded(load: Callable[[str], nn.Module]) -> Callable[[str], nn.Module]:
    """loaded(name) -> the same network at every call, for whoever leaves it as it is."""
    return cache(load)
