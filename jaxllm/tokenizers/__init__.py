"""Text to token ids and back, conversations to token ids and a loss mask.

- `trained`: the tokenizer that is trained here, and the interface of all tokenizers.
- `published`: a published model's tokenizer.
- `files`: what a published model's files say about special tokens, ends and the chat template.
- `chat_template`: a published chat template, rendered, and where the assistant speaks in it.
- `marks`: marks for control tokens that no text can spell.
- `json_backend`: tokenizer.json.
- `plain_backend`: control tokens for vocabularies whose libraries have none:
- `sentencepiece_backend`: SentencePiece models of others,
- `tiktoken_backend`: tiktoken rank files.

Where the first token of a text comes from (`begin_ids`):

    a tokenizer trained here        always <|bos|>
    tokenizer.json                  what its post-processor adds
    tokenizer.model, *.tiktoken     BOS if tokenizer_config.json has "add_bos_token": true
    a conversation                  the chat template writes it

A conversation becomes ids and a mask of what is trained on, here from a template without blocks:

    text       <|user|>hi<|end|><|assistant|>ok<|end|>
    tokens     <|user|>  hi  <|end|>  <|assistant|>  ok  <|end|>
    mask           .     .      .           .        1      1
"""
