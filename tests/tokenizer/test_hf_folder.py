"""A folder's tokenizer files are read as transformers reads them, and broken ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, processors

from graphllm.errors import CheckpointError
from graphllm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.texts import TEXTS

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def folder(tmp_path: Path, small_backend: Backend) -> Path:
    small_backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def token_id(backend: Backend, text: str) -> int:
    found = backend.token_to_id(text)
    assert found is not None
    return found


def test_folder_tokenizes_as_in_transformers(tmp_path: Path, small_backend: Backend) -> None:
    from transformers import PreTrainedTokenizerFast

    bos = token_id(small_backend, "<s>")
    small_backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    saved = PreTrainedTokenizerFast(
        tokenizer_object=small_backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    saved.save_pretrained(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, {theirs.eos_token_id})
    for text in [*TEXTS, "<s>the</s> fox<|im_end|>"]:
        token_ids = ours.encode(text)
        assert token_ids == theirs(text)["input_ids"]
        assert token_ids[0] == bos
        assert ours.encode(text, add_special_tokens=False) == token_ids[1:]
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert ours.render_chat(USER) == theirs.apply_chat_template(USER, tokenize=False) == "<s>hi</s>"


def test_tokenizer_json_alone_is_enough(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.chat_template) == (None, set(), None)
    assert len(tokenizer.special_token_ids) == 3


def test_missing_tokenizer_json_is_named_with_a_hint_for_sentencepiece(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "tokenizer.model" not in caught.value.message
    write(tmp_path, "tokenizer.model", "")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model alone is not enough"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.json",
    ],
)
@pytest.mark.parametrize("content", ['{"a": ', "[]", "\ud800", "[" * 100_000, ""])
def test_corrupt_json_is_refused_by_file_name(folder: Path, name: str, content: str) -> None:
    (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.from_folder(folder)


def test_end_tokens_come_from_generation_config_and_the_tokenizer(
    folder: Path, small_backend: Backend
) -> None:
    end, turn = token_id(small_backend, "</s>"), token_id(small_backend, "<|im_end|>")
    write(folder, "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>", "lstrip": False}})
    assert Tokenizer.from_folder(folder).eos_token_ids == {turn}
    write(folder, "config.json", {"eos_token_id": 7})
    assert Tokenizer.from_folder(folder).eos_token_ids == {turn, 7}
    write(folder, "generation_config.json", {"eos_token_id": [end, 5]})
    assert Tokenizer.from_folder(folder).eos_token_ids == {turn, end, 5}
    write(folder, "generation_config.json", {"eos_token_id": end})
    assert Tokenizer.from_folder(folder).eos_token_ids == {turn, end}
    write(folder, "generation_config.json", {"eos_token_id": ["</s>"]})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        Tokenizer.from_folder(folder)


def test_special_tokens_map_fills_what_the_config_leaves_out(folder: Path, small_backend: Backend) -> None:
    write(
        folder,
        "tokenizer_config.json",
        {"bos_token": None, "chat_template": "{{ bos_token }}{{ eos_token }}"},
    )
    write(folder, "special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.bos_token_id == token_id(small_backend, "<s>")
    assert tokenizer.eos_token_ids == {token_id(small_backend, "</s>")}
    assert tokenizer.render_chat(USER) == "<s></s>"


def test_named_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": "<nowhere>"})
    with pytest.raises(CheckpointError, match="eos_token is '<nowhere>'"):
        Tokenizer.from_folder(folder)


def test_tokens_that_only_the_config_lists_are_added(folder: Path, small_backend: Backend) -> None:
    size = small_backend.get_vocab_size()
    tokens = {
        str(size + 1): {"content": "<b>", "special": False},
        str(size): {"content": "<a>", "special": True},
    }
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": tokens})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<a><b>") == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<b>"
    assert tokenizer.vocab_size == size + 2
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": {"9999": {"content": "<c>"}}})
    with pytest.raises(CheckpointError, match="'<c>' the id 9999"):
        Tokenizer.from_folder(folder)


def test_token_named_as_special_is_special(folder: Path, small_backend: Backend) -> None:
    the = token_id(small_backend, "the")
    write(folder, "tokenizer_config.json", {"additional_special_tokens": ["the", "not in the vocabulary"]})
    tokenizer = Tokenizer.from_folder(folder)
    assert the in tokenizer.special_token_ids
    assert tokenizer.decode([the]) == ""
    assert tokenizer.vocab_size == small_backend.get_vocab_size()


def test_truncation_and_padding_left_by_training_are_ignored(tmp_path: Path, small_backend: Backend) -> None:
    small_backend.enable_truncation(4)
    small_backend.enable_padding(length=64)
    small_backend.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox jumps over the lazy dog"
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_template_files_go_before_the_configs_template(folder: Path) -> None:
    def rendered(**options: Any) -> str:
        return Tokenizer.from_folder(folder).render_chat(USER, **options)

    write(folder, "chat_template.json", {"chat_template": "from chat_template.json"})
    assert rendered() == "from chat_template.json"
    write(folder, "tokenizer_config.json", {"chat_template": "from config"})
    assert rendered() == "from config"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert (rendered(), rendered(tools=[])) == ("plain", "tools")
    write(folder, "chat_template.jinja", "from jinja")
    assert (rendered(), rendered(tools=[])) == ("from jinja", "from jinja")
    write(folder, "additional_chat_templates/tool_use.jinja", "extra")
    assert (rendered(), rendered(tools=[])) == ("from jinja", "extra")


@pytest.mark.parametrize("value", [7, ["text"], [{"name": "default"}], {"default": 1}])
def test_template_of_a_strange_shape_is_refused(folder: Path, value: Any) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": value})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template"):
        Tokenizer.from_folder(folder)


def test_template_or_decoder_that_is_not_understood_names_the_folder(folder: Path) -> None:
    write(folder, "chat_template.jinja", "{% for %}")
    with pytest.raises(CheckpointError, match=f"^{folder}: .*not valid Jinja"):
        Tokenizer.from_folder(folder)
    (folder / "chat_template.jinja").unlink()
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.decoder = decoders.CTC()
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=f"^{folder}: .*CTC"):
        Tokenizer.from_folder(folder)
