"""A Hub repository is fetched at one commit, as far as it is needed, or it is said why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from graphllm.config import EngineConfig
from graphllm.errors import CheckpointError, ConfigError
from graphllm.models.checkpoint import open_checkpoint, resolve_model, resolve_model_path
from graphllm.models.gguf import GGUFCheckpoint
from graphllm.models.hub import HubModel, fetch_hub_model, parse_hub_name
from tests.models.hub_server import Hub, Repository, serving
from tests.models.small_gguf import write_small_llama

FIRST, SECOND = "1" * 40, "2" * 40
NAME = "org/model"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CONFIG = {"architectures": ["LlamaForCausalLM"]}


def files_of(value: float) -> dict[str, bytes]:
    """A repository in two shards, all of whose files tell by `value` of which commit they are."""
    index = {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    return {
        "README.md": b"# model",
        "config.json": json.dumps({**CONFIG, "value": value}).encode(),
        "generation_config.json": json.dumps({"temperature": value}).encode(),
        "tokenizer.json": json.dumps({"value": value}).encode(),
        "chat_template.jinja": str(value).encode(),
        "additional_chat_templates/tool_use.jinja": b"{}",
        "modeling.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "pytorch_model.bin.index.json": b"{}",
        "original/model.safetensors": b"another layout",
        "model.safetensors.index.json": json.dumps(index).encode(),
        SHARDS[0]: save({"a": torch.full((1000,), value)}),
        SHARDS[1]: save({"b": torch.full((1000,), value)}),
    }


@dataclass(slots=True)
class Served:
    hub: Hub
    repository: Repository
    cache: Path

    @property
    def snapshot(self) -> Path:
        return self.cache / "models--org--model" / "snapshots" / FIRST


def set_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT sets when the library is imported."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A Hub with one repository, and an empty cache. Set as the environment variables do when imported."""
    repository = Repository({"main": FIRST}, {FIRST: files_of(1.0), SECOND: files_of(2.0)})
    hub = Hub({NAME: repository})
    with serving(hub):
        set_endpoint(monkeypatch, hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        monkeypatch.chdir(tmp_path)
        yield Served(hub, repository, tmp_path / "cache")
        huggingface_hub.close_session()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library waits a second between its attempts."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def refusal(name: str, **flags: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_model_path(name, **flags)  # type: ignore[arg-type]
    return caught.value.message


def test_a_repository_becomes_a_folder_of_the_files_that_serving_needs(served: Served) -> None:
    folder = resolve_model_path(NAME)
    assert folder == served.snapshot
    checkpoint = open_checkpoint(folder)
    assert checkpoint.hf_config == {**CONFIG, "value": 1.0}
    assert checkpoint.generation_config == {"temperature": 1.0}
    assert torch.equal(checkpoint.tensor("b"), torch.ones(1000))
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "model.safetensors.index.json",
        *SHARDS,
    }


def test_nothing_is_fetched_twice(served: Served) -> None:
    resolve_model_path(NAME)
    served.hub.requests.clear()
    assert resolve_model_path(NAME) == served.snapshot
    assert [method for method, _, _ in served.hub.requests] == ["GET"]  # the listing


def test_all_files_are_of_one_commit_though_the_branch_moves_between_two_of_them(served: Served) -> None:
    def move(name: str) -> None:
        served.repository.revisions["main"] = SECOND

    served.hub.after_file = move
    folder = resolve_model_path(NAME)
    assert served.repository.revisions["main"] == SECOND
    for name, content in files_of(1.0).items():
        if (folder / name).exists():
            assert (folder / name).read_bytes() == content
    assert not any(SECOND in path or "/main/" in path for _, path, _ in served.hub.requests)
    assert resolve_model_path(NAME).name == SECOND


