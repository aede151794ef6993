"""The tiler's branch of the error tree."""

from manifests.errors import SlidegradError


class TilerError(SlidegradError):
    """A slide or an archive that cannot be used."""


class ReadError(TilerError):
    """Pixels that could not be read from a slide that had opened."""


class DamageError(ReadError):
    """Pixels whose compressed bytes are damaged: reading them again is of no use."""
