"""LoRA files of every layout equal W + up · down · alpha / rank written out by hand, and plain diffusers on the same file."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewardiv.errors import UserError
from rewardiv.lora import adapter_factors, adapter_parameters, load_adapter, load_lora, lora_scale
from rewardiv.lora_formats import PARTS, FileLayer, read_lora
from rewardiv.models import load_model
from rewardiv.publish import export_lora
from rewardiv.registry import LoraEntry, find_lora

Layers = Sequence[FileLayer]
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
                "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out",
                "time_embedding.linear_1", "add_embedding.linear_2")
SOME = ("to_q", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_TARGETS = (*TEXT_ATTENTION, "fc1", "fc2")
FAMILIES = {"sd": "tiny_eps_model_dir", "xl": "tiny_xl_dir"}
PROMPTS = ["a cat face", ""]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    """The pipeline's folder, of each family."""
    return request.getfixturevalue(FAMILIES[request.param])


@pytest.fixture(scope="module")
def base(folder: Path) -> DiffusionPipeline:
    """The pipeline as it is; tests work on copies."""
    return DiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def sd(tiny_eps_model_dir: Path) -> DiffusionPipeline:
    """Stable Diffusion 1's, where one family is enough."""
    return DiffusionPipeline.from_pretrained(tiny_eps_model_dir)


def networks(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {part: getattr(pipe, part) for part in PARTS if getattr(pipe, part, None) is not None}


def copied(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline with networks of its own."""
    return type(pipe)(**(pipe.components | {part: copy.deepcopy(network) for part, network in networks(pipe).items()}))


def random_layers(
    pipe: DiffusionPipeline, *, unet: Sequence[str] = UNET_TARGETS, text: Sequence[str] = TEXT_TARGETS, same: bool = False,
) -> list[FileLayer]:
    """A random LoRA: the rank differs from layer to layer, and so does alpha (3 everywhere, of rank 2, where `same`)."""
    generator = torch.Generator().manual_seed(4)
    layers = []
    for part, network in networks(pipe).items():
        for name, module in network.named_modules():
            if not name.endswith(tuple(unet if part == "unet" else text)) or not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            rank, (out_size, in_size, *kernel) = 2 if same else 1 + len(layers) % 3, module.weight.shape
            down = torch.randn(rank, in_size, *kernel, generator=generator) / module.weight[0].numel() ** 0.5
            up = torch.randn(out_size, rank, *[1] * len(kernel), generator=generator) * 0.3
            full = name if part == "unet" or name.startswith("text_") else f"text_model.{name}"
            layers.append(FileLayer(full, down, up, 3.0 if same else [rank, 0.5, 4.0][len(layers) // 2 % 3], part))
    return layers


def own_name(pipe: DiffusionPipeline, layer: FileLayer) -> str:
    """The layer's name in the pipeline's network: transformers 5 drops "text_model." where nothing else is beside it."""
    network = getattr(pipe, layer.part)
    return layer.name if layer.part == "unet" or hasattr(network, "text_model") else layer.name.removeprefix("text_model.")


def add_by_hand(pipe: DiffusionPipeline, layers: Layers, scale: float = 1.0) -> DiffusionPipeline:
    """W + scale · alpha / rank · up down, the low-rank product written out as one matrix over the flattened kernel."""
    pipe = copied(pipe)
    for layer in layers:
        weight = getattr(pipe, layer.part).get_submodule(own_name(pipe, layer)).weight
        delta = layer.up.flatten(1) @ layer.down.flatten(1)
        weight.data += scale * layer.alpha / len(layer.down) * delta.view(weight.shape)
    return pipe


def output(unet: UNet2DConditionModel) -> Tensor:
    """The UNet's output on fixed inputs of its family."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    embeds = torch.randn(2, 16, unet.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.full((2, 6), 16.0)}
    with torch.no_grad():
        return unet(latents, 400, embeds, added_cond_kwargs=added).sample


def embeddings(pipe: DiffusionPipeline) -> list[Tensor]:
    """What the pipeline's text encoders make of PROMPTS: embeddings, and pooled ones for SDXL."""
    with torch.no_grad():
        if isinstance(pipe, StableDiffusionXLPipeline):
            embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, num_images_per_prompt=1, do_classifier_free_guidance=False,
                                                      device="cpu")
            return [embeds, pooled]
        return [pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]]


