"""Pictures by their address: what is not plainly the address of somebody else's public host is never connected to."""

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.core.errors import InvalidField
from mlx_manager.core.messages import Image, Message, RemoteImage, content_of
from mlx_manager.core.requests import Conversation, GenerationRequest
from mlx_manager.gateway.remote_media import MAX_TOTAL_BYTES, RemoteMedia
from mlx_manager.http_client import FetchFailed, HttpClient, Url, is_public
from mlx_manager.protocols.media import MAX_IMAGE_BYTES
from tests.gateway.hosts import (
    Answer,
    Host,
    answering,
    broken,
    endless,
    host,
    nonsense,
    silent,
    trickling,
    trickling_headers,
)

WHERE = "messages[0].content[0].image_url"
LOOPBACK = frozenset({"127.0.0.1", "::1"})
NAME = "media.test"


def asked(*urls: str) -> GenerationRequest:
    parts = [RemoteImage(url, f"messages[0].content[{i}].image_url") for i, url in enumerate(urls)]
    return GenerationRequest("m", (Conversation((Message("user", content_of(["Look: ", *parts])),)),))


async def fetch(media: RemoteMedia, *urls: str) -> list[bytes]:
    request = asked(*urls)
    fetched = await media.fetched(request, media.targets(request))
    (conversation,) = fetched.prompts
    assert isinstance(conversation, Conversation)
    found = conversation.messages[0].media
    assert [part.where for part in found] == [f"messages[0].content[{i}].image_url" for i in range(len(urls))]
    return [part.data for part in found if isinstance(part, Image)]


async def refusal(media: RemoteMedia, *urls: str) -> InvalidField:
    with pytest.raises(InvalidField) as refused:
        await fetch(media, *urls)
    return refused.value


def named(port: int, *, timeout_s: float = 20, resolve: Sequence[str] = ("127.0.0.1",), tls: ssl.SSLContext | None = None) -> RemoteMedia:
    """Fetches from `media.test`, which is on loopback for once."""
    client = HttpClient(resolve=lambda _host, _port: resolve, tls=tls)
    return RemoteMedia((f"{NAME}:{port}",), allows_http=True, client=client, may_reach=LOOPBACK.__contains__, timeout_s=timeout_s)


# ---- what is no address of ours to go to

HOSTILE = [
    "http://127.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0.0.1:{port}/",
    "http://0x7f.1:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://017700000001:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://127.000.000.001:{port}/",
    "http://0.0.0.0:{port}/",
    "http://0:{port}/",
    "http://localhost:{port}/",
    "http://LOCALHOST:{port}/",
    "http://localhost.:{port}/",
    "http://localhost%00.example.com:{port}/",
    "http://[::1]:{port}/",
    "http://[::]:{port}/",
    "http://[0:0:0:0:0:0:0:1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[::1%25lo]:{port}/",
    "http://[fe80::1%lo]:{port}/",
    "http://user@127.0.0.1:{port}/",
    "http://example.com@127.0.0.1:{port}/",
    "http://example.com:80@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@example.com/",
    "http://example.com\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}#@example.com/",
    "http://127.0.0.1:{port}?@example.com/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://127。0。0。1:{port}/",
    "http://l\u043ecalhost:{port}/",
    "http://\uff4cocalhost:{port}/",
    "http://%31%32%37.0.0.1:{port}/",
    "http://127.0.0.1%2f@example.com:{port}/",
    "http:127.0.0.1:{port}/",
    "http:/127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "http:////127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    " http://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/\r\nHost: example.com",
    "http://127.0.0.1\t:{port}/",
    "http://127.0.0.1:0{port}/",
    "http://127.0.0.1:{port}:80/",
    "http://rebound.test:{port}/",
    "http://mixed.test:{port}/",
    "http://mapped.test:{port}/",
    "https://127.0.0.1:{port}/",
    "https://localhost:{port}/",
    "ftp://127.0.0.1:{port}/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/_",
]
RESOLVED = {
    "localhost": ("127.0.0.1", "::1"),
    "rebound.test": ("127.0.0.1",),
    "mixed.test": ("93.184.216.34", "127.0.0.1"),
    "mapped.test": ("::ffff:127.0.0.1",),
}


