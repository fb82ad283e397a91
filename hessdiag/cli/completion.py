"""``hessdiag completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from hessdiag.cli.stdout import result


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script: eval "$(hessdiag completion bash)"."""
    kind = get_completion_class(shell)
    if kind is None:
        msg = f"no completion for {shell}: allowed: bash, zsh, fish"
        raise click.UsageError(msg)
    result(kind(ctx.find_root().command, {}, "hessdiag", "_HESSDIAG_COMPLETE").source())
