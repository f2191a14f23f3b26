import pytest

from commands import run_here
from mpicoll.algorithms import ALGORITHMS


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        ("show bruck --ranks 5", "bruck allgather: 5 ranks, 5 chunks, 3 rounds, no rank sends more than 4/5"),
        ("show tree --collective bcast --root 2", "tree bcast: 4 ranks, 1 chunks, 2 rounds, no rank sends more than 2"),
        ("show chain --segments 2", "chain reduce: 4 ranks, 2 chunks, 4 rounds, no rank sends more than 1"),
        (
            "show ring --collective bcast",
            "mpicoll: there is no ring bcast: ring is for allreduce, reduce_scatter, allg",
        ),
        ("show ring --root 1", "mpicoll: ring allreduce has no parameter 'root'"),
        ("show chain --root 4", "mpicoll: chain reduce: root must be one of 4 ranks, got 4"),
        ("show ring --segments 2", "mpicoll: ring allreduce has no parameter 'segments'"),
        ("show base --ranks 6", "base mix: 6 ranks, 4 rounds, no rank sends more than 4 of the vector"),
        ("show ring --collective mix", "ring mix: 4 ranks, 1 rounds, no rank sends more than 2 of the vector"),
        ("show gossip --collective mix --ranks 1", "graph              period  messages  spectral gap  rounds to"),
        (
            "show gossip --root 1",
            "mpicoll: gossip is a table of all graphs: it takes --ranks only; name one to draw it",
        ),
        ("show gossip --svg x.svg", "mpicoll: gossip is a table of all graphs"),
        ("show gossip --collective bcast", "mpicoll: gossip is a table of all graphs"),
        (
            "show ring --ranks 64 --svg x.svg",
            "mpicoll: a picture of ring allreduce: 64 ranks, 64 chunks, 126 rounds would",
        ),
        ("show ring --svg no/where.svg", "mpicoll: 'no/where.svg' cannot be written (No such file or directory)"),
        (
            "show rign",
            "mpicoll: Invalid value for 'ALGORITHM|gossip': 'rign' is not one of 'ring', 'recursive_doubling'",
        ),
    ],
)
def test_show(tmp_path, arguments, first):
    done = run_here(["mpicoll", *arguments.split()], tmp_path)
    assert (done.out + done.err).startswith(first)
    assert done.status == (0 if done.out else 2 if "rign" in arguments else 1)
    assert not done.err or done.err.count("\n") == 1


def test_show_gossip_compares_the_graphs(tmp_path):
    done = run_here(["mpicoll", "show", "gossip", "--ranks", "6"], tmp_path)
    head, *rows = [line.split() for line in done.out.splitlines()]
    assert head[:3] == ["graph", "period", "messages"]
    assert [row[0] for row in rows] == list(ALGORITHMS["mix"])
    assert ["base", "4", "1", "1", "4", "reached", "after", "4"] in rows
    assert ["ring", "1", "2", "0.333", "18", "approached"] in rows


def test_show_draws_a_picture(tmp_path):
    done = run_here(["mpicoll", "show", "tree", "--collective", "bcast", "--root", "2", "--svg", "a.svg"], tmp_path)
    assert done.out == "tree bcast: 4 ranks, 1 chunks, 2 rounds: drawn in a.svg\n"
    assert (tmp_path / "a.svg").read_text().startswith("<svg ")
