"""The documentation inside the package: pages by name, their sections, and the texts that other surfaces quote.

``docs/index.md`` names every page once, in groups; some pages have sections that a reader may ask for by name.
Nothing here needs more than the standard library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files

from hessdiag.errors import UsageError

INDEX = "index.md"
SECTIONED = ("measures.md", "warnings.md", "codes.md")
"""Pages whose headings are names to ask for."""
ENTRY = re.compile(r"^- \[(?P<name>[^\]]+)\]\((?P<file>[\w.-]+\.md)\): (?P<summary>.+)$")
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)([\w./#-]+)\)")
SENTENCE = re.compile(r"(?<=\w{2}[.])\s")
FENCE = "```"


@dataclass(frozen=True, slots=True)
class Page:
    """What can be asked for by a name.

    Attributes:
        name: as `find` takes it.
        group: the heading it is listed under.
        summary: one line.
        file: of the folder ``docs``.
        heading: of its section there; empty for the whole file.
    """

    name: str
    group: str
    summary: str
    file: str
    heading: str = ""


@cache
def source(file: str, *, comments: bool = False) -> str:
    """The Markdown of a file of the folder ``docs``; comments mark what a program writes, and are no text."""
    whole = (files("hessdiag") / "docs" / file).read_text(encoding="utf-8")
    return whole if comments else re.sub(r"^<!--.*-->\n", "", whole, flags=re.MULTILINE)


@cache
def pages() -> Mapping[str, Page]:
    """Every page by name: those of the index in its order, then the sections of `SECTIONED`."""
    found: dict[str, Page] = {}
    group = ""
    for line in source(INDEX).splitlines():
        if line.startswith("## "):
            group = line[3:].strip()
        elif entry := ENTRY.match(line):
            found[entry["name"]] = Page(entry["name"], group, entry["summary"], entry["file"])
    for file in SECTIONED:
        for page in _sections(file):
            if _plain(page.name) not in map(_plain, found):
                found[page.name] = page
    return found


def find(name: str) -> Page:
    """The page of a name; case, spaces, hyphens and underscores do not count.

    Raises:
        UsageError: there is none; the text has the nearest name.
    """
    known = {_plain(one): page for one, page in pages().items()}
    if page := known.get(_plain(name)):
        return page
    near = get_close_matches(_plain(name), known, 1)
    meant = f"did you mean {known[near[0]].name}? " if near else ""
    msg = f"no page {name!r}: {meant}hessdiag explain lists all of them"
    raise UsageError(msg)


def text(page: Page) -> str:
    """The Markdown of a page, or of its section."""
    whole = source(page.file)
    if not page.heading:
        return whole
    return next(body for heading, body in _cut(whole) if heading == page.heading)


@dataclass(frozen=True, slots=True)
class Meaning:
    """A term, or several that share a page, in one paragraph.

    Attributes:
        names: of the terms.
        text: plain.
    """

    names: tuple[str, ...]
    text: str


def meanings(names: Iterable[str]) -> list[Meaning]:
    """What terms mean, each page once; a name without a page is left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(names):
        if page := pages().get(name):
            found.setdefault((page.file, page.heading), []).append(name)
    return [Meaning(tuple(group), meaning(group[0])) for group in found.values()]


def meaning(name: str) -> str:
    """What a term means, as plain text: the first paragraph of its page.

    Raises:
        UsageError: it has no page.
    """
    return _unmarked(_paragraph(text(find(name)).splitlines()[1:]))


def unlinked(markdown: str) -> tuple[str, list[str]]:
    """The Markdown without links to other pages, and the names of these pages, each once."""
    named: dict[str, None] = {}

    def shorten(link: re.Match[str]) -> str:
        target = link[2].partition("#")[0]
        named.update({name: None for name in _first_names() if pages()[name].file == target})
        return link[1]

    parts = markdown.split(FENCE)
    parts[::2] = [LINK.sub(shorten, part) for part in parts[::2]]
    return FENCE.join(parts), list(named)


def _first_names() -> list[str]:
    """The first name of each file."""
    found: dict[str, str] = {}
    for page in pages().values():
        if not page.heading:
            found.setdefault(page.file, page.name)
    return list(found.values())


def _paragraph(lines: list[str]) -> str:
    begun: list[str] = []
    for line in lines:
        if line.strip():
            begun.append(line.strip())
        elif begun:
            break
    return " ".join(begun)


def _unmarked(markdown: str) -> str:
    """Without the marks of Markdown; what stands in code keeps its characters."""
    plain = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", markdown)
    parts = plain.split("`")
    parts[::2] = [re.sub(r"\*+", "", part) for part in parts[::2]]
    return "".join(parts)


def _sections(file: str) -> Iterator[Page]:
    """The sections of both levels that say something; those of the second level are the groups."""
    group = ""
    for heading, body in _cut(source(file)):
        name = heading.lstrip("# ")
        group = name if heading.startswith("## ") else group
        first = _unmarked(_paragraph(body.splitlines()[1:]))
        if name and first:
            yield Page(name, group, SENTENCE.split(first)[0], file, heading)


def _cut(markdown: str) -> Iterator[tuple[str, str]]:
    """Headings of the second and third level, each with its text up to the next one, heading included."""
    heading, body, inside = "", list[str](), False
    for line in markdown.splitlines():
        inside ^= line.startswith(FENCE)
        if line.startswith(("## ", "### ")) and not inside:
            yield heading, "\n".join(body) + "\n"
            heading, body = line, []
        body.append(line)
    yield heading, "\n".join(body) + "\n"


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()
