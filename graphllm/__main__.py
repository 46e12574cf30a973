"""`python -m graphllm`: the command line, nothing more."""

from __future__ import annotations

import sys

from graphllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
