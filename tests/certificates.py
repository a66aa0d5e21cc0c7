"""Certificates for tests of mutual TLS: an authority, servers on this machine, and clients."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from client.look import Certificates


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class Authority:
    """It certifies whom it is asked to."""

    def __init__(self, name: str = "Auditors") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.pem = self._sign(self._name, self._key, x509.BasicConstraints(ca=True, path_length=0), [])

    def issue(self, name: str, *, server: bool) -> tuple[bytes, bytes]:
        """(certificate, key), for 127.0.0.1 and localhost if for a server."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        more: list[x509.ExtensionType] = [x509.ExtendedKeyUsage([usage])]
        if server:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            more.append(x509.SubjectAlternativeName([x509.DNSName("localhost"), address]))
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        return self._sign(subject, key, x509.BasicConstraints(ca=False, path_length=None), more), _pem(key)

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        constraints: x509.BasicConstraints,
        more: list[x509.ExtensionType],
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(constraints, critical=True)
        )
        for extension in more:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


def of(authority: Authority, name: str, *, server: bool, trusts: Authority | None = None) -> Certificates:
    chain, key = authority.issue(name, server=server)
    return Certificates(chain, key, (trusts or authority).pem)


def written(folder: Path, certificates: Certificates) -> dict[str, Path]:
    """As files with the names of the options: cert, key (mode 0600) and ca."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    parts = {"cert": certificates.chain, "key": certificates.key, "ca": certificates.authority}
    for name, data in parts.items():
        found[name] = folder / f"{name}.pem"
        found[name].write_bytes(data)
        found[name].chmod(0o600)
    return found


def options(files: dict[str, Path]) -> list[str | Path]:
    return [part for name, path in files.items() for part in (f"--{name}", path)]
