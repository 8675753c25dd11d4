"""Tokenized once: the store says what the reference says, survives kills, company and damage, and reads every format."""

import dataclasses
import gzip
import json
import random
import shutil
import sys

import numpy as np
import pytest

from jaxllm.config import InputError
from jaxllm.data import cache, format, readers, sources, units
from jaxllm.data.config import DataConfig, Source
from jaxllm.data.contamination import measure_contamination, some_documents
from jaxllm.data.loader import PromptExample, examples_fingerprint, load_rows, rows_fingerprint
from jaxllm.data.sources import read_records
from jaxllm.data.splits import examples
from jaxllm.data.store import open_store


@pytest.fixture
def small(monkeypatch):
    """Units, runs and chunks so small that a little text makes many."""
    monkeypatch.setattr(readers, "PART_BYTES", 600)
    monkeypatch.setattr(units, "RUN", 16)


def texts_of(each, tokenizer):
    table = each.table.read(0, len(each.table))
    return [
        tokenizer.decode(
            each.tokens.read(row[None]["start"], row[None]["size"].astype(np.int64))[0]
        )
        for row in table
    ]


def write(path, records):
    path.write_text(
        "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n",
        encoding="utf-8",
    )
    return str(path)


def reference(records, data, kind):
    """split -> the contents that stay, in order: a held-out content is held out everywhere, and the first one stays."""
    assign_splits = [
        pair for i, rs in enumerate(records) for pair in format.assign_splits(data, kind, i, rs)
    ]
    held_out = {e.content() for e, side in assign_splits if side == "held_out"}
    split = {"train": [], "held_out": []}
    for e, side in assign_splits:
        crossing = side == "train" and e.content() in held_out
        if side and not crossing and e.content() not in [c for _, c in split[side]]:
            split[side].append((e.source, e.content()))
    return split


@pytest.mark.parametrize("kind", ["document", "chat"])
@pytest.mark.parametrize("seed", range(3))
def test_duplicates_and_splits_are_those_of_the_reference(tmp_path, tokenizer, small, kind, seed):
    rng = random.Random(seed)
    make = {
        "document": lambda n: {"text": f"text {n}"},
        "chat": lambda n: {
            "prompt": f"p{n // 3}",
            "response": f"r{n}",
            **({"text": f"t{n}"} if n % 5 else {}),
        },
    }[kind]
    names = []
    for first, name in enumerate("abc"):
        lines = [make(40 * first + rng.randrange(60)) for _ in range(150)]
        for line in rng.sample(lines, 6):
            line["split"] = rng.choice(["train", "held_out"])
        names.append(write(tmp_path / f"{name}.jsonl", lines))
    data = DataConfig(tuple(map(Source, names)), held_out_fraction=0.3)
    records = [list(read_records(s)) for s in data.sources]
    wanted = reference(records, data, kind)
    found = open_store(data, kind, tokenizer, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("unit-*"))) > 9
    for split in ("train", "held_out"):
        texts = [(i, t) for i, each in enumerate(found[split]) for t in texts_of(each, tokenizer)]
        as_text = lambda c: c[0] or "".join(m["content"] for m in c[1])
        assert texts == [(i, as_text(json.loads(content))) for i, content in wanted[split]]
        assert [e.content() for e in examples(data, kind, split)] == [
            content for _, content in wanted[split]
        ]


def test_parts_of_a_file_are_its_lines_with_their_numbers(tmp_path, small):
    lines = [("x" * random.Random(i).randrange(90)) + str(i) for i in range(300)]
    for end in ("\n", "\r\n"):
        path = tmp_path / "a.txt"
        path.write_bytes((end.join(lines)).encode())
        found = cache.fingerprint_file(str(path), readers.PART_BYTES, tmp_path)
        parts = readers.split_file(str(path), "auto", "line", found["size"], found["lines"])
        records = [r for part in parts for r in sources.read_records(Source(str(path)), [part])]
        assert len(parts) > 20 and [r.fields["text"] for r in records] == lines
        assert [r.origin for r in records] == [f"{path}:{n}" for n in range(1, 301)]


def test_a_mistake_far_inside_has_its_line(tmp_path, tokenizer, small):
    chats = [{"prompt": f"q{i}", "response": "ok" if i != 170 else "y" * 200} for i in range(200)]
    data = DataConfig((Source(write(tmp_path / "c.jsonl", chats)),), held_out_fraction=0.0)
    with pytest.raises(InputError, match=r"c.jsonl:171: this conversation takes"):
        load_rows(data, "chat", "train", tokenizer, 32, tmp_path / "cache")
    with open(tmp_path / "c.jsonl", "a") as file:
        file.write("{broken\n")
    with pytest.raises(InputError, match=r"c.jsonl:201: not valid JSON"):
        load_rows(data, "chat", "train", tokenizer, 32, tmp_path / "cache")


