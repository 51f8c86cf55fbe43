"""The command line's entry: `weft`, or `python -m weft`."""

from .frontend.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
