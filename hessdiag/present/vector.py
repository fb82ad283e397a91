"""Figures as files: reproducible, accessible SVG that follows the page's text colour, and PNG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

from hessdiag.errors import UsageError
from hessdiag.hashing import of_text
from hessdiag.shown import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Looks black, and is the sentinel `svg` turns into ``currentColor`` so that one SVG serves light and dark."""

_DIGITS = re.compile(r"(-?\d+\.\d{2})\d+")
_COORDINATES = re.compile(r'(?<=[ \n])(?:d|x|y|x1|x2|y1|y2|transform|points)="[^"]*"')
_LINES_ONLY = re.compile(r'^[-\d. L]*(?: z)? ?"$')
_ID = re.compile(r'\bid="([^"]*)"')


def svg(drawn: Axes | Figure, *, title: str = "", description: str = "", prefix: str | None = None) -> str:
    """The figure as one ``<svg>`` element, the same bytes for the same figure.

    Text stays text, black becomes ``currentColor`` and the background is left out, so the element takes
    the colours of the page it stands in.

    Args:
        drawn: any matplotlib figure, or axes of it.
        title: its accessible name; the axes' title if empty.
        description: longer text for those who cannot see it.
        prefix: put before every id, for pages with several figures; a digest of the content by default.
    """
    import matplotlib

    stream, figure = io.StringIO(), _figure(drawn)
    with matplotlib.rc_context({"svg.hashsalt": "hessdiag", "svg.fonttype": "none"}), _any_font():
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=nothing, facecolor="none")
    text = stream.getvalue()
    text = plain(text[text.index("<svg") :].strip())
    return _accessible(_themed(text), plain(title or _title(figure)), plain(description), prefix)


def png(drawn: Axes | Figure, *, dpi: int = 200) -> bytes:
    """The figure as PNG bytes, the same for the same figure."""
    stream = io.BytesIO()
    with _any_font():
        _figure(drawn).savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


@contextmanager
def _any_font() -> Iterator[None]:
    """No warning about names in scripts matplotlib has no font for: SVG text is drawn by the reader's browser."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _figure(drawn: Axes | Figure) -> Figure:
    figure = drawn.get_figure(root=True)
    if figure is None:
        msg = "these axes were removed from their figure: draw on axes that still belong to one"
        raise UsageError(msg)
    return figure


def _title(figure: Figure) -> str:
    return next((ax.get_title(loc="left") or ax.get_title() for ax in figure.axes), "") or "figure"


def _themed(text: str) -> str:
    text = text.replace(INK, "currentColor")
    # A hundredth of a point is invisible, and the digits below it are half of the file.
    text = _COORDINATES.sub(lambda match: _shorter(match.group()), text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    # The reader's own sans-serif is narrower than the one the layout was measured with, so labels still fit.
    text = re.sub(r"font-family: [^;]*; ", "", text)
    # matplotlib's rule for "*" would reach every element of the page the figure stands in.
    return re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)


def _shorter(attribute: str) -> str:
    """Fewer digits, one line, and one L for a whole run of lines."""
    text = " ".join(_DIGITS.sub(r"\1", attribute).split())
    first, mark, rest = text.partition(" L ")
    return first + mark + rest.replace(" L ", " ") if "M" not in rest and _LINES_ONLY.search(rest) else text


def _accessible(text: str, title: str, description: str, prefix: str | None) -> str:
    if prefix is None:
        prefix = "h" + of_text(text + title + description)[:8] + "-"
    used = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', text))
    targets = {a or b for a, b in used}
    text = _ID.sub(lambda match: f'id="{prefix}{match[1]}"' if match[1] in targets else "", text)
    text = (
        re.sub(r">\s+<", "><", text)
        .replace("<g >", "<g>")
        .replace("<defs></defs>", "")
        .replace("<g />", "")
        .replace("<g/>", "")
    )
    text = text.replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')
    head, body = text.split(">", 1)
    head = re.sub(r'\s(version|xmlns:xlink)="[^"]*"', "", head).replace("\n", " ")
    body = body.replace("xlink:href", "href")
    head += (
        f' role="img" aria-labelledby="{prefix}title {prefix}desc"'
        ' style="font-family: sans-serif; stroke-linejoin: round; stroke-linecap: butt"'
    )
    names = f'<title id="{prefix}title">{escape(plain(title))}</title>'
    names += f'<desc id="{prefix}desc">{escape(plain(description or title))}</desc>'
    return f"{head}>{names}{body}\n"
