"""Everything the service can refuse. One class per answer; `services.problems` holds the dict from class to status.

Their sentences are sent to clients: they never hold a path or the text of an error from below.
"""

from manifests.errors import SlidegradError


class ServiceError(SlidegradError):
    """Wrong usage of the service, at start or in a request."""


class BadQueryError(ServiceError):
    """A parameter out of its range."""


class BadParametersError(BadQueryError):
    """Parameters that are unknown, missing, or out of their range: (parameter, reason) each."""

    def __init__(self, faults: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{name[:80]}: {reason}" for name, reason in faults[:5]))
        self.faults = faults


class UnknownSlideError(ServiceError):
    """No manifest of that name."""


class NothingToSampleError(ServiceError):
    """The slide is there but has no tiles."""


class UnreadableManifestError(ServiceError):
    """The slide's manifest is damaged; the log says how."""


class UnavailableError(ServiceError):
    """The manifests folder cannot be read now; the log says why."""


class UnknownPictureError(ServiceError):
    """The slide is there but has no thumbnail, or no such tile, or nobody knows where its file lies."""


class UnreadableMaskError(ServiceError):
    """The slide's thumbnail and areas are damaged."""


class SlideFileError(ServiceError):
    """The slide's file is not the one that was tiled, or does not give its pixels."""


class BusyError(ServiceError):
    """Too many pictures at once."""


class TooSlowError(ServiceError):
    """The pixels did not come in time."""


class UnknownRunError(ServiceError):
    """No run of that name, or no values of that slide in it."""


class StaleValuesError(ServiceError):
    """A run's values belong to another manifest of the slide."""


class UnreadableValuesError(ServiceError):
    """A run's values of a slide are damaged."""
