"""The page's modules by themselves, in the browser, beside what they must agree with: many tiles, any grid."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.services.page.conftest import Visit
from trainer.heatmaps.painting import color_scale, rank_share, sign_share

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture
def page(visit: Visit) -> "Page":
    return visit().open()


def _call(page: "Page", script: str, *given: Any) -> Any:
    """The value of a script in the page, with the modules `tiles` and `colours`; NaN travels as null."""
    head = "const [tiles, colours] = await Promise.all(['tiles', 'colours'].map(name => import(`/page/${name}.js`)));"
    return page.evaluate(f"async given => {{ {head} {script} }}", list(given))


def _values(kind: str) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(3)
    values = {
        "plain": rng.normal(size=500),
        "ties": rng.integers(-3, 4, 400) / 7,
        "one": np.array([0.25]),
        "equal": np.full(9, 0.5),
        "zeros": np.zeros(9),
        "mostly zeros": np.r_[np.zeros(300), 2.5],
    }[kind].astype(np.float32)
    if kind != "one":
        values[3] = np.nan
    return values


@pytest.mark.parametrize("kind", ["plain", "ties", "one", "equal", "zeros", "mostly zeros"])
def test_shares_are_those_of_the_heatmaps_pictures(page: "Page", kind: str) -> None:
    values = _values(kind)
    given = [None if np.isnan(value) else float(value) for value in values]
    script = """const values = Float32Array.from(given[0], value => value ?? NaN);
        const {end, share} = colours.signShare(values);
        const plain = array => Array.from(array, value => Number.isNaN(value) ? null : value);
        return [plain(colours.rankShare(values)), plain(share), end];"""
    ranks, signs, end = _call(page, script, given)
    assert np.allclose(np.array(ranks, float), rank_share(values), atol=1e-6, equal_nan=True)
    assert end == pytest.approx(color_scale(values), rel=1e-6)
    assert np.allclose(np.array(signs, float), sign_share(values, color_scale(values)), atol=1e-6, equal_nan=True)


_MAKE = """const [x, y, tileW, tileH, width, height] = given;
    const columns = {x_l0: x, y_l0: y, tissue: x.map(() => 1)};
    const field = new tiles.TileField(columns, [tileW, tileH], [width, height]);"""


def _scattered(num: int, footprint: tuple[int, int], size: tuple[int, int]) -> list[Any]:
    rng = np.random.default_rng(num)
    x, y = (rng.integers(-5, side, num).tolist() for side in size)
    return [x, y, *footprint, *size]


@pytest.mark.parametrize(
    "made",
    [
        _scattered(300, (40, 25), (1000, 700)),
        _scattered(50, (1, 1), (30, 30)),
        _scattered(200, (2, 3), (150_000, 120_000)),
        _scattered(1, (448, 448), (448, 448)),
    ],
    ids=["overlapping", "tiny", "sparse", "one"],
)
def test_tiles_are_found_as_one_by_one(page: "Page", made: list[Any]) -> None:
    x, y = np.array(made[0]), np.array(made[1])
    tile_w, tile_h, width, height = made[2:]
    rng = np.random.default_rng(1)
    places = rng.integers(0, len(x), 60)
    points = np.stack([x[places] + rng.integers(-2, tile_w + 2, 60), y[places] + rng.integers(-2, tile_h + 2, 60)], 1)
    boxes = [[int(px), int(py), int(px) + width // 5 + 1, int(py) + height // 7 + 1] for px, py in points[:20]]
    script = f"""{_MAKE} const [points, boxes] = given.slice(6);
        const sorted = rows => rows.sort((a, b) => a - b);
        return [points.map(([x, y]) => field.at(x, y)), boxes.map(box => sorted(field.within(...box)))];"""
    found, within = _call(page, script, *made, points.tolist(), boxes)
    for (px, py), row in zip(points, found, strict=True):
        over = (x <= px) & (px < x + tile_w) & (y <= py) & (py < y + tile_h)
        assert (row >= 0) == bool(over.any())
        if row >= 0:
            far = np.hypot(px - x - tile_w / 2, py - y - tile_h / 2)
            assert over[row]
            assert far[row] == far[over].min()
    for (x0, y0, x1, y1), rows in zip(boxes, within, strict=True):
        meets = (x < x1) & (x + tile_w > x0) & (y < y1) & (y + tile_h > y0)
        assert rows == np.flatnonzero(meets).tolist()


def test_arrows_reach_every_tile_of_a_grid_and_stop_at_its_edge(page: "Page") -> None:
    row, column = np.divmod(np.arange(12 * 9), 12)
    made = [(column * 448).tolist(), (row * 448).tolist(), 448, 448, 12 * 448, 9 * 448]
    script = (
        f"{_MAKE} return [[1, 0], [-1, 0], [0, 1], [0, -1]].map(way => x.map((_, i) => field.neighbour(i, ...way)));"
    )
    right, left, down, up = _call(page, script, *made)
    at = np.arange(12 * 9)
    assert right == np.where(column < 11, at + 1, at).tolist()
    assert left == np.where(column > 0, at - 1, at).tolist()
    assert down == np.where(row < 8, at + 12, at).tolist()
    assert up == np.where(row > 0, at - 12, at).tolist()


def test_arrows_cross_gaps(page: "Page") -> None:
    script = f"{_MAKE} return [field.neighbour(0, 1, 0), field.neighbour(1, -1, 0), field.neighbour(0, 0, 1)];"
    assert _call(page, script, [0, 90_000], [500, 700], 448, 448, 100_000, 80_000) == [1, 0, 0]


def test_two_hundred_thousand_tiles_are_found_and_painted(page: "Page") -> None:
    script = """const n = 200_000, side = 500, x = Array.from({length: n}, (_, i) => (i % side) * 448);
        const columns = {x_l0: x, y_l0: x.map((_, i) => Math.floor(i / side) * 448), tissue: x.map(() => 1)};
        const field = new tiles.TileField(columns, [448, 448], [side * 448, 400 * 448]);
        const {picture, zoom} = field.raster(new Uint32Array(n).fill(colours.pack([10, 20, 30], 1)));
        const {data} = picture.getContext("2d").getImageData(0, 0, picture.width, picture.height);
        let painted = 0;
        for (let i = 3; i < data.length; i += 4) painted += data[i] > 0;
        return [field.at(100_000, 50_000), painted / (picture.width * picture.height), Array.from(data.slice(0, 4))];"""
    found, share, colour = _call(page, script)
    assert found == (50_000 // 448) * 500 + 100_000 // 448
    assert share > 0.999
    assert colour == [10, 20, 30, 255]
