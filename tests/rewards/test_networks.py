"""Learned rewards: the reference packages' arithmetic written out, both paths, gradients, and files that aren't right."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import transforms as T
from transformers import BertTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rewardiv import hub
from rewardiv.clip_models import TwoTowers
from rewardiv.errors import UserError
from rewardiv.registry import REWARDS
from rewardiv.rewards import Reward, load_reward, network_reward
from rewardiv.rewards.aesthetic import load_aesthetic
from rewardiv.rewards.clip import ClipScore, clip_source, load_open_clip
from rewardiv.rewards.hpsv2 import load_hpsv2
from rewardiv.rewards.imagereward import load_imagereward
from rewardiv.rewards.pickscore import clip_tokenizer, load_pickscore
from rewards.tiny_rewards import PROMPTS, SIZES, WORDS, as_tensor, picture

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPENAI = T.Compose([T.Resize(224, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor(), T.Normalize(MEAN, STD)])
NETWORKS = ["pickscore", "hpsv2", "hpsv2.1", "imagereward", "aesthetic", "clip"]
TOLERANCE = {"pickscore": 0.02, "hpsv2": 1e-6, "hpsv2.1": 1e-6, "imagereward": 0.02, "aesthetic": 0.01, "clip": 2e-3}


def pictures() -> list[Image.Image]:
    return [picture(*size, seed) for seed, size in enumerate([(512, 512), (768, 512), (1024, 683)])]


@torch.no_grad()
def test_pickscore_is_its_model_card_s(loaded: Callable[[str], nn.Module], pickscore_dir: Path) -> None:
    model = CLIPModel.from_pretrained(pickscore_dir, dtype=torch.float32).eval()
    pixels = CLIPImageProcessorPil()(pictures(), return_tensors="pt").pixel_values
    tokens = clip_tokenizer()(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    images = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    texts = model.text_projection(model.text_model(**tokens).pooler_output)
    images, texts = images / images.norm(dim=-1, keepdim=True), texts / texts.norm(dim=-1, keepdim=True)
    expected = (model.logit_scale.exp() * (texts @ images.T)).diagonal()
    torch.testing.assert_close(network_reward("pickscore", loaded("pickscore")).official(pictures(), PROMPTS), expected)


def test_clip_s_tokens_are_the_same_words_with_quotation_marks_left_alone() -> None:
    ours, simple = clip_tokenizer(), open_clip.get_tokenizer("ViT-H-14")
    for text in ("a cat's   face, 3 dogs!", "Ünïcode café 日本 😀", "long " * 100, "<b>bold</b> 24/7"):
        ids = ours(text, truncation=True, max_length=77).input_ids
        assert ids == simple([text])[0, :len(ids)].tolist() and ids[-1] == 49407
    assert ours.decode(ours("a “cat” &amp; dog").input_ids, skip_special_tokens=True) == "a “ cat ” & amp ; dog"


@torch.no_grad()
@pytest.mark.parametrize(("version", "file"), [("hpsv2", "HPS_v2_compressed.pt"), ("hpsv2.1", "HPS_v2.1_compressed.pt")])
def test_hpsv2_is_the_diagonal_of_its_package_s_logits(
    loaded: Callable[[str], nn.Module], hpsv2_dir: Path, tiny_arch: str, version: str, file: str
) -> None:
    model = open_clip.create_model(tiny_arch, output_dict=True).eval()
    model.load_state_dict(torch.load(hpsv2_dir / file)["state_dict"])
    expected = []
    for image, prompt in zip(pictures(), PROMPTS, strict=True):
        pixels = T.ToTensor()(image)
        height, width = (round(side * 224 / max(pixels.shape[1:])) for side in pixels.shape[1:])
        pixels = T.functional.resize(pixels, [height, width], T.InterpolationMode.BICUBIC)
        down, across = 224 - height, 224 - width
        pixels = T.functional.pad(pixels, [across // 2, down // 2, across - across // 2, down - down // 2])
        out = model(T.Normalize(MEAN, STD)(pixels)[None], open_clip.get_tokenizer(tiny_arch)([prompt]))
        expected.append((out["image_features"] @ out["text_features"].T).diagonal())
    scores = network_reward(version, loaded(version)).official(pictures(), PROMPTS)
    torch.testing.assert_close(scores, torch.cat(expected))


@torch.no_grad()
def test_aesthetic_is_an_affine_map_of_the_normalised_embedding(
    loaded: Callable[[str], nn.Module], aesthetic_dir: Path
) -> None:
    state = load_file(aesthetic_dir / "model.safetensors")
    tower = loaded("aesthetic").vision
    features = tower.vision_model(pixel_values=torch.stack([OPENAI(image) for image in pictures()])).pooler_output
    features = features @ state["visual_projection.weight"].T
    scores = features / features.norm(dim=1, keepdim=True)
    for i in (0, 2, 4, 6, 7):
        scores = scores @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    reward = network_reward("aesthetic", loaded("aesthetic"))
    torch.testing.assert_close(reward.official(pictures(), PROMPTS), scores[:, 0], rtol=1e-4, atol=1e-5)
    assert torch.equal(reward.official(pictures(), PROMPTS), reward.official(pictures(), PROMPTS[::-1])), "it is blind"
    assert tower.config.hidden_act == "quick_gelu", "as OpenAI's was trained"


class ReferenceImageReward:
    """BLIP's vision transformer and text encoder and the head, from the reference's state dict, one formula a line."""

    def __init__(self, folder: Path) -> None:
        self.state, self.config = torch.load(folder / "ImageReward.pt"), json.loads((folder / "med_config.json").read_text())
        self.words = (folder / "vocab.txt").read_text().split("\n")

    def __call__(self, image: Image.Image, words: list[str]) -> Tensor:
        ids = [2, *(self.words.index(word) for word in words), 3]
        states = self.text(torch.tensor(ids + [0] * (35 - len(ids))), len(ids), self.vision(OPENAI(image)))
        score = states[0]
        for i in (0, 2, 4, 6, 7):
            score = self.linear(f"mlp.layers.{i}", score)
        return (score[0] - 0.16717362830052426) / 1.0333394966054072

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
        """Of states [T, D]."""
        q, k, v = (x.view(len(x), heads, -1).transpose(0, 1) for x in (q, k, v))
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def vision(self, pixels: Tensor) -> Tensor:
        name, state = "blip.visual_encoder", self.state
        kernel = state[f"{name}.patch_embed.proj.weight"]
        patches = F.conv2d(pixels[None], kernel, state[f"{name}.patch_embed.proj.bias"], stride=kernel.shape[-1])
        x = torch.cat([state[f"{name}.cls_token"][0], patches[0].flatten(1).T]) + state[f"{name}.pos_embed"][0]
        for i in range(2):
            block = f"{name}.blocks.{i}"
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=1)
            x = x + self.linear(f"{block}.attn.proj", self.attention(q, k, v, x.shape[1] // 64))
            hidden = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", hidden)
        return self.norm(f"{name}.norm", x, 1e-6)

    def text(self, ids: Tensor, length: int, image: Tensor) -> Tensor:
        name, heads = "blip.text_encoder", self.config["num_attention_heads"]
        words = self.state[f"{name}.embeddings.word_embeddings.weight"][ids]
        x = words + self.state[f"{name}.embeddings.position_embeddings.weight"][:len(ids)]
        x = self.norm(f"{name}.embeddings.LayerNorm", x, 1e-12)
        mask = -10000.0 * (torch.arange(len(ids)) >= length)
        for i in range(2):
            layer = f"{name}.encoder.layer.{i}"
            for part, source, hide in (("attention", None, mask), ("crossattention", image, 0.0)):
                q, k, v = (self.linear(f"{layer}.{part}.self.{role}", x if role == "query" or source is None else source)
                           for role in ("query", "key", "value"))
                out = self.linear(f"{layer}.{part}.output.dense", self.attention(q, k, v, heads, hide))
                x = self.norm(f"{layer}.{part}.output.LayerNorm", out + x, 1e-12)
            out = self.linear(f"{layer}.output.dense", F.gelu(self.linear(f"{layer}.intermediate.dense", x)))
            x = self.norm(f"{layer}.output.LayerNorm", out + x, 1e-12)
        return x


@torch.no_grad()
def test_imagereward_is_its_package_s(loaded: Callable[[str], nn.Module], imagereward_dir: Path) -> None:
    reference = ReferenceImageReward(imagereward_dir)
    texts = ["A red barn, at dusk", "two dogs", " ".join(["hat"] * 60)]
    words = [["a", "red", "barn", ",", "at", "dusk"], ["two", "dogs"], ["hat"] * 33]
    expected = torch.stack([reference(image, tokens) for image, tokens in zip(pictures(), words, strict=True)])
    scores = network_reward("imagereward", loaded("imagereward")).official(pictures(), texts)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert float(expected.std()) > 0.01, "the rewards differ, so that the test can fail"
    assert loaded("imagereward").vision.config.layer_norm_eps == 1e-6, "not transformers' own 1e-5"


def test_imagereward_knows_blip_s_two_tokens(loaded: Callable[[str], nn.Module]) -> None:
    ids = loaded("imagereward").tokenizer("[DEC] red [ENC]").input_ids
    assert ids == [2, len(WORDS), WORDS.index("red"), len(WORDS) + 1, 3]


@torch.no_grad()
def test_any_open_clip_model_is_its_cosine(
    open_clip_dir: Path, tiny_arch: str, open_clip_tag: Callable[..., str]
) -> None:
    """With the activation, resizing and normalisation that open_clip's table gives for the weights."""
    settings = {"quick_gelu": True, "resize_mode": "squash", "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.4,) * 3}
    reward = network_reward("clip", ClipScore(load_open_clip(open_clip_dir, open_clip_tag("quick", **settings))).eval())
    reference = open_clip.create_model(tiny_arch, str(open_clip_dir / "open_clip_model.safetensors"), force_quick_gelu=True)
    prepare = T.Compose([T.Resize((224, 224)), T.ToTensor(), T.Normalize((0.5,) * 3, (0.4,) * 3)])
    images = reference.eval().encode_image(torch.stack([prepare(image) for image in pictures()]), normalize=True)
    texts = reference.encode_text(open_clip.get_tokenizer(tiny_arch)(PROMPTS), normalize=True)
    torch.testing.assert_close(reward.official(pictures(), PROMPTS), (images * texts).sum(1), rtol=1e-4, atol=1e-6)


def test_a_tokenizer_other_than_clip_s_is_read_from_the_weights_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imagereward_dir: Path
) -> None:
    """As for the SigLIP models; the architecture's own name for it would be fetched."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32},
        "text_cfg": {"context_length": 12, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1, "hf_tokenizer_name": "x/y"},
    }
    (tmp_path / "tiny-foreign.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-foreign.json")
    settings = open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-foreign", {"tag": settings})
    save_file(open_clip.create_model("tiny-foreign", load_weights=False).state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    BertTokenizer(str(imagereward_dir / "vocab.txt")).save_pretrained(tmp_path)
    towers = load_open_clip(tmp_path, "clip:tiny-foreign:tag")
    assert towers.tokenize(["A red hat"])[0].tolist() == [2, *map(WORDS.index, ("a", "red", "hat")), 3] + [0] * 7
    assert towers.frame.fit == "squash" and towers.frame.size == 64 and towers.mean.flatten().tolist() == [0.5] * 3


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_both_paths_agree(loaded: Callable[[str], nn.Module], name: str) -> None:
    """To 0.02 in the reward's own unit (aesthetic to 0.01, the cosine to 0.002, HPSv2 exactly); images differ by more."""
    reward = network_reward(name, loaded(name))
    scores = []
    for seed, size in enumerate(SIZES):
        image = picture(*size, seed)
        scores.append(reward(as_tensor(image), PROMPTS[:1]))
        official = reward.official([image], PROMPTS[:1])
        torch.testing.assert_close(scores[-1], official, rtol=0, atol=TOLERANCE[name])
    assert float(torch.cat(scores).std()) > 2 * TOLERANCE[name]


