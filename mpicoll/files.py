"""What the files that mpicoll writes have in common: their JSON is read by every parser."""

import json
import math
from typing import Any


def to_json(value: Any, **layout: Any) -> str:
    """The JSON text of a value, in which a number that is not finite is null, since JSON has no word for it.

    ``value`` is made of dicts, lists, tuples, texts, numbers, truth values and ``None``; ``layout`` is what
    ``json.dumps`` takes, as ``indent=1``.
    """
    return json.dumps(_finite(value), allow_nan=False, **layout)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
