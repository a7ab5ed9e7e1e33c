"""TLS: certificates of the server and of callers, plain text at a closed door, and a certificate that is renewed."""

import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.server.doors.harness import make_request, running
from weft.proto.v1 import inference_pb2

OPENSSL = [
    "openssl",
    "req",
    "-x509",
    "-newkey",
    "ec",
    "-pkeyopt",
    "ec_paramgen_curve:prime256v1",
    "-nodes",
    "-days",
    "2",
]


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    chain, key = folder / f"{name}.pem", folder / f"{name}.key"
    names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*OPENSSL, "-keyout", key, "-out", chain, *names], check=True, capture_output=True)
    return chain, key


@pytest.fixture(scope="module")
def pems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pems")
    return {name: certificate(folder, name) for name in ("server", "caller", "stranger", "renewed")}


def ask(address: str, credentials: grpc.ChannelCredentials | None) -> Any:
    channel = grpc.insecure_channel(address) if credentials is None else grpc.secure_channel(address, credentials)
    with channel:
        call = channel.unary_unary(
            "/weft.v1.InferenceService/Generate", response_deserializer=inference_pb2.GenerateResponse.FromString
        )
        return call(make_request(ids=[5], max_new_tokens=2).SerializeToString(), timeout=10).text


def trusting(pems, name="server", shown=None) -> grpc.ChannelCredentials:
    own = [path.read_bytes() for path in pems[shown]] if shown else [None, None]
    return grpc.ssl_channel_credentials(pems[name][0].read_bytes(), own[1], own[0])


def options(pems, **more):
    return {"tls_certificate_file": str(pems["server"][0]), "tls_key_file": str(pems["server"][1]), **more}


def refused(address, credentials) -> bool:
    with pytest.raises(grpc.RpcError) as failed:
        ask(address, credentials)
    return failed.value.code() is grpc.StatusCode.UNAVAILABLE


def test_callers_that_trust_the_certificate_are_served_and_others_stay_out(tmp_path, pems):
    with running(tmp_path, **options(pems)) as server:
        assert ask(server.address, trusting(pems)) == "ab"
        assert refused(server.address, trusting(pems, "stranger"))
        assert refused(server.address, None)
        assert ask(server.address, trusting(pems)) == "ab"


def test_with_client_roots_only_callers_with_a_certificate_are_served(tmp_path, pems):
    with running(tmp_path, **options(pems, tls_client_ca_file=str(pems["caller"][0]))) as server:
        assert ask(server.address, trusting(pems, shown="caller")) == "ab"
        assert refused(server.address, trusting(pems, shown="stranger"))
        assert refused(server.address, trusting(pems))


def test_a_renewed_certificate_is_shown_to_new_connections(tmp_path, pems):
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"

    def install(name):
        chain.write_bytes(pems[name][0].read_bytes())
        key.write_bytes(pems[name][1].read_bytes())

    install("server")
    with running(tmp_path, tls_certificate_file=str(chain), tls_key_file=str(key)) as server:
        assert ask(server.address, trusting(pems)) == "ab"
        install("renewed")
        assert ask(server.address, trusting(pems, "renewed")) == "ab"
        assert refused(server.address, trusting(pems))


def test_a_certificate_that_cannot_be_read_any_more_does_not_close_the_door(tmp_path, pems):
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(pems["server"][0].read_bytes())
    key.write_bytes(pems["server"][1].read_bytes())
    with running(tmp_path, tls_certificate_file=str(chain), tls_key_file=str(key)) as server:
        chain.unlink()
        assert ask(server.address, trusting(pems)) == "ab"
