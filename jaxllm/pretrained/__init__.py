"""Models as others publish them: import to a stage directory, and export from one.

- `convert`: `jaxllm import` and `jaxllm export`.
- `adapters`: LoRA adapters in PEFT's format.
- `downloads`: which files of a downloaded folder are the model, and what makes it unreadable.
- `families`: tensor names and shapes of each model family, and how they map to our parameters.
- `family_config`: a family's config.json to our `ModelConfig` and back.
- `family_table`: one table per family: field of config.json, field of `ModelConfig`, default.
- `family_fields`: the checked reader of a config.json.
- `family_rope`: rotary settings of a config.json to our `RopeScaling` and back.
- `checked_values`: values by name, each checked when it is read.
- `safetensors_files`: parameters from safetensors files onto a mesh.
- `safetensors_writer`: tensors to safetensors files, one in memory at a time.
- `gguf_files`: a GGUF file: its parts and its tensors.
- `gguf_config`: the config.json of a GGUF file's metadata.
- `gguf_tokenizer`: the tokenizer's files of a GGUF file's metadata.
"""
