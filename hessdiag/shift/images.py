"""Distorted pictures, and a problem's model as a function from inputs to scores."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hessdiag.criteria import IGNORE_INDEX, target_of
from hessdiag.engine.landscape.scores import classes
from hessdiag.engine.products.functional import Functional
from hessdiag.errors import NonFiniteError, ProblemError, UsageError
from hessdiag.problem import Problem
from hessdiag.samples import SampleSet
from hessdiag.shift.labels import hits

DEGREES, PADDING = 15.0, 1 / 16  # per unit of strength: rotations to 15°, crops after 1 pixel on pictures of 16


def crop_and_rotate(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """Each picture rotated by U(−15 s, 15 s) degrees and moved by U(−s/16, s/16) of its side.

    After the augmented USPS sets of Sandler et al. (arXiv 2102.11210; padding 1 and ±15°, padding 2 and ±30° on
    16 x 16 pixels), except that moves are continuous (bilinear), so that sizes and strengths between exist. What
    comes in from outside is the picture's darkest value.

    Args:
        images: (n, channels, height, width), floating.
        strength: s, from 0 (nothing).
        generator: on the CPU.

    Raises:
        UsageError: not pictures.
    """
    if images.dim() != 4 or not images.is_floating_point():
        msg = f"inputs are {images.dtype} {tuple(images.shape)}: pictures (n, channels, height, width) are needed"
        raise UsageError(msg + ", or augment=f(inputs, strength, generator)")
    angle, across, down = 2 * torch.rand(3, len(images), generator=generator).to(images) - 1
    angle = angle * strength * DEGREES * torch.pi / 180
    across, down = 2 * strength * PADDING * across, 2 * strength * PADDING * down  # a side is 2 long in the grid
    ratio = images.shape[2] / images.shape[3]
    first = torch.stack([angle.cos(), -angle.sin() * ratio, across], 1)
    second = torch.stack([angle.sin() / ratio, angle.cos(), down], 1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
    dark = images.amin((0, 2, 3), keepdim=True)
    return F.grid_sample(images - dark, grid, padding_mode="zeros", align_corners=False) + dark


def scorer(problem: Problem, samples: SampleSet) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The inputs of a sample set, and the function that scores inputs put in their places.

    Args:
        problem: a classifier on (inputs, targets) batches.
        samples: the test examples.

    Returns:
        Inputs (n, ...), and f(inputs) giving the accuracy of each, (n,); one forward pass in evaluation mode, the
        model left as found.

    Raises:
        ProblemError: batches that are not (inputs, targets), or no classes.
    """
    pairs = [batch for batch in samples.batches if isinstance(batch, list | tuple) and len(batch) == 2]
    if len(pairs) != len(samples.batches) or not all(isinstance(part, Tensor) for part in chain(*pairs)):
        msg = f"data[{samples.split!r}] does not give (inputs, targets) batches: distort the data yourself"
        raise ProblemError(msg)
    inputs = torch.cat([batch[0] for batch in pairs])
    sizes = [len(batch[0]) for batch in pairs]

    def score(moved: Tensor) -> Tensor:
        if moved.shape[:1] != inputs.shape[:1]:
            msg = f"{len(moved)} inputs for {len(inputs)} targets: a distortion keeps number and order"
            raise UsageError(msg)
        batches = zip(torch.split(moved, sizes), (batch[1] for batch in pairs), strict=True)
        return torch.from_numpy(correct(problem, list(batches)))

    return inputs, score


def correct(problem: Problem, batches: list[Any] | tuple[Any, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Whether each example is classified right, (n,): 1 or 0, or the share of its positions or labels.

    Args:
        problem: a classifier; its model runs in evaluation mode and is left as found.
        batches: those of a `SampleSet`.

    Raises:
        ProblemError: targets are not classes.
        NonFiniteError: NaN or infinity in the weights or the outputs.
    """
    function = Functional(problem)
    found = []
    with function.measuring(), torch.no_grad():
        for batch in batches:
            here = function.place(batch)
            outputs = function.outputs(function.theta, here)
            pair = classes(problem, outputs, here)
            if pair is None and (of_labels := hits(problem, outputs, target_of(here))) is not None:
                found.append(of_labels.cpu().numpy())
                continue
            if pair is None:
                msg = f"targets are {target_of(here).dtype}, not classes: give scores of your own"
                raise ProblemError(msg)
            logits, labels = pair
            if not logits.isfinite().all():
                msg = "the model's outputs hold NaN or infinity: is this checkpoint the right one?"
                raise NonFiniteError(msg)
            size = len(target_of(here))
            counts = (labels != IGNORE_INDEX).reshape(size, -1)
            right = ((logits.argmax(-1) == labels).reshape(size, -1) & counts).sum(1)
            found.append((right.double() / counts.sum(1)).cpu().numpy())
    return np.concatenate(found)
