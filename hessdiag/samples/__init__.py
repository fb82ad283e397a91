"""The frozen sample set: which examples are measured, drawn once by seed, hashed, never reshuffled.

Batches are opaque: tensors, and tuples, lists and mappings of them, to any depth.
"""

from __future__ import annotations

from hessdiag.samples.batches import divide, entries, leaves, map_tensors, row_count
from hessdiag.samples.digest import Digest
from hessdiag.samples.drawing import draw
from hessdiag.samples.sample_set import DATA_BLOCKS, DEFAULT_SAMPLES, SampleSet, default_batch_size

__all__ = [
    "DATA_BLOCKS",
    "DEFAULT_SAMPLES",
    "Digest",
    "SampleSet",
    "default_batch_size",
    "divide",
    "draw",
    "entries",
    "leaves",
    "map_tensors",
    "row_count",
]
