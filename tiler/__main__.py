"""`python -m tiler …` is `slidegrad tile …`."""

import sys

from slidegrad import main

sys.exit(main(["tile", *sys.argv[1:]]))
