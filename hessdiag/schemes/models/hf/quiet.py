"""Transformers without its log lines, progress bars and warnings; the user's generators stay where they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hessdiag.schemes.known import require


@contextmanager
def quiet() -> Iterator[None]:
    """What the library says goes nowhere: hessdiag says what matters, in one line."""
    logging: Any = require("transformers.utils.logging", "hf", "hf:DIR")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
