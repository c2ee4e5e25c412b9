"""HTTP to URLs that strangers name, over real sockets on loopback, which only an operator's word opens."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
import trustme

from runtime.addresses import Allowed
from runtime.egress import Answer as Head
from runtime.egress import Egress, Limits
from runtime.errors import UrlError, UrlRefused, UrlTooLarge, UrlUnreachable
from tests.providers.http import Answer, Fault, HttpServer, Request, closed, deaf, http_server

LIMITS = Limits(most_bytes=1000, total_s=3, connect_s=1, idle_s=0.5)
LOOPBACK = Allowed.of(["127.0.0.0/8", "::1"])
METADATA = "http://169.254.169.254/latest/meta-data/"


def routes(request: Request) -> Answer:
    match request.path:
        case "/redirect":
            return Answer(status=302, headers={"location": dict(request.query)["to"]})
        case "/again":
            return Answer(status=307, headers={"location": "/again"})
        case "/nowhere":
            return Answer(status=302)
        case "/pieces":
            return Answer(pieces=(b"x" * 600,) * 2)
    return Answer(b"what lies there", headers={"x-asked": request.method})


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[HttpServer]:
    async with http_server(routes) as running:
        yield running


@pytest.fixture(autouse=True)
def in_order(server: HttpServer) -> None:
    server.fault = None
    server.requests.clear()


@asynccontextmanager
async def egress(allowed: Allowed = LOOPBACK, **parts: object) -> AsyncIterator[Egress]:
    opened = Egress(allowed, **parts)  # type: ignore[arg-type]
    yield opened
    opened.close()


async def read(
    url: str, *, allowed: Allowed = LOOPBACK, limits: Limits = LIMITS, redirects: int = 0, method: str = "GET"
) -> tuple[Head, bytes]:
    async with egress(allowed) as out:
        async with out.open(method, url, limits=limits, redirects=redirects) as answer:
            return answer, b"".join([chunk async for chunk in answer.chunks()])


def leading(*addresses: str) -> tuple[Callable[[str, int], object], list[str]]:
    """A directory in which every name has these addresses, and the names that were looked up."""
    asked: list[str] = []

    async def look_up(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return addresses

    return look_up, asked


# --- where we do not go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "LOCALHOST.", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0"),
        *("[::1]", "[::ffff:127.0.0.1]", "[::]", "[0:0:0:0:0:ffff:7f00:1]", "127。0。0。1"),
    ],
)
async def test_this_machine_is_not_reached_however_it_is_written(server: HttpServer, host: str) -> None:
    before = server.opened
    port = urlsplit(server.url).port
    for url in (f"https://{host}:{port}/", f"http://{host}:{port}/", f"https://{host}/", f"https://{host}:8443/"):
        with pytest.raises(UrlError):  # some directories do not know some of these names
            await read(url, allowed=Allowed())
    assert server.opened == before


@pytest.mark.parametrize(
    "url",
    [
        *(
            METADATA,
            "https://169.254.169.254/",
            "https://10.0.0.1/",
            "https://192.168.0.1/",
            "https://[fd00:ec2::254]/",
        ),
        *("https://100.100.100.200/", "https://168.63.129.16/", "https://8.8.8.8:22/", "http://8.8.8.8/"),
        *(
            "ftp://8.8.8.8/",
            "file:///etc/passwd",
            "gopher://8.8.8.8/",
            "//8.8.8.8/",
            "8.8.8.8",
            "https://",
            "",
            "https:///x",
        ),
        *("https://user@8.8.8.8/", "https://user:key@8.8.8.8/", "https://@8.8.8.8/", "https://8.8.8.8:0/"),
        *("https://8.8.8.8\\@127.0.0.1/", "https://8.8.8.8/\r\nx: y", "https://8.8.8.8 /", "https://8.8.8.8:99999/"),
        *("https://[::1/", "https://" + "a" * 3000, "https://8.8.8.8/\ud800"),
    ],
)
async def test_refused_without_a_connection(url: str) -> None:
    with pytest.raises(UrlRefused):
        await read(url, allowed=Allowed())


@pytest.mark.parametrize("addresses", [("8.8.8.8", "127.0.0.1"), ("127.0.0.1", "8.8.8.8"), ("8.8.8.8", "fe80::1%eth0")])
async def test_one_address_inside_spoils_a_name(addresses: tuple[str, ...]) -> None:
    look_up, _ = leading(*addresses)
    async with egress(Allowed(), lookup=look_up) as out:
        with pytest.raises(UrlRefused):
            await out.check("https://hooks.example/")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 64 + ".example", "a..example", "xn--.example"])
async def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(UrlError):
        await read(f"https://{host}/")


async def test_the_operators_word_is_for_what_it_names(server: HttpServer) -> None:
    port = urlsplit(server.url).port
    with pytest.raises(UrlRefused):
        await read(server.url, allowed=Allowed.of(["10.0.0.0/8", "127.0.0.2"]))
    look_up, _ = leading("127.0.0.1")
    async with egress(Allowed.of(["hooks.example"]), lookup=look_up) as out:
        await out.check(f"http://hooks.example:{port}/")
        for other in ("other.example", "hooks.example.other", "x.hooks.example", "127.0.0.1"):
            with pytest.raises(UrlRefused):
                await out.check(f"http://{other}:{port}/")


# --- where we go ------------------------------------------------------------------------------------------------------


async def test_what_lies_there(server: HttpServer) -> None:
    answer, body = await read(f"{server.url}/a?b=c#d")
    assert (answer.status, body, answer.declared_bytes) == (200, b"what lies there", 15)
    assert answer.url == f"{server.url}/a?b=c"
    (request,) = server.requests
    assert (request.path, request.headers["host"]) == ("/a", urlsplit(server.url).netloc)
    assert request.headers["accept-encoding"] == "identity"


async def test_a_body_is_posted(server: HttpServer) -> None:
    async with egress() as out:
        async with out.open("POST", server.url, limits=LIMITS, headers={"x-mine": "1"}, content=b"{}") as answer:
            assert answer.headers["x-asked"] == "POST"
    assert (server.requests[0].body, server.requests[0].headers["x-mine"]) == (b"{}", "1")


async def test_the_next_address_is_tried(server: HttpServer) -> None:
    look_up, asked = leading("127.0.0.2", "127.0.0.1")
    async with egress(lookup=look_up) as out:
        url = f"http://hooks.example:{urlsplit(server.url).port}/"
        async with out.open("GET", url, limits=LIMITS) as answer:
            assert answer.status == 200
    assert asked == ["hooks.example"]
    assert server.requests[0].headers["host"] == f"hooks.example:{urlsplit(server.url).port}"


async def test_the_certificate_is_the_names_and_the_name_is_looked_up_once() -> None:
    authority = trustme.CA()
    served, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("hooks.example").configure_cert(served)
    authority.configure_trust(trusting)
    look_up, asked = leading("127.0.0.1")
    async with http_server(routes, tls=served) as secure:
        port = urlsplit(secure.url).port
        async with egress(lookup=look_up, tls=lambda: trusting) as out:
            async with out.open("GET", f"https://hooks.example:{port}/", limits=LIMITS) as answer:
                assert answer.status == 200
            assert asked == ["hooks.example"]
            for wrong in ("other.example", "127.0.0.1"):
                with pytest.raises(UrlUnreachable, match="certificate"):
                    async with out.open("GET", f"https://{wrong}:{port}/", limits=LIMITS):
                        pass
        async with egress(lookup=look_up) as out:  # who signed it is not known
            with pytest.raises(UrlUnreachable, match="certificate"):
                async with out.open("GET", f"https://hooks.example:{port}/", limits=LIMITS):
                    pass
    assert len(secure.requests) == 1


# --- redirects --------------------------------------------------------------------------------------------------------


async def test_a_redirect_is_an_answer_unless_it_is_asked_for(server: HttpServer) -> None:
    answer, _ = await read(f"{server.url}/redirect?to=/a")
    assert (answer.status, len(server.requests)) == (302, 1)


async def test_redirects_are_followed(server: HttpServer) -> None:
    answer, body = await read(f"{server.url}/redirect?to=/redirect%3Fto=/a", redirects=2)
    assert (answer.status, answer.url, body) == (200, f"{server.url}/a", b"what lies there")
    with pytest.raises(UrlRefused, match="more than 1 redirect"):
        await read(f"{server.url}/redirect?to=/redirect%3Fto=/a", redirects=1)
    with pytest.raises(UrlRefused):
        await read(f"{server.url}/again", redirects=5)
    assert (await read(f"{server.url}/nowhere", redirects=5))[0].status == 302


@pytest.mark.parametrize(
    "target",
    [
        METADATA,
        "https://127.0.0.2:1/",
        "//10.0.0.1/",
        "ftp://127.0.0.1/",
        "file:///etc/passwd",
        "http://u:p@127.0.0.1/",
    ],
)
async def test_every_redirect_is_checked(server: HttpServer, target: str) -> None:
    with pytest.raises(UrlRefused):
        await read(f"{server.url}/redirect?to={target}", redirects=3, allowed=Allowed.of(["127.0.0.1/32"]))
    assert len(server.requests) == 1


# --- how much, how long -----------------------------------------------------------------------------------------------


async def test_too_large_is_known_from_the_head(server: HttpServer) -> None:
    server.fault = Fault(answer=Answer(b"x" * 1001), most_bytes=1, ending="silence")
    with pytest.raises(UrlTooLarge):
        await read(server.url)


async def test_too_large_is_noticed_on_the_way(server: HttpServer) -> None:
    with pytest.raises(UrlTooLarge):
        await read(f"{server.url}/pieces")


@pytest.mark.parametrize(
    "fault",
    [
        Fault(wait_s=3600),
        Fault(most_bytes=5, ending="silence"),
        Fault(most_bytes=5, ending="close"),
        Fault(most_bytes=5, ending="reset"),
        Fault(answer=Answer(status=0)),
    ],
    ids=["silent", "stalls", "shorter than it said", "reset", "closed"],
)
async def test_what_does_not_come(server: HttpServer, fault: Fault) -> None:
    server.fault = fault
    with pytest.raises(UrlUnreachable):
        await read(server.url)


async def test_a_byte_now_and_then_has_an_end(server: HttpServer) -> None:
    server.fault = Fault(answer=Answer(b"x" * 900), piece_bytes=1, pause_s=0.05)
    with pytest.raises(UrlUnreachable, match="in time"):
        await read(server.url, limits=Limits(most_bytes=1000, total_s=0.5, idle_s=1))


async def test_nobody_takes_the_connection() -> None:
    with pytest.raises(UrlUnreachable):
        await read(closed())
    async with deaf() as url:
        with pytest.raises(UrlUnreachable):
            await read(url, limits=Limits(most_bytes=1, total_s=1, connect_s=0.2))


async def test_a_slow_directory_has_an_end() -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(3600)
        return ()

    async with egress(lookup=never) as out:
        with pytest.raises(UrlUnreachable):
            await out.check("https://hooks.example/", within_s=0.1)


async def test_who_reads_may_fail_in_its_own_way_and_leaves_no_connection() -> None:
    async with http_server(routes) as server, egress() as out:
        with pytest.raises(TimeoutError, match="mine"):
            async with out.open("GET", server.url, limits=LIMITS):
                raise TimeoutError("mine")
        async with asyncio.timeout(5):
            while server.open:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
