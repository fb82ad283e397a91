"""What a notebook shows for an `Analysis`: a small table and the density, in the notebook's own colours."""

from __future__ import annotations

from html import escape

from hessdiag.present.tables import COLUMNS, metric_rows
from hessdiag.present.words import label, reading
from hessdiag.results import Analysis
from hessdiag.shown import plain

_CELL = 'style="text-align:left;vertical-align:top;padding:.2em .9em .2em 0"'


def notebook(analysis: Analysis) -> str:
    """A collapsible HTML fragment without style sheet or script: it inherits font and colours.

    Args:
        analysis: any; the density is shown only where a spectrum was measured.
    """
    head = "".join(f'<th scope="col" {_CELL}>{escape(column)}</th>' for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td {_CELL}>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in metric_rows(analysis)
    )
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in reading(analysis))
    warnings = "".join(f"<p>⚠ {escape(plain(warning))}</p>" for warning in analysis.warnings)
    return (
        '<div style="color:inherit;max-width:56em">'
        f"<details open><summary><strong>{escape(label('', analysis))}</strong></summary>"
        '<table style="font-variant-numeric:tabular-nums">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{warnings}<ul>{sentences}</ul></details>{_density(analysis)}</div>"
    )


def _density(analysis: Analysis) -> str:
    if analysis.spectrum is None:
        return ""
    from hessdiag.present.density import density, density_caption
    from hessdiag.present.vector import svg

    ax = density(analysis, show_caption=False)
    text = density_caption(analysis)
    drawing = svg(ax, title="Eigenvalue density", description=text)
    return (
        f"<details><summary>Eigenvalue density</summary>{drawing}"
        f'<p style="font-size:85%;opacity:.85">{escape(plain(text))}</p></details>'
    )
