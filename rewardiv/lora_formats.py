"""LoRA files of every common layout, diffusers', PEFT's and kohya's, as plain layers: down, up and alpha by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rewardiv.errors import UserError
from rewardiv.registry import LORA_FILE

PARTS = ("unet", "text_encoder", "text_encoder_2")
METADATA_KEY = "lora_adapter_metadata"  # diffusers' name for the JSON in a LoRA file's header
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYERS_PER_BLOCK = 2  # of every Stable Diffusion UNet
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner", 2048: "SDXL"}

KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
ORIGINAL_BLOCKS = ("input_blocks", "middle_block", "output_blocks")  # names in the UNet that SDXL was published with
CONVERTER_KNOWS = {f"lora_unet_add_embedding_linear_{k + 1}": f"lora_unet_label_emb_0_{2 * k}" for k in range(2)}
UNET_ROOTS = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out", "time_embedding", "add_embedding")
TEXT_ROOTS = ("text_model.encoder.", "text_projection")
PEFT_PREFIX = "base_model.model."
WEIGHT_KEY = re.compile(  # diffusers' old attention processors, its old layers, PEFT's, and a layer's alpha
    r"(?P<layer>.+?)(?:(?:\.to_(?P<old>q|k|v|out)_lora|\.lora|\.lora_linear_layer)\.(?=down|up)|(?:\.lora)?\.(?=alpha)|"
    r"\.(?=lora_))(?P<side>(?:down|up|lora_down|lora_up|lora_[AB](?:\.default)?)\.weight|alpha)"
)
SIDES = {f"{spelling}.weight": side for side, spellings in (
    ("down", ("down", "lora_down", "lora_A")), ("up", ("up", "lora_up", "lora_B"))) for spelling in spellings
} | {"alpha": "alpha"}
OLD_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
OLD_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
REFUSED = {  # what a key belongs to that isn't down and up of a layer
    r"(^|\.)hada_": "LoHa",
    r"(^|\.)lokr_": "LoKr",
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"\.lora_mid\.": "LoCon with Tucker decomposition (lora_mid)",
    r"\.diff(_b|_m)?$": "full weight differences",
    r"(^|\.)oft_|\.oft_": "OFT",
    r"\.on_input$": "IA³",
    r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$": "GLoRA",
    r"vera_lambda": "VeRA",
    r"\.(w_norm|b_norm)$": "weights of normalisation layers",
    r"(lora_embedding_[AB]|^bundle_emb|^emb_params$|^string_to_param)": "token embeddings (textual inversion)",
    r"modules_to_save": "whole layers beside the LoRA (modules_to_save)",
    r"lora_controlnet|^control_model": "a control LoRA",
    r"(^|[._])(double|single|joint)_blocks|^(transformer\.|lora_transformer_|lora_te3_|text_encoder_3\.)":
        "a LoRA for FLUX, Stable Diffusion 3 or another transformer",
    r"bias$": "bias terms",
}


class FileLayer(NamedTuple):
    """One layer of a LoRA file: up · down · alpha / rank is what it adds to the layer's weight.

    Attributes:
        name: The layer's name in its network; in text encoders it begins with "text_model." or is "text_projection".
        down: [rank, fan in, ...kernel].
        up: [fan out, rank, 1, ...].
        alpha: Its factor is alpha / rank, whatever the file says of it (PEFT's rank-stabilised alpha / √rank included).
        part: The network, one of PARTS.
    """

    name: str
    down: Tensor
    up: Tensor
    alpha: float
    part: str = "unet"


class LoraFile(NamedTuple):
    """What a LoRA file holds."""

    file: Path
    layers: tuple[FileLayer, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Networks that it changes, in the order of PARTS."""
        return tuple(part for part in PARTS if any(layer.part == part for layer in self.layers))

    @property
    def text_width(self) -> int | None:
        """Width of the text embeddings that the UNet was trained with; None where no layer tells."""
        widths = {layer.down.shape[1] for layer in self.layers if layer.name.endswith(("attn2.to_k", "attn2.to_v"))}
        return widths.pop() if len(widths) == 1 else None


def family_of(text_width: int | None) -> str:
    """The model family of a cross-attention width, in words, with the width."""
    return f"{FAMILIES.get(text_width, 'a model of its own')} (cross-attention width {text_width})"


def lora_file(path: str | Path) -> Path:
    """The file itself, or the one that a folder holds: diffusers', PEFT's or a single .safetensors file.

    Raises:
        UserError: If there is none, or a folder holds several under other names.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"no LoRA file {path}")
        return path
    for name in (LORA_FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = f"several LoRA files; name one of {', '.join(file.name for file in files)}" if files else f"no {LORA_FILE}"
        raise UserError(f"the folder {path} holds {found}")
    return files[0]


def read_lora(path: str | Path, *, layers_per_block: int = LAYERS_PER_BLOCK) -> LoraFile:
    """Read a LoRA from a .safetensors file or the folder that holds it.

    Layouts: diffusers' ("unet.<layer>.lora_A.weight" with its header, and the older ".lora.down.weight" and
    ".processor.to_q_lora.down.weight", with or without "unet."), PEFT's ("base_model.model." with adapter_config.json beside
    it) and kohya's sd-scripts ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"; blocks by diffusers' names or by those that
    SDXL was published with, which diffusers' own converter translates). A layer without an alpha counts once (alpha = rank).

    Args:
        path: The file or folder.
        layers_per_block: Of the UNet, for SDXL's published block names.

    Raises:
        UserError: If the file is missing, damaged, or holds something else than LoRA pairs, which is named.
    """
    file = lora_file(path)
    state, header = _load(file)
    settings = _settings(file, header)
    _refuse_others(file, state, settings)
    kohya = _kohya_places(file, state, layers_per_block)
    sides: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, _, rest = key.partition(".")
        place = (*kohya[module], SIDES[rest]) if module in kohya else _place(key)
        if place is None:
            raise UserError(f"the LoRA {file} is in no layout that is known (diffusers', PEFT's or kohya's): it holds '{key}'")
        part, name, side = place
        known = sides.setdefault((name, part), {}).setdefault(side, tensor)
        if not torch.equal(known, tensor):
            raise UserError(f"the LoRA {file} is damaged: it holds two different weights of {name}, one under '{key}'")
    return LoraFile(file, tuple(_layer(file, name, part, own, settings[part]) for (name, part), own in sides.items()))


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header; all numbers are finite, and 8-bit ones are widened, which torch cannot compute with."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}
            state = {key: tensor if tensor.element_size() > 1 else tensor.float() for key, tensor in state.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"the LoRA {file} is damaged: {first_line(error)}") from error
    if not state:
        raise UserError(f"the LoRA {file} is empty: it holds no weights")
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"the LoRA {file} is damaged: {key} holds numbers that aren't finite")
    return state, header


def _settings(file: Path, header: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """PEFT's settings of each part, from diffusers' header or from adapter_config.json beside the file."""
    beside = file.with_name(PEFT_CONFIG)
    try:
        if METADATA_KEY in header:
            flat = json.loads(header[METADATA_KEY])
            return {part: {key.removeprefix(f"{part}."): value for key, value in flat.items() if key.startswith(f"{part}.")}
                    for part in PARTS}
        if file.name == PEFT_FILE and beside.is_file():
            return dict.fromkeys(PARTS, dict(json.loads(beside.read_text())))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the settings of the LoRA {file} are damaged: {first_line(error)}") from error
    return {part: {} for part in PARTS}


def _refuse_others(file: Path, state: Iterable[str], settings: Mapping[str, Mapping[str, object]]) -> None:
    """Refuse by name what isn't a plain LoRA, and PEFT's files without the settings that say their scale."""
    kinds = [(kind, key) for key in state for pattern, kind in REFUSED.items() if re.search(pattern, key)]
    for part in settings.values():
        if part.get("peft_type", "LORA") != "LORA":
            kinds.append((str(part["peft_type"]), PEFT_CONFIG))
        if part.get("use_dora"):
            kinds.append(("DoRA", "use_dora"))
    if kinds:
        kind, key = kinds[0]
        raise UserError(f"the LoRA {file} holds {kind} ('{key}'); only plain LoRAs of Stable Diffusion's linear and "
                        "convolution layers can be used")
    if any(key.startswith(PEFT_PREFIX) for key in state) and not any(settings.values()):
        raise UserError(f"the LoRA {file} is in PEFT's layout, and its {PEFT_CONFIG} with the alpha is missing; put it beside "
                        f"it, under the name {PEFT_FILE}")


def _kohya_places(file: Path, state: Iterable[str], layers_per_block: int) -> dict[str, tuple[str, str]]:
    """Part and layer of kohya's module names, by diffusers' own converter, which is given names instead of tensors.

    Modules under SDXL's published block names are converted apart, because diffusers drops them beside others.
    """
    keys = [key for key in state if key.startswith(KOHYA_PREFIXES)]
    if strange := [key for key in keys if key.partition(".")[2] not in SIDES]:
        raise UserError(f"the LoRA {file} is damaged or no plain LoRA: it holds '{strange[0]}'")
    modules = dict.fromkeys(key.partition(".")[0] for key in keys)
    original = [name for name in modules if any(block in name for block in ORIGINAL_BLOCKS)]
    places = {}
    for group in (original, [name for name in modules if name not in original]):
        tokens = {f"{CONVERTER_KNOWS.get(name, name)}.lora_{side}.weight": name for name in group for side in ("down", "up")}
        try:
            converted, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
                tokens, unet_config=SimpleNamespace(layers_per_block=layers_per_block))
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(f"the LoRA {file} names blocks that no Stable Diffusion model has: {first_line(error)}") from error
        for key, name in converted.items():
            if (place := _place(key)) is None:
                raise UserError(f"the LoRA {file} names a layer that no Stable Diffusion model has: '{name}'")
            places[name] = place[:2]
    return places


def _place(key: str) -> tuple[str, str, str] | None:
    """Part, layer and side ("down", "up" or "alpha") of a key in diffusers' or PEFT's layout; None for any other."""
    match = WEIGHT_KEY.fullmatch(key.removeprefix(PEFT_PREFIX).replace(".processor.", "."))
    if not match:
        return None
    layer, old, side = match["layer"], match["old"], SIDES[match["side"].replace(".default", "")]
    part, dot, rest = layer.partition(".")
    if part in PARTS and dot:
        layer = rest
    else:
        part = "unet" if part in UNET_ROOTS else {"text_projection": "text_encoder_2"}.get(part, "text_encoder")
    if part != "unet" and not layer.startswith(("text_model.", "text_projection")):
        layer = f"text_model.{layer}"  # as transformers named it before its version 5
    if old:
        layer += "." + (OLD_UNET if part == "unet" else OLD_TEXT)[old]
    known = layer.split(".")[0] in UNET_ROOTS if part == "unet" else layer.startswith(TEXT_ROOTS)
    return (part, layer, side) if known else None


def _layer(
    file: Path, name: str, part: str, tensors: Mapping[str, Tensor], settings: Mapping[str, object],
) -> FileLayer:
    """The pair with its alpha, from the file's own key or from PEFT's settings."""
    if "down" not in tensors or "up" not in tensors:
        raise UserError(f"the LoRA {file} is damaged: {name} lacks its A or B (down or up)")
    down, up = tensors["down"], tensors["up"]
    rank = len(down) if down.ndim else 0
    if not rank or down.ndim < 2 or up.ndim < 2 or up.shape[1] != rank:
        raise UserError(f"the LoRA {file} is damaged: {name} has A {list(down.shape)} and B {list(up.shape)}, which do not "
                        "multiply")
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise UserError(f"the LoRA {file} is damaged: the alpha of {name} isn't one number")
        return FileLayer(name, down, up, float(tensors["alpha"]), part)
    try:
        said = float(_of_layer(settings, "rank_pattern", "r", name, rank))
        alpha = float(_of_layer(settings, "alpha_pattern", "lora_alpha", name, rank))
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"the settings of the LoRA {file} are damaged: {first_line(error)}") from error
    if said != rank or not math.isfinite(alpha):
        raise UserError(f"the LoRA {file} is damaged: {name} has rank {rank}; its settings say {said:g}, with alpha {alpha:g}")
    return FileLayer(name, down, up, alpha * rank**0.5 if settings.get("use_rslora") else alpha, part)


def _of_layer(settings: Mapping[str, object], pattern: str, otherwise: str, name: str, default: float) -> float:
    """A layer's rank or alpha by PEFT's rule: the first pattern that the name ends in, else the common one."""
    patterns = settings.get(pattern) or {}
    keys = [get_pattern_key(patterns, spelling) for spelling in (name, name.removeprefix("text_model."))]
    return next((patterns[key] for key in keys if key in patterns), settings.get(otherwise, default))


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
