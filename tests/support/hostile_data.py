"""Strategies for hostile files: valid ones with parts exchanged, cut, nested and repeated, and plain bytes."""

from __future__ import annotations

import copy
import gzip
import json
from typing import Any

from hypothesis import strategies as st

HUGE = [10**9, 2**31, 2**31 - 1, 2**32, 2**63, 2**64, -1, -(2**31), 0, 1, 10**40, 10**400]

ODD_TEXTS = [
    "",
    " ",
    "\0",
    "a\0b",
    "../../etc/passwd",
    "/dev/zero",
    "\x1b[2J\x1b[31m",
    "\u202e\u0663",
    "x" * 5000,
    "__init__",
    "base",
    "null",
    "nan",
    "{}",
    "!!python/object/apply:os.system [ls]",
    "\ud800",
]

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(HUGE),
    st.integers(-10, 1000),
    st.floats(),
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=8),
)

VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(ODD_TEXTS) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def nested(depth: int) -> Any:
    """Lists inside one another."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in plain data, but for those in long lists, of which the first ones stand for all."""
    found = [path] if path else []
    inner = data.items() if isinstance(data, dict) else enumerate(data[:3]) if isinstance(data, list) else ()
    return found + [place for key, value in inner for place in places(value, (*path, key))]


@st.composite
def changed(draw: st.DrawFn, data: Any, at_most: int = 3) -> Any:
    """Plain data with a few values exchanged, removed, added or moved."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, at_most))):
        *way, last = draw(st.sampled_from(places(data)))
        owner = data
        for key in way:
            owner = owner[key]
        action = draw(st.sampled_from(["exchange", "exchange", "exchange", "remove", "add", "repeat"]))
        if action == "exchange":
            owner[last] = draw(VALUES)
        elif action == "remove":
            del owner[last]
        elif action == "add" and isinstance(owner, dict):
            owner[draw(st.text(max_size=6) | st.sampled_from(ODD_TEXTS))] = draw(VALUES)
        elif action == "repeat" and isinstance(owner[last], list):
            owner[last] = owner[last] * draw(st.sampled_from([2, 100]))
        if not places(data):
            break
    return data


def as_json(data: Any) -> bytes:
    """JSON as Python writes it, with NaN, and halves of surrogate pairs escaped."""
    return json.dumps(data).encode()


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes with a few of them exchanged, cut or added."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        action = draw(st.sampled_from(["flip", "cut", "insert", "truncate", "number"]))
        if action == "flip" and data:
            data[place] = draw(st.integers(0, 255))
        elif action == "cut":
            del data[place : place + draw(st.integers(1, 16))]
        elif action == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif action == "truncate":
            del data[place:]
        else:
            data[place : place + 8] = draw(st.sampled_from(HUGE[:-2])).to_bytes(16, "little", signed=True)[:8]
    return bytes(data)


ODD_FILES = st.sampled_from(
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"0",
        b'""',
        b"NaN",
        b"[" * 200_000,
        b'{"a":' * 50_000,
        as_json(nested(500)),
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf{}",
        b"\x00" * 1000,
        b"9" * 5000,
        b'{"a": 1' + b"0" * 5000 + b"}",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"a: &a [*a]",
        b"a: &a {b: *a}",
        b"x: &x [1,1,1,1]\ny: &y [*x,*x,*x,*x]\nz: &z [*y,*y,*y,*y]\n"
        + b"".join(
            b"k%d: &k%d [%s]\n" % (n, n, b",".join([b"*z" if n == 0 else b"*k%d" % (n - 1)] * 9)) for n in range(30)
        ),
        b"? {a: b}\n: c",
        b"!!python/name:os.system x",
        b"2001-99-99",
        b"a: 2001-99-99",
        b"- " * 20_000,
        b"a: " + b"9" * 5000,
        b"a: 1:" + b":".join([b"59"] * 2000),
        gzip.compress(b"\0" * 10**6),
    ]
)


def file_like(data: Any) -> st.SearchStrategy[bytes]:
    """JSON of changed data, damaged JSON of good data, or a file of another kind."""
    return st.one_of(changed(data).map(as_json), changed(data).map(as_json), damaged(as_json(data)), ODD_FILES)
