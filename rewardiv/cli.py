"""The command line: every command and its flags. Heavy libraries load only where they are needed."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rewardiv import __version__, cli_export, cli_models, cli_search, cli_study, cli_sweep, cli_training
from rewardiv.bench import command as bench
from rewardiv.config import SCHEDULERS, SampleConfig, format_seeds, parse_seeds
from rewardiv.devices import DTYPES, pick_device, pick_dtype
from rewardiv.errors import UserError
from rewardiv.pretrain import command as pretrain
from rewardiv.registry import find_model, find_reward
from rewardiv.runs import new_dir

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from rewardiv.generate import Result

Command = Callable[[argparse.Namespace], None]
EXAMPLE = """\
examples:
  python -m rewardiv list
  python -m rewardiv sample --prompt "a cat face" --seeds 0-7 --output-dir cats
  python -m rewardiv sample --method base --method aig:power:4 --method aig:step:0.5 --output-dir shapes
  python -m rewardiv score --reward vivid --prompt "a cat face" cats/images/base/*.png
  python -m rewardiv sweep --max-prompts 8 --method aig:power:1..8/4log --method lora:0.25..0.75/3 --output-dir frontier
  python -m rewardiv search --keep 0.6 --by bisection --output-dir best-gamma
  python -m rewardiv train --preset emoji --reward vivid --output-dir runs/vivid"""
METHODS_HELP = """\
methods:
  base               the base model
  finetuned          the model with its reward LoRA
  lora:A             the LoRA scaled by A, 0 to 2
  aig:GAMMA          Annealed Importance Guidance: base at first, the LoRA towards the end
  anneal-lora:GAMMA  one model whose LoRA scale rises on the way
  blend:L            a constant mixture with L of the base model, 0 to 1

GAMMA, the base model's share from noise to image:
  linear, power:P, step:F, sigmoid:K:C, cosine, knots:0=1,0.3=0.9,1=0
  Longer at the base model (power:4 over power:2) is more diversity and less reward."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for a mistake that the person can mend, 130 where it was interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser()
        args = parser.parse_args(words)
        if args.command is None:
            parser.print_help()
        else:
            args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="python -m rewardiv", epilog=EXAMPLE,
        description="Reward-diversity tradeoffs in text-to-image diffusion (arXiv 2409.06493).",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rewardiv {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND", parser_class=Parser)

    def add(name: str, about: str, run: Command, epilog: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=epilog, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    about = "models, LoRAs and rewards, where each comes from, whether it is here"
    cli_models.add_list_arguments(add("list", about, cli_models.run_list))
    cli_models.add_download_arguments(add("download", "fetch a model, LoRA or reward from the hub", cli_models.run_download))
    cli_models.add_remove_arguments(add("remove", "delete what was downloaded", cli_models.run_remove))
    _add_sample(add("sample", "images of one prompt by several methods at the same seeds, with scores", run_sample,
                    METHODS_HELP))
    _add_score(add("score", "rewards of image files, as JSON on stdout", run_score))
    cli_training.add_train_arguments(add("train", "train a LoRA on one or several rewards", cli_training.run_train))
    cli_training.add_runs_arguments(add("runs", "training runs: list them, stop them, go on with them", cli_training.run_runs))
    cli_export.add_export_arguments(add("export", "a LoRA as files for others", cli_export.run_export))
    cli_sweep.add_sweep_arguments(add("sweep", "prompts, methods, seeds and LoRAs crossed: the frontier and a report",
                                      cli_sweep.run_sweep))
    cli_search.add_search_arguments(add("search", "the gamma of the highest reward that keeps a share of the base's diversity",
                                        cli_search.run_search))
    cli_study.add_study_arguments(add("study", "a blind study of people's preferences: build it, see results, export",
                                      cli_study.run_study))
    bench.add_arguments(add("bench", "measure speed", bench.run))
    pretrain.add_arguments(add("pretrain", "rebuild the built-in data, models, rewards and LoRAs", pretrain.run))
    return parser


def sample_config(args: argparse.Namespace) -> SampleConfig:
    """The settings that the options of `sample` stand for."""
    return SampleConfig(
        model=args.model, lora="+".join(args.lora or [SampleConfig.lora]), prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        methods=tuple(args.method or SampleConfig.methods), seeds=parse_seeds(args.seeds),
        num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale, scheduler=args.scheduler,
        rewards=tuple(args.reward or ()), guidance_rescale=args.guidance_rescale, height=args.height, width=args.width,
    )


def run_sample(args: argparse.Namespace) -> None:
    """Sample, score and save."""
    config = sample_config(args)
    from tqdm import tqdm

    from rewardiv.export import save_result
    from rewardiv.generate import Engine, Progress, check, generate, memory_plan

    check(config)
    engine = Engine(device=pick_device(args.device), dtype=pick_dtype(args.dtype), offload=args.offload,
                    safety=args.safety)
    plan = memory_plan(engine, config)
    folder = new_dir(args.output_dir)
    if plan:
        print(plan.table(), file=sys.stderr)
    records = generate(engine, config)
    first = next(records)  # what is wrong with the files is said before a bar is drawn
    with tqdm(total=config.num_inference_steps, unit="step", file=sys.stderr) as bar:
        for record in itertools.chain([first], records):
            if isinstance(record, Progress):
                bar.update()
                if record.scores:
                    bar.set_postfix({method: f"{score.reward_mean:.3g}" for method, score in record.scores.items()})
    save_result(record, folder)
    if record.cut:
        print(f"warning: the prompt is too long; left out: {record.cut}", file=sys.stderr)
    if record.safety.sentence:
        print(record.safety.sentence, file=sys.stderr)
    print(_summary(record, folder))


def run_score(args: argparse.Namespace) -> None:
    """Score image files."""
    for name in args.reward:
        find_reward(name)
    find_model(args.model)
    if not args.prompt.strip():
        raise UserError("the prompt is empty; say what the images were to show")
    pictures = [_read_image(file) for file in args.images]
    import torch

    from rewardiv.framing import to_tensor
    from rewardiv.rewards import load_reward

    device = pick_device(args.device)
    rewards: dict[str, list[float]] = {}
    with torch.no_grad():
        for name in args.reward:
            reward = load_reward(name, device=device)
            scores = (reward.official([picture], [args.prompt]) if args.official
                      else reward(to_tensor(picture).to(device), [args.prompt]) for picture in pictures)
            rewards[name] = [score.item() for score in scores]
    print(json.dumps({
        "prompt": args.prompt, "images": args.images, "rewards": rewards,
        "reward_mean": {name: sum(values) / len(values) for name, values in rewards.items()},
        "preprocessing": "official" if args.official else "differentiable", "versions": reward.versions,
    }, indent=1, ensure_ascii=False))


def _add_sample(parser: argparse.ArgumentParser) -> None:
    default = SampleConfig()
    parser.add_argument("--model", default=default.model,
                        help="name, diffusers folder, .safetensors checkpoint or hub id (%(default)s)")
    parser.add_argument("--lora", action="append", metavar="LORA[=WEIGHT]",
                        help=f"name, folder, .safetensors file or hub id; repeat it for several ({default.lora})")
    parser.add_argument("--prompt", default=default.prompt, help="what to draw (%(default)s)")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--seeds", default=format_seeds(default.seeds), help="such as 0-7,12 (%(default)s)")
    parser.add_argument("--method", action="append", help=f"repeat it for several ({', '.join(default.methods)})")
    parser.add_argument("--reward", action="append", help="repeat it for several (the one the LoRA was trained on)")
    parser.add_argument("--num-inference-steps", type=int, default=default.num_inference_steps, metavar="N",
                        help="denoising steps (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=default.guidance_scale, metavar="X",
                        help="classifier-free guidance, 1 is off (%(default)g)")
    parser.add_argument("--guidance-rescale", type=float, default=default.guidance_rescale, metavar="X",
                        help="against overexposure by guidance, 0 to 1 (%(default)g: off)")
    parser.add_argument("--scheduler", default=default.scheduler,
                        help=f"{', '.join(SCHEDULERS)} (%(default)s: the model's own)")
    for side in ("height", "width"):
        parser.add_argument(f"--{side}", type=int, default=getattr(default, side), metavar="PX",
                            help="of the images, a multiple of 8 (the model's own)")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="a folder that holds nothing yet")
    _add_device(parser)
    parser.add_argument("--dtype", default=DTYPES[0], help=f"{', '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--offload", action="store_true",
                        help="keep the text encoders and the autoencoder off the device while they aren't used")
    parser.add_argument("--safety", action=argparse.BooleanOptionalAction, default=None,
                        help="black out what the model's own safety checker flags (on where the host is public)")


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file of any size; transparent is white")
    parser.add_argument("--model", default="emoji", help="the model whose rewards are meant (%(default)s)")
    parser.add_argument("--reward", action="append", required=True, help="repeat it for several")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the images were to show")
    parser.add_argument("--official", action="store_true", help="prepare the images as each reward's own package does, for "
                        "comparison with published scores, and not as `sample` and `train` score them")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (%(default)s)")


def _read_image(file: str) -> Picture:
    """An image file as an RGB picture, laid on white where it is transparent."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            rgba = picture.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {file}: {error}") from error
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _summary(result: Result, folder: Path) -> str:
    lines = [f"{'method':24} {result.reward:>14} {'SCD':>9} {'spread':>8} {'nfe':>5}"]
    for method, score in result.scores.items():
        spectral = score.spectral
        distance = f"{spectral.scd:9.3g} {spectral.trace_ratio:8.0%}" if spectral else f"{'-':>9} {'-':>8}"
        lines.append(f"{method:24} {score.reward_mean:14.4g} {distance} {score.nfe:5}")
    notes = {score.note for score in result.scores.values() if score.note}
    return "\n".join([*lines, *sorted(notes), f"{folder / 'grid.png'} in {result.elapsed_s:.1f} s"])
