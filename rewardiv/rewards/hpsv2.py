"""HPSv2 and HPSv2.1: how people rank several models' images of one prompt.

Source: Wu et al., arXiv:2306.09341; weights xswu/HPSv2 (an open_clip ViT-H-14 under the key "state_dict"). The score is
the cosine alone, without logit_scale; compare it within a prompt only, and never v2 with v2.1. Images that aren't square
are letterboxed with black, not cropped, and resized as tensors on both paths. Differs: float32 instead of autocast.
"""

from __future__ import annotations

from pathlib import Path

from rewardiv.clip_models import TwoTowers
from rewardiv.framing import Frame
from rewardiv.rewards.checkpoint_files import fill, locate, read_weights
from rewardiv.rewards.clip import ClipScore

ARCH = "ViT-H-14"
FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}


def load_hpsv2(path: str | Path, version: str, arch: str = ARCH) -> ClipScore:
    """The cosine, about 0.2 to 0.35, from the file of this version ("hpsv2" or "hpsv2.1") or the folder that holds it.

    Args:
        path: The file or the folder.
        version: A key of FILES.
        arch: Name of the architecture in open_clip's table.

    Raises:
        UserError: If the file is missing, damaged or of another model.
    """
    import open_clip

    file = locate(path, (FILES[version],), version)
    net = open_clip.CLIP(**open_clip.get_model_config(arch))
    fill(net, read_weights(file, version), file, version)
    return ClipScore(TwoTowers(net, open_clip.get_tokenizer(arch), Frame(net.visual.image_size[0], fit="letterbox")))
