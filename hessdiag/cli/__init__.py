"""The command line: one file per verb; each loads, calls, presents, and ends with a code of docs/exit_codes.md."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

import click

from hessdiag.cli import ranks, stdout
from hessdiag.errors import FaultsError, HessdiagError, MeasurementError, RaisedError, one_line
from hessdiag.installed import version
from hessdiag.shown import leave_out_torchs_own

VERBS = {
    "analyze": "Measure how sharp a checkpoint is, with error bars.",
    "doctor": "Check that a problem can be measured, and forecast the cost.",
    "compare": "Compare two checkpoints in pairs of the same probes.",
    "check": "Hold a checkpoint against its budgets; the verb for CI.",
    "baseline": "Record what a check compares with.",
    "init": "Set up the check: write budgets and a first baseline.",
    "gap": "Hold sharpness against generalization over many checkpoints.",
    "track": "Show what a hessdiag.Tracker saved during training.",
    "shift": "Test checkpoints on data that move away from training.",
    "demo": "Train two small networks on digits, measure and compare them.",
    "ls": "List the models, data, losses and measures that have a name.",
    "explain": "Show the page of a number, a measure, a warning or a verb.",
    "schema": "Print the JSON Schema of run.json.",
    "completion": "Print the completion script of a shell.",
}
HELP = """How sharp is a trained PyTorch checkpoint, and how sure is that number?

\b
  hessdiag demo                                           see it work, in a minute
  hessdiag analyze problem.py:cifar -c last.pt -o out/    your own checkpoint
  hessdiag doctor problem.py:cifar                        is it measurable, what will it cost
  hessdiag init problem.py:cifar -c last.pt               then hessdiag check, in CI
"""
UNEXPECTED = 4
INTERRUPTED, TERMINATED = 130, 143  # 128 and the signal's number, as shells count
_SIGNALS: list[int] = []  # that asked this run to end: an import may swallow what they raise, and fail of it


class LazyGroup(click.Group):
    """Knows its verbs' names; imports a verb only when it runs, so that help never waits for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The verbs, in the order a newcomer needs them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The verb's command, from the module of its name."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = getattr(import_module(f"hessdiag.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Names and summaries, without importing any verb."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb; a reader that stops reading (``| head``) is no fault, a model that ends the program is."""
        try:
            return super().invoke(ctx)
        except stdout.ReaderGoneError:
            stdout.abandon()
            return 0
        except (EOFError, BrokenPipeError) as error:  # click would end with 1, as if a limit were exceeded
            msg = f"the model or its data raised {type(error).__name__}: {one_line(error)}; --debug shows where"
            raise MeasurementError(msg) from error
        except SystemExit as error:
            msg = f"the model or its data ended the program (sys.exit({error.code!r})): raise an error instead"
            raise MeasurementError(msg) from error


def _version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        stdout.result(f"hessdiag, version {version()}")
        ctx.exit()


@click.group(cls=LazyGroup, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """The command line of hessdiag."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code; every refusal is one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stderr is None:  # closed by the caller: the next file opened would become it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    if sys.stdout is None:
        stdout.message("hessdiag: stdout is closed, and results would be lost: send it to a file, or to /dev/null")
        sys.exit(UNEXPECTED)
    end_on_signals()
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # an ASCII terminal has no λ
    if not sys.warnoptions:
        leave_out_torchs_own()
    code = run(given, last=arguments is None)
    if arguments is None:  # the process ends here: Ctrl-C while Python tidies up would be a traceback
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def end_on_signals() -> None:
    """SIGTERM, of a scheduler or `docker stop`, ends what runs as Ctrl-C does, so that files stay whole."""
    mine = os.getpid()

    def end(number: int, _: Any) -> None:
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)  # a second one is not waited for
        if os.getpid() != mine:  # a process forked by the user's code
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _SIGNALS.append(number)
        raise KeyboardInterrupt

    def unraised(lost: sys.UnraisableHookArgs, before: Any = sys.unraisablehook) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt) or not _SIGNALS:
            before(lost)
            return
        # it fell into a destructor, which swallows it: once more, when that is over
        again = threading.Timer(0.01, os.kill, (mine, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = unraised
    with suppress(ValueError):  # not the main thread
        for number, own in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
            if signal.getsignal(number) == own:
                signal.signal(number, end)


def run(arguments: Sequence[str], *, last: bool = False) -> int:
    """Run the command line in this process.

    Args:
        arguments: after ``hessdiag``.
        last: the process ends with it, so stdout stays reserved: threads of the user's may print until then.

    Returns:
        The exit code: 0 done, 1 a check failed, 2 usage, 3 no verdict, 4 measurement or loading failed, 130
        interrupted.
    """
    debug = "--debug" in arguments
    _SIGNALS.clear()
    try:
        args = list(arguments) or ["--help"]
        ranks.join(args[0])
        found: Any = cli.main(args=args, prog_name="hessdiag", standalone_mode=False, obj=args)
        ranks.end()
    except BaseException as error:  # a model or its data can raise anything
        return ranks.failed(error, lambda error: _explain(error, debug), signalled=bool(_SIGNALS))
    finally:
        if not last:
            stdout.release()
    return found if isinstance(found, int) else 0


def _explain(error: BaseException, debug: bool) -> int:
    """Say in one line why nothing came of it; the exit code."""
    if _SIGNALS or isinstance(error, KeyboardInterrupt | click.Abort):
        ended = signal.SIGTERM in _SIGNALS
        text = f"ended by SIGTERM{ranks.why_ended()}" if ended else "interrupted"
        text += (
            "; nothing half-written was left behind: analyze and check go on from what they kept last, gap and "
        )
        return refuse(
            error, text + "--track from their last checkpoint", TERMINATED if ended else INTERRUPTED, debug
        )
    if isinstance(error, HessdiagError):
        faults = error.faults if isinstance(error, FaultsError) else (error,)  # all at once, a line each
        hint = " (its traceback: --debug)" if isinstance(error, RaisedError) else ""
        hint += f" (more: hessdiag explain {error.page})" if error.page else ""
        for fault in faults[:-1]:
            refuse(error, str(fault), error.exit_code, debug)
        return refuse(error, f"{faults[-1]}{hint}", error.exit_code, debug)
    if isinstance(error, click.UsageError):
        way_out = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        return refuse(error, error.format_message().rstrip(".") + way_out, error.exit_code, debug)
    if isinstance(error, click.ClickException):
        return refuse(error, error.format_message(), error.exit_code, debug)
    if isinstance(error, OSError):
        return refuse(error, f"the system refused: {one_line(error)}; --debug shows where", UNEXPECTED, debug)
    text = f"unexpected {type(error).__name__}: {one_line(error).rstrip('.')}; --debug shows whether it comes "
    return refuse(error, text + "from your model or data, or is to be reported", UNEXPECTED, debug)


def refuse(error: BaseException, text: str, code: int, debug: bool) -> int:
    """Write one line to stderr, after the traceback if ``debug``; the exit code for `main` to return."""
    if debug:
        stdout.message("".join(traceback.format_exception(error)).rstrip(), lines=True)
    stdout.message(f"hessdiag: {' '.join(text.split())}{ranks.where(error)}")
    return code
