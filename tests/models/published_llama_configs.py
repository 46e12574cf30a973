"""Published models that are built like Llama: Llama, Yi, SmolLM2, Mistral, Qwen2 and Qwen3, R1 distilled."""

from __future__ import annotations

from tests.models.published_model import PublishedModel, shape, with_keys

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3 = with_keys(
    LLAMA,
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=128000,
    eos_token_id=128001,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    torch_dtype="bfloat16",
    vocab_size=128256,
)
LLAMA_31_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_31 = with_keys(
    LLAMA_3,
    eos_token_id=[128001, 128008, 128009],
    max_position_embeddings=131072,
    mlp_bias=False,
    rope_scaling=LLAMA_31_ROPE,
)
LLAMA_32 = with_keys(LLAMA_31, rope_scaling=LLAMA_31_ROPE | {"factor": 32.0}, tie_word_embeddings=True)
YI = with_keys(LLAMA, attention_bias=False, pad_token_id=0, rope_theta=5000000.0, vocab_size=64000)
SMOLLM2 = with_keys(
    LLAMA,
    attention_bias=False,
    attention_dropout=0.0,
    is_llama_config=True,
    max_position_embeddings=8192,
    mlp_bias=False,
    pad_token_id=2,
    rope_interleaved=False,
    rope_theta=100000,
    tie_word_embeddings=True,
    torch_dtype="bfloat16",
    vocab_size=49152,
    **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
)
LLAMA_MODELS = (
    PublishedModel(
        "meta-llama/Llama-2-7b-hf",
        6_738_415_616,
        with_keys(LLAMA, **shape(4096, 11008, layers=32, heads=32, key_heads=32)),
    ),
    PublishedModel(
        "meta-llama/Llama-2-70b-hf",
        68_976_648_192,
        with_keys(LLAMA, **shape(8192, 28672, layers=80, heads=64, key_heads=8)),
    ),
    PublishedModel(
        "codellama/CodeLlama-34b-hf",
        33_743_970_304,
        with_keys(
            LLAMA,
            **shape(8192, 22016, layers=48, heads=64, key_heads=8),
            max_position_embeddings=16384,
            rope_theta=1000000,
            torch_dtype="bfloat16",
        ),
    ),
    PublishedModel(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        1_100_048_384,
        with_keys(
            LLAMA,
            **shape(2048, 5632, layers=22, heads=32, key_heads=4),
            attention_bias=False,
            max_position_embeddings=2048,
            rope_theta=10000.0,
            torch_dtype="bfloat16",
        ),
    ),
    PublishedModel(
        "meta-llama/Meta-Llama-3-8B",
        8_030_261_248,
        with_keys(LLAMA_3, **shape(4096, 14336, layers=32, heads=32, key_heads=8)),
    ),
    PublishedModel(
        "meta-llama/Llama-3.1-8B-Instruct",
        8_030_261_248,
        with_keys(LLAMA_31, **shape(4096, 14336, layers=32, heads=32, key_heads=8)),
    ),
    PublishedModel(
        "meta-llama/Llama-3.3-70B-Instruct",
        70_553_706_496,
        with_keys(LLAMA_31, **shape(8192, 28672, layers=80, heads=64, key_heads=8), head_dim=128),
    ),
    PublishedModel(
        "meta-llama/Llama-3.1-405B",
        405_853_388_800,
        with_keys(LLAMA_31, **shape(16384, 53248, layers=126, heads=128, key_heads=8)),
    ),
    PublishedModel(
        "meta-llama/Llama-3.2-1B-Instruct",
        1_235_814_400,
        with_keys(LLAMA_32, **shape(2048, 8192, layers=16, heads=32, key_heads=8), head_dim=64),
    ),
    PublishedModel(
        "meta-llama/Llama-3.2-3B-Instruct",
        3_212_749_824,
        with_keys(LLAMA_32, **shape(3072, 8192, layers=28, heads=24, key_heads=8), head_dim=128),
    ),
    PublishedModel(
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        8_030_261_248,
        with_keys(LLAMA_31, **shape(4096, 14336, layers=32, heads=32, key_heads=8), eos_token_id=128001),
    ),
    PublishedModel(
        "01-ai/Yi-6B",
        6_061_035_520,
        with_keys(YI, **shape(4096, 11008, layers=32, heads=32, key_heads=4)),
    ),
    PublishedModel(
        "01-ai/Yi-34B-200K",
        34_388_917_248,
        with_keys(
            YI,
            **shape(7168, 20480, layers=60, heads=56, key_heads=8),
            max_position_embeddings=200000,
            rope_theta=10000000.0,
        ),
    ),
    PublishedModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        134_515_008,
        with_keys(SMOLLM2, **shape(576, 1536, layers=30, heads=9, key_heads=3)),
    ),
    PublishedModel(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        1_711_376_384,
        with_keys(SMOLLM2, **shape(2048, 8192, layers=24, heads=32, key_heads=32), rope_theta=130000),
    ),
)

