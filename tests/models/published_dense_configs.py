"""Published dense models of OLMo, Granite, Cohere, GLM and SmolLM3."""

from __future__ import annotations

from tests.models.published_model import PublishedModel, alternating, shape, with_keys

OLMO_2 = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "vocab_size": 100352,
}
OLMO_3 = with_keys(
    OLMO_2,
    architectures=["Olmo3ForCausalLM"],
    max_position_embeddings=65536,
    model_type="olmo3",
    rope_scaling={
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    sliding_window=4096,
    vocab_size=100278,
)
OLMO_MODELS = (
    PublishedModel(
        "allenai/OLMo-2-0425-1B",
        1_484_916_736,
        with_keys(OLMO_2, **shape(2048, 8192, layers=16, heads=16, key_heads=16)),
    ),
    PublishedModel(
        "allenai/OLMo-2-1124-7B",
        7_298_617_344,
        with_keys(OLMO_2, **shape(4096, 11008, layers=32, heads=32, key_heads=32)),
    ),
    PublishedModel(
        "allenai/OLMo-2-0325-32B",
        32_234_279_936,
        with_keys(OLMO_2, **shape(5120, 27648, layers=64, heads=40, key_heads=8)),
    ),
    PublishedModel(
        "allenai/Olmo-3-7B-Instruct",
        7_298_011_136,
        with_keys(
            OLMO_3,
            **shape(4096, 11008, layers=32, heads=32, key_heads=32),
            layer_types=alternating(32, every=4),
        ),
    ),
    PublishedModel(
        "allenai/Olmo-3.1-32B-Instruct",
        32_233_522_176,
        with_keys(
            OLMO_3,
            **shape(5120, 27648, layers=64, heads=40, key_heads=8),
            layer_types=alternating(64, every=4),
        ),
    ),
)

GRANITE = {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.1,
    "attention_multiplier": 0.0078125,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "logits_scaling": 16.0,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "granite",
    "pad_token_id": 0,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49155,
}
GRANITE_MODELS = (
    PublishedModel(
        "ibm-granite/granite-3.0-8b-instruct",
        8_170_848_256,
        with_keys(GRANITE, **shape(4096, 12800, layers=40, heads=32, key_heads=8)),
    ),
    PublishedModel(
        "ibm-granite/granite-3.3-2b-instruct",
        2_533_539_840,
        with_keys(
            GRANITE,
            **shape(2048, 8192, layers=40, heads=32, key_heads=8),
            attention_dropout=0.0,
            attention_multiplier=0.015625,
            logits_scaling=8.0,
            max_position_embeddings=131072,
            rope_theta=10000000.0,
            vocab_size=49159,
        ),
    ),
)

COHERE = {
    "architectures": ["CohereForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-05,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "model_type": "cohere",
    "pad_token_id": 0,
    "rope_theta": 10000,
    "torch_dtype": "float16",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 256000,
}
COHERE_8B = shape(4096, 14336, layers=32, heads=32, key_heads=8)
COHERE_MODELS = (
    PublishedModel(
        "CohereForAI/c4ai-command-r-v01",
        34_980_831_232,
        with_keys(
            COHERE,
            **shape(8192, 22528, layers=40, heads=64, key_heads=64),
            model_max_length=131072,
            rope_theta=8000000.0,
        ),
    ),
    PublishedModel(
        "CohereForAI/c4ai-command-r-plus",
        103_810_674_688,
        with_keys(
            COHERE,
            **shape(12288, 33792, layers=64, heads=96, key_heads=8),
            logit_scale=0.8333333333333334,
            model_max_length=131072,
            rope_theta=75000000.0,
            use_qk_norm=True,
        ),
    ),
    PublishedModel("CohereForAI/aya-23-8B", 8_028_033_024, with_keys(COHERE, **COHERE_8B)),
    PublishedModel(
        "CohereForAI/c4ai-command-r7b-12-2024",
        8_028_033_024,
        with_keys(
            COHERE,
            **COHERE_8B,
            architectures=["Cohere2ForCausalLM"],
            cache_implementation="hybrid",
            head_dim=128,
            layer_switch=4,
            logit_scale=0.25,
            max_position_embeddings=132096,
            model_type="cohere2",
            order_of_interleaved_layers="local_attn_first",
            position_embedding_type="rope_gptj",
            rope_scaling=None,
            rope_theta=50000,
            rotary_pct=1.0,
            sliding_window=4096,
            sliding_window_pattern=4,
            use_embedding_sharing=True,
            use_gated_activation=True,
            use_parallel_block=True,
            use_parallel_embedding=True,
        ),
    ),
)
del COHERE_MODELS[-1].config["use_qk_norm"]

GLM = {
    "architectures": ["GlmForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "model_type": "glm",
    "pad_token_id": 151329,
    "rms_norm_eps": 1.5625e-07,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 151552,
}
GLM_4_9B = shape(4096, 13696, layers=40, heads=32, key_heads=2)
GLM_4 = with_keys(
    GLM,
    architectures=["Glm4ForCausalLM"],
    attention_bias=False,
    max_position_embeddings=32768,
    model_type="glm4",
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-05,
)
GLM_MODELS = (
    PublishedModel("THUDM/glm-4-9b-chat-hf", 9_399_951_360, with_keys(GLM, **GLM_4_9B)),
    PublishedModel("THUDM/GLM-4-9B-0414", 9_400_000_000, with_keys(GLM_4, **GLM_4_9B)),
    PublishedModel(
        "THUDM/GLM-4-32B-0414",
        33_000_000_000,
        with_keys(GLM_4, **shape(6144, 23040, layers=61, heads=48, key_heads=8)),
    ),
)

SMOLLM3 = {
    **shape(2048, 11008, layers=36, heads=16, key_heads=4),
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128012,
    "hidden_act": "silu",
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
SMOLLM3_MODELS = (PublishedModel("HuggingFaceTB/SmolLM3-3B", 3_075_098_624, SMOLLM3),)

SEED_OSS = {
    "architectures": ["SeedOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.1,
    "attention_out_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 524288,
    "mlp_bias": False,
    "model_type": "seed_oss",
    "residual_dropout": 0.1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"rope_type": "default"},
    "rope_theta": 10000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 155136,
}
SEED_OSS_MODELS = (
    PublishedModel(
        "ByteDance-Seed/Seed-OSS-36B-Instruct",
        36_151_104_512,
        with_keys(SEED_OSS, **shape(5120, 27648, layers=64, heads=80, key_heads=8)),
    ),
)
