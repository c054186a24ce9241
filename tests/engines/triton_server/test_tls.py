"""Encrypted connections to a real server that asks for a certificate of ours."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from dynamo_serve.engines.triton_server.check import Report, check
from dynamo_serve.errors import EngineStartError
from scripts import tritonserver
from scripts.tritonserver import Running
from tests.engines.triton_server.conftest import skip_without_server
from tests.engines.triton_server.test_forward import TEXT, complete, forwarding, settings
from tests.patience import PATIENCE_S

NAME = "triton.test"


def certify(folder: Path, who: str) -> None:
    """A self-signed certificate and its key, good for an hour or so."""
    subject = ["-subj", f"/CN={who}", "-addext", f"subjectAltName=DNS:{who}"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-keyout", str(folder / f"{who}.key"), "-out", str(folder / f"{who}.pem")]
    command = ["openssl", "req", "-x509", "-days", "1", *key, *subject, *files]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_without_server()
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("tls")
    for who in (NAME, "gateway", "stranger"):
        certify(folder, who)
    return folder


@pytest.fixture(scope="module")
def secured(folder: Path) -> Generator[Running]:
    flags = [
        "--grpc-use-ssl=true",
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={folder / NAME}.pem",
        f"--grpc-server-key={folder / NAME}.key",
        f"--grpc-root-cert={folder / 'gateway'}.pem",
    ]
    with tritonserver.running(["echo"], folder / "log", flags=flags) as server:
        yield server


def tls(folder: Path, **changed: Any) -> dict[str, Any]:
    good = {
        "tls": True,
        "tls_ca_file": str(folder / f"{NAME}.pem"),
        "tls_cert_file": str(folder / "gateway.pem"),
        "tls_key_file": str(folder / "gateway.key"),
        "tls_server_name": NAME,
        "connect_timeout_s": 1.0,
    }
    return {**good, **changed}


def report(server: Running, **tls: Any) -> Report:
    (report,) = asyncio.run(check(settings(server, **tls).triton))
    return report


def test_with_the_right_certificates_all_is_as_ever(
    secured: Running, folder: Path, tmp_path: Path
) -> None:
    with forwarding(
        tmp_path, settings(secured, **tls(folder, connect_timeout_s=PATIENCE_S))
    ) as client:
        assert complete(client).json()["choices"][0]["text"] == TEXT


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tls_ca_file": "stranger.pem"}, "CERTIFICATE_VERIFY_FAILED"),
        ({"tls_ca_file": ""}, "CERTIFICATE_VERIFY_FAILED"),
        ({"tls_server_name": "other.test"}, "Hostname Verification"),
        ({"tls_server_name": ""}, "Hostname Verification"),
        ({"tls_cert_file": "", "tls_key_file": ""}, "could be reached"),
        ({"tls_cert_file": "stranger.pem", "tls_key_file": "stranger.key"}, "could be reached"),
        ({"tls": False}, "could be reached"),
    ],
)
def test_with_the_wrong_ones_nothing_is_sent_and_it_says_why(
    secured: Running, folder: Path, changed: dict[str, Any], told: str
) -> None:
    changed = {
        name: str(folder / value) if str(value).startswith("stranger") else value
        for name, value in changed.items()
    }
    found = report(secured, **tls(folder, **changed))
    assert found.spoken is None
    assert told in found.error, found.error


@pytest.mark.parametrize(("content", "told"), [(None, "cannot read"), (b"\0\1", "no PEM file")])
def test_files_that_are_none_are_named(
    secured: Running, folder: Path, tmp_path: Path, content: bytes | None, told: str
) -> None:
    path = tmp_path / "bad.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EngineStartError, match=f"triton.tls_key_file.*{told}"):
        report(secured, **tls(folder, tls_key_file=str(path)))
