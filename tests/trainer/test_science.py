"""What the large study of `tests/benchmarks/bench_science.py` asks, on a cohort that two cores do in two minutes."""

from pathlib import Path

import pytest

from tests.benchmarks.bench_science import Study, main

SMALL = Study(
    num_slides=40,
    seed=11,
    num_splits=2,
    ks=(2, 6, 12, 24, 48),
    epochs=8,
    methods=("end_to_end", "frozen_gma"),
)


@pytest.mark.slow
def test_more_of_a_slide_and_learning_end_to_end_help(tmp_path: Path) -> None:
    found = main(SMALL, tmp_path)
    assert found["loss_rho"] <= -0.9
    assert found["methods_less_end_to_end"]["frozen_gma"]["mean"] < 0
    one, three = found["final_losses"].values()
    assert three == pytest.approx(one, rel=1e-4)
    assert all(Path(table).stat().st_size for table in found["tables"])
