"""
The beta at which a method's judged KL(pi || sft) is where it shall be.

log KL falls along log beta, not quite in a line and not quite steadily. So the search is a secant:
between the two policies nearest to the target on either side, kept within them; where there is one
side only, first a beta that was about right in other runs, then on through the two nearest.
Policies that were fitted for another target count, too.
"""

import math
from collections.abc import Callable

from experiments.text.constants import BETAS, TOLERANCE

SLOPE = -1.0  # of log KL over log beta, where one policy is known
SLOPES = (-1.5, -0.3)  # where two are: noise may tell anything
STRIDE = 4.0  # a step with one side only changes beta by no more than this factor
INSIDE = 0.1  # of a bracket's width: how near to its ends the next beta may be


def off(kl: float, target: float) -> float:
    """How far from the target, as a share of it."""
    return abs(kl / target - 1)


def nearest(known: dict[float, float], target: float) -> float:
    """Of {beta: KL} the beta whose KL is nearest."""
    return min(known, key=lambda beta: off(known[beta], target))


def arrive(
    starts: dict[float, float], fit: Callable[[float], float], fits: int
) -> dict[float, float | None]:
    """{target: the beta to begin with} -> {target: beta}, None where no policy is within TOLERANCE.

    fit(beta) trains a policy and gives its KL; it is asked at most `fits` times for a target. The
    target nearest to 1 nat comes first, then outwards.
    """
    known: dict[float, float] = {}
    found = {}
    for target in sorted(starts, key=lambda kl: abs(math.log(kl))):
        for _ in range(fits):
            if known and off(known[nearest(known, target)], target) <= TOLERANCE:
                break
            beta = following(known, target, within(starts[target]))
            if beta in known:
                break
            known[beta] = fit(beta)
        best = nearest(known, target)
        found[target] = best if off(known[best], target) <= TOLERANCE else None
    return found


def within(beta: float) -> float:
    """Within BETAS, and short enough to be a name."""
    return float(f"{min(max(beta, BETAS[0]), BETAS[1]):.4g}")


def following(known: dict[float, float], target: float, start: float) -> float:
    """The beta to try next; one that has been tried where there is no other."""
    x = {beta: math.log(beta) for beta in known}
    y = {beta: math.log(max(kl, 1e-6) / target) for beta, kl in known.items()}
    below, above = ([b for b in known if (y[b] > 0) == side] for side in (False, True))
    if below and above:
        a, b = max(below, key=y.get), min(above, key=y.get)  # the nearest on either side
        share = min(max(y[a] / (y[a] - y[b]), INSIDE), 1 - INSIDE)
        return within(math.exp(x[a] + share * (x[b] - x[a])))
    if start not in known:
        return start
    a, *others = sorted(known, key=lambda beta: abs(y[beta]))
    slope = SLOPE
    if others:
        slope = (y[others[0]] - y[a]) / (x[others[0]] - x[a])
        slope = min(max(slope, SLOPES[0]), SLOPES[1])
    step = min(max(-y[a] / slope, -math.log(STRIDE)), math.log(STRIDE))
    return within(math.exp(x[a] + step))
