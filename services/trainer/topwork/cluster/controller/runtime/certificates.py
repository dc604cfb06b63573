"""TLS certificates of the webhook: files that cert-manager renews, or certificates that this process issues itself."""

import base64
import ipaddress
import os
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.errors import ConflictError
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

log = structlog.get_logger(__name__)

CERTIFICATE_FILE, KEY_FILE = "tls.crt", "tls.key"
"""Files of a Secret of the type kubernetes.io/tls."""
CONFIGURATION_KIND = "ValidatingWebhookConfiguration"
LIFETIME = timedelta(days=90)
RENEW_BEFORE = timedelta(days=30)
# Clocks of nodes differ.
BACKDATE = timedelta(hours=1)
# Each replica has its own authority, and a new one after each start.
MAX_AUTHORITIES = 4
MAX_CONFLICTS = 10
PEM_END = "-----END CERTIFICATE-----\n"


class Certificates(Protocol):
    """Source of the certificate of a TLS server."""

    def refresh(self, context: ssl.SSLContext) -> None:
        """Load the certificate into the context if it changed; new connections use it. Called every few seconds.

        Raises:
            TopworkError: If there is no usable certificate; a previous one is kept.
        """


class FileCertificates:
    """The certificate in a directory, such as a mounted Secret of cert-manager.

    Args:
        directory: Directory with `tls.crt` (PEM, with intermediate certificates) and `tls.key`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._loaded: tuple[bytes, bytes] | None = None

    def refresh(self, context: ssl.SSLContext) -> None:
        """Load the files if their content changed.

        Raises:
            SettingError: If a file is missing, or the files are not a certificate and its key.
        """
        certificate, key = (self._directory / name for name in (CERTIFICATE_FILE, KEY_FILE))
        try:
            content = certificate.read_bytes(), key.read_bytes()
            if content == self._loaded:
                return
            _load(context, *content)
        except OSError as error:  # ssl.SSLError is one: the kubelet replaces the two files one after the other
            raise SettingError(
                f"The certificate of the webhook can't be loaded from {self._directory}: {error}. Expected: "
                f"{CERTIFICATE_FILE} and {KEY_FILE} in PEM format, as in a Secret of the type kubernetes.io/tls."
            ) from error
        log.info("certificate loaded", directory=str(self._directory))
        self._loaded = content


class SelfSignedCertificates:
    """A certificate that this process issues, and whose authority it adds to a webhook configuration.

    Args:
        cluster: The cluster.
        configuration: Name of the ValidatingWebhookConfiguration.
        host: Name under which the API server connects, such as `topwork-controller.team-a.svc`.
        lifetime: Validity of a certificate.
        renew_before: A new certificate is issued this long before the current one expires.
    """

    def __init__(
        self,
        cluster: "Cluster",
        configuration: str,
        host: str,
        lifetime: timedelta = LIFETIME,
        renew_before: timedelta = RENEW_BEFORE,
    ) -> None:
        self._cluster, self._configuration, self._host = cluster, configuration, host
        self._lifetime, self._renew_before = lifetime, renew_before
        self._issued: IssuedCertificate | None = None

    def refresh(self, context: ssl.SSLContext) -> None:
        """Renew the certificate if it expires soon, and restore its authority if the configuration lacks it.

        Raises:
            TopworkError: If the configuration can't be read or updated.
        """
        issued = self._issued
        if issued is None or issued.expires - datetime.now(UTC) < self._renew_before:
            issued = issue_certificate(self._host, self._lifetime)
        # First the authority, so that the API server can verify the certificate from its first use.
        self._publish(issued.authority)
        if issued is not self._issued:
            _load(context, issued.certificate, issued.key)
            self._issued = issued

    def _publish(self, authority: str) -> None:
        """Add the authority to the configuration, with optimistic locking: replicas do so at the same time."""
        for _ in range(MAX_CONFLICTS):
            current = self._cluster.get(CONFIGURATION_KIND, self._configuration)
            if current is None:
                raise SettingError(
                    f"{CONFIGURATION_KIND} {self._configuration} does not exist. Install it with the chart "
                    "(controller.webhook.enabled), or remove --webhook-self-signed."
                )
            updated = add_authority(current, authority)
            if updated == current:
                return
            try:
                self._cluster.replace(updated)
            except ConflictError:
                continue
            log.info("certificate authority added", configuration=self._configuration)
            return
        raise UnavailableError(
            f"{CONFIGURATION_KIND} {self._configuration} could not be updated: it was changed at the same time in "
            f"{MAX_CONFLICTS} attempts."
        )


def add_authority(configuration: KubernetesObject, authority: str) -> KubernetesObject:
    """Append a certificate authority to the bundle of each webhook, and keep the latest ones that are valid.

    Args:
        configuration: ValidatingWebhookConfiguration; not modified.
        authority: PEM certificate.

    Returns:
        The configuration with the authority.
    """
    webhooks = [
        webhook | {"clientConfig": _with_authority(webhook["clientConfig"], authority)}
        for webhook in configuration.get("webhooks") or []
    ]
    return configuration | {"webhooks": webhooks}


def _with_authority(client_config: KubernetesObject, authority: str) -> KubernetesObject:
    bundle = base64.b64decode(client_config.get("caBundle") or "").decode(errors="replace")
    authorities = [text + PEM_END for text in bundle.split(PEM_END) if text.strip() and _is_valid(text + PEM_END)]
    if authority not in authorities:
        authorities.append(authority)
    text = "".join(authorities[-MAX_AUTHORITIES:])
    return client_config | {"caBundle": base64.b64encode(text.encode()).decode()}


def _is_valid(pem: str) -> bool:
    """Whether a text is a certificate that has not expired; the placeholder of a manifest is not one."""
    try:
        return x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc > datetime.now(UTC)
    except ValueError:
        return False


# ── Issuing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class IssuedCertificate:
    """A certificate with its key and its authority, in PEM format.

    Attributes:
        certificate: The certificate of the server.
        key: Its private key, which stays in this process.
        authority: The certificate of its authority.
        expires: When both certificates expire.
    """

    certificate: bytes
    key: bytes
    authority: str
    expires: datetime


def issue_certificate(host: str, lifetime: timedelta = LIFETIME) -> IssuedCertificate:
    """Issue a certificate with an authority of its own, whose key is discarded.

    Args:
        host: DNS name or IP address of the server.
        lifetime: Validity.

    Returns:
        The certificate.
    """
    now = datetime.now(UTC)
    expires = now + lifetime
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "topwork webhook authority")])
    authority = (
        _builder(authority_name, authority_name, authority_key.public_key(), now, expires)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    # The common name has at most 64 characters; clients only check the alternative name.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "topwork webhook")])
    certificate = (
        _builder(name, authority_name, key.public_key(), now, expires)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    encoding = serialization.Encoding.PEM
    return IssuedCertificate(
        certificate.public_bytes(encoding), key_pem, authority.public_bytes(encoding).decode(), expires
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, expires: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(expires)
    )


def _key_usage(*, key_cert_sign: bool = False, digital_signature: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _load(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Load a certificate and its key into a TLS context.

    Raises:
        ssl.SSLError: If they are not a certificate and its key; the context is unchanged.
    """
    # OpenSSL reads only files, and the file system of the pod is read-only.
    file = os.memfd_create("certificate")
    try:
        os.write(file, key + b"\n" + certificate)
        path = f"/proc/self/fd/{file}"
        # A failure would leave the new certificate with the old key in the context: try the pair first.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)
        context.load_cert_chain(path)
    finally:
        os.close(file)