@pytest.mark.parametrize("size", [(224, 224), (96, 150)])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_equals_finite_differences(load: Callable[[str], nn.Module], name: str, size: tuple[int, int]) -> None:
    reward = network_reward(name, load(name).double())
    generator = torch.Generator().manual_seed(0)
    images = 0.2 + 0.6 * torch.rand(2, 3, *size, generator=generator, dtype=torch.float64)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    gradient, = torch.autograd.grad(reward(leaf, PROMPTS[:2]).sum(), leaf)
    with torch.no_grad():
        ends = [reward(images + sign * 1e-5 * direction, PROMPTS[:2]).sum() for sign in (1, -1)]
    slope = (gradient * direction).sum()
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-9)
    assert float(gradient.abs().amax((1, 2, 3)).min()) > 0, "every image has a gradient"


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_a_reward_doesn_t_depend_on_the_rest_of_the_batch(loaded: Callable[[str], nn.Module], name: str) -> None:
    reward = network_reward(name, loaded(name))
    images = torch.cat([as_tensor(picture(96, 80, seed)) for seed in range(3)])
    together = reward(images, PROMPTS)
    assert together.shape == (3,) and together.dtype == torch.float32
    alone = torch.cat([reward(images[i:i + 1], PROMPTS[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    bytes_ = (images * 255).round().to(torch.uint8)
    torch.testing.assert_close(reward.official(bytes_, PROMPTS), reward.official([*map(picture, [96] * 3, [80] * 3, range(3))],
                                                                                  PROMPTS))


@pytest.mark.parametrize("name", ["pickscore", "imagereward", "aesthetic", "clip"])
def test_weights_are_freed_with_the_reward(load: Callable[[str], nn.Module], name: str) -> None:
    network = load(name)
    reward, kept = network_reward(name, network), weakref.ref(network)
    reward(torch.rand(1, 3, 64, 64), ["a"])
    del network, reward
    gc.collect()
    assert kept() is None


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickscore_dir: Path, hpsv2_dir: Path, open_clip_dir: Path,
              imagereward_dir: Path, aesthetic_dir: Path) -> Path:
    """The hub's cache with every reward's files where its registry entry expects them."""
    files = {"pickscore": [pickscore_dir], "hpsv2": [hpsv2_dir], "hpsv2.1": [hpsv2_dir], "imagereward": [imagereward_dir] * 2,
             "aesthetic": [aesthetic_dir]}
    for name, folders in files.items():
        for source, folder in zip(REWARDS[name].sources, folders, strict=True):
            _put_in_cache(tmp_path, source, folder)
    _put_in_cache(tmp_path, hub.Source("owner/tiny"), open_clip_dir)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("rewardiv.rewards.hpsv2.load_hpsv2.__defaults__", ("tiny-ViT-32",))
    return tmp_path


def _put_in_cache(cache: Path, source: hub.Source, folder: Path) -> None:
    root = cache / f"models--{source.repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, root / "snapshots" / ("0" * 40), dirs_exist_ok=True)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_a_reward_loads_by_name_from_the_hub_s_cache(
    hub_cache: Path, loaded: Callable[[str], nn.Module], open_clip_tag: Callable[..., str], name: str
) -> None:
    reward = load_reward(open_clip_tag("tag") if name == "clip" else name)
    expected = network_reward(name, loaded(name)).official(pictures(), PROMPTS)
    torch.testing.assert_close(reward.official(pictures(), PROMPTS), expected)


def test_open_clip_names_are_explained() -> None:
    source = clip_source("clip:ViT-L-14:openai")
    assert source.repo == "timm/vit_large_patch14_clip_224.openai" and len(source.files) == 1
    assert "open_clip_model.safetensors" in source.files[0]
    assert "tokenizer.json" in clip_source("clip:ViT-B-16-SigLIP:webli").files
    for name, hint in (("clip:ViT-L-14", "isn't clip:ARCH:PRETRAINED"), ("clip:ViT-L14:openai", "did you mean 'ViT-L-14'"),
                       ("clip:ViT-L-14:opnai", "did you mean 'openai'")):
        with pytest.raises(UserError, match=hint):
            clip_source(name)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


class Intruder:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.file,)


def _other(file: Path) -> None:
    """Weights of something else."""
    save = save_file if file.suffix == ".safetensors" else torch.save
    save({"weight": torch.ones(2)}, file)


def _without_one(file: Path) -> None:
    reads = load_file if file.suffix == ".safetensors" else torch.load
    state = reads(file)
    inner = state.get("state_dict", state)
    inner.pop(next(name for name in inner if "weight" in name and "proj" not in name))
    (save_file if file.suffix == ".safetensors" else torch.save)(state, file)


@pytest.mark.parametrize("spoil", [Path.unlink, _cut, _other, _without_one], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "hpsv2"])
def test_missing_damaged_and_foreign_weights_are_named(
    name: str, spoil: Callable[[Path], None], tmp_path: Path, pickscore_dir: Path, hpsv2_dir: Path, tiny_arch: str,
    imagereward_dir: Path, aesthetic_dir: Path, open_clip_dir: Path,
    open_clip_tag: Callable[..., str],
) -> None:
    folder, file, load = {
        "pickscore": (pickscore_dir, "model.safetensors", load_pickscore),
        "hpsv2.1": (hpsv2_dir, "HPS_v2.1_compressed.pt", lambda path: load_hpsv2(path, "hpsv2.1", tiny_arch)),
        "imagereward": (imagereward_dir, "ImageReward.pt", lambda path: load_imagereward(path, path)),
        "aesthetic": (aesthetic_dir, "model.safetensors", load_aesthetic),
        "clip": (open_clip_dir, "open_clip_model.safetensors", lambda path: load_open_clip(path, open_clip_tag("tag"))),
    }[name]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / file)
    with pytest.raises(UserError, match=file) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and "download" in str(caught.value)


