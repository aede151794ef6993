"""Settings: checked, saved, read back; recipes are whole."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.cli import Train
from trainer.config import Augment, Encoder, Head, Machine, Optim, RunConfig, Tiles
from trainer.errors import TrainerError
from trainer.recipes import RECIPES, get_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_their_yaml(name: str) -> None:
    config = get_recipe(name).resolved(2)
    assert config.recipe == name
    assert RunConfig.from_yaml(config.to_yaml(), "config.yaml") == config


def test_paths_survive_yaml() -> None:
    config = RunConfig(encoder=Encoder(weights="w.pth"), machine=Machine(archive=Path("slides")))
    assert RunConfig.from_yaml(config.to_yaml(), "config.yaml") == config


@pytest.mark.parametrize("weights", ["none", "balanced", (1.0, 3.0)])
@pytest.mark.parametrize("freeze", ["none", "all", 2])
def test_choices_words_and_numbers_survive_yaml(weights: Any, freeze: Any) -> None:
    head = Head(task="multilabel", columns=("er", "pr"), class_weights=weights)
    config = RunConfig(head=head, encoder=Encoder(freeze=freeze), machine=Machine(keep=3, groups=2))
    assert RunConfig.from_yaml(config.to_yaml(), "config.yaml") == config
    assert not config.differences(RunConfig.from_yaml(config.to_yaml(), "config.yaml"))


def test_a_run_of_an_older_version_keeps_all_graphs() -> None:
    old = yaml.safe_load(get_recipe("demo").to_yaml())
    old["machine"]["keep"] = None
    del old["head"], old["machine"]["groups"], old["encoder"]["freeze"]
    found = RunConfig.from_yaml(yaml.safe_dump(old), "config.yaml")
    assert found == dataclasses.replace(get_recipe("demo"), machine=Machine(keep="all"))


def test_unknown_recipes_and_fields_are_named() -> None:
    with pytest.raises(TrainerError, match="unknown recipe 'brest'; one of demo"):
        get_recipe("brest")
    with pytest.raises(TrainerError, match=r"config\.yaml: sead is no setting of this version; mend the file"):
        RunConfig.from_yaml("sead: 1\n", "config.yaml")


def test_another_version_s_config_says_field_by_field_what_changed() -> None:
    text = "version: 7.0.0\ntiles: {tiles: some, k: many}\nseed: 1\noptim: {lr: 1, sam: true}\nmachine: 3\n"
    with pytest.raises(TrainerError) as caught:
        RunConfig.from_yaml(text, "config.yaml")
    assert str(caught.value) == (
        "config.yaml, written by Slidegrad 7.0.0: tiles.tiles is 'some', which this version does not take; "
        "tiles.k is 'many', which this version does not take; optim.sam is no setting of this version; "
        "machine is 3, expected a section; go on with that version, or give another --out"
    )


@pytest.mark.parametrize("text", ["- 1\n", "seed: [\n", ""])
def test_what_is_no_config_is_refused(text: str) -> None:
    with pytest.raises(TrainerError, match=r"config\.yaml: not a run's config"):
        RunConfig.from_yaml(text, "config.yaml")


def test_settings_that_an_older_run_lacks_are_named_with_what_they_get() -> None:
    config = get_recipe("demo")
    old = yaml.safe_load(config.to_yaml())
    del old["machine"]["fsdp"], old["optim"]["clip"]
    assert config.added_to(yaml.safe_dump(old), "config.yaml") == ["optim.clip (None)", "machine.fsdp (False)"]
    assert config.added_to(config.to_yaml(), "config.yaml") == []


@pytest.mark.parametrize("flips", [True, False])
def test_the_switch_of_older_runs_is_read_as_flips(flips: bool) -> None:
    config = get_recipe("demo")
    old = yaml.safe_load(config.to_yaml())
    del old["augment"]
    old["machine"]["read_ahead"] = 2
    old["tiles"]["augment"] = flips
    found = RunConfig.from_yaml(yaml.safe_dump(old), "config.yaml")
    assert found == dataclasses.replace(config, augment=Augment(flips=flips))


def test_a_config_with_both_the_old_switch_and_the_new_section_is_refused() -> None:
    with pytest.raises(TrainerError, match=r"config\.yaml: tiles\.augment is no setting of this version"):
        RunConfig.from_yaml("augment: {flips: false}\ntiles: {augment: true}\n", "config.yaml")


def test_recipes_flip_and_do_nothing_else_to_tiles() -> None:
    assert {recipe().augment for recipe in RECIPES.values()} == {Augment(flips=True, stain=0.0, blur=0.0)}


def test_augmentation_is_set_on_the_command_line() -> None:
    line = "demo --manifests m --labels l.csv --out run --augment.no-flips --augment.stain 0.05 --augment.blur 0.1"
    assert Train.parse(line.split()).config.augment == Augment(flips=False, stain=0.05, blur=0.1)


def test_k_per_rank_is_resolved_once() -> None:
    config = RunConfig(tiles=Tiles(tiles="fixed", k_per_rank=100)).resolved(4)
    assert (config.virtual_ranks, config.tiles.k, config.tiles.k_per_rank) == (4, 400, None)
    assert config.resolved(2) == config  # resumed on two ranks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tiles(tiles="fixed"), "exactly one of tiles.k, tiles.k_per_rank"),
        (lambda: Tiles(k=5), "neither tiles.k nor tiles.k_per_rank"),
        (lambda: Tiles(max_tiles=0), "tiles.max_tiles is 0: expected at least 1"),
        (lambda: Optim(lr=0), "optim.lr is 0: expected above 0"),
        (lambda: Optim(epochs=2, warmup_epochs=3), "optim.warmup_epochs"),
        (lambda: RunConfig(virtual_ranks=0), "virtual_ranks is 0"),
        (lambda: Augment(stain=0.3), r"augment.stain is 0.3: expected \[0, 0.2\]"),
        (lambda: Augment(blur=-0.1), r"augment.blur is -0.1: expected \[0, 1\]"),
        (lambda: Machine(keep=-1), "machine.keep"),
        (lambda: Machine(groups=0), "machine.groups is 0: expected at least 1"),
        (lambda: Encoder(freeze=0), "encoder.freeze is 0: expected none, all, or a number from 1"),
        (lambda: Encoder(layer_decay=0), r"encoder.layer_decay is 0: expected \(0, 1\]"),
        (lambda: Encoder(freeze="all", layer_decay=0.9), "encoder.layer_decay is 0.9: expected 1"),
        (lambda: Encoder(freeze="all", drop_path=0.1), "encoder.drop_path is 0.1: expected 0"),
        (lambda: Encoder(freeze="all", batchnorm="virtual"), "expected frozen or calibrated, as encoder.freeze is all"),
        (lambda: Head(columns=("a", "b")), "head.columns .* one column, as head.task is classes"),
        (lambda: Head(columns=()), "head.columns"),
        (lambda: Head(task="multilabel", columns=("a", "a")), "head.columns"),
        (lambda: Head(task="regression", class_weights="balanced"), "none, as head.task is regression"),
        (lambda: Head(class_weights=(1.0, 0.0)), "head.class_weights .* all above 0"),
    ],
)
def test_settings_without_sense_are_refused(make: object, message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        make()  # type: ignore[operator]


def test_only_what_changes_the_result_makes_another_run() -> None:
    config = get_recipe("demo")
    assert config.differences(dataclasses.replace(config, machine=Machine(keep=1, groups=2))) == []
    assert config.differences(dataclasses.replace(config, seed=1)) == ["seed"]
