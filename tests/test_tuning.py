"""Profiles and measurements in files, the fit and its report, and mpicoll tune as it is launched."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import timeit
import warnings

import numpy as np
import pytest
from click.testing import CliRunner

from launch import IS_OPEN_MPI, REPOSITORY, mpirun, run
from mpicoll import fit, tuning
from mpicoll.algorithms import ALGORITHMS
from mpicoll.cli import tune as command
from mpicoll.cli.app import app
from mpicoll.errors import UserError
from mpicoll.fit import Measurements, Row
from mpicoll.mpi.launch import library_name
from mpicoll.tuning import NATIVE, SHARED, Fingerprint, Profile, Rule

HERE = Fingerprint("MPICH 5.0.2", "AMD EPYC, 2 cores", (2, 2, 2, 2))
RULES = {
    "allreduce": (Rule(4096, (NATIVE, "tree")), Rule(None, (SHARED, "ring", "halving_doubling"))),
    "bcast": (Rule(0, ("chain",)), Rule(1 << 40, (NATIVE, "tree")), Rule(None, ("scatter_allgather",))),
}
PROFILE = Profile(HERE, RULES, {"date": "2026-11-24", "hosts": ["node1"]})


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch, tmp_path):
    """No profile of this machine's owner, and nothing kept from the test before."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    tuning._read_once.cache_clear()
    tuning._refused.clear()


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "profile.json"
    tuning.write(PROFILE, made)
    return made


