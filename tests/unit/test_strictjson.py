"""What JSON the service reads, what it refuses and with which words, and what it writes."""

import json
import math
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms_jwks import strictjson
from kms_jwks.errors import MalformedBody

REFUSED = [
    # what is sent, what the detail says
    (b"", "the input is empty"),
    (b" \n\t", "only spaces"),
    (b"\xff{}", "not UTF-8"),
    (b'{"a":"\xed\xa0\x80"}', "not UTF-8"),  # a surrogate in CESU form
    (b'{"a":"\xc0\xaf"}', "not UTF-8"),  # overlong
    ('{"a":1}'.encode("utf-16"), "not UTF-8"),
    ('{"a":1}'.encode("utf-16-le"), "malformed"),
    (b"\xef\xbb\xbf{}", "byte order mark"),
    (b"{", "truncated"),
    (b'{"a"', "truncated"),
    (b'{"a":', "truncated"),
    (b'{"a":1', "truncated"),
    (b'{"a":1,', "truncated"),
    (b'{"a":"x', "truncated"),
    (b'{"a":"\\u12', "malformed"),
    (b"[1,2", "truncated"),
    (b"{'a':1}", "malformed at line 1, column 2"),
    (b'{"a":1,}', "malformed"),
    (b"[1,]", "malformed"),
    (b'{"a" 1}', "malformed"),
    (b"{a:1}", "malformed"),
    (b'{"a":01}', "malformed"),
    (b'{"a":+1}', "malformed"),
    (b'{"a":.5}', "malformed"),
    (b'{"a":1.}', "malformed"),
    (b'{"a":0x1}', "malformed"),
    (b'{"a":tru}', "malformed"),
    (b'{"a":"\n"}', "malformed"),  # a raw control character
    (b'{"a":"\\x41"}', "malformed"),
    (b'{"a":1}//x', "follows"),
    (b'{"a":1}{}', "follows the JSON value at character 7"),
    (b"{}\x00", "follows"),
    ("{}\u00a0".encode(), "follows"),  # a space, but none of JSON's
    (b'{"a":1,"a":1}', "'a' appears twice"),
    (b'{"a":1,"\\u0061":2}', "'a' appears twice"),
    (b'{"o":{"b":1,"b":2}}', "'b' appears twice"),
    (b'[[{"b":1,"c":0,"b":2}]]', "'b' appears twice"),
    (b'{"":1,"":2}', "'' appears twice"),
    (b'{"a":{"x":1},"a":2}', "'a' appears twice"),
    (b'{"a":1,"a":2,"b":"\\u003a"}', "'a' appears twice"),  # as many colons as if there were one a
    (b'{"\\u003A":1,"a":1,"a":2}', "'a' appears twice"),
    (b'{"a":":","a":2,"b":"::"}', "'a' appears twice"),
    (b"NaN", "NaN is not JSON"),
    (b'{"a":NaN}', "NaN is not JSON"),
    (b'{"a":[Infinity]}', "Infinity is not JSON"),
    (b'{"a":-Infinity}', "-Infinity is not JSON"),
    (b'{"a":1e999}', "too large for a double"),
    (b'{"a":-1e999}', "too large for a double"),
    (b'{"a":1' + b"0" * 400 + b".0}", "too large for a double"),
    (b'{"a":"\\ud800"}', "lone surrogate"),
    (b'{"a":"\\uDC00"}', "lone surrogate"),
    (b'{"a":"\\ud800\\ud800"}', "lone surrogate"),
    (b'{"a":"\\udc00\\ud800"}', "lone surrogate"),
    (b'{"\\ud800":1}', "lone surrogate"),
    (b'[[["\\ud83d"]]]', "lone surrogate"),
    (b"1" * 5000, "An integer has 5000 characters"),
    (b'{"a":' + b"9" * 309 + b"}", "308 are read at most"),
    (b'{"a":-' + b"9" * 65_000 + b"}", "An integer has 65001 characters"),
    (b"[" * 32_000 + b"]" * 32_000, "more than 20000 structural characters"),
    (b'{"a":[' + b",".join([b"1"] * 20_000) + b"]}", "more than 20000 structural characters"),
    (b"{" + b",".join(b'"%x":1' % n for n in range(10_001)) + b"}", "more than 20000 structural characters"),
    (b'"' + b"," * 20_001 + b'"', "more than 20000 structural characters"),  # within strings too
    (b'{"a":[' + b",".join([b"[]"] * 6_000) + b"]", "truncated"),
]


