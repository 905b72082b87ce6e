"""Issuer identifiers: the one spelling of each, which of them clients take for the same, and where they look."""
# ruff: noqa: RUF001 - letters that look like others are what some of these tests are about

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_jwks import issuers

NORMAL = [
    "https://login.example.com",
    "https://login.example.com/",
    "https://login.example.com/tenants/a",
    "https://login.example.com/tenants/a/",
    "http://127.0.0.1:8080/default",
    "https://[::1]:8443",
    "https://[2001:db8::1]/x",
    "https://localhost:8443",
    "https://login.example.com/a~b/%2F/%C3%A9/@:!$&'()*+,;=",
    "https://xn--mnchen-3ya.example",
    "https://xn--strae-oqa.example",
    "https://xn--80ak6aa92e.example",
    "accounts.example.com",
    "spiffe://example.org",
    "spiffe://example.org/Workload/a.b",
    "urn:example:Issuer-1",
    "urn:example:a%2Fb",
]

OTHERWISE = [
    ("HTTPS://login.example.com", "https://login.example.com"),
    ("https://Login.Example.COM/Path", "https://login.example.com/Path"),
    ("https://login.example.com.", "https://login.example.com"),
    ("https://login.example.com:443", "https://login.example.com"),
    ("http://login.example.com:080/", "http://login.example.com/"),
    ("https://login.example.com:", "https://login.example.com"),
    ("https://login.example.com:08443", "https://login.example.com:8443"),
    ("https://login.example.com//a", "https://login.example.com/a"),
    ("https://login.example.com/a//b//", "https://login.example.com/a/b/"),
    ("https://login.example.com/a/../b/./c", "https://login.example.com/b/c"),
    ("https://login.example.com/a/b/..", "https://login.example.com/a/"),
    ("https://login.example.com/../..", "https://login.example.com/"),
    ("https://login.example.com/%2e%2E/b", "https://login.example.com/b"),
    ("https://login.example.com/%7euser", "https://login.example.com/~user"),
    ("https://login.example.com/a%2fb", "https://login.example.com/a%2Fb"),
    ("https://login.example.com/é", "https://login.example.com/%C3%A9"),
    ('https://login.example.com/"a"', "https://login.example.com/%22a%22"),
    ("https://log%69n.example.com", "https://login.example.com"),
    ("https://münchen.example", "https://xn--mnchen-3ya.example"),
    ("https://MÜNCHEN.example", "https://xn--mnchen-3ya.example"),
    ("https://ｌogin.example.com", "https://login.example.com"),
    ("https://login。example.com", "https://login.example.com"),
    ("https://аррӏе.example", "https://xn--80ak6aa92e.example"),
    ("https://[2001:DB8:0::1]", "https://[2001:db8::1]"),
    ("Accounts.Example.com", "accounts.example.com"),
    ("spiffe://Example.org/A", "spiffe://example.org/A"),
    ("SPIFFE://example.org", "spiffe://example.org"),
    ("URN:Example:A%2fb", "urn:example:A%2Fb"),
]

NONE = [
    "",
    "me",
    "localhost",
    ".",
    "..",
    "a..b",
    "login example.com",
    "https://login.example.com/a b",
    "https://login.example.com\n",
    "https://login\t.example.com",
    "https://login.exa\u200bmple.com",
    "https://\u202elogin.example.com",
    "https://",
    "https:///path",
    "https:login.example.com",
    "https:/login.example.com",
    "https:\\\\login.example.com",
    "https://login.example.com\\@evil.example",
    "https://user@login.example.com",
    "https://user:secret@login.example.com",
    "https://login.example.com?tenant=a",
    "https://login.example.com#a",
    "https://login.example.com:0",
    "https://login.example.com:65536",
    "https://login.example.com:x",
    "https://login..example.com",
    "https://-login.example.com",
    f"https://{'a' * 64}.example.com",
    f"https://{'a.' * 127}example.com",
    "https://login.example.com/%zz",
    "https://login.example.com/%",
    "https://log%ffin.example.com",
    "https://login%2Fa.example.com",
    "https://0x7f.1",
    "https://127.1",
    "https://1.2.3.400",
    "https://[::1",
    "https://[::1%25eth0]",
    "https://[::ffff:1.2.3.4]",
    "https://xn--a.example",
    "https://xn--abc-.example",
    "https://xn--pple-zg0y.example",  # a full-width letter
    "https://xn--pple-4u20c.example",  # a mathematical letter
    "https://xn--apple-0613a.example",  # a variation selector, not shown
    "https://straße.example",
    "https://аpple.example",
    "https://xn--pple-43d.example",
    "https://goοgle.example",
    "ftp://login.example.com",
    "mailto:admin@example.com",
    "spiffe://",
    "spiffe://example.org/",
    "spiffe://example.org/../a",
    "spiffe://example.org/a%20b",
    "spiffe:example.org",
    "urn:x",
    "urn:example:",
    "urn:example:a?=b",
    "urn:example:a#b",
]