# Writers, each from the layout's own conventions and none from the code under test.

def published_name(name: str, layers_per_block: int) -> str:
    """The name of an SDXL UNet's layer in the checkpoint that was published: a list of input, middle and output blocks."""
    roots = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
             "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
             "add_embedding.linear_2": "label_emb.0.2"}
    if name in roots:
        return roots[name]
    inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
             "conv_shortcut": "skip_connection"}
    if middle := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        kind, number, rest = middle.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{inner.get(rest, rest)}"
    side, block, kind, number, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name).groups()
    first = int(block) * (layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{1 + first + layers_per_block}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers_per_block}.2.conv"
    place = f"input_blocks.{1 + first + int(number)}" if side == "down" else f"output_blocks.{first + int(number)}"
    return f"{place}.{int(kind == 'attentions')}.{inner.get(rest, rest)}"


def write_kohya(layers: Layers, folder: Path, rename: Callable[[str], str] = str) -> Path:
    """sd-scripts' file; `rename` gives the UNet's layers other names."""
    prefixes = {"unet": "unet", "text_encoder": "te1" if any(layer.part == PARTS[2] for layer in layers) else "te",
                "text_encoder_2": "te2"}
    state = {}
    for layer in layers:
        name = rename(layer.name) if layer.part == "unet" else layer.name
        name = f"lora_{prefixes[layer.part]}_{name.replace('.', '_')}"
        state |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up,
                  f"{name}.alpha": torch.tensor(layer.alpha)}
    return written(state, folder / "kohya.safetensors")


