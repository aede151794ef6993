#!/bin/sh
# Installs all of Slidegrad for a machine with an NVIDIA GPU (CUDA 13) into a fresh virtual environment.
#
#   docker/install-gpu.sh VENV        or  SLIDEGRAD_VENV=VENV docker/install-gpu.sh
#
# PYTHON chooses the interpreter (python3). Works with and without Docker; the checkout may be read-only.
set -eu
venv=${1:-${SLIDEGRAD_VENV:?usage: docker/install-gpu.sh VENV}}
checkout=$(cd "$(dirname "$0")/.." && pwd)

# Built from a copy: setuptools leaves build/ and *.egg-info beside the sources it reads.
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
(cd "$checkout" && cp -R pyproject.toml slidegrad.py README.md LICENSE manifests tiler services trainer "$sources")

"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet -c "$checkout/constraints.txt" "$sources[cu13,train,serve]"
"$venv/bin/slidegrad" --version
