"""Several annotators at once: nobody gets a sample twice, each sample gets the answers it needs, nothing is lost."""

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.ranking.answers import CLAIM_SECONDS, Answers, Refused, clean_name
from jaxllm.ranking.records import pair_agreement, read_rankings, summarize

NAMES = ("Lee", "Kim", "王")
SAMPLES = [
    {
        "messages": [{"role": "user", "content": f"prompt {i}\u2028"}],
        "responses": ["a", "b", "c"],
        "split": "train",
    }
    for i in range(5)
]
SEED = 3


def open_answers(folder, overlap=0.5, **options):
    return Answers(folder, SAMPLES, seed=SEED, overlap=overlap, **options)


def needed(folder, overlap=0.5):
    return open_answers(folder, overlap)._needed


def dense(values):
    levels = sorted(set(values))
    return [levels.index(value) + 1 for value in values]


RANKS = st.lists(st.integers(1, 3), min_size=3, max_size=3).map(dense)
STEPS = st.tuples(
    st.sampled_from(["rank", "rank", "rank", "skip", "skip", "undo", "undo", "crash"]),
    st.sampled_from(NAMES),
    RANKS,
)


class Model:
    """What the files should hold: (index, annotator, ranks or None) of each answer, oldest first."""

    def __init__(self, folder):
        self.folder = folder
        self.given = []

    def newest(self, name):
        return next((answer for answer in reversed(self.given) if answer[1] == name), None)

    def of(self, index):
        return [name for i, name, _ in self.given if i == index]

    def check(self, answers):
        ranked = [
            (line["messages"], line["annotator"], line["ranks"])
            for line in read_rankings(self.folder / "rankings.jsonl")
        ]
        assert ranked == [
            (SAMPLES[index]["messages"], name, ranks)
            for index, name, ranks in self.given
            if ranks is not None
        ]
        lines = (self.folder / "skipped.jsonl").read_text().splitlines()
        skipped = [(line["index"], line["annotator"]) for line in map(json.loads, lines)]
        assert skipped == [(index, name) for index, name, ranks in self.given if ranks is None]
        assert answers.remaining == answers.needed - len(self.given)
        for name in NAMES:
            newest = self.newest(name)
            assert answers.newest(name) == (newest and newest[0])


@given(steps=st.lists(STEPS, max_size=40), overlap=st.sampled_from([0.0, 0.5, 1.0]))
@settings(deadline=None, max_examples=60)
def test_any_interleaving_leaves_the_files_equal_to_the_answers_given(
    tmp_path_factory, steps, overlap
):
    folder = tmp_path_factory.mktemp("answers")
    answers = open_answers(folder, overlap)
    model = Model(folder)
    wanted = needed(folder, overlap)
    for kind, name, ranks in steps:
        if kind == "crash":
            with (folder / "rankings.jsonl").open("a") as file:
                file.write('{"messages": [')
            answers = open_answers(folder, overlap)
        elif kind == "undo":
            newest = model.newest(name)
            if newest:
                answers.undo(newest[0], name)
                model.given.remove(newest)
                assert answers.next_for(name) == newest[0]
        else:
            index = answers.next_for(name)
            if index is None:
                continue
            assert name not in model.of(index)
            assert len(model.of(index)) < wanted[index]
            if kind == "rank":
                assert answers.rank(index, ranks, name)
            else:
                assert answers.skip(index, name)
            model.given.append((index, name, ranks if kind == "rank" else None))
        model.check(answers)
    # What was taken back is asked again.
    for _ in range(2):  # the first may see nothing while a sample is shown to another
        for name in NAMES:
            while (index := answers.next_for(name)) is not None:
                answers.rank(index, [1, 2, 3], name)
                model.given.append((index, name, [1, 2, 3]))
    model.check(answers)
    assert [len(model.of(index)) for index in range(len(SAMPLES))] == wanted


