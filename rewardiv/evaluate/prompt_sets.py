"""Prompts of a sweep: the built-in list, published sets from the hub or a copy, own lists; by category, or some of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rewardiv import hub
from rewardiv.errors import UserError, nearest
from rewardiv.registry import PROMPTS

BUILT_IN = tuple(name for name, entry in PROMPTS.items() if not entry.sources)
PUBLISHED = tuple(name for name, entry in PROMPTS.items() if entry.sources)  # they repeat a few prompts, which count once
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
        sets: "emoji" or "emoji-composed"; "partiprompts" or "hpsv2" from the hub, or a copy of one as "partiprompts:PATH",
            where repetitions count once; or a PATH of one's own, where a repetition is refused. A file holds a prompt a line
            (.txt), a list of texts or of objects with a "prompt" (.json), or a table with a column "prompt" (.tsv, .csv), and
            "category" where there is one; a folder of such files has their names as categories.
        prompts: Further ones; they have no category, and are taken whatever `categories` says.
        categories: Of the sets' prompts only these, in any case; () is all.
        max_prompts: That many, spread evenly over what is left; 0 is all.

    Raises:
        UserError: If a set is unknown or not on this machine, a file is missing or damaged, holds no prompt, an empty or
            repeated one, a category has no prompt, or nothing is left.
    """
    own = [Prompt(text.strip()) for text in prompts]
    if any(not prompt.text for prompt in own):
        raise UserError("a prompt is empty; say what to draw")
    if twice := [prompt.text for k, prompt in enumerate(own) if prompt in own[:k]]:
        raise UserError(f"the prompt '{twice[0]}' is given twice; give each once")
    if categories and not sets:
        raise UserError(f"the category '{categories[0]}' chooses among the prompts of a set; name one, such as emoji")
    found = {prompt.text: prompt for prompt in _of_categories([p for name in sets for p in _read_set(name)], categories)}
    kept = list(({prompt.text: prompt for prompt in own} | found).values())
    if not kept:
        raise UserError("a sweep needs prompts; name a set, such as emoji, or give some")
    if 0 < max_prompts < len(kept):
        kept = [kept[k * len(kept) // max_prompts] for k in range(max_prompts)]
    return tuple(kept)


def _read_set(name: str) -> list[Prompt]:
    """The prompts of one set."""
    known, _, file = name.partition(":")
    if name in BUILT_IN:
        file = Path(PROMPTS[name].path)
        families = {row.get("caption", ""): row.get("family", "") for row in _table(file.parent / "concepts.tsv")}
        return [Prompt(text, families.get(text, "")) for text in _lines(file)]
    if known in PUBLISHED:
        return [prompt for _, prompt in (_read(Path(file)) if file else _published(known)) if prompt.text]
    path = Path(name)
    if not path.exists():
        raise UserError(f"unknown prompt set '{name}', and no such file{nearest(name, PROMPTS)}")
    prompts, places = [], {}
    for place, prompt in _read(path):
        if not prompt.text:
            raise UserError(f"{place} is empty; remove it, or write a prompt there")
        if prompt.text in places:
            raise UserError(f"{place} repeats {places[prompt.text]} '{prompt.text}'; remove one of them")
        places[prompt.text] = place
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one a line, or remove it from the sweep")
    return prompts


def _published(name: str) -> Iterator[tuple[str, Prompt]]:
    """As `_read`, of a published set that was fetched from the hub."""
    entry = PROMPTS[name]
    try:
        hub.local_path(entry)
    except UserError as error:
        raise UserError(f"{error}, or name a copy of yours as {name}:PATH") from error
    files = hub.local_files(entry.sources[0])
    return _by_name(files) if len(files) > 1 else _read(files[0])


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
        yield from _by_name(files)
    elif path.suffix == ".json":
        yield from ((f"{path}, entry {k},", prompt) for k, prompt in enumerate(_json_prompts(path), 1))
    elif path.suffix in TABLES:
        for number, row in enumerate(_table(path), 2):
            if "prompt" not in row:
                raise UserError(f"{path} has no column 'prompt'; its first line must name the columns")
            yield f"{path}, line {number},", Prompt(row["prompt"].strip(), row.get("category", "").strip())
    else:
        yield from ((f"{path}, line {number},", Prompt(line)) for number, line in enumerate(_lines(path), 1))


def _by_name(files: Sequence[Path]) -> Iterator[tuple[str, Prompt]]:
    """As `_read`, of several files, whose names are the categories where they name none."""
    for file in files:
        yield from ((place, prompt if prompt.category else Prompt(prompt.text, file.stem)) for place, prompt in _read(file))


def _lines(path: Path) -> list[str]:
    """Stripped; what ends the last line begins no further one."""
    text = _text(path).removesuffix("\n")
    return [line.strip() for line in text.split("\n")] if text else []


def _table(path: Path) -> Iterator[dict[str, str]]:
    """Rows by their lower-case column names; quotes in a .tsv are letters."""
    quoting = csv.QUOTE_NONE if path.suffix == ".tsv" else csv.QUOTE_MINIMAL
    try:
        for row in csv.DictReader(io.StringIO(_text(path)), delimiter=TABLES[path.suffix], quoting=quoting):
            yield {str(name).strip().lower(): value or "" for name, value in row.items() if isinstance(value, str | None)}
    except csv.Error as error:
        raise UserError(f"cannot read the prompts {path}: {error}") from error


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
        return path.read_text(encoding="utf-8-sig")  # a mark of its encoding, which some editors put first, isn't text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts {path}: {error}") from error
