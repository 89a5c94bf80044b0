"""LoRA adapters on a diffusers UNet: attach, load, save, remove, and the scale of every row of a batch.

At rest no adapter is active: the UNet is the base model. `lora_scale` is the only place that changes that, and it puts
everything back. The adapters are PEFT layers injected by diffusers' own loader; files are in diffusers' LoRA layout.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rewardiv.errors import UserError
from rewardiv.registry import LORA_FILE
from rewardiv.runs import write_bytes

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

KEY = re.compile(r"unet\.(.+)\.lora_([AB])\.weight")
METADATA_KEY = "lora_adapter_metadata"  # diffusers' name for the JSON in a LoRA file's header
CONFIG_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")


class LoraFile(NamedTuple):
    """What a LoRA file holds: tensors by key ("unet.<layer>.lora_A.weight") and PEFT's settings ("unet.r")."""

    state: dict[str, Tensor]
    settings: dict[str, object]


class FileLayer(NamedTuple):
    """One layer of a LoRA file: up · down · alpha / rank is what it adds to the layer's weight."""

    name: str
    down: Tensor
    up: Tensor
    alpha: float


def attach_adapter(
    unet: UNet2DConditionModel, name: str, *, rank: int, alpha: float, targets: tuple[str, ...], dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Add a new trainable adapter that changes nothing yet (B = 0); A is drawn from `seed` alone.

    Args:
        unet: The network.
        name: The adapter's name, letters, digits and underscores.
        rank: Inner size of the low-rank product.
        alpha: At lora_scale 1 the product counts alpha / rank.
        targets: Ends of the names of linear and convolution layers, such as "to_q" or "ff.net.2".
        dropout: Share of the adapter's inputs dropped inside `dropping`.
        seed: Seed of A's initial weights.

    Raises:
        UserError: If a target matches no layer.
    """
    layers = {layer: _base(module) for layer, module in unet.named_modules()}
    for target in targets:
        found = [layer for layer in layers if layer == target or layer.endswith(f".{target}")]
        if not any(isinstance(layers[layer], nn.Linear | nn.Conv2d) for layer in found):
            raise UserError(f"the LoRA target '{target}' matches no linear or convolution layer of this model")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(targets), lora_dropout=dropout)
    with _others_untouched(unet):
        unet.add_adapter(config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for layer in _layers(unet):
        if name in layer.lora_A:
            weight = layer.lora_A[name].weight
            start = torch.empty(weight.shape)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)  # PEFT's own choice, but seeded
            weight.data.copy_(start)
            weight.requires_grad_(True)
            layer.lora_B[name].weight.requires_grad_(True)
            layer.lora_dropout[name].eval()  # only `dropping` drops


def load_adapter(unet: UNet2DConditionModel, name: str, path: str | Path, *, model_name: str = "this model") -> None:
    """Load a LoRA file (or the folder that holds pytorch_lora_weights.safetensors) as a frozen adapter.

    Args:
        unet: The network.
        name: The adapter's name in this network.
        path: The file or folder.
        model_name: What to call the base model in an error.

    Raises:
        UserError: If the file is missing, damaged, in another layout, or made for another model (both are named).
    """
    path = Path(path)
    file = path / LORA_FILE if path.is_dir() else path
    state, settings = _read(file)
    _check_fit(unet, state, file, model_name)
    state = {key: tensor.to(unet.dtype) for key, tensor in state.items()}
    try:
        with _others_untouched(unet):
            unet.load_lora_adapter(state, prefix="unet", adapter_name=name, metadata=settings or None)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"the LoRA {file} is damaged: {_first_line(error)}") from error
    for parameter in adapter_parameters(unet, name):
        parameter.requires_grad_(False)


def save_adapter(unet: UNet2DConditionModel, name: str, folder: str | Path) -> Path:
    """Write the adapter as `folder`/pytorch_lora_weights.safetensors, for `pipe.load_lora_weights(folder)`.

    Raises:
        UserError: If it cannot be written.
    """
    weights = get_peft_model_state_dict(unet, adapter_name=name)
    state = {f"unet.{key}": tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
    config = unet.peft_config[name].to_dict()
    settings = {f"unet.{key}": config[key] for key in CONFIG_KEYS}
    settings["unet.target_modules"] = sorted(config["target_modules"])
    metadata = {"format": "pt", METADATA_KEY: json.dumps(settings, sort_keys=True)}
    return write_bytes(Path(folder) / LORA_FILE, save(state, metadata))  # not save_file, which hides a full disk


def read_layers(path: str | Path) -> list[FileLayer]:
    """The layers of a LoRA file (or of the folder that holds pytorch_lora_weights.safetensors), in the file's order.

    Raises:
        UserError: If the file is missing, damaged or in another layout.
    """
    path = Path(path)
    file = path / LORA_FILE if path.is_dir() else path
    state, settings = _read(file)
    alphas = settings.get("unet.alpha_pattern") or {}
    layers = []
    for name in dict.fromkeys(KEY.fullmatch(key)[1] for key in state):
        down, up = (state.get(f"unet.{name}.lora_{side}.weight") for side in "AB")
        if down is None or up is None:
            raise UserError(f"the LoRA {file} is damaged: {name} lacks its A or B")
        rank = len(down)
        alpha = alphas.get(get_pattern_key(alphas, name), settings.get("unet.lora_alpha", rank))
        layers.append(FileLayer(name, down, up, alpha * rank**0.5 if settings.get("unet.use_rslora") else float(alpha)))
    return layers


def remove_adapter(unet: UNet2DConditionModel, name: str) -> None:
    """Take an adapter out of the network; the others stay."""
    with _others_untouched(unet):
        unet.delete_adapters(name)


def adapter_parameters(unet: UNet2DConditionModel, name: str) -> list[nn.Parameter]:
    """The adapter's weights, A then B of each layer, in the network's order.

    Raises:
        KeyError: If there is no such adapter.
    """
    layers = _layers_of(unet, name)
    return [weights[name].weight for layer in layers for weights in (layer.lora_A, layer.lora_B)]


def adapter_factors(unet: UNet2DConditionModel, name: str) -> list[tuple[Tensor, Tensor, float]]:
    """(A, B, scaling) of each layer, A as [rank, fan in] and B as [out, rank]: the weight change is scaling · B A.

    Inside `lora_scale` the scaling counts its scale, which must be one number then.

    Raises:
        KeyError: If there is no such adapter.
    """
    return [(layer.lora_A[name].weight.flatten(1), layer.lora_B[name].weight.flatten(1), layer.scaling[name])
            for layer in _layers_of(unet, name)]


@contextmanager
def dropping(unet: UNet2DConditionModel, name: str) -> Iterator[None]:
    """Inside, the adapter's dropout drops (from torch's global generator), afterwards it doesn't."""
    dropouts = [layer.lora_dropout[name] for layer in _layers_of(unet, name)]
    try:
        for dropout in dropouts:
            dropout.train()
        yield
    finally:
        for dropout in dropouts:
            dropout.eval()


