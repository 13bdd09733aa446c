"""The place at which a gateway listens: a TCP port, or a Unix socket."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

BACKLOG: Final = 1_024
"""Most connections of a socket that wait to be accepted; the system may have a lower limit."""

_ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors of an address that this machine does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The place at which a gateway listens.

    Attributes:
        host: Address or name, all of whose addresses count.
        port: TCP port; 0 for a free one.
        uds: Path of a Unix socket, which is used in place of host and port; None for none.
        uds_mode: Permissions of that socket.
    """

    host: str = "127.0.0.1"
    port: int = 0
    uds: str | None = None
    uds_mode: int = 0o600

    def __str__(self) -> str:
        """Return the address for messages."""
        return self.uds if self.uds is not None else f"{self.host}:{self.port}"

    def remedy(self, error: OSError) -> str:
        """Return advice for a user who cannot listen here because of *error*."""
        if self.uds is not None:
            return "choose another --uds"
        # asyncio gives no number if none of several addresses can be used.
        if isinstance(error, socket.gaierror) or error.errno in {*_ABSENT, None}:
            return "choose a --host that is an address of this machine, such as 127.0.0.1"
        return "choose another --port, or 0 for a free one"

    def listen(self) -> list[socket.socket]:
        """Return sockets that listen here.

        Raises:
            OSError: They cannot, for example because another process does.
        """
        return self._listen_on_port() if self.uds is None else [_listen_on_path(self.uds, self.uds_mode)]

    def _listen_on_port(self) -> list[socket.socket]:
        found = socket.getaddrinfo(self.host or None, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sockets: list[socket.socket] = []
        absent: OSError | None = None
        for family, kind, protocol, _, address in dict.fromkeys(found):
            port = sockets[0].getsockname()[1] if sockets else self.port
            try:
                sockets.append(_bound(family, kind, protocol, (address[0], port, *address[2:])))
            except OSError as error:
                # A name may have an address of a family that this machine does not use.
                if error.errno not in _ABSENT:
                    close_all(sockets)
                    raise
                absent = error
        if not sockets and absent is not None:
            raise absent
        for each in sockets:
            each.listen(BACKLOG)
        return sockets


def _bound(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except BaseException:
        made.close()
        raise
    return made


def _listen_on_path(path: str, mode: int) -> socket.socket:
    """Return a Unix socket that listens at *path*; the socket of a process that has ended is replaced."""
    _check_unused(path)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # It takes its name when it is complete: nothing is refused meanwhile, nor allowed that *mode* forbids.
    unready = f"{path}.{os.getpid()}"
    try:
        made.setblocking(False)
        try:
            made.bind(unready)
        except OSError as error:
            if error.errno is None:  # Python's own check of the length
                raise OSError(errno.ENAMETOOLONG, "the path of a Unix socket may have about 100 bytes") from None
            raise
        Path(unready).chmod(mode)
        made.listen(BACKLOG)
        Path(unready).rename(path)
    except BaseException:
        made.close()
        with suppress(OSError):
            Path(unready).unlink()
        raise
    return made


def _check_unused(path: str) -> None:
    try:
        kind = Path(path).lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise OSError(errno.EEXIST, "there is a file of this name that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:
            pass  # its backlog is full
    raise OSError(errno.EADDRINUSE, "another process listens there")


def identity(path: str) -> tuple[int, int] | None:
    """Return what tells the file at *path* from another one of this name; None if there is none."""
    try:
        found = Path(path).lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def remove_socket(path: str, made: tuple[int, int] | None) -> None:
    """Remove the Unix socket at *path*, unless it is another one than that whose `identity` was *made*."""
    if made is not None and identity(path) == made:
        with suppress(OSError):
            Path(path).unlink()


def close_all(sockets: Sequence[socket.socket]) -> None:
    """Close *sockets*."""
    for each in sockets:
        each.close()


def origin_of(place: Place, port: int, *, tls: bool) -> str:
    """Return the scheme and the host of the addresses of a server at *place*, which has the *port*; "" without a port."""
    scheme = "https" if tls else "http"
    if place.uds is not None:
        return f"{scheme}://localhost"
    host = f"[{place.host}]" if ":" in place.host else place.host  # RFC 3986: IPv6 addresses in brackets
    return f"{scheme}://{host}:{port}" if port else ""
