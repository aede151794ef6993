"""Before the first rank starts: all input is checked, and the run's folder gets its config and its cohort."""

import dataclasses
import os
import sys
from pathlib import Path

import torch

from manifests import ManifestError, ManifestSource, open_manifests
from manifests.files import write_text
from manifests.service import ServiceManifests, open_service
from manifests.source import local_path
from trainer.batchnorm import BatchNorm
from trainer.checkpoint import list_checkpoints
from trainer.cohort import Cohort, load_cohort, refuse_other_split
from trainer.comm import Comm, choose_device
from trainer.config import Aggregator, RunConfig
from trainer.errors import TrainerError
from trainer.features.store import check_root
from trainer.fsdp import blocks_of
from trainer.heads import Head
from trainer.index import describe_manifests, open_index, read_record, write_record
from trainer.job import Job
from trainer.model import build_engine
from trainer.recipes import demo, get_recipe
from trainer.regions import changes_since, find_regions
from trainer.targets import few
from trainer.topology import Topology

_NUM_LOOKED_FOR = 16
_HIDDEN = (Aggregator().hidden, demo().aggregator.hidden)
"""What recipes have, whoever aggregates."""


def prepare_run(
    run: Path,
    config: RunConfig,
    *,
    manifests: Path,
    labels: Path,
    split: Path | None = None,
    topology: Topology,
    resume: bool,
    index: str | None = None,
    is_restart: bool = False,
) -> None:
    """Writes `config.yaml` (resolved) and `cohort.csv` (with splits), or checks that a resumed run still fits them.

    Args:
        run: the run's folder.
        config: as the flags gave it.
        manifests: the manifests folder.
        labels: the labels file; a resumed run keeps its cohort and does not read it.
        split: the split's file, if there is one; a resumed run must have the same.
        topology: the ranks.
        resume: go on with the run that is there.
        index: address of the service that tells where tiles lie, in the place of the manifests folder.
        is_restart: this launch has begun the run already, and goes on whether or not the index answers now.

    Raises:
        SlidegradError: anything that would stop the run later, in one sentence.
    """
    file = run / "config.yaml"
    if file.exists() and not resume:
        raise TrainerError(f"{run} holds another run; give --resume to go on with it, or another --out")
    if resume and not file.exists():
        raise TrainerError(f"--resume: {run} holds no run (no config.yaml)")
    root = manifests.resolve() if local_path(manifests) is not None else manifests
    machine = dataclasses.replace(config.machine, manifests=root, features=_resolved(config.machine.features))
    tiles = dataclasses.replace(config.tiles, regions=_resolved(config.tiles.regions))
    config = dataclasses.replace(config, machine=machine, tiles=tiles).resolved(topology.num_encoders)
    source = None if index is None else _open_index(run, index, manifests, resume=resume, is_restart=is_restart)
    if resume:
        if changed := config.differences(read_config(run)):
            raise TrainerError(f"--resume with other settings than the run's: {', '.join(changed)}")
        if added := config.added_to(file.read_text(encoding="utf-8"), str(file)):
            print(f"note: this version has settings that the run lacks: {', '.join(added)}", file=sys.stderr)
        cohort = Cohort.read(run / "cohort.csv", head=config.head)
        if split is not None:
            refuse_other_split(cohort, split)
    else:
        cohort = load_cohort(
            labels,
            source or open_manifests(manifests),
            config.cohort,
            config.seed,
            head=config.head,
            split=split,
            usual=(get_recipe(config.recipe) if config.recipe else RunConfig()).cohort,
        )
    for note in cohort.notes:
        print(f"note: {note}", file=sys.stderr)
    job = Job.open(run, config, cohort, source)
    _check_fit(config, topology)
    _check_model(job, topology.num_encoders, initial=not list_checkpoints(run))
    without_file = [case.slide_id for case in cohort.cases if case.slide_id not in job.paths]
    if without_file:
        raise TrainerError(
            f"{manifests}: {len(without_file)} slides are in no path list, first {without_file[0]}; "
            "tile the archive again"
        )
    _check_archive(job)
    if machine.features is not None:
        check_root(machine.features)
    regions = find_regions(tiles, cohort, job.source) if tiles.regions is not None and not resume else None
    for note in regions.notes if regions is not None else changes_since(run, tiles, cohort) if resume else ():
        print(f"note: {note}", file=sys.stderr)
    # An index that this run has had before is held to what it said then.
    slide_ids = [case.slide_id for case in cohort.cases]
    record = describe_manifests(source, slide_ids) if isinstance(source, ServiceManifests) else None
    if topology.num_virtual < topology.num_encoders:
        idle = topology.num_groups * (topology.num_encoders - topology.num_virtual)
        print(
            f"note: {idle} encoder ranks have nothing to do with --virtual-ranks {topology.num_virtual}",
            file=sys.stderr,
        )
    try:
        cohort.write(run / "cohort.csv")
        if regions is not None:
            regions.write(run)
        if record is not None:
            write_record(run, record)
        write_text(file, config.to_yaml())
    except OSError as error:
        raise TrainerError(f"--out {run}: cannot write there ({error.strerror})") from None


