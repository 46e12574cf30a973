"""Which bodies are too much work to decode between two steps, and which are only long."""

from __future__ import annotations

import json
import time

import msgspec
import pytest

from graphllm.errors import PayloadTooLargeError
from graphllm.server.generation.body_size import MAX_WORK, check_work
from graphllm.server.generation.decoding import BodyDecoder

MEGABYTE = 1024**2


class Body(msgspec.Struct, forbid_unknown_fields=True):
    values: list[object] = []
    text: str = ""


@pytest.mark.parametrize("value", ["{}", '{"a":1}', '{ "a" : {} }', "[]", "1", '"a"', '"{"', "null"])
def test_a_body_of_very_many_values_is_refused_before_it_is_decoded(value: str) -> None:
    body = ('{"values":[' + ",".join([value] * (MAX_WORK + 1)) + "]}").encode()
    with pytest.raises(PayloadTooLargeError, match="too many JSON values"):
        BodyDecoder(Body, {}).decode(body)


def test_a_body_that_is_only_a_prefix_of_one_is_refused_too() -> None:
    with pytest.raises(PayloadTooLargeError):
        check_work(b'{"values":[' + b"{}," * MAX_WORK)


@pytest.mark.parametrize("piece", ["{", ",", "[", '"', "\\", '{"a": [1, "b"]}, ', '\\"{', "x, y\n"])
def test_a_long_text_is_decoded_whatever_it_is_about(piece: str) -> None:
    text = piece * (2 * MEGABYTE // len(piece))
    body = json.dumps({"text": text}).encode()
    assert BodyDecoder(Body, {}).decode(body).fields.text == text


def test_strings_that_hold_quotes_and_backslashes_do_not_hide_objects() -> None:
    for string in (r'"\""', r'"\\"', r'"\\\""', r'"{\\\\"'):
        body = f'{{"values":[{",".join([string, "{}"] * 50_000)}]}}'.encode()
        with pytest.raises(PayloadTooLargeError):
            check_work(body)


def test_a_batch_of_many_prompts_of_token_ids_is_not_too_much() -> None:
    prompts = [list(range(8000))] * 120
    assert BodyDecoder(Body, {}).decode(json.dumps({"values": prompts}).encode()).fields.values == prompts


def test_the_check_is_linear_in_strings_that_never_end() -> None:
    body = b"{" * 40_000 + b'"\\' * (4 * MEGABYTE)
    begin = time.thread_time()
    with pytest.raises(PayloadTooLargeError):
        check_work(body)
    assert time.thread_time() - begin < 2.0  # tens of ms; a scan anew from each quote takes hours
