"""Checks of settings that do not go together."""

import pytest

from mpicoll import UserError
from mpicoll.train.checks import check, check_split
from mpicoll.train.settings import Settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategy": "async"}, "is not for the async strategy, but for sync, average, butterfly, gossip"),
        ({"strategy": "ad-psgd"}, "is not for the ad-psgd strategy"),
    ],
)
def test_settings_that_do_not_go_with_a_split_model(given, message):
    with pytest.raises(UserError, match=message):
        check_split(Settings(**given))
    check(Settings(**given))
