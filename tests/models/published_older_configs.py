"""Published models with layer norms: GPT-2, OPT, GPT-NeoX, Falcon, Phi, StableLM and StarCoder2."""

from __future__ import annotations

from typing import Any

from tests.models.published_model import PublishedModel, shape, with_keys

GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
GPT2_MODELS = (
    PublishedModel("openai-community/gpt2", 124_439_808, GPT2),
    PublishedModel(
        "openai-community/gpt2-medium",
        354_823_168,
        with_keys(GPT2, n_embd=1024, n_head=16, n_layer=24, n_special=0, predict_special_tokens=True),
    ),
    PublishedModel(
        "openai-community/gpt2-large", 774_030_080, with_keys(GPT2, n_embd=1280, n_head=20, n_layer=36)
    ),
    PublishedModel(
        "openai-community/gpt2-xl",
        1_557_611_200,
        with_keys(GPT2, n_embd=1600, n_head=25, n_layer=48, output_past=True),
    ),
    PublishedModel(
        "distilbert/distilgpt2",
        81_912_576,
        with_keys(
            GPT2,
            _num_labels=1,
            id2label={"0": "LABEL_0"},
            label2id={"LABEL_0": 0},
            n_layer=6,
            use_cache=True,
        ),
    ),
)

OPT = {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 50272,
}


def opt(hidden_size: int, *, layers: int, heads: int, embedding_size: int | None = None) -> dict[str, Any]:
    return with_keys(
        OPT,
        ffn_dim=4 * hidden_size,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        word_embed_proj_dim=embedding_size or hidden_size,
    )


OPT_MODELS = (
    PublishedModel("facebook/opt-125m", 125_239_296, opt(768, layers=12, heads=12)),
    PublishedModel(
        "facebook/opt-350m",
        331_196_416,
        with_keys(opt(1024, layers=24, heads=16, embedding_size=512), do_layer_norm_before=False),
    ),
    PublishedModel("facebook/opt-1.3b", 1_315_758_080, opt(2048, layers=24, heads=32)),
    PublishedModel("facebook/opt-66b", 65_700_000_000, opt(9216, layers=64, heads=72)),
)

GPT_NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}


def gpt_neox(hidden_size: int, *, layers: int, heads: int, **keys: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
    }
    return with_keys(GPT_NEOX, **sizes, **keys)


GPT_NEOX_MODELS = (
    PublishedModel("EleutherAI/pythia-70m", 70_426_624, gpt_neox(512, layers=6, heads=8)),
    PublishedModel("EleutherAI/pythia-1b", 1_011_781_632, gpt_neox(2048, layers=16, heads=8)),
    PublishedModel(
        "EleutherAI/pythia-12b", 11_846_072_320, gpt_neox(5120, layers=36, heads=40, vocab_size=50688)
    ),
    PublishedModel(
        "EleutherAI/gpt-neox-20b",
        20_554_567_680,
        gpt_neox(
            6144,
            layers=44,
            heads=64,
            attention_probs_dropout_prob=0,
            hidden_act="gelu_fast",
            hidden_dropout_prob=0,
            vocab_size=50432,
        ),
    ),
    PublishedModel(
        "databricks/dolly-v2-3b",
        2_775_086_080,
        gpt_neox(
            2560,
            layers=32,
            heads=32,
            _name_or_path="EleutherAI/pythia-2.8b",
            custom_pipelines={
                "text-generation": {"impl": "instruct_pipeline.InstructionTextGenerationPipeline"}
            },
            gradient_checkpointing=False,
            torch_dtype="bfloat16",
            vocab_size=50280,
        ),
    ),
    PublishedModel(
        "togethercomputer/RedPajama-INCITE-Chat-3B-v1",
        2_775_864_320,
        gpt_neox(2560, layers=32, heads=32, rotary_pct=1.0, use_parallel_residual=False, vocab_size=50432),
    ),
)

FALCON = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 65024,
}
FALCON_MODELS = (
    PublishedModel(
        "tiiuae/falcon-7b",
        6_921_720_704,
        with_keys(
            FALCON,
            hidden_size=4544,
            new_decoder_architecture=False,
            num_attention_heads=71,
            num_hidden_layers=32,
            num_kv_heads=71,
        ),
    ),
    PublishedModel(
        "tiiuae/falcon-40b",
        41_303_293_952,
        with_keys(
            FALCON,
            hidden_size=8192,
            new_decoder_architecture=True,
            num_attention_heads=128,
            num_hidden_layers=60,
            num_kv_heads=8,
        ),
    ),
    PublishedModel(
        "tiiuae/falcon-11B",
        11_100_000_000,
        with_keys(
            FALCON,
            activation="gelu",
            ffn_hidden_size=16384,
            hidden_size=4096,
            max_position_embeddings=8192,
            new_decoder_architecture=True,
            num_attention_heads=32,
            num_hidden_layers=60,
            num_kv_heads=8,
            num_ln_in_parallel_attn=1,
            rope_scaling=None,
            rope_theta=500042.0,
            tie_word_embeddings=False,
        ),
    ),
    PublishedModel(
        "tiiuae/falcon-rw-1b",
        1_311_625_216,
        with_keys(
            FALCON,
            alibi=True,
            bias=True,
            bos_token_id=1,
            eos_token_id=2,
            hidden_size=2048,
            multi_query=False,
            new_decoder_architecture=False,
            num_attention_heads=32,
            num_hidden_layers=24,
            parallel_attn=False,
            vocab_size=50304,
        ),
    ),
)

