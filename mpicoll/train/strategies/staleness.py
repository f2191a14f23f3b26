"""How old the parameters are at which gradients are taken."""


class Staleness:
    """Counts gradients by how many steps behind the parameters were at which they were taken, at most ``bound``.

    ``histogram[n]`` is the number of gradients, of this rank and epoch, that were n steps stale.  Where servers drop
    gradients (``dropping``) those of two parts may drop different ones, and so a step more is allowed.
    """

    def __init__(self, bound: float, dropping: bool) -> None:
        self._bound, self._dropping = bound, dropping
        self.histogram: list[int] = []

    def record(self, steps: int, clock: float) -> None:
        """Count a gradient after so many ``steps`` of its worker, at parameters with all gradients up to ``clock``."""
        staleness = max(steps - clock, 0)
        if staleness > self._bound + self._dropping:
            raise RuntimeError(f"a gradient is {staleness:g} steps stale, and the bound is {self._bound:g}")
        behind = int(staleness)
        self.histogram += [0] * (behind + 1 - len(self.histogram))
        self.histogram[behind] += 1
