"""`slidegrad bench read`: how fast a slide's tiles are read here, beside other readers and the limit of decoding.

measure.py times, readers.py is who is timed, limit.py what no reader can beat, cli.py the command.
"""
