"""The version of the distribution, as it is installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("slidegrad")
except PackageNotFoundError:  # Run from a checkout that is not installed.
    VERSION = "0+unknown"