@pytest.mark.parametrize("version", ["hpsv2", "hpsv2.1"])
def test_a_checkpoint_can_t_run_code(version: str, tmp_path: Path, hpsv2_dir: Path, tiny_arch: str) -> None:
    shutil.copytree(hpsv2_dir, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("*.pt"):
        torch.save(torch.load(file) | {"more": Intruder(tmp_path / "ran")}, file)
    with pytest.raises(UserError, match="holds more than weights"):
        load_hpsv2(tmp_path, version, tiny_arch)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "file"), [("pickscore", "config.json"), ("aesthetic", "config.json"),
                                            ("imagereward", "med_config.json"), ("imagereward", "vocab.txt")])
def test_missing_and_damaged_settings_are_named(
    name: str, file: str, tmp_path: Path, pickscore_dir: Path, imagereward_dir: Path,
    aesthetic_dir: Path,
) -> None:
    folder, load = {
        "pickscore": (pickscore_dir, load_pickscore),
        "imagereward": (imagereward_dir, lambda path: load_imagereward(path, path)),
        "aesthetic": (aesthetic_dir, load_aesthetic),
    }[name]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for spoiled in () if file == "vocab.txt" else ("{", "[1]"):
        (tmp_path / file).write_text(spoiled)
        with pytest.raises(UserError, match=file):
            load(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=f"no {file}"):
        load(tmp_path)


