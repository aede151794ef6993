"""Methods: every recipe by every method is a whole config that can be trained, saved and gone on with."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.test_train import arguments
from trainer.cli import Train
from trainer.config import Augment, RunConfig
from trainer.errors import TrainerError
from trainer.prepare import prepare_run
from trainer.recipes import METHODS, RECIPES, describe_choices, get_recipe
from trainer.topology import Topology

QUICK = ("--optim.epochs", "1", "--tiles.k", "8", "--machine.keep", "all")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_by_every_method_is_a_config_that_survives_its_yaml(recipe: str, method: str) -> None:
    name = f"{recipe}+{method}"
    config = get_recipe(name).resolved(2)
    assert config.recipe == name
    assert RunConfig.from_yaml(config.to_yaml(), "config.yaml") == config


@pytest.mark.parametrize("recipe", RECIPES)
def test_methods_differ_from_their_recipe_by_what_they_say(recipe: str) -> None:
    plain = get_recipe(recipe)

    def changed(method: str) -> set[str]:
        return set(plain.differences(get_recipe(f"{recipe}+{method}"))) - {"recipe"}

    assert changed("end_to_end") == set()
    assert changed("tile_mean") == changed("tile_max") == {"aggregator.name"}
    frozen = {"encoder.freeze", "augment.flips", "optim.lr"}
    assert changed("frozen_gma") == frozen
    assert changed("frozen_transmil") == frozen | {"aggregator.name", "aggregator.hidden"}
    assert changed("max_pool") - {"encoder.batchnorm"} == {"aggregator.name", "tiles.tiles", "tiles.k"} - (
        {"tiles.k"} if plain.tiles.k == 1 else set()
    )


def test_frozen_methods_leave_tiles_as_they_are_and_learn_at_a_rate_of_their_own() -> None:
    for method in ("frozen_gma", "frozen_transmil"):
        config = get_recipe(f"egfr_resnet50+{method}")
        assert config.augment == Augment(flips=False, stain=0.0, blur=0.0)
        assert (config.encoder.freeze, config.optim.lr, config.optim.aggregator_lr) == ("all", 1e-4, None)
    assert get_recipe("egfr_resnet50+frozen_transmil").aggregator.hidden == 512


def test_max_pooling_takes_the_highest_tile_and_statistics_that_stay() -> None:
    config = get_recipe("egfr_resnet50+max_pool")
    assert (config.tiles.tiles, config.tiles.k, config.aggregator.name) == ("top", 1, "tile_max")
    assert config.encoder.batchnorm == "frozen"  # ImageNet's.
    assert get_recipe("breast_full_slide+max_pool").encoder.batchnorm == "calibrated"  # Of random weights.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brest+tile_mean", "^unknown recipe 'brest'; one of demo, "),
        ("demo+tile_men", r"^unknown method 'tile_men' in 'demo\+tile_men'; RECIPE\+METHOD takes one of end_to_end, "),
        ("demo+", "^unknown method ''"),
        ("demo+tile_mean+max_pool", r"^unknown method 'tile_mean\+max_pool'"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(name: str, message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        get_recipe(name)
    with pytest.raises(TrainerError, match=r"^train needs a recipe .* methods end_to_end, .*, max_pool$"):
        Train.parse(["--out", "run"])


def test_help_without_a_recipe_tells_recipes_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Train.parse(["--help"])
    told = capsys.readouterr().out
    assert "RECIPE[+METHOD]" in told
    assert all(f"  {name} " in told for name in (*RECIPES, *METHODS))
    assert all(line == line.rstrip() for line in describe_choices().splitlines())


def test_flags_change_a_methods_settings_as_they_do_a_recipes() -> None:
    line = "demo+max_pool --manifests m --labels l.csv --out run --tiles.k 5 --optim.lr 0.1"
    config = Train.parse(line.split()).config
    assert (config.recipe, config.tiles.tiles, config.tiles.k, config.optim.lr) == ("demo+max_pool", "top", 5, 0.1)


def words(method: str, *args: Any) -> list[str]:
    return [f"demo+{method}", *arguments(*args)[1:]]


@pytest.mark.parametrize("method", ["frozen_transmil", "tile_mean"])
def test_a_method_trains_and_its_run_is_gone_on_with_by_its_own_name_alone(
    method: str, small_manifests: Path, small_cohort: Path, tmp_path: Path
) -> None:
    run, labels = tmp_path / "run", small_cohort / "labels.csv"
    result, code = Train.parse(words(method, small_manifests, labels, run, *QUICK)).run()
    assert code == 0
    assert Path(result["heatmap"]).stat().st_size > 1000
    assert RunConfig.from_yaml((run / "config.yaml").read_text(), "").recipe == f"demo+{method}"
    assert Train.parse(words(method, small_manifests, labels, run, "--resume")).config.recipe == f"demo+{method}"
    for other in ("demo", "demo+end_to_end", "demo+max_pool"):
        given = [other, *arguments(small_manifests, labels, run, "--resume")[1:]]
        with pytest.raises(TrainerError) as caught:
            Train.parse(given)
        assert str(caught.value) == f"--out holds a run of recipe 'demo+{method}', not '{other}'; give another --out"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--aggregator.name", "mean"], "aggregator.name is mean: expected one that ranks tiles"),
        (["--head.task", "regression"], "aggregator.name is tile_max: expected tile_mean or another"),
        (["--tiles.k", "None"], "tiles.tiles is top: expected exactly one of tiles.k"),
        (["--tiles.region-class", "Tumor"], "tiles.region_class is Tumor: expected None, or tiles.regions"),
        (["--encoder.batchnorm", "running"], "tiles.k=1 over virtual_ranks=2: BatchNorm has nothing to measure"),
    ],
)
def test_settings_that_do_not_go_with_max_pooling_are_refused(
    more: list[str], message: str, small_manifests: Path, small_cohort: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainerError) as caught:
        Train.parse(words("max_pool", small_manifests, small_cohort / "labels.csv", tmp_path / "run", *more)).run()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_max_pooling_looks_for_is_told_where_it_is_not_plain(
    small_manifests: Path, small_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes are sorted by name: of "mut" and "wt" the second is looked for."""
    given, named = small_cohort / "labels.csv", tmp_path / "labels.csv"
    rows = [line.split(",") for line in given.read_text().splitlines()]
    at = rows[0].index("label")
    lines = [",".join([*row[:at], {"0": "wt", "1": "mut"}.get(row[at], row[at]), *row[at + 1 :]]) for row in rows]
    named.write_text("\n".join(lines))
    topology = Topology.make(1, "auto", 2)
    for labels, is_told in ((given, False), (named, True)):
        prepare_run(
            tmp_path / labels.parent.name,
            get_recipe("demo+max_pool"),
            manifests=small_manifests,
            labels=labels,
            topology=topology,
            resume=False,
        )
        told = "note: aggregator.name=tile_max looks for tiles of the class wt, and never of the first, mut; "
        assert (told in capsys.readouterr().err) == is_told
