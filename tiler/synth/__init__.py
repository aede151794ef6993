"""A labelled synthetic cohort: pyramidal, JPEG-tiled, H&E-like slides whose label hangs on a few small foci.

For trying, testing and measuring the whole way from slide to score where no patient's slides are at hand; not a model
of any disease. Positive and negative slides are matched pairs: nothing but the texture of the foci tells them apart.
"""

from tiler.synth.cohort import make_cohort, make_slide
from tiler.synth.config import CohortConfig

__all__ = ["CohortConfig", "make_cohort", "make_slide"]
