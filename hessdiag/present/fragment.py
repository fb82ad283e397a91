"""What a notebook shows for an `Analysis`: a table and the density at once, in the notebook's own colours."""

from __future__ import annotations

from html import escape

from hessdiag.present.tables import COLUMNS, metric_rows
from hessdiag.present.words import label, reading
from hessdiag.results import Analysis
from hessdiag.shown import plain

_STYLE = "text-align:left;vertical-align:top;padding:.2em .9em .2em 0"
_SMALL = '<p style="font-size:85%;opacity:.85">'
_SCROLLS = '<div style="overflow-x:auto">'


def notebook(analysis: Analysis) -> str:
    """An HTML fragment without style sheet or script, below 200 kB: it inherits font and colours.

    Args:
        analysis: any; the density is shown only where a spectrum was measured.
    """
    head = "".join(f'<th scope="col" style="{_STYLE}">{escape(column)}</th>' for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td {_cell(index)}>{escape(cell)}</td>" for index, cell in enumerate(row)) + "</tr>"
        for row in metric_rows(analysis)
    )
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in reading(analysis))
    warnings = "".join(f"<p>⚠ {escape(plain(warning))}</p>" for warning in analysis.warnings)
    return (
        '<div style="color:inherit;max-width:56em;overflow-wrap:anywhere">'
        f"<p><strong>{escape(label('', analysis))}</strong></p>"
        f'{_SCROLLS}<table style="font-variant-numeric:tabular-nums;overflow-wrap:normal">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"{warnings}{_density(analysis)}"
        f"<details><summary>What the numbers say</summary><ul>{sentences}</ul></details></div>"
    )


def _cell(index: int) -> str:
    """Numbers and names stay on one line."""
    return f'style="{_STYLE}{";white-space:nowrap" * (COLUMNS[index] != "how it is known")}"'


def _density(analysis: Analysis) -> str:
    """Bulk and outliers open, the logarithmic picture folded."""
    if analysis.spectrum is None:
        return ""
    from hessdiag.present.apart import apart, apart_caption
    from hessdiag.present.density import density, density_caption
    from hessdiag.present.vector import svg

    text, other = apart_caption(analysis), density_caption(analysis)
    first = svg(apart(analysis, show_caption=False), title="Bulk and outliers", description=text)
    second = svg(density(analysis, show_caption=False), title="Eigenvalue density", description=other)
    return (
        f"{_SCROLLS}{first}</div>{_SMALL}{escape(plain(text))}</p>"
        f"<details><summary>On a logarithmic axis</summary>{_SCROLLS}{second}</div>"
        f"{_SMALL}{escape(plain(other))}</p>"
        "</details>"
    )
