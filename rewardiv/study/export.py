"""The study as a data set for others: votes, preference pairs for training, pictures, and a card with the codebook."""

from __future__ import annotations

import datetime
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewardiv.errors import UserError
from rewardiv.runs import new_dir, write_bytes, write_json, write_text
from rewardiv.study.design import FILE_NAME, QUESTIONS, Study
from rewardiv.study.results import SCORES, choices, chosen, exclusions, results, rules
from rewardiv.study.storage import Row, Store

CODEBOOK = {
    "ballot": "number of the ballot in this file",
    "rater": "number of the rater in this file; it isn't the one in the database",
    "kind": "vote; check (an attention check); repeat (an earlier ballot with sides swapped); practice",
    "position": "place of the ballot in the rater's plan, from 0",
    "question": "diversity, quality or fit",
    "prompt": "what the pictures were to show",
    "method_left": "sampling method of the left set; empty in checks and practice",
    "method_right": "of the right set",
    "seeds": "of both sets, in the order of their images",
    "image_left": "SHA-256 of the left picture, images/<it>.png",
    "image_right": "of the right picture",
    "answer": "left, right or same, as it was given",
    "winner": "method that was chosen, or same; empty in checks and practice",
    "expected": "right answer of a check or practice, else empty",
    "day": "of the vote, UTC, as YYYY-MM-DD; the time of day is left out",
    "server_s": "seconds from handing the ballot out to the answer, by the server's clock",
    "shown_s": "seconds that the pictures were seen, as the browser says",
    "window_width": "of the browser, px",
    "window_height": "of the browser, px",
    "version": "of the program that took the vote",
    "excluded": "rules that the rater broke, with commas; empty where the vote counts",
}
PREFERENCES = {
    "caption": "the prompt",
    "question": "what was asked",
    "image_0": "file of an image of the first method",
    "image_1": "file of the second method's image at the same seed",
    "label_0": "1 where most preferred the first method's set, else 0; sets with as many votes for either are left out",
    "share_0": "share of the votes for the first method's set, a tie counting half",
    "num_votes": "on the two sets",
    "set": "number of the pair of sets: people judged the sets, so that images of one have one label",
    "seed": "of both images",
    "method_0": "first method",
    "method_1": "second method",
}
TABLES = {"votes": CODEBOOK, "votes_all": CODEBOOK, "preferences": PREFERENCES}


def export_study(study: Study, store: Store, source: str | Path, output_dir: str | Path) -> Path:
    """Write a data set into a folder that holds nothing yet; withdrawn answers are in none of its files.

    votes.* holds the votes that count by the study's rules, votes_all.* every vote, with the rules its rater broke.

    Args:
        study: The study.
        store: Its votes.
        source: The study's folder, for the pictures.
        output_dir: Where to.

    Raises:
        UserError: If nobody has voted, a picture is missing, or the folder holds something.
    """
    rows = [row for row in store.answered(study.id) if not row["withdrawn"]]
    if not rows:
        raise UserError("nobody has voted yet, so that there is nothing to export")
    votes = _votes(study, rows)
    counted = [vote for vote in votes if not vote["excluded"]]
    broken = exclusions(study, rows)
    pairs = preferences(study, [row for row in rows if not broken[row["rater_id"]]])
    folder = new_dir(output_dir)
    cells = {Path(pair[side]).name for pair in pairs for side in ("image_0", "image_1")}
    for place, names in (("images", {f"{name}.png" for name in study.images}), ("cells", cells)):
        for name in sorted(names):
            _copy(Path(source) / place / name, folder / place / name)
    for name, table in (("votes", counted), ("votes_all", votes), ("preferences", pairs)):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table))
        write_bytes(folder / f"{name}.parquet", _parquet(table, TABLES[name]))
    write_json(folder / FILE_NAME, study.to_dict())
    for name, applied in (("results", True), ("results_all", False)):
        write_json(folder / f"{name}.json", results(study, store, apply_exclusions=applied))
    write_text(folder / "README.md", card(study, len(counted), len(votes), len(pairs)))
    return folder


