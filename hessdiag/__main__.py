"""``python -m hessdiag``."""

from hessdiag.cli import main

if __name__ == "__main__":
    main()