@pytest.mark.requirement("M1", "M2")
async def test_no_spelling_of_loopback_is_connected_to() -> None:
    """Each is allowed as far as a list of hosts can: only what it is stands in the way."""
    async with host(answering(b"secret")) as canary, host(answering(b"secret"), address="::1", port=canary.port) as canary6:
        names = [f"{name}:{canary.port}" for name in RESOLVED]
        client = HttpClient(resolve=lambda name, _port: RESOLVED[name])
        media = RemoteMedia(("*", *names), allows_http=True, client=client)
        for spelling in HOSTILE:
            text = spelling.format(port=canary.port)
            refused = await refusal(media, text)
            assert refused.param == WHERE, text
            url = Url.parse(text)
            if url is not None:  # and by the client alone, had the list let it through
                with pytest.raises(FetchFailed):
                    await client.get(
                        url,
                        max_bytes=100,
                        deadline=asyncio.get_running_loop().time() + 10,
                        may_reach=is_public,
                        accept="*/*",
                        agent="test",
                    )
    assert canary.num_connections == canary6.num_connections == 0


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1", "127.255.0.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.0.1",
        "192.0.2.1", "198.18.0.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1",
        "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001::1", "2001:db8::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%lo", "fec0::1",
        "ff02::1", "100::1", "", "example.com", "1.2.3", "01.2.3.4",
    ],
)  # fmt: skip
def test_what_is_not_of_the_internet_at_large(text: str) -> None:
    assert not is_public(text)


@pytest.mark.parametrize("text", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"])
def test_what_is(text: str) -> None:
    assert is_public(text)


@given(st.ip_addresses(v=4))
def test_an_address_is_as_public_as_the_one_inside_it(inner: ipaddress.IPv4Address) -> None:
    number = int(inner)
    nat64, sixtofour = (0x64FF9B << 96) | number, (0x2002 << 112) | (number << 80)
    spellings = {f"::ffff:{inner}", str(ipaddress.IPv6Address(nat64)), str(ipaddress.IPv6Address(sixtofour))}
    assert {is_public(text) for text in spellings} == {is_public(str(inner))}


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://example.com/a.png", Url("https", "example.com", 443, "/a.png")),
        ("HTTPS://Example.COM", Url("https", "example.com", 443, "/")),
        ("https://example.com?a=b", Url("https", "example.com", 443, "/?a=b")),
        ("https://a-b.example.com:8443/x/../y%20z?q=%2F&r=|@:/#part", Url("https", "a-b.example.com", 8443, "/x/../y%20z?q=%2F&r=|@:/")),
        ("http://xn--bcher-kva.example/", Url("http", "xn--bcher-kva.example", 80, "/")),
        ("http://192.168.1.10:9000/a", Url("http", "192.168.1.10", 9000, "/a")),
        ("http://[2606:4700::1111]/a", Url("http", "2606:4700::1111", 80, "/a")),
    ],
)
def test_what_is_plainly_a_url_is_read_as_it_stands(text: str, url: Url) -> None:
    assert Url.parse(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "example.com/a.png",
        "https:example.com",
        "https://",
        "https:///a.png",
        "https://example.com/a b",
        "https://example.com/a\r\nx: y",
        "https://example.com/\\evil",
        "https://example.com/ä.png",
        "https://user:password@example.com/",
        "https://@example.com/",
        "https://example.com:/",
        "https://example.com:65536/",
        "https://example.com:+80/",
        "https://example..com/",
        "https://-a.example.com/",
        "https://a_b.example.com/",
        "https://bücher.example/",
        f"https://{'a' * 64}.com/",
        f"https://{'a.' * 130}com/",
        "https://example.com/" + "a" * 8192,
        "ws://example.com/",
    ],
)
def test_what_is_not_plainly_one_is_none(text: str) -> None:
    assert Url.parse(text) is None


@given(st.text(st.sampled_from("hHtps:/\\@#?[]%.-01279axlo\t\r\n ①。"), max_size=40))
def test_whatever_is_read_names_one_host_that_others_read_too(text: str) -> None:
    url = Url.parse("http://" + text)
    if url is not None:
        assert urlsplit("http://" + text).hostname == url.host
        assert httpx2.URL(f"http://{url.authority}/").host == url.host


# ---- what the operator says


async def test_without_hosts_nothing_is_fetched() -> None:
    async with host(answering(b"x")) as canary:
        refused = await refusal(RemoteMedia((), allows_http=True), f"http://127.0.0.1:{canary.port}/")
    assert refused.message == f"Invalid '{WHERE}': pictures are taken from 'data:' URLs only; this server fetches none."
    assert canary.num_connections == 0


