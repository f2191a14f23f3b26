"""The strategies: how ranks combine gradients or models.  Each strategy is a file and a row of a table."""

from .asynchronous import Async
from .average import Average
from .base import Now, Strategy
from .mixing import Butterfly, Gossip
from .pairwise import ADPSGD
from .sync import Sync

STRATEGIES: dict[str, type[Strategy]] = {
    "sync": Sync,
    "average": Average,
    "butterfly": Butterfly,
    "gossip": Gossip,
    "ad-psgd": ADPSGD,
    "async": Async,
}

__all__ = ["STRATEGIES", "Now", "Strategy"]
