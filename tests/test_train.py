"""Accumulated == whole, resumed == uninterrupted: properties of the one step maker. Sharded == single: test_sharded.py."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm import loop, losses, output_layer, train
from jaxllm.config import InputError
from jaxllm.data.config import DataConfig
from jaxllm.metrics import TrainingDiverged, Work
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig
from jaxllm.optim import learning_rate, make_optimizer
from jaxllm.optim_config import OptimConfig
from jaxllm.runtime import prefetch
from jaxllm.runtime.config import CheckpointConfig, LoggingConfig, MeshConfig
from jaxllm.runtime.digest import unequal_replicas
from jaxllm.runtime.goodput import Ledger
from jaxllm.runtime.mesh import make_mesh
from jaxllm.runtime.processes import Signals, Stopped
from jaxllm.sharding import activation

MODEL = ModelConfig(
    vocab_size=64,
    max_length=16,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=64,
    dtype="float32",
)

AXES = transformer.axes(MODEL)


def loss(params, batch, key):
    del key
    hidden = transformer.apply(
        params, MODEL, batch["tokens"], batch["segment_ids"], batch["positions"]
    )
    targets, mask = losses.next_token_targets(
        batch["tokens"], batch["segment_ids"], batch["loss_mask"]
    )
    return losses.language_model(
        output_layer.token_logprobs(hidden, transformer.head(params), targets), mask, 1e-4
    )


def uneven_batch(seed, B=8, T=16):
    """Packed rows of two segments with padding and very uneven loss masks; one row has no target at all."""
    rng = np.random.default_rng(seed)
    cut, end = rng.integers(2, T // 2, size=(B, 1)), rng.integers(T // 2 + 1, T + 1, size=(B, 1))
    places = np.arange(T)[None]
    segments = np.where(places < cut, 1, np.where(places < end, 2, 0))
    mask = (rng.random((B, T)) < rng.random((B, 1))) & (segments > 0)
    mask[0] = False
    batch = {
        "tokens": rng.integers(0, 64, size=(B, T)),
        "segment_ids": segments,
        "positions": np.where(places < cut, places, places - cut),
    }
    return {k: jnp.array(v, jnp.int32) for k, v in batch.items()} | {"loss_mask": jnp.array(mask)}


def params(seed=0):
    return transformer.init(MODEL, jax.random.key(seed))


def close(a, b, rtol=1e-5):
    """Relative error of every leaf, against the leaf's own largest value."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.abs(x - y).max() / (np.abs(y).max() + 1e-12)
        assert error < rtol, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.parametrize(
    "num_micro", [4, *(pytest.param(n, marks=pytest.mark.life) for n in (2, 8))]
)
def test_accumulated_gradient_equals_whole_with_uneven_masks(num_micro):
    batch, key = uneven_batch(0), jax.random.key(0)
    whole, weight, metrics = train.accumulate(loss, params(), batch, key, 1, {})
    parts, part_weight, part_metrics = train.accumulate(loss, params(), batch, key, num_micro, {})
    assert float(weight) == float(part_weight)
    close(parts, whole)
    np.testing.assert_allclose(part_metrics["loss"][0], metrics["loss"][0], rtol=1e-5)


def test_mean_of_means_would_be_wrong_here():
    """The batch above tells the two apart: the mean of microbatch means is off by more than 1%."""
    batch, key = uneven_batch(0), jax.random.key(0)
    whole, weight, _ = train.accumulate(loss, params(), batch, key, 1, {})
    halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    parts = [train.accumulate(loss, params(), half, key, 1, {}) for half in halves]
    mean = sum(optax.tree.norm(g) / w for g, w, _ in parts) / 2
    assert abs(float(mean / (optax.tree.norm(whole) / weight)) - 1) > 0.01


def one_update(mesh, num_micro=1):
    tx = make_optimizer(OptimConfig(learning_rate=1e-2, clip_norm=0.5), 10, AXES)
    placed = train.state_layout(mesh, transformer.abstract(MODEL), transformer.axes(MODEL), tx)
    with jax.set_mesh(mesh):
        state = placed.init(jax.jit(lambda: params(), out_shardings=placed.shardings.params)())
        step = train.make_step(loss, tx, num_micro=num_micro, state_shardings=placed.shardings)
        batch = {
            k: jax.device_put(v, activation(mesh, "batch", None))
            for k, v in uneven_batch(1).items()
        }
        return step(state, batch)[0]


@pytest.mark.life
def test_sharded_accumulation_equals_single_device():
    alone = one_update(make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    state = one_update(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), num_micro=2)
    close(jax.tree.map(np.asarray, state.opt_state), jax.tree.map(np.asarray, alone.opt_state))


