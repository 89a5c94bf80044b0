"""Adapters: one scale a row equals separate calls, state always comes back, files are diffusers' own."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewardiv.errors import UserError
from rewardiv.lora import (
    adapter_factors,
    adapter_parameters,
    attach_adapter,
    dropping,
    load_adapter,
    lora_scale,
    remove_adapter,
    save_adapter,
)
from rewardiv.lora_formats import read_lora

FILE = "pytorch_lora_weights.safetensors"
TARGETS = ("to_q", "to_out.0", "conv1", "time_emb_proj")


@pytest.fixture()
def unet(tiny_model_dir: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_model_dir, subfolder="unet").requires_grad_(False)


@pytest.fixture()
def tuned(unet: UNet2DConditionModel, tiny_lora_dir: Path) -> UNet2DConditionModel:
    load_adapter(unet, "a", tiny_lora_dir)
    return unet


def inputs(rows: int) -> tuple[Tensor, int, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, 4, 8, 8, generator=generator), 400, torch.randn(rows, 16, 32, generator=generator)


def output(unet: UNet2DConditionModel, rows: int = 4) -> Tensor:
    with torch.no_grad():
        return unet(*inputs(rows)).sample


def state_of(unet: UNet2DConditionModel) -> list[object]:
    """All that lora_scale may touch."""
    layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    return [(dict(layer.scaling), list(layer.active_adapters), layer.disable_adapters, len(layer._forward_pre_hooks))
            for layer in layers]


def randomise(unet: UNet2DConditionModel, name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter_parameters(unet, name):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def test_a_scale_per_row_equals_separate_calls(tuned: UNet2DConditionModel) -> None:
    scales = torch.tensor([0.0, 0.5, 1.0, 1.7])
    with lora_scale(tuned, "a", scales):
        together = output(tuned)
    for k, scale in enumerate(scales.tolist()):
        with lora_scale(tuned, "a", scale):
            apart = output(tuned)[k]
        torch.testing.assert_close(together[k], apart, atol=1e-5, rtol=1e-5)
    assert (together[2] - output(tuned)[2]).abs().mean() > 0.1, "the LoRA is too weak to show anything"


def test_scale_zero_is_the_base_model_bit_for_bit(unet: UNet2DConditionModel, tiny_lora_dir: Path) -> None:
    before = output(unet)
    load_adapter(unet, "a", tiny_lora_dir)
    assert torch.equal(output(unet), before), "at rest no adapter is active"
    for scale in (0, torch.zeros(4)):
        with lora_scale(unet, "a", scale):
            assert torch.equal(output(unet), before)
    with lora_scale(unet, None, 1.0):
        assert torch.equal(output(unet), before)
    with lora_scale(unet, "a", torch.tensor([0.0, 1.0, 0.0, 1.0])):
        mixed = output(unet)
    assert torch.equal(mixed[::2], before[::2])


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_a_scale_means_what_it_means_in_diffusers(
    tuned: UNet2DConditionModel, tiny_model_dir: Path, tiny_lora_dir: Path, scale: float,
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model_dir)
    pipe.load_lora_weights(tiny_lora_dir, adapter_name="a")
    pipe.set_adapters("a", scale)
    with lora_scale(tuned, "a", scale):
        torch.testing.assert_close(output(tuned), output(pipe.unet), atol=1e-6, rtol=1e-5)


def test_everything_is_restored_also_after_an_exception(tuned: UNet2DConditionModel, second_lora_dir: Path) -> None:
    load_adapter(tuned, "b", second_lora_dir)
    before = state_of(tuned)
    for scale in (0.0, 0.5, torch.tensor([0.2, 0.8, 1.0, 0.0])):
        with pytest.raises(RuntimeError, match="inside"), lora_scale(tuned, "a", scale):
            output(tuned)
            raise RuntimeError("inside")
        assert state_of(tuned) == before
    with pytest.raises(ValueError, match="3 LoRA scales for a batch of 4"), lora_scale(tuned, "a", torch.arange(3) / 2):
        output(tuned)
    with pytest.raises(KeyError, match="no adapter 'c'"), lora_scale(tuned, "c", 1.0):
        output(tuned)
    assert state_of(tuned) == before


def test_a_scale_inside_a_scale_comes_back(tuned: UNet2DConditionModel) -> None:
    with lora_scale(tuned, "a", 1.0):
        outer = output(tuned)
        with lora_scale(tuned, "a", 0.0):
            assert not torch.equal(output(tuned), outer)
        assert torch.equal(output(tuned), outer)


def test_adapters_side_by_side_do_not_mix(tuned: UNet2DConditionModel, second_lora_dir: Path) -> None:
    with lora_scale(tuned, "a", 1.0):
        alone = output(tuned)
    load_adapter(tuned, "b", second_lora_dir)
    with lora_scale(tuned, "a", 1.0):
        assert torch.equal(output(tuned), alone)
    with lora_scale(tuned, "b", 1.0):
        assert not torch.allclose(output(tuned), alone, atol=1e-2)
    remove_adapter(tuned, "b")
    with lora_scale(tuned, "a", 1.0):
        assert torch.equal(output(tuned), alone)
    with pytest.raises(KeyError):
        adapter_parameters(tuned, "b")


@pytest.fixture()
def pair(tuned: UNet2DConditionModel, sparse_lora_dir: Path) -> UNet2DConditionModel:
    """A UNet with the adapters "a" and "b", the second one on fewer layers."""
    load_adapter(tuned, "b", sparse_lora_dir)
    return tuned


@pytest.fixture(scope="module")
def sparse_lora_dir(second_lora_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    state = {key: tensor for key, tensor in load_file(second_lora_dir / FILE).items() if "attn" in key or "conv1" in key}
    save_file(state, folder / FILE)
    return folder


def add_by_hand(unet: UNet2DConditionModel, file: Path, factor: float) -> None:
    """W + factor · B A for every layer of a file without alphas."""
    state = load_file(file)
    for key in (key for key in state if ".lora_A." in key):
        weight = unet.get_submodule(key.removeprefix("unet.").removesuffix(".lora_A.weight")).weight
        weight.data += factor * (state[key.replace("lora_A", "lora_B")].flatten(1) @ state[key].flatten(1)).view(weight.shape)


@pytest.mark.parametrize(("first", "second", "scale"), [(1.0, 1.0, 1.0), (0.7, -0.4, 0.5)])
def test_several_loras_are_the_sum_of_their_changes(
    pair: UNet2DConditionModel, tiny_model_dir: Path, tiny_lora_dir: Path, sparse_lora_dir: Path, first: float,
    second: float, scale: float,
) -> None:
    by_hand = UNet2DConditionModel.from_pretrained(tiny_model_dir, subfolder="unet")
    add_by_hand(by_hand, tiny_lora_dir / FILE, scale * first)
    add_by_hand(by_hand, sparse_lora_dir / FILE, scale * second)
    with lora_scale(pair, {"a": first, "b": second}, scale):
        together = output(pair)
    torch.testing.assert_close(together, output(by_hand), atol=1e-5, rtol=1e-5)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model_dir)
    pipe.load_lora_weights(tiny_lora_dir, adapter_name="a")
    pipe.load_lora_weights(sparse_lora_dir, adapter_name="b")
    pipe.set_adapters(["a", "b"], [scale * first, scale * second])
    torch.testing.assert_close(together, output(pipe.unet), atol=1e-5, rtol=1e-5)


def test_the_order_of_loras_is_nothing_and_weight_zero_is_absence(pair: UNet2DConditionModel) -> None:
    base = output(pair)

    def at(adapters: dict[str, float] | str, scale: float | Tensor = 1.0) -> Tensor:
        with lora_scale(pair, adapters, scale):
            return output(pair)

    rows = torch.tensor([0.0, 0.5, 1.0, 0.0])
    for scale in (1.0, 0.3, rows):
        assert torch.equal(at({"a": 0.7, "b": 0.4}, scale), at({"b": 0.4, "a": 0.7}, scale))
        assert torch.equal(at({"a": 1.0, "b": 0.0}, scale), at("a", scale))
        assert torch.equal(at({"a": 0.0, "b": 0.0}, scale), base)
        assert torch.equal(at({}, scale), base)
    assert not torch.allclose(at({"a": 1.0, "b": 1.0}), at("a"), atol=1e-2)


def test_several_loras_at_a_scale_per_row_equal_separate_calls(pair: UNet2DConditionModel) -> None:
    base, before = output(pair), state_of(pair)
    adapters, scales = {"a": 0.8, "b": -0.5}, torch.tensor([0.0, 0.5, 1.0, 1.7])
    with lora_scale(pair, adapters, scales):
        together = output(pair)
    assert state_of(pair) == before
    assert torch.equal(together[0], base[0])
    for k, scale in enumerate(scales.tolist()):
        with lora_scale(pair, adapters, scale):
            torch.testing.assert_close(together[k], output(pair)[k], atol=1e-5, rtol=1e-5)
    with pytest.raises(KeyError, match="no adapter 'c'"), lora_scale(pair, {"a": 1.0, "c": 0.0}, 1.0):
        output(pair)
    with pytest.raises(RuntimeError, match="inside"), lora_scale(pair, adapters, scales):
        output(pair)
        raise RuntimeError("inside")
    assert state_of(pair) == before


def test_a_new_adapter_changes_nothing_and_is_the_only_thing_that_learns(
    tuned: UNet2DConditionModel, tiny_lora_dir: Path,
) -> None:
    base = output(tuned)
    attach_adapter(tuned, "new", rank=2, alpha=4, targets=TARGETS)
    with lora_scale(tuned, "new", 1.0):
        assert torch.equal(output(tuned), base)
    trainable = {id(parameter) for parameter in tuned.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in adapter_parameters(tuned, "new")}
    load_adapter(tuned, "later", tiny_lora_dir)
    assert trainable == {id(parameter) for parameter in tuned.parameters() if parameter.requires_grad}


def test_a_new_adapter_depends_on_its_seed_alone(unet: UNet2DConditionModel) -> None:
    twin = copy.deepcopy(unet)
    attach_adapter(unet, "a", rank=2, alpha=2, targets=TARGETS, seed=4)
    torch.manual_seed(99)
    attach_adapter(twin, "other", rank=2, alpha=2, targets=TARGETS, seed=4)
    attach_adapter(twin, "b", rank=2, alpha=2, targets=TARGETS, seed=5)
    first, same = adapter_parameters(unet, "a"), adapter_parameters(twin, "other")
    different = adapter_parameters(twin, "b")
    assert all(torch.equal(p, q) for p, q in zip(first, same, strict=True))
    assert not torch.equal(first[0], different[0])


def test_a_target_that_matches_nothing_is_refused(unet: UNet2DConditionModel) -> None:
    for target in ("to_quick", "attentions", "norm1"):
        with pytest.raises(UserError, match=f"'{target}' matches no"):
            attach_adapter(unet, "a", rank=2, alpha=2, targets=("to_q", target))
    assert not hasattr(unet, "peft_config")


@pytest.mark.parametrize("alpha", [4, 1, 7.5])
def test_a_saved_adapter_is_the_same_here_and_in_plain_diffusers(
    unet: UNet2DConditionModel, tiny_model_dir: Path, tmp_path: Path, alpha: float,
) -> None:
    clean = copy.deepcopy(unet)
    attach_adapter(unet, "a", rank=4, alpha=alpha, targets=TARGETS)
    randomise(unet, "a")
    with lora_scale(unet, "a", 1.0):
        expected = output(unet)
    file = save_adapter(unet, "a", tmp_path / "saved")
    assert file == tmp_path / "saved" / FILE
    load_adapter(clean, "b", tmp_path / "saved")
    with lora_scale(clean, "b", 1.0):
        torch.testing.assert_close(output(clean), expected, atol=1e-6, rtol=1e-6)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model_dir)
    pipe.load_lora_weights(str(tmp_path / "saved"))
    torch.testing.assert_close(output(pipe.unet), expected, atol=1e-5, rtol=1e-5)


def test_a_row_of_scale_zero_gives_the_adapter_no_gradient(unet: UNet2DConditionModel) -> None:
    attach_adapter(unet, "a", rank=2, alpha=2, targets=TARGETS)
    randomise(unet, "a")
    with lora_scale(unet, "a", torch.tensor([0.0, 1.0])):
        outputs = unet(*inputs(2)).sample
    parameters = adapter_parameters(unet, "a")
    for row, moves in ((0, False), (1, True)):
        gradients = torch.autograd.grad(outputs[row].sum(), parameters, retain_graph=True)
        assert all(bool(gradient.any()) == moves for gradient in gradients)


def test_factors_multiply_to_the_weight_changes(tuned: UNet2DConditionModel) -> None:
    changes = [module.get_delta_weight("a") for module in tuned.modules() if isinstance(module, LoraLayer)]
    for (down, up, scaling), change in zip(adapter_factors(tuned, "a"), changes, strict=True):
        torch.testing.assert_close(scaling * (up @ down), change.flatten(1))


def test_dropout_drops_inside_dropping_only(unet: UNet2DConditionModel) -> None:
    attach_adapter(unet, "a", rank=2, alpha=2, targets=TARGETS, dropout=0.5)
    randomise(unet, "a")
    with lora_scale(unet, "a", 1.0):
        plain = output(unet)
        with pytest.raises(KeyError, match="inside"), dropping(unet, "a"):
            assert not torch.equal(output(unet), output(unet))
            raise KeyError("inside")
        assert torch.equal(output(unet), plain)


def test_a_loaded_adapter_saves_as_itself(
    unet: UNet2DConditionModel, tiny_model_dir: Path, tmp_path: Path,
) -> None:
    """Ranks and alphas that differ from layer to layer stay with their layers."""
    state, settings = {}, {"unet.r": 1, "unet.lora_alpha": 1.0, "unet.rank_pattern": {}, "unet.alpha_pattern": {}}
    generator = torch.Generator().manual_seed(6)
    for k, name in enumerate(name for name, module in unet.named_modules() if name.endswith(("to_q", "to_k", "conv1"))):
        out_size, in_size, *kernel = unet.get_submodule(name).weight.shape
        rank = settings["unet.rank_pattern"][f"^{name}"] = 1 + k % 3
        settings["unet.alpha_pattern"][f"^{name}"] = 0.5 + k % 4
        state |= {f"unet.{name}.lora_A.weight": torch.randn(rank, in_size, *kernel, generator=generator) * 0.1,
                  f"unet.{name}.lora_B.weight": torch.randn(out_size, rank, *[1] * len(kernel), generator=generator)}
    given = tmp_path / FILE
    save_file(state, given, metadata={"lora_adapter_metadata": json.dumps(settings)})
    load_adapter(unet, "a", given)
    saved = save_adapter(unet, "a", tmp_path / "again")
    for layer, again in zip(read_lora(given).layers, read_lora(saved).layers, strict=True):
        assert layer.name == again.name and layer.alpha == again.alpha
        assert torch.equal(layer.down, again.down) and torch.equal(layer.up, again.up)


def test_a_lora_for_another_model_is_refused_naming_both(wide_model_dir: Path, tiny_lora_dir: Path) -> None:
    wide = UNet2DConditionModel.from_pretrained(wide_model_dir, subfolder="unet")
    with pytest.raises(UserError, match="another model than the model 'wide'") as caught:
        load_adapter(wide, "a", tiny_lora_dir, model_name="the model 'wide'")
    assert str(tiny_lora_dir) in str(caught.value)
    assert not any(isinstance(module, LoraLayer) for module in wide.modules())


def test_unusable_files_are_refused_with_their_name(
    unet: UNet2DConditionModel, tiny_lora_dir: Path, tmp_path: Path,
) -> None:
    good = load_file(tiny_lora_dir / FILE)
    key = next(iter(good))
    whole = (tiny_lora_dir / FILE).read_bytes()
    bad = {
        "truncated": whole[: len(whole) // 2], "empty": b"", "text": b"version https://git-lfs.github.com/spec/v1\n",
        "nan": good | {key: torch.full_like(good[key], torch.nan)},
        "half-a-pair": {name: tensor for name, tensor in good.items() if name != key},
        "kohya": {"lora_unet_mid_block.lora_down.weight": torch.zeros(2, 2)},
        "text-encoder": good | {"text_encoder.x.lora_A.weight": torch.zeros(2, 2)},
        "unknown-layer": {f"unet.nowhere.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"},
    }
    for name, content in bad.items():
        file = tmp_path / f"{name}.safetensors"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            save_file(content, file)
        with pytest.raises(UserError) as caught:
            load_adapter(unet, "a", file)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no LoRA file"):
        load_adapter(unet, "a", tmp_path / "absent.safetensors")
    broken = tmp_path / "settings.safetensors"
    save_file(good, broken, metadata={"lora_adapter_metadata": json.dumps({"unet.r": 9, "unet.lora_alpha": 9})})
    with pytest.raises(UserError, match="damaged"):
        load_adapter(unet, "a", broken)
    load_adapter(unet, "a", tiny_lora_dir)  # a refusal leaves nothing behind


def test_layers_of_the_tiny_lora_cover_every_input_shape(tuned: UNet2DConditionModel) -> None:
    bases = [module.get_base_layer() for module in tuned.modules() if isinstance(module, LoraLayer)]
    names = [name for name, module in tuned.named_modules() if isinstance(module, LoraLayer)]
    assert any(isinstance(base, nn.Conv2d) for base in bases)
    assert any(name.endswith("time_emb_proj") for name in names) and any(name.endswith("attn2.to_k") for name in names)