MISTRAL = with_keys(
    LLAMA,
    architectures=["MistralForCausalLM"],
    attention_dropout=0.0,
    max_position_embeddings=32768,
    model_type="mistral",
    rope_theta=1000000.0,
    sliding_window=None,
    torch_dtype="bfloat16",
)
del MISTRAL["pretraining_tp"], MISTRAL["rope_scaling"]
MISTRAL_7B = shape(4096, 14336, layers=32, heads=32, key_heads=8)
MISTRAL_MODELS = (
    PublishedModel(
        "mistralai/Mistral-7B-v0.1",
        7_241_732_096,
        with_keys(MISTRAL, **MISTRAL_7B, rope_theta=10000.0, sliding_window=4096),
    ),
    PublishedModel(
        "mistralai/Mistral-7B-Instruct-v0.3",
        7_248_023_552,
        with_keys(MISTRAL, **MISTRAL_7B, vocab_size=32768),
    ),
    PublishedModel(
        "mistralai/Mistral-Nemo-Instruct-2407",
        12_247_782_400,
        with_keys(
            MISTRAL,
            **shape(5120, 14336, layers=40, heads=32, key_heads=8),
            head_dim=128,
            max_position_embeddings=131072,
            vocab_size=131072,
        ),
    ),
    PublishedModel(
        "mistralai/Ministral-8B-Instruct-2410",
        8_019_808_256,
        with_keys(
            MISTRAL,
            **shape(4096, 12288, layers=36, heads=32, key_heads=8),
            head_dim=128,
            rope_theta=100000000.0,
            sliding_window=32768,
            vocab_size=131072,
        ),
    ),
    PublishedModel(
        "mistralai/Mistral-Small-24B-Instruct-2501",
        23_572_403_200,
        with_keys(
            MISTRAL,
            **shape(5120, 32768, layers=40, heads=32, key_heads=8),
            head_dim=128,
            rope_theta=100000000.0,
            vocab_size=131072,
        ),
    ),
    PublishedModel(
        "mistralai/Mistral-Small-Instruct-2409",
        22_247_282_688,
        with_keys(
            MISTRAL,
            **shape(6144, 16384, layers=56, heads=48, key_heads=8),
            head_dim=128,
            vocab_size=32768,
        ),
    ),
)

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN2_7B = shape(3584, 18944, layers=28, heads=28, key_heads=4)
QWEN25_14B = shape(5120, 13824, layers=48, heads=40, key_heads=8)
QWEN25_32B = shape(5120, 27648, layers=64, heads=40, key_heads=8)
QWEN2_MODELS = (
    PublishedModel(
        "Qwen/Qwen1.5-0.5B",
        463_987_712,
        with_keys(
            QWEN2,
            **shape(1024, 2816, layers=24, heads=16, key_heads=16),
            max_window_layers=21,
            sliding_window=32768,
            tie_word_embeddings=True,
            vocab_size=151936,
        ),
    ),
    PublishedModel(
        "Qwen/CodeQwen1.5-7B-Chat",
        7_250_284_544,
        with_keys(
            QWEN2,
            **shape(4096, 13440, layers=32, heads=32, key_heads=4),
            bos_token_id=2,
            eos_token_id=4,
            max_position_embeddings=65536,
            rms_norm_eps=1e-05,
            rope_theta=1000000,
            rotary_emb_base=1000000,
            seq_length=65536,
            sliding_window=65536,
            vocab_size=92416,
        ),
    ),
    PublishedModel(
        "Qwen/Qwen2-0.5B-Instruct",
        494_032_768,
        with_keys(
            QWEN2,
            **shape(896, 4864, layers=24, heads=14, key_heads=2),
            max_window_layers=24,
            sliding_window=32768,
            tie_word_embeddings=True,
            vocab_size=151936,
        ),
    ),
    PublishedModel("Qwen/Qwen2-7B-Instruct", 7_615_616_512, with_keys(QWEN2, **QWEN2_7B)),
    PublishedModel(
        "Qwen/Qwen2.5-7B",
        7_615_616_512,
        with_keys(QWEN2, **QWEN2_7B, max_position_embeddings=131072, use_mrope=False),
    ),
    PublishedModel(
        "Qwen/Qwen2.5-3B-Instruct",
        3_085_938_688,
        with_keys(
            QWEN2,
            **shape(2048, 11008, layers=36, heads=16, key_heads=2),
            max_window_layers=70,
            sliding_window=32768,
            tie_word_embeddings=True,
            vocab_size=151936,
        ),
    ),
    PublishedModel(
        "Qwen/Qwen2.5-Coder-32B-Instruct",
        32_763_876_352,
        with_keys(QWEN2, **QWEN25_32B, max_window_layers=70),
    ),
    PublishedModel(
        "Qwen/Qwen2.5-7B-Instruct-1M",
        7_615_616_512,
        with_keys(
            QWEN2,
            **QWEN2_7B,
            dual_chunk_attention_config={
                "chunk_size": 262144,
                "local_size": 8192,
                "original_max_position_embeddings": 262144,
            },
            max_position_embeddings=1010000,
            rms_norm_eps=1e-05,
            rope_theta=10000000.0,
            sliding_window=1010000,
        ),
    ),
    PublishedModel(
        "Qwen/QwQ-32B",
        32_763_876_352,
        with_keys(
            QWEN2, **QWEN25_32B, max_position_embeddings=40960, max_window_layers=64, rms_norm_eps=1e-05
        ),
    ),
    PublishedModel(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        1_777_088_000,
        with_keys(
            QWEN2,
            **shape(1536, 8960, layers=28, heads=12, key_heads=2),
            max_position_embeddings=131072,
            max_window_layers=21,
            rope_theta=10000,
            sliding_window=4096,
            use_mrope=False,
            vocab_size=151936,
        ),
    ),
    PublishedModel(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
        14_770_033_664,
        with_keys(QWEN2, **QWEN25_14B, max_position_embeddings=131072, rms_norm_eps=1e-05),
    ),
)

