"""The trainer: ranks that encode tiles, a rank that aggregates, and the slide's label all the way to the pixels.

Start reading at `step.py`. Importing the package imports no torch; its modules do.
"""
