"""Files of traces: what programs write is read, and what is no lines of text is refused by what it is."""

import codecs
import gzip
from itertools import islice

import pytest

from memserve.workload import BadConversation
from memserve.workload.trace_files import read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.5,374,44
2023-11-16 18:15:50.25,375,109
"""
MOONCAKE = '{"timestamp": 0, "input_length": 3, "output_length": 4, "hash_ids": [1]}\n'
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"


@pytest.fixture
def read(tmp_path):
    def of(data):
        path = tmp_path / "trace"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        found, requests = read_trace(path, None)
        return found.name, [(r.time_ns, r.num_prompt, r.num_output) for r in requests]

    return of


@pytest.mark.parametrize(
    "changed",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: text + "\n  \n\r\n",
        lambda text: "\n" + text.replace("\n", "\n\n"),
        lambda text: text.rstrip("\n"),
    ],
)
@pytest.mark.parametrize(("text", "num"), [(AZURE, 2), (MOONCAKE * 2, 2)])
def test_line_ends_blank_lines_and_a_byte_order_mark_change_nothing(read, text, num, changed):
    assert read(changed(text)) == read(text) and len(read(text)[1]) == num


def test_cells_may_be_quoted_padded_and_in_any_notation_of_the_same_number(read):
    plain = read(VIDUR + "1500.0,1000,44\n")
    for row in ('"1500","1000","44"', " 1500 , 1000,44 ", "1.5e3,1e3,4.4E1", "+1500.,1000.0,44.00"):
        assert read(VIDUR + row + "\n") == plain == ("Vidur", [(1_500_000_000_000, 1000, 44)])
    assert read(VIDUR.replace(",", " , ") + "1500,1000,44\n") == plain
    ours = MOONCAKE.replace('"input_length": 3', '"input_length": 3.0').replace('"timestamp": 0', '"timestamp": 1e3')
    assert read(ours)[1] == [(1_000_000_000, 3, 4)]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("1,2.5,3", "trace:2: num_prefill_tokens=2.5: expected a number of tokens"),
        ("1,1e300,3", "num_prefill_tokens=1e.300"),
        ("1,1e9999,3", "num_prefill_tokens='1e9999'"),
        ("1,0x10,3", "num_prefill_tokens='0x10'"),
        ("1,٣,3", "num_prefill_tokens='٣'"),
        ("1,,3", "num_prefill_tokens='': expected a number of tokens"),
        (",2,3", "arrived_at='': expected seconds"),
        (",,", "num_prefill_tokens=''"),
        ("1,2", "trace:2: 2 cells: expected 3"),
        ('1,2,"3', "trace:2: unexpected end of data"),
    ],
)
def test_a_row_that_says_no_such_number_is_named(read, row, named):
    with pytest.raises(BadConversation, match=named):
        read(VIDUR + row + "\n")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (gzip.compress(AZURE.encode(), mtime=0), "compressed by gzip: expected its text .gunzip -k"),
        (b"\x28\xb5\x2f\xfd\x00", "compressed by zstd"),
        (b"PK\x03\x04\x00", "an archive .zip."),
        (b"PAR1\x00", "Parquet: expected JSON lines or CSV"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4b\n", "a pointer of Git LFS: .*git lfs pull"),
        (AZURE.encode("utf-16"), "UTF-16: expected UTF-8"),
        (b"", "holds 0 requests: expected an object with"),
        (AZURE.replace(",", ";").encode(), "trace:1: expected an object with .*joined by commas"),
        (AZURE.encode() + b"2023-11-16 18:15:51,3,\xff\n", "trace:4: invalid UTF-8 at byte 22 of the line"),
        (MOONCAKE.encode() + b"\xff\n", "trace:2: invalid UTF-8"),
        (MOONCAKE.encode() + b"[]\n", "trace:2: expected an object with timestamp"),
        (MOONCAKE.rstrip().encode() * 2, "trace:1: malformed JSON"),
    ],
)
def test_a_file_that_is_no_lines_of_a_trace_is_refused_by_what_it_is(read, data, named):
    with pytest.raises(ValueError, match=named):
        read(data)


def test_a_file_is_read_only_as_far_as_it_is_asked_for(tmp_path):
    path = tmp_path / "trace"
    path.write_text(MOONCAKE * 3 + "nonsense\n")
    assert len(list(islice(read_trace(path, None)[1], 3))) == 3
    with pytest.raises(BadConversation, match="trace:4: malformed JSON"):
        list(read_trace(path, None)[1])