def _open_index(run: Path, index: str, manifests: Path, *, resume: bool, is_restart: bool) -> ManifestSource:
    """The service as it is now; of a run that has had it before, what it began with, once the service answers.

    Raises:
        TrainerError: it does not, or the run's record of it is damaged.
    """
    try:
        if not resume or read_record(run) is None:
            return open_service(index)
        source = open_index(run, index, manifests, tells=False)
        if not is_restart:
            source.service.check()
    except ManifestError as error:
        raise TrainerError(f"--index {error}; or leave --index out, if {manifests} holds the manifests") from None
    return source


def _resolved(path: Path | None) -> Path | None:
    return None if path is None else path.resolve()


def _check_fit(config: RunConfig, topology: Topology) -> None:
    """Raises where settings, each good alone, do not go together."""
    groups, num_slides = topology.num_groups, config.optim.slides_per_step
    if groups > num_slides:
        raise TrainerError(
            f"machine.groups={groups} with optim.slides_per_step={num_slides}: each group works at a slide of a step; "
            f"give --optim.slides-per-step {groups} (another result), or fewer --machine.groups"
        )
    if config.encoder.batchnorm != "sync":
        return
    why = {
        f"--nproc {topology.world_size}: needs a GPU for each, there are {torch.cuda.device_count()} here": (
            choose_device(0, int(os.environ.get("LOCAL_WORLD_SIZE", topology.world_size))).type != "cuda"
        ),
        f"virtual_ranks={topology.num_virtual}: expected {topology.num_encoders}, one for each encoder rank": (
            topology.num_virtual != topology.num_encoders
        ),
        f"machine.groups={groups}: expected 1": groups > 1,
        "machine.keep=0: expected auto, all, or a number from 1": config.machine.keep == 0,
    }
    for reason, holds in why.items():
        if holds:
            raise TrainerError(
                f"encoder.batchnorm=sync with {reason}; or give --encoder.batchnorm running, by a virtual rank's tiles"
            )