def refused(call, *args):
    """The one line of the error."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the file


def test_what_is_written_is_read_and_people_can_read_it_too(path, tmp_path):
    assert tuning.read(path) == tuning.read(str(path)) == PROFILE
    lines = path.read_text().splitlines()
    assert '   {"up_to": 4096, "algorithms": ["native", "tree"]},' in lines
    assert sum("up_to" in line for line in lines) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_a_file_that_cannot_be_replaced_stays_and_nothing_is_left_beside_it(path, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        (tmp_path / f".profile.json.{os.getpid()}.partial").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning.Path, "write_text", full)
    said = refused(tuning.write, Profile(HERE, RULES, {}), path)
    assert said == f"profile {str(path)!r} cannot be written (No space left on device); name another file"
    assert tuning.read(path) == PROFILE
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_what_a_link_leads_to_is_replaced(path, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(path)
    tuning.write(Profile(HERE, RULES, {"date": "later"}), link)
    assert link.is_symlink()
    assert tuning.read(path).made == {"date": "later"}


def test_devices_pipes_and_folders_are_neither_read_nor_replaced(tmp_path):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    assert "the file is empty" in refused(tuning.read, pipe)
    assert "(Is a directory)" in refused(tuning.read, folder)
    assert "longer than 1048576 bytes" in refused(tuning.read, "/dev/zero")
    for one in (pipe, folder, "/dev/null"):
        assert "it is no ordinary file" in refused(tuning.write, PROFILE, one)
    assert pipe.is_fifo()
    assert "(No such file or directory)" in refused(tuning.write, PROFILE, tmp_path / "no" / "where.json")
    assert "(No such file or directory)" in refused(tuning.read, tmp_path / "missing.json")
    assert "cannot be read" in refused(tuning.read, "a\0b")


def test_a_file_that_is_torn_at_any_byte_is_refused(path, tmp_path):
    whole, torn = path.read_bytes(), tmp_path / "torn.json"
    for length in range(len(whole) - 1):  # but for the newline at the end
        torn.write_bytes(whole[:length])
        said = refused(tuning.read, torn)
        assert said.startswith(f"profile {str(torn)!r}: ")
        assert length == 0 or re.search(r"no JSON, or torn, at line \d+, column \d+", said)
    torn.write_bytes(whole[:-1])
    assert tuning.read(torn) == PROFILE


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\xff{}", "no text in UTF-8 at byte 0"),
        (b"rules: none\n", "no JSON, or torn, at line 1, column 1"),
        (b'{"version": 1}\n{}', "at line 2, column 1: Extra data"),
        (b'{"version": 1, "version": 1}', 'key "version" stands twice'),
        (b'{"version": NaN}', "NaN is no number of JSON"),
        (b'{"version": 1' + b"0" * 5000 + b"}", "no JSON that can be read: Exceeds the limit"),
        (b"[" * 100_000, "no JSON that can be read: "),
        (b" " * (1 << 20) + b"{}", "longer than 1048576 bytes"),
        (b"[]", "the whole is []: expected an object with the keys version, mpi, machine, layout, made, rules"),
        (b"null", "the whole is null"),
        (b"{}", "the whole lacks the key 'version'"),
    ],
)
def test_what_is_no_profile_at_all(tmp_path, data, message):
    path = tmp_path / "profile.json"
    path.write_bytes(data)
    assert message in refused(tuning.read, path)


def rule(n, **changes):
    def change(whole):
        whole["rules"]["allreduce"][n].update(changes)

    return change


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


FIRST = ("rules", "allreduce", 0)
WRONG = [
    (of(["version"], 2), "version is 2: expected 1, the one this mpicoll knows"),
    (of(["version"], "1"), 'version is "1": expected 1'),
    (of(["version"], True), "version is true: expected 1"),
    *((of([key], ...), f"the whole lacks the key {key!r}") for key in ("version", "mpi", "layout", "made", "rules")),
    (of(["comment"], ""), 'the whole has the unknown key "comment"'),
    (of(["mpi"], 5), "mpi is 5: expected a text"),
    (of(["machine"], ""), 'machine is "": expected a text'),
    (of(["layout"], []), "layout is []: expected a list"),
    (of(["layout"], [2, 0]), "layout is [2, 0]: expected a list"),
    (of(["layout"], [True]), "layout is [true]: expected a list"),
    (of(["layout"], "2x4"), 'layout is "2x4": expected a list'),
    (of(["made"], None), "made is null: expected an object"),
    (of(["rules"], {}), "rules is {}: expected an object"),
    (of(["rules"], [1]), "rules is [1]: expected an object"),
    (
        of(["rules", "alltoall"], []),
        'a key of rules is "alltoall", which is no collective: expected allreduce, reduce,',
    ),
    (of(["rules", "mix"], []), 'a key of rules is "mix", which is no collective'),
    (of(["rules", "reduce"], []), "rules.reduce is []: expected a list of rules"),
    (of(["rules", "reduce"], {"up_to": None}), 'rules.reduce is {"up_to": null}: expected a list of rules'),
    (
        of(FIRST, ["native"]),
        'rules.allreduce, rule 1 is ["native"]: expected an object with the keys up_to, algorithms',
    ),
    (of([*FIRST, "up_to"], ...), "rules.allreduce, rule 1 lacks the key 'up_to'"),
    (of([*FIRST, "from"], 0), 'rules.allreduce, rule 1 has the unknown key "from": expected up_to, algorithms'),
    *(
        (of([*FIRST, "up_to"], bad), f"rules.allreduce, rule 1, up_to is {json.dumps(bad)}: expected a number of bytes")
        for bad in (-1, 4096.0, True, "4K", [4096])
    ),
    (of([*FIRST, "algorithms"], []), "rules.allreduce, rule 1, algorithms is []: expected a list of names"),
    (of([*FIRST, "algorithms"], "tree"), 'rules.allreduce, rule 1, algorithms is "tree": expected a list of names'),
    (
        of([*FIRST, "algorithms"], ["rnig"]),
        'rules.allreduce, rule 1 names "rnig", which is no allreduce algorithm: expected native, shared, ring, rec',
    ),
    (of([*FIRST, "algorithms"], ["tree", 5]), "rules.allreduce, rule 1 names 5, which is no allreduce algorithm"),
    (of([*FIRST, "algorithms"], [["tree"]]), 'rules.allreduce, rule 1 names ["tree"], which is no allreduce algorithm'),
    (of(["rules", "bcast", 2, "algorithms"], ["butterfly"]), 'rules.bcast, rule 3 names "butterfly"'),
    (of([*FIRST, "algorithms"], ["tree", "ring", "tree"]), "rules.allreduce, rule 1 names tree twice"),
    # contradictions
    (of([*FIRST, "up_to"], None), "rules.allreduce, rule 2 contradicts rule 1, whose up_to is null"),
    (of(["rules", "bcast", 1, "up_to"], 0), "rules.bcast, rule 2 contradicts rule 1: up_to is 0, expected more than 0"),
    (of(["rules", "bcast", 0, "up_to"], 1 << 41), "rules.bcast, rule 2 contradicts rule 1: up_to is 1099511627776"),
    (of(["rules", "allreduce", 1], ...), "rules.allreduce, rule 1, the last, is up_to 4096: expected null"),
    *(
        (
            of([*FIRST, "algorithms"], bad),
            f"rules.allreduce, rule 1 leaves calls without an algorithm: {json.dumps(bad)}",
        )
        for bad in (["native"], ["shared", "native"], ["native", "ring", "double_tree"])
    ),
    (of(["rules", "bcast", 2, "algorithms"], ["native", "shared"]), "holds none of tree, chain, double_tree, scatter"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_in_a_profile_is_named_with_its_place(path, change, message):
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))
    said = refused(tuning.read, path)
    assert said.startswith(f"profile {str(path)!r}: {message}") or f": {message}" in said or message in said
    assert said.endswith("; make one with mpirun -n N mpicoll tune")


def test_a_long_value_is_not_told_at_length(path):
    whole = json.loads(path.read_text()) | {"mpi": [*range(10_000)]}
    path.write_text(json.dumps(whole))
    assert len(refused(tuning.read, path)) < 300


def test_the_documentation_shows_a_profile_and_an_error_as_they_are(path):
    text = (REPOSITORY / "docs" / "tuning.md").read_text()
    (shown,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    path.write_text(shown)
    found = tuning.read(path)
    assert found.fingerprint == HERE
    documented = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert [*json.loads(shown), *Rule._fields] == documented
    path.write_text(shown.replace('"up_to": null', '"up_to": 4096'))
    contradiction = refused(tuning.read, path).replace(str(path), "p.json")
    assert f"mpicoll: {contradiction}\n" in text


# ---- which one


def test_a_profile_of_elsewhere_is_refused_with_what_differs():
    assert tuning.refusal(PROFILE, HERE) is None
    ours = HERE._replace(mpi="Open MPI 5.0.11")
    expected = "it is of MPICH 5.0.2, here is Open MPI 5.0.11: tune again, mpirun -n 8 mpicoll tune"
    assert tuning.refusal(PROFILE, ours) == expected
    ours = HERE._replace(machine="Neoverse, 8 cores", layout=(8,))
    assert tuning.refusal(PROFILE, ours) == (
        "it is of AMD EPYC, 2 cores, here is Neoverse, 8 cores; it is of 4 node(s) x 2 rank(s), here is "
        "1 node(s) x 8 rank(s): tune again, mpirun -n 8 mpicoll tune"
    )
    many = HERE._replace(layout=(1, 2, 1, 2) * 500)
    assert "here is 2000 node(s), 3000 ranks in no order" in (tuning.refusal(PROFILE, many) or "")
    swapped = HERE._replace(layout=(2, 1, 2, 1) * 500)
    assert "it is of 2000 node(s)" in (tuning.refusal(Profile(many, {}, {}), swapped) or "")


def test_the_file_is_called_after_what_it_is_for(tmp_path, monkeypatch):
    assert tuning.default_path(HERE) == tmp_path / "config/mpicoll/mpich-5.0.2-amd-epyc-2-cores-4x2.json"
    assert tuning.default_path(HERE._replace(layout=(3, 3, 2))).name.endswith("-cores-2x3-1x2.json")
    odd = [HERE._replace(layout=layout * 99) for layout in ((1, 2), (2, 1))] + [HERE._replace(machine="µ/..\n" * 99)]
    names = [tuning.default_path(one).name for one in odd]
    assert len({*names}) == 3
    assert all(len(name) == tuning.NAME + len(".json") and re.fullmatch(r"[a-z0-9.x-]+", name) for name in names)
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(tuning.default_path(HERE)).startswith("/home/me/.config/mpicoll/mpich")


def test_the_machine_is_known():
    assert tuning.machine() == tuning.machine()
    assert re.fullmatch(rf"\S.*\S, {os.cpu_count()} cores", tuning.machine())


def test_a_profile_is_found_where_it_is_looked_for(path, tmp_path, monkeypatch):
    assert tuning.find(HERE) is None
    there = tuning.default_path(HERE)
    there.parent.mkdir(parents=True)
    other = Profile(HERE, RULES, {"date": "another"})
    tuning.write(other, there)
    assert tuning.find(HERE) == other
    assert tuning.find(HERE._replace(layout=(8,))) is None
    for value, found in [
        (path, PROFILE),
        (there.parent, other),
        (tmp_path / "config", None),
        ("", None),
        ("none", None),
    ]:
        monkeypatch.setenv(tuning.VARIABLE, str(value))
        assert tuning.find(HERE) == found
    monkeypatch.setenv(tuning.VARIABLE, path.name)
    monkeypatch.chdir(tmp_path)
    assert tuning.find(HERE) == PROFILE


def test_a_folder_that_may_not_be_entered_holds_no_profile(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(os, "stat", refused)
    assert tuning.find(HERE) is None


def test_a_part_of_the_job_need_not_have_the_file_that_was_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MPICOLL_PROFILE", str(tmp_path / "gone.json"))
    assert tuning.find(HERE, whole=False) is None
    with pytest.raises(UserError, match=r"gone\.json"):
        tuning.find(HERE)


def test_a_process_reads_a_file_once(path, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    assert tuning.find(HERE) == PROFILE
    path.write_text("{}")
    assert tuning.find(HERE) == PROFILE


def test_a_named_profile_that_is_missing_or_wrong_is_an_error(path, tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "no.json"))
    assert "no.json' cannot be read (No such file or directory); make one with mpirun" in refused(tuning.find, HERE)
    path.write_text("{}")
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    assert "lacks the key 'version'" in refused(tuning.find, HERE)
    monkeypatch.delenv(tuning.VARIABLE)
    there = tuning.default_path(HERE)
    there.parent.mkdir(parents=True)
    there.touch()
    assert "the file is empty" in refused(tuning.find, HERE)


def test_a_profile_for_elsewhere_warns_once_and_is_none(path, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    with pytest.warns(RuntimeWarning, match=r"profile '.*' is not used: it is of MPICH 5.0.2, here is MPICH 6"):
        assert tuning.find(HERE._replace(mpi="MPICH 6"), whole=False) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.find(HERE._replace(mpi="MPICH 6")) is None  # said before


def test_a_part_of_the_job_has_a_layout_of_its_own_and_is_told_nothing(path, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    part = HERE._replace(layout=(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.find(part, whole=False) is None
    with pytest.warns(RuntimeWarning, match="here is 2 node"):
        assert tuning.find(part, whole=True) is None


@pytest.mark.parametrize("value", [None, "", "none", "folder"])
def test_finding_nothing_costs_nothing(value, tmp_path, monkeypatch):
    if value is not None:
        monkeypatch.setenv(tuning.VARIABLE, str(tmp_path) if value == "folder" else value)
    assert min(timeit.repeat(lambda: tuning.find(HERE), number=20, repeat=20)) / 20 < 50e-6


# ---- the fit


def steady(nbytes, fitted=True, default=NATIVE, n=20, **us):
    """A row without noise."""
    return Row(nbytes, fitted, default, {name: np.full(n, float(time)) for name, time in us.items()})


def test_between_two_winners_the_bound_is_the_geometric_mean():
    rows = [
        steady(1 << 10, native=1, tree=2, ring=9),
        steady(1 << 12, native=2, tree=3, ring=9),
        steady(1 << 14, native=9, tree=4, ring=9),
        steady(1 << 15, native=20, tree=6, ring=9),
        steady(1 << 17, native=30, tree=20, ring=9),
    ]
    assert fit.fit("allreduce", rows) == (
        Rule(1 << 13, (NATIVE, "tree")),
        Rule(1 << 16, ("tree",)),
        Rule(None, ("ring", "tree")),
    )
    assert fit.fit("bcast", [steady(4, native=5, tree=6, chain=7), steady(400, native=9, tree=6, chain=2)]) == (
        Rule(40, (NATIVE, "tree")),
        Rule(None, ("chain",)),
    )
    assert fit.fit("bcast", rows[:1]) == (Rule(None, (NATIVE, "tree")),)


def test_each_kind_of_call_has_its_own_winner():
    times = {"native": 1, "shared": 2, "ring": 3, "circulant": 8, "double_tree": 4, "tree": 6, "halving_doubling": 5}
    assert fit.fit("allreduce", [steady(4, **times)]) == (
        Rule(None, (NATIVE, SHARED, "ring", "double_tree", "halving_doubling")),
    )
    slow = {**times, "shared": 10, "native": 3.5}
    assert fit.fit("allreduce", [steady(4, **slow)]) == (
        Rule(None, ("ring", NATIVE, "double_tree", "halving_doubling")),
    )


@pytest.mark.parametrize("collective", tuning.COLLECTIVES)
def test_whatever_a_call_can_do_it_finds_the_best_of_it(collective):
    """By trying all orders of speed that chance comes to, for all sets of algorithms that a call may be able to use."""
    table, rng = ALGORITHMS[collective], np.random.default_rng(1)
    narrower = [
        {name for name, row in table.items() if row.rank_order},
        {name for name, row in table.items() if row.canonical},
    ]
    kinds = [
        {*more, *rows}
        for rows in ({*table}, *(narrower if "reduce" in collective else []))
        for more in ({NATIVE, SHARED}, {NATIVE}, {SHARED}, set())
        if not (NATIVE in more and rows == narrower[1])
    ]
    names = [NATIVE, SHARED, *table]
    for times in (rng.permutation(len(names)) + 1 for _ in range(300)):
        us = dict(zip(names, times, strict=True))
        (found,) = fit.fit(collective, [steady(4, **us)])
        for able in kinds:
            assert next(name for name in found.algorithms if name in able) == min(able, key=lambda name: us[name])
        assert tuning.can_do_all(collective, found.algorithms[-1])
        assert not any(tuning.can_do_all(collective, name) for name in found.algorithms[:-1])


def noisy(nbytes, rng, n=40, **middle):
    """A row of algorithms that are all slow for a while, together, and each a bit now and then."""
    together = 1 + 5 * (rng.random(n) < 0.3)
    us = {name: time * together * (1 + 0.2 * rng.random(n)) for name, time in middle.items()}
    return Row(nbytes, True, NATIVE, us)


def test_noise_does_not_make_rules():
    rng = np.random.default_rng(3)
    rows = [noisy(4 << n, rng, native=10, tree=10, ring=10) for n in range(20)]
    assert len({row.fastest({*row.us}) for row in rows}) == 3  # what would be chosen by the medians alone
    assert len(fit.fit("allreduce", rows)) == 1


def test_what_is_beyond_noise_does():
    rng = np.random.default_rng(3)
    rows = [noisy(4 << n, rng, native=10, tree=30 * 0.8**n, ring=99) for n in range(12)]  # equal at n = 4.9
    before, after = fit.fit("allreduce", rows)
    assert (before.algorithms, after) == ((NATIVE, "tree"), Rule(None, ("tree",)))
    assert 4 << 4 < before.up_to < 4 << 7


def test_a_neighbor_that_comes_for_a_while_does_not_either():
    us = {"native": np.repeat([10.0, 60, 70, 60], 20), "tree": np.full(80, 20.0)}  # it hits native most
    row = Row(4, True, NATIVE, us)
    assert row.ratio("native", "tree")[1] > 1
    assert not row.faster("tree", "native")
    assert fit.fit("allreduce", [row]) == (Rule(None, (NATIVE, "tree")),)
    assert row._replace(us={name: times[20:] for name, times in us.items()}).faster("tree", "native")


def test_without_reason_to_leave_it_the_default_is_kept():
    row = steady(4, default="shared", native=3, shared=3, tree=3)
    assert fit.fit("allreduce", [row]) == (Rule(None, (SHARED, NATIVE, "tree")),)


def test_compared_are_repetitions_that_both_took_part_in():
    row = Row(4, True, NATIVE, {"native": np.array([1.0] * 3 + [9.0] * 30), "tree": np.array([2.0] * 3)})
    assert row.ratio("tree", "native") == (2, 2, 2)
    assert row.ratio("native", "tree") == (0.5, 0.5, 0.5)


def test_what_rules_are_worth_by_hand():
    rules = (Rule(100, (NATIVE, "tree")), Rule(None, (SHARED, "tree")))
    rows = [
        steady(96, False, native=2, tree=8, shared=9),
        steady(100, False, native=6, tree=5, shared=9),
        steady(192, False, "ring", native=8, tree=5, ring=20),  # shared cannot be: the tree it is
        steady(300, False, native=4, tree=9, shared=5),
    ]
    trials = [fit.trial(rules, row) for row in rows]
    assert [one[:3] for one in trials] == [
        (96, NATIVE, NATIVE),
        (100, NATIVE, "tree"),
        (192, "tree", "tree"),
        (300, SHARED, NATIVE),
    ]
    assert [one.penalty for one in trials] == pytest.approx([0, 0.2, 0, 0.25])
    assert [one.over_default for one in trials] == pytest.approx([1, 1, 4, 0.8])
    assert [one.over_native for one in trials] == pytest.approx([1, 1, 1.6, 0.8])
    found = fit.worth(trials)
    assert found.penalty == pytest.approx(0.45 / 4)
    assert (found.worst.nbytes, found.least.nbytes) == (300, 300)
    assert found.over_default == pytest.approx(3.2 ** (1 / 4))
    assert found.over_native == pytest.approx(1.28 ** (1 / 4))
    text = command.report({"allreduce": rules}, {"allreduce": [*rows, steady(64, native=1, tree=2)]})
    assert "at 4 sizes that were not fitted" in text
    assert re.search(
        r"allreduce +11\.2% +25\.0% +1\.34 +1\.06 +0\.80   worst 300 B: shared for native; least 300 B", text
    )
    assert command.report({"allreduce": rules}, {"allreduce": rows[:0]}) == ""


def test_the_luckiest_of_several_that_are_alike_is_not_the_best():
    rng = np.random.default_rng(4)
    us = {name: 10 * (1 + 0.5 * rng.random(16)) for name in [NATIVE, SHARED, *ALGORITHMS["allreduce"]]}
    rules, row = (Rule(None, (NATIVE, "tree")),), Row(4, False, NATIVE, us)
    lucky = max(row.ratio(NATIVE, name)[0] - 1 for name in us)
    assert fit.trial(rules, row).penalty < 0.03 < 0.06 < lucky
    slow = fit.trial(rules, row._replace(us={**us, NATIVE: 2 * us[NATIVE]}))
    assert slow.penalty == pytest.approx(1, abs=0.2)


def test_the_table_has_a_line_for_each_rule():
    assert command.table(RULES).splitlines() == [
        "allreduce             up to 4 KiB   native, else tree",
        "                       any length   shared, else ring, else halving_doubling",
        "bcast                   up to 0 B   chain",
        "                   up to 1024 GiB   native, else tree",
        "                       any length   scatter_allgather",
    ]


# ---- measurements in a file


MEASURED = Measurements(
    HERE,
    {"date": "today"},
    {"reduce": [steady(4, native=1.25, tree=2), steady(12, False, native=3, tree=4), steady(16, native=9, tree=1)]},
)


def test_measurements_are_written_and_read_and_make_the_same_rules(tmp_path):
    path = tmp_path / "measured.json"
    fit.write(MEASURED, path)
    found = fit.read(path)
    assert (found.fingerprint, found.made, [*found.rows]) == (HERE, {"date": "today"}, ["reduce"])
    for row, other in zip(found.rows["reduce"], MEASURED.rows["reduce"], strict=True):
        assert row[:3] == other[:3]
        np.testing.assert_equal(row.us, other.us)
    made = Profile(HERE, {"reduce": (Rule(8, (NATIVE, "tree")), Rule(None, ("tree",)))}, {"date": "today"})
    for one in (fit.profile(found), fit.profile(MEASURED)):
        assert one == Profile(HERE, made.rules, {"date": "today", "repetitions": [20, 20]})
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        assert refused(fit.read, path).startswith(f"measurements {str(path)!r}: ")


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
    fit.write(MEASURED, path)
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))
    assert message in refused(fit.read, path)


def test_a_number_that_overflows_is_no_time(tmp_path):
    path = tmp_path / "measured.json"
    fit.write(MEASURED, path)
    path.write_text(path.read_text().replace("1.25", "1e999", 1))
    assert "us.native is [Infinity" in refused(fit.read, path)


# ---- the command


def test_sizes_between_those_that_are_fitted():
    tasks = command._tasks(["allreduce", "allgather"], [4, 16, 64], 3, None)
    assert [(task.collective, task.count, fitted) for task, fitted in tasks] == [
        *[("allreduce", 1, True), ("allreduce", 3, False), ("allreduce", 4, True), ("allreduce", 12, False)],
        *[("allreduce", 16, True), ("allgather", 3, True), ("allgather", 6, True), ("allgather", 12, False)],
        ("allgather", 18, True),
    ]
    scored = command._tasks(["reduce", "allreduce"], command.SIZES, 4, RULES)
    counts = [task.count for task, _ in scored]
    assert counts == [3 * 4**n for n in range(10)]
    assert not any(fitted for _, fitted in scored)


TINY = ["mpicoll", "tune", "--collective", "allreduce,allgather,allreduce", "--sizes", "4:1K:16", "--budget", "0.5"]


def test_it_measures_fits_and_is_found_again(tmp_path):
    config = {"XDG_CONFIG_HOME": str(tmp_path), "MPICOLL_PROFILE": str(tmp_path / "wrong.json")}
    (tmp_path / "wrong.json").write_text("{")  # one that is there already is not in the way
    done = mpirun(2, [*TINY, "--seed", "5"], tmp_path, env=config)
    assert (done.status, done.err) == (0, "")
    profile, measured = tmp_path / "wrong.json", tmp_path / "wrong.measured.json"
    made, data = tuning.read(profile), fit.read(measured)
    assert made.fingerprint.layout == (2,)
    assert [*made.rules] == [*data.rows] == ["allreduce", "allgather"]
    for name, rows in data.rows.items():
        assert [row.nbytes for row in rows if row.fitted] == [4 if name == "allreduce" else 8, 64, 1024]
        for row in rows:
            assert {*row.us} == {NATIVE, *ALGORITHMS[name], *([SHARED] if name == "allreduce" else [])}
            assert min(len(times) for times in row.us.values()) >= 6
            assert row.default == NATIVE
    for line in command.table(made.rules).splitlines():
        assert line in done.out
    assert "at 4 sizes that were not fitted" in done.out
    assert {"date", "mpicoll", "seconds", "repetitions", "hosts", "seed"} <= {*made.made}

    again = run(["mpicoll", "tune", "--fit", measured, "--out", "again.json"], tmp_path)
    assert (again.status, again.err) == (0, "")
    assert tuning.read(tmp_path / "again.json") == made
    assert again.out.splitlines()[:-1] == done.out.splitlines()[2:-1]

    for named in ([], ["again.json"]):
        scored = mpirun(2, [*TINY, "--score", *named], tmp_path, env=config)
        assert (scored.status, scored.err) == (0, "")
        assert re.search(r"\nall +\d+\.\d% +\d+\.\d% ", scored.out)
    assert len([*tmp_path.rglob("*.json")]) == 3


def test_a_profile_is_written_where_it_will_be_found(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    name = tuning.default_path(HERE).name
    for variable, expected in (
        (None, tmp_path / "config" / "mpicoll" / name),
        ("none", tmp_path / "config" / "mpicoll" / name),
        (str(tmp_path), tmp_path / name),
        (str(tmp_path / "mine.json"), tmp_path / "mine.json"),
    ):
        monkeypatch.delenv("MPICOLL_PROFILE", raising=False)
        if variable is not None:
            monkeypatch.setenv("MPICOLL_PROFILE", variable)
        out, data = command._outputs(HERE, None, None)
        assert (out, data) == (expected, expected.with_name(f"{expected.stem}.measured.json"))


@pytest.mark.parametrize(
    ("ranks", "options", "status", "message"),
    [
        (1, "", 1, "tune needs two ranks or more: mpirun -n N mpicoll tune"),
        (2, "--score missing.json", 1, "profile 'missing.json' cannot be read (No such file or directory)"),
        (2, "--score foreign.json", 1, "profile 'foreign.json' is not for here: it is of MPICH 1"),
        (2, "--score torn.json", 1, "profile 'torn.json': no JSON, or torn, at line 1, column 2"),
        (2, "--score p.json --sizes 64", 1, "nothing to score: no size between two of --sizes, or no collective"),
        (2, "--score p.json --collective reduce", 1, "nothing to score: no size between two of --sizes, or no coll"),
        (2, "--out no/where.json", 1, "'no/where.json' cannot be written: there is no folder 'no'"),
        (2, "--out a.json --data a.json", 1, "'a.json' is named twice"),
        (2, "--sizes 900G", 1, "the largest size takes 9000 GiB of memory for each of 2 rank"),
        (2, "--fit torn.json", 1, "tune --fit runs on one process: start it without mpirun"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, ranks, options, status, message):
    tuning.write(Profile(Fingerprint("MPICH 1", "?", (2,)), RULES, {}), tmp_path / "foreign.json")
    here = Fingerprint(library_name(), tuning.machine(), (2,))
    tuning.write(Profile(here, RULES, {}), tmp_path / "p.json")
    (tmp_path / "torn.json").write_text("{")
    before = sorted(tmp_path.iterdir())
    done = mpirun(ranks, ["mpicoll", "tune", *options.split()], tmp_path)
    (line,) = [line for line in done.err.splitlines() if line.startswith("mpicoll: ")]
    assert (done.status, done.out) == (status, "")
    assert message in line
    assert "Traceback" not in done.err
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_fitted_or_scored_is_one_line(tmp_path):
    (tmp_path / "torn.json").write_text("{")
    failed = run(["mpicoll", "tune", "--fit", "torn.json", "--out", "p.json"], tmp_path)
    assert failed.status == 1
    assert re.fullmatch(r"mpicoll: measurements 'torn.json': no JSON, or torn, at .*\n", failed.err)
    assert [file.name for file in tmp_path.iterdir()] == ["torn.json"]
    unwanted = mpirun(2, [*TINY, "--score"], tmp_path, env={"MPICOLL_PROFILE": "none"})
    assert (unwanted.status, unwanted.out) == (1, "")
    assert "mpicoll: MPICOLL_PROFILE says that no profile is wanted: name one, --score PROFILE\n" in unwanted.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--collective allreduce,mix", "--collective 'mix' is none of allreduce, reduce, bcast, reduce_scatter, allga"),
        ("--sizes 6", "--sizes: 6 bytes are no whole number, above 0, of float32, 4 bytes each"),
        ("--sizes 0,4", "--sizes: 0 bytes are no whole number, above 0"),
        ("--budget -1", "-1.0 is not in the range"),
        ("--budget nan", "--budget nan is no number of seconds"),
        ("--fit a --budget 5", "--fit has no use for --budget: leave it out"),
        ("--fit a --data b", "--fit has no use for --data: leave it out"),
        ("--score a --out b", "--score has no use for --out: leave it out"),
        ("--score --fit b", "--score has no use for --fit: leave it out"),
    ],
)
def test_wrong_usage(options, message):
    result = CliRunner().invoke(app, ["tune", *options.split()])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


PATCHED = """
import sys
from mpicoll.cli import main
import mpicoll.mpi.launch
mpicoll.mpi.launch.world()
from mpicoll import measure
made = measure.implementations
measure.implementations = lambda *args: {**made(*args), "ring": lambda task, send, recv: lambda: None}
sys.exit(main(sys.argv[1:]))
"""


def test_a_wrong_result_is_a_failure_and_nothing_is_written(tmp_path):
    done = mpirun(2, [sys.executable, "-c", PATCHED, *TINY[1:], "--out", "p.json"], tmp_path)
    assert done.status == 1
    assert re.search(
        r"^mpicoll: \d+ wrong elements: ring (allreduce|allgather) of \d+ elements$", done.err, re.MULTILINE
    )
    assert "Traceback" not in done.err
    assert [*tmp_path.iterdir()] == []


def test_ctrl_c_leaves_no_file(tmp_path):
    def interrupt(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("# "):
            pass
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)

    done = mpirun(2, ["mpicoll", "tune", "--out", "p.json"], tmp_path, meanwhile=interrupt, timeout=30)
    assert done.status != 0
    assert IS_OPEN_MPI or "mpicoll: interrupted" in done.err
    assert [*tmp_path.iterdir()] == []


def test_a_job_says_in_a_line_that_it_does_not_use_a_profile_and_ends_in_one_with_a_wrong_one(path, tmp_path):
    command = ["mpicoll", "train", "--model", "softmax", "--epochs", "1", "--json"]
    tuning.write(PROFILE, path)
    done = mpirun(3, command, tmp_path, env={"MPICOLL_PROFILE": str(path)})
    assert done.status == 0, done.err
    (line,) = done.err.splitlines()
    assert line.startswith(f"mpicoll: profile {str(path)!r} is not used: it is of ")
    assert line.endswith("tune again, mpirun -n 3 mpicoll tune")
    path.write_text(path.read_text()[:-20])
    done = mpirun(3, command, tmp_path, env={"MPICOLL_PROFILE": str(path)})
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"mpicoll: profile {str(path)!r}: ")
    assert len(done.err.splitlines()) == 1
