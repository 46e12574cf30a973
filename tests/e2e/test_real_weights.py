"""The demo model's published weights give transformers' perplexity."""

from __future__ import annotations

import pytest

from benchmarks.real_weights import MAX_DIFFERENCE_PERCENT, compare
from graphllm.models.demo import demo_model_path


@pytest.mark.slow
def test_demo_models_perplexity_is_transformers_on_the_same_file() -> None:
    found = compare(demo_model_path(), num_windows=1)
    assert abs(found.difference_percent) < MAX_DIFFERENCE_PERCENT
    assert found.max_loss_difference < 1e-3
    assert 15 < found.perplexity < 80
