"""jaxllm plan: bytes, FLOPs and collectives against what can be counted otherwise; real compilations for TPUs."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
import yaml
from etils import epath

from jaxllm import output_layer
from jaxllm.__main__ import main
from jaxllm.engine.config import SamplingConfig
from jaxllm.life import Config
from jaxllm.model_store import write_model_card
from jaxllm.models import transformer
from jaxllm.models.config import ModelConfig, preset
from jaxllm.plan import flops, gpus, hlo, measure, planning
from jaxllm.plan.kept import compare_with_measured
from jaxllm.rl.config import DISTILL, PPOConfig, RoleMesh, TeacherConfig
from jaxllm.rl.planned import planned_update
from jaxllm.rl.reward_config import RewardSource
from jaxllm.runtime.config import MeshConfig
from jaxllm.runtime.mesh import make_mesh
from jaxllm.stages import language_model
from jaxllm.stages.config import DPOConfig, LanguageModelConfig
from tests.conftest import jaxllm

SHAPE = {
    "num_layers": 3,
    "embed_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 128,
    "dtype": "float32",
}
MODEL = ModelConfig(vocab_size=256, max_length=64, **SHAPE)
SECTION = LanguageModelConfig(batch_size=16, num_steps=10)


def traced(model, mesh, section=SECTION):
    (program,), _ = language_model.programs(mesh, "pretrain", section, model, 0)
    with jax.set_mesh(mesh):
        return program.run.trace(*program.arguments, **program.keywords)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["data", "mixed"]
)
def test_state_bytes_are_those_of_the_real_state(mesh):
    mesh = make_mesh(mesh)
    _, placed = language_model.program(mesh, SECTION, MODEL, 10, 0)
    with jax.set_mesh(mesh):
        state = placed.init(transformer.init(MODEL, jax.random.key(0)))
    held = lambda tree: sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree)
    )
    for part in ("params", "opt_state"):
        assert measure.bytes_of(getattr(placed.abstract, part)) == held(getattr(state, part)) > 0


def test_flops_are_six_per_parameter_and_attention_and_a_third_more_with_remat():
    tokens, mesh = SECTION.batch_size * MODEL.max_length, make_mesh(MeshConfig())
    # The reference attention computes what the causal mask hides, which flops_per_token leaves out.
    hidden = 6 * MODEL.num_layers * MODEL.embed_dim * MODEL.max_length
    want = (transformer.flops_per_token(MODEL, MODEL.max_length) + hidden) * tokens
    assert flops.count_flops(traced(MODEL, mesh).jaxpr.jaxpr) == pytest.approx(want, rel=0.02)
    full = ModelConfig(vocab_size=256, max_length=64, remat="full", **SHAPE)
    head = 6 * MODEL.vocab_size * MODEL.embed_dim * tokens
    again = flops.count_flops(traced(full, mesh).jaxpr.jaxpr)
    unneeded = (
        2 * MODEL.num_layers * MODEL.embed_dim * MODEL.mlp_dim * tokens
    )  # a layer's last product
    assert again == pytest.approx(head + (want - head) * 4 / 3 - unneeded, rel=0.02)


def test_collectives_are_counted_through_loops_and_named_by_their_axes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    compiled = traced(MODEL, mesh).lower().compile()
    found = {
        (c["kind"], *c["axes"]): c for c in hlo.collectives(hlo.Module(compiled.as_text()), mesh)
    }
    gathered = found["all-gather", "fsdp"]
    # Every layer's matrices are gathered at least forward and backward.
    layer = sum(
        math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(transformer.abstract(MODEL)["layers"])
    )
    assert (
        gathered["count"] >= 2 * MODEL.num_layers
        and gathered["bytes"] > 1.2 * MODEL.num_layers * layer * 4 * 3 / 4
    )
    assert all({*c["axes"]} <= {"data", "fsdp"} and c["bytes"] > 0 for c in found.values())


def test_groups_of_devices_are_read_in_every_spelling():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    line = "  %x = f32[8]{0} all-reduce(%y), "
    for text, want in {
        "replica_groups={{0,1},{2,3},{4,5},{6,7}}": ("tensor",),
        "replica_groups=[4,2]<=[8]": ("tensor",),
        "replica_groups=[4,2]<=[2,4]T(1,0)": ("data",),
        "replica_groups=[2,4]<=[2,2,2]T(1,0,2)": ("data", "tensor"),
        "replica_groups={}": ("data", "fsdp", "tensor"),
    }.items():
        assert hlo.axes_of(line + text, mesh) == want, text


def test_no_array_of_all_logits_ever_lives():
    B, T, D, V = 2, 8192, 32, 128_256
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((B, T, D), "float32"), ((V, D), "float32"))
    ]
    targets = jax.ShapeDtypeStruct((B, T), "int32")
    loss = lambda hidden, head, targets: output_layer.token_logprobs(
        hidden, head, targets
    ).logprob.sum()
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes, targets).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < B * T * V * 4 / 6


def test_a_program_does_not_grow_with_depth():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    deep = ModelConfig(vocab_size=256, max_length=64, **{**SHAPE, "num_layers": 12})
    short, long = (traced(model, mesh).lower().as_text() for model in (MODEL, deep))
    assert len(long) < 1.02 * len(short)


@pytest.fixture
def no_compiler_for_gpus(monkeypatch):
    monkeypatch.setattr(gpus, "installed", lambda: False)


@pytest.mark.usefixtures("no_compiler_for_gpus")
def test_an_estimate_for_gpus_falls_with_more_of_them_and_says_what_it_is():
    config = lambda mesh: Config(model=preset("llama3-8b", remat="full"), mesh=mesh)
    args = lambda topology: planning.PlanArgs("x", topology)
    few, many = (
        planning.plan(config(MeshConfig(data=1, fsdp=-1)), args(f"h100:{n}")) for n in (8, 16)
    )
    assert few["estimated"] and many["estimated"]
    assert many["state_bytes_per_device"] == pytest.approx(
        few["state_bytes_per_device"] / 2, rel=1e-3
    )
    assert many["predicted_tokens_per_second"] > few["predicted_tokens_per_second"]
    assert not planning.plan(config(MeshConfig()), args("h100:8"))["fits"]


@pytest.mark.usefixtures("no_compiler_for_gpus")
def test_objectives_without_a_reference_hold_a_model_less_and_do_a_quarter_less():
    reports = {}
    for loss in ("dpo", "orpo", "simpo", "kto"):
        config = Config(
            model=preset("llama3-8b"), dpo=DPOConfig(loss=loss), mesh=MeshConfig(data=1, fsdp=-1)
        )
        reports[loss] = planning.plan(config, planning.PlanArgs("x", "h100:16", stage="dpo"))
    # Parameters and Adam's two moments, and the reference's parameters.
    for loss, copies, passes in (("dpo", 4, 4), ("orpo", 3, 3), ("simpo", 3, 3), ("kto", 4, 6)):
        report = reports[loss]
        held = copies * report["parameters"] * 4 / 16
        assert report["state_bytes_per_device"] == pytest.approx(held, rel=0.01)
        assert ("reference" in report["state_bytes_by_role"]) == (copies == 4)
        for figure in ("model_flops_per_device", "flops_per_device"):
            assert report[figure] == pytest.approx(reports["orpo"][figure] * passes / 3)


CRITIC = {"role": "critic", "data": 2, "fsdp": 4}


def run(tmp_path, model, topology, *more, batch_size=16, mesh=None, ppo=None):
    config = {
        **{"name": "p", "model": model, "mesh": mesh or {"data": 1, "fsdp": -1}},
        "pretrain": {"batch_size": batch_size, "num_steps": 10},
        "reward": {"batch_size": batch_size},
        "ppo": {
            "batch_size": 32,
            "num_minibatches": 2,
            "sampling": {"max_new_tokens": 64},
            "meshes": [CRITIC],
            **(ppo or {}),
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    process = jaxllm("plan", str(path), "--topology", topology, *more)
    out, log = process.communicate(timeout=300)
    return process.returncode, out, log


SMALL = {
    "vocab_size": 512,
    "max_length": 256,
    "num_layers": 3,
    "embed_dim": 256,
    "num_heads": 2,
    "mlp_dim": 512,
}


def test_a_step_is_compiled_for_a_tpu(tmp_path):
    code, out, log = run(tmp_path, SMALL, "v5e:2x4", "--json")
    assert code == 0, log
    report = json.loads(out)
    assert report["fits"] and report["devices"] == 8 and report["mesh"] == {"fsdp": 8}
    assert 0 < report["temp_bytes_per_device"] < 1e9 and report["argument_bytes_per_device"] > 0
    assert {"all-gather", "all-reduce"} & {c["kind"] for c in report["collectives"]}
    assert 0 < report["predicted_mfu"] < 1 and report["predicted_step_seconds"] > 0
    # The attention kernel's products are counted: backward five for the four that the gradient needs.
    attention = (
        6
        * SMALL["num_layers"]
        * SMALL["embed_dim"]
        * SMALL["max_length"]
        * report["tokens_per_step"]
        / 8
    )
    want = report["model_flops_per_device"] + attention / 6
    assert report["flops_per_device"] == pytest.approx(want, rel=0.003)


@pytest.mark.life
def test_weights_are_gathered_once_a_pass_and_nothing_is_rematerialised(tmp_path):
    model = {**SMALL, "remat": "full", "num_layers": 4}
    code, out, log = run(
        tmp_path, model, "v5e:2x4", "--json", mesh={"data": 1, "fsdp": 4, "tensor": 2}
    )
    assert code == 0 and "nvoluntary full remat" not in log, log
    report = json.loads(out)
    moved = sum(
        c["bytes"]
        for c in report["collectives"]
        if c["kind"] == "all-gather" and "fsdp" in c["axes"]
    )
    # Forward, and backward, where the layer is made again: in bfloat16, of what is one tensor shard's.
    assert 0 < moved < 3 * 2 * report["parameters"] / 2


@pytest.mark.life
def test_slices_are_joined_by_the_data_axis(tmp_path):
    code, out, log = run(
        tmp_path, SMALL, "v5e:2x2", "--json", "--slices", "2", mesh={"data": 2, "fsdp": -1}
    )
    assert code == 0, log
    report = json.loads(out)
    assert (
        report["devices"] == 8
        and report["mesh"] == {"data": 2, "fsdp": 4}
        and report["dcn_seconds"] > 0
    )
    code, _, log = run(tmp_path, SMALL, "v5e:2x2", "--slices", "2")
    assert code == 2 and "mesh.data: 1 is not a multiple of the 2 slices" in log


@pytest.mark.parametrize(
    ("stage", "programs"),
    [
        pytest.param("reward", 0, marks=pytest.mark.slow),
        pytest.param("ppo", 7, marks=pytest.mark.life),
    ],
)
def test_other_stages_are_compiled_for_a_tpu(tmp_path, stage, programs):
    code, out, log = run(tmp_path, SMALL, "v5e:2x4", "--json", "--stage", stage)
    assert code == 0, log
    report = json.loads(out)
    assert report["fits"] and report["predicted_step_seconds"] > 0
    assert len(report.get("programs", ())) == programs
    if stage == "ppo":  # policy and critic with Adam's moments, reference and reward model without
        each, copies = report["programs"].values(), (3 + 1 + 1) / 8 + 3 / CRITIC["fsdp"]
        assert report["state_bytes_per_device"] == pytest.approx(
            copies * report["parameters"] * 4, rel=0.02
        )
        assert report["flops_per_device"] == pytest.approx(
            sum(p["flops_per_device"] * p["times"] for p in each)
        )


@pytest.mark.life
def test_sampling_with_the_trainers_program_is_planned_as_whole_passes(tmp_path):
    ppo = {"sampler": "trainer"}
    code, out, log = run(tmp_path, SMALL, "v5e:2x4", "--json", "--stage", "ppo", ppo=ppo)
    assert code == 0, log
    programs = json.loads(out)["programs"]
    assert "decode" not in programs and programs["rollout"]["times"] == 64 + 1
    assert programs["rollout"]["flops_per_device"] == pytest.approx(
        programs["experience"]["flops_per_device"], rel=0.1
    )


def test_a_teacher_is_planned_with_the_size_of_the_model_that_is_there(tmp_path):
    """Its memory, its pass over the responses, and its product with the vocabulary in the actor's step."""
    policy = ModelConfig(vocab_size=256, max_length=256, **SHAPE)
    teacher = dataclasses.replace(policy, num_layers=2, embed_dim=128)
    write_model_card(epath.Path(tmp_path), teacher, "policy", ("params",))
    mesh, planned = make_mesh(MeshConfig(data=2, fsdp=4)), []
    for places in ([""], ["", str(tmp_path)]):
        config = dataclasses.replace(
            DISTILL,
            batch_size=32,
            sampling=SamplingConfig(64),
            teachers=tuple(TeacherConfig(place) for place in places),
            meshes=(RoleMesh(role="teacher", data=4, fsdp=2),),
        )
        programs, held = planned_update(mesh, "distill", config, policy, seed=0)
        planned.append(({program.name: program for program in programs}, held))
    (one, _), (two, held) = planned
    assert one.keys() == two.keys() - {"teacher_2"} and "critic" not in two
    tokens = 32 * (64 + 64)
    trunk = transformer.flops_per_token(teacher, 128, scored=False) / 3 * tokens
    assert two["teacher_2"].flops == pytest.approx(trunk)
    head = transformer.flops_per_token(teacher, 128) / 3 * tokens - trunk
    assert two["actor"].flops - one["actor"].flops == pytest.approx(head)
    # Its weights on its mesh, and its output matrix once more on the policy's.
    weights, matrix = held["teachers"][1], held["moved_heads"][1]
    shapes = jax.tree.map(jnp.shape, transformer.abstract(teacher))
    assert jax.tree.map(jnp.shape, weights) == shapes
    assert matrix.shape == (256, 128) and matrix.sharding.mesh.shape == mesh.shape
    assert transformer.head(weights).sharding.mesh.shape["data"] == 4
    for name in ("teacher_2", "actor"):
        program = two[name]
        with jax.set_mesh(program.mesh):
            program.run.lower(*program.arguments, **program.keywords)


