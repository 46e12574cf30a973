"""A GGUF file's metadata gives the tokenizer that its model was trained with, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from graphllm.errors import CheckpointError
from graphllm.tokenizer.gguf_pre_tokenizers import PRE_TOKENIZERS
from graphllm.tokenizer.gguf_vocabulary import merges_from_scores, read_gguf_tokenizer
from tests.tokenizer.texts import TEXTS


def changed(fields: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The fields with some `tokenizer.ggml.*` values replaced; None removes one."""
    result = {**fields, **{f"tokenizer.ggml.{name}": value for name, value in changes.items()}}
    return {key: value for key, value in result.items() if value is not None}


def pieces(backend: Backend, text: str) -> list[str]:
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def ids(backend: Backend, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pre", ["gpt-2", "default"])
def test_gpt2_vocabulary_tokenizes_as_in_transformers(demo_fields: Mapping[str, Any], pre: str) -> None:
    from transformers import GPT2Tokenizer

    tokens = demo_fields["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in demo_fields["tokenizer.ggml.merges"]]
    theirs = GPT2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    ours = read_gguf_tokenizer(changed(demo_fields, pre=pre)).backend
    for text in TEXTS:
        assert ids(ours, text) == theirs(text)["input_ids"]


def test_qwen2_vocabulary_tokenizes_as_in_transformers(demo_fields: Mapping[str, Any]) -> None:
    from transformers import Qwen2Tokenizer

    tokens = demo_fields["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in demo_fields["tokenizer.ggml.merges"]]
    theirs = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    ours = read_gguf_tokenizer(changed(demo_fields, pre="qwen2")).backend
    for text in TEXTS:
        assert ids(ours, text) == theirs(text)["input_ids"]


def test_pre_tokenizers_split_as_their_models_do(demo_fields: Mapping[str, Any]) -> None:
    text = "I'LL pay 1234567 €\r\n\n  now"
    split = {
        pre: pieces(read_gguf_tokenizer(changed(demo_fields, pre=pre)).backend, text)
        for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2")
    }
    assert split["gpt-2"] == ["I", "'", "LL", "Ġpay", "Ġ1234567", "ĠâĤ¬", "čĊĊĠ", "Ġnow"]
    assert split["smollm"] == [
        *("I", "'", "LL", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "6", "7", "ĠâĤ¬", "čĊĊĠ", "Ġnow"),
    ]
    assert split["llama-bpe"] == ["I", "'LL", "Ġpay", "Ġ", "123", "456", "7", "ĠâĤ¬čĊĊ", "Ġ", "Ġnow"]
    assert split["qwen2"] == [
        *("I", "'LL", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "6", "7", "ĠâĤ¬čĊĊ", "Ġ", "Ġnow"),
    ]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        # Groups of three digits counted from the left, after GPT-2's own words and punctuation.
        ("falcon", "pay 1234567!? ok", ["pay", "Ġ", "123", "456", "7", "!?", "Ġok"]),
        ("tekken", "myCamelCase 123/\n", ["my", "Camel", "Case", "Ġ", "1", "2", "3", "/Ċ"]),
        ("gpt-4o", "myCamelCase's 1234/\n", ["my", "Camel", "Case's", "Ġ", "123", "4", "/Ċ"]),
        ("dbrx", "I'LL pay 1234", ["I", "'LL", "Ġpay", "Ġ", "123", "4"]),
        ("deepseek-v3", "a=b 你好x 1234;y", ["a", "=b", "Ġ", "ä½łå¥½", "x", "Ġ", "123", "4", ";y"]),
        ("deepseek-llm", "x=1 ჰა 23\n", ["x", "=", "1", "Ġ", "áĥ°áĥĲ", "Ġ", "2", "3", "Ċ"]),
        ("deepseek-coder", "x=1 ჰა 23\n", ["x", "=", "1", "Ġ", "áĥ°áĥĲ", "Ġ", "2", "3", "Ċ"]),
        ("command-r", "I pay 12", ["I", "Ġpay", "Ġ", "1", "2"]),
    ],
)
def test_pre_tokenizer_cuts_as_its_pattern_says(
    demo_fields: Mapping[str, Any], pre: str, text: str, expected: list[str]
) -> None:
    assert pieces(read_gguf_tokenizer(changed(demo_fields, pre=pre)).backend, text) == expected


def test_models_that_compose_characters_do_so_before_cutting(demo_fields: Mapping[str, Any]) -> None:
    composed = {
        pre
        for pre in PRE_TOKENIZERS
        if ids(backend := read_gguf_tokenizer(changed(demo_fields, pre=pre)).backend, "e\u0301")
        == ids(backend, "\u00e9")
    }
    assert composed == {"command-r", "deepseek-r1-qwen", "mpt", "olmo", "qwen2", "stablelm2"}


def test_llama3_takes_a_word_that_is_a_token_without_merging(demo_fields: Mapping[str, Any]) -> None:
    tokens = [*demo_fields["tokenizer.ggml.tokens"], "zqzq"]
    fields = changed(demo_fields, tokens=tokens, token_type=None)
    llama = read_gguf_tokenizer({**fields, "tokenizer.ggml.pre": "llama-bpe"}).backend
    gpt2 = read_gguf_tokenizer({**fields, "tokenizer.ggml.pre": "gpt-2"}).backend
    assert ids(llama, "zqzq") == [49_152]
    assert 49_152 not in ids(gpt2, "zqzq")


def test_beginning_token_is_added_when_the_file_says_so_or_the_family_does(
    demo_fields: Mapping[str, Any], sentencepiece_fields: Mapping[str, Any]
) -> None:
    def first_id(fields: Mapping[str, Any]) -> int:
        return int(read_gguf_tokenizer(fields).backend.encode("the").ids[0])

    silent = changed(demo_fields, add_bos_token=None)
    assert first_id(silent) != 1
    assert first_id(changed(silent, add_bos_token=True)) == 1
    assert first_id(changed(silent, pre="llama-bpe")) == 1
    assert first_id(changed(silent, pre="llama-bpe", add_bos_token=False)) != 1
    assert first_id(sentencepiece_fields) == 1
    assert first_id(changed(sentencepiece_fields, add_bos_token=False)) != 1
    both = changed(sentencepiece_fields, add_eos_token=True)
    assert read_gguf_tokenizer(both).backend.encode("the").ids[-1] == 2


def test_beginning_token_may_be_spelt_with_any_characters(demo_fields: Mapping[str, Any]) -> None:
    tokens = ["<a:b $A c>", *demo_fields["tokenizer.ggml.tokens"][1:]]
    backend = read_gguf_tokenizer(
        changed(demo_fields, tokens=tokens, bos_token_id=0, add_bos_token=True)
    ).backend
    assert backend.encode("the").ids == [0, *ids(backend, "the")]


def test_end_tokens_of_turns_and_messages_end_generation_too(demo_fields: Mapping[str, Any]) -> None:
    source = read_gguf_tokenizer(changed(demo_fields, eot_token_id=0, eom_token_id=3))
    assert source.eos_token_ids == {0, 2, 3}
    assert source.special_tokens["eos_token"] == "<|im_end|>"


def test_control_tokens_are_special_and_user_defined_ones_are_text(
    sentencepiece_fields: Mapping[str, Any],
) -> None:
    backend = read_gguf_tokenizer(sentencepiece_fields).backend
    think = len(sentencepiece_fields["tokenizer.ggml.tokens"]) - 1
    added = backend.get_added_tokens_decoder()
    assert {token_id: token.special for token_id, token in added.items()} == {
        0: True,
        1: True,
        2: True,
        think: False,
    }
    assert think in ids(backend, "so<think>they")
    assert backend.decode([1, think]) == "<think>"


def test_end_token_is_special_even_without_token_types(demo_fields: Mapping[str, Any]) -> None:
    backend = read_gguf_tokenizer(changed(demo_fields, token_type=None)).backend
    assert sorted(backend.get_added_tokens_decoder()) == [1, 2]


@pytest.mark.parametrize("add_space_prefix", [True, False])
def test_sentencepiece_tokenizes_as_in_transformers(
    sentencepiece_fields: Mapping[str, Any], add_space_prefix: bool
) -> None:
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    tokens = sentencepiece_fields["tokenizer.ggml.tokens"]
    scores = sentencepiece_fields["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    theirs = LlamaTokenizer(vocab=vocab, merges=merges, add_prefix_space=add_space_prefix)
    theirs.add_tokens(["<think>"])
    ours = read_gguf_tokenizer(changed(sentencepiece_fields, add_space_prefix=add_space_prefix)).backend
    special = ["<s>the fox</s> the dog<think> the", "the<unk>fox", " <s> the"]
    for text in [*TEXTS, *special]:
        token_ids = ids(ours, text)
        assert token_ids == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert ours.decode(token_ids, skip_special_tokens=skip) == theirs.decode(
                token_ids, skip_special_tokens=skip
            )


def test_recovered_merges_are_those_of_transformers(sentencepiece_fields: Mapping[str, Any]) -> None:
    from transformers.convert_slow_tokenizer import generate_merges

    tokens = sentencepiece_fields["tokenizer.ggml.tokens"]
    scores = [round(score / 7) for score in sentencepiece_fields["tokenizer.ggml.scores"]]  # with ties
    vocab = {token: i for i, token in enumerate(tokens)}
    expected = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    types = sentencepiece_fields["tokenizer.ggml.token_type"]
    assert merges_from_scores(vocab, scores, token_types=types) == expected
    assert len(expected) > 150


def sentencepiece_reference(fields: Mapping[str, Any], text: str, *, prefix: str = "▁") -> list[str]:
    """SentencePiece's own definition: join the neighbours of the highest score, leftmost first."""
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    symbols = list((prefix + text).replace(" ", "▁"))
    while True:
        pairs = [
            (-scores[left + right], position)
            for position, (left, right) in enumerate(pairwise(symbols))
            if left + right in scores
        ]
        if not pairs:
            break
        _, position = min(pairs)
        symbols[position : position + 2] = [symbols[position] + symbols[position + 1]]
    spelt = [[s] if s in scores else [f"<0x{byte:02X}>" for byte in s.encode()] for s in symbols]
    return [token for group in spelt for token in group]


@pytest.mark.parametrize(
    "text", ["the other dog", "thethere said, été où 你好 😀", "jumps  over\nnumbers 1000"]
)
def test_sentencepiece_follows_sentencepieces_definition(
    sentencepiece_fields: Mapping[str, Any], text: str
) -> None:
    backend = read_gguf_tokenizer(sentencepiece_fields).backend
    tokens = [backend.id_to_token(token_id) for token_id in ids(backend, text)]
    assert tokens == sentencepiece_reference(sentencepiece_fields, text)


def test_merges_in_a_sentencepiece_file_are_taken_as_they_are(
    sentencepiece_fields: Mapping[str, Any],
) -> None:
    fields = changed(sentencepiece_fields, merges=["h e"], scores=None)
    backend = read_gguf_tokenizer(fields).backend
    assert [backend.id_to_token(i) for i in ids(backend, "there")] == ["▁", "t", "he", "r", "e"]
    assert ids(backend, "there") != ids(read_gguf_tokenizer(sentencepiece_fields).backend, "there")


GEMMA_PIECES = ["  ", "   ", "\n", "\n\n", "\n\n\n", "\t", "<h1>"]


def gemma_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """With runs of blanks and line ends as user-defined pieces, spelt as they are, and no space before."""
    fields = changed(fields, add_space_prefix=False)
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], *GEMMA_PIECES]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], *[4] * len(GEMMA_PIECES)]
    scores = fields["tokenizer.ggml.scores"]
    fields["tokenizer.ggml.scores"] = [*scores, *[-1000.0] * len(GEMMA_PIECES)]
    return fields


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the  dog", ["the", "  ", "dog"]),
        ("the   dog", ["the", "   ", "dog"]),
        ("the     dog", ["the", "   ", "  ", "dog"]),
        (" the\n\n\n\nfox", ["▁the", "\n\n\n", "\n", "fox"]),
        ("\t<h1>the\t\tfox", ["\t", "<h1>", "the", "\t", "\t", "fox"]),
    ],
)
def test_runs_of_blanks_are_pieces_of_their_own_the_longest_first(
    sentencepiece_fields: Mapping[str, Any], text: str, expected: list[str]
) -> None:
    fields = gemma_fields(sentencepiece_fields)
    backend = read_gguf_tokenizer(fields).backend
    tokens = [backend.id_to_token(token_id) for token_id in ids(backend, text)]
    definition = [
        piece
        for part in re.split(r"( {2,3}|\n{1,3}|\t|<h1>)", text)
        for piece in ([part] if part in GEMMA_PIECES else sentencepiece_reference(fields, part, prefix=""))
    ]
    assert tokens == definition
    assert [token for token in tokens if token in GEMMA_PIECES] == [t for t in expected if t in GEMMA_PIECES]
    assert backend.decode(ids(backend, text)) == text