@pytest.mark.parametrize("change", [{"num_attention_heads": 5}, {"hidden_size": "many"}, {"hidden_act": "none"},
                                    {"num_hidden_layers": 1}], ids=str)
@pytest.mark.parametrize("name", ["pickscore", "aesthetic", "imagereward"])
def test_settings_that_don_t_fit_the_weights_are_refused(
    name: str, change: dict[str, object], tmp_path: Path, pickscore_dir: Path, imagereward_dir: Path, aesthetic_dir: Path
) -> None:
    folder, file, load = {
        "pickscore": (pickscore_dir, "config.json", load_pickscore),
        "imagereward": (imagereward_dir, "med_config.json", lambda path: load_imagereward(path, path)),
        "aesthetic": (aesthetic_dir, "config.json", load_aesthetic),
    }[name]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / file).read_text())
    settings.get("vision_config", settings).update(change)
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"doesn't hold the {name} model") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and f"download {name}" in str(caught.value)


def test_a_two_tower_model_moves_as_one(load: Callable[[str], nn.Module]) -> None:
    towers: TwoTowers = load("hpsv2").towers.double()
    assert towers.mean.dtype == towers.std.dtype == towers.logit_scale.dtype == torch.float64
    assert towers.encode_images(torch.rand(1, 3, 50, 40)).dtype == torch.float64


def test_versions_are_those_that_are_installed() -> None:
    versions = Reward("x", lambda images, prompts: images.mean((1, 2, 3))).versions
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0] and set(versions) >= {"transformers", "pillow"}
