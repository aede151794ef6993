#!/bin/sh
# Installs the tile-index service, and nothing that decodes on a GPU or trains, into a fresh virtual environment.
#
#   docker/install-service.sh VENV        or  SLIDEGRAD_VENV=VENV docker/install-service.sh
#
# PYTHON chooses the interpreter (python3). Works with and without Docker; the checkout may be read-only.
set -eu
venv=${1:-${SLIDEGRAD_VENV:?usage: docker/install-service.sh VENV}}
checkout=$(cd "$(dirname "$0")/.." && pwd)

# Built from a copy: setuptools leaves build/ and *.egg-info beside the sources it reads.
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
(cd "$checkout" && cp -R pyproject.toml slidegrad.py README.md LICENSE manifests tiler services trainer "$sources")

"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet -c "$checkout/constraints.txt" "$sources[serve]"
"$venv/bin/slidegrad" --version
