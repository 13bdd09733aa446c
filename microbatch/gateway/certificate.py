"""The TLS certificate of a server, in files that may be replaced."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Final

from microbatch.errors import ConfigError

_CERTIFICATE: Final = re.compile(rb"-----BEGIN [A-Z0-9 ]*CERTIFICATE-----")
_KEY: Final = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----")


class Certificate:
    """A TLS certificate with its key, in files that may be replaced.

    Args:
        certificate: File with the certificate and those that lead to its issuer, in PEM.
        key: File with the private key, in PEM; None if it is in the same file.

    Attributes:
        context: What servers use.

    Raises:
        ConfigError: A file cannot be read, the key is encrypted, or does not belong to the certificate.
    """

    def __init__(self, certificate: str, key: str | None = None) -> None:
        self._files = (certificate, key)
        self.context: ssl.SSLContext = self._loaded()
        self._latest = self.context
        self.context.sni_callback = self._use_latest  # called for each connection, with a name or without

    def reload(self) -> None:
        """Read the files again, for connections that begin from now on; if that fails, raise and keep what was read before."""
        # A context of its own: one keeps a certificate for each type of key, and would go on using an old one of another type.
        self._latest = self._loaded()

    def _use_latest(self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _first: ssl.SSLContext) -> None:
        connection.context = self._latest

    def _loaded(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        certificate, key = self._files
        for path in filter(None, self._files):
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise ConfigError(f"the TLS file {path} cannot be read: {error.strerror}") from None
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
        except _EncryptedKeyError:
            raise ConfigError(f"the TLS key {key or certificate} is encrypted; give one that is not") from None
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise ConfigError(f"the TLS key {key or certificate} does not belong to the certificate") from None
            raise ConfigError(
                _lack(certificate, key)
                or f"the TLS files {certificate} and {key or certificate} cannot be used ({error.reason or 'damaged PEM'})"
            ) from None
        return context


def _lack(certificate: str, key: str | None) -> str | None:
    """Return what is missing in the files, None if each has what looks like it."""
    if not _CERTIFICATE.search(Path(certificate).read_bytes()):
        return f"the TLS file {certificate} holds no certificate in PEM"
    if not _KEY.search(Path(key or certificate).read_bytes()):
        remedy = "; give the file of the key as tls_key=" if key is None else ""
        return f"the TLS file {key or certificate} holds no private key in PEM{remedy}"
    return None


class _EncryptedKeyError(Exception):
    pass


def _no_password() -> str:
    raise _EncryptedKeyError