def test_new_text_is_all_that_is_tokenized_again(tmp_path, tokenizer):
    for name in "ab":
        write(tmp_path / f"{name}.txt", [f"{name} {i}" for i in range(50)])
    load = lambda path: open_store(
        DataConfig((Source(str(path)),)), "document", tokenizer, tmp_path / "cache"
    )
    load(tmp_path / "a.txt")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("unit-*")}
    data = DataConfig((Source(str(tmp_path / "a.txt")), Source(str(tmp_path / "b.txt"))))
    open_store(data, "document", tokenizer, tmp_path / "cache")
    assert (
        before.items()
        < {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("unit-*")}.items()
    )


def test_tokens_take_two_bytes_where_the_vocabulary_fits(tmp_path, tokenizer):
    data = DataConfig(
        (Source(write(tmp_path / "a.txt", ["one two three"] * 2)),), held_out_fraction=0.0
    )
    open_store(data, "document", tokenizer, tmp_path / "cache")
    (unit,) = (tmp_path / "cache").glob("unit-*")
    assert (unit / "tokens").stat().st_size == 2 * (len(tokenizer.encode("one two three")) + 2)


# --- formats and object stores


def write_array_record(path, values):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:4")
    for value in values:
        writer.write(value if isinstance(value, bytes) else json.dumps(value).encode())
    writer.close()


