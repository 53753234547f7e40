from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoppu.common.errors import DataError
from fedoppu.common.plain import dump_plain, load_plain


@dataclass(frozen=True)
class Inner:
    number: int
    blob: bytes


@dataclass(frozen=True)
class Outer:
    text: str
    share: float
    flag: bool
    inner: Inner | None
    many: tuple[Inner, ...]
    named: Mapping[int, Inner]
    buffer: bytearray


INNERS = st.builds(Inner, st.integers(-(2**60), 2**60), st.binary(max_size=5))


@given(
    st.builds(
        Outer,
        st.text(),
        st.floats(allow_nan=False),
        st.booleans(),
        st.none() | INNERS,
        st.lists(INNERS, max_size=3).map(tuple),
        st.dictionaries(st.integers(), INNERS, max_size=3),
        st.binary(max_size=4).map(bytearray),
    )
)
def test_what_is_dumped_is_loaded(value: Outer) -> None:
    loaded = load_plain(Outer, dump_plain(value))
    assert loaded == value
    assert isinstance(loaded.buffer, bytearray)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"3",
        b"[]",
        b'{"number":1}',
        b'{"number":1,"blob":"zz"}',
        b'{"number":true,"blob":""}',
        b'{"number":1.5,"blob":""}',
        b'{"number":1,"blob":7}',
        b'{"number":1,"blob":"","more":1}',
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="stored state is not a Inner"):
        load_plain(Inner, data)
