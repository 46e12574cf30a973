"""Fields of chat and text completions that OpenAI, vLLM or SGLang know and this server does not honour.

Owns the tables only; what becomes of such a field is `generation/fields.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from graphllm.server.generation.fields import KnownField


def _all(names: Iterable[str], known: KnownField) -> dict[str, KnownField]:
    return dict.fromkeys(names, known)


_OPENAI: Final[dict[str, KnownField]] = {
    "store": KnownField(
        neutral=(False,), is_tolerated=True, note="Completions are not stored; /v1/responses stores its own."
    ),
    "service_tier": KnownField(
        neutral=("auto", "default"), is_tolerated=True, note="There is one tier; use priority."
    ),
    "prompt_cache_retention": KnownField(
        neutral=("in_memory", "in-memory"),
        is_tolerated=True,
        note="Cached prefixes stay as long as there is memory for them.",
    ),
    "prompt_cache_options": KnownField(is_tolerated=True, note="Prefixes are cached by themselves."),
}

_VLLM: Final[dict[str, KnownField]] = {
    "detokenize": KnownField(neutral=(True,), note="Answers have text; return_token_ids adds the ids."),
    "early_stopping": KnownField(neutral=(False,), note="It belongs to beam search, which there is none of."),
    "ec_transfer_params": KnownField(note="There is no transfer between servers."),
    "guided_decoding_backend": KnownField(
        neutral=("auto",), is_tolerated=True, note="There is one backend, llguidance."
    ),
    "kv_transfer_params": KnownField(note="There is no transfer between servers."),
    "length_penalty": KnownField(neutral=(1, 1.0), note="It belongs to beam search, which there is none of."),
    "logits_processors": KnownField(
        neutral=([],), note="Requests bring no code; use logit_bias or bad_words."
    ),
    "logprob_token_ids": KnownField(note="Log probabilities are of the likeliest tokens."),
    "mm_processor_kwargs": KnownField(neutral=({},), is_tolerated=True, note="There are no images here."),
    "repetition_detection": KnownField(note="Use repetition_penalty, or stop."),
    "request_id": KnownField(is_tolerated=True, note="Ids are the server's."),
    "return_mm_kwargs": KnownField(neutral=(True, False), note="It belongs to vLLM's render endpoints."),
    "return_token_offsets": KnownField(neutral=(False,), note="Offsets are not reported."),
    "routed_experts_prompt_start": KnownField(neutral=(0,), note="Routed experts are not reported."),
    "spaces_between_special_tokens": KnownField(
        neutral=(True, False), note="Text is the tokens' own bytes; nothing is put between them."
    ),
    "stream_interval": KnownField(
        neutral=(1,), is_tolerated=True, note="A chunk is sent for each step that brought text."
    ),
    "structural_tag": KnownField(note="Use tools, or structured_outputs.grammar."),
    "thinking_token_budget": KnownField(neutral=(-1,), note="Reasoning has no limit of its own."),
    "use_beam_search": KnownField(neutral=(False,), note="There is no beam search; use n."),
    "vllm_xargs": KnownField(neutral=({},), note="There are no extensions that could read it."),
    "watermarking": KnownField(neutral=(False,), note="Texts are not marked."),
}

_SGLANG: Final[dict[str, KnownField]] = {
    **_all(
        ("bootstrap_host", "bootstrap_port", "bootstrap_room", "disagg_prefill_dp_rank"),
        KnownField(note="Prompts and answers are computed in one process."),
    ),
    **_all(
        ("data_parallel_rank", "routed_dp_rank"),
        KnownField(neutral=(0,), note="There is one replica behind this address."),
    ),
    **_all(
        ("rid", "session_id"),
        KnownField(is_tolerated=True, note="Ids are the server's; all share one cache."),
    ),
    **_all(
        ("custom_logit_processor", "custom_params"),
        KnownField(note="Requests bring no code; use logit_bias or bad_words."),
    ),
    "custom_labels": KnownField(is_tolerated=True, note="Metrics have no labels of clients."),
    "extra_key": KnownField(note="Use cache_salt to keep cached prefixes apart."),
    "images_config": KnownField(neutral=({},), is_tolerated=True, note="There are no images here."),
    "lora_path": KnownField(note="Name a loaded adapter as `model`."),
    "ngram_corpus_id": KnownField(note="There is no speculation from a corpus."),
    "return_cached_tokens_details": KnownField(
        neutral=(False,), is_tolerated=True, note="usage.prompt_tokens_details has cached_tokens."
    ),
    "return_hidden_states": KnownField(neutral=(False,), note="Hidden states are not reported."),
    "return_routed_experts": KnownField(neutral=(False,), note="Routed experts are not reported."),
    "routed_experts_start_len": KnownField(neutral=(0,), note="Routed experts are not reported."),
    "session_params": KnownField(
        neutral=({},), note="There are no sessions; prefixes are cached by themselves."
    ),
    "stop_regex": KnownField(neutral=([],), note="Use stop, whose texts are matched exactly."),
}

_COMMON: Final[dict[str, KnownField]] = {**_OPENAI, **_VLLM, **_SGLANG}

CHAT_FIELDS: Final[Mapping[str, KnownField]] = {
    **_COMMON,
    "audio": KnownField(note="Answers are text."),
    "chat_template": KnownField(note="Requests bring no templates; use chat_template_kwargs."),
    "echo": KnownField(neutral=(False,), note="Use continue_final_message and put both texts together."),
    "input_ids": KnownField(note="Send ids as the prompt of /v1/completions."),
    "max_dynamic_patch": KnownField(is_tolerated=True, note="There are no images here."),
    "media_io_kwargs": KnownField(neutral=({},), is_tolerated=True, note="There are no images here."),
    "min_dynamic_patch": KnownField(is_tolerated=True, note="There are no images here."),
    "modalities": KnownField(neutral=(["text"], []), note="Answers are text."),
    "moderation": KnownField(note="Answers are not moderated."),
    "prediction": KnownField(is_tolerated=True, note="A prediction would change the speed only."),
    "return_meta_info": KnownField(neutral=(False,), note="Use usage, and /metrics."),
    "return_prompt_text": KnownField(neutral=(False,), note="Use return_token_ids and /detokenize."),
    "return_prompt_token_ids": KnownField(neutral=(False,), note="Use return_token_ids."),
    "task": KnownField(note="Chat templates have no tasks; use chat_template_kwargs."),
    "use_audio_in_video": KnownField(neutral=(False,), is_tolerated=True, note="There are no videos here."),
    "verbosity": KnownField(
        neutral=("medium",), is_tolerated=True, note="Open models are told in the prompt how much to say."
    ),
    "web_search_options": KnownField(note="There is no web search; give the model a tool."),
}

COMPLETION_FIELDS: Final[Mapping[str, KnownField]] = {
    **_COMMON,
    "prompt_embeds": KnownField(note="Prompts are texts or token ids."),
}