@pytest.mark.parametrize(("data", "detail"), REFUSED, ids=range(len(REFUSED)))
def test_refuses_and_says_why(data: bytes, detail: str) -> None:
    with pytest.raises(MalformedBody) as caught:
        strictjson.loads(data)
    assert detail in caught.value.detail
    assert len(caught.value.detail) < 200


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"{}", {}),
        (b' \r\n\t{"a": [1, 2.5, -0, true, false, null, "x"]}\n', {"a": [1, 2.5, 0, True, False, None, "x"]}),
        (b'"x"', "x"),
        (b"0", 0),
        (b"1e2", 100.0),
        (b'{"a":1,"A":2}', {"a": 1, "A": 2}),
        (b'{"a":{"x":1},"b":{"x":2}}', {"a": {"x": 1}, "b": {"x": 2}}),
        ('{"é":"😀"}'.encode(), {"é": "😀"}),
        (b'{"a":"\\ud83d\\ude00"}', {"a": "😀"}),  # a pair is a character
        (b'{"a":"\\\\ud800"}', {"a": "\\ud800"}),  # an escaped backslash, not a surrogate
        (b'{"a":"\\u00e9\\u0000"}', {"a": "é\0"}),
        (b'{"a":"NaN"}', {"a": "NaN"}),
        (b'{"a":"[[[[[[[["}', {"a": "[[[[[[[["}),
        (b"9007199254740993", 2**53 + 1),  # exact; profiles.py has its own limit
        (b"9" * 308, int("9" * 308)),
        (b"1e-999", 0.0),
    ],
)
def test_reads(data: bytes, value: object) -> None:
    assert strictjson.loads(data) == value


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_nesting_is_bounded(opening: str, closing: str) -> None:
    step = opening.count("[") + opening.count("{")
    deepest = 32 // step
    assert strictjson.loads(f"{opening * deepest}1{closing * deepest}".encode()) is not None
    with pytest.raises(MalformedBody, match="more than 32 deep"):
        strictjson.loads(f"{opening * (deepest + 1)}1{closing * (deepest + 1)}".encode())


@pytest.mark.parametrize("levels", [900, 1100, 10_000])
def test_deep_nesting_never_becomes_a_recursion_error(levels: int) -> None:
    with pytest.raises(MalformedBody, match="more than 32 deep"):
        strictjson.loads(b"[" * levels + b"]" * levels)


def test_sixty_four_kib_of_opening_brackets() -> None:
    with pytest.raises(MalformedBody):
        strictjson.loads(b"[" * 65_536)
    with pytest.raises(MalformedBody):
        strictjson.loads(b'{"a":' * 13_000)


def test_near_the_end_of_the_stack_a_deep_body_is_still_a_refusal() -> None:
    def descend(levels: int) -> None:
        if levels:
            descend(levels - 1)
        else:
            strictjson.loads(b"[" * 200 + b"]" * 200)

    depth, frame = 0, sys._getframe()
    while frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
    with pytest.raises(MalformedBody, match="more than 32 deep"):
        descend(sys.getrecursionlimit() - depth - 80)


def test_many_containers_side_by_side_are_not_deep() -> None:
    assert strictjson.loads(b"[" + b",".join([b'{"a":[[]]}'] * 300) + b"]") == [{"a": [[]]}] * 300


def test_a_text_has_20000_structural_characters_at_most() -> None:
    numbers = b",".join([b"1"] * 19_999)
    assert strictjson.loads(b"[" + numbers + b"]") == [1] * 19_999
    with pytest.raises(MalformedBody, match="more than 20000 structural characters") as caught:
        strictjson.loads(b"[" + numbers + b",1,1]")
    assert caught.value.next_step == "Send less in one request."


