"""`serve --workers`: even shares, one account of all, and workers that end, are ended and are replaced."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import ClientSession, ServerDisconnectedError, TCPConnector, web
from certificates import make_certificate, trusting
from gateway_world import MODEL, QUICK, Watched, connection, post, recorder, serve, status
from helpers import ask
from prometheus_client.parser import text_string_to_metric_families
from worker_storm import storm

import microbatch
from microbatch.cli.main import main, make_parser
from microbatch.cli.plan import read_rate_limit
from microbatch.cli.workers.supervisor import FIRST_PAUSE, LONGEST_PAUSE, pause_after
from microbatch.cli.workers.work import Work
from microbatch.cli.workers.worker import CONNECTION
from microbatch.gateway import Gateway
from microbatch.testing import Latency

pytestmark = pytest.mark.slow

NOWHERE = ("--upstream", "http://127.0.0.1:9/v1", "--port", "0", "--workers", "2")
LONG = 120  # seconds in which even a loaded machine starts two processes


def chat(text="x", **more):
    return {"model": MODEL, "messages": ask(text), **more}


def children(pid):
    """The processes that *pid* has started."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def sockets(pid):
    """How many sockets the process has open."""
    found = 0
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found += str(each.readlink()).startswith("socket:")
        except FileNotFoundError:
            continue
    return found


async def eventually(condition):
    """Wait until the condition, a coroutine function or not, holds."""
    async with asyncio.timeout(LONG):
        while True:
            found = condition()
            if await found if asyncio.iscoroutine(found) else found:
                return
            await asyncio.sleep(0.05)


@asynccontextmanager
async def workers(upstream, *words, count=2, **environment):
    flags = ("--upstream", upstream if isinstance(upstream, str) else upstream.base_url, "--workers", str(count))
    async with serve(*flags, "--port", "0", *words, **environment) as served:
        yield served


async def figures(session, served):
    async with session.get(f"http://127.0.0.1:{served.port}/stats") as answer:
        return await answer.json()


async def metrics(session, served):
    async with session.get(f"http://127.0.0.1:{served.port}/metrics") as answer:
        text = await answer.text()
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def slow(seconds):
    return Watched(latency=Latency(first_token=seconds, tokens_per_second=0))


def fresh(**options):
    """A session with a connection of its own for each request, so that all workers get some."""
    return ClientSession(connector=TCPConnector(force_close=True, **options))


async def ask_for(session, served, count, **headers):
    async def one(number):
        address = f"http://127.0.0.1:{served.port}/v1/chat/completions"
        async with session.post(address, json=chat(f"t{number}"), headers=headers) as answer:
            assert answer.status == 200
            assert (await answer.json())["choices"][0]["message"]["content"] == f"re: t{number}"
            return answer.headers

    return await asyncio.gather(*map(one, range(count)))


@pytest.mark.promise(of="workers")
async def test_a_storm_loses_nothing_and_each_request_is_one_line(tmp_path):
    outcome = await storm(requests=400, clients=16, workers=2, folder=tmp_path)
    assert outcome.faults == []
    assert outcome.answered >= 400
    assert outcome.resent_for_reloads == 0
    assert outcome.calls < outcome.answered


async def test_connections_are_shared_evenly_and_figures_are_sums():
    async with Watched() as upstream, workers(upstream, count=3) as served, fresh() as session:
        pids = children(served.process.pid)
        assert len(pids) == 3
        before = [sockets(pid) for pid in pids]
        async with AsyncExitStack() as open_ones:
            for _ in range(30):
                await open_ones.enter_async_context(connection(served.port))
            await eventually(lambda: [sockets(pid) - had for pid, had in zip(pids, before, strict=True)] == [10] * 3)
        found = await ask_for(session, served, 60, Authorization="Bearer sk-someone-s-own")
        # All workers name a caller alike, though no secret was given.
        assert len({headers["X-Microbatch-Caller"] for headers in found}) == 1
        for _ in range(6):  # by whichever worker
            stats = await figures(session, served)
            assert (stats["items"], stats["answered"]) == (60, 60)
            assert sum(row[1] for row in stats["live"]["hour"]["callers"]) == 60
            assert len(stats["live"]["hour"]["callers"]) == 1
            assert stats["live"]["workers"] == {"up": 3, "wanted": 3}
            counted = await metrics(session, served)
            asked = [value for name, value in counted.items() if name[0] == "microbatch_requests_total"]
            assert sum(asked) == 60


async def ready(session, served):
    async with session.get(f"http://127.0.0.1:{served.port}/readyz") as answer:
        return answer.status == 200


