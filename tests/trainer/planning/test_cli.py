"""`slidegrad plan` refuses what makes no sense, and answers with one JSON object and a picture."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import pytest

import slidegrad
from trainer.errors import TrainerError
from trainer.planning.cli import Plan
from trainer.planning.rates import RateInputs

SMALL: dict[str, Any] = {"encoder": "test_resnet", "tile_px": 32, "tiles": 3_000, "gpus": 5, "slides": 100}
PHASES = {"reading", "encoding", "gather", "aggregation", "scatter", "sum", "update"}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"tiles": 0}, "--tiles 0: expected at least 1"),
        ({"gpus": 0}, "--gpus 0: expected at least 1"),
        ({"slides": -1}, "--slides -1: expected at least 1"),
        ({"virtual_ranks": 0}, "--virtual-ranks 0: expected at least 1"),
        ({"tile_px": 0}, "--tile-px 0: expected at least 1"),
        ({"memory_gb": 0.0}, "--memory-gb 0: expected a number above 0"),
        ({"memory_gb": math.nan}, "--memory-gb nan: expected a number above 0"),
        ({"encoder": "resnet18,,x"}, "--encoder resnet18,,x: expected names of encoders"),
        ({"encoder": "a,a"}, "--encoder a,a: expected names of encoders, each once"),
        ({"encoder": "resnet_18"}, "resnet_18"),
        ({"encoder": "vit_tiny_patch16_224", "tile_px": 100}, "tiles of 100 px are no whole number of its patches"),
        ({"gpus": 1, "aggregator_rank": "dedicated"}, "--aggregator-rank dedicated: expected --gpus 2 or more"),
        ({"measure": True, "device": "a100"}, "--device a100 would have no effect"),
        ({"measure": True, "rates": RateInputs(share=0.5)}, "--rates.share 0.5 would have no effect"),
        ({"rates": RateInputs(share=1.5)}, "--rates.share 1.5: expected at most 1"),
        ({"rates": RateInputs(link_gb_per_s=0)}, "--rates.link-gb-per-s 0: expected a number above 0"),
        ({"rates": RateInputs(latency_us=-1)}, "--rates.latency-us -1: expected a number above 0, or 0"),
        ({"plot": Path("nowhere/plan.png")}, "--plot nowhere/plan.png: expected a .png in a folder that exists"),
        ({"plot": Path("plan.pdf")}, "--plot plan.pdf: expected a .png"),
        (
            {"memory_gb": 0.006, "tiles": 9},
            "--memory-gb 0.006: not one tile of 32 px fits beside test_resnet; expected at least",
        ),
        ({"memory_gb": 0.1, "virtual_ranks": 4}, "--virtual-ranks 4 makes virtual ranks of 750 tiles, 0.1 GB hold"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TrainerError) as caught:
        Plan(**{**SMALL, **flags}).run()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_front_door_answers_bad_input_with_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert slidegrad.main(["plan", "--tiles", "0"]) == 2
    assert capfd.readouterr().err == "slidegrad: --tiles 0: expected at least 1\n"


def test_a_plan_is_one_json_object_and_a_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.png"
    words = ["--encoder", "test_resnet,test_vit", "--tile-px", "160", "--tiles", "3000", "--gpus", "5"]
    assert slidegrad.main(["plan", *words, "--memory-gb", "2", "--slides", "100", "--plot", str(file)]) == 0
    told = capfd.readouterr()
    result = json.loads(told.out)
    assert set(result) == {
        *("encoder", "precision", "tile_px", "num_tiles", "gpus", "device", "is_measured", "costs", "rates", "plan"),
        *("epoch_h", "num_slides", "limit", "scaling", "scaling_ends_at", "capacity", "plot"),
    }
    plan = result["plan"]
    assert (plan["num_encoders"], plan["has_dedicated_aggregator"], plan["tiles_per_rank"]) == (4, True, 750)
    assert plan["virtual_ranks"] % 4 == 0
    assert plan["encoder_gb"] <= 1.8
    assert set(plan["seconds"]) == PHASES
    assert plan["slide_s"] >= plan["seconds"]["encoding"] > 0
    assert result["limit"] == plan["limit"]
    assert result["epoch_h"] == pytest.approx(100 * plan["slide_s"] / 3_600, abs=1e-4)
    assert [step["num_encoders"] for step in result["scaling"]] == [2**n for n in range(11)]
    ends = [step["num_encoders"] for step in result["scaling"] if step["efficiency"] < 0.5]
    assert result["scaling_ends_at"] == (ends[0] if ends else None)
    named = [(one["encoder"], one["precision"]) for one in result["capacity"]]
    assert named == [(e, p) for e in ("test_resnet", "test_vit") for p in ("float32", "bf16")]
    assert all(one["measured"] is None and one["predicted"] > 0 for one in result["capacity"])
    assert "4 encoder ranks, and one that aggregates" in told.err
    picture = cv2.imread(str(file))
    assert picture is not None
    assert 300 < picture.shape[0] < 2_000
    assert 600 < picture.shape[1] < 3_000
    assert picture.std() > 10


def test_measured_stands_beside_predicted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for seconds in ("_ENOUGH_S", "_FEW_S"):  # A batch of two tiles is large enough.
        monkeypatch.setattr(f"trainer.projection.{seconds}", 0.0)
    result, code = Plan(**SMALL, memory_gb=0.03, measure=True).run()
    assert code == 0
    assert result["is_measured"]
    assert result["rates"]["forward_s"] > 0
    assert result["rates"]["backward_s"] > 0
    assert result["rates"]["update_s"] > 0
    for one in result["capacity"]:
        assert one["predicted"] == pytest.approx(one["measured"], rel=0.08)
        assert one["trials"] > 5
    told = capsys.readouterr().err
    assert "predicted / measured" in told
    assert "computing: measured here" in told


def test_a_shared_aggregator_and_one_device() -> None:
    shared, _ = Plan(**SMALL, aggregator_rank="shared").run()
    assert (shared["plan"]["num_encoders"], shared["plan"]["aggregator_idle"]) == (5, 0)
    alone, _ = Plan(**{**SMALL, "gpus": 1}).run()
    assert (alone["plan"]["num_encoders"], alone["plan"]["seconds"]["sum"]) == (1, 0)


def test_other_devices_and_rates_change_the_times() -> None:
    h100, _ = Plan(**SMALL, rates=RateInputs(core_tiles_per_s=1e6, storage_gb_per_s=1e3)).run()
    old, _ = Plan(**SMALL, device="rtx3090").run()
    far, _ = Plan(**SMALL, rates=RateInputs(storage_gb_per_s=1e-3)).run()
    assert old["plan"]["seconds"]["encoding"] > h100["plan"]["seconds"]["encoding"]
    assert (h100["plan"]["limit"], far["plan"]["limit"]) == ("encoding", "reading")
    assert far["plan"]["slide_s"] == pytest.approx(3_000 * 10e3 / 1e6)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, trainer.planning.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
