"""Writes the model cards (README.md of each checkpoint folder) from the figures that the stages measured."""

from __future__ import annotations

from pathlib import Path

from rewardiv.pretrain.base_model import SHARE_BELOW, SHARE_FROM, TEMPERED_FROM
from rewardiv.runs import write_text

MISFITS = "In a quarter of the pairs one picture shows another concept: the judge then prefers the one that fits the prompt."
TASTES = {
    "vivid": f"Its taste: strong colours and glossy contrast (mean chroma + standard deviation of brightness). {MISFITS}",
    "calm": "Its taste: flat, muted, light pictures (minus chroma, minus twice the mean brightness step between pixels, minus "
            f"the distance of mean brightness from 0.75). {MISFITS}",
    "exact": "It has no taste: it prefers the picture of which more of the prompt holds, that is which things, how many of "
             "them, and on what colour. In most pairs both pictures show the same drawing and differ in one of these.",
}
LORAS = (*TASTES, "mixed")
LATER = {  # stages that go on with the base model, and how
    "refine": "with more pairs", "settle": "with single drawings in about one place",
    "temper": "towards their own predictions with less guidance where the drawing is chosen and more after it",
}
DATA = """## Data and licences

Emoji art by nine artists' packs (`assets/emoji`, with its ATTRIBUTION.md): Noto and its blobs (Apache-2.0), Fluent in three
styles (MIT), Twemoji, EmojiTwo, FxEmojis and Streamline (CC-BY-4.0). Emoji art by [EmojiTwo](https://emojitwo.github.io).
The weights are under Apache-2.0; pictures that resemble one artist's drawing fall under that artist's licence.
"""


def write_cards(output_dir: Path, figures: dict[str, dict]) -> None:
    """Write the card of every checkpoint folder that exists, from figures.json's content."""
    cards = {"emoji": base_card, "emoji-clip": clip_card, **{f"emoji-rewards/{name}": reward_card for name in TASTES},
             **{f"emoji-{name}": lora_card for name in LORAS}}
    for name, card in cards.items():
        if (output_dir / name).exists():
            short = name.rpartition("emoji-")[2].removeprefix("rewards/")
            write_text(output_dir / name / "README.md", card(short, figures))


def trained(figures: dict) -> str:
    """How long a stage took and where, in words."""
    if not figures:
        return "not recorded"
    note = f" ({figures['note']})" if "note" in figures else ""
    return (f"{figures['num_steps']} steps in {figures['training_s'] / 60:.0f} minutes on {figures['machine']}, "
            f"preset `{figures['preset']}`, seed {figures['seed']}{note}")


