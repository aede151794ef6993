"""The benchmark of the forecast runs, tiny, so that it cannot rot, and reads its clocks as it says."""

import pytest

from tests.benchmarks.bench_scaling import Case, draw, main, phases_of


def test_phases_go_from_the_last_that_is_ready_to_the_last_that_is_done() -> None:
    aggregator = {
        "step": (0.0, 20.0),
        "agree": (0.0, 5.2),
        "gather": (5.2, 7.0),
        "scatter": (8.0, 9.0),
        "sum": (20, 20),
    }
    first = {"step": (0.5, 19.0), "agree": (4.0, 5.1), "gather": (5.1, 6.0), "scatter": (6.0, 9.5), "sum": (12.0, 19.0)}
    second = {
        "step": (1.0, 18.0),
        "agree": (5.0, 5.1),
        "gather": (5.1, 6.5),
        "scatter": (6.5, 9.0),
        "sum": (15.0, 18.0),
    }
    found = phases_of([[aggregator], [first], [second]])
    assert found == {
        "encoding": pytest.approx(4.0 + 5.5),
        "gather": pytest.approx(2.0),
        "aggregation": pytest.approx(1.0),
        "scatter": pytest.approx(1.5),
        "sum": pytest.approx(4.0),
        "slide": pytest.approx(19.0),
        "spread": 0,
    }


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    result = main(num_rounds=1, ranks=(2,), cases=(Case(encoder="test_resnet", tile_px=32, num_tiles=24),))
    (step,) = result["steps"]
    assert step["measured"]["slide"] > 0
    assert step["neighbours"]["ratio"] > 0
    assert result["link"]["link_bytes_per_s"] > 0
    assert draw(result).count("test_resnet") == 3
