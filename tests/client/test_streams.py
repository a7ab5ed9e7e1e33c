"""What is particular to each client: dropped streams, cancelled tasks, threads, many calls at once, TLS."""

import asyncio
import gc
import shutil
import subprocess
import threading
import time

import grpc
import pytest

from tests.client.fake_server import FakeServer
from weft.client import AsyncClient, Cancelled, Client, DeadlineExceeded, Delta, Started, Tls, Unavailable


def wait_for_call(server: FakeServer, rpc: str) -> None:
    """Return once the server has got such a call."""
    deadline_s = time.monotonic() + 5
    while not server.calls[rpc]:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_dropped_stream_ends_on_the_server(server):
    with Client(server.address) as client:
        for event in client.stream("endless"):
            if isinstance(event, Delta):
                break
        gc.collect()
        assert server.cancelled.wait(5)


def test_a_stream_that_was_never_read_ends_on_the_server(server):
    with Client(server.address) as client:
        stream = client.stream("endless")
        wait_for_call(server, "StreamGenerate")
        del stream
        gc.collect()
        assert server.cancelled.wait(5)


def test_an_exception_in_the_loop_body_ends_the_stream(server):
    def reader(client: Client) -> None:
        for event in client.stream("endless"):
            if isinstance(event, Delta):
                raise ZeroDivisionError

    with Client(server.address) as client:
        with pytest.raises(ZeroDivisionError) as caught:
            reader(client)
        del caught
        gc.collect()
        assert server.cancelled.wait(5)


def test_threads_may_share_a_client(server):
    with Client(server.address) as client:
        answers: dict[int, str] = {}

        def ask(number: int) -> None:
            answers[number] = client.generate(f"{number:03}").text

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(32)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert answers == {number: f"{number:03}"[::-1] for number in range(32)}


def test_closing_the_client_ends_a_call_in_another_thread(server):
    client = Client(server.address)
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            client.generate("slow")
        except Cancelled as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for_call(server, "Generate")
    client.close()
    thread.join(5)
    assert [type(each) for each in caught] == [Cancelled]


def test_a_dropped_async_stream_ends_on_the_server(server):
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            async for event in client.stream("endless"):
                if isinstance(event, Delta):
                    break
            del event
            gc.collect()
            assert await asyncio.to_thread(server.cancelled.wait, 5)

    asyncio.run(main())


def test_a_cancelled_task_ends_its_stream_on_the_server(server):
    async def read(client: AsyncClient, begun: asyncio.Event) -> None:
        async for _ in client.stream("endless"):
            begun.set()

    async def main() -> None:
        async with AsyncClient(server.address) as client:
            begun = asyncio.Event()
            task = asyncio.create_task(read(client, begun))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.cancelled.wait, 5)

    asyncio.run(main())


def test_a_cancelled_task_ends_its_completion_on_the_server(server):
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            task = asyncio.create_task(client.generate("slow"))
            await asyncio.to_thread(wait_for_call, server, "Generate")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.cancelled.wait, 5)

    asyncio.run(main())


def test_a_cancelled_task_ends_its_upload_on_the_server(server, folder):
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            task = asyncio.create_task(client.register("stalled", folder))
            await asyncio.to_thread(wait_for_call, server, "RegisterAdapter")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.cancelled.wait, 5)

    asyncio.run(main())


def test_a_hundred_completions_and_a_stream_share_one_connection(server):
    async def main() -> None:
        async with AsyncClient(server.address) as client, client.stream("endless") as stream:
            assert isinstance(await anext(stream), Started)
            found = await asyncio.gather(*(client.generate(f"{number:03}") for number in range(100)))
            assert [each.text for each in found] == [f"{number:03}"[::-1] for number in range(100)]
            assert isinstance(await anext(stream), Delta)

    asyncio.run(main())


def test_an_async_client_may_be_made_before_the_loop(server):
    client = AsyncClient(server.address)

    async def main() -> str:
        async with client:
            return (await client.generate("ab")).text

    assert asyncio.run(main()) == "ba"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[bytes, bytes]:
    """A key and a certificate for 127.0.0.1 that signs itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key -out cert"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True, capture_output=True
    )
    return (folder / "key").read_bytes(), (folder / "cert").read_bytes()


def test_tls_talks_to_a_server_whose_root_is_trusted(certificate):
    key, chain = certificate
    with FakeServer(credentials=grpc.ssl_server_credentials([(key, chain)])) as server:
        with Client(server.address, tls=Tls(roots=chain)) as client:
            assert client.generate("ab").text == "ba"

        async def main() -> str:
            async with AsyncClient(server.address, tls=Tls(roots=chain)) as client:
                return (await client.generate("ab")).text

        assert asyncio.run(main()) == "ba"


def test_tls_refuses_a_server_that_is_not_trusted(certificate):
    key, chain = certificate
    with (
        FakeServer(credentials=grpc.ssl_server_credentials([(key, chain)])) as server,
        Client(server.address, tls=Tls()) as client,
        pytest.raises((Unavailable, DeadlineExceeded)),
    ):
        client.generate("ab", timeout_s=2)


def test_a_client_certificate_needs_its_key():
    with pytest.raises(ValueError, match="certificate and key must be given together"):
        Client("127.0.0.1:1", tls=Tls(certificate=b"pem"))