RW = with_keys(
    FALCON,
    architectures=["RWForCausalLM"],
    auto_map={
        "AutoConfig": "configuration_RW.RWConfig",
        "AutoModelForCausalLM": "modelling_RW.RWForCausalLM",
    },
    initializer_range=0.02,
    model_type="RefinedWebModel",
)
# What transformers has no class for, so they stand in no other table.
FIRST_FALCON_MODELS = (
    PublishedModel(
        "tiiuae/falcon-7b",
        6_921_720_704,
        with_keys(RW, hidden_size=4544, n_head=71, n_layer=32),
    ),
    PublishedModel(
        "tiiuae/falcon-40b",
        41_303_293_952,
        with_keys(
            {key: value for key, value in RW.items() if key != "multi_query"},
            hidden_size=8192,
            model_type="RefinedWeb",
            n_head=128,
            n_head_kv=8,
            n_layer=60,
        ),
    ),
)

PHI = {
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
    "resid_pdrop": 0.0,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 51200,
}
PHI_1 = shape(2048, 8192, layers=24, heads=32, key_heads=32)
PHI_MODELS = (
    PublishedModel(
        "microsoft/phi-1, an earlier version",
        1_418_270_720,
        with_keys(PHI, **PHI_1, attention_bias=False, rotary_dim=32, torch_dtype="float32"),
    ),
    PublishedModel("microsoft/phi-1_5", 1_418_270_720, with_keys(PHI, **PHI_1)),
    PublishedModel(
        "microsoft/phi-2",
        2_779_683_840,
        with_keys(
            PHI,
            **shape(2560, 10240, layers=32, heads=32, key_heads=32),
            partial_rotary_factor=0.4,
            resid_pdrop=0.1,
        ),
    ),
)

STABLELM = {
    "architectures": ["StableLmForCausalLM"],
    "bos_token_id": 100257,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 4096,
    "model_type": "stablelm",
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "use_qkv_bias": True,
    "vocab_size": 100352,
}
STABLELM_MODELS = (
    PublishedModel(
        "stabilityai/stablelm-3b-4e1t",
        2_795_443_200,
        with_keys(
            STABLELM,
            **shape(2560, 6912, layers=32, heads=32, key_heads=32),
            bos_token_id=0,
            eos_token_id=0,
            use_qkv_bias=False,
            vocab_size=50304,
        ),
    ),
    PublishedModel(
        "stabilityai/stablelm-2-1_6b",
        1_644_515_328,
        with_keys(STABLELM, **shape(2048, 5632, layers=24, heads=32, key_heads=32)),
    ),
    PublishedModel(
        "stabilityai/stablelm-2-12b",
        12_100_000_000,
        with_keys(
            STABLELM,
            **shape(5120, 13824, layers=40, heads=32, key_heads=8),
            attention_dropout=0.0,
            hidden_dropout=0.0,
            qk_layernorm=True,
            rope_scaling=None,
            use_parallel_residual=True,
            use_qkv_bias=False,
        ),
    ),
)

STARCODER2 = {
    "architectures": ["Starcoder2ForCausalLM"],
    "attention_dropout": 0.1,
    "attention_softmax_in_fp32": True,
    "bos_token_id": 0,
    "embedding_dropout": 0.1,
    "eos_token_id": 0,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 16384,
    "mlp_type": "default",
    "model_type": "starcoder2",
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "residual_dropout": 0.1,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "use_bias": True,
    "use_cache": True,
    "vocab_size": 49152,
}
STARCODER2_MODELS = (
    PublishedModel(
        "bigcode/starcoder2-3b",
        3_030_371_328,
        with_keys(
            STARCODER2, **shape(3072, 12288, layers=30, heads=24, key_heads=2), rope_theta=999999.4420358813
        ),
    ),
    PublishedModel(
        "bigcode/starcoder2-7b",
        7_173_923_840,
        with_keys(
            STARCODER2,
            **shape(4608, 18432, layers=32, heads=36, key_heads=4),
            activation_function="gelu",
            rope_theta=1000000,
        ),
    ),
    PublishedModel(
        "bigcode/starcoder2-15b",
        15_957_889_024,
        with_keys(
            STARCODER2,
            **shape(6144, 24576, layers=40, heads=48, key_heads=4),
            rope_theta=100000,
            tie_word_embeddings=False,
        ),
    ),
)
