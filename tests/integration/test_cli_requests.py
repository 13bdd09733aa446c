"""Flags about every request of a command: headers, parameters, time limits, a proxy, a command that prints the key; and its log."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import QUESTION, given, here, output, products, summary  # noqa: F401 a fixture
from helpers import serving

from microbatch.cli.main import main
from microbatch.testing import Latency, SimulatedEndpoint

pytestmark = pytest.mark.usefixtures("here")

SECRET = "sk-never-to-be-seen"
LABELS = ("--labels", "home,other")


class Watched(SimulatedEndpoint):
    """Writes down the headers, by lower-case name, and the query of each chat completion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.headers: list[dict[str, str]] = []
        self.queries: list[dict[str, str]] = []

    async def _chat(self, request: Any) -> Any:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.queries.append(dict(request.query))
        return await super()._chat(request)


def run(endpoint: SimulatedEndpoint, *words: str, out: str = "out.jsonl") -> int:
    asked = () if "--template" in words or "--lines" in words else QUESTION
    words = tuple(word for word in words if word != "--lines")
    return main(["run", "in.jsonl", "-o", out, "--base-url", endpoint.base_url, "--model", "m", *asked, *words])


# --- headers and query parameters


@pytest.mark.parametrize("command", ["run", "warm", "calibrate"])
def test_headers_and_query_parameters_go_with_every_request(capsys, command):
    products(200 if command == "calibrate" else 40)
    more = {"run": ["-o", "out.jsonl"], "warm": ["--cache", "answers.sqlite"], "calibrate": ["--sizes", "2"]}[command]
    with serving(Watched) as endpoint:
        words = ("--header", "X-Team=a=b", "--header", f"X-Api-Key={SECRET}", "--query", "api-version=2024-10-21")
        where = ("--base-url", endpoint.base_url, "--model", "m")
        assert main([command, "in.jsonl", *where, *QUESTION, *LABELS, *words, *more]) in (0, 1)
        assert endpoint.headers
        assert all((seen["x-team"], seen["x-api-key"]) == ("a=b", SECRET) for seen in endpoint.headers)
        assert all(query == {"api-version": "2024-10-21"} for query in endpoint.queries)
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err


@pytest.mark.parametrize(
    "form", [(f"--header=X-Key={SECRET}",), ("--header", f"X-Key={SECRET}"), ("--header", f"X-Team={SECRET}")]
)
@pytest.mark.parametrize("also", [(), (f"--query=code={SECRET}",), ("--query", f"code={SECRET}")])
def test_their_values_are_neither_in_the_hint_nor_in_any_file(capsys, form, also):
    given({"id": "a", "name": "x"}, "{broken")
    with serving() as endpoint:
        assert run(endpoint, *form, *also, "--log-file", "log.txt") == 1
    shown = capsys.readouterr()
    assert "To ask for the rest" in shown.err
    assert "X-" in shown.err.rpartition("microbatch run")[2]
    assert SECRET not in shown.out + shown.err
    assert all(SECRET.encode() not in path.read_bytes() for path in Path().iterdir())
    assert "--resume" in shown.err


def test_a_proxy_s_password_is_not_shown_either(capsys):
    given({"id": "a", "name": "x"}, "{broken")
    words = ("--proxy", f"http://me:{SECRET}@127.0.0.1:9", "--give-up-after", "0", "--log-file", "log.txt")
    assert (
        main(["run", "in.jsonl", "-o", "o", "--base-url", "http://x.test/v1", "--model", "m", *QUESTION, *words]) == 1
    )
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err + Path("log.txt").read_text()