def run(state, num_steps, step, hooks=()):
    return train.fit(train.Run(state, step, uneven_batch, num_steps, hooks))


def test_resumed_equals_uninterrupted_bit_for_bit():
    tx = make_optimizer(OptimConfig(), 6, AXES)
    noisy = lambda p, b, key: loss(
        jax.tree.map(lambda x: x + 1e-3 * jax.random.normal(key, x.shape), p), b, key
    )
    step = train.make_step(noisy, tx, seed=3)
    whole = run(train.init_state(params(), tx), 6, step)
    half = jax.tree.map(np.asarray, run(train.init_state(params(), tx), 3, step))
    resumed = run(jax.tree.map(jnp.asarray, half), 6, step)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_hooks_run_on_their_interval_and_at_the_end():
    tx, seen = make_optimizer(OptimConfig(), 5, AXES), []
    hooks = [(1, lambda n, s, m: seen.append(("a", n))), (2, lambda n, s, m: seen.append(("b", n)))]
    run(train.init_state(params(), tx), 5, train.make_step(loss, tx), hooks)
    assert [n for name, n in seen if name == "a"] == [1, 2, 3, 4, 5]
    assert [n for name, n in seen if name == "b"] == [2, 4, 5]


def test_an_all_masked_batch_changes_nothing_but_the_optimizer_clock():
    tx = make_optimizer(OptimConfig(weight_decay=0.0), 5, AXES)
    batch = uneven_batch(0) | {"loss_mask": jnp.zeros((8, 16), bool)}
    before = params()
    state, _ = train.make_step(loss, tx)(train.init_state(params(), tx), batch)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_moments_in_bfloat16_take_half_the_bytes_and_follow_adam():
    """Each update against Adam in NumPy from the moments as they were kept: rounding happens once, when they are kept."""
    config = OptimConfig(
        schedule="constant", weight_decay=0.0, clip_norm=0.0, state_dtype="bfloat16"
    )
    tx, state = (
        make_optimizer(config, 60, AXES),
        train.init_state(params(), make_optimizer(config, 60, AXES)),
    )
    kept = lambda state, name: optax.tree.get(state.opt_state, name)["embed"]["tokens"]
    assert kept(state, "mu").dtype == kept(state, "nu").dtype == jnp.bfloat16
    step, full = (
        train.make_step(loss, tx),
        make_optimizer(dataclasses.replace(config, state_dtype="float32"), 60, AXES),
    )
    plain_step, plain, first, last = (
        train.make_step(loss, full),
        train.init_state(params(), full),
        [],
        [],
    )
    mean = lambda params, batch: (found := loss(params, batch, None))[0] / found[1]
    gradient = jax.jit(jax.grad(mean))
    for number in range(60):
        batch, before = uneven_batch(number % 4), state
        old = [np.asarray(kept(before, name), np.float64) for name in ("mu", "nu")]
        place = np.asarray(before.params["embed"]["tokens"], np.float64)
        grad = np.asarray(gradient(before.params, batch)["embed"]["tokens"])
        state, metrics = step(state, batch)
        plain, more = plain_step(plain, batch)
        new = [0.9 * old[0] + 0.1 * grad, 0.95 * old[1] + 0.05 * grad**2]
        unbiased = [m / (1 - b ** (number + 1)) for m, b in zip(new, (0.9, 0.95), strict=True)]
        want = place - config.learning_rate * unbiased[0] / (np.sqrt(unbiased[1]) + config.eps)
        np.testing.assert_allclose(state.params["embed"]["tokens"], want, atol=2e-6)
        for name, value in zip(("mu", "nu"), new, strict=True):
            np.testing.assert_allclose(
                np.asarray(kept(state, name), np.float64), value, rtol=2**-8, atol=1e-9
            )
        first, last = [*first, metrics["loss"][0]], [*last, more["loss"][0]]
    assert first[-1] < 0.8 * first[0] and abs(first[-1] - last[-1]) < 0.02 * last[-1]
    with pytest.raises(ValueError, match="state_dtype"):
        OptimConfig(b2=0.999, state_dtype="bfloat16")


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_schedules_rise_then_fall_to_the_final_fraction(schedule):
    config = OptimConfig(
        learning_rate=1.0,
        schedule=schedule,
        warmup_steps=4,
        final_fraction=0.1,
        decay_fraction=0.25,
    )
    rate = [float(learning_rate(config, 20)(n)) for n in range(21)]
    np.testing.assert_allclose(rate[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rate[20], 1.0 if schedule == "constant" else 0.1, rtol=1e-5)
    if schedule == "wsd":
        assert rate[4:16] == [1.0] * 12 and rate[16] < 1.0


def nan_at(bad):
    """(step, batch_at) whose batches of these numbers make the loss not finite."""

    def noisy(p, batch, key):
        total, weight, metrics = loss(p, {k: v for k, v in batch.items() if k != "poison"}, key)
        return total * (1.0 + batch["poison"].sum()), weight, metrics

    def batch_at(number):
        poison = jnp.full((8,), jnp.nan if number in bad else 0.0)
        return uneven_batch(number) | {"poison": poison}

    return noisy, batch_at


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    noisy, batch_at = nan_at({1})
    tx = make_optimizer(OptimConfig(), 5, AXES)
    step = train.make_step(noisy, tx)
    first, _ = step(train.init_state(params(), tx), batch_at(0))
    before = jax.tree.map(np.asarray, first)
    second, metrics = step(first, batch_at(1))
    for a, b in zip(jax.tree.leaves(before[1:3]), jax.tree.leaves(second[1:3]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(second.step) == 2 and int(second.guard.streak) == 1 and int(second.guard.taken) == 1
    assert float(metrics["skipped"][0]) == 1 and float(metrics["loss"][1]) == 0 == float(
        metrics["loss"][0]
    )
    third, metrics = step(second, batch_at(2))
    assert (
        int(third.guard.streak) == 0
        and float(metrics["skipped"][0]) == 0
        and float(metrics["loss"][1]) > 0
    )


def test_a_spike_is_skipped_once_it_is_known_what_is_usual():
    tx = make_optimizer(OptimConfig(learning_rate=0.0), 500, AXES)
    scaled = lambda p, b, key: tuple(
        b["scale"] * x if i == 0 else x for i, x in enumerate(loss(p, b["rows"], key))
    )
    step, state = train.make_step(scaled, tx, spike_factor=5.0), train.init_state(params(), tx)
    for scale, skipped in [(100.0, 0)] + [(1.0, 0)] * 300 + [(4.0, 0), (6.0, 1), (1.0, 0)]:
        state, metrics = step(state, {"rows": uneven_batch(0), "scale": jnp.float32(scale)})
        assert float(metrics["skipped"][0]) == skipped, scale


@dataclasses.dataclass(frozen=True)
class Settings:
    data: DataConfig = DataConfig()
    log_every: int = 3
    eval_every: int = 8
    checkpoint: CheckpointConfig = CheckpointConfig(
        save_every=4, rewind_after=3, rewind_skip=2, keep_last=3
    )


def whole_stage(
    directory, bad=(), num_steps=20, stop_at=None, settings=Settings(), fingerprints=(), allowed=()
):
    """(final state, metrics.jsonl without times) of the whole loop on a toy model."""
    noisy, batch_at = nan_at(set(bad))
    mesh, tx = make_mesh(MeshConfig()), make_optimizer(OptimConfig(), 20, AXES)
    placed = train.state_layout(mesh, transformer.abstract(MODEL), transformer.axes(MODEL), tx)
    signals = Signals()
    step, seen = train.make_step(noisy, tx, state_shardings=placed.shardings), []

    def watched(state, batch):
        if int(state.step) + 1 == stop_at:
            signals.received, signals.since = "SIGTERM", time.monotonic()
        seen.append(batch["poison"])
        return step(state, batch)

    with jax.set_mesh(mesh):
        first = lambda: placed.init(jax.jit(params, out_shardings=placed.shardings.params)())
        training = train.Training(
            init=first, abstract=placed.abstract, step=watched, batch_at=batch_at, num_steps=num_steps, data="toy",
            settings=settings, work=Work(1), best="eval/x", result=lambda state, metrics: {},
            evaluate=lambda number, state: {"eval/x": float(optax.tree.norm(state.params))},
        )  # fmt: skip
        keeping = loop.Supervision(
            signals, Ledger(directory / "goodput.jsonl"), dict(fingerprints), allowed
        )
        logging = LoggingConfig(tensorboard=False)
        state, _ = loop.run_training(epath.Path(directory), "toy", training, keeping, logging)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in line.items() if k != "time" and "throughput" not in k} for line in lines
    ]
    return jax.tree.map(np.asarray, state), kept, len(seen)


def same(one, other):
    assert one[1] == other[1]
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "stop_at", [7, *(pytest.param(step, marks=pytest.mark.life) for step in (1, 8, 19))]
)
def test_stopped_by_a_signal_anywhere_it_ends_with_the_same_bits_and_metrics(tmp_path, stop_at):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = whole_stage(tmp_path / "a")
    with pytest.raises(
        Stopped, match=f"SIGTERM: toy: step {stop_at} of 20 is saved, .* s after the signal"
    ):
        whole_stage(tmp_path / "b", stop_at=stop_at)
    same(whole, whole_stage(tmp_path / "b"))


