"""Launching: this machine's ranks from `slidegrad train`, and scripts for torchrun, SLURM and LSF on several nodes."""
