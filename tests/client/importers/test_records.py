"""Records are read one at a time, and a malformed file is refused with its line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedoppu.client.importers import records
from fedoppu.client.importers.records import read_object, stream_records
from fedoppu.common.errors import DataError, UsageError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('ab"\\[]{},:\n é')),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "records.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    found=st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=4),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    chunk=st.sampled_from([1, 2, 7, 1 << 20]),
)
def test_what_is_written_is_read_whatever_the_chunks(
    tmp_path: Path, found: list[Any], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    text = json.dumps(found, indent=indent, ensure_ascii=ascii_only)
    path = written(tmp_path, text.encode("utf-8", "surrogatepass") if ascii_only else text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", chunk)
        assert list(stream_records(path)) == found


def test_records_are_read_one_at_a_time(tmp_path: Path) -> None:
    stream = stream_records(written(tmp_path, '[{"a": 1}, {"a": 2}, nonsense'))
    assert [next(stream), next(stream)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="expected a record, got 'n'"):
        next(stream)


def test_a_byte_order_mark_is_no_trouble(tmp_path: Path) -> None:
    assert list(stream_records(written(tmp_path, b'\xef\xbb\xbf[{"a": 1}]'))) == [{"a": 1}]
    assert read_object(written(tmp_path, b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: a list of records must begin with"),
        ('{"a": 1}', "line 1: a list of records must begin with"),
        ('[{"a": 1}', "line 1: expected a comma or ], got the end of the file"),
        ('[{"a": 1}\n\n{"b": 1}]', "line 3: expected a comma or ], got '{'"),
        ('[{"a": 1},\n]', "line 2: expected a record, got ']'"),
        ("[\n1]", "line 2: expected a record, got '1'"),
        ("[\n[1]]", "line 2: a record must be an object"),
        ('[{"a": 1},\n{"b":\n"x]', "line 2: the file ends in the record that begins here"),
        ('[{"a": 1},\n{"b": 1', "line 2: the file ends in the record that begins here"),
        ('[{"a": 1},\n{"b":\n1 2}]', "line 3: not JSON: Expecting ',' delimiter (column 3)"),
        ('[{"a":\n"x\ny"}]', "line 2: not JSON: Invalid control character at (column 3)"),
        ('[{"a":\nNaN}]', "line 1: not JSON: NaN is no number"),
        ('[{"a": 1}]\n,', "line 2: expected the end of the file, got ','"),
        ('[{"a": ' + "[" * 100_000 + "]" * 100_000 + "}]", "line 1: not JSON: "),
        (b'[{"a": "\xff"}]', "not UTF-8"),
    ],
)
def test_a_malformed_list_is_refused_with_its_line(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=r"records\.json: ") as error:
        list(stream_records(written(tmp_path, text)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":\n1 2}', r"line 2: not JSON: Expecting ',' delimiter \(column 3\)"),
        ("[]", "must hold an object, got a list"),
        ("null", "must hold an object, got null"),
        ('"x"', "must hold an object, got a string"),
        ("3", "must hold an object, got a number"),
        (b"\xff", "byte 0 is not UTF-8"),
    ],
)
def test_a_malformed_object_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_object(written(tmp_path, text))


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*nowhere"):
        read_object(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"there is no file .*nowhere"):
        next(stream_records(tmp_path / "nowhere"))
