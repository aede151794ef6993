"""The trainer's branch of the error tree."""

from manifests.errors import SlidegradError


class TrainerError(SlidegradError):
    """A run that cannot start or go on: its config, its cohort, its folder or its checkpoints."""