async def test_only_listed_hosts_and_ports_are_fetched_from() -> None:
    async with host(answering(b"x")) as there:
        media = named(there.port)
        assert await fetch(media, f"http://{NAME}:{there.port}/a.png?b=%20|c") == [b"x"]
        for other in (
            f"http://other.test:{there.port}/",
            f"http://{NAME}/",
            f"http://sub.{NAME}:{there.port}/",
            f"http://{NAME}.:{there.port}/",
        ):
            assert (await refusal(media, other)).param == WHERE
        any_name = RemoteMedia(
            ("*",), allows_http=True, client=HttpClient(resolve=lambda *_: ("127.0.0.1",)), may_reach=LOOPBACK.__contains__
        )
        assert "from that host" in (await refusal(any_name, f"http://{NAME}:{there.port}/")).message
        assert "from that host" in (await refusal(any_name, "http://8.8.8.8/")).message
    (head,) = there.heads
    assert head.startswith("GET /a.png?b=%20|c HTTP/1.1\r\n")
    assert f"\r\nhost: {NAME}:{there.port}\r\n" in head.lower()


async def test_an_address_that_is_itself_listed_is_fetched_from() -> None:
    async with host(answering(b"x")) as there:
        media = RemoteMedia((f"127.0.0.1:{there.port}",), allows_http=True)
        assert await fetch(media, f"http://127.0.0.1:{there.port}/") == [b"x"]
        for other in ("127.1", "localhost", "[::ffff:7f00:1]", "[::1]", "127.0.0.2"):
            assert (await refusal(media, f"http://{other}:{there.port}/")).param == WHERE
    assert there.num_connections == 1


async def test_plain_http_has_a_switch_of_its_own() -> None:
    async with host(answering(b"x")) as there:
        media = RemoteMedia((f"127.0.0.1:{there.port}",))
        assert "by 'https' only" in (await refusal(media, f"http://127.0.0.1:{there.port}/")).message
    assert there.num_connections == 0


@pytest.mark.parametrize("entry", ["", "http://a.com", "a.com/", "*.a.com", "a.com:0", "a.com:x", "127.1", "a b", "::1", "*:80"])
def test_a_list_with_something_else_in_it_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="is not a host"):
        RemoteMedia((entry,))


# ---- what hosts do


@pytest.mark.requirement("M2")
async def test_a_name_is_resolved_once_and_what_was_checked_is_what_is_reached() -> None:
    answers = [("::1",), ("127.0.0.1",)]
    async with host(answering(b"right"), address="::1") as there, host(answering(b"secret"), port=there.port) as canary:
        client = HttpClient(resolve=lambda *_: answers.pop(0))
        media = RemoteMedia((f"{NAME}:{there.port}",), allows_http=True, client=client, may_reach={"::1"}.__contains__)
        assert await fetch(media, f"http://{NAME}:{there.port}/") == [b"right"]
        assert len(answers) == 1
        assert "cannot be reached" in (await refusal(media, f"http://{NAME}:{there.port}/")).message
    assert canary.num_connections == 0


async def test_nobody_learns_which_names_there_are() -> None:
    def resolve(name: str, _port: int) -> Sequence[str]:
        if name == "intranet.test":
            return ("10.0.0.1",)
        raise OSError("no such name")

    media = RemoteMedia(("*",), client=HttpClient(resolve=resolve))
    messages = {(await refusal(media, f"https://{name}.test/")).message for name in ("intranet", "nothing")}
    assert len(messages) == 1


