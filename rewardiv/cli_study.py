"""The command `study`: build one from images, show what its votes say, export it as a data set."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from rewardiv.errors import UserError

COMMANDS = {
    "build": "make a study of images that sample or sweep has drawn",
    "results": "win rates, rankings, agreement and what they cost, from the votes so far",
    "export": "votes, preference pairs and pictures as a data set with a codebook",
}
EPILOG = """\
examples:
  python -m rewardiv sample --prompt "a cat face" --seeds 0-15 --output-dir cats
  python -m rewardiv sample --prompt "a red apple" --seeds 0-15 --output-dir apples
  python -m rewardiv study build --from cats --from apples --output-dir study
  python -m rewardiv study results study
  python -m rewardiv study export study --output-dir votes

Votes are kept in STUDY/votes.db, or in PostgreSQL where REWARDIV_DATABASE_URL names it."""


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own commands and their flags."""
    parser.epilog = EPILOG
    commands = parser.add_subparsers(dest="study_command", metavar="COMMAND", required=True)
    own = {name: commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False)
           for name, about in COMMANDS.items()}
    build = own["build"]
    build.add_argument("--from", action="append", required=True, dest="folders", metavar="DIR",
                       help="output folder of sample or sweep; repeat it for several")
    build.add_argument("--output-dir", required=True, metavar="STUDY", help="a folder that holds nothing yet")
    build.add_argument("--title", metavar="TEXT", help="what raters read first")
    build.add_argument("--question", action="append", metavar="NAME",
                       help="diversity, quality or fit; repeat it for several (all)")
    build.add_argument("--grid-side", type=int, metavar="N", help="2 or 3: images in a row and rows of a set (2)")
    build.add_argument("--num-ballots", type=int, metavar="N", help="that count, a rater (18)")
    build.add_argument("--min-view-s", type=float, metavar="S", help="an answer that comes sooner is refused (1.5)")
    build.add_argument("--consent-file", metavar="FILE", help="text that raters agree to, in place of the built-in one")
    build.add_argument("--seed", type=int, metavar="N", help="of the attention checks (0)")
    for name in ("results", "export"):
        own[name].add_argument("study", metavar="STUDY", help="the study's folder")
    own["results"].add_argument("--json", action="store_true", help="all numbers, as JSON")
    own["results"].add_argument("--all", action="store_true", help="with the raters whom the rules exclude")
    own["export"].add_argument("--output-dir", required=True, metavar="DIR", help="a folder that holds nothing yet")


def run_study(args: argparse.Namespace) -> None:
    """Run one of the commands."""
    {"build": _build, "results": _results, "export": _export}[args.study_command](args)


def _build(args: argparse.Namespace) -> None:
    from rewardiv.study.build import build_study
    from rewardiv.study.design import StudyConfig

    names = ("title", "grid_side", "num_ballots", "min_view_s", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = StudyConfig(**given, **({"questions": tuple(args.question)} if args.question else {}))
    if args.consent_file:
        config = replace(config, consent=_text(args.consent_file))
    study = build_study(args.folders, args.output_dir, config)
    prompts = len({one.prompt for one in study.sets})
    print(f"{len(study.pairs)} pairs of sets of {config.set_size} images: {len(study.methods)} methods, {prompts} prompts; "
          f"{len(config.questions)} questions each\n{args.output_dir}")


def _results(args: argparse.Namespace) -> None:
    from rewardiv.study.design import read_study
    from rewardiv.study.results import results, summary
    from rewardiv.study.storage import Store, database_url

    study = read_study(args.study)
    found = results(study, Store(database_url(args.study)), apply_exclusions=not args.all)
    print(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) if args.json else summary(found))


def _export(args: argparse.Namespace) -> None:
    from rewardiv.study.design import read_study
    from rewardiv.study.export import export_study
    from rewardiv.study.storage import Store, database_url

    study = read_study(args.study)
    print(export_study(study, Store(database_url(args.study)), args.study, args.output_dir))


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the consent text {file}: {error}") from error
