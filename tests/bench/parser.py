"""How long the service's JSON parser takes for bodies that were made to take long, in milliseconds a mebibyte.

Processor time of one thread, the best of three. `python -m tests.bench.parser FILE…` compares this tree's parser with
other versions of kms_jwks/strictjson.py, in one run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kms_jwks import errors, strictjson

MIB = 1 << 20
Parse = Callable[[bytes], object]


def _filled(unit: bytes, size: int = MIB, last: bytes = b"]}") -> bytes:
    head = b'{"a":['
    return head + b",".join([unit] * ((size - len(head) - len(last)) // (len(unit) + 1))) + last


def _allowed(unit: bytes, last: bytes = b"]}") -> bytes:
    """As much structure as the parser reads, and long numbers up to a mebibyte."""
    structure = sum(unit.count(character) for character in b"[]{}:,") + 1
    dense = b",".join([unit] * ((strictjson.MAX_STRUCTURE - 2000) // structure))
    number = b",1." + b"9" * 600
    return b'{"a":[' + dense + number * ((MIB - len(dense)) // len(number)) + last


def _members(count: int) -> bytes:
    return b",".join(b'"%07x":1' % number for number in range(count))


def shapes() -> Iterator[tuple[str, bytes]]:
    """Names and bodies, a mebibyte each at most."""
    arrays, objects = b"[" * 27 + b"]" * 27, b'{"":' * 27 + b"1" + b"}" * 27
    yield "arrays nested 29 deep", _filled(arrays)
    yield "objects nested 29 deep", _filled(objects)
    yield "empty arrays", _filled(b"[]")
    yield "many names", b"{" + _members(MIB // 13) + b"}"
    yield "small numbers", _filled(b"1")
    yield "fractions", _filled(b"1.5")
    yield "numbers of 308 digits", _filled(b"9" * 308)
    yield "fractions of 60 digits", _filled(b"1." + b"9" * 60)
    yield "one number of a mebibyte", b"9" * MIB
    yield "escapes", b'{"a":"' + b"\\n" * (MIB // 2 - 5) + b'"}'
    yield "Unicode escapes", b'{"a":"' + b"\\u0041" * (MIB // 6 - 2) + b'"}'
    yield "a name twice, last", b"{" + _members(MIB // 13) + b',"0000000":1}'
    yield "a name twice, outside", _filled(b"[]", last=b'],"a":1}')
    yield "long names, twice", b'{"%b":1,"%b":1}' % ((b"x" * (MIB // 2 - 8),) * 2)
    yield "truncated arrays", _filled(arrays, last=b"]")
    yield "allowed: arrays nested 29 deep", _allowed(arrays)
    yield "allowed: objects nested 29 deep", _allowed(objects)
    yield "allowed: the same, a name twice", _allowed(objects, b'],"a":1}')
    yield "allowed: the same, truncated", _allowed(objects, b"]")
    yield (
        "allowed: many names, one twice",
        (b"{" + _members(strictjson.MAX_STRUCTURE // 2 - 10) + b',"b":"' + b"x" * (MIB - 160_000) + b'","0000000":1}'),
    )


def rates(parse: Parse = strictjson.loads) -> dict[str, float]:
    """Milliseconds a mebibyte for each shape."""
    return {name: round(_best(parse, body) * 1000 * MIB / len(body), 1) for name, body in shapes()}


def _best(parse: Parse, body: bytes) -> float:
    times = []
    for _ in range(3):
        started = time.thread_time()
        with contextlib.suppress(errors.MalformedBody):
            parse(body)
        times.append(time.thread_time() - started)
    return min(times)


def _load(file: str, number: int) -> Parse:
    spec = importlib.util.spec_from_file_location(f"strictjson_{number}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loads: Parse = module.loads
    return loads


if __name__ == "__main__":
    found = [rates(_load(file, number)) for number, file in enumerate(sys.argv[1:])] + [rates()]
    columns = [*(Path(file).name for file in sys.argv[1:]), "this tree"]
    print(f"{'ms/MiB':32}" + "".join(f"{column:>24}" for column in columns))
    for shape in found[0]:
        print(f"{shape:32}" + "".join(f"{rate[shape]:24.1f}" for rate in found))
