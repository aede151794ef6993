"""Measures: what predictions are worth, with intervals."""
