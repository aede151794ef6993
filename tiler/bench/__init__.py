"""`slidegrad bench read`: how fast a slide's tiles are read here, beside other readers and the limit of decoding.

slides.py finds a slide's tiles, measure.py times, readers.py is who is timed, limit.py what no reader can beat,
table.py shows it, cli.py is the command.
"""
