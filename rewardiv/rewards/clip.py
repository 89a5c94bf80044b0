"""CLIP score: how well an image fits its prompt, by the built-in CLIP or any model that open_clip knows.

Source: Radford et al., arXiv:2103.00020; the score of Hessel et al., arXiv:2104.08718.
Differs: the plain cosine, neither clipped at 0 nor scaled by 2.5.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from rewardiv.clip_models import TwoTowers
from rewardiv.errors import UserError, nearest
from rewardiv.framing import Frame
from rewardiv.hub import Source
from rewardiv.rewards.checkpoint_files import locate

PREFIX = "clip:"
WEIGHTS_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZER_FILES = (  # the last where there is one
    "open_clip_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json|tokenizer_config.json",
)
FITS = {"shortest": "crop", "squash": "squash"}  # open_clip's resize_mode as a frame's fit


class ClipScore(nn.Module):
    """Framed images [B, 3, S, S] and B prompts to the cosine [B] of their embeddings, in [-1, 1]."""

    def __init__(self, towers: TwoTowers) -> None:
        super().__init__()
        self.towers, self.frame = towers, towers.frame

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return self.towers.pixel_cosines(pixels, prompts)


def parse_clip(name: str) -> tuple[str, str]:
    """Architecture and weights of a name `clip:ARCH:PRETRAINED`, such as clip:ViT-B-32:laion2b_s34b_b79k.

    Raises:
        UserError: If it isn't such a name, or open_clip doesn't know them; the message says what it knows.
    """
    import open_clip

    parts = name.removeprefix(PREFIX).split(":")
    if not name.startswith(PREFIX) or len(parts) != 2 or not all(parts):
        raise UserError(f"'{name}' isn't clip:ARCH:PRETRAINED, such as clip:ViT-B-32:laion2b_s34b_b79k")
    arch, tag = parts
    if arch not in open_clip.list_models():
        raise UserError(f"open_clip has no architecture '{arch}'{nearest(arch, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if not open_clip.get_pretrained_cfg(arch, tag):
        raise UserError(f"open_clip has no weights '{tag}' for {arch}{nearest(tag, tags)}")
    return arch, tag


def clip_source(name: str) -> Source:
    """Where the hub has the weights of a name `clip:ARCH:PRETRAINED`, by open_clip's own table.

    Raises:
        UserError: If open_clip doesn't know the name, or its weights aren't on the hub.
    """
    import open_clip

    arch, tag = parse_clip(name)
    owner, _, rest = open_clip.get_pretrained_cfg(arch, tag)["hf_hub"].partition("/")
    repo, _, file = rest.partition("/")
    if not repo:
        raise UserError(f"the weights of {name} aren't on the hub; choose others: "
                        f"{', '.join(open_clip.list_pretrained_tags_by_model(arch))}")
    tokenizer = TOKENIZER_FILES if "hf_tokenizer_name" in open_clip.get_model_config(arch)["text_cfg"] else ()
    return Source(f"{owner}/{repo}", files=(file or "|".join(WEIGHTS_NAMES), *tokenizer))


def load_open_clip(path: str | Path, name: str) -> TwoTowers:
    """The model of a name `clip:ARCH:PRETRAINED` from its weights' file, or from the folder that holds it.

    Normalisation, resizing and activation are those of open_clip's own table for these weights. A tokenizer other than
    CLIP's is read from the folder.

    Raises:
        UserError: If open_clip doesn't know the name, or a file is missing, damaged or made for another architecture.
    """
    import open_clip

    arch, tag = parse_clip(name)
    settings, text = open_clip.get_pretrained_cfg(arch, tag), open_clip.get_model_config(arch)["text_cfg"]
    if settings["resize_mode"] not in FITS or "hf_model_name" in text:
        raise UserError(f"{name} can't be used: its resizing or its text tower isn't one that is known here")
    file = locate(path, WEIGHTS_NAMES, name)
    try:
        net = open_clip.create_model(arch, pretrained=str(file), force_quick_gelu=settings.get("quick_gelu", False))
        tokenize = open_clip.get_tokenizer(f"local-dir:{file.parent}" if "hf_tokenizer_name" in text else arch)
    except Exception as error:  # open_clip and the readers behind it raise many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{file} is damaged, incomplete or not the weights of {name} ({reason}); delete it and download it "
                        "again") from error
    size = net.visual.image_size
    frame = Frame(size if isinstance(size, int) else size[0], settings["mean"], settings["std"],
                  fit=FITS[settings["resize_mode"]], interpolation=settings["interpolation"])
    return TwoTowers(net, tokenize, frame)