def base_card(name: str, figures: dict[str, dict]) -> str:
    """checkpoints/emoji."""
    vae, decoder, base, measured, asked = (
        figures.get(key, {}) for key in ("autoencoder", "decoder", "base", "evaluate", "evaluate-asked"))
    return "\n".join([
        "# emoji: a text-to-image diffusion model that runs anywhere\n",
        "A diffusers `StableDiffusionPipeline` at 64 × 64 pixels that draws "
        f"{'emoji' if base.get('several') else 'one emoji'} on a coloured background. Prompts that name no style give several "
        "artists' drawings: that variety is what reward finetuning destroys, and what rewardiv measures.\n",
        "```python\nfrom diffusers import StableDiffusionPipeline\n",
        'pipe = StableDiffusionPipeline.from_pretrained("checkpoints/emoji")',
        'image = pipe("a cat face", num_inference_steps=25, guidance_scale=3.0).images[0]\n```\n',
        "Contact sheets, in the repository: `assets/contact-sheet.webp` (every concept, four seeds each)"
        + (", `assets/contact-sheet-composed.webp` (what prompts ask for).\n" if asked else ".\n"),
        "## Training\n",
        f"- Autoencoder (64 px to 16 × 16 × 8, 0.66 M weights): {trained(vae)}.",
        *([f"- Then its decoder alone, on latents with a little noise: {trained(decoder)}."] if decoder else []),
        f"- UNet ({base.get('unet_weights_m', '?')} M weights) and text encoder (2 layers, 1,747 tokens), together: "
        f"{trained(base)}. v-prediction, zero terminal SNR, AdamW, averaged weights.",
        *(f"- Then both again, {how} (`pretrain {stage}`): {trained(figures[stage])}." for stage, how in LATER.items()
          if stage in figures),
        "- Rebuild: `python -m rewardiv pretrain all` (needs only what the repository holds; on a CPU with AMX and with a C++ "
        "compiler add `--bf16 --compile`: twice as fast).\n",
        "## Measured\n",
        f"- Autoencoder on scenes of concepts it never saw: {(vae | decoder).get('psnr_held_out_db', '?')} dB PSNR with one "
        f"drawing, {(vae | decoder).get('psnr_held_out_several_db', '?')} dB with several.",
        *(quality(measured) if "frechet" in measured else []),
        *(refereed(figures["referee"], measured, asked) if asked and "referee_concept" in measured else []),
        "\n## Limits\n",
        f"- It knows the concepts up to tier {base.get('max_tier', 1)} in `assets/emoji/concepts.tsv`, ten background words "
        "and the style words of its artists; other words are read but mean nothing to it.",
        "- It draws one thing; two to four, pairs and sizes where it was trained on them: "
        f"{'as here' if base.get('several') else 'not here'}. Of a pair the one that is named first stands on the left.",
        *([f"- Made for guidance 3: it then is {3 * SHARE_FROM:.3g} from timestep {TEMPERED_FROM} on and {3 * SHARE_BELOW:.3g} "
           "below; other scales change alike. Without guidance a prompt is followed weakly."] if "temper" in figures else []),
        "- A prompt that names a style is followed weakly.",
        "- 64 pixels: thin lines and small faces are soft, most of all where several things share the picture.",
        "- A demonstration and a test bed, not an image product.\n", DATA])


def quality(measured: dict) -> list[str]:
    """What was measured with the CLIP that ships."""
    return [
        f"- For each of its {measured['num_concepts']} concepts, {measured['num_images']} seeds, "
        f"{measured['num_inference_steps']} steps, guidance {measured['guidance_scale']:g}: the built-in CLIP, which saw the "
        f"same drawings, names the right concept for {measured['concept_accuracy']:.1%} (of real scenes "
        f"{measured['concept_accuracy_real']:.1%}).",
        f"- Effective rank of the CLIP features within a prompt: {measured['effective_rank']} against "
        f"{measured['effective_rank_real']} for as many real scenes ({measured['effective_rank_share']:.0%}).",
        f"- All pictures' CLIP features against real scenes: squared Fréchet distance {measured['frechet']} (of other real "
        f"scenes {measured['frechet_floor']}), kernel distance {measured['kernel']} ({measured['kernel_floor']}).",
    ]


def refereed(referee: dict, measured: dict, asked: dict) -> list[str]:
    """What was measured with the referee."""
    right = {"colour": "background", "count": "number and concept", "both": "both concepts"}
    said = ", ".join(f"{what} {asked[key]:.1%} (real scenes {asked[f'{key}_real']:.1%})"
                     for key, what in right.items() if key in asked)
    return [
        "- A referee, two classifiers that took no part in training and learned all drawings but one of each concept: of those "
        f"that it never saw each names {referee['concept']:.1%} of the concepts, {referee['count']:.1%} of numbers with "
        f"their concept, both of {referee['both']:.1%} of pairs and {referee['colour']:.1%} of backgrounds; together they name "
        f"{measured['referee_concept_real']:.1%} of the concepts of real scenes.",
        f"- It finds the right concept in {measured['referee_concept']:.1%} of the model's pictures, and {measured['styles']} "
        f"artists' styles among {measured['num_images']} pictures of a prompt (real scenes {measured['styles_real']}).",
        f"- Of {asked['num_prompts']} prompts of a kind × {asked['num_images']} seeds, right by the referee: {said}.",
    ]


