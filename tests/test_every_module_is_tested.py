"""Every module of the package has a test file of its name, or an entry below that says where it is tested.

jaxllm/data/store.py is tested in tests/data/test_store.py, and the code of jaxllm/config/__init__.py in
tests/config/test_config.py. An `__init__.py` without functions and classes needs no test.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxllm"
TESTS = ROOT / "tests"

# Module -> the file that tests it. Mostly parts of one thing, which only say something together.
TESTED_IN = {
    # What a user types and reads.
    "__init__.py": "tests/test_api.py",
    "__main__.py": "tests/test_terminal.py",
    "chat.py": "tests/test_terminal.py",
    "commands.py": "tests/test_terminal.py",
    "errors.py": "tests/test_wrong_input.py",
    "tools.py": "tests/test_terminal.py",
    "model_store.py": "tests/pretrained/test_convert.py",
    "run.py": "tests/test_life.py",
    "workspace.py": "tests/test_wrong_input.py",
    "config/functions.py": "tests/demo/test_annotators.py",
    "config/shipped.py": "tests/test_api.py",
    "config/renames.py": "tests/config/test_config.py",
    "config/build.py": "tests/config/test_config.py",
    "config/command_line.py": "tests/config/test_config.py",
    "config/differences.py": "tests/config/test_config.py",
    "config/messages.py": "tests/config/test_ranges.py",
    "config/trees.py": "tests/config/test_config.py",
    "config/yaml_files.py": "tests/config/test_config.py",
    # Training: the loop with its optimizer and its batches.
    "loop.py": "tests/test_train.py",
    "optim/adafactor.py": "tests/optim/test_optim.py",
    "optim/muon.py": "tests/optim/test_optim.py",
    "optim/schedule_free.py": "tests/optim/test_optim.py",
    "optim/soap.py": "tests/optim/test_optim.py",
    "optim/state_axes.py": "tests/optim/test_optim.py",
    "optim/whole_matrices.py": "tests/optim/test_optim.py",
    "optim_config.py": "tests/test_train.py",
    "runtime/prefetch.py": "tests/test_train.py",
    "report/status_config.py": "tests/report/test_status.py",
    # Pages and the endpoint: with real clients and a real browser.
    "web/errors.py": "tests/serve/test_serve.py",
    "web/guard.py": "tests/serve/test_serve.py",
    "web/pages.py": "tests/web/test_rank.py",
    "web/server.py": "tests/serve/test_serve.py",
    "serve/app.py": "tests/serve/test_serve.py",
    "serve/chats.py": "tests/serve/test_serve.py",
    "serve/command.py": "tests/serve/test_pages.py",
    "serve/completions.py": "tests/serve/test_serve.py",
    "serve/config.py": "tests/config/test_ranges.py",
    "serve/endpoint.py": "tests/serve/test_serve.py",
    "serve/generation.py": "tests/serve/test_serve.py",
    "serve/logprobs.py": "tests/serve/test_serve.py",
    "serve/metrics.py": "tests/serve/test_serve.py",
    "serve/protocol.py": "tests/serve/test_serve.py",
    "serve/ratings.py": "tests/serve/test_serve.py",
    "serve/served.py": "tests/serve/test_pages.py",
    "serve/tokenization.py": "tests/serve/test_serve.py",
    "serve/token_view.py": "tests/serve/test_pages.py",
    # A run directory in a store.
    "runtime/damage.py": "tests/runtime/test_checkpoint.py",
    "runtime/store/hosts.py": "tests/runtime/test_hosts.py",
    "runtime/store/known.py": "tests/runtime/test_store.py",
    "runtime/store/names.py": "tests/runtime/test_store.py",
    "runtime/store/lease.py": "tests/runtime/test_store.py",
    "runtime/store/mirror.py": "tests/runtime/test_store.py",
    "runtime/store/objects.py": "tests/runtime/test_store.py",
    "runtime/hubs/snapshot.py": "tests/pretrained/test_hubs.py",
    "runtime/hubs/names.py": "tests/pretrained/test_hubs.py",
    "runtime/hubs/hugging_face.py": "tests/pretrained/test_hubs.py",
    "runtime/hubs/modelscope.py": "tests/pretrained/test_hubs.py",
    "pretrained/hub_stages.py": "tests/pretrained/test_hubs.py",
    "pretrained/model_card.py": "tests/pretrained/test_hubs.py",
    "runtime/store/programs.py": "tests/runtime/test_compile_cache.py",
    "runtime/store/retry.py": "tests/runtime/test_store.py",
    "runtime/store/scratch.py": "tests/runtime/test_store.py",
    "runtime/store/working.py": "tests/runtime/test_store.py",
    # Records from their files to rows of tokens.
    "data/config.py": "tests/config/test_ranges.py",
    "data/contamination.py": "tests/data/test_scored_bytes.py",
    "data/file_formats.py": "tests/data/test_formats.py",
    "data/files.py": "tests/data/test_formats.py",
    "data/format.py": "tests/data/test_data.py",
    "data/messages.py": "tests/data/test_wrong_data.py",
    "data/readers.py": "tests/data/test_formats.py",
    "data/records.py": "tests/data/test_wrong_data.py",
    "data/sources.py": "tests/data/test_formats.py",
    "data/splits.py": "tests/data/test_data.py",
    "data/templates.py": "tests/data/test_wrong_data.py",
    "data/batches.py": "tests/data/test_loader.py",
    "data/deduplication.py": "tests/data/test_store.py",
    "data/mixture.py": "tests/data/test_loader.py",
    "data/rows.py": "tests/data/test_loader.py",
    "data/soft_targets.py": "tests/stages/test_teacher.py",
    "data/schema.py": "tests/data/test_wrong_data.py",
    "data/tokenization.py": "tests/data/test_store.py",
    "data/units.py": "tests/data/test_store.py",
    "data/workers.py": "tests/data/test_store.py",
    # The model is compared as a whole, on one device, on meshes and with published models.
    "models/attention.py": "tests/models/test_transformer.py",
    "models/config.py": "tests/models/test_transformer.py",
    "models/parts_config.py": "tests/models/test_transformer.py",
    "models/dial.py": "tests/stages/test_dial.py",
    "models/layers.py": "tests/models/test_mutations.py",
    "models/next_token.py": "tests/models/test_mtp.py",
    "models/pipeline.py": "tests/test_sharded.py",
    "models/rope.py": "tests/models/test_transformer.py",
    "models/scalar.py": "tests/models/test_transformer.py",
    "models/attention_cpu.py": "tests/models/test_attention_tpu.py",
    "models/attention_gpu.py": "tests/models/test_attention_tpu.py",
    "models/attention_mask.py": "tests/models/test_attention_tpu.py",
    "models/decode.py": "tests/engine/test_engine.py",
    "models/block_cache.py": "tests/engine/test_engine.py",
    "models/norm.py": "tests/models/test_transformer.py",
    "models/self_attention.py": "tests/models/test_mutations.py",
    "pretrained/downloads.py": "tests/pretrained/test_convert.py",
    "pretrained/family_fields.py": "tests/pretrained/test_family_config.py",
    "pretrained/safetensors_files.py": "tests/pretrained/test_convert.py",
    "pretrained/adapters.py": "tests/pretrained/test_convert.py",
    "pretrained/checked_values.py": "tests/pretrained/test_gguf_files.py",
    "pretrained/family_rope.py": "tests/pretrained/test_family_config.py",
    "pretrained/family_table.py": "tests/pretrained/test_family_config.py",
    "pretrained/gguf_config.py": "tests/pretrained/test_gguf_files.py",
    "pretrained/gguf_tokenizer.py": "tests/pretrained/test_gguf_files.py",
    "pretrained/safetensors_writer.py": "tests/pretrained/test_convert.py",
    "tokenizers/chat_template.py": "tests/tokenizers/test_published.py",
    "tokenizers/json_backend.py": "tests/tokenizers/test_published.py",
    "tokenizers/marks.py": "tests/tokenizers/test_published.py",
    "tokenizers/plain_backend.py": "tests/tokenizers/test_published.py",
    "tokenizers/sentencepiece_backend.py": "tests/tokenizers/test_published.py",
    "tokenizers/tiktoken_backend.py": "tests/tokenizers/test_published.py",
    # PPO: the update's parts against NumPy, and as a whole against a known optimum (test_proofs.py).
    "rl/config.py": "tests/stages/test_ppo.py",
    "rl/distillation.py": "tests/stages/test_distillation.py",
    "rl/dynamic_sampling.py": "tests/stages/test_objectives.py",
    "rl/reward_config.py": "tests/rl/test_rewards.py",
    "rl/experience.py": "tests/stages/test_ppo.py",
    "rl/held_out.py": "tests/stages/test_ppo.py",
    "rl/layouts.py": "tests/stages/test_ppo.py",
    "rl/numerals.py": "tests/rl/test_rewards.py",
    "rl/objectives.py": "tests/stages/test_ppo.py",
    "rl/planned.py": "tests/plan/test_planning.py",
    "rl/programs.py": "tests/stages/test_ppo.py",
    "rl/roles.py": "tests/stages/test_ppo.py",
    "rl/rollout_log.py": "tests/test_life.py",
    "rl/score_functions.py": "tests/rl/test_rewards.py",
    "rl/scoring.py": "tests/stages/test_ppo.py",
    "scaling/config.py": "tests/scaling/test_command.py",
    "scaling/picture.py": "tests/scaling/test_command.py",
    "scaling/runs.py": "tests/scaling/test_command.py",
    "rl/update.py": "tests/stages/test_ppo.py",
    # Stages are what a life consists of.
    "stages/__init__.py": "tests/stages/test_table.py",
    "stages/evaluate.py": "tests/test_life.py",
    "stages/language_model.py": "tests/test_life.py",
    "stages/reinforce.py": "tests/test_life.py",
    "stages/tokenizer.py": "tests/test_life.py",
    "stages/response_scores.py": "tests/stages/test_preference.py",
    "stages/config.py": "tests/config/test_config.py",
    "stages/training.py": "tests/config/test_config.py",
    # The rest.
    "report/figures.py": "tests/report/test_report.py",
    "report/tables.py": "tests/report/test_report.py",
    "ranking/answers.py": "tests/stages/test_rank.py",
    "engine/config.py": "tests/config/test_ranges.py",
    "engine/block_pool.py": "tests/engine/test_scheduler.py",
    "engine/geometry.py": "tests/engine/test_engine.py",
    "engine/inputs.py": "tests/engine/test_engine.py",
    "engine/programs.py": "tests/engine/test_engine.py",
    "engine/request.py": "tests/engine/test_engine.py",
    "engine/rollouts.py": "tests/engine/test_responses.py",
    "engine/row_sampling.py": "tests/engine/test_sampling.py",
    "rl/sampler.py": "tests/stages/test_ppo.py",
    "evaluation/config.py": "tests/evaluation/test_scoring.py",
    "evaluation/harness.py": "tests/evaluation/test_scoring.py",
    "evaluation/tasks.py": "tests/evaluation/test_scoring.py",
    "evaluation/task_files.py": "tests/evaluation/test_scoring.py",
    "plan/config.py": "tests/plan/test_planning.py",
    "plan/estimate.py": "tests/plan/test_planning.py",
    "plan/flops.py": "tests/plan/test_planning.py",
    "plan/hlo.py": "tests/plan/test_planning.py",
    "plan/kept.py": "tests/plan/test_planning.py",
    "plan/measure.py": "tests/plan/test_planning.py",
    "plan/roofline.py": "tests/plan/test_planning.py",
    "plan/search.py": "tests/plan/test_planning.py",
    "plan/tables.py": "tests/plan/test_planning.py",
    "runtime/began.py": "tests/runtime/test_goodput.py",
    "runtime/config.py": "tests/config/test_config.py",
    "runtime/console.py": "tests/test_terminal.py",
    "runtime/hardware.py": "tests/test_terminal.py",
    "runtime/tree_shapes.py": "tests/runtime/test_checkpoint.py",
    "runtime/mesh.py": "tests/test_sharding.py",
    "runtime/provenance.py": "tests/test_life.py",
    "runtime/seal.py": "tests/runtime/test_checkpoint.py",
    "runtime/transfer.py": "tests/stages/test_ppo.py",
}


def needs_a_test(file):
    if file.name != "__init__.py":
        return True
    code = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, code) for node in ast.parse(file.read_text()).body)


MODULES = {
    file.relative_to(PACKAGE).as_posix(): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if needs_a_test(file)
}


def file_of_its_name(module):
    """The test file that belongs to a module, whether it exists or not."""
    file = MODULES[module]
    name = file.parent.name if file.name == "__init__.py" else file.stem
    return TESTS / file.parent.relative_to(PACKAGE) / f"test_{name}.py"


def files_that_name(module):
    """Test files that import the module, to choose an entry from."""
    words = ["jaxllm", *Path(module).with_suffix("").parts]
    dotted = ".".join(words)
    imported = f"from {'.'.join(words[:-1])} import "
    found = []
    for file in sorted(TESTS.rglob("test_*.py")):
        lines = file.read_text().splitlines()
        if any(dotted in line or (imported in line and words[-1] in line) for line in lines):
            found.append(file.relative_to(ROOT).as_posix())
    return found


def test_every_module_has_a_test_file():
    missing = []
    for module in MODULES:
        if module not in TESTED_IN and not file_of_its_name(module).exists():
            imported = ", ".join(files_that_name(module)) or "no test"
            missing.append(f'"{module}": "",  # imported in {imported}')
    assert not missing, "write test files or add to TESTED_IN:\n" + "\n".join(missing)


def test_every_entry_is_needed_and_names_a_file():
    wrong = []
    for module, test in TESTED_IN.items():
        if module not in MODULES:
            wrong.append(f"{module} does not exist: remove the entry")
        elif file_of_its_name(module).exists():
            wrong.append(f"{module} has a test file of its name: remove the entry")
        elif not (ROOT / test).exists():
            wrong.append(f"{module}: {test} does not exist: name another file")
    assert not wrong, "\n".join(wrong)
