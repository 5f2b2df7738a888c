"""`python -m smearlens`: the command line, where the interpreter is to be named (or a launcher)."""

from __future__ import annotations

from smearlens.cli import main

if __name__ == "__main__":
    main()