@pytest.mark.parametrize("revision", [SECOND, "v2", "refs/pr/7"])
def test_a_revision_is_a_commit_a_tag_or_a_branch(served: Served, revision: str) -> None:
    served.repository.revisions |= {"v2": SECOND, "refs/pr/7": SECOND}
    by_name = resolve_model_path(f"{NAME}@{revision}")
    assert by_name.name == SECOND
    assert resolve_model(EngineConfig(model=NAME, revision=revision)) == by_name
    assert open_checkpoint(by_name).hf_config["value"] == 2.0


def test_a_download_that_is_cut_goes_on_where_it_stopped(served: Served, no_waiting: None) -> None:
    served.hub.cuts[SHARDS[1]] = [2500, 1000]
    folder = resolve_model_path(NAME)
    assert (folder / SHARDS[1]).read_bytes() == files_of(1.0)[SHARDS[1]]
    ranges = [wanted for _, path, wanted in served.hub.requests if "/cdn/" in path and SHARDS[1] in path]
    assert ranges == [None, "bytes=2000-", "bytes=3000-"]


def test_a_download_that_never_comes_through_leaves_no_half_file(served: Served, no_waiting: None) -> None:
    served.hub.cuts[SHARDS[1]] = [0] * 100
    message = refusal(NAME)
    assert message.startswith(f"{NAME}: {SHARDS[1]} cannot be fetched: {served.hub.url} cannot be reached")
    assert not (served.snapshot / SHARDS[1]).exists()
    assert not [*served.cache.rglob("*.incomplete")]
    served.hub.cuts.clear()
    served.hub.requests.clear()
    resolve_model_path(NAME)
    assert served.hub.fetched() == [SHARDS[1]]  # what was whole is kept


def test_a_file_of_the_wrong_size_is_fetched_again(served: Served) -> None:
    folder = resolve_model_path(NAME)
    (folder / SHARDS[0]).resolve().write_bytes(b"cut off by a full disk")
    resolve_model_path(NAME)
    assert (folder / SHARDS[0]).read_bytes() == files_of(1.0)[SHARDS[0]]


def test_a_file_whose_size_stays_wrong_is_refused(served: Served) -> None:
    served.hub.listed_sizes["tokenizer.json"] = 3
    size = len(files_of(1.0)["tokenizer.json"])
    assert f"tokenizer.json has {size} bytes in {served.snapshot}" in refusal(NAME)


def test_a_mirror_that_answers_with_another_commit_is_refused(served: Served) -> None:
    served.hub.answered_commit = SECOND
    message = refusal(NAME)
    assert message.startswith(f"{NAME}: {served.hub.url} answered for ")
    assert message.endswith(f" with another commit than {FIRST}.")


def test_without_weights_none_are_fetched(served: Served) -> None:
    for config in (EngineConfig(model=NAME, load_format="dummy"), EngineConfig(model=NAME)):
        folder = resolve_model(config, with_weights=False)
        assert (folder / "config.json").is_file()
    assert resolve_model(EngineConfig(model=NAME, load_format="dummy")) == folder
    assert not [name for name in served.hub.fetched() if name.endswith(("safetensors", "index.json"))]


def test_code_is_fetched_only_when_it_is_asked_for(served: Served) -> None:
    model = HubModel(NAME)
    assert not (fetch_hub_model(model, with_weights=False) / "modeling.py").exists()
    assert (fetch_hub_model(model, with_weights=False, with_code=True) / "modeling.py").is_file()


def test_modules_behind_the_model_are_fetched_too(served: Served) -> None:
    """sentence-transformers' folders: configurations, and the weights of Dense layers with the others."""
    files = {
        "modules.json": b"[]",
        "1_Pooling/config.json": b"{}",
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": b"dense",
    }
    others = {
        "2_Dense/pytorch_model.bin": b"pickle",
        "onnx/config.json": b"{}",
        "onnx/model.safetensors": b"x",
    }
    served.hub.repositories[NAME].commits[FIRST] |= files | others
    folder = resolve_model(EngineConfig(model=NAME, load_format="dummy"))
    assert (folder / "1_Pooling/config.json").is_file() and not (
        folder / "2_Dense/model.safetensors"
    ).exists()
    folder = resolve_model_path(NAME)
    assert all((folder / name).read_bytes() == content for name, content in files.items())
    assert not any((folder / name).exists() for name in others)


