"""``hessdiag schema``."""

from __future__ import annotations

import json

import click

from hessdiag.cli.stdout import result
from hessdiag.results import json_schema


@click.command()
def schema() -> None:
    """Print the JSON Schema of run.json."""
    result(json.dumps(json_schema(), indent=1, sort_keys=True))
