"""`python -m manifests …` is `slidegrad manifest …`."""

import sys

from slidegrad import main

sys.exit(main(["manifest", *sys.argv[1:]]))