def test_a_single_file_goes_before_an_index_as_in_a_folder(served: Served) -> None:
    served.repository.commits[FIRST]["model.safetensors"] = save({"a": torch.ones(2)})
    folder = resolve_model_path(NAME)
    assert list(open_checkpoint(folder).tensor_names()) == ["a"]
    assert not set(SHARDS) & set(served.hub.fetched())


def gguf_repository(served: Served, *names: str) -> None:
    content = write_small_llama(served.cache.parent / "small.gguf").read_bytes()
    served.repository.commits[FIRST] = {"README.md": b"", **dict.fromkeys(names, content)}


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        (f"{NAME}:m-Q8_0.gguf", {}),
        (f"{NAME}@main:m-Q8_0.gguf", {}),
        (NAME, {"gguf_file": "m-Q8_0.gguf", "revision": "main"}),
    ],
)
def test_a_gguf_file_of_a_repository_is_served(served: Served, name: str, flags: dict[str, str]) -> None:
    gguf_repository(served, "m-Q4_0.gguf", "m-Q8_0.gguf")
    path = resolve_model_path(name, **flags)  # type: ignore[arg-type]
    assert path == served.snapshot / "m-Q8_0.gguf"
    assert isinstance(open_checkpoint(path), GGUFCheckpoint)
    assert served.hub.fetched() == ["m-Q8_0.gguf"]


def test_the_only_gguf_file_needs_no_name_and_one_of_several_does(served: Served) -> None:
    gguf_repository(served, "folder/m-Q8_0.gguf")
    assert resolve_model_path(NAME) == served.snapshot / "folder" / "m-Q8_0.gguf"
    gguf_repository(served, "a.gguf", "b.gguf")
    assert refusal(NAME) == f"{NAME}: it has a.gguf, b.gguf; name one: {NAME}:a.gguf."
    assert refusal(f"{NAME}:c.gguf") == f"{NAME}: there is no file c.gguf; it has a.gguf, b.gguf."
    gguf_repository(served, "m-00001-of-00002.gguf")
    assert "m-00001-of-00002.gguf is one part of a GGUF model that was split" in refusal(NAME)