def _check_model(job: Job, num_encoders: int, *, initial: bool) -> None:
    """Builds it once: refuses an unknown encoder, weights that do not fit, targets without a head."""
    encoder = job.config.encoder
    if encoder.batchnorm == "sync":  # Its layers are the same but on GPUs.
        encoder = dataclasses.replace(encoder, batchnorm="running")
    alone = Comm(Topology.make(1, "auto", 1), 0, torch.device("cpu"))
    config = dataclasses.replace(job.config, encoder=encoder)
    head = Head.for_cohort(config.head, job.cohort)
    engine = build_engine(config, alone, tile_px=job.tile_px, head=head, initial=initial)
    assert engine.encoder is not None, "alone, a rank has both halves"
    if config.machine.fsdp:
        blocks_of(engine.encoder, encoder.name)
    asked, has_layers = job.config.encoder.batchnorm, any(isinstance(m, BatchNorm) for m in engine.encoder.modules())
    aggregator, classes = config.aggregator, job.cohort.classes or ("",)
    notes = {
        f"aggregator.hidden={aggregator.hidden} changes nothing: {aggregator.name} has no hidden layer": (
            aggregator.name not in ("gma", "transmil") and aggregator.hidden not in _HIDDEN
        ),
        f"aggregator.name=tile_max looks for tiles of the class {few(classes[1:])}, and never of the first, "
        f"{classes[0]}; if that is the wrong way round name classes by numbers, 0 for slides without a finding": (
            aggregator.name == "tile_max" and job.config.head.task == "classes" and classes[0] != "0"
        ),
        "machine.fsdp changes nothing: there is one encoder rank": config.machine.fsdp and num_encoders == 1,
        "there are no validation slides: the last checkpoint is evaluated": not job.cohort.of("val"),
        "there are no test slides: the result will have no measure": not job.cohort.of("test"),
        f"encoder.batchnorm={asked} changes nothing: {encoder.name} has none": asked != "running" and not has_layers,
        "encoder.batchnorm=frozen with random weights normalises by nothing that was measured; calibrated does": (
            asked == "frozen" and has_layers and encoder.weights is None
        ),
        "encoder.freeze=all with random weights: the features are those of an encoder that learnt nothing": (
            encoder.freeze == "all" and encoder.weights is None
        ),
    }
    for note, holds in notes.items():
        if holds:
            print(f"note: {note}", file=sys.stderr)
    k, num_virtual = config.tiles.k, config.virtual_ranks or 1
    # What the model is to choose tiles by is calibrated on more than it will choose.
    is_measured_before = asked == "frozen" or (asked == "calibrated" and config.tiles.tiles == "top")
    if has_layers and not is_measured_before and encoder.freeze != "all" and k is not None and k <= num_virtual:
        raise TrainerError(
            f"tiles.k={k} over virtual_ranks={num_virtual}: BatchNorm has nothing to measure in virtual ranks of "
            "one tile; give more --tiles.k, fewer --virtual-ranks, or --encoder.batchnorm frozen"
        )


def _check_archive(job: Job) -> None:
    """Raises if none of some slides is where the path lists say: better now than slide by slide."""
    some = [job.paths[case.slide_id] for case in job.cohort.cases][:_NUM_LOOKED_FOR]
    if some and not any(os.path.exists(path) for path in some):
        given = job.config.machine.archive
        where = f"under --machine.archive {given}" if given else "where it was when it was tiled"
        raise TrainerError(
            f"none of the first {len(some)} slides is {where}; mount the archive there, or give the folder where it is "
            "as --machine.archive"
        )


def read_config(run: Path) -> RunConfig:
    """The run's config.

    Raises:
        TrainerError: the folder holds no run.
    """
    file = run / "config.yaml"
    if not file.exists():
        raise TrainerError(f"{run}: no run here (no config.yaml)")
    return RunConfig.from_yaml(file.read_text(encoding="utf-8"), str(file))


def open_run(run: Path, manifests: Path | None = None, index: str | None = None, *, tells: bool = False) -> Job:
    """The job of a prepared run.

    Args:
        run: the run's folder.
        manifests: the manifests folder, if it has moved.
        index: address of a service; the run was prepared with one. It is asked for nothing yet.
        tells: whether this rank says so once the service does not answer.
    """
    config = read_config(run)
    if manifests is not None:
        config = dataclasses.replace(config, machine=dataclasses.replace(config.machine, manifests=manifests))
    root = config.machine.manifests
    assert root is not None, "set when the run is prepared"
    source = None if index is None else open_index(run, index, root, tells=tells)
    return Job.open(run, config, Cohort.read(run / "cohort.csv", head=config.head), source)
