"""Memory of a sampling run before it starts: weights, activations, rewards, and how many rows fit at once.

The networks' peaks are counted from their configs by following which tensors of diffusers' blocks are alive together in
inference; workspace of the kernels and the encoders' own activations (small) aren't counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open

from rewardiv import hub
from rewardiv.config import SampleConfig
from rewardiv.errors import UserError
from rewardiv.methods import parse_methods
from rewardiv.pipelines import TOWERS, decodes_in_fp32, part_config, pipeline_index, weight_file

USABLE = 0.9  # of what is free; the rest is for kernels' workspace and fragmentation
MAX_ROWS = 128  # network rows at once; more don't make a device faster
DECODE_ROWS = 16  # latents decoded at once, at most
TILE = 512  # px of a tile's side, where the autoencoder works in tiles
SCORED = 64  # images scored at once
BLOCK = 20  # tensors of a transformer block's width alive at its feed-forward layer: its input, 8 + 4 + 4 of GEGLU, ...
LORA_BLOCK = 28  # with a LoRA there: the layer's output, the LoRA's and their sum, 8 widths each

Config = Mapping[str, object]


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs on its device, in bytes.

    Attributes:
        weights: Of each part, whether it stays on the device or not.
        resident: Of what stays on the device from the first step to the last.
        steps: Activations of `max_rows` network rows, and the latents.
        decode: Of the autoencoder while it decodes, with its weights where they are offloaded.
        scoring: Of images on their way through the rewards.
        free: Bytes that the device has for all of it.
        max_rows: Rows that the network can take at once; 0 where not even one image's fit.
        tiles: Whether the autoencoder has to work in tiles.
    """

    weights: dict[str, int]
    resident: int
    steps: int
    decode: int
    scoring: int
    free: int
    max_rows: int
    tiles: bool

    @property
    def peak(self) -> int:
        """Of the hungriest moment."""
        return self.resident + max(self.steps, self.decode, self.scoring)

    @property
    def fits(self) -> bool:
        """Whether the run can be done."""
        return self.max_rows > 0 and self.peak <= USABLE * self.free

    def table(self) -> str:
        """The plan as lines of text."""
        lines = [(f"weights: {name}", size) for name, size in self.weights.items()]
        lines += [(f"network, {self.max_rows} rows at once", self.steps),
                  ("decoding" + self.tiles * ", in tiles", self.decode), ("scoring", self.scoring),
                  ("peak, about", self.peak), ("free", self.free)]
        return "\n".join(f"{name:36} {hub.gib_text(size):>10}" for name, size in lines)