def test_gguf_file_of_a_folder_is_chosen_by_the_flag(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf")
    assert resolve_model_path(str(tmp_path), gguf_file="m.gguf") == path


def offline(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    served.hub.requests.clear()


def test_offline_takes_what_was_fetched_and_asks_nobody(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resolve_model_path(NAME)
    offline(served, monkeypatch)
    assert resolve_model_path(NAME) == served.snapshot
    assert resolve_model_path(f"{NAME}@{FIRST}") == served.snapshot
    assert f"{NAME}: HF_HUB_OFFLINE is set; taking commit {FIRST} from the cache" in caplog.text
    assert served.hub.requests == []


def test_offline_serves_the_last_commit_that_was_whole(
    served: Served, monkeypatch: pytest.MonkeyPatch, no_waiting: None
) -> None:
    resolve_model_path(NAME)
    served.repository.revisions["main"] = SECOND
    served.hub.cuts[SHARDS[1]] = [0] * 100
    refusal(NAME)
    resolve_model(EngineConfig(model=NAME), with_weights=False)
    offline(served, monkeypatch)
    assert resolve_model_path(NAME) == served.snapshot


def test_offline_says_what_is_missing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    beginning = f"{NAME}: HF_HUB_OFFLINE is set, and the cache {served.cache} "
    offline(served, monkeypatch)
    assert refusal(NAME) == f"{beginning}has no revision 'main'."
    assert refusal(f"{NAME}@{SECOND}") == f"{beginning}has no revision {SECOND!r}."
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    resolve_model_path(NAME)
    offline(served, monkeypatch)
    for name in (SHARDS[1], "tokenizer.json"):
        (served.snapshot / name).unlink()
    missing = f"lacks tokenizer.json, {SHARDS[1]} of commit {FIRST}."
    assert refusal(NAME) == beginning + missing
    assert resolve_model(EngineConfig(model=NAME), with_weights=False) == served.snapshot
    assert "there is no file m.gguf; it has no GGUF files" in refusal(f"{NAME}:m.gguf")


def test_a_gguf_file_is_found_offline(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_repository(served, "folder/m-Q8_0.gguf")
    resolve_model_path(NAME)
    offline(served, monkeypatch)
    assert resolve_model_path(NAME) == served.snapshot / "folder" / "m-Q8_0.gguf"


def test_a_hub_that_does_not_answer_is_replaced_by_the_cache(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resolve_model_path(NAME)
    served.hub.errors["/revision/main"] = (503, "")
    assert resolve_model_path(NAME) == served.snapshot
    assert "answers with status 503; taking commit" in caplog.text
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert resolve_model_path(NAME) == served.snapshot
    assert "http://127.0.0.1:9 cannot be reached (" in caplog.text


def test_no_network_and_an_empty_cache_is_said(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    message = refusal(NAME)
    assert message.startswith(f"{NAME}: http://127.0.0.1:9 cannot be reached (")
    assert "check the network and HF_ENDPOINT, and the cache" in message


@pytest.mark.parametrize(
    ("path", "status", "code", "reason"),
    [
        (
            "/revision/main",
            403,
            "GatedRepo",
            "the repository is gated; accept its conditions at {url}/org/model",
        ),
        ("/revision/main", 401, "RepoNotFound", "no such file or folder, and no such repository at {url}"),
        ("/revision/main", 404, "RepoNotFound", "if it is private, set HF_TOKEN"),
        ("/revision/main", 404, "RevisionNotFound", "{url}/org/model has no revision 'main'"),
        ("/revision/main", 403, "", "{url} answers with status 403; check HF_TOKEN"),
        ("/revision/main", 429, "", "{url} answers with status 429"),
        ("/config.json", 403, "GatedRepo", "config.json cannot be fetched: the repository is gated"),
        (
            "/config.json",
            404,
            "EntryNotFound",
            "config.json cannot be fetched: {url} answers with status 404",
        ),
    ],
)
def test_what_the_hub_refuses_is_put_into_words(
    served: Served, path: str, status: int, code: str, reason: str
) -> None:
    served.hub.errors[path] = (status, code)
    message = refusal(NAME)
    assert message.startswith(f"{NAME}: ")
    assert reason.format(url=served.hub.url) in message


def test_a_name_that_is_neither_a_path_nor_a_repository_says_both(served: Served) -> None:
    assert refusal("org/missing").startswith(
        f"org/missing: no such file or folder, and no such repository at {served.hub.url}; if it is private"
    )


def test_a_server_that_is_no_hub_is_refused(served: Served) -> None:
    served.hub.errors["/revision/main"] = (200, "")
    assert refusal(NAME).startswith(f"{NAME}: ")
    served.repository.commits["../../../outside"] = files_of(1.0)
    served.repository.revisions["main"] = "../../../outside"
    served.hub.errors.clear()
    assert "gives revision 'main' the commit '../../../outside'" in refusal(NAME)


UNUSABLE = {
    "pickles": (["pytorch_model.bin"], "weights only as pytorch_model.bin, which is not fetched"),
    "a pickle of another name": (["consolidated.00.pth"], "a pickle (.bin, .pt) runs the code in it"),
    "shards without an index": ([SHARDS[0]], f"it has {SHARDS[0]}, but neither model.safetensors nor"),
    "no weights": ([], "it has no weights: neither model.safetensors"),
}


@pytest.mark.parametrize(("names", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_repository_without_weights_that_are_read_is_refused(
    served: Served, names: list[str], reason: str
) -> None:
    content = {"config.json": b"{}", **dict.fromkeys(names, b"\x80\x04.")}
    served.repository.commits[FIRST] = content
    assert reason in refusal(NAME)
    assert served.hub.fetched() == ["config.json"]


def test_an_index_that_names_what_is_not_there_is_refused_before_any_shard(served: Served) -> None:
    del served.repository.commits[FIRST][SHARDS[1]]
    assert f"index.json names {SHARDS[1]}, which the repository does not have" in refusal(NAME)
    outside = json.dumps({"weight_map": {"a": "../../outside.safetensors"}}).encode()
    served.repository.commits[SECOND]["model.safetensors.index.json"] = outside
    assert "which is not a plain file name" in refusal(f"{NAME}@{SECOND}")
    assert not [name for name in served.hub.fetched() if name.endswith(".safetensors")]


def test_a_repository_without_a_configuration_is_refused(served: Served) -> None:
    del served.repository.commits[FIRST]["config.json"]
    assert refusal(NAME) == f"{NAME}: it has no config.json."
    assert served.hub.fetched() == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", HubModel("org/name")),
        ("Org-1/na.me_2@v1.0", HubModel("Org-1/na.me_2", "v1.0")),
        ("org/name@refs/pr/3:sub/m.gguf", HubModel("org/name", "refs/pr/3", "sub/m.gguf")),
        ("name", None),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("~/name", None),
        ("a/b/c", None),
        ("org/", None),
        ("org/m.gguf", None),
        ("org/config.json", None),
        ("org/name@", None),
        ("a\0b/c", None),
        ("org/name\n", None),
        ("http://host/name", None),
    ],
)
def test_a_hub_name_is_told_from_a_path(name: str, expected: HubModel | None) -> None:
    assert parse_hub_name(name) == expected


@pytest.mark.parametrize("revision", ["../../x", "a/../b", "-x", "/x", "a//b", "a b"])
def test_a_revision_that_leaves_the_cache_is_refused(revision: str) -> None:
    for ask in (
        lambda: resolve_model_path("org/name", revision=revision),
        lambda: resolve_model_path(f"org/name@{revision}"),
    ):
        with pytest.raises(CheckpointError, match="is not a revision"):
            ask()


def test_what_follows_a_colon_is_a_gguf_file() -> None:
    assert "must be a .gguf file" in refusal("org/name:model.bin")


@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        (".", {"revision": "main"}, "--revision main has no meaning with --model ., which is a path"),
        ("demo", {"gguf_file": "m.gguf"}, "--gguf-file m.gguf has no meaning with --model demo"),
        ("org/name@v1", {"revision": "v2"}, "--revision v2 contradicts --model org/name@v1"),
        ("org/name:a.gguf", {"gguf_file": "b.gguf"}, "--gguf-file b.gguf contradicts"),
    ],
)
def test_flags_that_have_no_meaning_or_contradict_are_refused(
    name: str, flags: dict[str, str], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model_path(name, **flags)  # type: ignore[arg-type]
    assert reason in caught.value.message


def test_what_exists_is_a_path_whatever_it_looks_like(served: Served, tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_model_path(NAME) == Path(NAME)
    assert served.hub.requests == []


def test_the_library_s_environment_variables_are_honoured(served: Served, tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = {
        **os.environ,
        "HF_ENDPOINT": served.hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    code = "from graphllm.models.hub import *; print(fetch_hub_model(HubModel('org/model'), progress=True))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    folder = home / "hub" / "models--org--model" / "snapshots" / FIRST
    assert done.stdout.strip() == str(folder)
    assert (served.hub.tokens, served.hub.storage_tokens) == ({"Bearer hf_secret"}, {None})
    served.hub.requests.clear()
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), served.hub.requests) == (str(folder), [])
