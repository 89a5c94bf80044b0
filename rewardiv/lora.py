"""LoRA adapters on a UNet or a text encoder: attach, load, save, remove, and the scale of every row of a batch.

At rest no adapter is active: the network is the base model's. `lora_scale` is the only place that changes that, and it puts
everything back. The adapters are PEFT layers. Files are read in any layout (lora_formats) and written in diffusers'.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor, nn

from rewardiv.errors import UserError
from rewardiv.lora_formats import METADATA_KEY, FileLayer, LoraFile, family_of, read_lora
from rewardiv.registry import LORA_FILE
from rewardiv.runs import write_bytes

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

CONFIG_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")
Adapters = str | Mapping[str, float] | None  # one, several with weights, or the base model alone


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
    """Load a LoRA file, or the folder that holds it, that changes the UNet alone; see load_lora and read_lora."""
    load_lora({"unet": unet}, name, read_lora(path, layers_per_block=unet.config.layers_per_block), model_name=model_name)


def load_lora(networks: Mapping[str, nn.Module], name: str, lora: LoraFile, *, model_name: str = "this model") -> None:
    """Load a LoRA, which lora_formats.read_lora has read, as a frozen adapter of every network that it changes.

    Where the LoRA is refused, no network has changed.

    Args:
        networks: "unet", and "text_encoder" and "text_encoder_2" where the model has them.
        name: The adapter's name in these networks, unused so far.
        lora: What the file holds.
        model_name: What to call the base model in an error.

    Raises:
        UserError: If the LoRA was made for another model (both are named), has no UNet part, or changes a text encoder that
            isn't among the networks.
    """
    if "unet" not in lora.parts:
        raise UserError(f"the LoRA {lora.file} changes text encoders only; one that changes the UNet is needed")
    _check_family(networks["unet"], lora, model_name)
    if others := [part.replace("_", " ") for part in lora.parts if part not in networks]:
        raise UserError(f"the LoRA {lora.file} changes the {' and the '.join(others)} too, which isn't done here; its UNet "
                        "part can be used alone: save the file without the keys that begin with lora_te or text_encoder")
    fitted = {part: [_fitted(network, layer, lora.file, model_name) for layer in lora.layers if layer.part == part]
              for part, network in networks.items()}
    for part, layers in fitted.items():
        if layers:
            _inject(networks[part], name, layers)


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


def adapter_names(adapters: Adapters) -> set[str]:
    """Of one adapter, of several, or none."""
    return set(_weights(adapters))


def has_adapter(network: nn.Module, name: str) -> bool:
    """Whether the network has layers of this adapter."""
    return name in getattr(network, "peft_config", {})


def adapters_in(network: nn.Module, adapters: Adapters) -> dict[str, float]:
    """Those of the adapters that change this network, with their weights."""
    return {name: weight for name, weight in _weights(adapters).items() if has_adapter(network, name)}


def remove_adapter(network: nn.Module, name: str) -> None:
    """Take an adapter out of the network; the others stay."""
    with _others_untouched(network):
        for layer in _layers_of(network, name):
            layer.delete_adapter(name)
        del network.peft_config[name]


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
def lora_scale(network: nn.Module, adapters: Adapters, scale: float | Tensor) -> Iterator[None]:
    """Inside, the network is base + scale · Σ weight · adapter; afterwards, also after an exception, all is as before.

    The scale is absolute (0 base, 1 finetuned) and multiplies each adapter's own weight and its alpha / rank. Where all rows
    have scale 0 the adapters are off; a single row of scale 0 equals that exactly, and so does a weight of 0. The order of
    adapters doesn't matter, to the bit. Not thread safe: hold the model's lock. With gradient checkpointing the backward
    pass computes forward again and must happen inside too.

    Args:
        network: The UNet, or a text encoder.
        adapters: An adapter, or several with their weights; None for the base model, whatever the scale.
        scale: One number, or a tensor [B] with one scale for each row of the network's batch.

    Raises:
        KeyError: If there is no such adapter.
        ValueError: If the network is called with another number of rows than `scale` has.
    """
    rows = torch.as_tensor(scale, dtype=torch.float32).detach().cpu()
    if rows.ndim and bool((rows == rows[0]).all()):
        rows = rows[0]
    weights = _weights(adapters)
    every = _layers(network)
    layers = {layer: {} for name in weights for layer in _having(name, every)}
    for layer, own in layers.items():
        own.update({name: layer.scaling[name] for name in weights if name in layer.scaling})
    names = [] if not rows.ndim and not rows else [name for name, weight in weights.items() if weight]
    active = [(layer, layer._active_adapter, layer._disable_adapters) for layer in every]
    hooks = []
    try:
        for layer, _, _ in active:
            layer._active_adapter, layer._disable_adapters = names, False
        for layer, own in layers.items():
            factors = {name: weights[name] * scaling for name, scaling in own.items()}
            if rows.ndim:
                hooks.append(layer.register_forward_pre_hook(_row_scales(factors, rows)))
            else:
                layer.scaling.update({name: float(rows) * factor for name, factor in factors.items()})
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, own in layers.items():
            layer.scaling.update(own)
        for layer, before, disabled in active:
            layer._active_adapter, layer._disable_adapters = before, disabled


def _weights(adapters: Adapters) -> dict[str, float]:
    return {adapters: 1.0} if isinstance(adapters, str) else {name: adapters[name] for name in sorted(adapters or {})}


def _row_scales(factors: Mapping[str, float], rows: Tensor) -> Callable[[LoraLayer, tuple[Tensor, ...]], None]:
    """A hook that shapes the scales to a layer's input: [B, 1], [B, 1, 1] or [B, 1, 1, 1]."""

    def hook(layer: LoraLayer, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if len(x) != len(rows):
            raise ValueError(f"{len(rows)} LoRA scales for a batch of {len(x)} rows")
        for name, factor in factors.items():
            weight = layer.lora_A[name].weight
            layer.scaling[name] = (rows * factor).to(weight).view(-1, *[1] * (x.ndim - 1))

    return hook


def _layers(network: nn.Module) -> list[LoraLayer]:
    """All LoRA layers, in the order of `modules()`, which takes twice as long and more: every call of the network does this."""
    found, ahead = [], [network]
    while ahead:
        module = ahead.pop()
        if isinstance(module, LoraLayer):
            found.append(module)
        else:
            ahead += reversed(list(module.children()))
    return found


def _layers_of(network: nn.Module, name: str) -> list[LoraLayer]:
    return _having(name, _layers(network))


def _having(name: str, layers: Sequence[LoraLayer]) -> list[LoraLayer]:
    """Those of the layers that have the adapter."""
    having = [layer for layer in layers if name in layer.lora_A]
    if not having:
        raise KeyError(f"no adapter '{name}'")
    return having


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


@contextmanager
def _others_untouched(network: nn.Module) -> Iterator[None]:
    """Keep which weights are trainable while PEFT adds or removes an adapter, and leave no adapter active."""
    trainable = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        for layer in _layers(network):
            layer._active_adapter = []


def _check_family(unet: nn.Module, lora: LoraFile, model_name: str) -> None:
    """Refuse a LoRA of another model family, by the width of the text embeddings or a second text encoder."""
    width = unet.config.cross_attention_dim
    two_encoders = "text_encoder_2" in lora.parts and unet.config.addition_embed_type != "text_time"
    if two_encoders or lora.text_width not in (None, width):
        made_for = "SDXL (a second text encoder)" if two_encoders else family_of(lora.text_width)
        raise UserError(f"the LoRA {lora.file} was made for {made_for}; {model_name} is {family_of(width)}")


def _fitted(network: nn.Module, layer: FileLayer, file: Path, model_name: str) -> FileLayer:
    """The layer under the network's own name and in its shape; a 1 × 1 convolution and a linear layer are the same.

    Raises:
        UserError: If the network has no such layer, or one of another size.
    """
    other = f"the LoRA {file} was made for another model than {model_name}"
    name = layer.name
    if layer.part != "unet" and not hasattr(network, "text_model"):
        name = name.removeprefix("text_model.")  # transformers 5 dropped it where nothing else is beside
    try:
        base = _base(network.get_submodule(name))
    except AttributeError:
        base = None
    if not isinstance(base, nn.Linear | nn.Conv2d):
        raise UserError(f"{other}, whose {layer.part} has no layer {name}")
    out_size, *fan_in = base.weight.shape
    down_shape, up_shape = (len(layer.down), *fan_in), (out_size, len(layer.down), *[1] * len(fan_in[1:]))
    if _trimmed(layer.down.shape) != _trimmed(down_shape) or _trimmed(layer.up.shape) != _trimmed(up_shape):
        raise UserError(f"{other}: {name} maps {list(layer.down.shape[1:])} to {len(layer.up)} channels there, {fan_in} to "
                        f"{out_size} here")
    return layer._replace(name=name, down=layer.down.reshape(down_shape), up=layer.up.reshape(up_shape))


def _trimmed(shape: Sequence[int]) -> tuple[int, ...]:
    """A weight's shape without a kernel of 1 × 1."""
    return tuple(shape[:2]) if all(side == 1 for side in shape[2:]) else tuple(shape)


def _inject(network: nn.Module, name: str, layers: Sequence[FileLayer]) -> None:
    """Add the adapter with exactly these layers, in the base weights' type and place, with nothing to train."""
    if has_adapter(network, name):
        raise ValueError(f"there is an adapter '{name}' already")
    state = {f"{layer.name}.lora_{side}.weight": tensor.contiguous()
             for layer in layers for side, tensor in (("A", layer.down), ("B", layer.up))}
    config = LoraConfig(
        r=_most(len(layer.down) for layer in layers), lora_alpha=_most(layer.alpha for layer in layers),
        rank_pattern=_pattern(layers, lambda layer: len(layer.down)), alpha_pattern=_pattern(layers, lambda layer: layer.alpha),
        target_modules=[layer.name for layer in layers],
    )
    with _others_untouched(network):
        inject_adapter_in_model(config, network, name, low_cpu_mem_usage=True, state_dict=state)
        set_peft_model_state_dict(network, state, name, low_cpu_mem_usage=True)
        for layer in _layers_of(network, name):
            weight = layer.get_base_layer().weight
            for factor in (layer.lora_A[name], layer.lora_B[name]):
                factor.to(weight.device, weight.dtype).requires_grad_(False)


def _most(values: Iterator[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _pattern(layers: Sequence[FileLayer], value: Callable[[FileLayer], float]) -> dict[str, float]:
    """PEFT's table of values that differ from the most common one, with one pattern a value: it tries each on every layer."""
    common, groups = _most(map(value, layers)), {}
    for layer in layers:
        groups.setdefault(value(layer), []).append(re.escape(layer.name))
    return {f"^(?:{'|'.join(names)})": number for number, names in groups.items() if number != common}