def plan(
    config: SampleConfig, folder: Path, others: Sequence[Path], *, device: str | torch.device, dtype: torch.dtype,
    offload: bool, free: int | None = None,
) -> MemoryPlan:
    """What a run of these settings needs, from the files' headers and configs; nothing is loaded.

    Args:
        config: The settings.
        folder: Its base model, in diffusers' layout.
        others: Files and folders of what else stays loaded: LoRAs, rewards, features.
        device: Where everything runs.
        dtype: Of the base model.
        offload: Whether text encoders and autoencoder leave the device while they aren't used.
        free: Bytes free on the device; None looks.

    Raises:
        UserError: If files are missing or damaged.
    """
    unet, vae = (part_config(folder / part) for part in ("unet", "vae"))
    upcast = decodes_in_fp32(folder, dtype)
    sizes, scored = _weights(folder, dtype), sum(map(_bytes, others))
    height, width = _latents(config, unet, vae)
    free = free_bytes(device) if free is None else free
    moved = sizes["text encoders"] + sizes["autoencoder"]
    resident = sum(sizes.values()) + scored - offload * moved
    methods = parse_methods(config.methods)
    row = unet_row_bytes(unet, height, width, dtype, lora=any(method.needs_lora for method in methods))
    passes = 1 if config.guidance_scale == 1 else 2
    wanted = passes * len(config.seeds) * (2 * len(methods))  # at most: two terms a method
    rows = rows_that_fit(row, USABLE * free - resident, min(MAX_ROWS, wanted), least=passes)
    decoder_dtype, images = torch.float32 if upcast else dtype, len(config.seeds)
    decoded = decode_rows(vae, height, width, decoder_dtype, free - resident - offload * sizes["autoencoder"])
    tile = min(TILE // vae_scale(vae), height), min(TILE // vae_scale(vae), width)
    at_once = (height, width) if decoded else tile
    pixels = 3 * 4 * height * width * vae_scale(vae) ** 2
    return MemoryPlan(
        weights=sizes | {"LoRA, rewards, features": scored}, resident=resident,
        steps=(rows or passes) * row + 4 * len(methods) * images * 4 * height * width,
        decode=(min(decoded, images) or 1) * decode_row_bytes(vae, *at_once, decoder_dtype) + 2 * images * pixels
        + offload * sizes["autoencoder"],
        scoring=2 * min(SCORED, images) * pixels, free=free, max_rows=rows, tiles=not decoded,
    )


def check_fits(plan: MemoryPlan, *, device: str | torch.device, dtype: torch.dtype, offload: bool) -> None:
    """Refuse a run that the device cannot hold.

    Raises:
        UserError: With what it needs, what is free, and what would help.
    """
    if plan.fits:
        return
    remedies = [] if offload or str(device) == "cpu" else ["--offload"]
    remedies += ["--dtype float16"] if dtype == torch.float32 and str(device) != "cpu" else []
    remedies += ["smaller --height and --width", "fewer seeds, rewards or methods"]
    raise UserError(f"this run needs about {hub.gib_text(plan.peak)} and {hub.gib_text(plan.free)} are free on {device}; "
                    f"try {' or '.join(remedies)}")


def free_bytes(device: str | torch.device) -> int:
    """Memory that the device can still give, what torch keeps back for itself included."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def rows_that_fit(row_bytes: int, room: float, most: int, *, least: int = 1) -> int:
    """How many rows fit into `room` bytes: `least` to `most`, 0 where not even `least` do."""
    rows = min(most, int(max(0.0, room) // row_bytes))
    return rows if rows >= least else 0


def network_rows(
    config: Config, height: int, width: int, dtype: torch.dtype, device: str | torch.device, *, lora: bool, passes: int,
) -> int:
    """How many rows of latents height x width the loaded UNet can take at once on its device now.

    Raises:
        UserError: If not even the `passes` rows of one image fit.
    """
    row, free = unet_row_bytes(config, height, width, dtype, lora=lora), free_bytes(device)
    if rows := rows_that_fit(row, USABLE * free, MAX_ROWS, least=passes):
        return rows
    raise UserError(f"one image needs about {hub.gib_text(passes * row)} on {device} beside the weights and "
                    f"{hub.gib_text(free)} are free; try a smaller height and width, or half precision")


def decode_rows(config: Config, height: int, width: int, dtype: torch.dtype, free: float) -> int:
    """How many latents height x width the decoder can take at once; 0 where it has to work in tiles."""
    return rows_that_fit(decode_row_bytes(config, height, width, dtype), USABLE * free, DECODE_ROWS)


def unet_row_bytes(config: Config, height: int, width: int, dtype: torch.dtype, *, lora: bool) -> int:
    """Bytes of the UNet's activations at their peak, for a row of latents height x width, without weights."""
    return unet_peak(config, height, width, lora=lora) * dtype.itemsize


def decode_row_bytes(config: Config, height: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of the decoder's activations at their peak, for one row of latents height x width, without weights."""
    return decoder_peak(config, height, width) * dtype.itemsize


def vae_scale(config: Config) -> int:
    """Pixels of an image for each latent, along a side."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def unet_peak(config: Config, height: int, width: int, *, lora: bool) -> int:
    """Numbers that are alive together at the peak of a UNet2DConditionModel's inference, for a row.

    All skips of the way down stay until their block of the way up is through; on top of them comes the working set of one
    ResNet or transformer block. With `lora`, every layer has an adapter.
    """
    widths: Sequence[int] = config["block_out_channels"]
    depths = config["layers_per_block"]
    depths = [depths] * len(widths) if isinstance(depths, int) else depths
    block = LORA_BLOCK if lora else BLOCK
    size, x = height * width, widths[0]
    skips, peak = [x * size], 0
    sizes = [size]
    for level, (kind, c, depth) in enumerate(zip(config["down_block_types"], widths, depths, strict=True)):
        for _ in range(depth):
            peak = max(peak, sum(skips) + size * _resnet(x, c, lora), sum(skips) + size * c * block * ("CrossAttn" in kind))
            skips.append(c * size)
            x = c
        if level < len(widths) - 1:
            height, width = (height + 1) // 2, (width + 1) // 2
            size = height * width
            skips.append(c * size)
            sizes.append(size)
    peak = max(peak, sum(skips) + size * x * block)
    for level, (kind, c, depth) in enumerate(zip(config["up_block_types"], reversed(widths), reversed(depths), strict=True)):
        held = sum(skips) + x * size  # the block's input and all its skips stay until it is through
        for _ in range(depth + 1):
            joined = x + skips.pop() // size
            peak = max(peak, held + size * (joined + _resnet(joined, c, lora)), held + size * c * block * ("CrossAttn" in kind))
            x = c
        if level < len(widths) - 1:
            below, size = size, sizes[-2 - level]
            peak = max(peak, held + c * below + 2 * c * size)  # enlarged, then convolved
    return peak


def decoder_peak(config: Config, height: int, width: int) -> int:
    """Numbers that are alive together at the peak of AutoencoderKL's decoder, for a row of latents."""
    widths = list(reversed(config["block_out_channels"]))
    size, x, peak = height * width, widths[0], 0
    for level, c in enumerate(widths):
        held = x * size
        for k in range(config["layers_per_block"] + 1):
            peak = max(peak, (held if k else 0) + size * (x + _resnet(x, c, False)))
            x = c
        if level < len(widths) - 1:
            peak = max(peak, held + 9 * c * size)  # its input, enlarged fourfold, then convolved
            size *= 4
    return peak


def _resnet(x: int, c: int, lora: bool) -> int:
    """Channels alive in a ResNet block beside its input of x channels; it makes c."""
    last = (4 if x != c else 3) * c  # hidden, their sum, the sum scaled, and the shortcut
    return max(2 * x, x + (3 if lora else 1) * c, last, 4 * c if lora else 0)


def _latents(config: SampleConfig, unet: Config, vae: Config) -> tuple[int, int]:
    own = unet["sample_size"]
    own = (own, own) if isinstance(own, int) else own
    asked = (side // vae_scale(vae) for side in (config.height, config.width))
    height, width = (side or latents for side, latents in zip(asked, own, strict=True))
    return height, width


def _weights(folder: Path, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each part's weights in memory."""
    towers = [encoder for _, encoder, _ in TOWERS[pipeline_index(folder)["_class_name"]]]

    def part(name: str, stem: str, itemsize: int) -> int:
        return sum(_numbers(file) for file in weight_file(folder / name, stem, dtype)[1]) * itemsize

    return {
        "UNet": part("unet", "diffusion_pytorch_model", dtype.itemsize),
        "text encoders": sum(part(tower, "model", dtype.itemsize) for tower in towers),
        "autoencoder": part("vae", "diffusion_pytorch_model", 4 if decodes_in_fp32(folder, dtype) else dtype.itemsize),
    }


def _bytes(path: Path) -> int:
    """Of the weights in a file or folder in fp32; their files' size where they aren't safetensors."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors")) or [*path.rglob("*.pt"), *path.rglob("*.bin")]
    return sum(4 * _numbers(file) if file.suffix == ".safetensors" else file.stat().st_size for file in files)


def _numbers(file: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    try:
        with safe_open(file, framework="pt") as opened:
            return sum(torch.Size(opened.get_slice(key).get_shape()).numel() for key in opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); restore it") from error