def formats(folder, n=200):
    """The same texts in every format."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    records = [{"text": f"text number {i} 文字"} for i in range(n)]
    plain = "".join(json.dumps(r) + "\n" for r in records).encode()
    frames = [zstandard.ZstdCompressor().compress(plain[a:b]) for a, b in ((0, 777), (777, None))]
    lines = "".join(r["text"] + "\n" for r in records).encode()
    files = {
        "a.jsonl": plain,
        "a.jsonl.gz": gzip.compress(plain),
        "a.jsonl.zst": b"".join(frames),
        "a.txt": lines,
    }
    for name, content in {**files, "a.txt.gz": gzip.compress(lines)}.items():
        (folder / name).write_bytes(content)
    table = pyarrow.table({"text": [r["text"] for r in records]})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=30)
    write_array_record(folder / "a.array_record", records)
    write_array_record(folder / "b.array_record", [r["text"].encode() for r in records])
    return [r["text"] for r in records], sorted(p.name for p in folder.iterdir())


def every_text(path, tokenizer, folder):
    data = DataConfig((Source(str(path)),), held_out_fraction=0.0)
    return texts_of(open_store(data, "document", tokenizer, folder)["train"][0], tokenizer)


def test_every_format_gives_the_same_texts_whole_and_in_parts(tmp_path, tokenizer, small):
    texts, names = formats(tmp_path)
    assert len(names) == 8
    for name in names:
        assert every_text(tmp_path / name, tokenizer, tmp_path / f"cache-{name}") == texts, name
        units = len(list((tmp_path / f"cache-{name}").glob("unit-*")))
        assert (units > 3) == (not name.endswith((".gz", ".zst"))), f"{name}: {units} units"
        records = list(read_records(Source(str(tmp_path / name))))
        assert [r.origin for r in records] == [f"{tmp_path / name}:{n}" for n in range(1, 201)]


def test_a_cut_or_foreign_file_is_one_clear_line(tmp_path):
    formats(tmp_path)
    cases = {}
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.array_record"):
        (tmp_path / f"cut-{name}").write_bytes((tmp_path / name).read_bytes()[:-40])
        (tmp_path / f"not-{name}").write_bytes(b"something else\n" * 9)
        cases |= {f"cut-{name}": "cut", f"not-{name}": "not"}
    write_array_record(tmp_path / "latin.array_record", [b"fine", b"caf\xe9"])
    for name in [*cases, "latin.array_record"]:
        with pytest.raises(InputError, match=name) as error:
            list(read_records(Source(str(tmp_path / name))))
        assert "\n" not in str(error.value)


def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch):
    formats(tmp_path)
    cases = {"a.jsonl.zst": "zstandard", "a.parquet": "pyarrow", "a.array_record": "array_record"}
    for name, package in cases.items():
        for module in [m for m in sys.modules if m.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=rf"{name}: reading it needs {package}; pip install"):
            list(read_records(Source(str(tmp_path / name))))
        monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"s3://bucket/x.txt: .*jaxllm\[data\]"):
        list(read_records(Source("s3://bucket/x.txt")))
    with pytest.raises(InputError, match=r"nosuch://x: .*give a file"):
        list(read_records(Source("nosuch://x")))


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An object store on this machine."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "ENDPOINT_URL": f"http://{host}:{port}",
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    fs.makedirs("corpus", exist_ok=True)
    yield fs
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_an_object_store_gives_the_same_texts(tmp_path, tokenizer, small, bucket):
    (tmp_path / "local").mkdir()
    texts, names = formats(tmp_path / "local")
    for name in names:
        bucket.put(str(tmp_path / "local" / name), f"corpus/texts/{name}")
        assert (
            every_text(f"s3://corpus/texts/{name}", tokenizer, tmp_path / f"cache-{name}") == texts
        ), name
    found = [r.origin for r in read_records(Source("s3://corpus/texts/a.jsonl*"))]
    assert (
        found[0] == "s3://corpus/texts/a.jsonl:1"
        and found[-1] == "s3://corpus/texts/a.jsonl.zst:200"
    )
    for path in ("s3://corpus/nothing.txt", "s3://corpus/*.nope", "s3://nobucket/x.txt"):
        with pytest.raises(InputError, match=r"no such file|cannot be read") as error:
            list(read_records(Source(path)))
        assert "\n" not in str(error.value)


def test_a_changed_object_is_tokenized_again(tmp_path, tokenizer, bucket):
    for text in ("hello one", "hello two"):
        bucket.pipe("corpus/a.txt", text.encode())
        bucket.invalidate_cache()
        assert every_text("s3://corpus/a.txt", tokenizer, tmp_path / "cache") == [text]


# --- fingerprints and n-grams


def test_the_fingerprint_names_contents_not_paths(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", [f"line {i} of a text" for i in range(100)])
    data = DataConfig((Source(path),), held_out_fraction=0.1)

    def print_of(data, length=32, kind="document"):
        return rows_fingerprint(
            load_rows(data, kind, "train", tokenizer, length, tmp_path / "cache")
        )

    first = print_of(data)
    shutil.copy(path, tmp_path / "b.txt")
    replaced = lambda **fields: dataclasses.replace(data, **fields)
    assert print_of(replaced(sources=(Source(str(tmp_path / "b.txt")),), workers=3)) == first
    others = [
        print_of(data, 33),
        print_of(replaced(split_salt="x")),
        print_of(replaced(held_out_fraction=0.2)),
    ]
    others += [
        print_of(replaced(sources=(Source(path, epochs=2.0),))),
        print_of(replaced(sources=(Source(path, min_chars=14),))),
    ]
    with open(path, "a") as file:
        file.write("more\n")
    assert len({first, *others, print_of(data)}) == 7
    prompts = [PromptExample([{"role": "user", "content": "q"}], [1, 2])]
    assert (
        examples_fingerprint(prompts)
        == examples_fingerprint(list(prompts))
        != examples_fingerprint([prompts[0]._replace(answer="a")])
    )


def test_contamination_is_the_share_of_ngrams_that_are_in_the_training_text(
    tmp_path, tokenizer, small, monkeypatch
):
    from jaxllm.data import contamination

    monkeypatch.setattr(contamination, "_CHUNK", 50)
    rng, n = random.Random(0), 5
    words = lambda k: " ".join(
        rng.choice(["line", "number", "some", "text", "of"]) for _ in range(k)
    )
    data = DataConfig(
        (Source(write(tmp_path / "a.txt", [words(rng.randrange(1, 30)) for _ in range(150)])),)
    )
    train_ids = [tokenizer.encode(e.text) for e in examples(data, "document", "train")]
    asked = [tokenizer.encode(words(rng.randrange(1, 12))) for _ in range(60)] + [
        train_ids[3][1:9],
        [7] * 20,
    ]
    grams = lambda ids: [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    known = {g for ids in train_ids for g in grams(ids)}
    hits = [[g in known for g in grams(ids)] for ids in asked if len(ids) >= n]
    training = open_store(data, "document", tokenizer, tmp_path / "cache")["train"]
    found = measure_contamination(asked, training, n)
    assert (
        found["ngrams"] == pytest.approx(np.mean([hit for each in hits for hit in each]))
        and 0 < found["ngrams"] < 1
    )
    assert (
        found["examples"] == pytest.approx(np.mean([any(h) for h in hits]))
        and 0 < found["examples"] < 1
    )
    assert (found["counted"], found["shorter"]) == (len(hits), len(asked) - len(hits))
    assert measure_contamination([[1, 2]], training, n) == {"counted": 0.0, "shorter": 1.0}
    held_out = open_store(data, "document", tokenizer, tmp_path / "cache")["held_out"]
    some = some_documents(held_out, 10**9)
    assert [tokenizer.decode(ids) for ids in some] == [
        e.text for e in examples(data, "document", "held_out")
    ]