@contextmanager
def lora_scale(unet: UNet2DConditionModel, name: str | None, scale: float | Tensor) -> Iterator[None]:
    """Inside, the UNet is base + scale · adapter; afterwards, also after an exception, everything is as before.

    The scale is absolute (0 base, 1 finetuned) and multiplies the adapter's own alpha / rank. Where all rows have scale
    0 the adapter is off; a single row of scale 0 equals that exactly. Not thread safe: hold the model's lock. With
    gradient checkpointing the backward pass computes forward again and must happen inside too.

    Args:
        unet: The network.
        name: The adapter; None for the base model, whatever the scale.
        scale: One number, or a tensor [B] with one scale for each row of the network's batch.

    Raises:
        KeyError: If there is no such adapter.
        ValueError: If the network is called with another number of rows than `scale` has.
    """
    rows = torch.as_tensor(scale, dtype=torch.float32).detach().cpu()
    if rows.ndim and bool((rows == rows[0]).all()):
        rows = rows[0]
    off = name is None or (not rows.ndim and not rows)
    layers = [] if name is None else _layers_of(unet, name)
    scales = [layer.scaling[name] for layer in layers]
    active = [(layer, layer._active_adapter, layer._disable_adapters) for layer in _layers(unet)]
    hooks = []
    try:
        for layer, _, _ in active:
            layer._active_adapter, layer._disable_adapters = [] if off else [name], False
        for layer, own in zip(layers, scales, strict=True):
            if rows.ndim:
                hooks.append(layer.register_forward_pre_hook(_row_scales(name, rows * own)))
            else:
                layer.scaling[name] = float(rows) * own
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, own in zip(layers, scales, strict=True):
            layer.scaling[name] = own
        for layer, names, disabled in active:
            layer._active_adapter, layer._disable_adapters = names, disabled


