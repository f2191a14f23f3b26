"""Staleness: how many steps old the parameters are at which gradients are taken."""


class Staleness:
    """A histogram of the staleness of this rank's gradients, in steps, which must not exceed ``bound``.

    ``histogram[n]`` is the number of gradients in this epoch that were n steps stale.  If servers drop gradients
    (``dropping``), the servers of two parts may drop different ones, so one step more is allowed.
    """

    def __init__(self, bound: float, dropping: bool) -> None:
        self._bound, self._dropping = bound, dropping
        self.histogram: list[int] = []

    def record(self, steps: int, clock: float) -> None:
        """Count a gradient of step ``steps``, taken at parameters that contain all gradients of ``clock`` steps."""
        staleness = max(steps - clock, 0)
        if staleness > self._bound + self._dropping:
            raise RuntimeError(f"a gradient is {staleness:g} steps stale, and the bound is {self._bound:g}")
        behind = int(staleness)
        self.histogram += [0] * (behind + 1 - len(self.histogram))
        self.histogram[behind] += 1
