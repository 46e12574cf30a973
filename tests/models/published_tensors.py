"""The tensors of published checkpoints, names and shapes, buffers and left-overs among them.

Facts, as the files' headers and indices have them. `{}` stands for a layer's number, and for an expert's
behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PublishedTensors:
    """Of the model of this name in `published_configs.py`: what there is once, and what in each of `layers`.

    layers: their numbers, None for all of the configuration's. num_experts: for names with two numbers.
    """

    name: str
    once: Shapes
    in_layers: Shapes
    num_experts: int = 0
    first_layers: Shapes | None = None
    num_first_layers: int = 0
    behind_the_last: Shapes | None = None

    def shapes(self, num_layers: int) -> Shapes:
        """All of them, by full name."""
        shapes = dict(self.once)
        for layer in range(num_layers):
            is_first = layer < self.num_first_layers
            of_layer = self.first_layers if is_first and self.first_layers else self.in_layers
            shapes |= self._numbered(of_layer, layer)
        return shapes | self._numbered(self.behind_the_last or {}, num_layers)

    def _numbered(self, of_layer: Shapes, layer: int) -> Shapes:
        return {
            name.format(layer, expert): shape
            for name, shape in of_layer.items()
            for expert in (range(self.num_experts) if name.count("{}") == 2 else (0,))
        }


def ends(vocab_size: int, hidden_size: int, *, has_head: bool = True) -> Shapes:
    """What most models have once."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocab_size, hidden_size),
        "model.norm.weight": (hidden_size,),
    }
    return shapes | {"lm_head.weight": (vocab_size, hidden_size)} if has_head else shapes


def attention(hidden_size: int, query_size: int, key_size: int) -> Shapes:
    """The four projections of most models, without biases."""
    return {
        "model.layers.{}.self_attn.q_proj.weight": (query_size, hidden_size),
        "model.layers.{}.self_attn.k_proj.weight": (key_size, hidden_size),
        "model.layers.{}.self_attn.v_proj.weight": (key_size, hidden_size),
        "model.layers.{}.self_attn.o_proj.weight": (hidden_size, query_size),
    }


def biases(*, query_size: int, key_size: int) -> Shapes:
    """Of queries, keys and values."""
    return {
        "model.layers.{}.self_attn.q_proj.bias": (query_size,),
        "model.layers.{}.self_attn.k_proj.bias": (key_size,),
        "model.layers.{}.self_attn.v_proj.bias": (key_size,),
    }


def feed_forward(hidden_size: int, inner_size: int, *, within: str = "model.layers.{}.mlp") -> Shapes:
    """The three projections of most models, and of most experts."""
    return {
        f"{within}.gate_proj.weight": (inner_size, hidden_size),
        f"{within}.up_proj.weight": (inner_size, hidden_size),
        f"{within}.down_proj.weight": (hidden_size, inner_size),
    }


def norms(hidden_size: int, *names: str) -> Shapes:
    """Weights of norms inside a layer; by default the two that most models have."""
    return {
        f"model.layers.{{}}.{name}.weight": (hidden_size,)
        for name in names or ("input_layernorm", "post_attention_layernorm")
    }


def layer_norms(size: int, *names: str) -> Shapes:
    """Weights and biases of norms, by full name."""
    return {f"{name}.{part}": (size,) for name in names for part in ("weight", "bias")}


def linear(name: str, out_features: int, in_features: int) -> Shapes:
    """A projection with a bias."""
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
EXPERT = "model.layers.{}.mlp.experts.{}"
SHARED = "model.layers.{}.mlp.shared_experts"
GLM_EXPERTS = (
    attention(4096, 12288, 1024)
    | biases(query_size=12288, key_size=1024)
    | norms(4096)
    | feed_forward(4096, 1408, within=EXPERT)
    | feed_forward(4096, 1408, within=SHARED)
    | {
        "model.layers.{}.mlp.gate.weight": (128, 4096),
        "model.layers.{}.mlp.gate.e_score_correction_bias": (128,),
    }
)
DEEPSEEK_ATTENTION: Shapes = {
    "model.layers.{}.self_attn.q_proj.weight": (3072, 2048),
    "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight": (576, 2048),
    "model.layers.{}.self_attn.kv_a_layernorm.weight": (512,),
    "model.layers.{}.self_attn.kv_b_proj.weight": (4096, 512),
    "model.layers.{}.self_attn.o_proj.weight": (2048, 2048),
}

