"""Encoders: timm and foundation models by name, their weights from this machine, and what of them is trained."""
