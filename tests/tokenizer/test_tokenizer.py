"""Encoding is exact, bounded and honest about what it cannot do."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphllm.errors import ContextLengthError, InvalidRequestError
from graphllm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.texts import TEXTS

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(demo: Tokenizer, text: str) -> None:
    assert demo.decode(demo.encode(text)) == text


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_where_the_vocabulary_has_every_byte(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text
    assert b"".join(map(small.token_bytes, small.encode(text))) == text.encode()


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_text_survives_but_for_an_opening_space(sentencepiece: Tokenizer, text: str) -> None:
    assert sentencepiece.decode(sentencepiece.encode(text)) == text.removeprefix(" ")


def test_demo_tokens_are_those_of_the_goldens(demo: Tokenizer) -> None:
    answer = [504, 3575, 282, 4649, 314, 7042, 30, 2]
    assert demo.decode(answer, skip_special_tokens=False) == "The capital of France is Paris.<|im_end|>"
    assert demo.encode("The capital of France is Paris.<|im_end|>") == answer
    count = [33, 30, 216, 33, 198, 34, 30, 216, 34, 198, 35, 30, 216, 35]
    assert demo.encode("1. 1\n2. 2\n3. 3") == count


def test_demo_knows_its_special_tokens(demo: Tokenizer) -> None:
    assert (demo.vocab_size, demo.bos_token_id, demo.eos_token_ids) == (49_152, 1, {2})
    assert demo.special_token_ids == set(range(17))


def test_digits_of_every_script_are_tokens_of_their_own(demo: Tokenizer) -> None:
    for digits in ("12345", "٣٤٥", "४५६", "①②"):
        assert demo.encode(digits) == [i for digit in digits for i in demo.encode(digit)]
    # Without the Digits step the space would join the Arabic digit as it joins a letter.
    assert demo.encode(" ٣") == demo.encode(" ") + demo.encode("٣")


def test_special_tokens_in_text_are_special(demo: Tokenizer) -> None:
    assert demo.encode("<|im_start|>user") == [1, *demo.encode("user")]
    assert demo.decode([1, *demo.encode("user")]) == "user"


def test_building_the_demo_tokenizer_takes_well_below_a_second(demo_fields: Mapping[str, Any]) -> None:
    def seconds() -> float:
        start = time.process_time()
        Tokenizer.from_gguf(demo_fields)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 0.9


def test_lone_surrogate_is_the_users_mistake(demo: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=r"U\+D83D\) at character 2") as caught:
        demo.encode("ab\ud83d", param="input")
    assert caught.value.param == "input"
    with pytest.raises(InvalidRequestError, match="surrogate") as caught:
        demo.encode_chat([{"role": "user", "content": "\udfff"}])
    assert caught.value.param == "messages"


# A byte that the vocabulary lacks takes no token; the bound, which counts bytes, is for the others.
ENCODABLE = "ab \n1é<|im_end|>語🙂"


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet=ENCODABLE, max_size=200)
    | st.builds(
        lambda piece, count: piece * count, st.text(alphabet=ENCODABLE, max_size=4), st.integers(1, 400)
    ),
    max_tokens=st.integers(1, 60),
)
def test_encode_refuses_exactly_the_texts_above_max_tokens(
    demo: Tokenizer, text: str, max_tokens: int
) -> None:
    token_ids = demo.encode(text)
    if len(token_ids) <= max_tokens:
        assert demo.encode(text, max_tokens=max_tokens) == token_ids
    else:
        with pytest.raises(ContextLengthError):
            demo.encode(text, max_tokens=max_tokens)


def test_blanks_that_fit_in_few_tokens_are_accepted(demo: Tokenizer) -> None:
    token_ids = demo.encode(" " * 30_000)
    assert len(token_ids) < 500  # so that the probe of the first 4,000 characters must not refuse
    assert demo.encode(" " * 30_000, max_tokens=500) == token_ids


@pytest.mark.parametrize("piece", ["word ", "1", "你好"])
def test_hopeless_text_costs_little(demo: Tokenizer, piece: str) -> None:
    text = piece * (2_000_000 // len(piece))

    def seconds() -> float:
        start = time.process_time()
        with pytest.raises(ContextLengthError, match="context is 1024 tokens"):
            demo.encode(text, max_tokens=1024)
        return time.process_time() - start

    assert min(seconds() for _ in range(3)) < 0.2  # encoding it takes seconds


def test_length_error_names_the_field_and_the_count(demo: Tokenizer) -> None:
    with pytest.raises(ContextLengthError, match="has 5 tokens") as caught:
        demo.encode("a b c d e", max_tokens=4)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(ContextLengthError) as caught:
        demo.encode_chat(CHAT, max_tokens=10)
    assert caught.value.param == "messages"


def test_token_of_half_a_character_has_bytes_and_a_stand_in(small: Tokenizer) -> None:
    token_ids = small.encode("😀")
    assert [small.token_bytes(i) for i in token_ids] == [b"\xf0", b"\x9f", b"\x98", b"\x80"]
    assert small.token_text(token_ids[0]) == "\ufffd"
    assert small.token_text(small.encode(" the")[0]) == " the"


def test_special_token_is_spelt_for_logprobs(demo: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert (demo.token_text(2), demo.token_bytes(2)) == ("<|im_end|>", b"<|im_end|>")
    assert sentencepiece.token_text(1) == "<s>"
    assert sentencepiece.token_bytes(3 + 0xE4) == b"\xe4"


def test_beginning_token_is_added_to_prompts_but_not_to_chats(
    sentencepiece_fields: Mapping[str, Any],
) -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer = Tokenizer.from_gguf({**sentencepiece_fields, "tokenizer.chat_template": template})
    assert tokenizer.encode("the")[0] == 1
    assert 1 not in tokenizer.encode("the", add_special_tokens=False)
    chat = tokenizer.encode_chat([{"role": "user", "content": "the"}])
    assert chat == tokenizer.encode("<s>[the]", add_special_tokens=False)
    assert chat.count(1) == 1


def test_chat_is_rendered_and_encoded(demo: Tokenizer) -> None:
    text = demo.render_chat(CHAT)
    assert text.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert demo.encode_chat(CHAT) == demo.encode(text)
    assert demo.render_chat(CHAT, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_chat_without_a_template_is_refused(small: Tokenizer) -> None:
    assert small.chat_template is None
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        small.render_chat(CHAT)
    assert caught.value.param == "messages"


def test_client_cannot_override_what_the_server_passes_to_the_template(demo: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="messages") as caught:
        demo.render_chat(CHAT, **{"messages": []})
    assert caught.value.param == "chat_template_kwargs"


def test_importing_the_tokenizer_imports_neither_transformers_nor_torch() -> None:
    code = (
        "import sys, graphllm.tokenizer.detokenizer;"
        "print([m for m in ('transformers', 'torch', 'huggingface_hub', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