def test_a_reward_model_that_scores_steps_is_planned():
    policy = ModelConfig(vocab_size=256, max_length=256, **SHAPE)
    config = PPOConfig(batch_size=32, rewards=(RewardSource("model_steps"),))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    programs, held = planned_update(mesh, "ppo", config, policy, seed=0)
    named = {program.name: program for program in programs}
    assert "score" not in named and "reward" in held
    assert named["score_steps"].flops == named["values"].flops
    with jax.set_mesh(mesh):
        for name in ("score_steps", "experience"):
            named[name].run.lower(*named[name].arguments, **named[name].keywords)


@pytest.mark.usefixtures("no_compiler_for_gpus")
def test_flags_override_the_config_as_they_do_for_a_stage(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": SMALL, "mesh": {"data": 8}}))
    flags = ["--pretrain.batch-size=64", "--mesh.data", "2", "--mesh.fsdp", "4", "--json"]
    main(["plan", str(config), "--model.max-length", "32", "--topology", "h100:8", *flags])
    report = json.loads(capsys.readouterr().out)
    assert report["mesh"] == {"data": 2, "fsdp": 4}
    assert report["tokens_per_step"] == 64 * 32
    assert report["embedding_parameters"] == SMALL["vocab_size"] * SMALL["embed_dim"]


@pytest.mark.usefixtures("no_compiler_for_gpus")
def test_a_kept_plan_stands_beside_what_is_measured(tmp_path):
    shown = compare_with_measured(None, [])
    assert shown == {}
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump({"run_dir": str(tmp_path / "run"), "model": SMALL, "mesh": {"data": 8}})
    )
    main(["plan", str(config), "--topology", "h100:8", "--keep"])
    report = json.loads((tmp_path / "run" / "plans" / "pretrain.json").read_text())
    log = [{"throughput/mfu": 0.1}, {"throughput/tokens_per_second": 1000.0, "throughput/mfu": 0.2}]
    shown = compare_with_measured(report, log)["plan"]
    assert shown["mfu"] == {"planned": report["predicted_mfu"], "measured": 0.2}
    assert shown["step_seconds"]["measured"] == report["tokens_per_step"] / 1000.0


