"""Evaluation of a run: slides, specimens and patients, thresholds, subgroups, another run, pictures.

`cli` is the command, `evaluate` does it; `units` is what everything is measured on. All statistics are in
`trainer.measures`.
"""
