"""Augmentation: true symmetries, stains as skimage has them, white that stays white, and no draw but from the CPU."""

import itertools
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from skimage.color import hed2rgb, rgb2hed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import augment
from trainer.augment import augment_tiles, draw_stain
from trainer.config import Augment

EVERYTHING = Augment(stain=0.1, blur=0.5)
STAIN_ALONE = Augment(flips=False, stain=0.05)
OFF = Augment(flips=False)
CORNERS = [*itertools.product((-1.0, 1.0), repeat=6)]
"""The most that six draws can be, all signs."""
DARK = np.array([90, 50, 130])
"""The colour of a nucleus."""


def random_tiles(num_tiles: int, tile_px: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num_tiles, tile_px, tile_px, 3), dtype=torch.uint8, generator=generator)


def run(tiles_NHWC: Tensor, settings: Augment, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return augment_tiles(tiles_NHWC, settings, draw_stain(settings))


def corner(signs: tuple[float, ...], stain: float) -> Tensor:
    """A slide's stain jitter at the end of its range."""
    return torch.tensor([1.0, 0.0], dtype=torch.float64) + stain * torch.tensor(signs).reshape(3, 2)


def colours(rgb: Any) -> Tensor:
    """Colours (n, 3) as one tile of one row."""
    return torch.from_numpy(np.asarray(rgb, np.uint8)).reshape(1, 1, -1, 3)


def test_the_eight_symmetries_are_true_and_equally_often() -> None:
    tile = random_tiles(1, 5)
    turns = [np.rot90(tile[0].numpy(), quarter) for quarter in range(4)]
    known = {picture.tobytes(): 0 for turn in turns for picture in (turn, turn[::-1])}
    assert len(known) == 8
    for picture in run(tile.repeat(8000, 1, 1, 1), Augment()):
        known[picture.numpy().tobytes()] += 1  # KeyError: not a symmetry
    assert sum(known.values()) == 8000
    assert all(850 < count < 1150 for count in known.values()), known  # five standard deviations


def test_tiles_that_nothing_changes_are_not_copied() -> None:
    tiles = random_tiles(4)
    assert augment_tiles(tiles, None, None) is tiles
    assert run(tiles, OFF) is tiles
    assert draw_stain(None) is None
    assert draw_stain(OFF) is None


@pytest.mark.parametrize("settings", [Augment(), STAIN_ALONE, Augment(flips=False, blur=1.0), EVERYTHING])
def test_the_shard_itself_is_left_as_it_is(settings: Augment) -> None:
    tiles = random_tiles(9)
    out = run(tiles, settings)
    assert torch.equal(tiles, random_tiles(9))
    assert not torch.equal(out, tiles)
    assert (out.shape, out.dtype) == (tiles.shape, torch.uint8)


@pytest.mark.parametrize("settings", [Augment(), EVERYTHING])
def test_a_shard_without_tiles_stays_one(settings: Augment) -> None:
    assert run(torch.zeros(0, 1, 1, 3, dtype=torch.uint8), settings).shape == (0, 1, 1, 3)


def test_the_same_random_state_gives_the_same_tiles() -> None:
    tiles = random_tiles(40)
    assert torch.equal(run(tiles, EVERYTHING, seed=7), run(tiles, EVERYTHING, seed=7))
    assert not torch.equal(run(tiles, EVERYTHING, seed=7), run(tiles, EVERYTHING, seed=8))


@pytest.mark.parametrize("size", [1, 7 * 16**2, 10**9])
@pytest.mark.parametrize("one_by_one", [("cpu",), ()])
def test_chunks_change_nothing(size: int, one_by_one: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gathered way, which a GPU takes, gives what the CPU's gives."""
    tiles = random_tiles(40)
    true = run(tiles, EVERYTHING)
    monkeypatch.setattr(augment, "_CHUNK_PX_CPU", size)
    monkeypatch.setattr(augment, "_ONE_BY_ONE", one_by_one)
    assert torch.equal(run(tiles, EVERYTHING), true)


class LargestFloat(TorchDispatchMode):
    """Notes the most elements of a floating-point tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.numel = max(self.numel, out.numel())
        return out


def test_a_shard_is_never_floating_point_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "_CHUNK_PX_CPU", 4 * 16**2)
    tiles = random_tiles(200)
    with LargestFloat() as largest:
        run(tiles, EVERYTHING)
    # Mirroring at the edges makes a tile of 16 px one of 26.
    assert 0 < largest.numel <= 4 * 3 * 16 * 26


def test_a_factor_of_one_and_no_shift_give_every_pixel_back() -> None:
    tiles = random_tiles(30)
    assert tiles.min() == 0
    assert tiles.max() == 255
    assert torch.equal(augment_tiles(tiles, OFF, torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)), tiles)


def test_one_draw_moves_all_tiles_of_a_slide_alike() -> None:
    tiles = random_tiles(1).repeat(5, 1, 1, 1)
    torch.manual_seed(0)
    first, second = draw_stain(STAIN_ALONE), draw_stain(STAIN_ALONE)
    state = torch.get_rng_state()
    one, other = augment_tiles(tiles, STAIN_ALONE, first), augment_tiles(tiles, STAIN_ALONE, second)
    assert torch.equal(torch.get_rng_state(), state)  # Nothing is drawn per tile.
    assert torch.equal(one, one[:1].expand_as(one))
    assert not torch.equal(one, tiles)
    assert not torch.equal(one, other)


def test_draws_fill_their_range_evenly() -> None:
    torch.manual_seed(0)
    draws = torch.stack([draw for _ in range(2000) if (draw := draw_stain(STAIN_ALONE)) is not None])
    assert draws.shape == (2000, 3, 2)
    centred = (draws - torch.tensor([1.0, 0.0])) / STAIN_ALONE.stain
    assert centred.abs().max() <= 1
    assert centred.mean(0).abs().max() < 0.06  # 4.6 standard errors
    assert (centred.std(0) - 3**-0.5).abs().max() < 0.03
    assert (torch.corrcoef(centred.reshape(2000, 6).T) - torch.eye(6)).abs().max() < 0.11  # Six draws, not fewer.


def test_stains_are_those_of_skimage() -> None:
    """On colours dense enough for the whole shift and mixed of positive stains, where skimage clips nothing."""
    rgb = random_tiles(1, 128).clamp(min=1).numpy().reshape(-1, 3)  # Black is 1e-6 there, a quarter of a level here.
    hed = rgb2hed(rgb)
    density = -np.log(rgb / 255)
    rgb, hed = (values[(hed.min(1) > 0.01) & (density.mean(1) > augment._TISSUE_OD)] for values in (rgb, hed))
    assert len(rgb) > 100
    torch.manual_seed(0)
    for _ in range(20):
        stain = draw_stain(Augment(stain=0.2))
        assert stain is not None
        factor, shift = stain.numpy().T
        # skimage counts density in units of ln(1e6).
        moved = hed * factor + shift / np.log(1e6)
        inside = moved.min(1) >= 0
        expected = 255 * hed2rgb(moved[inside])
        found = augment_tiles(colours(rgb), OFF, stain)[0, 0].numpy()[inside]
        assert np.abs(found - expected).max() <= 1


def test_white_stays_near_white() -> None:
    """A scanner's white, 240 and more, at HED-light: by at most 2 grey levels."""
    whites = colours([*itertools.product((240, 243, 248, 255), repeat=3)])
    for signs in CORNERS:
        moved = augment_tiles(whites, OFF, corner(signs, 0.05)).int() - whites.int()
        assert moved.abs().max() <= 2


def test_tissue_moves() -> None:
    pink = colours([[220, 150, 190]])
    moved = [augment_tiles(pink, OFF, corner(signs, 0.05)).int() - pink.int() for signs in CORNERS]
    assert 8 < max(int(change.abs().max()) for change in moved) < 20


def test_darker_stays_darker_however_far_stains_are_shifted() -> None:
    """From white to a nucleus, at the most that the config allows."""
    steps = np.linspace(0, 1, 40)[:, None]
    greys = colours(np.rint(255 * (DARK / 255) ** steps))
    for signs in CORNERS:
        lightness = augment_tiles(greys, OFF, corner(signs, 0.2))[0, 0].int().sum(1)
        assert (lightness.diff() <= 0).all(), signs


def test_colours_brighter_than_white_do_not_turn_black() -> None:
    """Stains moved in a full red ask for more light than white in some corners, and at least for 163 in all."""
    red = colours([[255, 60, 60]])
    reds = torch.stack([augment_tiles(red, OFF, corner(signs, 0.2))[0, 0, 0, 0] for signs in CORNERS])
    assert reds.min() > 150
    assert reds.max() == 255


def test_the_share_of_blurred_tiles_is_the_one_asked_for() -> None:
    tiles = random_tiles(2000, 8)
    out = run(tiles, Augment(flips=False, blur=0.3))
    blurred = (out != tiles).flatten(1).any(1)
    assert 500 < blurred.sum() < 700  # five standard deviations
    assert torch.equal(out[~blurred], tiles[~blurred])


def test_each_blur_is_a_gaussian_of_one_of_the_sigmas() -> None:
    tiles = random_tiles(60, 32)
    out = run(tiles, Augment(flips=False, blur=1.0))
    found = []
    for tile, blurred in zip(tiles.numpy(), out.numpy(), strict=True):
        errors = {}
        for sigma in augment._BLUR_SIGMAS_PX:
            side = 2 * int(np.ceil(3 * sigma)) + 1
            true = cv2.GaussianBlur(tile.astype(np.float32), (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)
            errors[sigma] = np.abs(true - blurred).max()
        nearest = min(errors, key=errors.__getitem__)
        assert errors[nearest] < 0.51
        found.append(nearest)
    assert set(found) == set(augment._BLUR_SIGMAS_PX)


def test_tiles_narrower_than_the_blur_can_be_blurred() -> None:
    tiles = random_tiles(30, 3)
    assert not torch.equal(run(tiles, Augment(flips=False, blur=1.0)), tiles)
    assert torch.equal(run(tiles[:, :1, :1], Augment(blur=1.0)), tiles[:, :1, :1])


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tiles = random_tiles(200)
    assert torch.equal(run(tiles.cuda(), Augment()).cpu(), run(tiles, Augment()))
    apart = run(tiles.cuda(), EVERYTHING).cpu().int() - run(tiles, EVERYTHING).int()
    assert apart.abs().max() <= 2  # Logarithms, powers and sums are rounded elsewhere.