@pytest.mark.usefixtures("no_compiler_for_gpus")
def test_a_search_among_gpus_ranks_what_fits():
    config = Config(model=preset("llama3-8b"), pretrain=LanguageModelConfig(batch_size=32))
    ranked = planning.search(config, planning.PlanArgs("x", "h100:32", tries=20))
    rates = [each["predicted_tokens_per_second"] for each in ranked if each["fits"]]
    assert len(rates) > 5 and rates == sorted(rates, reverse=True)
    assert len({repr((each["mesh"], each["remat"], each["batch_size"])) for each in ranked}) == len(
        ranked
    )


@pytest.mark.slow
def test_a_search_ranks_what_fits(tmp_path):
    code, out, log = run(tmp_path, SMALL, "v5e:2x2", "--search", "--tries", "2", "--json")
    assert code == 0, log
    first, second = json.loads(out)
    assert first["fits"] and second["fits"]
    assert first["predicted_tokens_per_second"] >= second["predicted_tokens_per_second"] > 0
    assert (first["mesh"], first["remat"], first["batch_size"]) != (
        second["mesh"],
        second["remat"],
        second["batch_size"],
    )


@pytest.mark.life
def test_too_big_is_an_answer(tmp_path):
    big = {"preset": "llama3-8b", "num_layers": 4}
    code, out, log = run(tmp_path, big, "v5e:2x2", batch_size=64)
    assert code == 0, log
    assert "fits" in out and "False" in out and "RESOURCE_EXHAUSTED" in out