def test_max_depth_is_the_callers() -> None:
    assert strictjson.loads(b"[[]]", max_depth=2) == [[]]
    with pytest.raises(MalformedBody, match="more than 1 deep"):
        strictjson.loads(b"[[]]", max_depth=1)


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"[]", "an array"), (b'"a"', "a string"), (b"1", "a number"), (b"1.5", "a number"), (b"true", "a boolean"),
     (b"null", "null")],
)  # fmt: skip
def test_an_object_is_expected(data: bytes, kind: str) -> None:
    with pytest.raises(MalformedBody, match=f"is {kind} where"):
        strictjson.loads_object(data)


def test_an_object_is_read() -> None:
    assert strictjson.loads_object(b'{"a":1}') == {"a": 1}


def test_the_detail_never_repeats_much_of_the_input() -> None:
    name = "secret" * 100
    with pytest.raises(MalformedBody) as caught:
        strictjson.loads(f'{{"{name}":1,"{name}":2}}'.encode())
    assert name[:60] not in caught.value.detail
    assert caught.value.__cause__ is None


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ({}, b"{}"),
        ({"b": 1, "a": [True, False, None, 1.5]}, b'{"b":1,"a":[true,false,null,1.5]}'),
        ({"é": "😀/<>"}, '{"é":"😀/<>"}'.encode()),
        ({"a": 'x"\\\n\x01'}, b'{"a":"x\\"\\\\\\n\\u0001"}'),
        (2**70, b"1180591620717411303424"),
        ("null", b'"null"'),
    ],
)
def test_writes_compact_utf8(value: object, data: bytes) -> None:
    assert strictjson.dumps(value) == data


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v], lambda v: {"a": {"b": v}}])
def test_never_writes_what_json_has_not(value: float, wrap: object) -> None:
    assert callable(wrap)
    with pytest.raises(ValueError, match="JSON compliant"):
        strictjson.dumps(wrap(value))


def test_never_writes_lone_surrogates() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        strictjson.dumps({"a": "\ud800"})
    with pytest.raises(ValueError, match="surrogates"):
        strictjson.dumps({"a": "\ud800", "b": None})


# --- properties -------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda children: st.lists(children, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), children, max_size=4),
    max_leaves=15,
)  # fmt: skip


@settings(deadline=None)
@given(json_values)
def test_what_is_written_reads_back(value: object) -> None:
    assert strictjson.loads(strictjson.dumps(value)) == value


@settings(deadline=None)
@given(json_values, st.booleans(), st.sampled_from([None, 1]))
def test_reads_what_the_standard_library_writes(value: object, ascii_only: bool, indent: int | None) -> None:
    assert strictjson.loads(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()) == value


@settings(deadline=None)
@given(json_values, st.data())
def test_a_truncated_document_is_refused_or_another_value(value: object, data: st.DataObject) -> None:
    whole = strictjson.dumps({"v": value})
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(MalformedBody):
        strictjson.loads(whole[:cut])


SHORT_TEXTS = st.binary(max_size=60) | st.text('{}[]",:0123456789eE+-.\\u dDfF8aNI', max_size=60).map(str.encode)
MEMBERS = st.lists(
    st.sampled_from([b'"a":1', b'"b":{"a":2}', b'"b":":"', b'"\\u0061":3', b'"c":"\\u003a"']), max_size=5
)


@settings(deadline=None)
@given(SHORT_TEXTS | MEMBERS.map(lambda members: b"{" + b",".join(members) + b"}"))
def test_both_readers_agree(data: bytes) -> None:
    """`loads` trusts the quick reader only where the other one would have read the same."""

    def outcome(read: Callable[[bytes], object]) -> object:
        try:
            value = read(data)
        except MalformedBody as error:
            return error.detail
        return type(value), value, json.dumps(value)

    assert outcome(strictjson.loads) == outcome(lambda text: strictjson._read_again(text, strictjson.MAX_DEPTH))


@settings(deadline=None)
@given(SHORT_TEXTS)
def test_nothing_but_malformed_body_ever_leaves(data: bytes) -> None:
    try:
        value = strictjson.loads(data)
    except MalformedBody:
        return
    assert value == json.loads(data)
    strictjson.dumps(value)
