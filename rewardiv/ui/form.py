"""The Compare form: what its fields mean as a SampleConfig, and a SampleConfig as values for its fields."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from rewardiv.config import SampleConfig, format_seeds, parse_seeds
from rewardiv.errors import UserError
from rewardiv.gamma import number_text, parse_gamma
from rewardiv.methods import Method, parse_method

DEFAULT_GAMMA = "power:2"
SEED_RANGE = 100_000  # random seeds stay short enough to read
KINDS = (
    ("Base model", "base"),
    ("Finetuned, full LoRA", "finetuned"),
    ("LoRA scaled down", "lora"),
    ("AIG, the curve below", "aig"),
    ("LoRA strength by curve", "anneal-lora"),
    ("Constant blend", "blend"),
)


@dataclass(frozen=True)
class Form:
    """The fields' values, in the order in which the page hands them over.

    Attributes:
        methods: Kinds of method that are ticked.
        gamma: The schedule for aig and anneal-lora.
        lora_scale: Strength of the scaled LoRA.
        blend: The base model's share in the blend.
        extra_methods: More methods as the command line writes them, separated by spaces or new lines.
        seeds: As `parse_seeds` reads them.
        random_seeds: Draw as many new seeds as `seeds` names.
        reward: "" for the one that the LoRA was trained on.
    """

    prompt: str = "a cat face"
    lora: str = "vivid"
    methods: Sequence[str] = ("base", "finetuned", "lora", "aig")
    gamma: str = DEFAULT_GAMMA
    seeds: str = "0-7"
    random_seeds: bool = False
    num_inference_steps: float = 20
    guidance_scale: float = 3.0
    model: str = "emoji"
    negative_prompt: str = ""
    lora_scale: float = 0.5
    blend: float = 0.5
    extra_methods: str = ""
    scheduler: str = "model"
    reward: str = ""
    height: float = 0
    width: float = 0
    guidance_rescale: float = 0.0

    def config(self) -> SampleConfig:
        """The settings that the fields stand for.

        Raises:
            UserError: If a field cannot be used.
        """
        parse_gamma(text_of("γ", self.gamma))  # a broken curve is said even where no ticked method follows it
        seeds = parse_seeds(text_of("seeds", self.seeds))
        if self.random_seeds:
            seeds = tuple(random.SystemRandom().sample(range(SEED_RANGE), len(seeds)))
        return SampleConfig(
            model=text_of("model", self.model).strip(),
            lora=text_of("LoRA", self.lora).strip(),
            prompt=text_of("prompt", self.prompt),
            negative_prompt=text_of("negative prompt", self.negative_prompt),
            methods=self._methods(),
            seeds=seeds,
            num_inference_steps=_whole(self.num_inference_steps),
            guidance_scale=self.guidance_scale,
            scheduler=self.scheduler,
            rewards=(self.reward,) if self.reward else (),
            height=_whole(self.height or 0),
            width=_whole(self.width or 0),
            guidance_rescale=self.guidance_rescale,
        )

    def _methods(self) -> tuple[str, ...]:
        written = {
            "base": "base",
            "finetuned": "finetuned",
            "lora": f"lora:{_number('LoRA strength', self.lora_scale)}",
            "aig": f"aig:{self.gamma}",
            "anneal-lora": f"anneal-lora:{self.gamma}",
            "blend": f"blend:{_number('blend', self.blend)}",
        }
        ticked = tuple(written[kind] for kind in written if kind in self.methods)
        return ticked + tuple(text_of("extra methods", self.extra_methods).split())

    @classmethod
    def of(cls, config: SampleConfig) -> Form:
        """Fields that stand for `config`: what the tick boxes cannot say is written into `extra_methods`."""
        ticked: dict[str, Method] = {}
        extra: list[str] = []
        gamma = next((m.gamma for m in map(parse_method, config.methods) if m.gamma and not m.gamma.curve), None)
        for method in map(parse_method, config.methods):
            if method.kind in ticked or (method.gamma is not None and method.gamma != gamma):
                extra.append(str(method))
            else:
                ticked[method.kind] = method
        defaults = cls()
        return cls(
            prompt=config.prompt,
            lora=config.lora,
            methods=tuple(ticked),
            gamma=DEFAULT_GAMMA if gamma is None else str(gamma),
            seeds=format_seeds(config.seeds),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            model=config.model,
            negative_prompt=config.negative_prompt,
            lora_scale=ticked["lora"].value if "lora" in ticked else defaults.lora_scale,
            blend=ticked["blend"].value if "blend" in ticked else defaults.blend,
            extra_methods=" ".join(extra),
            scheduler=config.scheduler,
            reward=config.rewards[0] if config.rewards else "",
            height=config.height,
            width=config.width,
            guidance_rescale=config.guidance_rescale,
        )

    def values(self) -> list[object]:
        """The fields in order, as Gradio wants them."""
        return [list(value) if isinstance(value, tuple) else value for value in astuple(self)]

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of the fields in order."""
        return tuple(field.name for field in fields(Form))


def text_of(name: str, value: object) -> str:
    """The text of a field, "" for an emptied one.

    Raises:
        UserError: If it isn't text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{name} must be text, got {value!r}")
    return value


def _number(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} must be a number, got {value!r}")
    return number_text(float(value))


def _whole(value: object) -> object:
    """20 for 20.0, because sliders hand over either; anything else unchanged, for SampleConfig to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