PUBLISHED_TENSORS = (
    PublishedTensors(
        "meta-llama/Llama-2-7b-hf",
        ends(32000, 4096),
        attention(4096, 4096, 4096)
        | feed_forward(4096, 11008)
        | norms(4096)
        | {"model.layers.{}.self_attn.rotary_emb.inv_freq": (64,)},
    ),
    PublishedTensors(
        "Qwen/Qwen3-0.6B",  # the head is tied, and stored all the same
        ends(151936, 1024),
        attention(1024, 2048, 1024)
        | feed_forward(1024, 3072)
        | norms(1024)
        | norms(128, "self_attn.q_norm", "self_attn.k_norm"),
    ),
    PublishedTensors(
        "Qwen/Qwen2.5-7B",
        ends(152064, 3584),
        attention(3584, 3584, 512)
        | biases(query_size=3584, key_size=512)
        | feed_forward(3584, 18944)
        | norms(3584),
    ),
    PublishedTensors(
        "google/gemma-2-2b-it",
        ends(256000, 2304, has_head=False),
        attention(2304, 2048, 1024) | feed_forward(2304, 9216) | norms(2304, *FOUR_NORMS),
    ),
    PublishedTensors(
        "google/gemma-3-1b-it",
        ends(262144, 1152, has_head=False),
        attention(1152, 1024, 256)
        | feed_forward(1152, 6912)
        | norms(1152, *FOUR_NORMS)
        | norms(256, "self_attn.q_norm", "self_attn.k_norm"),
    ),
    PublishedTensors(
        "microsoft/Phi-3-mini-4k-instruct",
        ends(32064, 3072),
        norms(3072)
        | {
            "model.layers.{}.self_attn.qkv_proj.weight": (9216, 3072),
            "model.layers.{}.self_attn.o_proj.weight": (3072, 3072),
            "model.layers.{}.mlp.gate_up_proj.weight": (16384, 3072),
            "model.layers.{}.mlp.down_proj.weight": (3072, 8192),
        },
    ),
    PublishedTensors(
        "microsoft/phi-2",
        {"model.embed_tokens.weight": (51200, 2560)}
        | layer_norms(2560, "model.final_layernorm")
        | linear("lm_head", 51200, 2560),
        {
            name: shape
            for projection in ("q_proj", "k_proj", "v_proj", "dense")
            for name, shape in linear(f"model.layers.{{}}.self_attn.{projection}", 2560, 2560).items()
        }
        | linear("model.layers.{}.mlp.fc1", 10240, 2560)
        | linear("model.layers.{}.mlp.fc2", 2560, 10240)
        | layer_norms(2560, "model.layers.{}.input_layernorm"),
    ),
    PublishedTensors(
        "allenai/OLMo-2-0425-1B",
        ends(100352, 2048),
        attention(2048, 2048, 2048)
        | feed_forward(2048, 8192)
        | norms(2048, "post_attention_layernorm", "post_feedforward_layernorm")
        | norms(2048, "self_attn.q_norm", "self_attn.k_norm"),
    ),
    PublishedTensors(
        "CohereForAI/c4ai-command-r-plus",
        ends(256000, 12288, has_head=False),
        attention(12288, 12288, 1024)
        | feed_forward(12288, 33792)
        | norms(12288, "input_layernorm")
        | {
            "model.layers.{}.self_attn.q_norm.weight": (96, 128),
            "model.layers.{}.self_attn.k_norm.weight": (8, 128),
        },
    ),
    PublishedTensors(
        "THUDM/GLM-4-9B-0414",
        ends(151552, 4096),
        attention(4096, 4096, 256)
        | norms(4096)
        | norms(4096, "post_self_attn_layernorm", "post_mlp_layernorm")
        | {
            "model.layers.{}.mlp.gate_up_proj.weight": (27392, 4096),
            "model.layers.{}.mlp.down_proj.weight": (4096, 13696),
        },
    ),
    PublishedTensors(
        "openai-community/gpt2",  # no name begins with the model's own
        {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)} | layer_norms(768, "ln_f"),
        layer_norms(768, "h.{}.ln_1", "h.{}.ln_2")
        | {
            "h.{}.attn.bias": (1, 1, 1024, 1024),
            "h.{}.attn.c_attn.weight": (768, 2304),
            "h.{}.attn.c_attn.bias": (2304,),
            "h.{}.attn.c_proj.weight": (768, 768),
            "h.{}.attn.c_proj.bias": (768,),
            "h.{}.mlp.c_fc.weight": (768, 3072),
            "h.{}.mlp.c_fc.bias": (3072,),
            "h.{}.mlp.c_proj.weight": (3072, 768),
            "h.{}.mlp.c_proj.bias": (768,),
        },
    ),
    PublishedTensors(
        "facebook/opt-350m",
        {
            "model.decoder.embed_tokens.weight": (50272, 512),
            "model.decoder.embed_positions.weight": (2050, 1024),
            "model.decoder.project_in.weight": (1024, 512),
            "model.decoder.project_out.weight": (512, 1024),
            "lm_head.weight": (50272, 512),
        },
        {
            name: shape
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj")
            for name, shape in linear(f"model.decoder.layers.{{}}.self_attn.{projection}", 1024, 1024).items()
        }
        | linear("model.decoder.layers.{}.fc1", 4096, 1024)
        | linear("model.decoder.layers.{}.fc2", 1024, 4096)
        | layer_norms(
            1024,
            "model.decoder.layers.{}.self_attn_layer_norm",
            "model.decoder.layers.{}.final_layer_norm",
        ),
    ),
    PublishedTensors(
        "EleutherAI/pythia-70m",
        {"gpt_neox.embed_in.weight": (50304, 512), "embed_out.weight": (50304, 512)}
        | layer_norms(512, "gpt_neox.final_layer_norm"),
        linear("gpt_neox.layers.{}.attention.query_key_value", 1536, 512)
        | linear("gpt_neox.layers.{}.attention.dense", 512, 512)
        | linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", 2048, 512)
        | linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", 512, 2048)
        | layer_norms(
            512, "gpt_neox.layers.{}.input_layernorm", "gpt_neox.layers.{}.post_attention_layernorm"
        )
        | {
            "gpt_neox.layers.{}.attention.bias": (1, 1, 2048, 2048),
            "gpt_neox.layers.{}.attention.masked_bias": (),
            "gpt_neox.layers.{}.attention.rotary_emb.inv_freq": (8,),
        },
    ),
    PublishedTensors(
        "tiiuae/falcon-7b",
        {"transformer.word_embeddings.weight": (65024, 4544), "lm_head.weight": (65024, 4544)}
        | layer_norms(4544, "transformer.ln_f"),
        layer_norms(4544, "transformer.h.{}.input_layernorm")
        | {
            "transformer.h.{}.self_attention.query_key_value.weight": (4672, 4544),
            "transformer.h.{}.self_attention.dense.weight": (4544, 4544),
            "transformer.h.{}.mlp.dense_h_to_4h.weight": (18176, 4544),
            "transformer.h.{}.mlp.dense_4h_to_h.weight": (4544, 18176),
        },
    ),
    PublishedTensors(
        "tiiuae/falcon-40b",
        {"transformer.word_embeddings.weight": (65024, 8192), "lm_head.weight": (65024, 8192)}
        | layer_norms(8192, "transformer.ln_f"),
        layer_norms(8192, "transformer.h.{}.ln_attn", "transformer.h.{}.ln_mlp")
        | {
            "transformer.h.{}.self_attention.query_key_value.weight": (9216, 8192),
            "transformer.h.{}.self_attention.dense.weight": (8192, 8192),
            "transformer.h.{}.mlp.dense_h_to_4h.weight": (32768, 8192),
            "transformer.h.{}.mlp.dense_4h_to_h.weight": (8192, 32768),
        },
    ),
    PublishedTensors(
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        ends(32000, 4096),
        attention(4096, 4096, 1024)
        | norms(4096)
        | {
            "model.layers.{}.block_sparse_moe.gate.weight": (8, 4096),
            "model.layers.{}.block_sparse_moe.experts.{}.w1.weight": (14336, 4096),
            "model.layers.{}.block_sparse_moe.experts.{}.w2.weight": (4096, 14336),
            "model.layers.{}.block_sparse_moe.experts.{}.w3.weight": (14336, 4096),
        },
        num_experts=8,
    ),
    PublishedTensors(
        "Qwen/Qwen1.5-MoE-A2.7B-Chat",
        ends(151936, 2048),
        attention(2048, 2048, 2048)
        | biases(query_size=2048, key_size=2048)
        | norms(2048)
        | feed_forward(2048, 1408, within=EXPERT)
        | feed_forward(2048, 5632, within="model.layers.{}.mlp.shared_expert")
        | {
            "model.layers.{}.mlp.gate.weight": (60, 2048),
            "model.layers.{}.mlp.shared_expert_gate.weight": (1, 2048),
        },
        num_experts=60,
    ),
    PublishedTensors(
        "ibm-granite/granite-3.1-1b-a400m-instruct",
        ends(49155, 1024, has_head=False),
        attention(1024, 1024, 512)
        | norms(1024)
        | {
            "model.layers.{}.block_sparse_moe.input_linear.weight": (32, 1024, 1024),
            "model.layers.{}.block_sparse_moe.output_linear.weight": (32, 1024, 512),
            "model.layers.{}.block_sparse_moe.router.layer.weight": (32, 1024),
        },
    ),
    PublishedTensors(
        "zai-org/GLM-4.5-Air",
        ends(151552, 4096),
        GLM_EXPERTS,
        num_experts=128,
        first_layers=attention(4096, 12288, 1024)
        | biases(query_size=12288, key_size=1024)
        | norms(4096)
        | feed_forward(4096, 10944),
        num_first_layers=1,
        behind_the_last=GLM_EXPERTS
        | norms(4096, "enorm", "hnorm", "shared_head.norm")
        | {
            "model.layers.{}.eh_proj.weight": (4096, 8192),
            "model.layers.{}.embed_tokens.weight": (151552, 4096),
            "model.layers.{}.shared_head.head.weight": (151552, 4096),
        },
    ),
    PublishedTensors(
        "openai/gpt-oss-20b",
        ends(201088, 2880),
        attention(2880, 4096, 512)
        | biases(query_size=4096, key_size=512)
        | norms(2880)
        | {
            "model.layers.{}.self_attn.o_proj.bias": (2880,),
            "model.layers.{}.self_attn.sinks": (64,),
            "model.layers.{}.mlp.router.weight": (32, 2880),
            "model.layers.{}.mlp.router.bias": (32,),
            "model.layers.{}.mlp.experts.gate_up_proj_blocks": (32, 5760, 90, 16),
            "model.layers.{}.mlp.experts.gate_up_proj_scales": (32, 5760, 90),
            "model.layers.{}.mlp.experts.gate_up_proj_bias": (32, 5760),
            "model.layers.{}.mlp.experts.down_proj_blocks": (32, 2880, 90, 16),
            "model.layers.{}.mlp.experts.down_proj_scales": (32, 2880, 90),
            "model.layers.{}.mlp.experts.down_proj_bias": (32, 2880),
        },
    ),
    PublishedTensors(
        "deepseek-ai/DeepSeek-V2-Lite",
        ends(102400, 2048),
        DEEPSEEK_ATTENTION
        | norms(2048)
        | feed_forward(2048, 1408, within=EXPERT)
        | feed_forward(2048, 2816, within=SHARED)
        | {"model.layers.{}.mlp.gate.weight": (64, 2048)},
        num_experts=64,
        first_layers=DEEPSEEK_ATTENTION | norms(2048) | feed_forward(2048, 10944),
        num_first_layers=1,
    ),
)
