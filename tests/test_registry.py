"""Names and paths become entries, or one clear sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rewardiv import registry
from rewardiv.errors import UserError
from rewardiv.registry import LORAS, MODELS, REWARDS, ROOT, ModelEntry, find_lora, find_model, find_reward, is_here


def test_what_belongs_together_is_named_alike() -> None:
    assert (ROOT / "rewardiv" / "registry.py").is_file()
    for table in (MODELS, LORAS, REWARDS):
        assert all(entry.name == name for name, entry in table.items())
    for lora in LORAS.values():
        assert lora.model in MODELS and lora.reward in REWARDS


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
    entry = find_model("some-owner/some-model.v1")
    assert entry.path == "some-owner/some-model.v1"


@pytest.mark.parametrize(("find", "name", "hint"), [
    (find_model, "emojy", "did you mean 'emoji'"), (find_lora, "vivd", "did you mean 'vivid'"),
    (find_reward, "colourfulness", "did you mean 'colorfulness'"), (find_reward, "x", "known: calm, clip"),
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
