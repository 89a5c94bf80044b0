"""Prompts of a sweep: the built-in list, published sets from local files, own lists; by category, or some of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rewardiv.errors import UserError, nearest
from rewardiv.registry import ROOT

EMOJI = ROOT / "assets" / "emoji"
PUBLISHED = {  # their lists repeat a few prompts, which count once
    "partiprompts": "PartiPrompts.tsv from https://github.com/google-research/parti",
    "hpsv2": "the benchmark's prompts from https://github.com/tgxs002/HPSv2: a folder of one .json or .txt file a style",
}
TABLES = {".tsv": "\t", ".csv": ","}
LISTS = (".json", ".txt", *TABLES)


class Prompt(NamedTuple):
    """A prompt and its category, "" where it has none."""

    text: str
    category: str = ""


def read_prompt_sets(
    sets: Sequence[str], prompts: Sequence[str] = (), *, categories: Sequence[str] = (), max_prompts: int = 0
) -> tuple[Prompt, ...]:
    """The prompts of several sets and of the caller's own, each once.

    Args:
        sets: "emoji"; "partiprompts:FILE" or "hpsv2:FILE", whose repetitions count once; or a FILE of one's own, where a
            repetition is refused. A file holds a prompt a line (.txt), a list of texts or of objects with a "prompt"
            (.json), or a table with a column "prompt" (.tsv, .csv), and "category" where there is one; a folder of such
            files has their names as categories.
        prompts: Further ones; they have no category.
        categories: Only these, in any case; () is all.
        max_prompts: That many, spread evenly over what is left; 0 is all.

    Raises:
        UserError: If a set is unknown, a file is missing or damaged, holds an empty or repeated prompt, a category has no
            prompt, or nothing is left.
    """
    own = [Prompt(text.strip()) for text in prompts]
    if any(not prompt.text for prompt in own):
        raise UserError("a prompt is empty; say what to draw")
    if twice := [prompt.text for k, prompt in enumerate(own) if prompt in own[:k]]:
        raise UserError(f"the prompt '{twice[0]}' is given twice; give each once")
    found = {prompt.text: prompt for name in sets for prompt in _read_set(name)}
    found = {prompt.text: prompt for prompt in own} | found
    kept = _of_categories(list(found.values()), categories)
    if not kept:
        raise UserError("a sweep needs prompts; name a set, such as emoji, or give some")
    if 0 < max_prompts < len(kept):
        kept = [kept[k * len(kept) // max_prompts] for k in range(max_prompts)]
    return tuple(kept)


def _read_set(name: str) -> list[Prompt]:
    """The prompts of one set."""
    known, _, file = name.partition(":")
    if known == "emoji" and not file:
        families = {row.get("caption", ""): row.get("family", "") for row in _table(EMOJI / "concepts.tsv")}
        return [Prompt(text, families.get(text, "")) for text in _lines(EMOJI / "prompts.txt")]
    if known in PUBLISHED:
        if not file:
            raise UserError(f"the prompt set '{known}' isn't part of this project; get {PUBLISHED[known]}, and write "
                            f"{known}:PATH")
        return [prompt for _, prompt in _read(Path(file)) if prompt.text]
    path = Path(name)
    if not path.exists():
        raise UserError(f"unknown prompt set '{name}', and no such file{nearest(name, ('emoji', *PUBLISHED))}")
    prompts, places = [], {}
    for place, prompt in _read(path):
        if not prompt.text:
            raise UserError(f"{place} is empty; remove it, or write a prompt there")
        if prompt.text in places:
            raise UserError(f"{place} repeats {places[prompt.text]} '{prompt.text}'; remove one of them")
        places[prompt.text] = place
        prompts.append(prompt)
    return prompts


def _of_categories(prompts: list[Prompt], categories: Sequence[str]) -> list[Prompt]:
    if not categories:
        return prompts
    known = {prompt.category.casefold(): prompt.category for prompt in prompts if prompt.category}
    for name in categories:
        if name.casefold() not in known:
            there = f"; there are {', '.join(sorted(known.values()))}" if known else "; these prompts have none"
            raise UserError(f"no prompt has the category '{name}'{there}")
    wanted = {name.casefold() for name in categories}
    return [prompt for prompt in prompts if prompt.category.casefold() in wanted]


def _read(path: Path) -> Iterator[tuple[str, Prompt]]:
    """Where a prompt stands and what it is, for each of a file or folder; empty ones too."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in LISTS)
        if not files:
            raise UserError(f"the folder {path} holds no prompt list; it takes {', '.join(LISTS)}")
        for file in files:
            yield from ((place, prompt if prompt.category else Prompt(prompt.text, file.stem)) for place, prompt in _read(file))
    elif path.suffix == ".json":
        yield from ((f"{path}, entry {k},", prompt) for k, prompt in enumerate(_json_prompts(path), 1))
    elif path.suffix in TABLES:
        for number, row in enumerate(_table(path), 2):
            if "prompt" not in row:
                raise UserError(f"{path} has no column 'prompt'; its first line must name the columns")
            yield f"{path}, line {number},", Prompt(row["prompt"].strip(), row.get("category", "").strip())
    else:
        yield from ((f"{path}, line {number},", Prompt(line)) for number, line in enumerate(_lines(path), 1))


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _text(path).splitlines()]


def _table(path: Path) -> Iterator[dict[str, str]]:
    """Rows by their lower-case column names; quotes in a .tsv are letters."""
    quoting = csv.QUOTE_NONE if path.suffix == ".tsv" else csv.QUOTE_MINIMAL
    for row in csv.DictReader(io.StringIO(_text(path)), delimiter=TABLES[path.suffix], quoting=quoting):
        yield {str(name).strip().lower(): value or "" for name, value in row.items() if isinstance(value, str | None)}


def _json_prompts(path: Path) -> Iterator[Prompt]:
    try:
        entries = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    for entry in entries if isinstance(entries, list) else [None]:
        fields = {"prompt": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
            raise UserError(f"{path} must be a list of texts, or of objects with a \"prompt\"")
        yield Prompt(fields["prompt"].strip(), str(fields.get("category") or "").strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts {path}: {error}") from error
