"""The synthetic cohort: deterministic, read alike by both readers, and matched in all but the foci."""

import csv
import hashlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from manifests.errors import SlidegradError
from tiler.synth import CohortConfig, make_cohort, make_slide
from tiler.synth.config import CELL_PX, MPP
from tiler.synth.layout import BACKGROUND, LOOKALIKE, PEN, TISSUE, TUMOUR, count_tiles, draw_layout
from tiler.synth.plan import pair_rng, plan_slide

TINY = CohortConfig(width_px=(768, 1152), height_px=(640, 896))
SMALL = CohortConfig(width_px=(1280, 2304), height_px=(1152, 1792))
LONG = CohortConfig(width_px=(4224, 4224), height_px=(640, 640))
NUM_SLIDES = 40


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cohort")
    make_cohort(out, NUM_SLIDES, seed=3, config=SMALL)
    return out


def _labels(out: Path) -> list[dict[str, str]]:
    with (out / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _truth(out: Path, slide_id: str) -> NDArray[np.uint8]:
    truth = cv2.imread(str(out / "truth" / f"{slide_id}.png"), cv2.IMREAD_UNCHANGED)
    assert truth is not None
    return np.asarray(truth, np.uint8)


def _level(slide: openslide.OpenSlide, level: int) -> NDArray[np.uint8]:
    return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"))


def _digests(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_slides_depend_on_seed_and_index_alone(tmp_path: Path) -> None:
    seen: list[int] = []
    paths = make_cohort(tmp_path / "a", 3, seed=1, config=TINY, num_workers=2, progress=seen.append)
    make_cohort(tmp_path / "b", 5, seed=1, config=TINY, num_workers=1)
    make_cohort(tmp_path / "c", 3, seed=2, config=TINY, num_workers=1)
    a, b, c = (_digests(tmp_path / name) for name in "abc")
    assert [path.name for path in paths] == ["synth_0000.svs", "synth_0001.svs", "synth_0002.svs"]
    assert seen == [1, 2, 3]
    assert {name: b[name] for name in a if name != "labels.csv"} == {k: v for k, v in a.items() if k != "labels.csv"}
    assert all(a[f"slides/{path.name}"] != c[f"slides/{path.name}"] for path in paths)
    assert _labels(tmp_path / "b")[:3] == _labels(tmp_path / "a")


def test_making_a_cohort_again_changes_no_byte(tmp_path: Path) -> None:
    make_cohort(tmp_path, 2, seed=1, config=TINY, num_workers=1)
    before = _digests(tmp_path)
    make_cohort(tmp_path, 2, seed=1, config=TINY, num_workers=1)
    assert _digests(tmp_path) == before
    assert len(before) == 5  # two slides, two truth maps, the labels; nothing half-written


def test_a_failure_leaves_no_torn_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tiler.synth.svs._write_page", fail)
    with pytest.raises(KeyboardInterrupt):
        make_cohort(tmp_path, 2, seed=1, config=TINY, num_workers=1)
    assert _digests(tmp_path) == {}


@pytest.mark.parametrize(("config", "num_levels"), [(TINY, 2), (LONG, 3)])
def test_both_readers_see_the_same_pyramid(tmp_path: Path, config: CohortConfig, num_levels: int) -> None:
    cucim = pytest.importorskip("cucim")
    (path, *_) = make_cohort(tmp_path, 1, seed=5, config=config, num_workers=1)
    ours, theirs = openslide.OpenSlide(path), cucim.CuImage(str(path))
    assert ours.properties["openslide.vendor"] == "aperio"
    assert float(ours.properties["openslide.mpp-x"]) == float(ours.properties["openslide.mpp-y"]) == MPP
    assert ours.properties["aperio.AppMag"] == "20"
    assert "|AppMag = 20|MPP = 0.5000" in ours.properties["tiff.ImageDescription"]
    assert set(ours.associated_images) == {"thumbnail"}
    assert ours.level_count == num_levels
    assert ours.level_downsamples == tuple(4.0**level for level in range(num_levels))
    assert theirs.resolutions["level_dimensions"] == ours.level_dimensions
    assert theirs.resolutions["level_tile_sizes"] == ((256, 256),) * num_levels
    for level, size in enumerate(ours.level_dimensions):
        region = np.asarray(theirs.read_region((0, 0), size, level)).astype(np.int16)
        assert np.abs(region - _level(ours, level)).mean() < 1.5
        smaller = cv2.resize(_level(ours, 0), size, interpolation=cv2.INTER_AREA).astype(np.int16)
        assert np.abs(region - smaller).mean() < 4  # JPEG rounds the small level anew


def test_labels_are_balanced_pairs_and_a_pair_is_one_patient(cohort: Path) -> None:
    rows = _labels(cohort)
    assert list(rows[0]) == ["slide_id", "label", "specimen_id", "patient_id"]
    assert [row["slide_id"] for row in rows] == [f"synth_{index:04d}" for index in range(NUM_SLIDES)]
    labels = [int(row["label"]) for row in rows]
    assert all(labels[i] + labels[i + 1] == 1 for i in range(0, NUM_SLIDES, 2))
    assert 0 < sum(labels[::2]) < NUM_SLIDES / 2  # the order says nothing
    assert len({row["specimen_id"] for row in rows}) == NUM_SLIDES
    assert all(rows[i]["patient_id"] == rows[i + 1]["patient_id"] for i in range(0, NUM_SLIDES, 2))
    assert set(Counter(row["patient_id"] for row in rows).values()) == {2}


def test_special_cases_are_shared_by_both_labels_of_a_cohort_of_120() -> None:
    plans = [plan_slide(0, index, CohortConfig()) for index in range(120)]
    for special in ([plan for plan in plans if plan.has_pen], [plan for plan in plans if plan.is_scant]):
        by_label = Counter(plan.label for plan in special)
        assert by_label[0] == by_label[1]
        assert 6 <= by_label.total() <= 10


def test_foci_cover_the_promised_share_at_full_size() -> None:
    config = CohortConfig()
    for index in range(40):
        plan = plan_slide(11, index, config)
        layout = draw_layout(
            pair_rng(11, plan.pair),
            config,
            is_scant=plan.is_scant,
            has_pen=plan.has_pen,
            label=plan.label,
            mirror=plan.mirror,
        )
        truth = layout.truth
        share = count_tiles(truth, TUMOUR) / count_tiles(truth)
        assert (truth == TUMOUR).any() == bool(plan.label)
        assert (truth == PEN).any() == plan.has_pen
        if plan.is_scant:
            assert 0.005 < (truth != BACKGROUND).mean() < 0.04
            assert count_tiles(truth, TUMOUR) >= 2 * plan.label
        else:
            assert 0.02 <= share <= 0.10 or not plan.label
            assert 0.2 < ((truth == TISSUE) | (truth == TUMOUR) | (truth == LOOKALIKE)).mean() <= 0.45


def test_pixels_follow_the_truth_map(cohort: Path) -> None:
    slide_id = _labels(cohort)[0]["slide_id"]
    pixels, truth = _cell_colours(cohort, slide_id), _truth(cohort, slide_id)
    inner = cv2.erode((truth == TISSUE).astype(np.uint8), np.ones((3, 3))) > 0
    outer = cv2.erode((truth == BACKGROUND).astype(np.uint8), np.ones((3, 3))) > 0
    assert np.abs(pixels[outer] - (243, 240, 242)).max() < 8  # stain variation and JPEG rounding
    assert (pixels[inner][:, 1] < 225).mean() > 0.95
    foci = truth >= TUMOUR
    assert pixels[foci].mean() < pixels[inner].mean() - 10  # crowded nuclei are darker than stroma


def test_both_kinds_of_focus_have_the_same_mean_colour(cohort: Path) -> None:
    rows = _labels(cohort)
    gaps = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        positive, negative = (first, second) if first["label"] == "1" else (second, first)
        means = [
            _cell_colours(cohort, row["slide_id"])[_truth(cohort, row["slide_id"]) == code].mean(axis=0)
            for row, code in ((positive, TUMOUR), (negative, LOOKALIKE))
        ]
        gaps.append(means[0] - means[1])
    assert np.abs(np.mean(gaps, axis=0)).max() < 2
    assert np.abs(gaps).max() < 8  # one small focus


def test_nothing_but_the_foci_tells_the_classes_apart(cohort: Path) -> None:
    rows = _labels(cohort)
    labels = [int(row["label"]) for row in rows]
    nuisances = np.array([_nuisances(cohort, row["slide_id"]) for row in rows])
    for name, values in zip(("red", "green", "blue", "saturation", "area", "tiles", "bytes"), nuisances.T, strict=True):
        assert abs(roc_auc_score(labels, values) - 0.5) < 0.10, name
    # The labels can be told at all: by the tumour foci.
    tumour = [(_truth(cohort, row["slide_id"]) == TUMOUR).sum() for row in rows]
    assert roc_auc_score(labels, tumour) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"width_px": (100, 200)},
        {"width_px": (1030, 1100)},
        {"height_px": (2000, 1000)},
        {"tissue_fraction": (0.0, 0.4)},
        {"tumour_fraction": (0.05, 0.9)},
        {"max_foci": 0},
        {"jpeg_quality": 101},
        {"stain_variation": -1.0},
    ],
)
def test_an_impossible_config_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(SlidegradError, match=next(iter(change))):
        CohortConfig(**change)  # type: ignore[arg-type]


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SlidegradError, match="slides=0"):
        make_cohort(tmp_path, 0, seed=0)
    with pytest.raises(SlidegradError, match="seed=-1"):
        make_cohort(tmp_path, 1, seed=-1)
    (tmp_path / "file").touch()
    with pytest.raises(SlidegradError, match="folder"):
        make_cohort(tmp_path / "file", 1, seed=0)


