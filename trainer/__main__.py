"""`python -m trainer …` is `slidegrad train …`."""

import sys

from slidegrad import main

sys.exit(main(["train", *sys.argv[1:]]))