async def test_a_worker_that_is_killed_is_replaced_and_its_answers_and_figures_stay(tmp_path):
    cache = ("--cache", str(tmp_path / "cache.sqlite"))
    async with Watched() as upstream, workers(upstream, *cache) as served, fresh() as session:
        pid = served.process.pid
        await ask_for(session, served, 20)

        async def all_are_stored():
            return (await figures(session, served))["cache_stores"] == 20

        await eventually(all_are_stored)
        first, second = children(pid)
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: first not in children(pid))
        # The other one serves meanwhile, and knows what the first has answered.
        await ask_for(session, served, 20)
        await eventually(lambda: len(children(pid)) == 2)
        assert second in children(pid)
        await eventually(lambda: ready(session, served))
        stats = await figures(session, served)
        assert (stats["answered"], stats["cache_hits"], stats["queued"], stats["in_flight"]) == (40, 20, 0, 0)
        served.stop()
        code, _, said = await served.ended()
    assert code == 0
    assert f"worker {first} was ended by SIGKILL; another one starts" in said
    assert "served 40 chat completions" in said


async def test_only_the_clients_of_a_killed_worker_notice():
    async with slow(2) as upstream, workers(upstream) as served, fresh() as session:
        asked = [asyncio.create_task(ask_for(session, served, 1)) for _ in range(6)]

        async def all_are_under_way():
            return (await figures(session, served))["queued"] == 6 or upstream.calls >= 2

        await eventually(all_are_under_way)
        os.kill(children(served.process.pid)[0], signal.SIGKILL)
        ended = await asyncio.gather(*asked, return_exceptions=True)
    broken = [error for error in ended if isinstance(error, ServerDisconnectedError | ConnectionError)]
    assert 0 < len(broken) < 6
    assert sum(isinstance(each, list) for each in ended) + len(broken) == 6


async def test_a_signal_to_a_worker_replaces_it_and_answers_what_it_has():
    async with slow(1) as upstream, workers(upstream) as served, fresh() as session:
        asked = asyncio.create_task(ask_for(session, served, 8))
        await eventually(lambda: upstream.calls)
        before = children(served.process.pid)
        os.kill(before[0], signal.SIGTERM)
        assert len(await asked) == 8
        await eventually(lambda: before[0] not in children(served.process.pid))
        await eventually(lambda: len(children(served.process.pid)) == 2)


async def test_a_reload_with_a_wrong_file_changes_nothing(tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text("{}")
    async with Watched() as upstream, workers(upstream, "--prices", str(prices)) as served, fresh() as session:
        before = children(served.process.pid)
        prices.write_text("broken")
        served.process.send_signal(signal.SIGHUP)
        await told(served, "Not reloaded")
        assert set(before) <= set(children(served.process.pid))
        await ask_for(session, served, 4)
        assert await ready(session, served)
        prices.write_text(json.dumps({MODEL: {"input": 1, "output": 1}}))
        served.process.send_signal(signal.SIGHUP)
        await told(served, "Reloaded: 2 workers replaced.")
        await ask_for(session, served, 4)


async def test_the_end_of_the_supervisor_ends_the_workers_when_they_have_answered():
    async with slow(1) as upstream, workers(upstream) as served, fresh() as session:
        pids = children(served.process.pid)
        asked = asyncio.create_task(ask_for(session, served, 4))
        await eventually(lambda: upstream.calls >= 2)
        served.process.kill()
        assert len(await asked) == 4
        await eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


async def test_streams_end_in_peace_while_workers_are_replaced_and_stopped():
    go = asyncio.Event()

    async def answer(request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: {}\n\n")
        await go.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    async with recorder() as upstream:
        upstream.answer = answer
        async with workers(upstream.url) as served, AsyncExitStack() as streams, fresh() as session:
            readers = []
            for _ in range(4):
                reader, writer = await streams.enter_async_context(connection(served.port))
                writer.write(post(json.dumps(chat(n=2, stream=True)).encode()))
                await reader.readuntil(b"data: {}")
                readers.append(reader)
            before = children(served.process.pid)
            served.process.send_signal(signal.SIGHUP)
            await told(served, "Reloaded: 2 workers replaced.")
            assert len(set(children(served.process.pid)) - set(before)) == 2
            served.stop()

            async def draining():
                async with session.get(f"http://127.0.0.1:{served.port}/readyz") as answer:
                    return answer.status == 503 and (await answer.json())["status"] == "draining"

            await eventually(draining)
            assert set(before) <= set(children(served.process.pid))
            go.set()
            for reader in readers:
                assert b"data: [DONE]" in await reader.read()
            assert (await served.ended())[0] == 0


async def told(served, words):
    """Wait until the gateway has written *words* to stderr."""
    async with asyncio.timeout(LONG):
        while words not in (line := (await served.process.stderr.readline()).decode()):
            assert line


async def test_it_is_ready_when_all_workers_are_and_not_before():
    async with Watched() as upstream, fresh() as session, workers(upstream, count=3) as served:
        # The address is told when all are up.
        assert await ready(session, served)
        os.kill(children(served.process.pid)[0], signal.SIGKILL)

        async def one_is_missing():
            async with session.get(f"http://127.0.0.1:{served.port}/readyz") as answer:
                return answer.status == 503 and (await answer.json()) == {
                    "status": "starting",
                    "workers": 2,
                    "wanted": 3,
                }

        await eventually(one_is_missing)
        await eventually(lambda: ready(session, served))


async def test_tls_and_unix_sockets_work_with_workers(tmp_path):
    certificate, key = make_certificate(tmp_path)
    path = tmp_path / "s"
    flags = ("--tls-cert", str(certificate), "--tls-key", str(key), "--uds", str(path))
    async with Watched() as upstream, workers(upstream, *flags) as served:
        assert served.base_url == "https://localhost/v1"
        secured = {"ssl": trusting(certificate), "server_hostname": "localhost"}
        reader, writer = await asyncio.open_unix_connection(str(path), **secured)
        writer.write(post(json.dumps(chat()).encode()))
        assert status(await reader.read()) == 200
        writer.close()
        served.stop()
        assert (await served.ended())[0] == 0
        assert not path.exists()


async def test_workers_write_one_log_to_standard_output_without_torn_lines():
    async with (
        Watched(latency=QUICK) as upstream,
        workers(upstream, "--access-log", "-") as served,
        fresh(limit=32) as session,
    ):
        reading = asyncio.create_task(served.process.stdout.read())
        for _ in range(10):
            await ask_for(session, served, 100)
        served.stop()
        written = [json.loads(line) for line in (await reading).splitlines()]
        assert await served.process.wait() == 0
    assert len(written) == len({line["id"] for line in written}) == 1_000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--budget-usd", "1"), "--workers with a budget needs --budget-store"),
        (("--rpm", "1"), "--rpm 1 cannot be divided among 2 workers"),
        (("--upstream", "nowhere"), "--upstream must be an address"),
        (("--secret-file", "none"), "--secret-file none: "),
        (("--access-log", "none/log"), "the access log none/log cannot be opened"),
        (("--tls-cert", "none"), "the TLS file none cannot be read"),
    ],
)
def test_wrong_settings_are_told_once_and_end_with_2(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *NOWHERE, *words]) == 2
    assert capsys.readouterr().err.count(told) == 1


