"""A federation's own certificate authority and its server's certificate (RFC 5280), P-256.

The authority certifies this one server, and auditors for `confide client serve`. Sites trust it and nothing
else, so no public authority can put another server in its place.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError
from common.files import write_atomically
from common.identity import create_private, make_folder, read_private

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397
_LOCAL = ("localhost", "127.0.0.1")  # gate and SuperLink speak over the loopback
_MAX_PEM_BYTES = 16 * 1024
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
_EARLY = datetime.timedelta(hours=1)  # clocks differ


@dataclass(frozen=True)
class TlsFolder:
    """Names of what lies in a federation's `tls` folder."""

    path: Path

    @property
    def authority_key(self) -> Path:
        return self.path / "ca.key"

    @property
    def authority(self) -> Path:
        """What sites trust. While an authority is being replaced it holds both."""
        return self.path / "ca.pem"

    @property
    def server_key(self) -> Path:
        return self.path / "server.key"

    @property
    def server(self) -> Path:
        return self.path / "server.pem"


def create_authority(folder: TlsFolder, name: str, now: datetime.datetime) -> None:
    """A new authority. One that is there is moved aside and stays trusted till it is dropped."""
    make_folder(folder.path)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")])
    own = (
        _builder(subject, subject, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    before = folder.authority.read_bytes() if folder.authority.exists() else b""
    if folder.authority_key.exists():
        folder.authority_key.replace(folder.authority_key.with_suffix(".key.old"))
    create_private(folder.authority_key, _pem(key))
    write_atomically(folder.authority, own + before)


def drop_old_authorities(folder: TlsFolder) -> int:
    """Trust the newest authority alone; how many were dropped. After this sites need a new kit's ca.pem."""
    certificates = x509.load_pem_x509_certificates(folder.authority.read_bytes())
    write_atomically(folder.authority, certificates[0].public_bytes(Encoding.PEM))
    old = folder.authority_key.with_suffix(".key.old")
    old.unlink(missing_ok=True)
    return len(certificates) - 1


def check_hosts(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """The names in a certificate for `hosts`, and for this machine's own use.

    Raises:
        ConfigError: no host, or one that is neither a name nor an address.
    """
    if not hosts:
        raise ConfigError("give the host name, or address, by which sites reach the server: --host")
    return [_general(host) for host in dict.fromkeys((*hosts, *_LOCAL))]


def issue_server(folder: TlsFolder, hosts: Sequence[str], now: datetime.datetime) -> None:
    """A new key and certificate for the server under these host names and addresses.

    Raises:
        ConfigError: see `check_hosts`. MissingKeyError, ExposedKeyError.
    """
    names = check_hosts(hosts)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    chain = _issue(folder, subject, key, names, ExtendedKeyUsageOID.SERVER_AUTH, now)
    if folder.server_key.exists():
        folder.server_key.unlink()
    create_private(folder.server_key, _pem(key))
    write_atomically(folder.server, chain)


def issue_auditor(folder: TlsFolder, name: str, now: datetime.datetime) -> tuple[bytes, bytes]:
    """Certificate and private key, PEM, for an auditor who looks at sites' ledgers (client serve)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return _issue(folder, subject, key, [], ExtendedKeyUsageOID.CLIENT_AUTH, now), _pem(key)


def expires(path: Path) -> datetime.datetime:
    """When the first certificate in `path` ends, in UTC."""
    return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc


def hosts_of(path: Path) -> list[str]:
    """The names and addresses that a server's certificate is for, without this machine's own."""
    found = x509.load_pem_x509_certificate(path.read_bytes()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    names = [str(name.value) for name in found.value]
    return [name for name in names if name not in _LOCAL]


def _issue(
    folder: TlsFolder,
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    names: list[x509.GeneralName],
    use: x509.ObjectIdentifier,
    now: datetime.datetime,
) -> bytes:
    signer = load_pem_private_key(read_private(folder.authority_key, _MAX_PEM_BYTES), None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{folder.authority_key} must hold the authority's P-256 key: restore it")
    authority = x509.load_pem_x509_certificate(folder.authority.read_bytes())
    builder = (
        _builder(subject, authority.subject, key.public_key(), now, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if len(host) > 253 or not _HOST.fullmatch(host):
        raise ConfigError(f"{ascii(host)[:80]} is neither a host name nor an address")
    return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
