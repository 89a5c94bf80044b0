"""Rebuilds assets/emoji from the artists' npm packages: icons with transparency, captions, styles, licences.

Nine packs hold up to seven different drawings of one concept. Every pack becomes one WebP atlas (so that every
file has one licence); `icons.jsonl` says what each cell shows. Training reads only what is committed there.
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from rewardiv.errors import UserError
from rewardiv.runs import write_atomic, write_text

ASSETS = Path(__file__).parents[2] / "assets" / "emoji"
CELL = 96  # pixels of an icon's square cell
COLUMNS = 16  # cells in a row of an atlas


@dataclass(frozen=True)
class Pack:
    """One artist's set: where it comes from, its licence, and the word that asks for its style in a caption."""

    style: str
    word: str
    package: str
    version: str
    licence: str
    credit: str
    url: str


PACKS = (
    Pack("noto", "noto", "@iconify-json/noto", "1.2.9", "Apache-2.0",
         "Noto Emoji, Copyright Google LLC", "https://github.com/googlefonts/noto-emoji"),
    Pack("noto-v1", "blob", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0",
         "Noto Emoji version 1 (the blobs), Copyright Google LLC", "https://github.com/googlefonts/noto-emoji"),
    Pack("twemoji", "twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0",
         "Twemoji, Copyright Twitter, Inc and other contributors; kept up by jdecked",
         "https://github.com/jdecked/twemoji"),
    Pack("fluent", "gradient", "@iconify-json/fluent-emoji", "1.2.7", "MIT",
         "Fluent Emoji, Copyright Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    Pack("fluent-flat", "flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT",
         "Fluent Emoji (flat), Copyright Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    Pack("fluent-3d", "glossy", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT",
         "Fluent Emoji (3D), Copyright Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    Pack("emojione", "soft", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0",
         "EmojiTwo (from EmojiOne 2.3), https://emojitwo.github.io", "https://github.com/EmojiTwo/emojitwo"),
    Pack("fxemoji", "firefox", "@iconify-json/fxemoji", "1.2.2", "CC-BY-4.0",
         "FxEmojis, Copyright Mozilla Foundation", "https://github.com/mozilla/fxemoji"),
    Pack("streamline", "outlined", "@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0",
         "Streamline Emojis, Copyright Webalys / Streamline, https://streamlinehq.com",
         "https://github.com/webalys-hq/streamline-vectors"),
)


def read_concepts() -> list[dict[str, str]]:
    """The rows of assets/emoji/concepts.tsv: family, caption, tier and the icon's name in every pack."""
    with (ASSETS / "concepts.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def rebuild(packages_dir: Path | None = None) -> None:
    """Render every pack into an atlas and write the index and the attribution.

    Args:
        packages_dir: Folder with the packages as `npm pack` names them; missing ones are fetched with npm.

    Raises:
        UserError: If a package can't be fetched or an icon named in concepts.tsv isn't in it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = packages_dir or Path(scratch)
        lines = []
        for pack in tqdm(PACKS, desc="packs", unit="pack"):
            archive = fetch_package(pack, folder)
            cells = list(render_pack(pack, archive))
            atlas = pack_atlas([icon for _, icon in cells])
            name = f"icons-{pack.style}.webp"
            write_atomic(ASSETS / name, lambda p, atlas=atlas: atlas.save(p, quality=88, alpha_quality=95, method=6))
            for cell, (row, _) in enumerate(cells):
                lines.append({"concept": row["slug"], "caption": row["caption"], "family": row["family"],
                              "tier": int(row["tier"]), "style": pack.style, "licence": pack.licence,
                              "file": name, "cell": cell})
    write_text(ASSETS / "icons.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_text(ASSETS / "ATTRIBUTION.md", attribution())


def fetch_package(pack: Pack, folder: Path) -> Path:
    """The package's archive in `folder`, fetched with `npm pack` where it isn't there yet."""
    archive = folder / f"{pack.package.removeprefix('@').replace('/', '-')}-{pack.version}.tgz"
    if not archive.exists():
        command = ["npm", "pack", f"{pack.package}@{pack.version}", "--silent", "--pack-destination", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError("npm is needed to fetch the emoji packages; install Node.js or pass --packages-dir") from error
        except subprocess.CalledProcessError as error:
            raise UserError(f"npm could not fetch {pack.package}@{pack.version}: {error.stderr.strip()[-300:]}") from error
    return archive


def render_pack(pack: Pack, archive: Path) -> Iterator[tuple[dict[str, str], Image.Image]]:
    """Every concept that the pack draws, as (row of concepts.tsv, RGBA image of CELL × CELL pixels)."""
    column = pack.style
    rows = [(row, name) for row in read_concepts() for name in row[column].split(",")[:1] if name]
    with tarfile.open(archive) as tar:
        if pack.style == "fluent-3d":
            for row, name in rows:
                data = tar.extractfile(f"package/assets/{name}").read()
                yield row, Image.open(io.BytesIO(data)).convert("RGBA").resize((CELL, CELL), Image.Resampling.LANCZOS)
        else:
            icons = json.load(tar.extractfile("package/icons.json"))
            for row, name in rows:
                yield row, render_svg(icons, name)


def render_svg(icons: dict, name: str) -> Image.Image:
    """One icon of an Iconify set, following aliases, drawn at CELL × CELL pixels on transparency."""
    import resvg_py

    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    if name not in icons["icons"]:
        raise UserError(f"the set '{icons['prefix']}' has no icon '{name}' named in concepts.tsv")
    icon = icons["icons"][name]
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>')
    png = resvg_py.svg_to_bytes(svg_string=svg, width=CELL, height=CELL)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (CELL, CELL):  # an icon that isn't square: centre it
        square = Image.new("RGBA", (CELL, CELL))
        square.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
        image = square
    return image


def pack_atlas(icons: list[Image.Image]) -> Image.Image:
    """Lay cells out row by row in one RGBA image."""
    rows = -(-len(icons) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for cell, icon in enumerate(icons):
        atlas.paste(icon, (cell % COLUMNS * CELL, cell // COLUMNS * CELL))
    return atlas


def attribution() -> str:
    """The text of ATTRIBUTION.md: for each pack its credit, licence, source and what was changed."""
    links = {"Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0", "MIT": "https://opensource.org/license/mit",
             "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/"}
    parts = [
        "# Emoji art: whose it is\n",
        "The icons in this folder were drawn by others. Each atlas holds one artist's set, under that set's licence.",
        f"Changes made: rendered at {CELL} px, a selection packed into one lossy WebP image per set; while training they",
        "are scaled, moved, mirrored and put on coloured backgrounds. Rebuilt by `python -m rewardiv pretrain data`.\n",
    ]
    for pack in PACKS:
        parts += [f"## icons-{pack.style}.webp", f"- {pack.credit}", f"- Licence: [{pack.licence}]({links[pack.licence]})",
                  f"- Source: <{pack.url}>, from the npm package `{pack.package}` {pack.version}\n"]
    parts += ["EmojiTwo asks for this note where its art is shown: emoji art by [EmojiTwo](https://emojitwo.github.io),",
              "an open-source continuation of EmojiOne, licensed CC-BY 4.0.\n", MIT_NOTICE]
    return "\n".join(parts)


MIT_NOTICE = """The MIT licence of Fluent Emoji asks for this notice:

> Copyright (c) Microsoft Corporation.
>
> Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
> documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
> rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
> persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright notice
> and this permission notice shall be included in all copies or substantial portions of the Software.
>
> THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
> WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
> COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
> OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
