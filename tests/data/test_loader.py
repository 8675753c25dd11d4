"""What stages load: batches are a pure function of the step, the same on any sharding, hosts and resumes."""

import concurrent.futures
import dataclasses
import json
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import InputError
from jaxllm.data import batches as global_batches
from jaxllm.data import mixture as order_of_rows
from jaxllm.data.config import DataConfig, Phase, Source
from jaxllm.data.format import Example
from jaxllm.data.loader import (
    epoch_batches,
    epochs_of,
    load_prompts,
    load_ranked,
    load_rows,
    make_batch_at,
    make_prompt_batch_at,
    ranked_epoch,
)
from jaxllm.data.splits import examples
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import activation


@pytest.fixture
def text_data(tmp_path):
    for name, n in (("a", 90), ("b", 40)):
        lines = [f"{name} line number {i} of some text 文字 {name * (i % 50)}" for i in range(n)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    sources = (
        Source(str(tmp_path / "a.txt"), weight=3.0),
        Source(str(tmp_path / "b.txt"), weight=1.0),
    )
    return DataConfig(sources, held_out_fraction=0.2)


def test_rows_hold_every_document_and_their_bytes(text_data, tokenizer, tmp_path):
    mixture = load_rows(text_data, "document", "train", tokenizer, 32, tmp_path / "cache")
    texts = [e.text for e in examples(text_data, "document", "train")]
    assert sum(r.num_bytes for r, _ in mixture) == sum(len(t.encode()) for t in texts)
    assert sum(r.num_tokens for r, _ in mixture) == sum(len(tokenizer.encode(t)) + 1 for t in texts)
    assert [w for _, w in mixture] == [3.0, 1.0]


def test_batches_are_pure_and_the_same_on_any_sharding(text_data, tokenizer, tmp_path):
    mixture = load_rows(text_data, "document", "train", tokenizer, 32, tmp_path / "cache")
    wide = activation(make_mesh(MeshConfig()), "batch", None)
    narrow = activation(make_mesh(MeshConfig(data=1), jax.devices()[:1]), "batch", None)
    batch_at = [make_batch_at(mixture, batch_size=8, seed=5, sharding=s) for s in (wide, narrow)]
    for step in (7, 0, 300, 7):
        first, second = (jax.tree.map(np.asarray, f(step)) for f in batch_at)
        jax.tree.map(np.testing.assert_array_equal, first, second)
    other = make_batch_at(mixture, batch_size=8, seed=6, sharding=narrow)
    assert (np.asarray(other(0)["tokens"]) != np.asarray(batch_at[1](0)["tokens"])).any()


def test_an_epoch_is_a_permutation_and_the_next_another_one(text_data, tokenizer, tmp_path):
    (rows, _), _ = load_rows(text_data, "document", "train", tokenizer, 32, tmp_path / "cache")
    n = rows.num_rows
    batch_at = make_batch_at(
        [(rows, 1.0)], batch_size=1, seed=0, sharding=activation(one_device(), "batch", None)
    )
    drawn = [tuple(np.asarray(batch_at(i)["tokens"])[0]) for i in range(2 * n)]
    whole = {tuple(rows.row(i)["tokens"]) for i in range(n)}
    assert set(drawn[:n]) == set(drawn[n:]) == whole
    assert drawn[:n] != drawn[n:]


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def test_a_mixture_keeps_its_proportions(text_data, tokenizer, tmp_path):
    mixture = load_rows(text_data, "document", "train", tokenizer, 32, tmp_path / "cache")
    batch_at = make_batch_at(
        mixture, batch_size=100, seed=0, sharding=activation(one_device(), "batch", None)
    )
    from_b = {tuple(mixture[1][0].row(i)["tokens"]) for i in range(mixture[1][0].num_rows)}
    share = np.mean([tuple(row) in from_b for row in np.asarray(batch_at(0)["tokens"])])
    assert abs(share - 0.25) < 0.02


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 50).map(lambda n: n / 10), min_size=1, max_size=5),
    st.integers(0, 10**12),
)
def test_the_shares_of_a_mixture_are_exact(weights, number):
    """Never off by more rows than there are sources, and by none after each round."""
    phase = order_of_rows.Interval(0, order_of_rows._shares(weights), [0] * len(weights))
    assert sum(phase.counts(number)) == number
    for count, weight in zip(phase.counts(number), weights, strict=True):
        assert abs(count - number * weight / sum(weights)) < len(weights) + 1e-3
    step = [b - a for a, b in zip(phase.counts(number), phase.counts(number + 1), strict=True)]
    assert sorted(step) == [0] * (len(weights) - 1) + [1]
    assert phase.counts(7 * sum(phase.shares)) == [7 * share for share in phase.shares]


