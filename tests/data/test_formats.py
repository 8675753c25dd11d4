"""Files in every format, compressed or not, whole or damaged: the same records, or one line that names the place."""

import bz2
import csv
import gzip
import io
import json
import lzma

import fsspec
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.data import cache, file_formats, readers
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.sources import read_records
from jaxllm.data.store import load_texts, open_store
from jaxllm.tokenizers.trained import train

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = [
    "plain",
    'a "quoted" word',
    "comma, and\ttab",
    "文字 é 🙂",
    " spaces ",
    "1e3",
    "null",
    "{}",
]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".gzip": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".zstd": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
SUFFIXES = {
    "text": [".txt", ".md", ".TXT", ""],
    "jsonl": [".jsonl", ".JSONL", ".ndjson", ".json", ".Json"],
    "json": [".json", ".JSON"],
    "csv": [".csv", ".CSV"],
    "tsv": [".tsv", ".Tsv", ".tab"],
}
BOM = "\ufeff".encode()


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def table(rows, delimiter):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return file.getvalue()


def spell(kind, texts):
    """Records of these texts as a file of a kind."""
    records = [{"n": str(n), "text": text} for n, text in enumerate(texts)]
    if kind == "text":
        return "".join(text + "\n" for text in texts)
    if kind == "jsonl":
        return "".join(json.dumps(record) + "\n" for record in records)
    if kind == "json":
        return json.dumps(records, indent=1)
    return table(
        [["n", "text"], *([r["n"], r["text"]] for r in records)], "," if kind == "csv" else "\t"
    )


def read(path, **fields):
    fields.setdefault("min_chars", 0)
    return list(read_records(Source(str(path), **fields)))


def texts(path, **fields):
    return [record.fields["text"] for record in read(path, **fields)]


def refused(path, **fields):
    """The one line with which a file is refused; it begins with its path."""
    with pytest.raises(InputError) as error:
        read(path, **fields)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


# --- what is in a file


@pytest.mark.parametrize("bom", [b"", BOM], ids=["", "bom"])
@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", SUFFIXES)
def test_every_format_by_name_compressed_or_not_gives_the_same_records(
    tmp_path, kind, compression, bom
):
    first = 2 if kind in ("csv", "tsv") else 1
    content = COMPRESS[compression](bom + spell(kind, TEXTS).encode())
    for name in SUFFIXES[kind]:
        for end in (compression, compression.upper()):
            path = write(tmp_path / f"a{name}{end}", content)
            assert texts(path) == TEXTS
            assert [r.origin for r in read(path)] == [
                f"{path}:{n}" for n, _ in enumerate(TEXTS, start=first)
            ]
    path = write(tmp_path / f"a.data{compression}", content)
    assert texts(path, format=kind) == TEXTS


@pytest.mark.parametrize("name", ["a.PARQUET", "a.Array_Record", "a.arrayrecord", "a.bin"])
def test_binary_formats_by_name_in_any_case_or_as_the_source_says(tmp_path, name):
    import pyarrow
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    path, is_parquet = tmp_path / name, name in ("a.PARQUET", "a.bin")
    if is_parquet:
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for text in TEXTS:
            writer.write(json.dumps({"text": text}).encode())
        writer.close()
    assert texts(path, format="parquet" if name == "a.bin" else "auto") == TEXTS
    if name == "a.bin":
        assert "holds Parquet" in refused(path)


@FEW
@given(
    rows=st.lists(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=2, max_size=2
        )
    ),
    ends=st.sampled_from(["\n", "\r\n"]),
    kind=st.sampled_from(["csv", "tsv"]),
)
def test_tables_hold_any_text_and_rows_are_named_by_their_first_line(tmp_path, rows, ends, kind):
    file = io.StringIO(newline="")
    writer = csv.writer(
        file, delimiter="," if kind == "csv" else "\t", lineterminator=ends, quoting=csv.QUOTE_ALL
    )
    lines = []
    for row in [["n", "text"], *rows]:
        lines.append(1 + file.getvalue().count("\n"))
        writer.writerow(row)
    path = write(tmp_path / f"t.{kind}", file.getvalue())
    records = read(path)
    assert [[r.fields["n"], r.fields["text"]] for r in records] == rows
    assert [r.origin for r in records] == [f"{path}:{n}" for n in lines[1:]]


def test_a_long_cell_is_read(tmp_path):
    long = "word, " * 100_000
    assert texts(write(tmp_path / "t.csv", f'text,n\n"{long}",1\n')) == [long]


BAD_TABLES = {
    "": ": is empty; name the columns",
    "a,b,a\n1,2,3\n": ":1: the column 'a' is named twice",
    "a,b\n1,2\n1\n": ":3: has 1 cells under 2 names",
    "a,b\n1,2,3\n": ":2: has 3 cells under 2 names",
    'a,b\n"1\n2",3\n4,5,6\n': ":4: has 3 cells",
    'a,b\n1,"2\n3,4\n': ":2: not a row of a table",
    'a,b\n1,"2"3\n': ":2: not a row of a table",
    "a,b\n1,\x00\n": ":2: holds a NUL byte",
}


