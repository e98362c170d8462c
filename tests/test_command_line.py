"""One style of command line: options as data, values of their types, one sentence for the rest."""

from pathlib import Path

import pytest

from rho1_jax import command_line
from rho1_jax.errors import InputError

OPTIONS = {"seed": 0, "limit": int, "top_p": 1.0, "dtype": ("float32", "bfloat16"), "stop": [],
           "out": Path, "folder": Path("runs"), "name": "", "fast": False}  # fmt: skip


def parse(*words, **how):
    return command_line.parse(["command", *words], OPTIONS, **how)


def test_what_is_left_out_has_its_default():
    found = vars(parse())
    assert found == {
        "seed": 0, "limit": None, "top_p": 1.0, "dtype": "float32", "stop": [], "out": None,
        "folder": Path("runs"), "name": "", "fast": False, "words": [],
    }  # fmt: skip


def test_values_have_their_types_and_words_stand_anywhere():
    found = parse(
        "--seed=3", "--limit=4", "one", "--top_p=0.5", "--dtype=bfloat16", "--stop=a", "--stop=b",
        "--out=x/y", "--fast", "--name", "n", "two", words=("TEXT...",),
    )  # fmt: skip
    assert (found.seed, found.limit, found.top_p, found.dtype) == (3, 4, 0.5, "bfloat16")
    assert (found.stop, found.out, found.name, found.fast) == (["a", "b"], Path("x/y"), "n", True)
    assert found.words == ["one", "two"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sed=3"], "The option '--sed' is not known: did you mean --seed?"),
        (["--seed=three"], "seed"),
        (["--limit=1.5"], "limit"),
        (["--dtype=bfloat1"], "--dtype 'bfloat1' is not known: did you mean bfloat16?"),
        (["one"], "one is not understood: options look like --name=value."),
        (["--seed"], "seed"),
        (["x" * 999], "x... is not understood"),
    ],
)
def test_what_is_wrong_is_one_sentence(words, said):
    with pytest.raises(InputError) as raised:
        parse(*words)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_what_must_be_there():
    with pytest.raises(InputError, match="^--out is missing: name a file.$"):
        parse(required={"out": "name a file"})
    with pytest.raises(InputError, match="^OUT is missing"):
        parse("a", words=("IN", "OUT"))
    with pytest.raises(InputError, match="^c is not understood"):
        parse("a", "b", "c", words=("IN", "OUT"))


def test_status_and_help(capsys):
    def command(argv):
        if argv[1] == "bad":
            raise InputError("That was wrong.")
        return 1 if argv[1] == "damaged" else None

    found = [command_line.run(command, ["x", word], "Help.") for word in ("good", "damaged", "bad")]
    assert found == [0, 1, 2]
    assert capsys.readouterr().err == "That was wrong.\n"
    assert command_line.run(command, ["x", "--seed=3", "-h"], "Help.") == 0
    assert capsys.readouterr().out == "Help.\n"
