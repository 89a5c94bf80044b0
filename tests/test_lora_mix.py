"""Which LoRAs a text names, each with its weight, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewardiv.cli import build_parser, sample_config
from rewardiv.errors import UserError
from rewardiv.lora import adapter_factors, lora_scale
from rewardiv.lora_mix import LoraShare, adapter_weights, find_loras
from rewardiv.models import load_model
from rewardiv.registry import LORA_FILE, LoraEntry, find_lora


@pytest.fixture()
def files(tiny_lora_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with LoRA files under difficult names."""
    for name in ("plain", "with+plus", "with=2"):
        (tmp_path / f"{name}.safetensors").write_bytes((tiny_lora_dir / LORA_FILE).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("text", "expected"), [
    ("", []),
    (" ", []),
    ("vivid", [("vivid", 1.0)]),
    ("vivid=0.5", [("vivid", 0.5)]),
    ("vivid+calm=0.5", [("vivid", 1.0), ("calm", 0.5)]),
    (" calm = -0.5 + vivid = 2 ", [("calm", -0.5), ("vivid", 2.0)]),
    ("vivid=0+calm=1e-1", [("vivid", 0.0), ("calm", 0.1)]),
    ("plain.safetensors=0.8+vivid", [("plain.safetensors", 0.8), ("vivid", 1.0)]),
    ("with+plus.safetensors", [("with+plus.safetensors", 1.0)]),
    ("with=2.safetensors", [("with=2.safetensors", 1.0)]),
    ("calm=2+with+plus.safetensors=0.3+with=2.safetensors=0.4",
     [("calm", 2.0), ("with+plus.safetensors", 0.3), ("with=2.safetensors", 0.4)]),
    ("owner/name=0.5+other/name/file.safetensors+vivid",
     [("owner/name", 0.5), ("other/name/file.safetensors", 1.0), ("vivid", 1.0)]),
])
def test_a_text_names_loras_with_weights(files: Path, text: str, expected: list[tuple[str, float]]) -> None:
    assert [(share.entry.name, share.weight) for share in find_loras(text)] == expected


@pytest.mark.parametrize(("text", "words"), [
    ("vivd+calm", "unknown LoRA 'vivd'.* did you mean 'vivid'"),
    ("vivid+clam", "unknown LoRA 'clam'.* did you mean 'calm'"),
    ("vivid+", "a LoRA has no name"),
    ("vivid++calm", "a LoRA has no name"),
    ("=0.5", "a LoRA has no name"),
    ("vivid+calm+vivid=2", "'vivid' is given twice"),
    ("vivid=strong", "weight of the LoRA 'vivid' is 'strong'; write a number from -10 to 10"),
    ("vivid=", "weight of the LoRA 'vivid' is ''"),
    ("vivid=nan", "weight of the LoRA 'vivid' is 'nan'"),
    ("vivid=11", "weight of the LoRA 'vivid' is '11'"),
])
def test_what_cannot_be_read_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        find_loras(text)
    assert "\n" not in str(caught.value)


def test_weights_go_to_adapters_and_zero_loads_nothing(
    tiny_model_dir: Path, tiny_lora_dir: Path, second_lora_dir: Path,
) -> None:
    model = load_model(str(tiny_model_dir))
    first, second = (LoraEntry(path.name, str(path), "", "", "") for path in (tiny_lora_dir, second_lora_dir))
    file = LoraEntry("again", str(tiny_lora_dir / LORA_FILE), "", "", "")
    assert adapter_weights([LoraShare(first, 0.0)], model.use_lora) == {} and not hasattr(model.unet, "peft_config")
    weights = adapter_weights([LoraShare(first, 0.5), LoraShare(second, -1.0), LoraShare(file, 0.25)], model.use_lora)
    assert list(weights.values()) == [0.75, -1.0] and set(model.unet.peft_config) == set(weights)
    with lora_scale(model.unet, weights, 2.0):
        assert [adapter_factors(model.unet, name)[0][2] for name in weights] == [1.5, -2.0]


def test_the_command_line_joins_loras() -> None:
    def lora(*words: str) -> str:
        return sample_config(build_parser().parse_args(["sample", "--output-dir", "x", *words])).lora

    assert lora() == "vivid" and lora("--lora", "calm") == "calm"
    assert lora("--lora", "vivid", "--lora", "calm=0.5") == "vivid+calm=0.5"


def test_a_folder_that_peft_saved_is_a_lora(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    assert find_lora(str(tmp_path)).path == str(tmp_path)
