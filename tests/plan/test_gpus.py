"""GPUs that are not there: their shapes, what leaves a node, what XLA's text says, and real compilations.

Those that compile need the extra plan-gpu (pip install -e '.[plan-gpu]'), 0.7 GB to download.
"""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import stages
from jaxllm.config import InputError
from jaxllm.life import Config
from jaxllm.models import attention_gpu
from jaxllm.models.config import preset
from jaxllm.plan import compiler, flops, gpus, hlo, measure, planning, roofline
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.hardware import CHIPS
from jaxllm.runtime.mesh import make_mesh
from jaxllm.sharding import MESH_AXES
from tests.plan.test_planning import SMALL, run

compiles = pytest.mark.skipif(
    not gpus.installed(), reason="needs XLA's compiler for GPUs: pip install -e '.[plan-gpu]'"
)


@pytest.mark.parametrize(
    ("shape", "want"),
    [([4], (1, 4)), ([8], (1, 8)), ([64], (8, 8)), ([3, 4], (3, 4)), ([2, 72], (2, 72))],
)
def test_gpus_come_in_nodes(shape, want):
    assert gpus.nodes(shape, "h100") == want


@pytest.mark.parametrize("shape", [[12], [2, 2, 2]])
def test_gpus_that_are_not_whole_nodes_are_refused(shape):
    with pytest.raises(InputError, match="NODESxGPUS"):
        gpus.nodes(shape, "h100:12")


def test_every_gpu_has_a_data_sheet_and_a_description():
    known = {kind for kind, chip in CHIPS.items() if chip.kind.startswith("NVIDIA")}
    assert known == set(gpus.GPUS)
    for kind, gpu in gpus.GPUS.items():
        assert gpu.name.startswith(CHIPS[kind].kind)
        # A gibibyte and a gigabyte are not the same, and some of the memory is the driver's.
        assert gpu.memory == pytest.approx(CHIPS[kind].hbm, rel=0.08)
        assert gpu.bandwidth == pytest.approx(CHIPS[kind].hbm_bandwidth, rel=0.01)
        text = gpus.description(gpu)
        assert text.count("{") == text.count("}") and f'"{gpu.name}"' in text


def mesh_of(platform, places, **sizes):
    """A mesh of devices that have nothing but a place, place after place."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = np.empty(shape, object)
    for index, each in enumerate(np.ndindex(shape)):
        place = index * places // devices.size
        devices[each] = types.SimpleNamespace(
            platform=platform, process_index=place, slice_index=place if platform == "tpu" else 0
        )
    return types.SimpleNamespace(devices=devices, axis_names=MESH_AXES)


def test_a_ring_over_nodes_leaves_each_by_the_links_of_all_its_gpus():
    wide = mesh_of("gpu", 2, fsdp=16)
    assert measure._ways_out(wide, ["fsdp"]) == 8
    mixed = mesh_of("gpu", 2, data=2, fsdp=4, tensor=2)
    # data has one GPU in each node; the others stay inside; together they are all of both nodes.
    assert measure._ways_out(mixed, ["data"]) == 1
    assert measure._ways_out(mixed, ["fsdp"]) == measure._ways_out(mixed, ["tensor"]) == 0
    assert measure._ways_out(mixed, ["data", "fsdp"]) == 4
    assert measure._ways_out(mesh_of("gpu", 1, fsdp=8), ["fsdp"]) == 0
    # What slices send to one another is counted where they send it.
    assert measure._ways_out(mesh_of("tpu", 2, data=4, fsdp=2), ["data"]) == 1


def test_what_leaves_a_node_takes_the_slower_links():
    figures = {"moved_bytes_per_device": 0, "flops_per_device": 0.0}

    def seconds(ways_out):
        rows = [{"axes": ["fsdp"], "bytes": 4.5e11, "ways_out": ways_out}]
        return roofline._seconds(figures | {"collectives": rows}, CHIPS["h100"])

    inside, one, eight = seconds(0), seconds(1), seconds(8)
    assert (inside["ici_seconds"], inside["dcn_seconds"]) == (1.0, 0.0)
    assert (one["ici_seconds"], one["dcn_seconds"]) == (0.0, 9.0)
    assert eight["dcn_seconds"] == 9.0 / 8


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("%a = ((bf16[16]{0}, f32[4]{0}), (bf16[64]{0}, f32[16]{0})) all-gather-start(%x)", 192),
        ("%a = (bf16[16]{0}, bf16[64]{0}, u32[], u32[]) all-gather-start(%x)", 128),
        ("%a = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%x)", 32),
        ("%a = (f32[8]{0}, f32[4]{0}) all-reduce-start(%x)", 48),
        ("%a = f32[8]{0} all-reduce-start(%x)", 32),
        ("%a = (f32[8]{0:T(8,128)S(1)}, f32[4]{0}) all-reduce(%x, %y)", 48),
    ],
)
def test_what_a_started_collective_returns_is_counted_without_its_operands(line, want):
    assert hlo._result_bytes(line, hlo._COLLECTIVE.search(line)) == want


def test_a_loop_runs_as_often_as_xla_says():
    text = """
