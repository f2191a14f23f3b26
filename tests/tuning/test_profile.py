"""Profiles in files: read, written, and looked for."""

import json
import os
import re
import timeit
import warnings
from pathlib import Path

import pytest

from launch import REPOSITORY
from mpicoll.errors import UserError
from mpicoll.tuning import profile
from mpicoll.tuning.profile import (
    NAME,
    VARIABLE,
    Profile,
    default_path,
    find_profile,
    read_profile,
    refusal,
    write_profile,
)
from mpicoll.tuning.rules import Rule
from profiles import HERE, PROFILE, RULES, of, refused


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch, tmp_path):
    """No profile of this machine's owner, and nothing kept from the test before."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(VARIABLE, raising=False)
    profile._read_once.cache_clear()
    profile._refused.clear()


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "profile.json"
    write_profile(PROFILE, made)
    return made


# ---- the file


def test_what_is_written_is_read_and_people_can_read_it_too(path, tmp_path):
    assert read_profile(path) == read_profile(str(path)) == PROFILE
    lines = path.read_text().splitlines()
    assert '   {"up_to": 4096, "algorithms": ["native", "tree"]},' in lines
    assert sum("up_to" in line for line in lines) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_a_file_that_cannot_be_replaced_stays_and_nothing_is_left_beside_it(path, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        (tmp_path / f".profile.json.{os.getpid()}.partial").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    said = refused(write_profile, Profile(HERE, RULES, {}), path)
    assert said == f"profile {str(path)!r} cannot be written (No space left on device); name another file"
    assert read_profile(path) == PROFILE
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_what_a_link_leads_to_is_replaced(path, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(path)
    write_profile(Profile(HERE, RULES, {"date": "later"}), link)
    assert link.is_symlink()
    assert read_profile(path).made == {"date": "later"}


def test_devices_pipes_and_folders_are_neither_read_nor_replaced(tmp_path):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    assert "the file is empty" in refused(read_profile, pipe)
    assert "(Is a directory)" in refused(read_profile, folder)
    assert "longer than 1048576 bytes" in refused(read_profile, "/dev/zero")
    for one in (pipe, folder, "/dev/null"):
        assert "it is no ordinary file" in refused(write_profile, PROFILE, one)
    assert pipe.is_fifo()
    assert "(No such file or directory)" in refused(write_profile, PROFILE, tmp_path / "no" / "where.json")
    assert "(No such file or directory)" in refused(read_profile, tmp_path / "missing.json")
    assert "cannot be read" in refused(read_profile, "a\0b")


def test_a_file_that_is_torn_at_any_byte_is_refused(path, tmp_path):
    whole, torn = path.read_bytes(), tmp_path / "torn.json"
    for length in range(len(whole) - 1):  # but for the newline at the end
        torn.write_bytes(whole[:length])
        said = refused(read_profile, torn)
        assert said.startswith(f"profile {str(torn)!r}: ")
        assert length == 0 or re.search(r"no JSON, or torn, at line \d+, column \d+", said)
    torn.write_bytes(whole[:-1])
    assert read_profile(torn) == PROFILE


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
    assert message in refused(read_profile, path)


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
    said = refused(read_profile, path)
    assert said.startswith(f"profile {str(path)!r}: {message}") or f": {message}" in said or message in said
    assert said.endswith("; make one with mpirun -n N mpicoll tune")


def test_a_long_value_is_not_told_at_length(path):
    whole = json.loads(path.read_text()) | {"mpi": [*range(10_000)]}
    path.write_text(json.dumps(whole))
    assert len(refused(read_profile, path)) < 300


def test_the_documentation_shows_a_profile_and_an_error_as_they_are(path):
    text = (REPOSITORY / "docs" / "tuning.md").read_text()
    (shown,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    path.write_text(shown)
    found = read_profile(path)
    assert found.fingerprint == HERE
    documented = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert [*json.loads(shown), *Rule._fields] == documented
    path.write_text(shown.replace('"up_to": null', '"up_to": 4096'))
    contradiction = refused(read_profile, path).replace(str(path), "p.json")
    assert f"mpicoll: {contradiction}\n" in text


# ---- which profile


def test_a_profile_of_elsewhere_is_refused_with_what_differs():
    assert refusal(PROFILE, HERE) is None
    ours = HERE._replace(mpi="Open MPI 5.0.11")
    expected = "it is of MPICH 5.0.2, here is Open MPI 5.0.11: tune again, mpirun -n 8 mpicoll tune"
    assert refusal(PROFILE, ours) == expected
    ours = HERE._replace(machine="Neoverse, 8 cores", layout=(8,))
    assert refusal(PROFILE, ours) == (
        "it is of AMD EPYC, 2 cores, here is Neoverse, 8 cores; it is of 4 node(s) x 2 rank(s), here is "
        "1 node(s) x 8 rank(s): tune again, mpirun -n 8 mpicoll tune"
    )
    many = HERE._replace(layout=(1, 2, 1, 2) * 500)
    assert "here is 2000 node(s), 3000 ranks in no order" in (refusal(PROFILE, many) or "")
    swapped = HERE._replace(layout=(2, 1, 2, 1) * 500)
    assert "it is of 2000 node(s)" in (refusal(Profile(many, {}, {}), swapped) or "")


def test_the_file_is_called_after_what_it_is_for(tmp_path, monkeypatch):
    assert default_path(HERE) == tmp_path / "config/mpicoll/mpich-5.0.2-amd-epyc-2-cores-4x2.json"
    assert default_path(HERE._replace(layout=(3, 3, 2))).name.endswith("-cores-2x3-1x2.json")
    odd = [HERE._replace(layout=layout * 99) for layout in ((1, 2), (2, 1))] + [HERE._replace(machine="µ/..\n" * 99)]
    names = [default_path(one).name for one in odd]
    assert len({*names}) == 3
    assert all(len(name) == NAME + len(".json") and re.fullmatch(r"[a-z0-9.x-]+", name) for name in names)
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(default_path(HERE)).startswith("/home/me/.config/mpicoll/mpich")


def test_a_profile_is_found_where_it_is_looked_for(path, tmp_path, monkeypatch):
    assert find_profile(HERE) is None
    there = default_path(HERE)
    there.parent.mkdir(parents=True)
    other = Profile(HERE, RULES, {"date": "another"})
    write_profile(other, there)
    assert find_profile(HERE) == other
    assert find_profile(HERE._replace(layout=(8,))) is None
    for value, found in [
        (path, PROFILE),
        (there.parent, other),
        (tmp_path / "config", None),
        ("", None),
        ("none", None),
    ]:
        monkeypatch.setenv(VARIABLE, str(value))
        assert find_profile(HERE) == found
    monkeypatch.setenv(VARIABLE, path.name)
    monkeypatch.chdir(tmp_path)
    assert find_profile(HERE) == PROFILE


def test_a_folder_that_may_not_be_entered_holds_no_profile(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(os, "stat", refused)
    assert find_profile(HERE) is None


def test_a_part_of_the_job_need_not_have_the_file_that_was_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MPICOLL_PROFILE", str(tmp_path / "gone.json"))
    assert find_profile(HERE, whole=False) is None
    with pytest.raises(UserError, match=r"gone\.json"):
        find_profile(HERE)


def test_a_process_reads_a_file_once(path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(path))
    assert find_profile(HERE) == PROFILE
    path.write_text("{}")
    assert find_profile(HERE) == PROFILE


def test_a_named_profile_that_is_missing_or_wrong_is_an_error(path, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "no.json"))
    assert "no.json' cannot be read (No such file or directory); make one with mpirun" in refused(find_profile, HERE)
    path.write_text("{}")
    monkeypatch.setenv(VARIABLE, str(path))
    assert "lacks the key 'version'" in refused(find_profile, HERE)
    monkeypatch.delenv(VARIABLE)
    there = default_path(HERE)
    there.parent.mkdir(parents=True)
    there.touch()
    assert "the file is empty" in refused(find_profile, HERE)


def test_a_profile_for_elsewhere_warns_once_and_is_none(path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.warns(RuntimeWarning, match=r"profile '.*' is not used: it is of MPICH 5.0.2, here is MPICH 6"):
        assert find_profile(HERE._replace(mpi="MPICH 6"), whole=False) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_profile(HERE._replace(mpi="MPICH 6")) is None  # said before


def test_a_part_of_the_job_has_a_layout_of_its_own_and_is_told_nothing(path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(path))
    part = HERE._replace(layout=(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_profile(part, whole=False) is None
    with pytest.warns(RuntimeWarning, match="here is 2 node"):
        assert find_profile(part, whole=True) is None


@pytest.mark.parametrize("value", [None, "", "none", "folder"])
def test_finding_nothing_costs_nothing(value, tmp_path, monkeypatch):
    if value is not None:
        monkeypatch.setenv(VARIABLE, str(tmp_path) if value == "folder" else value)
    assert min(timeit.repeat(lambda: find_profile(HERE), number=20, repeat=20)) / 20 < 50e-6
