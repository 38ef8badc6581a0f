from __future__ import annotations

from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serveit.declare.sources import MAX_QUERY_FIELDS, read_query
from serveit.exceptions import InvalidRequest

texts = st.text(alphabet="ab=&%+2C ;é\x00").map(lambda text: text.encode("latin-1", "replace"))


@given(texts | st.binary())
def test_a_query_is_read_as_starlette_reads_it(query: bytes) -> None:
    assert read_query(query) == parse_qs(query.decode("latin-1"), keep_blank_values=True)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (b"a=1&b=&c&&a=2", {"a": ["1", "2"], "b": [""], "c": [""]}),
        (b"a=1%202+3&%C3%A9=%ff&b=%zz%", {"a": ["1 2 3"], "é": ["\ufffd"], "b": ["%zz%"]}),
        (b"a=b=c", {"a": ["b=c"]}),
        (b"&", {}),
    ],
)
def test_queries(query: bytes, found: dict[str, list[str]]) -> None:
    assert read_query(query) == found


@pytest.mark.parametrize("field", [b"a=1", b"a=%20"])
def test_too_many_fields_are_a_422(field: bytes) -> None:
    assert len(read_query(b"&".join([field] * MAX_QUERY_FIELDS))["a"]) == MAX_QUERY_FIELDS
    with pytest.raises(InvalidRequest, match="query: more than 1,000 fields") as caught:
        read_query(b"&".join([field] * (MAX_QUERY_FIELDS + 1)))
    assert caught.value.errors == [{"loc": ["query"], "msg": "more than 1,000 fields"}]
