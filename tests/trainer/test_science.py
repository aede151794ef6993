"""What the paper shows, on few slides: the study whose large form is reported in `tests/benchmarks/results`."""

from pathlib import Path

import pytest

from tests.benchmarks.study_science import SMALL, main


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_more_of_a_slide_and_learning_end_to_end_help(tmp_path: Path) -> None:
    found = main(SMALL, tmp_path)
    assert found["loss_rho"] <= -0.9 + 1e-9
    assert found["auc_largest_less_smallest"]["low"] >= -0.02
    assert found["methods_less_end_to_end"]["frozen_gma"]["high"] < 0
    losses = list(found["final_losses"]["float64"].values())
    assert losses[1:] == pytest.approx(losses[:-1], rel=1e-7)
