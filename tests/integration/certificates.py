"""TLS certificates for tests, made by openssl."""

from __future__ import annotations

import ssl
import subprocess

KINDS = {"ec": ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"), "rsa": ("rsa:2048",)}


def make_certificate(folder, name="one", *, password=None, kind="ec"):
    """Return the paths of a certificate for localhost and of its key, which is of a *kind*."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    secrecy = ["-noenc"] if password is None else ["-passout", f"pass:{password}"]
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", *KINDS[kind], "-days", "2"),
            *("-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate, *secrecy),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


def trusting(*certificates):
    """Return what clients use that trust *certificates*."""
    context = ssl.create_default_context()
    for each in certificates:
        context.load_verify_locations(each)
    return context
