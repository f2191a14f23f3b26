"""Numbers as users type and read them."""

import click
import pytest

from mpicoll.cli.numbers import Numbers, pretty, ranges


def test_sizes():
    convert = Numbers().convert
    assert convert("64k:1M:4,1000,4", None, None) == [4, 1000, 65536, 262144, 1048576]
    assert convert("3:20", None, None) == [3, 6, 12]
    assert convert("0,7,7", None, None) == [0, 7]
    assert convert("5:5", None, None) == [5]
    for bad in (
        "",
        "-1",
        "4:",
        "1:2:3:4",
        "1.5",
        "1T",
        "4K:1K",
        "0:4",
        "1:4:1",
        ",",
        "1:1G:2,1:900G:3,1:900G:5,7:900G:6",
    ):
        with pytest.raises(click.BadParameter):
            convert(bad + ("," + ",".join(map(str, range(70))) if bad.startswith("1:1G") else ""), None, None)


def test_ranges_of_cores():
    assert ranges([0, 1, 2, 3, 8]) == "0-3,8"
    assert ranges([5]) == "5"


def test_bytes_as_people_write_them():
    assert [pretty(size) for size in (4, 1000, 2048, 1000 << 10, 3 << 30)] == [
        "4 B",
        "1000 B",
        "2 KiB",
        "1000 KiB",
        "3 GiB",
    ]
