"""`python -m services …` is `slidegrad serve …`."""

import sys

from slidegrad import main

sys.exit(main(["serve", *sys.argv[1:]]))