def moved_to(other: Host, status: str) -> Answer:
    return answering(b"", f"location: http://127.0.0.1:{other.port}/", status=status)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_redirects_are_not_followed(status: str) -> None:
    async with host(answering(b"secret")) as canary, host(moved_to(canary, status)) as there:
        refused = await refusal(named(there.port), f"http://{NAME}:{there.port}/")
    assert refused.message == f"Invalid '{WHERE}': it could not be fetched: it is elsewhere, and redirects are not followed."
    assert canary.num_connections == 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (endless, f"more than {MAX_IMAGE_BYTES >> 20} MB"),
        (trickling, "took too long"),
        (trickling_headers, "took too long"),
        (silent, "took too long"),
        (broken, "did not answer as it should"),
        (nonsense, "did not answer as it should"),
        (answering(b"x", "content-encoding: gzip"), "compressed"),
        (answering(b"no", status="404 Not Found"), "status 404"),
        (answering(b"no", status="500 Oh"), "status 500"),
        (answering(b"no", status="206 Partial Content"), "status 206"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_host_that_misbehaves_is_a_mistake_in_the_field(answer: Answer, words: str) -> None:
    async with host(answer) as there:
        media = named(there.port, timeout_s=10 if answer is endless else 0.5)
        refused = await refusal(media, f"http://{NAME}:{there.port}/")
    assert words in refused.message
    assert refused.param == WHERE
    assert there.num_connections == 1


async def test_a_host_that_is_not_there_is_one_too() -> None:
    async with host(answering(b"x")) as there:
        pass
    assert "did not answer" in (await refusal(named(there.port), f"http://{NAME}:{there.port}/")).message


async def test_the_next_address_is_tried_if_one_takes_no_connection() -> None:
    async with host(answering(b"x")) as there:
        media = named(there.port, resolve=("::1", "127.0.0.1"))
        assert await fetch(media, f"http://{NAME}:{there.port}/") == [b"x"]


async def test_a_resolver_that_hangs_is_given_up() -> None:
    hanging = asyncio.Event()
    loop = asyncio.get_running_loop()

    def resolve(_host: str, _port: int) -> Sequence[str]:
        asyncio.run_coroutine_threadsafe(hanging.wait(), loop).result()
        return ()

    media = RemoteMedia(("*",), client=HttpClient(resolve=resolve), timeout_s=0.3)
    assert "took too long" in (await refusal(media, "https://example.com/")).message
    hanging.set()


async def test_each_address_is_fetched_once_and_several_side_by_side() -> None:
    together = asyncio.Event()
    waiting = 0

    async def answer(writer: asyncio.StreamWriter) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 3:
            together.set()
        await together.wait()
        await answering(str(waiting).encode())(writer)

    async with host(answer) as there:
        urls = [f"http://{NAME}:{there.port}/{name}" for name in ("a", "b", "a", "c", "b")]
        found = await asyncio.wait_for(fetch(named(there.port), *urls), 30)
    assert found[0] == found[2]
    assert found[1] == found[4]
    assert there.num_connections == 3


async def test_the_first_failure_ends_the_others() -> None:
    async with host(silent) as slow, host(answering(b"", status="404 Not Found")) as wrong:
        client = HttpClient(resolve=lambda *_: ("127.0.0.1",))
        hosts = (f"{NAME}:{slow.port}", f"{NAME}:{wrong.port}")
        media = RemoteMedia(hosts, allows_http=True, client=client, may_reach=LOOPBACK.__contains__, timeout_s=50)
        refused = await asyncio.wait_for(refusal(media, f"http://{NAME}:{slow.port}/", f"http://{NAME}:{wrong.port}/"), 30)
    assert refused.param == "messages[0].content[1].image_url"


async def test_the_pictures_of_a_request_have_a_limit_together() -> None:
    size = MAX_IMAGE_BYTES - 1
    num = MAX_TOTAL_BYTES // size + 1
    async with host(answering(bytes(size))) as there:
        refused = await refusal(named(there.port), *(f"http://{NAME}:{there.port}/{i}" for i in range(num)))
    assert f"{MAX_TOTAL_BYTES >> 20} MB together at most" in refused.message


async def test_nothing_of_this_machine_goes_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine {NAME} login me password secret\nmachine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    async with host(answering(b"proxied")) as proxy, host(answering(b"x", "set-cookie: a=b")) as there:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        media = named(there.port)
        for _ in range(2):
            assert await fetch(media, f"http://{NAME}:{there.port}/") == [b"x"]
    assert proxy.num_connections == 0
    assert there.num_connections == 2
    for head in there.heads:
        fields = {line.partition(":")[0].lower() for line in head.strip().split("\r\n")[1:]}
        assert fields == {"host", "accept", "accept-encoding", "user-agent", "connection"}
        assert "accept-encoding: identity" in head.lower()


# ---- TLS


def certificate(name: str, folder: Path) -> tuple[Path, Path]:
    """For that name, signed by itself: the files of certificate and key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(secret)
    return folder / f"{name}.pem", folder / f"{name}.key"


@pytest.mark.requirement("M2")
async def test_the_certificate_is_that_of_the_name_though_the_connection_goes_to_an_address(tmp_path: Path) -> None:
    right, wrong = certificate(NAME, tmp_path), certificate("other.test", tmp_path)
    trusting = ssl.create_default_context(cafile=str(right[0]))
    trusting.load_verify_locations(str(wrong[0]))
    for files, is_right in ((right, True), (wrong, False)):
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*files)
        async with host(answering(b"x"), tls=tls) as there:
            media, url = named(there.port, tls=trusting), f"https://{NAME}:{there.port}/"
            if is_right:
                assert await fetch(media, url) == [b"x"]
                assert f"\r\nhost: {NAME}:{there.port}\r\n" in there.heads[0].lower()
            else:
                assert "did not answer" in (await refusal(media, url)).message
                assert there.heads == []
            assert there.names == [NAME]
            assert "did not answer" in (await refusal(named(there.port), url)).message, "nobody vouches for it by default"
