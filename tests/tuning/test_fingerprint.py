"""What machine a profile is for."""

import os
import re

from mpicoll.tuning.fingerprint import machine


def test_the_machine_is_known():
    assert machine() == machine()
    assert re.fullmatch(rf"\S.*\S, {os.cpu_count()} cores", machine())
