"""``python -m hessdiag``."""

import signal


def main() -> None:
    """The command line; Ctrl-C while it is imported ends the process without a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from hessdiag.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