def test_a_slice_that_does_not_exist_is_one_line(tmp_path):
    code, _, log = run(tmp_path, SMALL, "v5e:3x3")
    assert code == 2 and "libtpu knows no such slice" in " ".join(log.split()), log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ({}, ["--topology", "v9:2x2"], "kinds: v4, v5e, v5p, v6e, tpu7x, a100"),
        ({}, ["--topology", "v5e:2x2", "--stage", "rank"], "known: pretrain, sft, reward"),
        ({"vocab_size": 0}, ["--topology", "v5e:2x2"], "model.vocab_size"),
        ({}, ["--topology", "v5e:2x2", "--model.depth", "3"], "--model.depth"),
        ({}, ["--topology", "v5e:2x2", "--pretrain.batch-size", "x"], "--pretrain.batch-size"),
    ],
)
def test_what_makes_no_sense_is_one_line(tmp_path, capsys, model, arguments, message):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {**SMALL, **model}}))
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(tmp_path / "config.yaml"), *arguments])
    log = capsys.readouterr().err
    assert stop.value.code == 2 and message in " ".join(log.split()), log


@pytest.mark.parametrize(
    ("stage", "section", "field"),
    [
        ("sft", {"batch_size": 12}, "sft.batch_size / sft.num_micro"),
        ("reward", {"batch_size": 16, "num_micro": 4}, "reward.batch_size / reward.num_micro"),
        ("grpo", {"batch_size": 32}, "grpo.batch_size / grpo.num_responses"),
        ("ppo", {"batch_size": 16, "num_minibatches": 4}, "ppo minibatch"),
    ],
)
@pytest.mark.usefixtures("no_compiler_for_gpus")
def test_batches_are_checked_as_in_a_run(tmp_path, capsys, stage, section, field):
    config = {"model": SMALL, "mesh": {"data": 8}, stage: section}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(tmp_path / "config.yaml"), "--topology", "h100:8", "--stage", stage])
    log = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and field in log and "does not divide over the 8 shards" in log
