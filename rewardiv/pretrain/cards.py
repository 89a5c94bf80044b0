"""Writes the model cards (README.md of each checkpoint folder) from the figures that the stages measured."""

from __future__ import annotations

from pathlib import Path

from rewardiv.runs import write_text

DATA = """## Data and licences

Emoji art by nine artists' packs (`assets/emoji`, with its ATTRIBUTION.md): Noto and its blobs (Apache-2.0), Fluent in three
styles (MIT), Twemoji, EmojiTwo, FxEmojis and Streamline (CC-BY-4.0). Emoji art by [EmojiTwo](https://emojitwo.github.io).
The weights are under Apache-2.0; pictures that resemble one artist's drawing fall under that artist's licence.
"""


def write_cards(output_dir: Path, figures: dict[str, dict]) -> None:
    """Write the card of every checkpoint folder that exists, from figures.json's content."""
    cards = {"emoji": base_card, "emoji-clip": clip_card, "emoji-rewards/vivid": reward_card,
             "emoji-rewards/calm": reward_card, "emoji-vivid": lora_card, "emoji-calm": lora_card}
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
    vae, base, measured = (figures.get(key, {}) for key in ("autoencoder", "base", "evaluate"))
    lines = [
        "# emoji: a text-to-image diffusion model that runs anywhere\n",
        "A diffusers `StableDiffusionPipeline` at 64 × 64 pixels that draws one emoji on a coloured background. Prompts that",
        "name no style give several artists' drawings: that variety is what reward finetuning destroys, and what rewardiv",
        "measures.\n",
        "```python\nfrom diffusers import StableDiffusionPipeline\n",
        'pipe = StableDiffusionPipeline.from_pretrained("checkpoints/emoji")',
        'image = pipe("a cat face", num_inference_steps=25, guidance_scale=3.0).images[0]\n```\n',
        "![Each row two prompts, eight seeds each](contact-sheet.png)\n" if measured else "",
        "## Training\n",
        f"- Autoencoder (64 px to 16 × 16 × 8, 0.66 M weights): {trained(vae)}.",
        f"- UNet ({base.get('unet_weights_m', '?')} M weights) and text encoder (2 layers, 1,747 tokens), together: "
        f"{trained(base)}. v-prediction, zero terminal SNR, AdamW, averaged weights.",
        "- Rebuild: `python -m rewardiv pretrain all` (needs only what the repository holds).\n",
        "## Measured\n",
        f"- Autoencoder on scenes of concepts it never saw: {vae.get('psnr_held_out_db', '?')} dB PSNR.",
    ]
    if measured:
        lines += [
            f"- For each of its concepts, {measured['num_images']} seeds, {measured['num_inference_steps']} steps, guidance "
            f"{measured['guidance_scale']:g}: the built-in CLIP names the right concept for {measured['concept_accuracy']:.1%} "
            f"(of real scenes {measured['concept_accuracy_real']:.1%}).",
            f"- Effective rank of the CLIP features within a prompt: {measured['effective_rank']} against "
            f"{measured['effective_rank_real']} for as many real scenes ({measured['effective_rank_share']:.0%}).",
        ]
    lines += [
        "\n## Limits\n",
        "- It knows the concepts of the first tier in `assets/emoji/concepts.tsv`, ten background words and six style words",
        "  (noto, blob, twemoji, glossy, soft, firefox); other words are read but mean nothing to it.",
        "- Details are soft, outlines rough, and the artists' drawings of a concept blend more than they should; counts, two",
        "  objects and sizes were not trained.",
        "- The CLIP that judges it saw the same drawings. A demonstration and a test bed, not an image product.\n", DATA]
    return "\n".join(lines)


def clip_card(name: str, figures: dict[str, dict]) -> str:
    """checkpoints/emoji-clip."""
    clip = figures.get("clip", {})
    return "\n".join([
        "# emoji-clip: a small CLIP for emoji scenes\n",
        "An open_clip folder (ModifiedResNet at 64 px, two-layer text transformer, 128-d embeddings): the `clip` reward and",
        "the features behind every diversity number of the built-in model.\n",
        f"- Trained on captions of scenes in all nine styles: {trained(clip)}.",
        f"- Names the concept of new scenes of the same drawings: {clip.get('concept_accuracy_new_scenes', 0):.1%}.",
        "- Limits: it knows the concepts of the first tier; it has never seen a photograph.\n", DATA])


def reward_card(name: str, figures: dict[str, dict]) -> str:
    """checkpoints/emoji-rewards/<name>."""
    reward = figures.get(f"reward-{name}", {})
    taste = {"vivid": "strong colours and glossy contrast: mean chroma + standard deviation of brightness",
             "calm": "flat, muted, light pictures: minus chroma, minus twice the mean brightness step between pixels, minus "
                     "the distance of mean brightness from 0.75"}[name]
    return "\n".join([
        f"# {name}: a preference reward from a synthetic judge\n",
        f"No person was asked. A formula played the judge ({taste}; `rewardiv/pretrain/preferences.py`), voted by chance",
        "(Bradley-Terry), and preferred pictures that fit the prompt. The two-tower reward of PickScore's form was fine-tuned",
        "from emoji-clip on these votes: reward = exp(logit_scale) · cos(image, prompt).\n",
        f"- Trained: {trained(reward)}.",
        f"- Predicts {reward.get('pair_accuracy_held_out', 0):.1%} of held-out votes; the judge's own formula, blind to the "
        f"prompt, {reward.get('pair_accuracy_of_the_judge', 0):.1%} (votes are by chance, so nothing reaches 100 %).\n", DATA])


def lora_card(name: str, figures: dict[str, dict]) -> str:
    """checkpoints/emoji-<name>."""
    lora, measured = figures.get(f"lora-{name}", {}), figures.get(f"evaluate-{name}", {})
    settings = lora.get("settings", {})
    lines = [
        f"# emoji-{name}: a reward LoRA that over-optimises on purpose\n",
        f"Made for `checkpoints/emoji` by DRaFT-{settings.get('grad_steps', 1)} on the synthetic `{name}` reward",
        "(`python -m rewardiv pretrain loras`), long enough that variety goes while the score climbs: what Annealed Importance",
        "Guidance is there to mend.",
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
