"""A picture in a notebook that is drawn anew while the training runs; outside of one there is none."""

from __future__ import annotations

import sys
from typing import Any

WAITING = "nothing is measured yet"


class Live:
    """One display of a notebook.

    Attributes:
        shown: whether there is one.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def shown(self) -> bool:
        """Whether a display was opened."""
        return self._handle is not None

    def open(self) -> None:
        """Open a display where the code runs in a notebook; IPython is there already, or there is no notebook."""
        running = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        display = getattr(sys.modules.get("IPython.display"), "display", None)
        if running is not None and display is not None:
            self._handle = display({"text/plain": WAITING}, raw=True, display_id=True)

    def update(self, picture: str) -> None:
        """Show another picture, an <svg> element, in the same place."""
        self._handle.update({"image/svg+xml": picture, "text/plain": "trajectory"}, raw=True)