def test_a_resumed_run_has_the_same_headers_but_for_keys(capsys):
    products(4)
    given({"id": "p9", "name": "x"}, "{broken")
    with serving() as endpoint:
        assert run(endpoint, "--header", "X-Mode=fast", "--header", "X-Key=one") == 1
        assert run(endpoint, "--resume", "--header", "x-mode=fast", "--header", "X-Key=two") == 1
        capsys.readouterr()
        for other in (("--header", "X-Mode=slow"), (), ("--header", "X-Mode=fast", "--query", "v=2")):
            assert run(endpoint, "--resume", *other) == 2
            shown = capsys.readouterr().err
            assert ("--query" if "--query" in other else "--header") in shown


@pytest.mark.parametrize(
    "words",
    [
        ("--header", "no-equals"),
        ("--header", f"={SECRET}"),
        ("--query", SECRET),
        ("--param", "top_p"),
        ("--param", "effort=low"),
        ("--timeout", "0"),
        ("--idle-timeout", "-1"),
    ],
)
def test_a_malformed_value_is_refused_without_being_quoted(capsys, words):
    products(1)
    with pytest.raises(SystemExit) as ended:
        main(["run", "in.jsonl", "-o", "o", "--simulate", *QUESTION, *words])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert words[0] in told
    assert SECRET not in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--header", "A=1", "--header", "A=2"), "--header A: is given twice"),
        (("--query", "a=1", "--query", "a=2"), "--query a: is given twice"),
        (("--header", "bad name=1"), "header"),
        (("--proxy", "nowhere"), "--proxy"),
        (("--param", "model=1"), "use --model"),
        (("--param", "max_completion_tokens=1"), "use --max-tokens"),
        (("--param", "stream=true"), "--param: stream"),
        (("--param", "top_p=1", "--param", "top_p=1"), "--param top_p: is given twice"),
        (("--param", 'response_format={"type":"json_object"}', *LABELS), "--labels and --schema"),
        (("--api-key-command", "printf x", "--api-key-env", "HOME"), "only one"),
    ],
)
def test_a_wrong_command_ends_with_2_and_sends_nothing(capsys, words, told):
    products(1)
    with serving() as endpoint:
        assert run(endpoint, *words) == 2
        assert endpoint.calls == 0
    assert told in capsys.readouterr().err
    assert not Path("out.jsonl").exists() or not Path("out.jsonl").read_bytes()


# --- parameters


def test_parameters_are_sent_and_are_part_of_the_question(capsys):
    products(20)
    with serving(record=True) as endpoint:
        assert run(endpoint, *LABELS, "--param", "top_p=0.5", "--param", 'metadata={"a":"b"}') == 0
        assert len(endpoint.requests) == 2
        assert all((body["top_p"], body["metadata"]) == (0.5, {"a": "b"}) for body in endpoint.requests)
        digests = {line["digest"] for line in output()}
        assert run(endpoint, *LABELS, "--param", "top_p=0.6", "--resume") == 2
        assert "--param" in capsys.readouterr().err
        assert run(endpoint, *LABELS, "--param", "top_p=0.6", out="other.jsonl") == 0
        assert digests.isdisjoint(line["digest"] for line in output("other.jsonl"))
        calls = endpoint.calls
        assert run(endpoint, *LABELS, "--param", 'metadata={"a":"b"}', "--param", "top_p=0.5", "--resume") == 0
        assert endpoint.calls == calls


def test_a_parameter_that_cannot_be_combined_sends_items_alone(capsys):
    products(5)
    with serving() as endpoint:
        assert run(endpoint, *LABELS, "--param", "seed=7", "--json") == 0
    assert summary(capsys)["alone_by_field"] == {"seed": 5}


def test_a_line_s_own_parameter_comes_first():
    def line(number: int, **body: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"thing {number}"}]
        return {"custom_id": f"r{number}", "body": {"messages": messages, **body}}

    given(line(0), line(1, top_p=0.1))
    with serving(record=True) as endpoint:
        assert run(endpoint, "--lines", "--param", "top_p=0.5", "--param", 'user="u"') == 0
    assert sorted((body["top_p"], body["user"]) for body in endpoint.requests) == [(0.1, "u"), (0.5, "u")]


