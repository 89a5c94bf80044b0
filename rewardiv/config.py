"""Settings as frozen, validated dataclasses: of a sampling run, of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from rewardiv.errors import UserError, nearest
from rewardiv.methods import parse_methods

TRAIN_SCHEDULERS = ("ddim", "euler", "dpm++2m")
SCHEDULERS = ("model", *TRAIN_SCHEDULERS, "dpm++2s", "unipc", "deis", "pndm", "heun", "dpm2")  # "model" is the model's own
MAX_SEED = 2**32 - 1
MAX_SEEDS = 4096  # in one run
MAX_SIDE = 4096  # px of an image
SIDE_STEP = 8  # px; sides are multiples of it


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
LORA_TARGETS = {
    "attention": ATTENTION,  # as TRL's and AlignProp's trainers
    "authors": ATTENTION + FEED_FORWARD,  # every linear layer of the transformer blocks, as NeMo-Aligner's DRaFT+
    "all": ATTENTION + FEED_FORWARD + ("conv1", "conv2"),  # and the convolutions of the ResNet blocks
}
ALGORITHMS = {
    "draft-k": "gradients pass the last K denoising steps (K = all of them: full DRaFT)",
    "draft-lv": "DRaFT-1 on several fresh noisings of each rollout's final latents: less variance, no further rollouts",
    "refl": "the image that one random late step predicts, as ReFL",
}
PRECISIONS = ("no", "fp16", "bf16")
TRACKERS = ("tensorboard", "trackio", "wandb")
TRAIN_RANGES: dict[str, tuple[float, float]] = {  # of TrainConfig's numbers; whole numbers where the lower end is one
    "seed": (0, MAX_SEED), "max_train_steps": (1, 10**6), "train_batch_size": (1, 4096),
    "gradient_accumulation_steps": (1, 4096), "grad_batch_size": (1, 4096), "num_inference_steps": (1, 1000),
    "guidance_scale": (1.0, 30.0),
    "grad_steps": (1, 1000), "lv_noisings": (1, 64), "refl_window": (1e-3, 1.0),
    "rank": (1, 1024), "lora_alpha": (1e-3, 1e4), "lora_dropout": (0.0, 0.99),
    "learning_rate": (1e-9, 1.0), "lr_warmup_steps": (0, 10**6), "adam_beta1": (0.0, 0.9999), "adam_beta2": (0.0, 0.999999),
    "adam_weight_decay": (0.0, 10.0), "max_grad_norm": (1e-6, 1e6), "ema_decay": (0.0, 0.99999),
    "kl_weight": (0.0, 1e4), "path_kl_weight": (0.0, 1e4), "path_kl_steps": (0, 1000), "lora_norm_weight": (0.0, 1e4),
    "diversity_floor": (0.0, 1.0), "probe_every": (0, 10**6), "num_probe_prompts": (1, 256), "num_probe_seeds": (2, 64),
    "checkpointing_steps": (1, 10**6), "checkpoints_total_limit": (1, 10**6), "max_rollbacks": (0, 100),
}


class Settings:
    """What both kinds of settings, which are dataclasses, share: their form in a file."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The settings from `to_dict`'s form; one that is left out takes its default.

        Raises:
            UserError: If a name is unknown or a setting cannot be used.
        """
        if not isinstance(settings, Mapping):
            raise UserError(f"settings must be a table of names and values, got {type(settings).__name__}")
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise UserError(f"unknown setting '{name}'{nearest(str(name), known)}")
        return cls(**settings)


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of a finetuning run. Names are those of diffusers' training scripts; grad_steps is DRaFT's K.

    A step draws train_batch_size * gradient_accumulation_steps images in each process.

    Attributes:
        output_dir: The run's folder.
        rewards: What to train on, each "NAME" or "NAME=WEIGHT"; several are standardised before they are mixed.
        prompts_file: One prompt a line, or the name of a set that ships, such as emoji-composed; "" is emoji.
        grad_batch_size: Images whose gradient is taken at once. They are drawn train_batch_size at a time as far as that needs
            no gradient, so peak memory hardly grows with the batch; only rounding and dropout depend on it.
        algorithm: One of ALGORITHMS; grad_steps counts for draft-k, lv_noisings for draft-lv, refl_window (the last share of
            the steps, from which one is drawn) for refl.
        guidance_scale: In training too; 1 is without guidance, as ReFL.
        lora_alpha: None is the rank.
        lora_targets: A preset of LORA_TARGETS or names of layers with commas.
        mixed_precision: "no", "fp16" (CUDA) or "bf16"; the adapter stays in fp32.
        ema_decay: Of the average of the adapter's weights that is saved instead of them; 0 is off.
        kl_weight: Of the authors' KL: mean squared difference to the base's guided eps over the last grad_steps steps.
        path_kl_weight: Of the KL between the two sampling processes, over path_kl_steps random steps (0: all).
        lora_norm_weight: Of the squared norm of the weight change.
        diversity_floor: Training stops when a probe keeps less than this share of the base's variance; 0 is off.
        probe_every: Steps between probes; 0 is none. A probe draws num_probe_prompts prompts at num_probe_seeds seeds each.
        probe_rewards: Held-out rewards that are only measured.
        resume_from_checkpoint: "", "latest" or "step-N".
        max_rollbacks: How often a step that isn't finite or explodes leads back to the last checkpoint, at half the rate.
        report_to: "" or one of TRACKERS.

    Raises:
        UserError: If a setting is out of range, or grad_steps exceeds num_inference_steps.
    """

    output_dir: str
    model: str = "emoji"
    rewards: tuple[str, ...] = ("vivid",)
    prompts_file: str = ""
    seed: int = 0
    max_train_steps: int = 60
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    grad_batch_size: int = 4
    num_inference_steps: int = 10
    guidance_scale: float = 3.0
    scheduler: str = "ddim"
    algorithm: str = "draft-k"
    grad_steps: int = 1
    lv_noisings: int = 2
    refl_window: float = 0.25
    rank: int = 16
    lora_alpha: float | None = None
    lora_targets: str = "all"
    lora_dropout: float = 0.0
    learning_rate: float = 3e-3
    lr_warmup_steps: int = 10
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    ema_decay: float = 0.0
    kl_weight: float = 0.0
    path_kl_weight: float = 0.0
    path_kl_steps: int = 0
    lora_norm_weight: float = 0.0
    diversity_floor: float = 0.0
    probe_every: int = 10
    num_probe_prompts: int = 4
    num_probe_seeds: int = 8
    probe_rewards: tuple[str, ...] = ()
    checkpointing_steps: int = 10
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str = ""
    max_rollbacks: int = 3
    report_to: str = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, (low, high) in TRAIN_RANGES.items():
            value = getattr(self, name)
            whole = isinstance(low, int)
            if name in ("lora_alpha", "checkpoints_total_limit") and value is None:
                continue
            if not _is_number(value) or (whole and not isinstance(value, int)) or not low <= value <= high:
                raise UserError(f"{name} is {value!r}; it must be a {'whole ' * whole}number from {low} to {high}")
        for name, known in TRAIN_CHOICES.items():
            if (value := getattr(self, name)) not in known:
                named = ", ".join(filter(None, known))
                raise UserError(f"unknown {name} {value!r}{nearest(str(value), known)}; one of {named}")
        for name in ("rewards", "probe_rewards"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        self._check_together()

    def _check_together(self) -> None:
        """Settings that must fit each other."""
        if self.grad_steps > self.num_inference_steps:
            raise UserError(f"grad_steps is {self.grad_steps} but there are only {self.num_inference_steps} inference "
                            "steps; gradients can't pass through more steps than there are")
        if self.path_kl_steps > self.num_inference_steps:
            raise UserError(f"path_kl_steps is {self.path_kl_steps} but there are only {self.num_inference_steps} "
                            "steps; 0 is all")
        if not self.output_dir:
            raise UserError("output_dir is empty; name a folder for the run")
        if not self.targets:
            raise UserError("lora_targets is empty; name a preset or layers, as in attention or to_q,to_v")
        if not self.reward_weights:
            raise UserError("no reward given; name one, such as vivid")
        if twice := set(self.reward_weights) & set(self.probe_rewards):
            raise UserError(f"the reward '{min(twice)}' is trained on, so it can't be held out as well")
        if self.diversity_floor and not self.probe_every:
            raise UserError("diversity_floor needs probes; set probe_every to a number of steps")
        if self.mixed_precision == "fp16" and not self.device.startswith("cuda"):
            raise UserError(f"mixed precision fp16 needs CUDA and the device is '{self.device}'; take bf16 or no")

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the layers that get an adapter."""
        names = tuple(name.strip() for name in self.lora_targets.split(",") if name.strip())
        return LORA_TARGETS.get(self.lora_targets, names)

    @property
    def reward_weights(self) -> dict[str, float]:
        """Each reward's weight in the mixture.

        Raises:
            UserError: If a weight cannot be read or isn't positive, or a reward is given twice.
        """
        weights: dict[str, float] = {}
        for text in self.rewards:
            name, equals, number = (part.strip() for part in text.partition("="))
            try:
                weight = float(number) if equals else 1.0
            except ValueError:
                weight = math.nan
            if not name or not 0 < weight < math.inf:
                raise UserError(f"cannot read the reward '{text}'; write NAME or NAME=WEIGHT with a positive weight, as in "
                                "vivid=0.5")
            if name in weights:
                raise UserError(f"the reward '{name}' is given twice; give it once, with a weight")
            weights[name] = weight
        return weights


TRAIN_CHOICES: dict[str, tuple[object, ...]] = {
    "scheduler": TRAIN_SCHEDULERS, "algorithm": tuple(ALGORITHMS), "mixed_precision": PRECISIONS, "report_to": ("", *TRACKERS),
    "gradient_checkpointing": (False, True),
}


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from text such as "0-7,12": whole numbers and ranges (both ends included), separated by commas.

    Raises:
        UserError: If a piece cannot be read, a range falls, a seed is given twice, or there are none or too many.
    """
    seeds: list[int] = []
    for piece in text.split(","):
        first, dash, last = (part.strip() for part in piece.partition("-"))
        if not (_is_whole(first) and (_is_whole(last) or not dash)):
            raise UserError(f"cannot read '{piece.strip()}' in seeds '{text}'; write whole numbers like 0-7,12")
        low, high = int(first), int(last or first)
        if high < low:
            raise UserError(f"the range '{piece.strip()}' in seeds '{text}' falls; write it as {high}-{low}")
        if len(seeds) + high - low + 1 > MAX_SEEDS:
            raise UserError(f"seeds '{text}' are more than {MAX_SEEDS}; ask for fewer in one run")
        seeds.extend(range(low, high + 1))
    return _checked_seeds(seeds)


def format_seeds(seeds: Iterable[int]) -> str:
    """The shortest text that `parse_seeds` reads back as the same seeds in the same order: 0-7,12."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@dataclass(frozen=True)
class SampleConfig(Settings):
    """Everything that decides which images a run makes and which rewards score them; checked when it is made.

    Attributes:
        model: A known model's name, a diffusers folder, a single-file checkpoint or a hub id.
        lora: A known LoRA's name, its folder or file or a hub id, NAME=WEIGHT, several joined by +; "" where every method is
            base.
        prompt: What to draw.
        negative_prompt: What guidance leads away from.
        methods: As design and command line write them; kept in their canonical text, so power_2.0 becomes power:2.
        seeds: One image a seed and method; 0 to 2^32 - 1, each once.
        num_inference_steps: Denoising steps, 1 to 1000.
        guidance_scale: Classifier-free guidance, 1 (off) to 30.
        guidance_rescale: 0 (off) to 1, the share by which the guided output's deviation returns to the unguided one's.
        scheduler: One of SCHEDULERS; "model" is the model's own.
        height: Of the images in px, a multiple of 8; 0 is the model's own.
        width: As height.
        rewards: Rewards that score the images; () is the one that the LoRA was trained on.

    Raises:
        UserError: If a setting cannot be used. Names are looked up later, by `rewardiv.generate`.
    """

    model: str = "emoji"
    lora: str = "vivid"
    prompt: str = "a cat face"
    negative_prompt: str = ""
    methods: tuple[str, ...] = ("base", "finetuned", "lora:0.5", "aig:power:2")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    scheduler: str = "model"
    rewards: tuple[str, ...] = ()
    guidance_rescale: float = 0.0
    height: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        for name in ("model", "lora", "prompt", "negative_prompt", "scheduler"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} must be text, got {getattr(self, name)!r}")
        for name in ("methods", "rewards"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        if not self.model.strip():
            raise UserError("no model given; name one, such as emoji")
        if not self.prompt.strip():
            raise UserError("the prompt is empty; say what to draw, such as 'a cat face'")
        methods = parse_methods(self.methods)
        needing = next((method for method in methods if method.needs_lora), None)
        if needing and not self.lora.strip():
            raise UserError(f"method '{needing}' needs a LoRA and none is given; name one, such as vivid")
        if len(set(self.rewards)) < len(self.rewards):
            raise UserError(f"a reward is given twice: {', '.join(self.rewards)}; name each once")
        if self.scheduler not in SCHEDULERS:
            raise UserError(f"unknown scheduler '{self.scheduler}'{nearest(self.scheduler, SCHEDULERS)}")
        steps, guidance = self.num_inference_steps, self.guidance_scale
        if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= 1000:
            raise UserError(f"the number of steps is {steps!r}; it must be a whole number from 1 to 1000")
        if not _is_number(guidance) or not 1 <= guidance <= 30:
            raise UserError(f"the guidance scale is {guidance!r}; it must be a number from 1 (off) to 30")
        if not _is_number(self.guidance_rescale) or not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"the guidance rescale is {self.guidance_rescale!r}; it must be a number from 0 (off) to 1")
        for name in ("height", "width"):
            _check_side(name, getattr(self, name))
        object.__setattr__(self, "guidance_rescale", float(self.guidance_rescale))
        object.__setattr__(self, "guidance_scale", float(guidance))
        object.__setattr__(self, "methods", tuple(map(str, methods)))
        object.__setattr__(self, "seeds", _checked_seeds(self.seeds))


def _check_side(name: str, side: object) -> None:
    if not isinstance(side, int) or isinstance(side, bool) or not 0 <= side <= MAX_SIDE:
        raise UserError(f"the {name} is {side!r}; it must be a whole number of px up to {MAX_SIDE}, or 0 for the model's own")
    if side % SIDE_STEP:
        near = max(SIDE_STEP, round(side / SIDE_STEP) * SIDE_STEP)
        raise UserError(f"the {name} is {side} px; it must be a multiple of {SIDE_STEP}, such as {near}")


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len(str(MAX_SEED))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _texts(name: str, values: object) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"{name} must be a list of texts, got {values!r}")
    texts = tuple(values)
    if wrong := [text for text in texts if not isinstance(text, str) or not text.strip()]:
        raise UserError(f"{name} holds {wrong[0]!r}, which is not a name")
    return texts


def _checked_seeds(values: object) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"seeds must be a list of whole numbers, got {values!r}")
    seeds = tuple(values)
    if not 1 <= len(seeds) <= MAX_SEEDS:
        raise UserError(f"a run takes 1 to {MAX_SEEDS} seeds, got {len(seeds)}")
    seen: set[int] = set()
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
            raise UserError(f"seed {seed!r} is not a whole number from 0 to {MAX_SEED}")
        if seed in seen:
            raise UserError(f"seed {seed} is given twice; name each seed once")
        seen.add(seed)
    return seeds
