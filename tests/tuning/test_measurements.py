"""Measurements in files."""

import json

import numpy as np
import pytest

from mpicoll.tuning.fit import fitted_profile
from mpicoll.tuning.measurements import Measurements, read_measurements, write_measurements
from mpicoll.tuning.profile import Profile
from mpicoll.tuning.rules import NATIVE, Rule
from profiles import HERE, of, refused, steady

MEASURED = Measurements(
    HERE,
    {"date": "today"},
    {"reduce": [steady(4, native=1.25, tree=2), steady(12, False, native=3, tree=4), steady(16, native=9, tree=1)]},
)


def test_measurements_are_written_and_read_and_make_the_same_rules(tmp_path):
    path = tmp_path / "measured.json"
    write_measurements(MEASURED, path)
    found = read_measurements(path)
    assert (found.fingerprint, found.made, [*found.rows]) == (HERE, {"date": "today"}, ["reduce"])
    for row, other in zip(found.rows["reduce"], MEASURED.rows["reduce"], strict=True):
        assert row[:3] == other[:3]
        np.testing.assert_equal(row.us, other.us)
    made = Profile(HERE, {"reduce": (Rule(8, (NATIVE, "tree")), Rule(None, ("tree",)))}, {"date": "today"})
    for one in (fitted_profile(found), fitted_profile(MEASURED)):
        assert one == Profile(HERE, made.rules, {"date": "today", "repetitions": [20, 20]})
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        assert refused(read_measurements, path).startswith(f"measurements {str(path)!r}: ")


ROW = ("rows", "reduce", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of(["rows"], {}), "rows is {}: expected an object, of lists by collective"),
        (of(["rows", "mix"], []), 'a key of rows is "mix", which is no collective'),
        (of(["rows", "reduce"], 1), "rows.reduce is 1: expected a list"),
        (of(["rows", "reduce"], []), "rows.reduce has no row that is fitted"),
        (of([*ROW, "bytes"], 12), "rows.reduce is in no order: expected bytes that grow"),
        (of([*ROW, "bytes"], 4.5), "rows.reduce, row 1, bytes is 4.5: expected a number"),
        (of([*ROW, "fitted"], 1), "rows.reduce, row 1, fitted is 1: expected true or false"),
        (of([*ROW, "default"], "chain"), 'row 1, us is {"native": [1.25,'),
        (of([*ROW, "us", "native"], ...), "expected times by algorithm, with native and"),
        (of([*ROW, "us", "ring"], [1, 1]), 'row 1, us names "ring", which is no reduce algorithm'),
        (of([*ROW, "us", "tree"], []), "row 1, us.tree is []: expected two or more microseconds above 0"),
        (of([*ROW, "us", "tree"], [1]), "row 1, us.tree is [1]: expected two or more"),
        (of([*ROW, "us", "tree"], [1, 0]), "row 1, us.tree is [1, 0]: expected two or more"),
        (of([*ROW, "us", "tree"], [True, 1]), "row 1, us.tree is [true, 1]: expected two or more"),
        (of([*ROW, "us"], {"native": [1, 1], "chain": [2, 2]}), "row 1 has no algorithm that can do every call"),
        (of([*ROW, "us", "tree"], [1e999]), "Infinity is no number of JSON"),
        (of(["version"], 7), "version is 7"),
    ],
)
def test_what_is_wrong_in_measurements_is_named_with_its_place(tmp_path, change, message):
    path = tmp_path / "measured.json"
    write_measurements(MEASURED, path)
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))
    assert message in refused(read_measurements, path)


def test_members_may_stand_in_any_order(tmp_path):
    path = tmp_path / "measured.json"
    write_measurements(MEASURED, path)
    whole = json.loads(path.read_text())
    whole["rows"]["reduce"] = [dict(reversed(row.items())) for row in whole["rows"]["reduce"]]
    path.write_text(json.dumps(whole))
    assert fitted_profile(read_measurements(path)) == fitted_profile(MEASURED)


def test_a_number_that_overflows_is_no_time(tmp_path):
    path = tmp_path / "measured.json"
    write_measurements(MEASURED, path)
    path.write_text(path.read_text().replace("1.25", "1e999", 1))
    assert "us.native is [Infinity" in refused(read_measurements, path)