def test_too_many_bad_batches_in_a_row_send_it_back_and_are_left_out(tmp_path, capsys):
    """Bad batches 9 to 13: after three skips it goes back to step 8, and goes on with batch 14: the third bad one is 11."""
    for name in "abc":
        (tmp_path / name).mkdir()
    state, lines, tried = whole_stage(tmp_path / "a", bad=range(9, 14))
    said = " ".join(capsys.readouterr().err.split())
    assert "back to step 8, skipping batches 8 to 13" in said
    assert int(state.step) == 20 and int(state.guard.taken) == 20 and tried > 20
    seal = json.loads((tmp_path / "a" / "checkpoints" / "20" / "seal.json").read_text())
    assert seal["record"]["skipped"] == [[8, 14]]
    with pytest.raises(Stopped):  # stopped after it went back, and between: the same end
        whole_stage(tmp_path / "b", bad=range(9, 14), stop_at=16)
    same((state, lines), whole_stage(tmp_path / "b", bad=range(9, 14)))
    with pytest.raises(Stopped):
        whole_stage(tmp_path / "c", bad=range(9, 14), stop_at=11)
    same((state, lines), whole_stage(tmp_path / "c", bad=range(9, 14)))


def test_trouble_without_end_fails_with_one_clear_line(tmp_path):
    with pytest.raises(TrainingDiverged, match="after going back 3 times; lower the learning rate"):
        whole_stage(tmp_path, bad=range(6, 1000))


