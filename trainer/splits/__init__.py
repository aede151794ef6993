"""Splits: which patients train, validate and test; drawn by keyed hashes, or given in a file (`slidegrad splits`)."""
