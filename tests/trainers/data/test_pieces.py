import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainwright.trainers.data.pieces import PieceTable, count_slices, cut

TEXT = st.text(st.sampled_from("ab \nñ€😀"), max_size=600)
LIMIT = st.integers(16, 200)


def slices(text: str, limit: int) -> list[bytes]:
    data = text.encode()
    of = int(count_slices(np.array([len(data)]), limit)[0])
    return [data] if of == 1 else [cut(data, index, of, limit) for index in range(of)]


@given(text=TEXT, limit=LIMIT)
def test_slices_are_the_document_and_none_is_too_long_or_empty(text, limit):
    parts = slices(text, limit)
    assert b"".join(parts) == text.encode()
    assert all(0 < len(part) <= limit for part in parts)
    assert all(part.decode() for part in parts)  # no character is cut


@given(limit=LIMIT)
def test_cuts_fall_after_whitespace_where_there_is_some(limit):
    for part in slices("ab cd\n" * 200, limit)[:-1]:
        assert part[-1:].isspace()


def test_a_million_bytes_without_whitespace():
    parts = slices("x" * 1_000_000, 65536)
    assert sum(map(len, parts)) == 1_000_000
    assert max(map(len, parts)) <= 65536


@given(
    lengths=st.lists(st.integers(0, 400), max_size=60),
    limit=LIMIT,
    keep=st.one_of(st.none(), st.integers(2, 5)),
)
def test_the_table_agrees_with_counting_them_out(lengths, limit, keep):
    mask = None if keep is None else (lambda documents: documents % keep == 0)
    table = PieceTable(np.array(lengths, dtype=np.int64), limit, mask)
    counts = count_slices(np.array(lengths, dtype=np.int64), limit)
    expected = [
        (document, index, int(counts[document]))
        for document in range(len(lengths))
        if keep is None or document % keep == 0
        for index in range(counts[document])
    ]
    assert table.count == len(expected)
    located = [column.tolist() for column in table.locate(np.arange(table.count))]
    assert list(zip(*located, strict=True)) == expected
    firsts = table.first_piece(np.arange(len(lengths) + 1)).tolist()
    assert firsts == [sum(e[0] < document for e in expected) for document in range(len(lengths) + 1)]
    assert table.total_bytes == sum(lengths[document] for document in {e[0] for e in expected})
    assert table.documents == len({e[0] for e in expected})
