"""Steps that are built by hand compute what they should: on a CPU, with a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.decode_rig import Rows, engine_config, fill_kv, open_engine
from graphllm.runner.device import CpuDevice
from graphllm.runner.graph_runner import GraphRunner
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_tiny_model(tmp_path_factory.mktemp("rig") / "model")
    config = engine_config(
        str(folder),
        num_kv_tokens=2048,
        bytes_per_token=4 * 2 * 2 * 2 * 16,
        device="cpu",
        dtype="float32",
        cpu_threads=1,
        max_num_seqs=8,
    )
    assert config.load_format == "auto"
    with open_engine(config) as (loaded, _):
        yield loaded


def test_contexts_that_are_installed_decode_like_contexts_that_were_computed(loaded: Any) -> None:
    contexts = [5, 33, 60]
    rows = Rows(loaded, contexts)
    first = rows.install([0, 0, 0])
    later = [rows.decode(), rows.decode()]
    # The same keys and values are there already: only the last token is computed again.
    assert rows.install_decode() == first
    assert [rows.decode(), rows.decode()] == later


def test_a_prompt_in_chunks_has_the_token_of_the_whole_prompt(loaded: Any) -> None:
    rows = Rows(loaded, [60])
    whole = rows.install([0])
    from graphllm.batch import SlotInstall

    rows.finish(rows.launch([40], [SlotInstall(rows.sequences[0], 0, 0)], sampled=False))
    assert rows.finish(rows.launch([20], [])) == whole


def test_random_keys_and_values_leave_the_null_block_alone_and_change_the_answer(loaded: Any) -> None:
    rows = Rows(loaded, [100, 90])
    computed = rows.install([0, 0])
    fill_kv(loaded.runner)
    for layer in loaded.runner.kv_cache.layers:
        assert not layer.key[0].any() and not layer.value[0].any()
        assert layer.key[1:].any(dim=-1).all()
    assert rows.install_decode() != computed


def test_rows_have_blocks_of_their_own(loaded: Any) -> None:
    rows = Rows(loaded, [40, 50, 60])
    blocks = [block for sequence in rows.sequences for block in sequence.block_table]
    assert len(set(blocks)) == len(blocks) and 0 not in blocks


def test_contexts_that_do_not_fit_are_refused(loaded: Any) -> None:
    with pytest.raises(ValueError, match="do not fit in the KV pool"):
        Rows(loaded, [200] * 1000)


def test_a_shape_by_its_name_means_random_weights() -> None:
    config = engine_config("llama-3.2-1b", num_kv_tokens=1000, bytes_per_token=32768)
    assert (config.load_format, Path(config.model).name) == ("dummy", "llama-3.2-1b.json")
    assert config.kv_cache_memory_bytes >= 1000 * 32768
    assert config.swap_space == 0


def test_an_engine_is_closed_in_order_whatever_happens_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    for owner in (GraphRunner, CpuDevice):
        close = owner.close

        def recorded(self: Any, *, name: str = owner.__name__, close: Any = close) -> None:
            closed.append(name)
            close(self)

        monkeypatch.setattr(owner, "close", recorded)
    folder = write_tiny_model(tmp_path / "model")
    config = engine_config(
        str(folder), num_kv_tokens=64, bytes_per_token=512, device="cpu", dtype="float32", cpu_threads=1
    )
    with pytest.raises(ZeroDivisionError), open_engine(config):
        closed.append(str(1 // 0))
    assert closed == ["GraphRunner", "CpuDevice"]