def _row_scales(name: str, rows: Tensor) -> Callable[[LoraLayer, tuple[Tensor, ...]], None]:
    """A hook that shapes the scales to a layer's input: [B, 1], [B, 1, 1] or [B, 1, 1, 1]."""

    def hook(layer: LoraLayer, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if len(x) != len(rows):
            raise ValueError(f"{len(rows)} LoRA scales for a batch of {len(x)} rows")
        weight = layer.lora_A[name].weight
        layer.scaling[name] = rows.to(weight).view(-1, *[1] * (x.ndim - 1))

    return hook


def _layers(unet: nn.Module) -> list[LoraLayer]:
    return [module for module in unet.modules() if isinstance(module, LoraLayer)]


def _layers_of(unet: nn.Module, name: str) -> list[LoraLayer]:
    layers = [layer for layer in _layers(unet) if name in layer.lora_A]
    if not layers:
        raise KeyError(f"no adapter '{name}'")
    return layers


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


@contextmanager
def _others_untouched(unet: nn.Module) -> Iterator[None]:
    """Keep which weights are trainable while PEFT adds or removes an adapter, and leave no adapter active."""
    trainable = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    try:
        yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        for layer in _layers(unet):
            layer._active_adapter = []


def _read(file: Path) -> LoraFile:
    """Tensors and settings of a LoRA file in diffusers' layout."""
    if not file.is_file():
        raise UserError(f"no LoRA file {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}
        settings = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"the LoRA {file} is damaged: {_first_line(error)}") from error
    strange = [key for key in state if not KEY.fullmatch(key)]
    if strange or not state or settings.get("unet.use_dora"):
        seen = f"'{strange[0]}'" if strange else "DoRA" if state else "nothing"
        raise UserError(f"the LoRA {file} isn't a UNet LoRA in diffusers' layout (keys "
                        f"'unet.<layer>.lora_A.weight' and 'unet.<layer>.lora_B.weight'): it holds {seen}")
    broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"the LoRA {file} is damaged: {broken[0]} holds numbers that aren't finite")
    return LoraFile(state, {key: value for key, value in settings.items() if key.removeprefix("unet.") in CONFIG_KEYS})


def _check_fit(unet: nn.Module, state: dict[str, Tensor], file: Path, model_name: str) -> None:
    """Refuse a LoRA whose layers or shapes aren't the network's."""
    other = f"the LoRA {file} was made for another model than {model_name}"
    modules = {layer: _base(module) for layer, module in unet.named_modules()}
    for layer in dict.fromkeys(KEY.fullmatch(key)[1] for key in state):
        base = modules.get(layer)
        if not isinstance(base, nn.Linear | nn.Conv2d):
            raise UserError(f"{other}, which has no layer {layer}")
        pair = [state.get(f"unet.{layer}.lora_{side}.weight") for side in "AB"]
        if any(tensor is None for tensor in pair):
            raise UserError(f"the LoRA {file} is damaged: {layer} lacks its A or B")
        down, up = pair
        out_size, *fan_in = base.weight.shape
        kernel = [1] * len(fan_in[1:])
        if list(down.shape[1:]) != fan_in or list(up.shape) != [out_size, len(down), *kernel]:
            raise UserError(f"{other}: {layer} maps {down.shape[1]} to {len(up)} channels there, "
                            f"{fan_in[0]} to {out_size} here")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