def test_a_schema_and_parameters_are_both_sent():
    products(3)
    shape = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    Path("schema.json").write_text(json.dumps(shape))
    with serving(record=True) as endpoint:
        assert run(endpoint, "--schema", "schema.json", "--param", "top_p=0.5") == 0
    assert endpoint.requests[0]["top_p"] == 0.5
    assert all(isinstance(line["output"]["n"], int) for line in output())


# --- time limits and the proxy


def test_an_attempt_that_takes_longer_than_its_timeout_fails(capsys):
    products(1)
    with serving(latency=Latency(first_token=60)) as endpoint:
        assert run(endpoint, "--timeout", "0.3", "--give-up-after", "0") == 1
    assert "within 0.3 s (timeout)" in capsys.readouterr().err


def test_a_silent_stream_fails_after_its_idle_timeout():
    products(8)
    with serving(latency=Latency(first_token=0, tokens_per_second=0.01)) as endpoint:
        words = ("--timeout", "1", "--idle-timeout", "0.3", "--give-up-after", "0", "--log-file", "log.txt")
        assert run(endpoint, *LABELS, *words) == 1
    assert "nothing for 0.3 s (idle_timeout)" in Path("log.txt").read_text()


def test_requests_go_through_the_proxy():
    products(3)
    with serving(Watched) as proxy:
        words = ("--base-url", "http://endpoint.test/v1", "--proxy", f"http://127.0.0.1:{proxy.port}")
        assert main(["run", "in.jsonl", "-o", "out.jsonl", "--model", "m", *QUESTION, *LABELS, *words]) == 0
        assert proxy.headers[0]["host"] == "endpoint.test"


# --- a command that prints the key

SCRIPT = """
import pathlib
count = pathlib.Path("count")
times = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(times))
print(f"  key-{times}  ")
"""


def script(text: str = SCRIPT) -> tuple[str, str]:
    Path("key.py").write_text(text)
    return "--api-key-command", shlex.join([sys.executable, "key.py"])


def test_the_key_is_what_the_command_prints(capsys):
    products(20)
    with serving(api_keys={"key-1"}) as endpoint:
        assert run(endpoint, *LABELS, *script()) == 0
    assert Path("count").read_text() == "1"
    shown = capsys.readouterr()
    assert "key-1" not in shown.out + shown.err


def test_a_key_that_is_refused_is_asked_for_again():
    products(20)
    with serving(api_keys={"key-2"}) as endpoint:
        assert run(endpoint, *LABELS, *script()) == 0
    assert Path("count").read_text() == "2"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--api-key-command", "no-such-command --at-all"), "cannot run 'no-such-command'"),
        (("--api-key-command", "unclosed 'quote"), "quotation"),
        (("--api-key-command", "  "), "must name a command"),
        (("exit", f"print('{SECRET}'); raise SystemExit(3)"), "ended with status 3"),
        (("exit", ""), "printed no key"),
        (("exit", f"print('{SECRET}'); print('{SECRET}')"), "printed no key"),
    ],
)
def test_a_command_that_prints_no_key_is_noticed_before_anything_is_sent(capsys, words, told):
    products(1)
    if words[0] == "exit":
        words = script(words[1])
    with serving() as endpoint:
        assert run(endpoint, *words) == 2
        assert endpoint.calls == 0
    shown = capsys.readouterr().err
    assert told in shown
    assert SECRET not in shown


def test_a_dry_run_and_a_simulation_do_not_run_it():
    products(1)
    assert main(["run", "in.jsonl", "--dry-run", "--model", "m", *QUESTION, *script()]) == 0
    assert main(["run", "in.jsonl", "-o", "out.jsonl", "--simulate", *QUESTION, *script()]) == 0
    assert not Path("count").exists()


# --- what is printed and logged


