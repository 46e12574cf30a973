"""Published models of Gemma 1 to 3 and of Phi-3 and 4."""

from __future__ import annotations

from tests.models.published_model import PublishedModel, alternating, shape, with_keys

GEMMA = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA_2 = with_keys(
    GEMMA,
    architectures=["Gemma2ForCausalLM"],
    attn_logit_softcapping=50.0,
    cache_implementation="hybrid",
    final_logit_softcapping=30.0,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    model_type="gemma2",
    query_pre_attn_scalar=256,
    sliding_window=4096,
)
GEMMA_3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}
GEMMA_3_270M = with_keys(
    GEMMA_3,
    **shape(640, 2048, layers=18, heads=4, key_heads=1),
    _sliding_window_pattern=6,
    layer_types=alternating(18, every=6),
    use_bidirectional_attention=False,
)
del GEMMA_3_270M["sliding_window_pattern"], GEMMA_3_270M["cache_implementation"]
GEMMA_MODELS = (
    PublishedModel(
        "google/gemma-2b",
        2_506_172_416,
        with_keys(GEMMA, **shape(2048, 16384, layers=18, heads=8, key_heads=1)),
    ),
    PublishedModel(
        "google/gemma-7b-it",
        8_537_680_896,
        with_keys(
            GEMMA,
            **shape(3072, 24576, layers=28, heads=16, key_heads=16),
            hidden_act="gelu_pytorch_tanh",
            hidden_activation=None,
        ),
    ),
    PublishedModel(
        "google/gemma-2-2b-it",
        2_614_341_888,
        with_keys(GEMMA_2, **shape(2304, 9216, layers=26, heads=8, key_heads=4), eos_token_id=[1, 107]),
    ),
    PublishedModel(
        "google/gemma-2-9b",
        9_241_705_984,
        with_keys(GEMMA_2, **shape(3584, 14336, layers=42, heads=16, key_heads=8), sliding_window_size=4096),
    ),
    PublishedModel(
        "google/gemma-2-27b",
        27_227_128_320,
        with_keys(
            GEMMA_2,
            **shape(4608, 36864, layers=46, heads=32, key_heads=16),
            _attn_implementation="eager",
            head_dim=128,
            query_pre_attn_scalar=144,
            sliding_window_size=4096,
        ),
    ),
    PublishedModel("google/gemma-3-270m", 268_098_176, GEMMA_3_270M),
    PublishedModel(
        "google/gemma-3-1b-it",
        999_885_952,
        with_keys(GEMMA_3, **shape(1152, 6912, layers=26, heads=4, key_heads=1)),
    ),
)

PHI_3 = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32064,
}
PHI_3_MINI = shape(3072, 8192, layers=32, heads=32, key_heads=32)
PHI_3_MEDIUM = shape(5120, 17920, layers=40, heads=40, key_heads=10)


def longrope(name: str, *, pairs: int) -> dict[str, object]:
    """The form of the published factors: not their values, which no test needs."""
    long_factor = [1.0 + 63.0 * pair / (pairs - 1) for pair in range(pairs)]
    return {"long_factor": long_factor, "short_factor": [1.0] * pairs, "type": name}


PHI_3_MODELS = (
    PublishedModel("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552, with_keys(PHI_3, **PHI_3_MINI)),
    PublishedModel(
        "microsoft/Phi-3-mini-128k-instruct, first version",
        3_821_079_552,
        with_keys(
            PHI_3,
            **PHI_3_MINI,
            max_position_embeddings=131072,
            rope_scaling=longrope("su", pairs=48),
            sliding_window=262144,
        ),
    ),
    PublishedModel(
        "microsoft/Phi-3-medium-128k-instruct",
        13_960_238_080,
        with_keys(
            PHI_3,
            **PHI_3_MEDIUM,
            attention_bias=False,
            max_position_embeddings=131072,
            rope_scaling=longrope("longrope", pairs=64),
            sliding_window=131072,
        ),
    ),
    PublishedModel(
        "microsoft/Phi-3.5-mini-instruct",
        3_821_079_552,
        with_keys(
            PHI_3,
            **PHI_3_MINI,
            attention_bias=False,
            max_position_embeddings=131072,
            rope_scaling=longrope("longrope", pairs=48),
            sliding_window=262144,
        ),
    ),
    PublishedModel(
        "microsoft/phi-4",
        14_659_507_200,
        with_keys(
            PHI_3,
            **PHI_3_MEDIUM,
            attention_bias=False,
            bos_token_id=100257,
            eos_token_id=100265,
            max_position_embeddings=16384,
            original_max_position_embeddings=16384,
            pad_token_id=100349,
            rope_theta=250000,
            sliding_window=None,
            vocab_size=100352,
        ),
    ),
    PublishedModel(
        "microsoft/Phi-4-mini-instruct",
        3_836_021_760,
        with_keys(
            PHI_3,
            **shape(3072, 8192, layers=32, heads=24, key_heads=8),
            attention_bias=False,
            bos_token_id=199999,
            eos_token_id=199999,
            full_attn_mod=1,
            interpolate_factor=1,
            lm_head_bias=False,
            max_position_embeddings=131072,
            mlp_bias=False,
            pad_token_id=199999,
            partial_rotary_factor=0.75,
            rope_scaling=longrope("longrope", pairs=48),
            sliding_window=262144,
            tie_word_embeddings=True,
            vocab_size=200064,
        ),
    ),
)