def test_an_epoch_by_size_sees_every_row_as_often_as_asked():
    """Sizes 30 and 20 with 1 and 2.5 epochs: 80 rows."""
    phase = order_of_rows.Interval(0, order_of_rows._shares([30 * 1.0, 20 * 2.5]), [0, 0])
    order = order_of_rows.make_order([30, 20], [phase], seed=3)
    drawn = [order(i) for i in range(80)]
    assert sorted(row for source, row in drawn if source == 0) == [*range(30)]
    assert (
        sorted(np.bincount([row for source, row in drawn if source == 1]).tolist())
        == [2] * 10 + [3] * 10
    )


CURRICULUM = (Phase(3, (0.0, 1.0)), Phase(10, (1.0, 1.0)), Phase(11, (5.0, 2.0)))


def test_a_curriculum_changes_the_shares_and_not_the_order_inside_a_source(
    text_data, tokenizer, tmp_path
):
    mixtures = [
        load_rows(
            dataclasses.replace(text_data, curriculum=c),
            "document",
            "train",
            tokenizer,
            32,
            tmp_path / "cache",
        )
        for c in ((), CURRICULUM)
    ]
    sizes = [rows.num_rows for rows, _ in mixtures[0]]
    orders = [
        order_of_rows.make_order(sizes, order_of_rows.intervals(mixture, 8), seed=5)
        for mixture in mixtures
    ]
    drawn = [[order(i) for i in range(8 * 40)] for order in orders]
    for source in (0, 1):
        one, two = ([row for s, row in each if s == source] for each in drawn)
        assert one[: len(two)] == two[: len(one)] and len(one) != len(two)
    assert drawn[0][:24] == drawn[1][:24]
    shares = [
        np.mean([s for s, _ in drawn[1][8 * a : 8 * b]]) for a, b in ((3, 10), (10, 11), (11, 25))
    ]
    assert shares == [1.0, 0.5, pytest.approx(2 / 7)]
    assert epochs_of(mixtures[1], 40, 8) == [
        sum(s == k for s, _ in drawn[1]) / sizes[k] for k in (0, 1)
    ]
    began = time.monotonic()
    orders[1](10**15)
    assert time.monotonic() - began < 0.1


def test_a_curriculum_that_makes_no_sense_is_refused(text_data, tokenizer, tmp_path):
    for phases in [(Phase(0, (1.0, 1.0)),), (Phase(5, (1.0, 1.0)), Phase(5, (1.0, 2.0)))]:
        with pytest.raises(ValueError, match="curriculum: steps"):
            dataclasses.replace(text_data, curriculum=phases)
    for weights in [(1.0,), (0.0, 0.0), ()]:
        with pytest.raises(
            ValueError, match="curriculum: step 5 needs a weight for each of 2 sources"
        ):
            dataclasses.replace(text_data, curriculum=(Phase(5, weights),))
    (tmp_path / "b.jsonl").write_text('{"text": "a b c d", "split": "held_out"}')
    sources = (text_data.sources[0], Source(str(tmp_path / "b.jsonl"), weight=1.0))
    empty = dataclasses.replace(text_data, sources=sources, curriculum=(Phase(5, (0.0, 1.0)),))
    assert load_rows(empty, "document", "held_out", tokenizer, 32, tmp_path / "cache")
    with pytest.raises(InputError, match="step 5 gives weight only to sources without examples"):
        load_rows(empty, "document", "train", tokenizer, 32, tmp_path / "cache")


def whole_batches(mixture, steps, sharding, workers=0):
    """The batches of these steps, prepared by so many threads at once."""
    batch_at = make_batch_at(mixture, batch_size=8, seed=5, sharding=sharding)
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        made = pool.map(batch_at, steps) if workers else map(batch_at, steps)
        return [{name: np.asarray(value) for name, value in batch.items()} for batch in made]