def write_diffusers(layers: Layers, folder: Path, pipe: DiffusionPipeline) -> Path:
    """diffusers' file with PEFT's settings in its header, under the names that the networks have now."""
    state, settings = {}, {}
    layers = [layer._replace(name=own_name(pipe, layer)) for layer in layers]
    for part in {layer.part for layer in layers}:
        own = [layer for layer in layers if layer.part == part]
        settings |= {f"{part}.r": 1, f"{part}.lora_alpha": 1.0, f"{part}.target_modules": [layer.name for layer in own],
                     f"{part}.rank_pattern": {f"^{layer.name}": len(layer.down) for layer in own},
                     f"{part}.alpha_pattern": {f"^{layer.name}": layer.alpha for layer in own}}
        for layer in own:
            state |= {f"{part}.{layer.name}.lora_A.weight": layer.down, f"{part}.{layer.name}.lora_B.weight": layer.up}
    return written(state, folder / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": json.dumps(settings)})


def write_old(layers: Layers, folder: Path) -> Path:
    """diffusers' attention processors of 2023, which know no alpha."""
    state = {}
    for layer in layers:
        name, _, last = layer.name.removesuffix(".0").rpartition(".")
        kind = last.removeprefix("to_").removesuffix("_proj")
        name = f"{layer.part}.{name}{'.processor' if layer.part == 'unet' else ''}.to_{kind}_lora"
        state |= {f"{name}.down.weight": layer.down, f"{name}.up.weight": layer.up}
    return written(state, folder / "pytorch_lora_weights.safetensors")


def write_layers_of_2023(layers: Layers, folder: Path) -> Path:
    """diffusers' layers of 2023, which came after the attention processors and know no alpha either."""
    state = {}
    for layer in layers:
        name = f"{layer.part}.{layer.name}.{'lora' if layer.part == 'unet' else 'lora_linear_layer'}"
        state |= {f"{name}.down.weight": layer.down, f"{name}.up.weight": layer.up}
    return written(state, folder / "pytorch_lora_weights.safetensors")


def written(state: dict[str, Tensor], file: Path, header: dict[str, str] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, file, header)
    return file


def with_alpha_of_rank(layers: Layers) -> list[FileLayer]:
    return [layer._replace(alpha=float(len(layer.down))) for layer in layers]


Case = Callable[[DiffusionPipeline, Path], tuple[Path, list[FileLayer]]]


def case_kohya(pipe: DiffusionPipeline, folder: Path, **settings: object) -> tuple[Path, list[FileLayer]]:
    layers = random_layers(pipe, **settings)
    return write_kohya(layers, folder), layers


def case_kohya_published(pipe: DiffusionPipeline, folder: Path, **settings: object) -> tuple[Path, list[FileLayer]]:
    """SDXL's own block names; for Stable Diffusion 1.x nobody writes them."""
    layers = random_layers(pipe, **settings)
    return write_kohya(layers, folder, lambda name: published_name(name, pipe.unet.config.layers_per_block)), layers


def case_diffusers(pipe: DiffusionPipeline, folder: Path, **settings: object) -> tuple[Path, list[FileLayer]]:
    layers = random_layers(pipe, **settings)
    return write_diffusers(layers, folder, pipe), layers


def case_old(pipe: DiffusionPipeline, folder: Path, **settings: object) -> tuple[Path, list[FileLayer]]:
    layers = with_alpha_of_rank(random_layers(pipe, **(settings | {"unet": ATTENTION, "text": TEXT_ATTENTION})))
    return write_old(layers, folder), layers


def case_layers(pipe: DiffusionPipeline, folder: Path, **settings: object) -> tuple[Path, list[FileLayer]]:
    layers = with_alpha_of_rank(random_layers(pipe, **settings))
    return write_layers_of_2023(layers, folder), layers


CASES: dict[str, Case] = {"kohya": case_kohya, "published": case_kohya_published, "diffusers": case_diffusers,
                          "processors": case_old, "layers": case_layers}
LAYOUTS = [(family, name) for family in FAMILIES for name in CASES if (family, name) != ("sd", "published")]
every_layout = pytest.mark.parametrize(("folder", "layout"), LAYOUTS, indirect=["folder"])


@contextmanager
def scaled(pipe: DiffusionPipeline, scale: float, name: str = "a") -> Iterator[None]:
    """Inside, every network of the pipeline has the adapter at this scale."""
    with ExitStack() as stack:
        for network in networks(pipe).values():
            stack.enter_context(lora_scale(network, name, scale))
        yield


def everything(pipe: DiffusionPipeline) -> list[Tensor]:
    return [output(pipe.unet), *embeddings(pipe)]


def close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@every_layout
def test_every_layout_is_the_product_added_to_the_weights(layout: str, base: DiffusionPipeline, tmp_path: Path) -> None:
    """Ranks and alphas differ from layer to layer; convolutions and all text encoders are in it."""
    file, layers = CASES[layout](base, tmp_path)
    pipe = copied(base)
    load_lora(networks(pipe), "a", read_lora(file, layers_per_block=1))
    for one, other in zip(everything(pipe), everything(base), strict=True):
        assert torch.equal(one, other), "at rest no adapter is active"
    by_hand = everything(add_by_hand(base, layers, 0.4))
    with scaled(pipe, 0.4):
        close(everything(pipe), by_hand)
    for one, other in zip(by_hand, everything(base), strict=True):
        assert (one - other).abs().mean() > 0.05, "the LoRA is too weak to show anything"


@every_layout
def test_every_layout_is_what_plain_diffusers_makes_of_it(layout: str, base: DiffusionPipeline, tmp_path: Path) -> None:
    """One rank and one alpha for all layers, because diffusers 0.42 gives the attention layers of a kohya file one alpha."""
    file, _ = CASES[layout](base, tmp_path, same=True, unet=SOME)
    pipe, plain = copied(base), copied(base)
    load_lora(networks(pipe), "a", read_lora(file, layers_per_block=1))
    plain.load_lora_weights(str(file), adapter_name="a")
    plain.set_adapters("a", 0.7)
    with scaled(pipe, 0.7):
        close(everything(pipe), everything(plain))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_that_peft_saved(sd: DiffusionPipeline, tmp_path: Path, rslora: bool) -> None:
    """Scaled by alpha / rank, or by alpha / √rank where it is rank-stabilised; patterns by layer win."""
    settings = {"rank_pattern": {"to_k": 5}, "alpha_pattern": {"conv1": 7}, "use_rslora": rslora}
    config = LoraConfig(r=3, lora_alpha=2, target_modules=["to_q", "to_k", "conv1"], init_lora_weights=False, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        trained = get_peft_model(copied(sd).unet, config)
    trained.save_pretrained(tmp_path)
    by_hand = copied(sd).unet
    for key, down in load_file(tmp_path / "adapter_model.safetensors").items():
        if ".lora_A." not in key:
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        up = load_file(tmp_path / "adapter_model.safetensors")[key.replace("lora_A", "lora_B")]
        rank, alpha = 5 if name.endswith("to_k") else 3, 7 if name.endswith("conv1") else 2
        weight = by_hand.get_submodule(name).weight
        weight.data += alpha / (rank**0.5 if rslora else rank) * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        unet = copied(sd).unet
        load_adapter(unet, "a", path)
        with lora_scale(unet, "a", 1.0):
            close([output(unet), output(unet)], [output(by_hand), output(trained)])
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="adapter_config.json with the alpha is missing"):
        read_lora(tmp_path)


def test_unprefixed_attention_processors_of_2023_are_the_unets(sd: DiffusionPipeline, tmp_path: Path) -> None:
    layers = with_alpha_of_rank(random_layers(sd, unet=ATTENTION, text=()))
    state = load_file(write_old(layers, tmp_path))
    file = written({key.removeprefix("unet."): tensor for key, tensor in state.items()}, tmp_path / "bare.safetensors")
    assert {layer.name for layer in read_lora(file).layers} == {layer.name for layer in layers}


def full_unet(xl: bool) -> UNet2DConditionModel:
    """Every layer of Stable Diffusion 1's or SDXL's UNet by its name, narrow and without memory."""
    wide = {"block_out_channels": (32, 64, 128, 128), "norm_num_groups": 8, "attention_head_dim": 8, "cross_attention_dim": 16}
    as_xl = {
        "block_out_channels": (32, 64, 128), "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    with torch.device("meta"):
        return UNet2DConditionModel(**(wide | as_xl if xl else wide))


@pytest.mark.parametrize(("xl", "published"), [(False, False), (True, False), (True, True)])
def test_every_layer_of_the_real_networks_is_found_by_its_kohya_name(xl: bool, published: bool, tmp_path: Path) -> None:
    unet = full_unet(xl)
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    one = torch.ones(1, 1)
    layers = [FileLayer(name, one, one, 1.0) for name in names]
    file = write_kohya(layers, tmp_path, (lambda name: published_name(name, 2)) if published else str)
    assert len(names) == (794 if xl else 282)
    assert sorted(layer.name for layer in read_lora(file).layers) == sorted(names)


def test_a_file_with_both_kinds_of_block_names_keeps_all(tmp_path: Path) -> None:
    one = torch.ones(1, 1)
    names = ["down_blocks.1.attentions.0.proj_in", "mid_block.attentions.0.proj_in", "up_blocks.0.attentions.2.proj_in"]
    layers = [FileLayer(name, one, one, 1.0) for name in names]
    file = write_kohya(layers, tmp_path, lambda name: name if "mid" in name else published_name(name, 2))
    assert sorted(layer.name for layer in read_lora(file).layers) == sorted(names)


def test_alpha_counts_as_the_rank_where_a_layer_has_none_and_may_be_an_integer(tmp_path: Path) -> None:
    state = {}
    for name in ("to_q", "to_k"):
        state |= {f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_{name}.lora_{side}.weight": torch.ones(4, 4)
                  for side in ("down", "up")}
    state["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.alpha"] = torch.tensor(2)
    layers = read_lora(written(state, tmp_path / "a.safetensors")).layers
    assert {layer.name[-4:]: layer.alpha for layer in layers} == {"to_q": 4.0, "to_k": 2.0}


def test_a_linear_layer_and_a_convolution_of_one_pixel_are_the_same(base: DiffusionPipeline, tmp_path: Path) -> None:
    """The projections of Stable Diffusion 1 are convolutions, SDXL's are linear, and files hold either."""
    layers = random_layers(base, unet=("proj_in", "proj_out"), text=())
    linear = base.unet.config.use_linear_projection
    turned = [layer._replace(down=layer.down[:, :, None, None], up=layer.up[:, :, None, None]) if linear else
              layer._replace(down=layer.down.flatten(1), up=layer.up.flatten(1)) for layer in layers]
    unet = copied(base).unet
    load_adapter(unet, "a", write_kohya(turned, tmp_path))
    with lora_scale(unet, "a", 1.0):
        close([output(unet)], [output(add_by_hand(base, layers).unet)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_file_in_few_bits_is_what_its_numbers_say(sd: DiffusionPipeline, tmp_path: Path, dtype: torch.dtype) -> None:
    layers = random_layers(sd, unet=SOME, text=())
    layers = [layer._replace(down=layer.down.to(dtype), up=layer.up.to(dtype)) for layer in layers]
    unet = copied(sd).unet
    load_adapter(unet, "a", write_kohya(layers, tmp_path))
    widened = [layer._replace(down=layer.down.float(), up=layer.up.float()) for layer in layers]
    with lora_scale(unet, "a", 1.0):
        close([output(unet)], [output(add_by_hand(sd, widened).unet)])


def test_an_adapter_takes_the_type_of_the_layers_that_it_changes(sd: DiffusionPipeline, tmp_path: Path) -> None:
    unet = copied(sd).unet.bfloat16()
    load_adapter(unet, "a", write_kohya(random_layers(sd, unet=SOME, text=()), tmp_path))
    weights = adapter_parameters(unet, "a")
    assert {weight.dtype for weight in weights} == {torch.bfloat16} and not any(weight.requires_grad for weight in weights)


def test_the_kohya_export_comes_back_the_same(base: DiffusionPipeline, tmp_path: Path) -> None:
    """Text encoders, convolutions, ranks and alphas included; plain diffusers takes the file too."""
    layers = random_layers(base, unet=SOME, same=True)
    file = export_lora(write_diffusers(layers, tmp_path / "given", base), tmp_path / "out", "kohya")
    back = {(layer.part, layer.name): layer for layer in read_lora(file).layers}
    assert back.keys() == {(layer.part, layer.name) for layer in layers}
    for layer in layers:
        other = back[layer.part, layer.name]
        assert torch.equal(other.down, layer.down) and torch.equal(other.up, layer.up) and other.alpha == layer.alpha
    plain = copied(base)
    plain.load_lora_weights(str(file))
    close(everything(plain), everything(add_by_hand(base, layers)))


ATTN = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(("key", "kind"), [
    (f"{ATTN}.hada_w1_a", "LoHa"),
    (f"{ATTN}.lokr_w1", "LoKr"),
    (f"{ATTN}.dora_scale", "DoRA"),
    ("unet.conv_in.lora_magnitude_vector.weight", "DoRA"),
    (f"{ATTN}.lora_mid.weight", "Tucker"),
    (f"{ATTN}.diff", "full weight differences"),
    (f"{ATTN}.diff_b", "full weight differences"),
    (f"{ATTN}.oft_blocks", "OFT"),
    (f"{ATTN}.on_input", "IA³"),
    (f"{ATTN}.a1.weight", "GLoRA"),
    (f"{ATTN}.w_norm", "normalisation layers"),
    ("unet.conv_in.lora_B.bias", "bias terms"),
    ("base_model.model.conv_in.modules_to_save.weight", "modules_to_save"),
    ("bundle_emb.word.string_to_param.*", "textual inversion"),
    ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "FLUX"),
    ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "FLUX"),
    ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "Stable Diffusion 3"),
])
def test_other_kinds_of_files_are_refused_by_name(key: str, kind: str, tmp_path: Path) -> None:
    pair = {f"{ATTN}.lora_down.weight": torch.ones(2, 4), f"{ATTN}.lora_up.weight": torch.ones(4, 2)}
    file = written(pair | {key: torch.ones(2, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        read_lora(file)
    assert kind in str(caught.value) and key in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize(("settings", "kind"), [({"peft_type": "LOHA"}, "LOHA"), ({"use_dora": True}, "DoRA")])
def test_other_kinds_by_pefts_settings_are_refused_by_name(settings: dict, kind: str, tmp_path: Path) -> None:
    written({f"base_model.model.conv_in.lora_{side}.weight": torch.ones(2, 2) for side in "AB"},
            tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2} | settings))
    with pytest.raises(UserError, match=kind):
        read_lora(tmp_path)


def pair(name: str, width: int = 4, rank: int = 2) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(rank, width), f"{name}.lora_B.weight": torch.ones(4, rank)}


@pytest.mark.parametrize(("state", "words"), [
    ({}, "is empty"),
    ({"unet.conv_in.weight": torch.ones(2, 2)}, "in no layout that is known .* 'unet.conv_in.weight'"),
    ({"lora_unet_conv_in.strange": torch.ones(2, 2)}, "'lora_unet_conv_in.strange'"),
    ({f"lora_unet_nowhere_at_all.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}, "no Stable Diffusion"),
    ({f"lora_unet_input_blocks_x_1.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}, "no Stable Diffusion"),
    (pair("unet.conv_in") | {"unet.conv_in.alpha": torch.ones(3)}, "the alpha of conv_in isn't one number"),
    (pair("unet.conv_in") | {"unet.conv_in.alpha": torch.tensor(torch.inf)}, "aren't finite"),
    (pair("unet.conv_in") | {"unet.conv_in.lora_B.weight": torch.ones(4, 3)}, "do not multiply"),
    (pair("unet.conv_in") | {"unet.conv_in.lora_A.weight": torch.ones(())}, "do not multiply"),
    ({"unet.conv_in.lora_A.weight": torch.ones(2, 4)}, "conv_in lacks its A or B"),
    (pair("unet.conv_in") | {"unet.conv_in.lora.down.weight": torch.zeros(2, 4)}, "two different weights of conv_in"),
])
def test_damaged_files_are_refused_in_a_sentence(state: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_lora(written(state, tmp_path / "a.safetensors"))
    assert "\n" not in str(caught.value) and "a.safetensors" in str(caught.value)


def test_a_folder_is_read_where_it_leaves_no_choice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no pytorch_lora_weights.safetensors"):
        read_lora(tmp_path)
    only = written(pair("unet.conv_in"), tmp_path / "only.safetensors")
    assert read_lora(tmp_path).file == only
    written(pair("unet.conv_in"), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="several LoRA files; name one of only.safetensors, other.safetensors"):
        read_lora(tmp_path)
    chosen = written(pair("unet.conv_in"), tmp_path / "pytorch_lora_weights.safetensors")
    assert read_lora(tmp_path).file == chosen


@pytest.mark.parametrize(("width", "of_file", "model", "of_model"), [
    (2048, "SDXL", 768, "Stable Diffusion 1.x"), (768, "Stable Diffusion 1.x", 2048, "SDXL"),
    (1024, "Stable Diffusion 2.x", 768, "Stable Diffusion 1.x"), (768, "Stable Diffusion 1.x", 1024, "Stable Diffusion 2.x"),
    (768, "Stable Diffusion 1.x", 32, "a model of its own"),
])
def test_a_lora_of_another_family_is_refused_with_both_named(
    width: int, of_file: str, model: int, of_model: str, tmp_path: Path,
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8, cross_attention_dim=model,
        )
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    layer = FileLayer(name, torch.ones(2, width), torch.ones(32, 2), 1.0)
    with pytest.raises(UserError) as caught:
        load_adapter(unet, "a", write_kohya([layer], tmp_path), model_name="the model 'mine'")
    assert str(caught.value).endswith(
        f"made for {of_file} (cross-attention width {width}); the model 'mine' is {of_model} (cross-attention width {model})"
    )


def test_a_second_text_encoder_tells_sdxl(sd: DiffusionPipeline, tmp_path: Path) -> None:
    layers = random_layers(sd, unet=("conv_in",), text=())
    layers.append(FileLayer("text_projection", torch.ones(2, 4), torch.ones(4, 2), 1.0, "text_encoder_2"))
    with pytest.raises(UserError, match=r"made for SDXL \(a second text encoder\); this model is a model of its own .* 32\)"):
        load_adapter(copied(sd).unet, "a", write_kohya(layers, tmp_path))


def test_a_part_that_does_not_fit_leaves_every_network_as_it_was(sd: DiffusionPipeline, tmp_path: Path) -> None:
    pipe = copied(sd)
    layers = random_layers(sd, same=True)
    wrong = [layer._replace(down=torch.ones(2, 33)) if layer.name.endswith("1.mlp.fc1") else layer for layer in layers]
    file = write_kohya(wrong, tmp_path)
    with pytest.raises(UserError, match=r"encoder.layers.1.mlp.fc1 maps \[33\] to 64 channels there, \[32\] to 64 here"):
        load_lora(networks(pipe), "a", read_lora(file))
    assert not any(hasattr(network, "peft_config") for network in networks(pipe).values())
    with pytest.raises(UserError, match="changes text encoders only"):
        load_lora(networks(pipe), "a", read_lora(write_kohya([layer for layer in layers if layer.part != "unet"], tmp_path)))


def test_a_lora_from_the_hub_is_found_in_its_cache(
    sd: DiffusionPipeline, tiny_eps_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cache holds links to files called by their checksum; PEFT's settings lie beside the link, not beside the file."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, name = tmp_path / "models--owner--name", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("f" * 40)
    snapshot = repo / "snapshots" / ("f" * 40)
    snapshot.mkdir(parents=True)
    size = sd.unet.get_submodule(name).in_features
    peft = {f"base_model.model.{name}.lora_A.weight": torch.ones(2, size),
            f"base_model.model.{name}.lora_B.weight": torch.ones(size, 2)}
    other = FileLayer(name, torch.ones(1, size), torch.ones(size, 1), 5.0)
    blobs = {"adapter_model.safetensors": written(peft, repo / "blobs" / "0123"),
             "other.safetensors": write_kohya([other], repo / "blobs")}
    for file, blob in blobs.items():
        (snapshot / file).symlink_to(blob)
    (snapshot / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "peft_type": "LORA"}))
    model = load_model(str(tiny_eps_model_dir))
    for text, scaling in (("owner/name", 3.0), ("owner/name/other.safetensors", 5.0)):
        assert adapter_factors(model.unet, model.use_lora(find_lora(text)))[0][2] == scaling
    assert export_lora("owner/name", tmp_path / "out", "kohya") == tmp_path / "out" / "name.safetensors"
    assert read_lora(tmp_path / "out").layers[0].alpha == 6.0
    with pytest.raises(UserError, match="owner/absent isn't on this machine.* `python -m rewardiv download owner/absent"):
        model.use_lora(find_lora("owner/absent"))


def test_rows_of_a_batch_see_the_text_as_their_own_scale_has_it(folder: Path, base: DiffusionPipeline, tmp_path: Path) -> None:
    """As plain diffusers at each scale, embeddings and UNet together; base rows are the base model's, bit for bit.

    In fp64: guidance magnifies what fp32 rounds, on a CPU with AVX-512 to more than 1e-5."""
    file, _ = case_kohya(base, tmp_path, same=True, unet=("to_q", "to_v", "conv1"))
    model = load_model(str(folder), dtype=torch.float64)
    cond, negative = model.encode_prompts(PROMPTS).split(1)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double().expand(4, -1, -1, -1)
    t, index, settings = torch.tensor(500), torch.zeros(4, dtype=torch.long), {"guidance_scale": 3.0}
    before = model.predictor(cond, negative, adapter=None, **settings)(latents, t, torch.zeros(4), index)
    adapter = model.use_lora(LoraEntry("text", str(file), "", "", ""))
    predict = model.predictor(cond, negative, adapter=adapter, **settings)
    with torch.no_grad():
        rows = predict(latents, t, torch.tensor([0.0, 1.0, 0.5, 0.0]), index)
    assert torch.equal(rows[0], before[0]) and torch.equal(rows[3], before[3])
    assert torch.equal(model.encode_prompts(PROMPTS).embeds, torch.cat([cond.embeds, negative.embeds]))
    plain = copied(base)
    plain.load_lora_weights(str(file), adapter_name="a")
    plain.to(torch.float64)
    for row, scale in ((1, 1.0), (2, 0.5)):
        plain.set_adapters("a", scale)
        close([rows[row : row + 1]], [guided(plain, latents[:1], t)])
    own = model.predictor(cond, negative, adapter={adapter: 0.5}, **settings)
    with torch.no_grad():
        close([own(latents[:1], t, torch.ones(1), index[:1])], [rows[2:3]])


def guided(pipe: DiffusionPipeline, latents: Tensor, t: Tensor) -> Tensor:
    """Classifier-free guidance at 3, from the pipeline's own prompt encoding."""
    with torch.no_grad():
        embeds, *pooled = embeddings(pipe)
        if pooled and pipe.config.force_zeros_for_empty_prompt:
            embeds, pooled = embeds * torch.tensor([1, 0])[:, None, None], [pooled[0] * torch.tensor([1, 0])[:, None]]
        added = {"text_embeds": pooled[0], "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]] * 2)} if pooled else None
        positive, negative = pipe.unet(latents.repeat(2, 1, 1, 1), t, embeds, added_cond_kwargs=added).sample.split(1)
    return negative + 3 * (positive - negative)