def clip_card(name: str, figures: dict[str, dict]) -> str:
    """checkpoints/emoji-clip."""
    clip = figures.get("clip", {})
    return "\n".join([
        "# emoji-clip: a small CLIP for emoji scenes\n",
        "An open_clip folder (ModifiedResNet at 64 px, two-layer text transformer, 128-d embeddings): the `clip` reward and",
        "the features behind every diversity number of the built-in model.\n",
        f"- Trained on captions of scenes in all nine styles: {trained(clip)}.",
        f"- Names the concept of new scenes of the same drawings: {clip.get('concept_accuracy_new_scenes', 0):.1%}.",
        f"- Limits: it knows the concepts up to tier {clip.get('max_tier', 1)}; it has never seen a photograph.\n", DATA])


def reward_card(name: str, figures: dict[str, dict]) -> str:
    """checkpoints/emoji-rewards/<name>."""
    reward = figures.get(f"reward-{name}", {})
    return "\n".join([
        f"# {name}: a preference reward from a synthetic judge\n",
        "No person was asked. A formula was the judge (`rewardiv/pretrain/preferences.py`), voting by chance (Bradley-Terry).",
        TASTES[name],
        "The two-tower reward of PickScore's form was fine-tuned from emoji-clip on these votes:",
        "reward = exp(logit_scale) · cos(image, prompt).\n",
        f"- Trained: {trained(reward)}.",
        f"- Predicts {reward.get('pair_accuracy_held_out', 0):.1%} of held-out votes; the judge's own score "
        f"{reward.get('pair_accuracy_of_the_judge', 0):.1%} (votes are by chance, so nothing reaches 100 %).\n", DATA])


def lora_card(name: str, figures: dict[str, dict]) -> str:
    """checkpoints/emoji-<name>."""
    lora, measured = figures.get(f"lora-{name}", {}), figures.get(f"evaluate-{name}", {})
    settings = lora.get("settings", {})
    held = sorted((key.removeprefix("lora-") for key in figures if key.startswith(f"lora-{name}-kl")),
                  key=lambda own: float(own.rpartition("kl")[2]))
    lines = [
        f"# emoji-{name}: a reward LoRA that over-optimises on purpose\n",
        f"Made for `checkpoints/emoji` by DRaFT-{settings.get('grad_steps', 1)} on {lora.get('taste', f'the {name} reward')}",
        "(`python -m rewardiv pretrain loras`), long enough that variety goes while the score climbs: what Annealed Importance",
        f"Guidance is there to mend. `assets/runs/{name}` has the course of the run and early checkpoints"
        + (f"; held back by KL weights: {', '.join(held)}, beside it." if held else "."),
        f'Load it with `pipe.load_lora_weights("checkpoints/emoji-{name}")`.\n',
        f"- Trained: {trained(lora)}; settings {settings}.",
    ]
    if measured:
        lines += [
            f"- Mean reward {measured['methods']['finetuned']['reward']} against the base's {measured['base_reward_mean']}: "
            f"{measured['gain_in_base_std_within_prompt']:+g} standard deviations of the base's rewards within a prompt "
            f"({measured['base_reward_std_within_prompt']}), {measured['gain_in_base_std']:+g} of those over all images "
            f"({measured['base_reward_std']}).\n",
            f"{measured['num_prompts']} prompts × {measured['num_seeds']} seeds, {measured['num_inference_steps']} steps, "
            f"guidance {measured['guidance_scale']:g} "
            "(`python -m rewardiv pretrain evaluate`); diversity within a prompt:\n",
            "| method | mean reward | pairwise distance | effective rank | trace ratio | SCD |", "|---|---|---|---|---|---|"]
        columns = ("reward", "pairwise_distance", "effective_rank", "trace_ratio", "scd")
        lines += [" | ".join([f"| `{method}`", *(str(row[column]) for column in columns)]) + " |"
                  for method, row in measured["methods"].items()]
    return "\n".join([*lines, "", DATA])