@pytest.mark.parametrize("issuer", NORMAL)
def test_what_is_in_normal_form_stays(issuer: str) -> None:
    assert issuers.normal_form(issuer) == issuer


@pytest.mark.parametrize(("issuer", "normal"), OTHERWISE)
def test_other_spellings_have_one_normal_form(issuer: str, normal: str) -> None:
    assert issuers.normal_form(issuer) == normal
    assert issuers.normal_form(normal) == normal
    assert issuers.comparable(issuer) == issuers.comparable(normal)


@pytest.mark.parametrize("issuer", NONE)
def test_what_is_no_issuer_is_refused_with_a_reason(issuer: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        issuers.normal_form(issuer)


@pytest.mark.parametrize("host", ["аpple", "xn--pple-43d", "goοgle"])
def test_letters_of_scripts_that_look_alike_are_named(host: str) -> None:
    with pytest.raises(ValueError, match=r"mixes (Cyrillic and Latin|Greek and Latin) letters"):
        issuers.normal_form(f"https://{host}.example")


@given(st.text(max_size=40) | st.text("htps:/.a%2fé[]0@?#-xn", max_size=40).map("https://".__add__))
def test_any_text_has_a_normal_form_that_is_one_or_is_refused(text: str) -> None:
    try:
        normal = issuers.normal_form(text)
    except ValueError:
        return
    assert issuers.normal_form(normal) == normal
    assert normal.isascii()


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("https://a.example", "https://a.example/", True),
        ("https://a.example/x", "https://a.example/x/", True),
        ("a.example", "https://a.example", True),
        ("https://a.example", "http://a.example", False),
        ("https://a.example/x", "https://a.example/X", False),
        ("https://a.example", "https://a.example:8443", False),
        ("urn:example:a", "urn:EXAMPLE:a", True),
        ("urn:example:a", "urn:example:A", False),
        ("not an issuer", "not an issuer", True),
    ],
)
def test_which_issuers_are_taken_for_the_same(one: str, two: str, *, same: bool) -> None:
    assert (issuers.comparable(one) == issuers.comparable(two)) is same


@pytest.mark.parametrize(
    ("issuer", "owner"),
    [
        ("https://keys.example/base/shop", "shop"),
        ("https://keys.example/base/shop/", "shop"),
        ("https://keys.example/base", None),
        ("https://keys.example/base/shop/eu", None),
        ("https://keys.example/base/Shop", None),
        ("https://keys.example/shop", None),
        ("https://other.example/base/shop", None),
        ("urn:example:shop", None),
    ],
)
def test_whose_default_an_issuer_is(issuer: str, owner: str | None) -> None:
    assert issuers.default_owner(issuer, "https://keys.example/base") == owner


@pytest.mark.parametrize(
    ("issuer", "places"),
    [
        (
            "https://a.example",
            (
                "https://a.example/.well-known/openid-configuration",
                "https://a.example/.well-known/oauth-authorization-server",
            ),
        ),
        (
            "https://a.example/",
            (
                "https://a.example/.well-known/openid-configuration",
                "https://a.example/.well-known/oauth-authorization-server",
            ),
        ),
        (
            "https://a.example:8443/keys/shop/",
            (
                "https://a.example:8443/keys/shop/.well-known/openid-configuration",
                "https://a.example:8443/.well-known/oauth-authorization-server/keys/shop",
            ),
        ),
        ("accounts.example.com", ()),
        ("spiffe://example.org", ()),
        ("urn:example:a", ()),
    ],
)
def test_where_clients_look_for_metadata(issuer: str, places: tuple[str, ...]) -> None:
    """OpenID Connect Discovery §4.1 strips the slash and appends; RFC 8414 §3.1 strips it and inserts."""
    assert issuers.metadata_urls(issuer) == places
