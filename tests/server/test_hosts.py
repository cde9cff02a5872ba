"""Tests of how hosts and origins are read from request headers and from settings."""

import pytest

from server.hosts import check_host, check_origin, is_loopback, named_host


@pytest.mark.parametrize(
    ("header", "name", "loopback"),
    [
        ("localhost", "localhost", True),
        ("LocalHost:8000", "localhost", True),
        ("localhost.", "localhost", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("127.9.9.9:1", "127.9.9.9", True),
        ("[::1]", "::1", True),
        ("[0:0:0:0:0:0:0:1]:65535", "::1", True),
        ("[::ffff:127.0.0.1]:8000", "::ffff:7f00:1", True),
        ("evil.example:8000", "evil.example", False),
        ("localhost.evil.example", "localhost.evil.example", False),
        ("127.0.0.1.evil.example", "127.0.0.1.evil.example", False),
        ("0.0.0.0:8000", "0.0.0.0", False),
        ("[::]:8000", "::", False),
        ("2130706433", "2130706433", False),
        ("0x7f000001", "0x7f000001", False),
        ("my_host-1:", "my_host-1", False),
    ],
)
def test_the_name_in_a_host_header(header: str, name: str, loopback: bool) -> None:
    assert named_host(header) == name
    assert is_loopback(name) is loopback


@pytest.mark.parametrize(
    "header",
    [
        *("", " ", ":80", "localhost ", "localhost:80:80", "localhost:x", "localhost:123456"),
        *("localhost@evil.example", "evil.example#localhost", "localhost/x", "localhost\n"),
        *("::1", "[::1", "::1]", "[localhost]", "[127.0.0.1]", "[::1%lo]", "[]", "a..b", ".a"),
        *("localhost, evil.example", "l\u00f6calhost", "\u0661\u0662\u0667.0.0.1"),
    ],
)
def test_a_host_header_that_names_no_host(header: str) -> None:
    assert named_host(header) is None


def test_a_host_to_allow() -> None:
    for value, name in (
        ("LLM.example.org", "llm.example.org"),
        ("llm.example.org.", "llm.example.org"),
        ("10.0.0.1", "10.0.0.1"),
        ("2001:DB8::1", "2001:db8::1"),
        ("[2001:db8:0::1]", "2001:db8::1"),
    ):
        assert check_host(value) == name
    for value in (
        "",
        "*",
        "*.example.org",
        "a:80",
        "[::1]:80",
        "http://a",
        "a/",
        "a b",
        "x" * 500 + "/",
    ):
        with pytest.raises(ValueError, match="is not a host to allow") as caught:
            check_host(value)
        assert len(str(caught.value)) < 300


def test_an_origin_to_allow() -> None:
    for value, origin in (
        ("https://chat.example.org", "https://chat.example.org"),
        ("HTTPS://Chat.Example.org:443", "https://chat.example.org"),
        ("http://chat.example.org:80", "http://chat.example.org"),
        ("http://chat.example.org:443", "http://chat.example.org:443"),
        ("http://localhost:03000", "http://localhost:3000"),
        ("http://[0::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ("*", "*"),
    ):
        assert check_origin(value) == origin
    wrong = (
        *(
            "",
            "null",
            "chat.example.org",
            "https://",
            "https://a/",
            "https://a/path",
            "https://a?b",
        ),
        *("https://a:", "https://a:x", "https://a:65536", "https://*.a", "https://u@a", "//a"),
        *(
            "https://a b",
            "https://[a]",
            "https://\u00e4.example",
            "*://a",
            "https://" + "a" * 999 + "/",
        ),
    )
    for value in wrong:
        with pytest.raises(ValueError, match="is not an origin") as caught:
            check_origin(value)
        assert len(str(caught.value)) < 300