async def test_workers_take_no_modules_from_the_current_directory(tmp_path):
    (tmp_path / "aiohttp.py").write_text("import pathlib; pathlib.Path('taken').touch()")
    root = Path(microbatch.__file__).parent.parent
    async with Watched() as upstream, asyncio.timeout(LONG):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "microbatch", "serve", *NOWHERE, "--upstream", upstream.base_url),
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdout=asyncio.subprocess.PIPE,
        )
        assert await process.stdout.readline()
        process.terminate()
        assert await process.wait() == 0
    assert not (tmp_path / "taken").exists()


def test_pauses_before_another_start_grow_to_a_limit_and_never_fail():
    pauses = [pause_after(failures) for failures in range(12)]
    assert pauses[:3] == [0.0, FIRST_PAUSE, 2 * FIRST_PAUSE]
    assert pauses == sorted(pauses)
    assert {pauses[-1], pause_after(2_000), pause_after(10**9)} == {LONGEST_PAUSE}


async def test_a_connection_that_is_lost_for_want_of_a_descriptor_is_said_to_have_ended():
    messages, other = socket.socketpair()
    theirs, door = socket.socketpair()
    work = Work((messages, door), Gateway, workers=1, grace=1.0)
    with messages, other, theirs, door:
        door.setblocking(False)
        theirs.send(CONNECTION)  # without the connection: the kernel drops what finds no descriptor
        work._take_in()
        theirs.settimeout(10)
        assert theirs.recv(10) == CONNECTION


async def test_a_taken_port_is_told():
    async with Watched() as upstream:
        with pytest.raises(AssertionError, match="choose another --port"):
            async with serve("--upstream", upstream.base_url, "--workers", "2", "--port", str(upstream.port)):
                pass


async def test_a_limit_is_divided_and_that_is_told():
    async with Watched() as upstream, workers(upstream, "--rpm", "100", "--tpm", "2001") as served:
        await told(served, "--rpm 100 is divided: 50 for each worker")
        await told(served, "--tpm 2001 is divided: 1,000 for each worker")
    args = make_parser().parse_args(["serve", "--rpm", "100"])
    assert read_rate_limit(args, processes=4).share == 0.25
    assert read_rate_limit(args).share == 1.0