def test_rows_are_the_same_for_any_hosts_workers_and_after_any_resume(
    text_data, tokenizer, tmp_path
):
    """Every host prepares its own cache, and makes only the rows of its own devices."""
    data, steps = dataclasses.replace(text_data, curriculum=CURRICULUM), [*range(14), 300]
    load = lambda name: load_rows(data, "document", "train", tokenizer, 32, tmp_path / name)
    one = activation(one_device(), "batch", None)
    expected = whole_batches(load("cache"), steps, one)
    for workers in (1, 3):
        jax.tree.map(
            np.testing.assert_array_equal,
            whole_batches(load("cache"), steps, one, workers),
            expected,
        )
    jax.tree.map(
        np.testing.assert_array_equal, whole_batches(load("cache"), steps[6:], one), expected[6:]
    )
    for hosts in (1, 2, 4):
        parts = []
        for host in range(hosts):
            mixture, made = load(f"cache-{hosts}-{host}"), []
            order = order_of_rows.make_order(
                [r.num_rows for r, _ in mixture], order_of_rows.intervals(mixture, 8), 5
            )

            def row(i, step, mixture=mixture, order=order, made=made):
                made.append(i)
                source, number = order(step * 8 + i)
                return mixture[source][0].row(number)

            mine = range(8 * host // hosts, 8 * (host + 1) // hosts)
            parts.append([[row(i, step) for i in mine] for step in steps])
        for step, batch in enumerate(expected):
            rows = [row for host in parts for row in host[step]]
            for name, value in batch.items():
                np.testing.assert_array_equal(np.stack([row[name] for row in rows]), value)


def test_only_the_rows_of_local_devices_are_made(monkeypatch):
    """Of 8 devices, 2 are another host's: its rows are not asked for."""
    sharding, made = activation(make_mesh(MeshConfig()), "batch", None), []
    kept = jax.sharding.NamedSharding.addressable_devices_indices_map
    local = lambda self, shape: dict([*kept(self, shape).items()][2:6])
    monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", local)
    rows = lambda i: made.append(i) or {"x": np.full(4, i)}
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, s, part: [part(i) for i in local(s, shape).values()],
    )
    batch = global_batches.global_batch(rows, 8, sharding)
    assert sorted(made) == [2, 3, 4, 5] and [int(x[0, 0]) for x in batch["x"]] == [2, 3, 4, 5]


def test_evaluation_sees_every_row_once(text_data, tokenizer, tmp_path):
    mixture = load_rows(text_data, "document", "held_out", tokenizer, 32, tmp_path / "cache")
    sharding = activation(make_mesh(MeshConfig()), "batch", None)
    batches = list(epoch_batches(mixture, batch_size=8, sharding=sharding))
    masks = np.concatenate([np.asarray(b["loss_mask"]) for b in batches])
    assert masks.sum() == sum(r.num_tokens for r, _ in mixture)
    assert len(list(epoch_batches(mixture, batch_size=8, sharding=sharding, max_batches=1))) == 1


