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
