"""A Redis server of the tests' own: real, empty, on a free port, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Self

import pytest
import redis
from ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PATIENCE = 30.0
_SLOTS = 16_384  # of a cluster
_TRIES = 5  # as somebody else may take a port between our finding it free and the server's binding it


class RedisServer:
    """A `redis-server` process on 127.0.0.1.

    Args:
        folder: Where it may write.
        appendonly: Whether it keeps what it is told on disk, so that it knows it again after `stop` or `kill` and `start`.
            Otherwise it writes nothing.
        port: None looks for a free one, which stays this server's for all its starts.
        settings: Further settings, by name; the words of a value are apart by blanks.

    Attributes:
        url: Its address.
    """

    def __init__(self, folder: Path, *, appendonly: bool = False, port: int | None = None, **settings: str) -> None:
        self._folder = folder
        self._appendonly = appendonly
        self._settings = {name.replace("_", "-"): value for name, value in settings.items()}
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _protocol(self) -> int | None:
        """The version that is spoken with it; None for the client's own. The third needs HELLO."""
        return 2 if "HELLO" in self._settings.get("rename-command", "") else None

    @property
    def bus_port(self) -> int:
        """The port on which it speaks with the others of its cluster."""
        return int(self._settings["cluster-port"])

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """A client that blocks, for tests to look in with; to be closed, best by `with`."""
        return redis.Redis.from_url(self.url, socket_timeout=_PATIENCE, protocol=self._protocol)

    def start(self) -> None:
        for _ in range(1 if self.port else _TRIES):
            port = self.port or free_port()
            if self._starts_on(port):
                self.port = port
                return
        raise RuntimeError(f"redis-server does not start: {(self._folder / 'redis.log').read_text()[-2_000:]}")

    def _starts_on(self, port: int) -> bool:
        settings = {
            "bind": "127.0.0.1",
            "port": str(port),
            "dir": str(self._folder),
            "logfile": str(self._folder / "redis.log"),
            "save": "",
            "appendonly": "yes" if self._appendonly else "no",
            "appendfsync": "always",
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        words += [word for name, value in self._settings.items() for word in (f"--{name}", *value.split())]
        process = self._process = subprocess.Popen([_binary(), *words], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and process.poll() is None:
            options = {"socket_timeout": 1, "retry": None, "protocol": self._protocol}
            with contextlib.suppress(redis.RedisError), redis.Redis(port=port, **options) as client:
                # Another test's server may have taken the port first.
                return client.info("server")["process_id"] == process.pid or self._given_up()
            time.sleep(0.02)
        return self._given_up()

    def _given_up(self) -> bool:
        self.kill()
        return False

    def stop(self) -> None:
        """End it in good order, if it runs."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power cut does, if it runs."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)  # one that is paused would never read the other
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def pause(self) -> None:
        """Let it hang: the kernel still accepts connections, and nothing is ever answered."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on, with what it was told meanwhile."""
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def redis_cluster(folder: Path, nodes: int, **settings: str) -> Iterator[list[RedisServer]]:
    """Run a cluster of so many servers with *settings*, which share the slots evenly."""
    with contextlib.ExitStack() as stack:
        servers = []
        for number in range(nodes):
            (own := folder / str(number)).mkdir()
            bus = {"cluster_port": str(free_port())}
            servers.append(stack.enter_context(RedisServer(own, cluster_enabled="yes", **bus, **settings)))
        clients = [stack.enter_context(server.client()) for server in servers]
        for number, client in enumerate(clients):
            first, last = (_SLOTS * which // nodes for which in (number, number + 1))
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, last - 1)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            if number:
                met = servers[0]
                client.execute_command("CLUSTER MEET", "127.0.0.1", met.port, met.bus_port)
        deadline = time.monotonic() + _PATIENCE
        while not all(_is_whole(client, nodes) for client in clients):
            if time.monotonic() > deadline:
                raise RuntimeError("the cluster does not form")
            time.sleep(0.05)
        yield servers


def _is_whole(client: redis.Redis, nodes: int) -> bool:
    info = client.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_size"]) == nodes


def _binary() -> str:
    """The path of the server; without it the test is skipped, or fails where it has to run."""
    found = shutil.which("redis-server")
    if found is None:
        reason = "redis-server is not on the PATH"
        if os.environ.get("MICROBATCH_REQUIRE_REDIS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all tests of a process; use `redis_server`, which empties it."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """An empty server that runs; it writes nothing to disk. A test that stops or pauses it starts one of its own."""
    with shared_redis.client() as client:
        client.flushall()
    return shared_redis


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The address of an empty server."""
    return redis_server.url


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of this test alone, to be stopped, killed and paused at will; it writes nothing to disk."""
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def durable_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of this test alone that keeps what it is told (`appendonly yes`, `appendfsync always`)."""
    with RedisServer(tmp_path, appendonly=True) as server:
        yield server