def test_no_variation_still_makes_slides(tmp_path: Path) -> None:
    config = CohortConfig(width_px=(512, 512), height_px=(512, 512), stain_variation=0, scant_every=0, pen_every=1)
    for folder in ("slides", "truth"):
        (tmp_path / folder).mkdir()
    make_slide(tmp_path, 0, 7, config)
    assert openslide.OpenSlide(tmp_path / "slides" / "synth_0007.svs").dimensions == (512, 512)


def _cell_colours(out: Path, slide_id: str) -> NDArray[np.float32]:
    """Mean RGB of each 8-micron cell."""
    pixels = _level(openslide.OpenSlide(out / "slides" / f"{slide_id}.svs"), 0)
    size = (pixels.shape[1] // CELL_PX, pixels.shape[0] // CELL_PX)
    means: NDArray[np.float32] = cv2.resize(pixels.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return means


def _nuisances(out: Path, slide_id: str) -> tuple[float, ...]:
    truth = _truth(out, slide_id)
    colours = _cell_colours(out, slide_id)[(truth >= TISSUE) & (truth <= LOOKALIKE)]
    saturation = 1 - colours.min(axis=1) / colours.max(axis=1)
    num_bytes = (out / "slides" / f"{slide_id}.svs").stat().st_size
    return (*colours.mean(axis=0), saturation.mean(), len(colours), count_tiles(truth), num_bytes)
