"""The certificates of an installation: the one that nodes know, and the authority's, which signs what the API shows.

Nodes and people compare a fingerprint and nothing else, so what they know names no host and does not expire. The key
of the authority is part of the state's backup: with it a server is made anew without anybody logging in again.
"""

import datetime
import hashlib
import ssl
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from imagestore import durable

_LONG, _DAYS = datetime.timedelta(days=36500), datetime.timedelta(days=825)


def certificate(directory: Path) -> tuple[Path, Path, bytes]:
    """The certificate and key of the agents' listener, made at the first start, and the certificate's fingerprint."""
    cert, key = _make(directory, "agent")
    return cert, key, hashlib.sha256(ssl.PEM_cert_to_DER_cert(cert.read_text())).digest()


def authority(directory: Path) -> tuple[Path, bytes]:
    """The authority's certificate, made with its key at the first use, and the same in DER."""
    cert, _ = _make(directory, "ca")
    return cert, ssl.PEM_cert_to_DER_cert(cert.read_text())


def shown(directory: Path, hosts: Iterable[str]) -> tuple[Path, Path]:
    """What the API shows, signed by the authority: made anew at each start, for 825 days."""
    authority(directory)
    return _make(directory, "api", hosts)


def ends_s(cert: str) -> float:
    """When a certificate's time is over."""
    return x509.load_pem_x509_certificate(Path(cert).read_bytes()).not_valid_after_utc.timestamp()


def _make(directory: Path, name: str, hosts: Iterable[str] = ()) -> tuple[Path, Path]:
    cert_path, key_path = directory / f"{name}.crt", directory / f"{name}.key"
    if name != "api" and cert_path.exists():
        return cert_path, key_path
    key = ec.generate_private_key(ec.SECP256R1())
    signer, lasts = key, _LONG
    subject = issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"sf {name}")])
    if name == "api":
        issuer = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes()).subject
        loaded, lasts = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None), _DAYS
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        signer = loaded
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + lasts)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    known_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    made = made.add_extension(known_by, critical=False)
    if name == "ca":
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    if names := [_name(host) for host in dict.fromkeys(hosts) if host]:
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # The key first: a certificate without its key would be believed.
    durable.write(key_path, private)
    durable.write(cert_path, made.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return cert_path, key_path


def _name(host: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ip_address(host))
    return x509.DNSName(host.encode("idna").decode())
