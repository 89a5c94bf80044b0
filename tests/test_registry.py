"""Names and paths become entries, or one clear sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rewardiv import registry
from rewardiv.errors import UserError
from rewardiv.hub import Source, parse_hub_id
from rewardiv.registry import (
    LORAS,
    MODELS,
    REWARDS,
    ROOT,
    ModelEntry,
    find_lora,
    find_model,
    find_reward,
    is_here,
    known,
    place_of,
    size_text,
    state_of,
)


def test_what_belongs_together_is_named_alike() -> None:
    assert (ROOT / "rewardiv" / "registry.py").is_file()
    for table in (MODELS, LORAS, REWARDS):
        assert all(entry.name == name for name, entry in table.items())
    for lora in LORAS.values():
        assert lora.model in MODELS and lora.reward in REWARDS
    assert {"sd14", "sd15", "sd21", "sdxl", "sd-turbo", "sdxl-turbo"} < set(MODELS)
    assert {"pickscore", "hpsv2", "hpsv2.1", "imagereward", "aesthetic", "clip", "jpeg", "colorfulness"} < set(REWARDS)


def test_what_comes_from_the_hub_says_licence_size_and_source() -> None:
    for entry in known().entries():
        assert bool(entry.sources) == bool(entry.size_gib)
        assert (entry.licence or entry.path is None) and entry.about
        for source in entry.sources:
            assert parse_hub_id(str(source), source.kind), source
    for model in MODELS.values():
        assert model.family in ("sd1", "sd2", "sdxl")


def test_a_hub_size_is_that_of_the_weights_in_32_bit() -> None:
    """Counted from the numbers of weights of the published configurations."""
    unet, vae, checker = {"sd1": 859.5e6, "sd2": 865.9e6, "sdxl": 2567.5e6}, 83.7e6, 304.0e6
    text = {"sd1": 123.1e6, "sd2": 340.4e6, "sdxl": 123.1e6 + 694.7e6}
    for name, model in MODELS.items():
        if model.sources:
            weights = unet[model.family] + text[model.family] + vae + (checker if name in ("sd14", "sd15") else 0)
            assert model.size_gib == pytest.approx(4 * weights / 2**30, rel=0.02), name


def test_a_folder_gives_an_entry_of_its_own(tiny_model_dir: Path, tiny_lora_dir: Path) -> None:
    assert find_model(str(tiny_model_dir)).path == str(tiny_model_dir)
    for path in (tiny_lora_dir, tiny_lora_dir / "pytorch_lora_weights.safetensors"):
        entry = find_lora(str(path))
        assert (entry.path, entry.model, entry.reward) == (str(path), "", "")
        assert is_here(entry)


def test_the_path_of_a_built_in_thing_means_that_thing(
    tiny_model_dir: Path, tiny_lora_dir: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    built_in = ModelEntry("built-in", str(tiny_model_dir), "", "")
    monkeypatch.setitem(MODELS, "built-in", built_in)
    assert find_model(str(tiny_model_dir)) is built_in is find_model("built-in")
    lora = registry.LoraEntry("gloss", str(tiny_lora_dir), "built-in", "vivid", "")
    monkeypatch.setitem(LORAS, "gloss", lora)
    assert find_lora(str(tiny_lora_dir)) is lora is find_lora(str(tiny_lora_dir / "pytorch_lora_weights.safetensors"))


def test_a_hub_id_is_left_to_the_hub() -> None:
    entry = find_model("some-owner/some-model.v1@2024-01")
    assert entry.path == "some-owner/some-model.v1@2024-01"
    assert entry.sources == (Source("some-owner/some-model.v1", "2024-01", kind="pipeline"),) and not is_here(entry)
    single = find_model("some-owner/some-model/dream.safetensors")
    assert single.sources == (Source("some-owner/some-model", files=("dream.safetensors",)),)
    assert find_lora("some-owner/some-lora").sources == (Source("some-owner/some-lora", kind="lora"),)


def test_the_hub_id_of_a_known_model_means_that_model() -> None:
    assert find_model("stabilityai/sd-turbo") is MODELS["sd-turbo"] is find_model("sd-turbo")
    assert find_model("stabilityai/sd-turbo@other") is not MODELS["sd-turbo"]


@pytest.mark.parametrize("path", ["checkpoints/emojy", "loras/gloss.safetensors", "a/b/c.ckpt", "tests/x/y.safetensors"])
def test_a_mistyped_path_is_no_hub_id(path: str) -> None:
    for find in (find_model, find_lora):
        with pytest.raises(UserError, match="no such folder"):
            find(path)


def test_a_single_checkpoint_file_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "dream.safetensors").touch()
    assert find_model(str(tmp_path / "dream.safetensors")).path == str(tmp_path / "dream.safetensors")


def test_any_open_clip_model_is_a_reward() -> None:
    assert find_reward("clip:ViT-B-32:laion2b_s34b_b79k").name == "clip:ViT-B-32:laion2b_s34b_b79k"
    with pytest.raises(UserError, match="did you mean 'clip'"):
        find_reward("clip:")


def test_sizes_and_places_are_told_for_people(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    entry = find_model(str(tmp_path))
    assert (size_text(entry), place_of(entry), state_of(entry)) == ("0.0 KiB", str(tmp_path), "here")
    assert (size_text(MODELS["sdxl"]), state_of(MODELS["sdxl"])) == ("~12.9 GiB", "")
    assert (size_text(REWARDS["jpeg"]), place_of(REWARDS["jpeg"]), state_of(REWARDS["jpeg"])) == ("", "no files", "here")
    (tmp_path / "model_index.json").unlink()
    assert state_of(entry) == "missing"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was downloaded, and nobody added anything."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


@pytest.mark.parametrize(("find", "name", "hint"), [
    (find_model, "emojy", "did you mean 'emoji'"), (find_lora, "vivd", "did you mean 'vivid'"),
    (find_reward, "colourfulness", "did you mean 'colorfulness'"), (find_reward, "x", "known: aesthetic, calm, clip"),
    (find_model, "checkpoints/../nowhere/at/all", "no such folder"),
    (find_lora, "/nowhere/lora.safetensors", "no such folder or .safetensors file"),
    (find_model, "x" * 300, "no such folder"), (find_lora, "x" * 300, "no such folder"),
    (find_reward, "x" * 300, "no such folder"),
])
def test_an_unknown_name_is_refused_with_a_hint(find: Callable[[str], object], name: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint) as caught:
        find(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_are_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    monkeypatch.setattr(registry, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setitem(MODELS, "lost", ModelEntry("lost", str(tmp_path / "checkpoints" / "lost"), "", ""))
    with pytest.raises(UserError, match=r"checkpoints/lost/model_index.json.*git checkout.*pretrain"):
        find_model("lost")
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        find_model(str(tmp_path))
    with pytest.raises(UserError, match=r"has no pytorch_lora_weights\.safetensors"):
        find_lora(str(tmp_path))


def test_a_formula_needs_no_files() -> None:
    assert find_reward("colorfulness").path is None
    assert is_here(REWARDS["colorfulness"])
