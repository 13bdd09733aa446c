"""`.env`: what a line says, and that a stray file can neither override anything nor send a key elsewhere."""

from __future__ import annotations

import pytest
from helpers import each
from hypothesis import given
from hypothesis import strategies as st

from microbatch.cli.environment import load_dotenv as load
from microbatch.cli.environment import read_dotenv as read

BASE, KEY, MAX = "OPENAI_BASE_URL", "OPENAI_API_KEY", "MICROBATCH_MAX_WAIT"


@each(
    ("line", "value"),
    [
        ("OPENAI_X=abc", "abc"),
        ("  export OPENAI_X = abc  ", "abc"),
        ("OPENAI_X=a b # a comment", "a b"),
        ("OPENAI_X=a#b", "a#b"),
        ("OPENAI_X=", ""),
        ("OPENAI_X= # empty", ""),
        ("OPENAI_X=#x", "#x"),
        ("OPENAI_X=''", ""),
        ("OPENAI_X='a \"b\" # $HOME \\n'", 'a "b" # $HOME \\n'),
        ("OPENAI_X=\"a 'b' # $HOME\" # a comment", "a 'b' # $HOME"),
        ('OPENAI_X="a\\n\\"b\\"\\\\"', 'a\n"b"\\'),
        ('OPENAI_X="a"# a comment', "a"),
        ("OPENAI_X=$HOME/${X}", "$HOME/${X}"),
        ("OPENAI_X=it's", "it's"),
        ("OPENAI_X=a=b", "a=b"),
        ("OPENAI_X=a\r\n", "a"),
        ("OPENAI_X=first\nOPENAI_X=second", "second"),
    ],
)
def test_a_line_is_read_as_shells_write_it(line, value):
    assert dict(read(f"A=1\n{line}\nB=2")) == {"OPENAI_X": value}


@pytest.mark.parametrize(
    "line",
    [
        "# OPENAI_X=1",
        "OPENAI_X",
        "PATH=/tmp",
        "XOPENAI_X=1",
        "OPENAI-X=1",
        "OPENAI_X='open",
        'OPENAI_X="open',
        "OPENAI_X='a' b",
    ],
)
def test_what_is_no_line_of_ours_is_skipped(line):
    assert dict(read(f"{line}\nOPENAI_Y=2")) == {"OPENAI_Y": "2"}


@given(st.text())
def test_any_text_is_read_without_an_error(text):
    for name, value in read("OPENAI_X=" + text):
        assert name
        assert isinstance(value, str)


@given(st.text(st.characters(blacklist_characters="'\r\n", blacklist_categories=["Cs"])))
def test_what_stands_in_single_quotes_is_taken_as_it_is(text):
    assert dict(read(f"OPENAI_X='{text}'")) == {"OPENAI_X": text}


@each(
    ("file", "environment", "loaded"),
    [
        ({KEY: "k"}, {}, {KEY: "k"}),
        ({KEY: "k", MAX: "3"}, {KEY: "mine"}, {KEY: "mine", MAX: "3"}),
        ({KEY: "k"}, {KEY: ""}, {KEY: ""}),
        # an address needs a key of the same file, and one that is in use
        ({KEY: "k", BASE: "https://a/v1"}, {}, {KEY: "k", BASE: "https://a/v1"}),
        ({KEY: "k", BASE: "https://a/v1"}, {KEY: "k"}, {KEY: "k", BASE: "https://a/v1"}),
        ({BASE: "https://a/v1"}, {}, {}),
        ({BASE: "https://a/v1"}, {KEY: "mine"}, {KEY: "mine"}),
        ({KEY: "k", BASE: "https://a/v1"}, {KEY: "mine"}, {KEY: "mine"}),
        ({KEY: "k", BASE: "https://a/v1"}, {KEY: ""}, {KEY: ""}),
        ({KEY: "", BASE: "https://a/v1"}, {}, {KEY: ""}),
        ({KEY: "k", BASE: "https://a/v1"}, {BASE: "https://b/v1"}, {KEY: "k", BASE: "https://b/v1"}),
        ({"MICROBATCH_UPSTREAM": "https://a"}, {KEY: "mine"}, {KEY: "mine"}),
        ({"MICROBATCH_CACHE": "redis://a"}, {KEY: "mine"}, {KEY: "mine"}),
        (
            {"MICROBATCH_CACHE": "a.sqlite", "HTTPS_PROXY": "http://a", "PATH": "x"},
            {},
            {"MICROBATCH_CACHE": "a.sqlite"},
        ),
    ],
)
def test_the_environment_comes_first_and_addresses_come_with_their_key(tmp_path, capsys, file, environment, loaded):
    path = tmp_path / ".env"
    path.write_text("".join(f"{name}={value}\n" for name, value in file.items()))
    ignored = {
        name for name in file if name not in environment and name not in loaded and name not in ("PATH", "HTTPS_PROXY")
    }
    load(str(path), environment)
    assert environment == loaded
    told = capsys.readouterr().err
    assert all(name in told for name in ignored)
    assert bool(told) == bool(ignored)
    assert "https://a" not in told


@pytest.mark.parametrize("what", ["missing", "folder", "not text", "with a mark"])
def test_a_file_of_another_kind_does_no_harm(tmp_path, what):
    path = tmp_path / ".env"
    if what == "folder":
        path.mkdir()
    elif what != "missing":
        path.write_bytes(b"\xff\xfe\x00" if what == "not text" else "\ufeffOPENAI_API_KEY=k".encode())
    environment = {}
    load(str(path), environment)
    assert environment == ({KEY: "k"} if what == "with a mark" else {})
