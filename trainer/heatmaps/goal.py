"""What contributions add up to: one number that a slide's outputs make, and how it is called.

Pure. The model's outputs are logits, or standardised numbers; a reader wants one number with a meaning. It is linear in
the outputs, so what is a sum over tiles stays one.

    two classes      log-odds of one class over the other, the difference of their logits
    more classes     a class's logit less the mean of the others': softmax is blind to what all logits have in common
    multilabel       log-odds of a yes, the column's logit
    regression       the number in the column's own unit
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from trainer.errors import TrainerError
from trainer.heads import Head


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One number of a slide: `offset` and the sum over the outputs of `weights` times output."""

    output: str
    """The class or column."""
    what: str
    """The number in words."""
    ends: tuple[str, str]
    """What a tile below 0 does, and one above."""
    weights: tuple[float, ...]
    offset: float = 0.0

    @classmethod
    def of(cls, head: Head, outputs: tuple[str, ...], name: str = "") -> Self:
        """The goal that a user names, or else the last class, as in the report, or the first column.

        Args:
            head: what the model's outputs mean.
            outputs: the classes or columns, as the cohort has them.
            name: one of them.

        Raises:
            TrainerError: no such class or column.
        """
        kind = "class" if head.task == "classes" else "column"
        if name and name not in outputs:
            raise TrainerError(f"--output {name}: expected a {kind} of the run, one of {', '.join(outputs)}")
        chosen = outputs.index(name) if name else (len(outputs) - 1 if head.task == "classes" else 0)
        output = outputs[chosen]
        alone = tuple(float(i == chosen) for i in range(len(outputs)))
        if head.task == "classes":
            num_others = len(outputs) - 1
            others = [other for other in outputs if other != output]
            against, what = "towards other classes", f"logit of class {output} less the mean of the others'"
            if num_others == 1:
                against, what = f"towards class {others[0]}", f"log-odds of class {output} over {others[0]}"
            ends = (against, f"towards class {output}")
            weights = tuple(1.0 if i == chosen else -1 / num_others for i in range(len(outputs)))
            return cls(output=output, what=what, ends=ends, weights=weights)
        if head.task == "multilabel":
            ends = (f"against {output}", f"for {output}")
            return cls(output=output, what=f"log-odds of {output}", ends=ends, weights=alone)
        scaled = tuple(head.stds[i] * share for i, share in enumerate(alone))
        ends = (f"lowers {output}", f"raises {output}")
        return cls(output=output, what=output, ends=ends, weights=scaled, offset=head.means[chosen])

    def tiles(self, contributions_KC: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each tile's part of the number, (K,)."""
        return np.asarray(contributions_KC @ np.array(self.weights))

    def total(self, outputs_C: NDArray[np.float64]) -> float:
        """The number, of a slide's outputs."""
        return float(outputs_C @ np.array(self.weights)) + self.offset
