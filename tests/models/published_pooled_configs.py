"""Published models for vectors, scores and labels: encoders, and decoders whose head is gone."""

from __future__ import annotations

from typing import Any

from tests.models.published_gemma_configs import GEMMA, GEMMA_2, GEMMA_3_270M
from tests.models.published_llama_configs import (
    LLAMA_MODELS,
    MISTRAL,
    MISTRAL_7B,
    QWEN2,
    QWEN2_7B,
    QWEN3,
)
from tests.models.published_model import PublishedModel, alternating, shape, with_keys

ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def encoder(hidden_size: int, *, layers: int, heads: int) -> dict[str, int]:
    """The four keys that all encoders have."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "torch_dtype": "float32",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
BERT_MODELS = (
    PublishedModel(
        "BAAI/bge-base-en-v1.5",
        109_482_240,
        with_keys(BERT, **encoder(768, layers=12, heads=12), **ONE_LABEL),
    ),
    PublishedModel(
        "sentence-transformers/all-MiniLM-L6-v2",
        22_713_216,
        with_keys(BERT, **encoder(384, layers=6, heads=12), _name_or_path="nreimers/MiniLM-L6-H384-uncased"),
    ),
    PublishedModel(
        "google-bert/bert-base-multilingual-cased",
        177_853_440,
        with_keys(
            BERT,
            **encoder(768, layers=12, heads=12),
            architectures=["BertForMaskedLM"],
            directionality="bidi",
            pooler_fc_size=768,
            pooler_num_attention_heads=12,
            pooler_num_fc_layers=3,
            pooler_size_per_head=128,
            pooler_type="first_token_transform",
            vocab_size=119547,
        ),
    ),
    PublishedModel(
        "cross-encoder/ms-marco-MiniLM-L6-v2",
        22_713_601,
        with_keys(
            BERT,
            **encoder(384, layers=6, heads=12),
            **ONE_LABEL,
            architectures=["BertForSequenceClassification"],
            sentence_transformers={
                "activation_fn": "torch.nn.modules.linear.Identity",
                "version": "4.0.1",
            },
        ),
    ),
)

ROBERTA = with_keys(
    BERT,
    architectures=["RobertaForMaskedLM"],
    bos_token_id=0,
    eos_token_id=2,
    layer_norm_eps=1e-05,
    max_position_embeddings=514,
    model_type="roberta",
    pad_token_id=1,
    type_vocab_size=1,
    vocab_size=50265,
)
XLM_ROBERTA = with_keys(
    ROBERTA,
    architectures=["XLMRobertaModel"],
    model_type="xlm-roberta",
    output_past=True,
    vocab_size=250002,
)
ROBERTA_BASE = encoder(768, layers=12, heads=12)
ROBERTA_LARGE = encoder(1024, layers=24, heads=16)
ROBERTA_MODELS = (
    PublishedModel("FacebookAI/roberta-base", 124_645_632, with_keys(ROBERTA, **ROBERTA_BASE)),
    PublishedModel(
        "princeton-nlp/sup-simcse-roberta-large",
        355_359_744,
        with_keys(ROBERTA, **ROBERTA_LARGE, architectures=["RobertaModel"]),
    ),
    PublishedModel(
        "cross-encoder/stsb-roberta-base",
        124_646_401,
        with_keys(ROBERTA, **ROBERTA_BASE, **ONE_LABEL, architectures=["RobertaForSequenceClassification"]),
    ),
    PublishedModel(
        "FacebookAI/xlm-roberta-base",
        278_043_648,
        with_keys(XLM_ROBERTA, **ROBERTA_BASE, architectures=["XLMRobertaForMaskedLM"]),
    ),
    PublishedModel(
        "intfloat/multilingual-e5-large",
        559_890_432,
        with_keys(XLM_ROBERTA, **ROBERTA_LARGE),
    ),
    PublishedModel(
        "BAAI/bge-m3",
        567_754_752,
        with_keys(XLM_ROBERTA, **ROBERTA_LARGE, max_position_embeddings=8194),
    ),
    PublishedModel(
        "BAAI/bge-reranker-v2-m3",
        567_755_777,
        with_keys(
            XLM_ROBERTA,
            **ROBERTA_LARGE,
            **ONE_LABEL,
            architectures=["XLMRobertaForSequenceClassification"],
            max_position_embeddings=8194,
        ),
    ),
)

(LLAMA_31_8B,) = (model for model in LLAMA_MODELS if model.name == "meta-llama/Llama-3.1-8B-Instruct")
EMBEDDING_GEMMA = with_keys(
    GEMMA_3_270M,
    **shape(768, 1152, layers=24, heads=3, key_heads=1),
    architectures=["Gemma3TextModel"],
    eos_token_id=1,
    layer_types=alternating(24, every=6),
    max_position_embeddings=2048,
    use_bidirectional_attention=True,
)
QWEN3_06B = shape(1024, 3072, layers=28, heads=16, key_heads=8)
DECODERS_WITHOUT_HEAD = (
    PublishedModel("google/embeddinggemma-300m", 302_863_104, EMBEDDING_GEMMA),
    PublishedModel(
        "intfloat/e5-mistral-7b-instruct",
        7_110_660_096,
        with_keys(
            MISTRAL,
            **MISTRAL_7B,
            architectures=["MistralModel"],
            pad_token_id=2,
            rope_theta=10000.0,
            sliding_window=4096,
            torch_dtype="float16",
            use_cache=False,
        ),
    ),
    PublishedModel(
        "BAAI/bge-multilingual-gemma2",
        9_241_705_984,
        with_keys(
            GEMMA_2,
            **shape(3584, 14336, layers=42, heads=16, key_heads=8),
            architectures=["Gemma2Model"],
            sliding_window_size=4096,
            torch_dtype="float32",
        ),
    ),
    PublishedModel(
        "ssmits/Qwen2-7B-Instruct-embed-base",
        7_070_619_136,
        with_keys(QWEN2, **QWEN2_7B, architectures=["Qwen2Model"]),
    ),
    PublishedModel(
        "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2",
        7_504_928_768,
        LLAMA_31_8B.config | ONE_LABEL | {"architectures": ["LlamaForSequenceClassification"]},
    ),
    PublishedModel(
        "weqweasdas/RM-Mistral-7B",
        7_110_664_192,
        with_keys(
            MISTRAL,
            **MISTRAL_7B,
            **ONE_LABEL,
            architectures=["MistralForSequenceClassification"],
            pad_token_id=32000,
        ),
    ),
    PublishedModel(
        "weqweasdas/RM-Gemma-2B",
        2_506_174_464,
        with_keys(
            GEMMA,
            **shape(2048, 16384, layers=18, heads=8, key_heads=1),
            **ONE_LABEL,
            architectures=["GemmaForSequenceClassification"],
        ),
    ),
    PublishedModel(
        "Skywork/Skywork-Reward-Gemma-2-27B-v0.2",
        27_227_132_928,
        with_keys(
            GEMMA_2,
            **shape(4608, 36864, layers=46, heads=32, key_heads=16),
            **ONE_LABEL,
            architectures=["Gemma2ForSequenceClassification"],
            head_dim=128,
            query_pre_attn_scalar=144,
            sliding_window_size=4096,
        ),
    ),
    PublishedModel(
        "jason9693/Qwen2.5-1.5B-apeach",
        1_543_717_376,
        with_keys(
            QWEN2,
            **shape(1536, 8960, layers=28, heads=12, key_heads=2),
            architectures=["Qwen2ForSequenceClassification"],
            sliding_window=None,
            tie_word_embeddings=True,
            vocab_size=151936,
        ),
    ),
    PublishedModel(
        "tomaarsen/Qwen3-Reranker-0.6B-seq-cls",
        595_777_536,
        with_keys(
            QWEN3,
            **QWEN3_06B,
            **ONE_LABEL,
            architectures=["Qwen3ForSequenceClassification"],
            tie_word_embeddings=True,
            vocab_size=151669,
        ),
    ),
)
