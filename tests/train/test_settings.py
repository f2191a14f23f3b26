"""Settings: what is accepted is written and read back, and all else refused."""

import math
from dataclasses import fields
from typing import Any

import pytest
from click.testing import CliRunner

from mpicoll import UserError
from mpicoll.cli.app import app
from mpicoll.train.checks import check
from mpicoll.train.settings import NOT_SAVED, Settings, expected, kind_of, read_settings, written


def test_settings_come_back_from_the_file_that_a_run_writes(tmp_path):
    odd = Settings(
        data='a "b"\\c\n/é\x7f\U0001f600.npz',
        lr=1e-7,
        hidden="3,4",
        mix_first=True,
        patience=4,
        out="x",
        validation=0.25,
    )
    (tmp_path / "config.toml").write_text(written(odd), encoding="utf-8")
    assert Settings(**read_settings(tmp_path / "config.toml"), out="x") == odd


def test_paths_that_are_no_text_and_numbers_of_either_kind(tmp_path):
    odd = Settings(data=b"\xff".decode(errors="surrogateescape"), hidden="5")
    (tmp_path / "c.toml").write_text(written(odd), encoding="utf-8", errors="surrogateescape")
    assert Settings(**read_settings(tmp_path / "c.toml")) == odd
    (tmp_path / "c.toml").write_text("hidden = 5\nlr = 1\n")
    assert read_settings(tmp_path / "c.toml") == {"hidden": "5", "lr": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = 3\nlerning-rate = 1\n", "has an unknown key 'lerning-rate': expected one of data, test, "),
        ("epohcs = 3\n", "has an unknown key 'epohcs': did you mean 'epochs'"),
        ("batch-sise = 3\n", "has an unknown key 'batch-sise': did you mean 'batch_size'"),
        ("epochs = [1]\n", "epochs must be a whole number, got .1."),
        ("epochs = 2.7\n", "epochs must be a whole number, got 2.7"),
        ("epochs = true\n", "epochs must be a whole number, got True"),
        ("lr = true\n", "lr must be a number, got True"),
        ("shards = 2\n", "shards must be true or false, got 2"),
        ("seed = 1" + 30 * "0" + "\n", "seed must be below 2\\^64, got 1000"),
        ('out = "a\\u0000b"\n', "out must be text"),
        ("[train]\nepochs = 1\n", "unknown key 'train'"),
        ("batch-size = 5\nbatch_size = 7\n", "has 'batch_size' twice, with - and with _: leave one of them out"),
        ("weight_decay = 0.1\nlr = 1\nweight-decay = 0.1\n", "has 'weight_decay' twice"),
        ("seed = " + 5000 * "9" + "\n", "is not TOML: "),
        ("seed = 0x" + 5000 * "f" + "\n", "seed must be below 2\\^64, got one of thousands of digits"),
        ("lr = " + 400 * "9" + "\n", "lr must be finite"),
        ("hidden = " + 5000 * "[" + "\n", "is not TOML: "),
        ("epochs 3\n", "is not TOML: "),
    ],
)
def test_configurations_that_will_not_do(tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(path)


NAMES = [field.name for field in fields(Settings)]

GIVEN: dict[type, list[Any]] = {
    int: [1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1],
    float: [0.0, 5e-324, 1e-7, 0.1, 1 / 3, 1e16, 1e22, 1.7976931348623157e308],
    bool: [True, False],
    str: [
        *(
            "",
            " ",
            "a b",
            "\\",
            '"',
            "'",
            '"""',
            "#",
            "=",
            "[x]",
            "\n",
            "\r\n",
            "\t\b\f",
            "\x01\x1f",
            "\x7f",
            "\x80\x85",
        ),
        *(
            "\u2028\ufeff",
            "\ue000\uffff",
            "\U0001f600",
            b"\xff\xc3\xa9\x80".decode(errors="surrogateescape"),
            "true",
            "7",
        ),
    ],
}
"""Values of each type that a setting may have, as far as its type says."""

WRONG: dict[type, list[Any]] = {
    int: [2**64, 2**64 + 1, 2**1000, 1 << 20000, 1.5, True, "3", math.nan],
    float: [math.inf, -math.inf, math.nan, 2**1024, "0.1", False],
    bool: [1, 0.0, "yes"],
    str: ["a\0b", 3.5, True],
}


def test_every_value_that_is_accepted_is_read_back(tmp_path):
    path = tmp_path / "config.toml"
    for name in NAMES:
        for value in GIVEN[kind_of(name)]:
            assert expected(name, value) is None
            given = Settings(**{name: value})
            path.write_text(written(given), encoding="utf-8", errors="surrogateescape")
            back = Settings(**read_settings(path))
            assert back == (given if name not in NOT_SAVED else Settings())
            assert repr(getattr(back, name)) == repr(getattr(given, name)) or name in NOT_SAVED


def test_every_value_that_could_not_be_read_back_is_refused(tmp_path):
    assert {kind_of(name) for name in NAMES} == {*WRONG}
    for name in NAMES:
        for value in WRONG[kind_of(name)]:
            with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} must be ") as caught:
                check(Settings(**{name: value}))
            assert len(str(caught.value)) < 100


def test_whole_numbers_that_could_not_be_read_back_are_no_options():
    """By flag, by environment, and in a file."""
    whole = [name for name in NAMES if kind_of(name) is int]
    assert len(whole) >= 13
    for name in whole:
        option = "--" + name.replace("_", "-")
        for value in (2**64, 10**30):
            for arguments, env in (([option, str(value)], {}), ([], {f"MPICOLL_TRAIN_{name.upper()}": str(value)})):
                failed = CliRunner().invoke(app, ["train", "--data", "gone.npz", *arguments], env=env)
                assert failed.exit_code == 2
                assert f"'{option}'" in failed.output
                assert f"{value} is not in the range" in " ".join(failed.output.split())


def test_configurations_that_cannot_be_read(tmp_path):
    for name, message in {"gone": "No such file", ".": "Is a directory"}.items():
        with pytest.raises(UserError, match=f"cannot be read: .*{message}"):
            read_settings(tmp_path / name)
