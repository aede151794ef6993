"""The root of all errors a user can cause, and the manifests' own branch of it.

A `SlidegradError` is bad input told in one sentence: what, expected, got, where, and the way out. The front door prints
it and exits with 2. Anything else that escapes is a fault of ours (exit 70).
"""


class SlidegradError(Exception):
    """Wrong usage or unusable input; its text is one sentence for the user."""


class ManifestError(SlidegradError):
    """A manifest, catalogue or manifests root that cannot be used."""


class Stopped(Exception):  # noqa: N818 - no error
    """A signal ended the work; what is done is saved, and the same command goes on from there. Its text may be empty,
    where another process tells."""