QWEN3 = with_keys(
    QWEN2,
    architectures=["Qwen3ForCausalLM"],
    attention_bias=False,
    head_dim=128,
    max_position_embeddings=40960,
    model_type="qwen3",
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=None,
    vocab_size=151936,
)
QWEN3_8B = shape(4096, 12288, layers=36, heads=32, key_heads=8)
QWEN3_MODELS = (
    PublishedModel(
        "Qwen/Qwen3-0.6B",
        596_049_920,
        with_keys(QWEN3, **shape(1024, 3072, layers=28, heads=16, key_heads=8), tie_word_embeddings=True),
    ),
    PublishedModel(
        "Qwen/Qwen3-4B-Instruct-2507",
        4_022_468_096,
        with_keys(
            QWEN3,
            **shape(2560, 9728, layers=36, heads=32, key_heads=8),
            max_position_embeddings=262144,
            max_window_layers=36,
            rope_theta=5000000,
            tie_word_embeddings=True,
        ),
    ),
    PublishedModel("Qwen/Qwen3-8B", 8_190_735_360, with_keys(QWEN3, **QWEN3_8B, max_window_layers=36)),
    PublishedModel(
        "Qwen/Qwen3-32B",
        32_762_123_264,
        with_keys(QWEN3, **shape(5120, 25600, layers=64, heads=64, key_heads=8), max_window_layers=64),
    ),
    PublishedModel(
        "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
        8_190_735_360,
        with_keys(
            QWEN3,
            **QWEN3_8B,
            max_position_embeddings=131072,
            rope_scaling={
                "attn_factor": 0.8782488562869419,
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "rope_type": "yarn",
            },
        ),
    ),
)
