"""The files of answers: what older versions wrote resumes, damage is one line, a full disk leaves no half line."""

import errno
import json

import pytest

from jaxllm.config import InputError
from jaxllm.ranking import answer_files
from jaxllm.ranking.answers import Answers
from jaxllm.ranking.records import now


def sample(text, num_responses=3):
    messages = [{"role": "user", "content": text}]
    responses = [f"{text} {k}" for k in range(num_responses)]
    return {"messages": messages, "responses": responses, "split": "train"}


SAMPLES = [sample(f"prompt {i}") for i in range(6)]


def ranking(index, annotator="Lee", samples=SAMPLES):
    fields = {"ranks": [1, 2, 3], "annotator": annotator, "simulated": False, "time": now()}
    return {**samples[index], **fields}


def write(folder, rankings=(), skipped=()):
    for name, lines in (("rankings", rankings), ("skipped", skipped)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def undone(answers, annotator):
    """The samples that an annotator's undos give back, until there is nothing left."""
    indices = []
    while (newest := answers.newest(annotator)) is not None:
        answers.undo(newest, annotator)
        indices.append(newest)
    return indices


def test_files_of_older_versions_resume_and_are_undone_in_the_order_of_the_samples(tmp_path):
    write(tmp_path, [ranking(1), ranking(3)], [{"index": 0}, {"index": 2}, {"index": 4}])
    answers = Answers(tmp_path, SAMPLES)
    assert (answers.next_for("Lee"), answers.remaining) == (5, 1)
    assert answers.newest("Kim") is None
    assert undone(answers, "Lee") == [4, 3, 2, 1, 0]
    assert answers.remaining == 6
    assert not (tmp_path / "skipped.jsonl").read_bytes()


def test_old_skips_before_any_ranking_can_be_undone_by_anybody(tmp_path):
    write(tmp_path, skipped=[{"index": 0}, {"index": 1}])
    answers = Answers(tmp_path, SAMPLES)
    assert answers.next_for("Lee") == 2
    assert undone(answers, "Lee") == [1, 0]


def test_a_skip_stands_among_the_rankings_where_it_was_given(tmp_path):
    """Also where an annotator did not answer in the order of the samples."""
    answers = Answers(tmp_path, SAMPLES)
    for index, skips in ((4, False), (1, True), (5, False), (0, True), (2, True), (3, False)):
        if skips:
            answers.skip(index, "Lee")
        else:
            answers.rank(index, [1, 2, 3], "Lee")
    assert undone(Answers(tmp_path, SAMPLES), "Lee") == [3, 2, 0, 5, 1, 4]


def test_identical_samples_are_answered_one_after_the_other(tmp_path):
    same = [sample("same")] * 3
    answers = Answers(tmp_path, same, overlap=1.0)
    for index, name in ((1, "Lee"), (0, "Kim"), (0, "Lee"), (2, "Kim"), (1, "Kim")):
        answers.rank(index, [1, 2, 3], name)
    answers = Answers(tmp_path, same, overlap=1.0)
    assert answers.remaining == 1
    assert (answers.count("Lee"), answers.count("Kim")) == (2, 3)
    # An older version asked the next one after a skip.
    write(tmp_path, [ranking(1, samples=same)], [{"index": 0}])
    assert Answers(tmp_path, same).next_for("Lee") == 2


@pytest.mark.parametrize(
    ("skipped", "word"),
    [
        ([{"index": True}], "index: must be"),
        ([{"index": 0, "annotator": 3}], "annotator: must be"),
        ([{"index": 0, "annotator": "Lee", "after": "1"}], "must be"),
        ([{"index": 6}], "other samples"),
        ([{"index": -1}], "other samples"),
        ([{"index": 1}, {"index": 1}], "twice"),
    ],
)
def test_damaged_skips_are_one_line(tmp_path, skipped, word):
    write(tmp_path, skipped=skipped)
    with pytest.raises(InputError, match=word) as caught:
        Answers(tmp_path, SAMPLES)
    assert "\n" not in str(caught.value)


def test_more_rankings_of_a_sample_than_there_are_such_samples_are_of_others(tmp_path):
    write(tmp_path, [ranking(1), ranking(1)])
    with pytest.raises(InputError, match="other samples"):
        Answers(tmp_path, SAMPLES)


def test_a_full_disk_leaves_the_file_as_it_was_and_the_answer_can_be_given_again(
    tmp_path, monkeypatch
):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    answers = Answers(tmp_path, SAMPLES)
    answers.rank(0, [1, 2, 3], "Lee")
    path = tmp_path / "rankings.jsonl"
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(answer_files.os, "fsync", full)
        with pytest.raises(OSError, match="space"):
            answers.rank(1, [1, 2, 3], "Lee")
    assert path.read_bytes() == before
    assert answers.rank(1, [1, 2, 3], "Lee")
    assert Answers(tmp_path, SAMPLES).count("Lee") == 2
