"""`--limit-store`: runs, gateways and workers keep `--rpm` and `--tpm` together."""

import pytest
from command_line import QUESTION, here, products, summary  # noqa: F401 a fixture

from microbatch.cli.main import main, make_parser

pytestmark = [pytest.mark.slow, pytest.mark.promise(of="shared_limits"), pytest.mark.usefixtures("here")]

RUN = ("run", "in.jsonl", "-o", "out.jsonl", *QUESTION, "--simulate", "--json")


def states(server):
    with server.client() as client:
        return [client.hgetall(key) for key in client.scan_iter("microbatch:limit:*:state")]


def test_two_runs_have_one_limit(redis_server, capsys):
    products(40)
    for number in range(2):
        words = ("--limit-store", redis_server.url, "--rpm", "6000", "--single", "-o", f"out{number}.jsonl")
        assert main([*RUN, *words]) == 0
        assert summary(capsys)["answered"] == 40
    (state,) = states(redis_server)
    assert int(state[b"total1"]) == 80
    assert int(state[b"members"]) == 0


def test_a_dry_run_draws_nothing(redis_server, capsys):
    products(4)
    assert main([*RUN, "--dry-run", "--limit-store", redis_server.url, "--rpm", "60"]) == 0
    assert summary(capsys)["answered"] == 4
    assert states(redis_server) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--limit-store", "redis://127.0.0.1:1/0"), "--limit-store needs --rpm or --tpm"),
        (("--limit-store", "localhost:6379", "--rpm", "10"), "write redis://host:6379/0"),
    ],
)
def test_a_wrong_flag_is_a_usage_error(words, complaint, capsys):
    products(1)
    assert main([*RUN, *words]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("run", "in.jsonl", "-o", "out.jsonl"),
        ("serve", "--upstream", "http://127.0.0.1:1/v1"),
        ("worker", "spool.sqlite"),
        ("calibrate", "in.jsonl"),
        ("warm", "in.jsonl", "--cache", "c.sqlite"),
    ],
)
def test_every_command_with_a_limit_takes_a_store(words):
    parsed = make_parser().parse_args([*words, "--rpm", "10", "--limit-store", "redis://127.0.0.1:1/0"])
    assert parsed.limit_store == "redis://127.0.0.1:1/0"
