"""Where the points of a trajectory stand along the horizontal axis: at their training steps, or one by one."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from hessdiag.present.axes import Array
from hessdiag.shown import ending, plain
from hessdiag.track.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TICKS = 16  # names below the picture


def by_step(trajectory: Trajectory) -> bool:
    """Whether every point has a training step, in rising order."""
    steps = [point.at for point in trajectory.points]
    known = [step for step in steps if step is not None]
    return len(known) == len(steps) and all(a < b for a, b in pairwise(known))


def places(trajectory: Trajectory) -> Array:
    """The training steps where all are known, else 1, 2, 3, ..."""
    steps = by_step(trajectory)
    found: Array = np.array(
        [point.at if steps else i for i, point in enumerate(trajectory.points, 1)], dtype=np.float64
    )
    return found


def edges(trajectory: Trajectory) -> Array:
    """Half-way between neighbours, (points + 1,): what belongs to each point's place."""
    at = places(trajectory)
    gaps = np.diff(at) if len(at) > 1 else np.ones(1)
    middle = (at[1:] + at[:-1]) / 2
    found: Array = np.concatenate([[at[0] - gaps[0] / 2], middle, [at[-1] + gaps[-1] / 2]])
    return found


def name_places(ax: Axes, trajectory: Trajectory) -> Axes:
    """Ticks, limits and name of the horizontal axis."""
    ends = edges(trajectory)
    ax.set_xlim(ends[0], ends[-1])
    if by_step(trajectory):
        ax.set_xlabel("training step")
        return ax
    names = [plain(point.name) for point in trajectory.points]
    step = math.ceil(len(names) / MOST_TICKS)
    shown = list(range(1, len(names) + 1, step))
    longest = max(len(names[place - 1]) for place in shown)
    turned: dict[str, Any] = {"rotation": 40, "ha": "right"} if longest * len(shown) > 70 else {}
    ax.set_xticks(shown)
    ax.set_xticklabels([ending(names[place - 1], 22) for place in shown], parse_math=False, fontsize=8, **turned)
    ax.set_xlabel("checkpoint")
    return ax