def test_quiet_prints_nothing_when_all_is_well(capsys):
    products(400)  # enough for the warning that combining is dearer
    with serving() as endpoint:
        assert run(endpoint, "--quiet", "--progress") == 0
        assert run(endpoint, "--quiet", "--resume") == 0
    assert capsys.readouterr() == ("", "")
    with serving() as endpoint:
        assert run(endpoint, "--quiet", "--json", out="other.jsonl") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["answered"] == 400
    assert shown.err == ""


def test_quiet_still_prints_errors(capsys):
    given({"id": "a", "name": "x"}, "{broken")
    with serving() as endpoint:
        assert run(endpoint, "--quiet") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "it is not JSON" in shown.err


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_the_log_has_a_line_for_each_call_and_each_warning_and_no_text(capsys, quiet):
    products(400)
    logger = logging.getLogger("microbatch")
    before = (logger.level, [*logger.handlers])
    with serving() as endpoint:
        assert run(endpoint, "--log-file", "log.txt", *quiet) == 0
    text = Path("log.txt").read_text()
    assert text.count("batch call of 16, m, 1 attempts") == 25
    assert "WARNING no price is known" in text
    assert "thing 1" not in text
    assert ("no price is known" in capsys.readouterr().err) is not bool(quiet)
    assert (logger.level, [*logger.handlers]) == before
    with serving() as endpoint:
        assert run(endpoint, "--log-file", "log.txt", out="other.jsonl") == 0
    assert Path("log.txt").read_text().startswith(text), "it is appended to"


@pytest.mark.parametrize("content", ["", "id,text\n"])
@pytest.mark.parametrize(
    "words",
    [
        ("run", "-o", "out.csv", "--simulate"),
        ("run", "--dry-run", "--simulate"),
        ("warm", "--cache", "c.sqlite", "--simulate"),
        ("spool", "s.sqlite", "--put", "--model", "m"),
    ],
)
def test_an_input_without_records_is_told_and_no_error(capsys, words, content):
    Path("x.csv").write_text(content)
    command, *rest = words
    given = [*rest, "x.csv"] if "--put" not in rest else [*rest[:2], "x.csv", *rest[2:]]
    for quiet in (() if command == "spool" else ("--quiet",), ()):
        assert main([command, *given, "--template", "{text}", *quiet]) == 0
        assert ("x.csv: no records.\n" in capsys.readouterr().err) is not bool(quiet)
        for path in Path().glob("out.csv*"):
            path.unlink()


def test_a_log_that_cannot_be_written_is_noticed_first(capsys):
    products(1)
    with serving() as endpoint:
        assert run(endpoint, "--log-file", "no/such/folder/log.txt") == 2
        assert endpoint.calls == 0
    assert "--log-file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--proxy", "ftp://x"), "--proxy must be an address such as http://localhost:3128, beginning with http"),
        (("--base-url", "http://127.0.0.1:9/v1?a=b"), "a query or a fragment; parameters go into --query\n"),
        (("--base-url", "http://u:p@127.0.0.1:9/v1"), "use --header for credentials\n"),
        (
            ("--base-url", "127.0.0.1:9/v1"),
            "--base-url must be an address such as https://api.openai.com/v1, beginning",
        ),
        (("--base-url", "http://a..b/v1"), "--base-url must be an address such as https://api.openai.com/v1\n"),
        (("--proxy", f"http://{'x' * 64}:80"), "--proxy must be an address such as http://localhost:3128\n"),
        (("--param", "stream=true"), "--param: stream: the command decides it itself"),
        (("--param", "messages=[]"), "--param: messages: the command decides it itself"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_in_the_words_of_the_command(capsys, words, told):
    products(1)
    base = () if "--base-url" in words else ("--base-url", "http://127.0.0.1:9/v1")
    assert main(["run", "in.jsonl", "-o", "out.jsonl", *QUESTION, "--model", "m", *base, *words]) == 2
    assert told in capsys.readouterr().err
