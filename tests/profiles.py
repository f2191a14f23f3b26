"""A profile, its rules and a row of measurements, for the tests of tuning and of ``mpicoll tune``."""

import numpy as np
import pytest

from mpicoll.errors import UserError
from mpicoll.tuning.fingerprint import Fingerprint
from mpicoll.tuning.measurements import Row
from mpicoll.tuning.profile import Profile
from mpicoll.tuning.rules import NATIVE, SHARED, Rule

HERE = Fingerprint("MPICH 5.0.2", "AMD EPYC, 2 cores", (2, 2, 2, 2))
RULES = {
    "allreduce": (Rule(4096, (NATIVE, "tree")), Rule(None, (SHARED, "ring", "halving_doubling"))),
    "bcast": (Rule(0, ("chain",)), Rule(1 << 40, (NATIVE, "tree")), Rule(None, ("scatter_allgather",))),
}
PROFILE = Profile(HERE, RULES, {"date": "2026-11-24", "hosts": ["node1"]})


def refused(call, *args):
    """The one line of the error."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def of(place, value):
    """The change of a profile, or of one of its rules, that puts a value there; ``...`` takes away."""

    def change(whole):
        *parents, key = place
        for parent in parents:
            whole = whole[parent]
        if value is ...:
            del whole[key]
        else:
            whole[key] = value

    return change


def steady(nbytes, fitted=True, default=NATIVE, n=20, **us):
    """A row without noise."""
    return Row(nbytes, fitted, default, {name: np.full(n, float(time)) for name, time in us.items()})


TRIED_RULES = (Rule(100, (NATIVE, "tree")), Rule(None, (SHARED, "tree")))
TRIED = [
    steady(96, False, native=2, tree=8, shared=9),
    steady(100, False, native=6, tree=5, shared=9),
    steady(192, False, "ring", native=8, tree=5, ring=20),  # shared cannot be: the tree it is
    steady(300, False, native=4, tree=9, shared=5),
]
"""What rules are tried on, one of each kind: they choose the best, lose, and lack what they prefer."""