@pytest.mark.parametrize("content", BAD_TABLES)
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_row_that_does_not_fit_is_refused_with_its_line(tmp_path, kind, content):
    path = write(tmp_path / f"t.{kind}", content if kind == "csv" else content.replace(",", "\t"))
    assert refused(path).startswith(BAD_TABLES[content])


@pytest.mark.parametrize("name", ["a.dat", "a.jsonl_", "a.csv1", "a.2024", "a.dat.gz", "noname"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_json_and_tables_under_an_unknown_suffix_are_refused_with_the_fix(tmp_path, name, kind):
    content = spell(kind, TEXTS).encode()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    found = "jsonl" if kind == "json" else kind
    assert f'set the source\'s format to "{found}", or to "text"' in refused(path)
    assert texts(path, format=kind) == TEXTS
    assert "".join(
        text + "\n" for text in texts(path, format="text")
    ) == content.decode() + "\n" * (kind == "json")
    known = write(tmp_path / "known.txt", content)
    assert len(texts(known)) == len(content.decode().splitlines())


WORDS = st.sampled_from(
    [
        "the",
        "Sea",
        "is",
        "“deep”",
        "1,234",
        "[1]",
        "{x}",
        "a",
        "3.5",
        "(see",
        "below)",
        '"so"',
        "3,5",
    ]
)


@settings(deadline=None)
@given(
    st.lists(
        st.lists(WORDS, min_size=1).flatmap(
            lambda w: st.sampled_from([" ".join(w), ", ".join(w) + "."])
        )
    )
)
def test_prose_is_never_taken_for_records(lines):
    assert file_formats.guess("\n".join(lines)) == ""


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.dat"])
def test_what_is_no_utf8_text_is_refused_whatever_its_name(tmp_path, name):
    packed = {end: compress(b'{"text": "a"}\n' * 9) for end, compress in COMPRESS.items() if end}
    zipped = b"PK\x03\x04\x14\0\0\0\x08\0"
    for content in (*packed.values(), zipped, b"PAR1\x15\x04\x15"):
        message = refused(write(tmp_path / name, content))
        assert message.startswith(": holds ") and "; " in message
    for encoding in ("utf-16", "utf-16-be", "utf-16-le", "utf-32"):
        message = refused(
            write(tmp_path / name, '{"text": "ab"}\n{"text": "cd"}\n'.encode(encoding))
        )
        assert "UTF-16" in message or "NUL" in message
    good = {"a.json": "[", "a.csv": "text\n", "a.jsonl": '{"text": "a"}\n'}.get(name, "fine\n")
    line = 1 + good.count("\n")
    assert f":{line}: holds a NUL byte" in refused(write(tmp_path / name, good + "\0\n"))
    assert f":{line}: not UTF-8" in refused(write(tmp_path / name, good.encode() + b"caf\xe9\n"))


def test_json_is_a_list_or_lines(tmp_path):
    path = tmp_path / "a.json"
    assert texts(write(path, '\n{"text": "a"}\n\n{"text": "b"}')) == ["a", "b"]
    assert [r.origin for r in read(path)] == [f"{path}:2", f"{path}:4"]
    assert ":2: not valid JSON" in refused(write(path, '{"text": "a"}\n{"text": \n'))
    for content in ('{\n"data": [{"text": "a"}]\n}', "3", '["a"]', '[{"text": "a"}, 3]'):
        assert "must hold a list of objects, or one object a line" in refused(write(path, content))
    assert "not valid JSON" in refused(write(path, '[{"text": "a"},\n'))


# --- damage


@pytest.mark.parametrize("end", [end for end in COMPRESS if end])
def test_a_cut_compressed_file_is_never_taken_for_a_whole_one(tmp_path, end):
    pieces = ["".join(f"line {i}\n" for i in range(a, a + 40)).encode() for a in (0, 40)]
    whole = b"".join(map(COMPRESS[end], pieces))
    assert len(texts(write(tmp_path / f"a.txt{end}", whole))) == 80
    first = len(COMPRESS[end](pieces[0]))
    for size in sorted({*range(1, len(whole), 7), len(whole) - 1} - {first}):
        assert "cannot be read" in refused(write(tmp_path / f"cut.txt{end}", whole[:size]))


@FEW
@given(data=st.data(), kind=st.sampled_from([*SUFFIXES]), end=st.sampled_from([*COMPRESS]))
def test_damaged_bytes_give_records_or_one_line(tmp_path, data, kind, end):
    content = bytearray(COMPRESS[end](spell(kind, TEXTS).encode()))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = write(tmp_path / f"a{SUFFIXES[kind][0]}{end}", bytes(content))
    try:
        read(path)
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith(path)


BAD_JSON = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 300 + "1" + "}" * 300,
    "half a pair": '{"text": "a\\ud800b"}',
    "half a pair in a name": '{"text": "a", "\\uDC00": 1}',
    "a NUL": '{"text": "a\0b"}',
    "many digits": '{"text": "a", "n": ' + "7" * 5000 + "}",
    "no object": '"text"',
    "a cut line": '{"text": "a',
    "a byte order mark far inside": '\ufeff{"text": "a"}',
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_line_that_no_json_holds_is_refused_with_its_place(tmp_path, name):
    path = write(tmp_path / "a.jsonl", '{"text": "fine \\ud83d\\ude42"}\n' + BAD_JSON[name] + "\n")
    assert refused(path).startswith(":2: ")
    if name not in ("a NUL", "no object", "a cut line", "a byte order mark far inside"):
        assert refused(
            write(tmp_path / "a.json", f'[{{"text": "fine"}},\n{BAD_JSON[name]}]')
        ).startswith(": ")


def test_infinite_numbers_and_pairs_are_read(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude42", "n": 1e999, "m": -Infinity}\n')
    assert texts(path) == ["🙂"]


def test_a_function_is_checked_as_a_file_is(tmp_path, monkeypatch):
    bad = ["{'text': '\\ud800'}", "{'text': 'a', 'n': 7 ** 9999}", "{'text': 'a', (1, 2): 3}"]
    rows = "\n".join(
        f"def f{i}():\n    yield {{'text': 'fine'}}\n    yield {value}"
        for i, value in enumerate(bad)
    )
    write(tmp_path / "wrong_rows.py", rows)
    monkeypatch.syspath_prepend(tmp_path)
    for i in range(len(bad)):
        assert refused(f"py://wrong_rows:f{i}").startswith(":2: ")


# --- byte order marks and parts


def test_a_byte_order_mark_is_skipped_once_and_parts_keep_their_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PART_BYTES", 100)
    lines = [f"{'x' * (i % 37)} {i}" for i in range(60)]
    for kind, spelled in (
        ("jsonl", [json.dumps({"text": line}) for line in lines]),
        ("txt", lines),
    ):
        path = write(tmp_path / f"a.{kind}", BOM + "\n".join(spelled).encode())
        found = cache.fingerprint_file(path, 100, tmp_path)
        parts = readers.split_file(path, "auto", "line", found["size"], found["lines"])
        records = list(read_records(Source(path), parts))
        assert len(parts) > 10 and [r.fields["text"] for r in records] == lines
        assert [r.origin for r in records] == [f"{path}:{n}" for n in range(1, 61)]


@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, unit):
    path = write(tmp_path / "a.txt", "\ufeffone\n\ntwo")
    assert texts(path, record=unit, min_chars=1) == {"file": ["one\n\ntwo"]}.get(
        unit, ["one", "two"]
    )
    assert texts(write(tmp_path / "b.txt", "one\n\ufefftwo"))[1] == "\ufefftwo"


def test_tables_are_prepared_whole_and_a_format_that_is_said_is_the_same_store(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(readers, "PART_BYTES", 100)
    settings = {"vocab_size": 300, "model_type": "bpe", "character_coverage": 1.0, "num_threads": 1}
    tokenizer = train(iter(["some text of a line"] * 50), **settings)
    lines = [f"some\ntext {i}" for i in range(60)]
    keys = set()
    for name, said in (("a.csv", "auto"), ("b.dat", "csv")):
        path = write(tmp_path / name, table([["text"], *([line] for line in lines)], ","))
        config = DataConfig((Source(path, format=said),), held_out_fraction=0.0)
        examples = open_store(config, "document", tokenizer, tmp_path / "cache")["train"][0]
        keys.add(examples.key)
        assert len(examples.table) == 60
        assert list(load_texts(config, "train")) == lines
    assert len(keys) == 1


# --- paths


def test_a_home_folder_is_expanded_and_a_folder_is_refused_with_a_glob(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus" / "a.txt", "one\ntwo")
    assert texts("~/corpus/a.txt") == texts("~/corpus/*.txt") == ["one", "two"]
    assert texts("~/corpus/a.txt", exclude=("~/corpus/*.txt",)) == []
    folder = str(tmp_path / "corpus")
    assert f"is a folder; give a glob of the files in it, such as {folder}/*.jsonl" in refused(
        folder
    )
    assert "is a folder" in refused(folder + "/")
    with pytest.raises(InputError, match="no such file"):
        read("~nobody_here/a.txt")
    with pytest.raises(InputError, match="NUL"):
        read("a\0.txt")


def test_a_path_that_exists_is_not_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("[a].txt", "~.txt", "a*.txt", "a b.txt"):
        write(tmp_path / name, name)
        assert texts(name) == [name]


def test_an_object_store_names_its_formats_too():
    fs = fsspec.filesystem("memory")
    for name, content in {
        "a.JSONL.XZ": lzma.compress(spell("jsonl", TEXTS).encode()),
        "a.Csv": spell("csv", TEXTS),
    }.items():
        fs.pipe(f"/wrong/{name}", content if isinstance(content, bytes) else content.encode())
        assert texts(f"memory:///wrong/{name}") == TEXTS
    with pytest.raises(InputError, match="memory:///wrong: is a folder; give a glob"):
        read("memory:///wrong")
    fs.pipe("/wrong/a.dat", spell("jsonl", TEXTS).encode())
    assert "seems to hold JSON" in refused("memory:///wrong/a.dat")
