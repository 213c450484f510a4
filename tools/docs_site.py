"""Hooks of mkdocs (``make docs``): pages that are made at build time, links out of ``docs/``, and ``llms.txt``."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from verb_pages import verb_pages  # noqa: E402 - found in the folders above

ROOT = Path(__file__).parents[1]
FROM_THE_TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages at the top of the repository, and what they are called in the site."""

_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
_written: dict[str, str] = {}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not in ``docs/``."""
    _written.clear()
    for name, page in FROM_THE_TOP.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=inside(text, name)))
    for name, text in verb_pages().items():
        files.append(File.generated(config, f"commands/{name}", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links from ``docs/`` to the rest of the repository."""
    name = page.file.src_uri
    made = name.startswith("commands/") or name in FROM_THE_TOP.values()
    text = markdown if made else inside(markdown, f"docs/{name}")
    _written[name] = text
    return text


def inside(text: str, source: str) -> str:
    """Text whose links lead to pages of the site; those to other files of the repository become the file's name.

    Args:
        text: Markdown.
        source: The file that it comes from, relative to the repository.
    """
    page = FROM_THE_TOP.get(source, source.removeprefix("docs/"))

    def moved(found: re.Match[str]) -> str:
        said, target, anchor = found.group(1), found.group(2), found.group(3) or ""
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = FROM_THE_TOP.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        if there is None:
            return f"`{file}`" if said.strip("`") in (file, posixpath.basename(file)) else f"{said} (`{file}`)"
        return f"[{said}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)


def on_post_build(config: Any) -> None:
    """Writes the pages as Markdown too, and ``llms.txt``, which lists them with their first sentences."""
    site = Path(config["site_dir"])
    lines = ["# sglp-llm", "", f"> {config['site_description']}.", ""]
    for name in sorted(_written, key=lambda name: (name != "index.md", name)):
        title, first = summary(_written[name])
        lines.append(f"- [{title}]({name}): {first}" if first else f"- [{title}]({name})")
        (site / name).write_text(_written[name], encoding="utf-8")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def summary(markdown: str) -> tuple[str, str]:
    """The title of a page, and its first sentence of prose."""
    bare = re.sub(r"^<!--.*?-->$|^```.*?^```$|^:::.*$|^\|.*$", "", markdown, flags=re.M | re.S)
    title = re.search(r"^# (.+)$", bare, re.M)
    prose = next(
        (part for part in re.split(r"\n\s*\n", bare) if part.strip() and not part.lstrip().startswith("#")), ""
    )
    plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", " ".join(prose.split()))
    return (title[1] if title else ""), re.split(r"(?<=\.)\s", plain, maxsplit=1)[0]