def test_phi3_markers_swallow_the_blanks_behind_them(sentencepiece_fields: Mapping[str, Any]) -> None:
    markers = ["<|user|>", "<|end|>", "<|endoftext|>"]
    fields = changed(sentencepiece_fields, add_space_prefix=False)
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], *markers]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], *[3] * len(markers)]
    fields["tokenizer.ggml.scores"] = [*fields["tokenizer.ggml.scores"], *[-1000.0] * len(markers)]

    def tokens(architecture: str, text: str) -> list[str]:
        backend = read_gguf_tokenizer({**fields, "general.architecture": architecture}).backend
        return [str(backend.id_to_token(token_id)) for token_id in ids(backend, text)]

    assert tokens("phi3", "<|user|>\nthe<|end|> \n") == ["<|user|>", *tokens("phi3", "the"), "<|end|>"]
    assert tokens("llama", "<|user|>\nthe")[1] == "<0x0A>"
    assert tokens("phi3", "<|endoftext|>\nthe")[1] == "<0x0A>"


def test_named_chat_templates_are_read(demo_fields: Mapping[str, Any]) -> None:
    source = read_gguf_tokenizer(
        {
            **demo_fields,
            "tokenizer.chat_template": "plain",
            "tokenizer.chat_templates": ["tool_use"],
            "tokenizer.chat_template.tool_use": "tools",
        }
    )
    assert source.chat_templates == {"default": "plain", "tool_use": "tools"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "viking"}, "tokenizer.ggml.pre is 'viking'"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": []}, "tokenizer.ggml.tokens"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "'a' twice"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["Ġt"]}, "'Ġt'"),
        ({"merges": ["Ġ zzzzzz"]}, "'Ġ zzzzzz'"),
        ({"token_type": [1, 2, 3]}, "token_type has 3 entries for 49152"),
        ({"eos_token_id": 49_152}, "eos_token_id is 49152"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
    ],
)
def test_damaged_or_unknown_metadata_is_refused_by_name(
    demo_fields: Mapping[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_gguf_tokenizer(changed(demo_fields, **changes))


def test_sentencepiece_models_that_lack_a_part_are_refused(sentencepiece_fields: Mapping[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="scores is missing"):
        read_gguf_tokenizer(changed(sentencepiece_fields, scores=None))
    tokens = [token.replace("<0x41>", "<0xAA>x") for token in sentencepiece_fields["tokenizer.ggml.tokens"]]
    with pytest.raises(CheckpointError, match="no token '<0x41>'"):
        read_gguf_tokenizer(changed(sentencepiece_fields, tokens=tokens))


def test_every_pre_tokenizer_builds(demo_fields: Mapping[str, Any]) -> None:
    for pre in PRE_TOKENIZERS:
        backend = read_gguf_tokenizer(changed(demo_fields, pre=pre)).backend
        assert backend.decode(ids(backend, "plain text 12")) == "plain text 12"
