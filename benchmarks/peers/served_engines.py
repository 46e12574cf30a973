"""Other engines with an OpenAI server of their own, where they are installed: vLLM and SGLang.

Owns their commands. The load is whoever's calls this.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """package: what is imported. command: behind `python -m`, with {model} and {port} to be filled in."""

    package: str
    command: tuple[str, ...]


SERVED_ENGINES = {
    "vLLM": ServedEngine(
        "vllm",
        (
            *("vllm.entrypoints.openai.api_server", "--model", "{model}", "--port", "{port}"),
            *("--served-model-name", "model", "--dtype", "bfloat16", "--max-model-len", "8192"),
            *("--max-num-seqs", "64", "--no-enable-prefix-caching"),
        ),
    ),
    "SGLang": ServedEngine(
        "sglang",
        (
            *("sglang.launch_server", "--model-path", "{model}", "--port", "{port}"),
            *("--served-model-name", "model", "--dtype", "bfloat16", "--context-length", "8192"),
            *("--max-running-requests", "64", "--disable-radix-cache"),
        ),
    ),
}


@contextmanager
def served_engine(engine: ServedEngine, model: str, *, ready_timeout: float) -> Iterator[str]:
    """Run the engine's server on a free port; gives its address. Raises RuntimeError with its log's end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [part.format(model=model, port=port) for part in engine.command]
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            while not _is_healthy(url):
                if process.poll() is not None or time.monotonic() - start > ready_timeout:
                    log.seek(0)
                    tail = log.read().decode(errors="replace").strip().splitlines()[-8:]
                    raise RuntimeError(f"{engine.package} did not become ready: {' / '.join(tail)}")
                time.sleep(0.2)
            yield url
        finally:
            # Its workers are processes too.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