def test_the_store_is_reused_and_built_again_for_other_data(text_data, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    load = lambda: load_rows(text_data, "document", "train", tokenizer, 32, cache)
    load()
    (cache / ".partial-killed").mkdir()  # what a killed preparation leaves
    stamp = {p: p.stat().st_mtime_ns for p in cache.glob("document-*")}
    load()
    assert {p: p.stat().st_mtime_ns for p in cache.glob("document-*")} == stamp and len(stamp) == 1
    with open(tmp_path / "a.txt", "a") as file:
        file.write("\none more line")
    load()
    assert len(list(cache.glob("document-*"))) == 2


def chats(tmp_path, replies, too_long="error"):
    lines = [
        json.dumps({"prompt": f"q{i}", "response": r, "split": "train"})
        for i, r in enumerate(replies)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    return DataConfig((Source(str(tmp_path / "c.jsonl")),), too_long=too_long)


def test_long_conversations_are_refused_dropped_or_truncated(tokenizer, tmp_path):
    replies, cache = ["ok", "x" * 99, "fine"], tmp_path / "cache"
    with pytest.raises(
        InputError, match=r"c.jsonl:2: this conversation takes \d+ tokens and a row holds 24"
    ):
        load_rows(chats(tmp_path, replies), "chat", "train", tokenizer, 24, cache)
    ((rows, _),) = load_rows(
        chats(tmp_path, replies, "drop"), "chat", "train", tokenizer, 24, cache
    )
    assert (rows.num_examples, rows.num_dropped) == (2, 1)
    ((rows, _),) = load_rows(
        chats(tmp_path, replies, "truncate"), "chat", "train", tokenizer, 24, cache
    )
    assert (rows.num_examples, rows.num_dropped) == (3, 0)


def test_only_the_assistant_is_a_target(tokenizer, tmp_path):
    ((rows, _),) = load_rows(
        chats(tmp_path, ["ok", "yes"]), "chat", "train", tokenizer, 64, tmp_path / "cache"
    )
    row = rows.row(0)
    said = [*tokenizer.encode("ok"), tokenizer.end_id, *tokenizer.encode("yes"), tokenizer.end_id]
    assert sorted(row["tokens"][row["loss_mask"]]) == sorted(said)


def test_an_example_without_a_target_is_refused(tokenizer, tmp_path):
    line = json.dumps({"prompt": "q" * 99, "response": "answer", "split": "train"})
    (tmp_path / "c.jsonl").write_text(line)
    config = DataConfig((Source(str(tmp_path / "c.jsonl")),), too_long="truncate")
    with pytest.raises(InputError, match=r"c.jsonl:1: not one token of this example is a target"):
        load_rows(config, "chat", "train", tokenizer, 16, tmp_path / "cache")


def test_prompts_are_left_padded_and_long_ones_refused(tokenizer, tmp_path):
    config = chats(tmp_path, ["a", "b", "c", "d"])
    prompts = [
        p
        for s in ("train",)
        for p in load_prompts(chats_as_prompts(config, tmp_path), s, tokenizer, 16)
    ]
    settings_ = {"batch_size": 8, "seed": 0, "length": 16, "pad_id": tokenizer.pad_id}
    batch = make_prompt_batch_at(
        prompts, sharding=activation(make_mesh(MeshConfig()), "batch", None), **settings_
    )(3)
    tokens, mask = np.asarray(batch["tokens"]), np.asarray(batch["mask"])
    assert tokens.shape == mask.shape == (8, 16) and np.asarray(batch["index"]).tolist() == list(
        range(8)
    )
    for row, on in zip(tokens, mask, strict=True):
        assert (
            list(row[on]) in [p.ids for p in prompts]
            and on[-1]
            and (row[~on] == tokenizer.pad_id).all()
        )
    with pytest.raises(InputError, match=r"the prompt takes \d+ tokens and 4 fit"):
        load_prompts(chats_as_prompts(config, tmp_path), "train", tokenizer, 4)


def chats_as_prompts(config, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": f"question {i}", "split": "train"}) for i in range(4))
    )
    return DataConfig((Source(str(path)),), too_long=config.too_long)


def test_rankings_keep_their_responses_together(tokenizer, tmp_path):
    lines = [
        {
            "prompt": f"q{i}",
            "responses": ["a", "bb", "ccc"][: 2 + i % 2],
            "ranks": [2, 1, 1][: 2 + i % 2],
        }
        for i in range(5)
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps({**line, "split": "train"}) for line in lines))
    config = DataConfig((Source(str(path)),))
    ranked = load_ranked(config, "train", tokenizer, 32)
    sharding = activation(one_device(), "batch", None, None)
    (batch, rest) = ranked_epoch(ranked, batch_size=4, sharding=sharding)
    assert np.asarray(batch["ranks"])[:2].tolist() == [[2, 1, 0], [2, 1, 1]]
    assert np.asarray(rest["ranks"]).sum(1).tolist() == [3, 0, 0, 0]
    ids, _ = tokenizer.encode_chat(
        [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "bb"}]
    )
    on = np.asarray(batch["segment_ids"])[1, 1] == 1
    assert np.asarray(batch["tokens"])[1, 1][on].tolist() == ids
    with pytest.raises(
        InputError, match=r"r.jsonl:1: prompt and response take \d+ tokens and the limit is 5"
    ):
        load_ranked(config, "train", tokenizer, 5)


def test_example_content_tells_examples_apart():
    one = Example("t", [], [], [], 0, "a:1")
    assert (
        one.content()
        == one._replace(origin="b:2", source=1).content()
        != one._replace(text="u").content()
    )
