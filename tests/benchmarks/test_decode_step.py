from __future__ import annotations

import json

import pytest
import torch

from benchmarks import decode_step


def test_last_line_is_the_table_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    num_threads = torch.get_num_threads()
    try:
        flags = "--layers 1 --rows 1 3 --steps 2 --context 21 --threads 1 --product torch"
        decode_step.main(flags.split())
    finally:
        torch.set_num_threads(num_threads)
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert [step["rows"] for step in result["steps"]] == [1, 3]
    assert (result["product"], result["context"], result["layers"]) == ("torch", 21, 1)
    for step, line in zip(result["steps"], lines[2:4], strict=True):
        parts = step["linear_ms"] + step["attention_ms"] + step["rest_ms"]
        assert parts == pytest.approx(step["ms"], abs=0.01)
        assert 0 < step["linear_ms"] < step["ms"] and step["attention_ms"] > 0
        assert float(line.split()[1]) == pytest.approx(step["ms"], abs=0.01)
