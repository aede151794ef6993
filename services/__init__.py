"""The tile-index service: tile coordinates over HTTP, and a page to look at. Decodes no slide, trains nothing.

`TileIndex` is plain Python and knows no web framework; `services.app.create_app` puts HTTP around it. Nothing is
imported here, so that `slidegrad serve --help` needs no web framework.
"""
