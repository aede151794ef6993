"""`slidegrad preview`: pictures of slides with their tissue and tiles, and one offline page about the archive.

`picture` draws one slide, `panel` the words beneath it, `album` decides which slides are drawn and draws them in
processes, `page` and `histogram` tell of the whole archive. Nothing here opens a slide: thumbnails, masks and
manifests hold all that is shown.
"""

from tiler.preview.command import Preview

__all__ = ["Preview"]
