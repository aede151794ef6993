"""`machine.features`: a run's slides served from the store, after what is missing in it was computed.

What is served equals what the encoder would give, up to the rounding of other batches; nothing else of a run knows
where its features come from.
"""

import copy
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from trainer.encoders.encoder import TileEncoder
from trainer.errors import TrainerError
from trainer.features.filling import Filler
from trainer.features.key import describe_key
from trainer.features.serving import FeatureLoader
from trainer.features.store import FeatureStore, check_root
from trainer.job import Job
from trainer.loading.quarantine import quarantined
from trainer.loading.shards import ShardLoader
from trainer.sampler import SlideSampler
from trainer.scoring import Tick
from trainer.step import Engine


def serve_run(engine: Engine, job: Job, sampler: SlideSampler, tiles: ShardLoader, tick: Tick) -> ShardLoader:
    """Fills the store with all slides that a run will use; called by all ranks together, before the first epoch.

    Args:
        engine: the model, its encoder as it will stay.
        job: the run.
        sampler: its training slides.
        tiles: the run's tile loader.
        tick: progress.

    Returns:
        What gives their features; on ranks that encode nothing `tiles`.

    Raises:
        TrainerError: as `filling.Filler.fill`, or the store is not this run's.
        Stopped: a signal ended it.
    """
    most = len(job.cohort.of("train"))
    training = drawn(sampler, job.config.optim.epochs, most)
    slides = training | job.cohort.num_tiles("val") | job.cohort.num_tiles("test")
    return _serve(engine, job, slides, tiles, tick, training=training)


def serve_split(engine: Engine, job: Job, split: str, tick: Tick) -> ShardLoader | None:
    """The same for one split, in a process alone, of a run that is over.

    Returns:
        None where the run has no store, or it cannot be used now: the user is told, and tiles do as well.
    """
    root = job.config.machine.features
    if root is None:
        return None
    if not root.is_dir():
        print("note: machine.features is not there any more: tiles are read and encoded", file=sys.stderr)
        return None
    tiles = job.loader(engine.comm, quarantined=quarantined(job.run))
    try:
        return _serve(engine, job, job.cohort.num_tiles(split), tiles, tick)
    except TrainerError as error:
        print(f"note: {error}. Tiles are read and encoded now", file=sys.stderr)
        return None


def drawn(sampler: SlideSampler, num_epochs: int, most: int) -> dict[str, int]:
    """Every slide that the epochs from the sampler's own on draw, at most `most`, with its number of tiles."""
    probe, found = copy.copy(sampler), dict[str, int]()
    for epoch in range(sampler.epoch, num_epochs):
        if len(found) == most:
            break
        probe.load_state_dict({"epoch": epoch, "next_step": 0})
        found |= {step.slide_id: step.num_tiles for step in probe.steps()}
    return found


def _serve(
    engine: Engine,
    job: Job,
    slides: Mapping[str, int],
    tiles: ShardLoader,
    tick: Tick,
    training: Collection[str] = (),
) -> ShardLoader:
    """What gives the features of some slides, after they were computed where they are not kept."""
    root, store, failure = job.config.machine.features, None, ""
    assert root is not None, "asked for"
    engine.set_training(False)
    try:
        if isinstance(engine.encoder, TileEncoder):
            store = _open(root, engine.encoder, job)
    except TrainerError as error:
        failure = str(error)
    if failure := engine.comm.any_error(failure):
        raise TrainerError(failure)
    failed = Filler(engine, job, store, tiles, tick, training).fill(slides)
    if store is None:
        return tiles
    return FeatureLoader(store, job.source, failed, job.config.machine.read_deadline_s)


def _open(root: Path, encoder: TileEncoder, job: Job) -> FeatureStore:
    """The run's store.

    Raises:
        TrainerError: the folder is none, or cannot be used.
    """
    check_root(root)
    words = describe_key(encoder, job.config, job.tile_px, job.tile_mpp)
    dtype = "float64" if job.config.optim.precision == "float64" else "float32"
    return FeatureStore(root, words, encoder.num_features, dtype)
