"""Request fields that the API knows and this server does not honour, with the values that change nothing.

A client may send such a field with a value that asks for nothing (`tools: []`, `echo: false`): it is
accepted and dropped. Any other value is refused by name, so that nobody believes it was honoured.
Owns the tables only; `decoding.py` applies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# Field name to the values, besides null, that change nothing.
_COMMON: Final[dict[str, tuple[Any, ...]]] = {
    # OpenAI's
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory",),
    "prompt_cache_options": (),
    # vLLM's
    "best_of": (),
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "detokenize": (True,),
    "early_stopping": (False,),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_logprobs": (),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structural_tag": (),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}

CHAT_FIELDS: Final[Mapping[str, tuple[Any, ...]]] = {
    **_COMMON,
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_reasoning": (True,),
    "media_io_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning": (),
    "reasoning_effort": (),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}

COMPLETION_FIELDS: Final[Mapping[str, tuple[Any, ...]]] = {
    **_COMMON,
    "add_special_tokens": (True,),
    "echo": (False,),
    "prompt_embeds": (),
    "suffix": ("",),
}


def changes_nothing(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether a value of a field that is not honoured asks for nothing."""
    # Types are compared too: 0 == False and 1 == True in Python, not in JSON.
    return value is None or any(type(value) is type(other) and value == other for other in allowed)
