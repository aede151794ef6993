"""Slide ids that tell nothing: a keyed hash in the place of the file name, everywhere but in `paths/`."""

import hashlib
import re
from pathlib import Path

from tiler.errors import TilerError

_LEAST_BYTES = 16
_MOST_BYTES = 64
_DIGEST_BYTES = 10
"""80 bits: two of a million slides share an id with a chance of 4e-13."""


def read_key(file: Path) -> bytes:
    """The key in a file.

    Raises:
        TilerError: not there, or of less than 16 or more than 64 bytes.
    """
    try:
        key = file.read_bytes().strip()
    except OSError as error:
        hint = "; make one with `openssl rand -hex 16 > KEYFILE` and keep it safe" if not file.exists() else ""
        raise TilerError(f"--pseudonymize {file}: {error.strerror}{hint}") from None
    if not _LEAST_BYTES <= len(key) <= _MOST_BYTES:
        raise TilerError(
            f"--pseudonymize {file}: the key has {len(key)} bytes, expected {_LEAST_BYTES} to {_MOST_BYTES}"
        )
    return key


def is_pseudonym(slide_id: str) -> bool:
    """The slide id looks like one of these."""
    return re.fullmatch(rf"p[0-9a-f]{{{2 * _DIGEST_BYTES}}}", slide_id) is not None


def pseudonym(key: bytes, slide_id: str) -> str:
    """`p` and 20 hex digits: keyed BLAKE2b (RFC 7693) of the slide id. Who has no key cannot test a guessed name."""
    return "p" + hashlib.blake2b(slide_id.encode(), key=key, digest_size=_DIGEST_BYTES).hexdigest()
