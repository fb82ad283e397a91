"""Text of users and files on its way out: a terminal, a build server and a spreadsheet find nothing to obey.

Names, notes and errors may hold any character. Every surface shows them through `visible`, and through
`single_spaced` before that where line ends are to become spaces. What ends up as a line of output passes `inert`
too, and tables for spreadsheets are written by `csv_text`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

NEWLINE = "↵"
UNSHOWABLE = "\N{REPLACEMENT CHARACTER}"
JOINER = "\N{WORD JOINER}"  # has no width
REORDERING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # bidirectional: text shown is not text read
SEPARATORS = {0x2028, 0x2029}  # line ends to some readers, not to others
COLOR = r"\x1b\[[0-9;]*m"  # ours: those of names are gone by then
COMMAND = re.compile(rf"^((?:\s|{COLOR})*:)(?=:)", re.MULTILINE)  # GitHub's ::error::
LOGGING = re.compile(r"##(?=\[|v)")  # Azure's ##vso[ and ##[, GitHub's older form; anywhere in a line
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet evaluates what begins so


def visible(text: str, most: int | None = None, *, lines: bool = False) -> str:
    """``text`` on one line, without what XML, a terminal or a reader cannot hold.

    Args:
        text: of a user; any character.
        most: characters at most; the rest becomes ``…``.
        lines: line ends stay, for text of several lines.
    """
    shown = "".join(char if lines and char == "\n" else _shown(char) for char in text.replace("\r\n", "\n"))
    return cut(shown, most)


def single_spaced(text: object) -> str:
    """The text of anything on one line, each run of spaces and line ends as one space."""
    return " ".join(str(text).split())


def cut(text: str, most: int | None) -> str:
    """At most so many characters; the rest becomes ``…``."""
    return text if most is None or len(text) <= most else text[: most - 1] + "…"


def counted(number: int, thing: str) -> str:
    """``1 measure``, ``2 measures``."""
    return f"{number} {thing}{'s' * (number != 1)}"


def ending(text: str, most: int) -> str:
    """At most so many characters, the last ones: paths differ in these."""
    return text if len(text) <= most else "…" + text[len(text) - most + 1 :]


def plain(text: str) -> str:
    """``text`` as a page or a table can show it, line ends kept; see `visible`."""
    return visible(text, lines=True)


def listed(names: Sequence[str], most: int = 6) -> str:
    """``a, b and 3 more``."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(plain(name) for name in names[:most]) + rest


def inert(text: str) -> str:
    """Lines of which no build server takes one for a command."""
    return LOGGING.sub(f"#{JOINER}#", COMMAND.sub(rf"\g<1>{JOINER}", text))


def encodable(cell: Any) -> Any:
    """A cell without what UTF-8 has not, for any table: bytes of a file name that are no text become ``?``.

    pandas refuses them where pyarrow is installed.
    """
    return cell.encode(errors="replace").decode() if isinstance(cell, str) else cell


def table(rows: Iterable[Iterable[Any]], columns: Sequence[str]) -> pd.DataFrame:
    """A table of rows, each cell `encodable`."""
    import pandas as pd

    return pd.DataFrame([[encodable(cell) for cell in row] for row in rows], columns=list(columns))


def csv_text(frame: pd.DataFrame) -> str:
    """A table as CSV; ``'`` stands before texts that a spreadsheet would take for a formula."""
    safe = frame.rename(columns=_cell)
    if len(safe):
        safe = safe.apply(lambda column: column if column.dtype.kind in "biufc" else column.map(_cell))
    return str(safe.to_csv(index=False, lineterminator="\n"))


def _cell(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _shown(char: str) -> str:
    code = ord(char)
    if char == "\n":
        return NEWLINE
    control = code < 0x20 or 0x7F <= code < 0xA0
    alone = 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE  # half a surrogate pair, or no character at all
    return UNSHOWABLE if control or alone or code in REORDERING or code in SEPARATORS else char


def leave_out_torchs_own() -> None:
    """Show none of torch's warnings of its own code, which no user can change; until filters are put back."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"torch(\.|$)")
