"""A repository on the Hugging Face Hub as a folder of this machine: which files, of which commit.

Owns what a Hub name is, the choice of files (configuration, tokenizer, chat templates, safetensors or one
GGUF file; never pickles, never code unless asked for), their pinning to one commit, and what is said when
they cannot be had. The transfer itself, its cache, its resuming after a cut connection and its environment
variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT ...) are huggingface_hub's. Opens no file but a
shard index.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from graphllm.errors import CheckpointError
from graphllm.models.safetensors_folder import (
    INDEX_FILE,
    OTHER_WEIGHTS_SUFFIXES,
    WEIGHTS_FILE,
    read_weight_map,
)

logger = logging.getLogger(__name__)

tqdm.monitor_interval = 0  # its monitor is a thread

Result = TypeVar("Result")

_HUB_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^@:]+))?(?::(?P<file>[^:]+))?",
    re.ASCII,
)
_REVISION = re.compile(r"(?!.*(\.\.|//))[A-Za-z0-9][\w./+-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SPLIT_GGUF = re.compile(r".*-\d{5}-of-\d{5}\.gguf", re.IGNORECASE)
# Where sentence-transformers keeps a module behind the model: "1_Pooling", "2_Dense".
_MODULE_FOLDER = re.compile(r"\d+_[A-Za-z]+")
_MAIN = "main"
_MAX_NAMES_SHOWN = 8
# What reads like the path of a file is not taken for the name of a repository.
_FILE_SUFFIXES = (".gguf", ".json", ".safetensors")


@dataclass(frozen=True, slots=True)
class HubModel:
    """What `--model org/name[@revision][:file.gguf]` says.

    revision: a branch, tag or commit; None is main.
    """

    repository: str
    revision: str | None = None
    gguf_file: str | None = None


def parse_hub_name(name: str) -> HubModel | None:
    """The repository that `name` may mean, or None for a text that can only be a path.

    Raises CheckpointError for a Hub name with a revision that git does not allow, or with a file that is
    not a GGUF file.
    """
    match = _HUB_NAME.fullmatch(name)
    if match is None or match["repository"].lower().endswith(_FILE_SUFFIXES):
        return None
    revision, file = match["revision"], match["file"]
    if revision is not None:
        check_revision(revision)
    if file is not None and not file.lower().endswith(".gguf"):
        raise CheckpointError(f"{name}: what follows the colon must be a .gguf file of the repository.")
    return HubModel(match["repository"], revision, file)


def check_revision(revision: str) -> None:
    """Raises CheckpointError for what no branch, tag or commit is called, such as a path out of the cache."""
    if not _REVISION.fullmatch(revision):
        raise CheckpointError(f"{revision!r} is not a revision: a branch, a tag or a commit.")


def fetch_hub_model(
    model: HubModel, *, with_weights: bool = True, with_code: bool = False, progress: bool | None = None
) -> Path:
    """The folder, or GGUF file, in huggingface_hub's cache with one commit's files, fetched where missing.

    The revision is resolved once, and every file is asked for by the commit that it names at that moment.
    Offline, or where the Hub does not answer, the commit that was last fetched whole is taken.
    with_weights: False takes the configuration and the tokenizer alone. with_code: also the repository's
    Python files. progress: draw progress bars on standard error; by default where that is a terminal.
    Blocks while downloading. Raises CheckpointError that says what is missing and what to do.
    """
    hub = _Hub(model, progress=sys.stderr.isatty() if progress is None else progress)
    listing = hub.list_files()
    if listing is None:
        return hub.cached(with_weights=with_weights)
    names = [*listing.sizes]
    gguf_file = _choose_gguf(model, names)
    if gguf_file is not None:
        path = hub.fetch(listing, gguf_file)
        hub.remember(listing.commit)
        return path
    if "config.json" not in names:
        hub.refuse("it has no config.json")
    for name in sorted(names):
        if _is_description(name) or (with_code and "/" not in name and name.endswith(".py")):
            hub.fetch(listing, name)
    if with_weights:
        # Last, so that whoever finds weights in the cache finds the rest too.
        for name in (*hub.weight_files(listing), *filter(_is_module_weights, sorted(names))):
            hub.fetch(listing, name)
        hub.remember(listing.commit)
    return hub.snapshot(listing.commit)


@dataclass(frozen=True, slots=True)
class _Listing:
    """A commit, and its files with their sizes in bytes (None where the Hub does not say)."""

    commit: str
    sizes: Mapping[str, int | None]


class _Hub:
    """One repository through huggingface_hub, whose errors it puts into words."""

    def __init__(self, model: HubModel, *, progress: bool) -> None:
        # Here, because most starts need no Hub and the import takes 0.2 seconds.
        import huggingface_hub
        from huggingface_hub import constants, errors, utils

        self._library: Any = huggingface_hub
        self._errors: Any = errors
        hub_utilities: Any = utils
        self._model = model
        self._endpoint = constants.ENDPOINT
        self._cache = Path(constants.HF_HUB_CACHE)
        self._folder = self._cache / f"models--{model.repository.replace('/', '--')}"
        self._bar = _progress_bar_class(hub_utilities.tqdm, is_shown=progress)
        self._unreachable = ""

    @property
    def revision(self) -> str:
        return self._model.revision or _MAIN

    def snapshot(self, commit: str) -> Path:
        """Where the cache keeps a commit's files, as links to its blobs."""
        return self._folder / "snapshots" / commit

    def list_files(self) -> _Listing | None:
        """The revision's commit and files, or None where the Hub cannot be asked."""
        try:
            info = self._library.HfApi().model_info(
                self._model.repository, revision=self.revision, files_metadata=True
            )
        except Exception as error:
            if not self._is_unreachable(error):
                self._explain(error)
            self._unreachable = self._reason(error)
            return None
        if info.sha is None or not _COMMIT.fullmatch(info.sha):
            self.refuse(f"{self._endpoint} gives revision {self.revision!r} the commit {info.sha!r}")
        return _Listing(info.sha, {file.rfilename: file.size for file in info.siblings or ()})

    def fetch(self, listing: _Listing, name: str) -> Path:
        """One file of the listing's commit, from the cache where that has it, in the size it should have."""
        path = self._download(listing, name, force=False)
        size = listing.sizes[name]
        if size is not None and path.stat().st_size != size:
            logger.warning("%s has %d bytes, not %d; fetching it again", path, path.stat().st_size, size)
            path = self._download(listing, name, force=True)
            if path.stat().st_size != size:
                self.refuse(f"{name} has {path.stat().st_size} bytes in {path}, but {size} on the Hub")
        return path

    def weight_files(self, listing: _Listing) -> list[str]:
        """The safetensors files to take: the single one, or those of the index. Fetches the index."""
        names = listing.sizes.keys()
        if WEIGHTS_FILE in names:
            return [WEIGHTS_FILE]
        if INDEX_FILE in names:
            shards = sorted(set(read_weight_map(self.fetch(listing, INDEX_FILE)).values()))
            if missing := [name for name in shards if name not in names]:
                self.refuse(f"{INDEX_FILE} names {_shown(missing)}, which the repository does not have")
            return shards
        self.refuse(_no_safetensors(sorted(names)))

    def remember(self, commit: str) -> None:
        """Let an offline start find the commit by the revision's name, in the cache's own way."""
        if self.revision == commit:
            return
        path = self._folder / "refs" / self.revision
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(commit)
            os.replace(partial, path)
        except OSError as error:  # a cache that is read-only has all files, or we were not here
            logger.debug("%s cannot be written: %s", path, error)

    def cached(self, *, with_weights: bool) -> Path:
        """What the cache has of the revision. Raises CheckpointError naming what it lacks."""
        commit = self.revision
        if not _COMMIT.fullmatch(commit):
            try:
                commit = (self._folder / "refs" / self.revision).read_text().strip()
            except OSError:
                commit = ""
        folder = self.snapshot(commit)
        if not _COMMIT.fullmatch(commit) or not folder.is_dir():
            self.refuse(f"{self._unreachable}, and the cache {self._cache} has no revision {self.revision!r}")
        names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
        gguf_file = _choose_gguf(self._model, names)
        wanted = [gguf_file] if gguf_file is not None else _files_of_folder(folder, with_weights=with_weights)
        if missing := [name for name in wanted if not (folder / name).is_file()]:
            self.refuse(
                f"{self._unreachable}, and the cache {self._cache} lacks {_shown(missing)} of commit {commit}"
            )
        logger.warning(
            "%s: %s; taking commit %s from the cache", self._model.repository, self._unreachable, commit
        )
        return folder if gguf_file is None else folder / gguf_file

    def refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._model.repository}: {reason}.")

    def _download(self, listing: _Listing, name: str, *, force: bool) -> Path:
        def download() -> Any:
            return self._library.hf_hub_download(
                self._model.repository,
                name,
                revision=listing.commit,
                force_download=force,
                tqdm_class=self._bar,
            )

        path = Path(self._explained(download, name))
        # Where the server sends another commit's file, the library files it under that.
        if path != self.snapshot(listing.commit) / name:
            self.refuse(f"{self._endpoint} answered for {name} with another commit than {listing.commit}")
        return path

    def _explained(self, work: Callable[[], Result], name: str) -> Result:
        try:
            return work()
        except Exception as error:  # the library passes on its HTTP client's classes, which change
            self._explain(error, name)

    def _explain(self, error: Exception, name: str = "") -> NoReturn:
        """Raise what the library's error means. name: the file that was asked for."""
        errors, what = self._errors, f"{name} cannot be fetched: " if name else ""
        page = f"{self._endpoint}/{self._model.repository}"
        token = "set HF_TOKEN to a token of an account that has access"
        if isinstance(error, errors.GatedRepoError):
            reason = f"{what}the repository is gated; accept its conditions at {page} and {token}"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"{page} has no revision {self.revision!r}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = (
                f"{what}no such file or folder, and no such repository at {self._endpoint}; "
                f"if it is private, {token}"
            )
        else:
            reason = f"{what}{self._reason(error)}"
        raise CheckpointError(f"{self._model.repository}: {reason}.") from error

    def _is_unreachable(self, error: Exception) -> bool:
        """Whether the Hub did not answer, as opposed to answering that there is nothing."""
        status = _status(error)
        is_transport = isinstance(error, (self._errors.OfflineModeIsEnabled, self._errors.HTTPError))
        return is_transport if status is None else status >= 500

    def _reason(self, error: Exception) -> str:
        if isinstance(error, self._errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set"
        status = _status(error)
        if status is not None:
            hint = "; check HF_TOKEN" if status in (401, 403) else ""
            return f"{self._endpoint} answers with status {status}{hint}"
        cause = [*_causes(error)][-1]
        text = " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
        if any(isinstance(part, self._errors.HTTPError) for part in _causes(error)):
            return f"{self._endpoint} cannot be reached ({text}); check the network and HF_ENDPOINT"
        return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"


def _progress_bar_class(hub_tqdm: Any, *, is_shown: bool) -> Any:
    """The library's own bars for a file's download, or none."""

    class ProgressBar(hub_tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs if is_shown else {**kwargs, "disable": True}))

    return ProgressBar


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of the library is about; None where there was no answer."""
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _choose_gguf(model: HubModel, names: Sequence[str]) -> str | None:
    """The GGUF file to take, or None for a repository in Hugging Face layout. Raises CheckpointError."""
    files = sorted(name for name in names if name.lower().endswith(".gguf"))
    chosen = model.gguf_file
    if chosen is None:
        if WEIGHTS_FILE in names or INDEX_FILE in names or not files:
            return None
        if len(files) > 1:
            raise CheckpointError(
                f"{model.repository}: it has {_shown(files)}; name one: {model.repository}:{files[0]}."
            )
        chosen = files[0]
    elif chosen not in names:
        has = f"it has {_shown(files)}" if files else "it has no GGUF files"
        raise CheckpointError(f"{model.repository}: there is no file {chosen}; {has}.")
    if _SPLIT_GGUF.fullmatch(chosen):
        raise CheckpointError(
            f"{model.repository}: {chosen} is one part of a GGUF model that was split; merge the parts into "
            "one file and give its path."
        )
    return chosen


def _is_description(name: str) -> bool:
    """Whether a file of the repository says how to use the weights: configuration, tokenizer, templates."""
    folder, _, file = name.rpartition("/")
    if folder == "additional_chat_templates":
        return file.endswith(".jinja")
    if _MODULE_FOLDER.fullmatch(folder):
        return file == "config.json"
    # tokenizer.model is not read; that it is there alone is told by the reader of tokenizers.
    is_index = file.endswith(".index.json")
    return not folder and not is_index and file.endswith((".json", ".jinja", "tokenizer.model"))


def _is_module_weights(name: str) -> bool:
    """Whether a file holds a layer behind the model proper, small as they are."""
    folder, _, file = name.rpartition("/")
    return file == WEIGHTS_FILE and _MODULE_FOLDER.fullmatch(folder) is not None


def _files_of_folder(folder: Path, *, with_weights: bool) -> list[str]:
    """The files without which a folder of the cache is not a whole model."""
    if not with_weights:
        return ["config.json"]
    weights = [WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        weights = sorted(set(read_weight_map(folder / INDEX_FILE).values()))
    return ["config.json", "tokenizer.json", *weights]


def _no_safetensors(names: Sequence[str]) -> str:
    """Why none of a repository's files will do as weights."""
    if pickles := [name for name in names if Path(name).suffix in OTHER_WEIGHTS_SUFFIXES]:
        return (
            f"it has weights only as {_shown(pickles)}, which is not fetched: formats other than safetensors "
            "and GGUF are not read, and a pickle (.bin, .pt) runs the code in it when it is loaded; take a "
            "revision or repository with safetensors"
        )
    if others := [name for name in names if name.endswith(".safetensors")]:
        return f"it has {_shown(others)}, but neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    return f"it has no weights: neither {WEIGHTS_FILE}, {INDEX_FILE} nor a GGUF file"


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES_SHOWN
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
