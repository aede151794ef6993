"""What this machine, and one slide, can and cannot do; every finding is a fact a user can act on.

Three looks, each a dictionary fit for JSON: `examine_machine` asks the system and what is installed and reads no slide;
`examine_slide` asks every reader what it sees; `measure_storage` and `measure_decoding` take some seconds and tell how
fast. Nothing here names a folder.
"""

from tiler.doctor.decoding import build_sample, measure_decoding
from tiler.doctor.machine import examine_machine, find_shadows
from tiler.doctor.slide import examine_slide
from tiler.doctor.storage import measure_storage

__all__ = [
    "build_sample",
    "examine_machine",
    "examine_slide",
    "find_shadows",
    "measure_decoding",
    "measure_storage",
]
