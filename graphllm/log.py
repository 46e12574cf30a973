"""Logging set-up for the process: one line a record, on standard error."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: str = "info") -> None:
    """Send `graphllm.*` records at `level` (debug, info, warning, error) to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("graphllm")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
