"""Keys of config.json that need no reading.

The list covers what transformers 4 and 5 write into every file, and notes that published checkpoints
carry. A key that is not here and that no family reads is refused (`hf_config.py`).
"""

from __future__ import annotations

# Book-keeping, training, and how transformers shall run the model.
HARMLESS_KEYS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "_num_labels",
        "activation_dropout",
        "architectures",
        "attention_dropout",
        "attention_dropout_prob",
        "attention_probs_dropout_prob",
        "attention_softmax_in_fp32",
        "attn_implementation",
        "attn_pdrop",
        "auto_map",
        "aux_loss_alpha",
        "cache_implementation",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "cross_attention_hidden_size",
        "custom_pipelines",
        "dropout",
        "embd_pdrop",
        "embedding_dropout",
        "ep_size",
        "finetuning_task",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "init_std",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "layerdrop",
        "max_sequence_length",
        "model_max_length",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "output_router_logits",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "residual_dropout",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "scale_attention_softmax_in_fp32",
        "seq_aux",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_last_hidden_states",
        "tokenizer_class",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "use_return_dict",
    }
)

# What vectors and scores are for, which `pooling.py` reads, and other servers' names for it.
POOLING_KEYS = frozenset(
    {
        "classifier_from_token",
        "is_matryoshka",
        "is_original_qwen3_reranker",
        "matryoshka_dimensions",
        "sbert_ce_default_activation_function",
        "sentence_transformers",
    }
)

# Token ids and sampling parameters: the tokenizer and generation_config.json say what holds.
GENERATION_KEYS = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "pad_token_id",
        "prefix",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "unk_token_id",
    }
)

# How weights are stored, in two generations of files.
_KEYS_OF_CONFIG = ("quantization_config", "compression_config")
QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files in which AutoGPTQ and AutoAWQ say the same beside a config.json that is the plain model's, and the
method of each. What such a file says stands in a checkpoint's configuration under the file's name."""
QUANTIZATION_KEYS = (*_KEYS_OF_CONFIG, *QUANTIZATION_FILES)

# Keys that would change the mathematics at any other value.
NEUTRAL_VALUES: dict[str, object] = {
    "add_cross_attention": False,
    "attention_bias": False,
    "is_encoder_decoder": False,
    "mlp_bias": False,
    "pruned_heads": {},
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "use_sliding_window": False,
}
