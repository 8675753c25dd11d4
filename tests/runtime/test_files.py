"""Atomic writes: a reader sees the old content or the new one; damaged lines cost no other lines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.runtime.files import json_line, new_folder, read_jsonl, read_jsonl_tail, write_whole


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    for content in ("old", "new é \ud800"):
        write_whole(tmp_path / "a.txt", content)
    assert (tmp_path / "a.txt").read_bytes() == "new é ?".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_replaces_the_older_one_when_it_is_complete(tmp_path):
    target = tmp_path / "target"
    for number in (1, 2):
        with new_folder(target) as folder:
            (folder / f"{number}.txt").touch()
            assert not (target / f"{number}.txt").exists()
    assert [path.name for path in target.iterdir()] == ["2.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_that_fails_leaves_the_older_one(tmp_path):
    target = tmp_path / "target"
    with new_folder(target) as folder:
        (folder / "kept.txt").touch()
    with pytest.raises(OSError), new_folder(target) as folder:
        (folder / "half.txt").touch()
        raise OSError
    assert [path.name for path in target.iterdir()] == ["kept.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_a_killed_process_left_of_a_folder_is_removed(tmp_path):
    (tmp_path / ".target.partial" / "stale").mkdir(parents=True)
    with new_folder(tmp_path / "target") as folder:
        (folder / "a.txt").touch()
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["a.txt"]


def test_ignored_damage_prints_nothing(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n[2]\n{"a": 3}\n{"a": 4')
    assert read_jsonl(path, damaged="ignore") == [{"a": 1}, {"a": 3}]
    assert capsys.readouterr().err == ""
    assert read_jsonl(tmp_path / "missing.jsonl") == []


@given(st.lists(st.integers(0, 10**6)), st.integers(1, 200))
def test_the_tail_of_a_file_has_its_last_whole_lines(tmp_path_factory, numbers, most_bytes):
    path = tmp_path_factory.mktemp("tail") / "lines.jsonl"
    lines = [json_line({"number": number}) for number in numbers]
    path.write_text("".join(lines) + '{"number": 3')
    found = [line["number"] for line in read_jsonl_tail(path, most_bytes)]
    assert found == numbers[len(numbers) - len(found) :]
    # As many as there is room for, with the incomplete one at the end.
    room = most_bytes - len('{"number": 3')
    fits = sum(len("".join(lines[i:])) <= room for i in range(len(lines)))
    assert len(found) == fits
