"""Damaged SQLite files are errors in words, not tracebacks; as spools and as caches."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from microbatch.caching import guard
from microbatch.caching.sqlite import _SCHEMA as SCHEMA
from microbatch.cli.main import main
from microbatch.errors import StorageError
from microbatch.spool.records import Name
from microbatch.storage.sqlite import Database

pytestmark = pytest.mark.slow


def damaged(whole: bytes, how: str) -> bytes:
    """Return the content of a file, *whole*, with that damage."""
    kind, _, where = how.partition(" ")
    if kind == "cut":
        return whole[: int(where)]
    content, dice = bytearray(whole), random.Random(how)
    for begin in range(_PAGE, len(content), _PAGE) if kind == "pages" else [int(where)]:
        content[begin : begin + 200] = dice.randbytes(200)
    return bytes(content)


_PAGE = 4096
_DAMAGES = ("pages 1", "pages 2", "at 200", "at 1000", "at 3500", "at 12500", "cut 100", "cut 5000", "cut 20000")
_ASKED = ("--system", "Sort.", "--template", "{name}", "--labels", "a,b")


@pytest.mark.parametrize("how", _DAMAGES)
@pytest.mark.parametrize(
    "words",
    [
        ("spool", "d.sqlite"),
        ("spool", "d.sqlite", "--dead"),
        ("spool", "d.sqlite", "--export", "-"),
        ("spool", "d.sqlite", "--requeue"),
        ("spool", "d.sqlite", "--put", "in.jsonl", *_ASKED),
        ("worker", "d.sqlite", "--simulate", "--until-empty"),
        ("cache", "d.sqlite"),
        ("cache", "d.sqlite", "export"),
        ("cache", "d.sqlite", "delete", "--tenant", "ann"),
        ("cache", "d.sqlite", "clear", "--yes"),
        ("run", "in.jsonl", "-o", "again.jsonl", "--cache", "d.sqlite", "--simulate", *_ASKED),
    ],
    ids=" ".join,
)
def test_a_damaged_file_is_an_error_in_words(how, words, tmp_path, monkeypatch, capsys):
    """And what cannot be noticed, as the damage is where nothing is kept, does no harm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("microbatch.cli.plan.CACHE_PATIENCE", 0.2)
    monkeypatch.setattr(guard, "_CHECK_PATIENCE", 0.2)
    lines = "".join(f'{{"id": "{number}", "name": "thing {number}"}}\n' for number in range(200))
    Path("in.jsonl").write_text(lines)
    if words[0] in ("run", "cache"):
        main(["run", "in.jsonl", "-o", "out.jsonl", "--cache", "d.sqlite", "--simulate", *_ASKED])
    else:
        main(["spool", "d.sqlite", "--put", "in.jsonl", *_ASKED])
    Path("d.sqlite").write_bytes(damaged(Path("d.sqlite").read_bytes(), how))
    capsys.readouterr()
    status = main(list(words))
    shown = capsys.readouterr()
    assert status in (0, 1, 2)
    assert "Traceback" not in shown.err
    if how.startswith("cut"):
        assert status == 2
        assert f"microbatch {words[0]}: " in shown.err
        assert "cannot open 'd.sqlite'" in shown.err


async def test_an_error_that_quotes_what_is_no_text_is_one_of_the_file(tmp_path):
    """The module raises UnicodeDecodeError where the text of an error holds bytes of a damaged schema."""
    path = tmp_path / "d.sqlite"
    database = Database(path, SCHEMA, kind="cache", version=1, durable=False, busy=1.0)
    await database.open()
    try:

        def quote(_db):
            b"\xf1".decode()

        with pytest.raises(StorageError, match=r"d\.sqlite: the file is damaged"):
            await database.run(quote)
        with pytest.raises(StorageError, match=r"d\.sqlite: the file is damaged"):
            await database.read(quote)
    finally:
        await database.aclose()


async def test_what_goes_wrong_on_a_damaged_file_is_its_error_and_on_a_sound_one_a_bug(tmp_path):
    path = tmp_path / "d.sqlite"

    def fill(db):
        db.executemany("INSERT INTO entries VALUES (?, x'00', zeroblob(500), NULL, 0)", [(n,) for n in range(500)])

    def wrong(_db):
        raise TypeError("a row is missing")

    for sound in (True, False):
        database = Database(path, SCHEMA, kind="cache", version=1, durable=False, busy=1.0)
        await database.open()
        try:
            if sound:
                await database.run(fill)
            for act in (database.run, database.read):
                with pytest.raises(
                    TypeError if sound else StorageError, match=None if sound else "the file is damaged"
                ):
                    await act(wrong)
        finally:
            await database.aclose()
        content = path.read_bytes()
        path.write_bytes(content[: 10 * _PAGE] + bytes(20 * _PAGE) + content[30 * _PAGE :])


def test_a_damaged_name_is_an_error_of_the_spool():
    for key in ("", "[1]", '["a"]', b"\xff\xff", "[null,", None):
        with pytest.raises(StorageError, match="name of a spooled request is damaged"):
            Name.of(key)
