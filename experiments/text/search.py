"""
The beta at which a method's judged KL(pi || sft) is where it shall be.

log KL falls along log beta, not quite in a line and not quite steadily. So the search is a secant
between the two policies nearest to the target on either side, kept within them, and a step of the
usual slope where there is one side only. Policies that were fitted for another target count, too.
"""

import math
from collections.abc import Callable

from experiments.text.constants import BETAS, CLOSE, TOLERANCE

SLOPE = -1.0  # of log KL over log beta, where nothing better is known
STRIDE = 4.0  # a step with one side only changes beta by no more than this factor
INSIDE = 0.1  # of a bracket's width: how near to its ends the next beta may be


def off(kl: float, target: float) -> float:
    """How far from the target, as a share of it."""
    return abs(kl / target - 1)


def nearest(known: dict[float, float], target: float) -> float:
    """Of {beta: KL} the beta whose KL is nearest."""
    return min(known, key=lambda beta: off(known[beta], target))


def arrive(
    first: dict[float, float], fit: Callable[[float], float], fits: int
) -> dict[float, float | None]:
    """{target: beta}, None where no policy is within TOLERANCE of it.

    fit(beta) trains a policy and gives its KL; it is asked at most `fits` times for a target.
    `first`: {target: the beta to begin with}, corrected by the factor that was right at the target
    before, because a seed's rewards may be larger than another's at all KLs.
    """
    known: dict[float, float] = {}
    found, factor = {}, 1.0
    for target, start in first.items():
        beta, asked = within(start * factor), 0
        while beta is not None and asked < fits:
            if known and off(known[nearest(known, target)], target) <= CLOSE:
                break
            known[beta] = fit(beta)
            asked += 1
            beta = following(known, target)
        best = nearest(known, target)
        found[target] = best if off(known[best], target) <= TOLERANCE else None
        factor = best / start if found[target] else factor
    return found


def within(beta: float) -> float:
    """Within BETAS, and short enough to be a name."""
    return float(f"{min(max(beta, BETAS[0]), BETAS[1]):.4g}")


def following(known: dict[float, float], target: float) -> float | None:
    """The beta to try next, None where it has been tried."""
    x = {beta: math.log(beta) for beta in known}
    y = {beta: math.log(max(kl, 1e-6) / target) for beta, kl in known.items()}
    below, above = ([b for b in known if (y[b] > 0) == side] for side in (False, True))
    if below and above:
        a, b = max(below, key=y.get), min(above, key=y.get)  # the nearest on either side
        share = min(max(y[a] / (y[a] - y[b]), INSIDE), 1 - INSIDE)
        beta = within(math.exp(x[a] + share * (x[b] - x[a])))
    else:
        a = min(known, key=lambda b: abs(y[b]))
        step = min(max(-y[a] / SLOPE, -math.log(STRIDE)), math.log(STRIDE))
        beta = within(math.exp(x[a] + step))
    return None if beta in known else beta
