"""How ranks agree, and nothing else: a file and a row for each strategy."""

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