%body (x: f32[8]) -> f32[8] {
  %r = f32[8]{0} all-reduce(%x), replica_groups={}
}
%condition (x: f32[8]) -> pred[] {
  %c = pred[] fusion(%x), kind=kLoop, calls=%compare
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    (row,) = hlo.collectives(hlo.Module(text), make_mesh(MeshConfig(data=-1)))
    assert row["count"] == 5 and row["bytes"] == 5 * 32 * 2 * 7 / 8


def test_the_products_of_cudnn_are_counted(monkeypatch):
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300
    )
    B, T, N, H = 2, 128, 4, 64
    x = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)

    def run(q, k, v, causal):
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
        return out.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(run, (0, 1, 2)), static_argnums=3)
    product = 2 * B * N * T * T * H
    count = lambda causal: flops.count_flops(gradient.trace(x, x, x, causal).jaxpr.jaxpr)
    assert (count(False), count(True)) == (7 * product, 7 * product / 2)


def test_slices_are_not_for_gpus(tmp_path, capsys):
    args = planning.PlanArgs("x", "h100:16", slices=2)
    with pytest.raises(InputError, match="GPUs come in nodes"):
        planning.plan(Config(model=preset("llama3-8b")), args)


@compiles
@pytest.mark.parametrize("kind", gpus.GPUS)
def test_the_compiler_takes_every_description(kind):
    devices = gpus.devices(kind, 2, 8)
    assert [device.process_index for device in devices] == [0] * 8 + [1] * 8
    assert devices[0].device_kind.startswith(CHIPS[kind].kind)
    mesh = make_mesh(MeshConfig(data=2, fsdp=8), devices)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((16, 256), jnp.bfloat16)
        compiled = jax.jit(lambda x: jnp.tanh(x @ x.T).sum()).lower(x).compile()
    assert compiled.memory_analysis().argument_size_in_bytes >= 16 * 256 * 2


@compiles
@pytest.mark.parametrize("window", [None, 64])
def test_old_gpus_refuse_wide_heads(window):
    shape = (2, 256, 4, 192)
    refusals = {}
    for kind in ("a100", "h100"):
        device = gpus.devices(kind, 1, 1)[0]
        with gpus.as_if_present(device):
            refusals[kind] = attention_gpu._refusal(
                shape, shape, jnp.dtype("bfloat16"), window, device
            )
    assert "head dim" in refusals["a100"]
    # Without cuDNN there is another reason.
    assert refusals["h100"] is None or "cuDNN" in refusals["h100"]


@compiles
def test_a_step_is_compiled_for_gpus_on_two_nodes(tmp_path):
    code, out, log = run(tmp_path, SMALL, "h100:16", "--json", batch_size=64)
    assert code == 0, log
    report = json.loads(out)
    assert report["fits"] and report["devices"] == 16 and report["mesh"] == {"fsdp": 16}
    assert report["compiler"] == compiler.name("gpu") and "estimated" not in report
    # Every collective runs over both nodes.
    assert report["dcn_seconds"] > 0 and report["ici_seconds"] == 0
    moved = {row["kind"]: row["bytes"] for row in report["collectives"]}
    # In bfloat16: what is gathered forward and backward, of which a GPU sends all but its own part.
    passed = 2 * report["parameters"] * 15 / 16
    assert 1.5 * passed < moved["all-gather"] < 2.5 * passed
    assert 0.9 * passed < moved["reduce-scatter"] < 2.2 * passed
    # As on TPUs, attention's backward pass has five products for the four that the gradient needs.
    attention = 6 * SMALL["num_layers"] * SMALL["embed_dim"] * SMALL["max_length"]
    want = report["model_flops_per_device"] + attention * report["tokens_per_step"] / 16 / 6
    assert report["flops_per_device"] == pytest.approx(want, rel=0.003)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [stage.name for stage in stages.TABLE if stage.programs and stage.name != "pretrain"]
)
def test_every_stage_is_compiled_for_gpus(tmp_path, stage):
    config = Config(
        model=preset("llama3-8b", num_layers=2, vocab_size=1024), mesh=MeshConfig(data=1, fsdp=8)
    )
    report = planning.plan(config, planning.PlanArgs("x", "h200:8", stage=stage))
    assert report["fits"] and report["predicted_step_seconds"] > 0
    assert report["dcn_seconds"] == 0 and report["ici_seconds"] > 0
