"""Measure many checkpoints with an executor of your own: Ray, joblib, submitit, or a plain loop.

`look` examines one file and may run anywhere; `settled` keeps its record, in any process. ``hessdiag gap`` then
finds all of them, and makes the report. ``hessdiag explain sweeps`` has the recipes.

>>> from hessdiag.survey import Survey, Recipe, Examination, look, settled
>>> how = Survey(
...     recipe=Recipe(factory="hessdiag.sources.digits:problem"),
...     asked=Examination(measures=("weight_norm",), guard=False),
... )
>>> found = settled(look("none", "none.safetensors", how), how)
>>> print(found.code, found.reason)
unreadable no such checkpoint none.safetensors: give an existing file with -c
"""

from hessdiag.gap.examine import Examination
from hessdiag.gap.kept import records
from hessdiag.gap.look import look
from hessdiag.gap.record import CheckpointRecord
from hessdiag.gap.report import GapReport
from hessdiag.gap.shard import Shard
from hessdiag.gap.survey import settled, survey
from hessdiag.gap.sweep import Finding, Survey
from hessdiag.schemes.recipe import Recipe
from hessdiag.settings import Settings
from hessdiag.sources.many import checkpoints

__all__ = [
    "CheckpointRecord",
    "Examination",
    "Finding",
    "GapReport",
    "Recipe",
    "Settings",
    "Shard",
    "Survey",
    "checkpoints",
    "look",
    "records",
    "settled",
    "survey",
]