def test_what_has_changed_since_a_checkpoint_is_refused_field_by_field(tmp_path):
    old = {"pretrain": {"num_steps": 20, "optim": {"b1": 0.9}}, "data": "abc", "code": {"jax": "1"}}
    with pytest.raises(Stopped):
        whole_stage(tmp_path, stop_at=5, fingerprints=old)
    new = {"pretrain": {"num_steps": 30, "optim": {"b1": 0.8}}, "data": "abd", "code": {"jax": "1"}}
    with pytest.raises(InputError) as error:
        whole_stage(tmp_path, fingerprints=new)
    text = str(error.value)
    assert (
        "pretrain.num_steps: 20 -> 30; pretrain.optim.b1: 0.9 -> 0.8; data: 'abc' -> 'abd'" in text
    )
    assert text.endswith("--allow-change pretrain.num_steps pretrain.optim.b1 data")
    with pytest.raises(InputError, match="started with something else: data"):
        whole_stage(tmp_path, fingerprints=new, allowed=("pretrain",))
    whole_stage(tmp_path, fingerprints=new, allowed=("pretrain", "data"))


def test_a_flipped_bit_on_one_device_is_named(tmp_path):
    mesh = make_mesh(MeshConfig())
    tree = {"w": jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, P()))}
    assert unequal_replicas(tree) == []
    parts = [np.array(shard.data) for shard in tree["w"].addressable_shards]
    parts[5][2, 1] = np.nextafter(np.float32(1.0), np.float32(2.0))
    single = [
        jax.device_put(p, s.device)
        for p, s in zip(parts, tree["w"].addressable_shards, strict=True)
    ]
    tree["w"] = jax.make_array_from_single_device_arrays((4, 4), tree["w"].sharding, single)
    (found,) = unequal_replicas(tree)
    assert found == f"{tree['w'].addressable_shards[5].device}: w"


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_the_threads_that_prepare_them(workers):
    ahead = prefetch.Prefetch(lambda n: n * n, workers, 20)
    assert [ahead(n) for n in range(3, 20)] == [n * n for n in range(3, 20)]
    ahead.close()


def test_a_batch_that_fails_in_a_thread_fails_the_step():
    ahead = prefetch.Prefetch(lambda n: 1 // (n - 2), 2, 10)
    ahead(0), ahead(1)
    with pytest.raises(ZeroDivisionError):
        ahead(2)
    ahead.close()


def test_more_updates_than_can_be_counted_are_refused():
    assert train.count_steps(7, 1e12, 1e6, "sft.num_epochs") == 7
    assert train.count_steps(0, 1.5, 3, "sft.num_epochs") == 5
    with pytest.raises(InputError, match=r"sft.num_epochs: 1e\+12 takes 3,000,000,000,000 updates"):
        train.count_steps(0, 1e12, 3, "sft.num_epochs")
