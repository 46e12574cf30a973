"""Text to token ids and back: tokenizer, chat template, incremental detokenizer.

Tokenizing itself is the `tokenizers` library's work; transformers is never imported here.
"""