def preferences(study: Study, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Image pairs with the label that most raters gave to their sets, for Diffusion-DPO and its like."""
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for choice in choices(study, rows):
        scores[choice.question, choice.pair].append(SCORES[choice.answer])
    found = []
    for number, ((question, ident), own) in enumerate(sorted(scores.items())):
        pair, share = study.pair_by_id[ident], sum(own) / len(own)
        a, b = study.set_by_id[pair.a], study.set_by_id[pair.b]
        if share == 0.5:
            continue
        for seed, first, second in zip(a.seeds, a.cells, b.cells, strict=True):
            found.append({
                "caption": a.prompt, "question": question, "image_0": f"cells/{first}.png", "image_1": f"cells/{second}.png",
                "label_0": int(share > 0.5), "share_0": share, "num_votes": len(own), "set": number, "seed": seed,
                "method_0": a.method, "method_1": b.method,
            })
    return found


def _votes(study: Study, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of the codebook; raters are numbered in an order of their random ids, which tells nothing of when they came."""
    broken = exclusions(study, rows)
    numbers = {name: k for k, name in enumerate(sorted({row["rater_id"] for row in rows}))}
    checks = {check.id: check for check in study.checks}
    found = []
    for row in sorted(rows, key=lambda row: (numbers[row["rater_id"]], row["position"])):
        left = right = winner = ""
        if pair := study.pair_by_id.get(row["item"]):
            a, b = study.set_by_id[pair.a], study.set_by_id[pair.b]
            prompt, seeds = a.prompt, list(a.seeds)
            left, right = (b.method, a.method) if row["swapped"] else (a.method, b.method)
            winner = {"a": a.method, "b": b.method, "same": "same"}[chosen(row)]
        else:
            prompt, seeds = checks[row["item"]].prompt, []
        found.append({
            "ballot": len(found), "rater": numbers[row["rater_id"]], "kind": row["kind"], "position": row["position"],
            "question": row["question"], "prompt": prompt, "method_left": left, "method_right": right, "seeds": seeds,
            "image_left": row["left_image"], "image_right": row["right_image"], "answer": row["answer"], "winner": winner,
            "expected": row["expected"] or "", "day": _day(row["cast_at"]),
            **{name: row[name] for name in ("server_s", "shown_s", "window_width", "window_height", "version")},
            "excluded": ",".join(broken[row["rater_id"]]),
        })
    return found


def card(study: Study, num_counted: int, num_votes: int, num_pairs: int) -> str:
    """The dataset card: what was asked of whom, how, what was left out, and what every column means."""
    config = study.config
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in TABLES)
    asked = "".join(f"- `{name}`: {QUESTIONS[name]}\n" for name in config.questions)
    broken = "".join(f"- `{name}`: {text}\n" for name, text in rules(study).items())
    known = {name.replace("_", " "): value for name, value in study.origin.items() if value not in ("", None)}
    origin = "".join(f"- {name}: `{value}`\n" for name, value in known.items())
    methods = ", ".join(f"`{name}`" for name in study.methods)
    return f"""---
pretty_name: {json.dumps(config.title)}
tags:
- human-feedback
- text-to-image
- preference
configs:
{configs}---

# {config.title}

A blind study of sampling methods for text-to-image models, made with rewardiv: {methods}.
Raters saw two sets of {config.set_size} pictures of one prompt at the same seeds, drawn by two methods, and answered one
question a ballot with left, right or about the same:

{asked}
Pairs with the fewest votes came first; sides were balanced for each pair. A rater answered {config.num_ballots} ballots at
most, besides one for practice, about one attention check in {config.check_every} (a set against one of its pictures
repeated, against the same pictures under noise, or against pictures of another prompt) and one earlier ballot with its sides
swapped. An answer within {config.min_view_s:g} s was refused.

The pictures were made with:

{origin}
## Exclusions

These rules were part of the study's settings before the first vote. `votes` holds what is left after them ({num_counted}
rows), `votes_all` everything ({num_votes} rows), with the rules that a vote's rater broke in `excluded`. Withdrawn answers are
in neither.

{broken}
## Columns of votes

{_table(CODEBOOK)}
## Columns of preferences

{num_pairs} pairs of images for training on preferences; the votes that were excluded have no part in them.

{_table(PREFERENCES)}
## Consent

Raters agreed to this text:

> {config.consent.replace(chr(10), chr(10) + "> ")}
"""


def _table(columns: Mapping[str, str]) -> str:
    return "| column | meaning |\n|---|---|\n" + "".join(f"| `{name}` | {text} |\n" for name, text in columns.items())


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def _parquet(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> bytes:
    """A table with the codebook beside its columns."""
    import pyarrow
    from pyarrow import parquet

    kinds = {"ballot": pyarrow.int64(), "seeds": pyarrow.list_(pyarrow.int64())}
    kinds |= dict.fromkeys(("rater", "position", "window_width", "window_height", "label_0", "num_votes", "set", "seed"),
                           pyarrow.int64())
    kinds |= dict.fromkeys(("server_s", "shown_s", "share_0"), pyarrow.float64())
    schema = pyarrow.schema([pyarrow.field(name, kinds.get(name, pyarrow.string()), metadata={"meaning": text})
                             for name, text in columns.items()])
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows], schema), out, compression="zstd")
    return out.getvalue()


def _copy(source: Path, target: Path) -> None:
    try:
        data = source.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}; export from the folder that build made") from error
    write_bytes(target, data)
