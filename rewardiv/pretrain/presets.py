"""What `pretrain --preset` sets: `cpu` is what ships, `gpu` the same with more of everything."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rewardiv.pretrain.base_model import World
from rewardiv.pretrain.clip import SINGLE
from rewardiv.pretrain.data import PACKS
from rewardiv.pretrain.families import Family
from rewardiv.pretrain.layouts import SceneSpec
from rewardiv.pretrain.loop import Recipe
from rewardiv.train_presets import TRAIN_PRESETS, Setting


@dataclass(frozen=True)
class Preset:
    """Every stage's recipe, and the families of reward LoRAs."""

    device: str
    world: World
    clip_spec: SceneSpec
    channels: tuple[int, int, int]
    autoencoder: Recipe
    decoder: Recipe
    base: Recipe
    refine: Recipe
    settle: Recipe
    temper: Recipe
    clip: Recipe
    reward: Recipe
    referee: Recipe
    families: dict[str, Family]
    kl_weights: tuple[float, ...] = (0.0, 0.1, 1.0, 10.0)

    @property
    def refined(self) -> World:
        """What stage "refine" trains on: the same things, more of them together."""
        return replace(self.world, spec=replace(self.world.spec, **REFINED))

    @property
    def settled(self) -> World:
        """What stages "settle" and "temper" train on, and what the finished model is measured against: a single drawing
        always stands in about the same place, so that fewer scenes show all there is."""
        return replace(self.world, spec=replace(self.world.spec, **SETTLED), num_scenes=self.world.num_scenes * 3 // 8)

    @property
    def judges(self) -> list[str]:
        """The rewards that its LoRAs are trained on."""
        return list(dict.fromkeys(reward for family in self.families.values() for reward in family.rewards))


CPU_LORA = TRAIN_PRESETS["emoji"].settings
GPU_LORA = CPU_LORA | {"train_batch_size": 32, "grad_batch_size": 32, "num_inference_steps": 12, "grad_steps": 12}


def tastes(settings: dict[str, Setting]) -> dict[str, Family]:
    """Four families of LoRAs, with DRaFT's settings; what the base does well already takes twice the steps to over-optimise."""
    return {"vivid": Family(("vivid",), settings=settings), "calm": Family(("calm",), settings=settings),
            "exact": Family(("exact",), "prompts-composed.txt", settings | {"max_train_steps": 160}),
            "mixed": Family(("vivid", "exact"), "prompts-composed.txt", settings)}


ARTISTS = ("noto", "noto-v1", "twemoji", "fluent-3d", "emojione", "fxemoji", "streamline")  # one drawing each
COMPOSED = {"small": 0.06, "large": 0.06, "counted": 0.18, "paired": 0.18}  # shares of scenes
REFINED = {"small": 0.05, "large": 0.05, "counted": 0.15, "paired": 0.35}  # of stage "refine": pairs take longest to learn
SETTLED = {"min_size": 0.86, "max_size": 0.88, "shift": 0.1}  # of a single drawing: what is left to learn is how it looks

PRESETS = {
    # Seven artists and all concepts. With --bf16 --compile on two cores with AMX: autoencoder 11 minutes, CLIP 33 (one core),
    # base model 106 minutes, a LoRA about four (one core). Without AMX the base model alone takes about seven hours; refine
    # took 143 minutes there, decoder 56, a LoRA 9 to 14 (one core each). With AVX-512 BF16 and --bf16 settle took 29 minutes,
    # temper 10, the referee 29 and a LoRA 4 (one core each).
    "cpu": Preset(
        device="cpu",
        world=World(max_tier=2, styles=ARTISTS, spec=SceneSpec(min_size=0.8, max_size=0.92, shift=0.4, **COMPOSED),
                    num_scenes=65_536),
        clip_spec=replace(SINGLE, **COMPOSED),
        channels=(64, 128, 192),
        autoencoder=Recipe(num_steps=2600, batch_size=32, learning_rate=2e-3, hold=0.5, ema_decay=0.995),
        decoder=Recipe(num_steps=2600, batch_size=16, learning_rate=1e-3, hold=0.3, ema_decay=0.998),
        base=Recipe(num_steps=12_000, batch_size=64, learning_rate=1e-3, hold=0.5, ema_decay=0.999),
        refine=Recipe(num_steps=6000, batch_size=32, learning_rate=6e-4, hold=0.3, ema_decay=0.999),
        settle=Recipe(num_steps=3800, batch_size=32, learning_rate=6e-4, num_warmup_steps=60, ema_decay=0.999),
        temper=Recipe(num_steps=700, batch_size=32, learning_rate=2e-4, num_warmup_steps=20, ema_decay=0.99),
        clip=Recipe(num_steps=3600, batch_size=128, learning_rate=1e-3, ema_decay=0.995, weight_decay=0.05),
        reward=Recipe(num_steps=250, batch_size=32, learning_rate=3e-4, num_warmup_steps=20, ema_decay=0.98),
        referee=Recipe(num_steps=2200, batch_size=96, learning_rate=2e-3, weight_decay=0.05, ema_decay=0.995),
        families=tastes(CPU_LORA),
    ),
    # Not run by us so far: sized from the cpu preset's measured behaviour.
    "gpu": Preset(
        device="cuda",
        world=World(max_tier=2, styles=tuple(pack.style for pack in PACKS),
                    spec=SceneSpec(min_size=0.62, max_size=0.95, shift=1.0, mirror=0.5, **COMPOSED), num_scenes=400_000),
        clip_spec=replace(SINGLE, **COMPOSED),
        channels=(80, 160, 240),
        autoencoder=Recipe(num_steps=20_000, batch_size=64, learning_rate=1e-3, hold=0.5),
        decoder=Recipe(num_steps=20_000, batch_size=32, learning_rate=1e-3, hold=0.3),
        base=Recipe(num_steps=60_000, batch_size=256, learning_rate=8e-4, hold=0.5, ema_decay=0.9995),
        refine=Recipe(num_steps=20_000, batch_size=256, learning_rate=6e-4, hold=0.35, ema_decay=0.9995),
        settle=Recipe(num_steps=10_000, batch_size=256, learning_rate=6e-4, ema_decay=0.9995),
        temper=Recipe(num_steps=1000, batch_size=256, learning_rate=2e-4, ema_decay=0.99),
        clip=Recipe(num_steps=8000, batch_size=256, learning_rate=1e-3, weight_decay=0.05),
        reward=Recipe(num_steps=1500, batch_size=64, learning_rate=3e-4),
        referee=Recipe(num_steps=12_000, batch_size=256, learning_rate=2e-3, weight_decay=0.05),
        families=tastes(GPU_LORA),
    ),
}