def test_people_who_answer_the_same_samples_at_once_are_told_so(tmp_path):
    answers = open_answers(tmp_path, overlap=0.0)
    refused = []

    def work(name):
        for index in range(len(SAMPLES)):
            try:
                answers.rank(index, [1, 2, 3], name)
            except Refused:
                refused.append((index, name))

    threads = [threading.Thread(target=work, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(refused), answers.remaining) == (10, 0)
    assert len(read_rankings(tmp_path / "rankings.jsonl")) == 5


def test_every_sample_gets_the_answers_it_needs_whoever_asks_when(tmp_path):
    wanted = needed(tmp_path)
    assert {*wanted} == {1, 2}
    answers = open_answers(tmp_path)

    def work(name):
        while (index := answers.next_for(name)) is not None:
            assert answers.rank(index, [1, 2, 3], name)

    threads = [threading.Thread(target=work, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in NAMES:  # one of them may have seen nothing while the others were at it
        work(name)
    assert answers.remaining == 0
    given = [line["messages"] for line in read_rankings(tmp_path / "rankings.jsonl")]
    assert [given.count(sample["messages"]) for sample in SAMPLES] == wanted


def test_shared_samples_depend_on_seed_and_index_only(tmp_path):
    samples = [
        {**SAMPLES[0], "messages": [{"role": "user", "content": str(i)}]} for i in range(1000)
    ]
    shares = {}
    for seed in (0, 1):
        answers = Answers(tmp_path, samples, seed=seed, overlap=0.3, overlap_annotators=3)
        shares[seed] = [count == 3 for count in answers._needed]
        assert {*answers._needed} == {1, 3}
        assert 230 < sum(shares[seed]) < 370
    assert shares[0] != shares[1]
    more = Answers(tmp_path, samples, seed=0, overlap=0.5)
    assert all(wide > 1 for narrow, wide in zip(shares[0], more._needed, strict=True) if narrow)


def test_a_sample_is_shown_to_one_person_at_a_time_for_ten_minutes(tmp_path):
    time = 0.0
    answers = open_answers(tmp_path, overlap=0.0, clock=lambda: time)
    assert answers.next_for("Lee") == answers.next_for("Lee") == 0
    assert answers.next_for("Kim") == 1
    time = CLAIM_SECONDS + 1
    assert answers.next_for("王") == 0
    # Lee's turn is over, but the first answer counts.
    assert answers.next_for("Lee") != 0
    assert answers.rank(0, [1, 2, 3], "Lee")
    with pytest.raises(Refused, match="others have answered"):
        answers.rank(0, [1, 2, 3], "王")
    assert answers.next_for("王") not in (0, None)


def test_the_same_answer_again_changes_nothing_and_another_is_refused(tmp_path):
    answers = open_answers(tmp_path)
    assert answers.rank(0, [1, 2, 2], "Lee", note="hm")
    data = (tmp_path / "rankings.jsonl").read_bytes()
    assert json.loads(data)["note"] == "hm"
    for again in (answers, open_answers(tmp_path)):
        assert not again.rank(0, [1, 2, 2], "Lee", note="hm")
        for other in ([1, 2, 3], [2, 1, 1]):
            with pytest.raises(Refused, match="already"):
                again.rank(0, other, "Lee", note="hm")
        with pytest.raises(Refused, match="already"):
            again.skip(0, "Lee")
    assert (tmp_path / "rankings.jsonl").read_bytes() == data
    assert not (tmp_path / "skipped.jsonl").read_bytes()


def test_undo_does_its_work_once(tmp_path):
    answers = open_answers(tmp_path, overlap=0.0)
    answers.rank(0, [1, 2, 3], "Lee")
    answers.skip(1, "Lee")
    with pytest.raises(Refused, match="others since"):
        answers.undo(0, "Lee")
    for _ in range(2):
        answers.undo(1, "Lee")
    assert (answers.newest("Lee"), answers.next_for("Lee")) == (0, 1)


def test_what_was_taken_back_is_asked_again(tmp_path):
    answers = open_answers(tmp_path, overlap=0.0)
    answers.rank(3, [1, 2, 3], "Lee")
    answers.undo(3, "Lee")
    assert answers.next_for("Lee") == 3  # not the first one
    for index in range(5):
        answers.rank(index, [1, 2, 3], "Lee")
    assert answers.next_for("Lee") is None
    for index in (4, 3, 2):
        answers.undo(index, "Lee")
    for index in (2, 3, 4, None):
        assert answers.next_for("Lee") == index
        if index:
            answers.rank(index, [1, 2, 3], "Lee")


def test_agreement_counts_pairs_that_two_people_have_ordered(tmp_path):
    answers = open_answers(tmp_path, overlap=1.0)
    answers.rank(0, [1, 2, 3], "Lee")
    assert answers.agreement() is None
    answers.rank(0, [1, 3, 2], "Kim")  # of three pairs one differs
    answers.rank(1, [1, 1, 2], "Lee")
    answers.rank(1, [1, 2, 3], "Kim")  # one pair is tied
    answers.skip(2, "Lee")
    answers.rank(2, [1, 2, 3], "Kim")
    answers.rank(3, [1, 2, 3], "王")
    assert answers.agreement() == (4 / 5, 5)
    result = summarize(read_rankings(tmp_path / "rankings.jsonl"), 1)
    assert result["annotators"] == 3
    assert (result["agreement"], result["agreement_pairs"]) == (4 / 5, 5)
    assert pair_agreement([[("Lee", (1, 2)), ("Lee", (2, 1))]]) is None


@given(st.text(max_size=50))
def test_a_name_is_taken_in_one_spelling_or_refused(text):
    try:
        name = clean_name(text)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert 1 <= len(name) <= 40 and name.isprintable()
        assert clean_name(name) == clean_name(f" {text} ") == name


def test_two_spellings_of_a_name_are_one():
    assert clean_name("Jose\u0301 ") == clean_name("Jos\u00e9")
    for bad in ("", "  ", "a\u202eb", "a\nb", "a" * 41, "\ud800"):
        with pytest.raises(InputError, match="annotator"):
            clean_name(bad)
