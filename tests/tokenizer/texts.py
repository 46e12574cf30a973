"""Texts that tokenizers get wrong."""

from __future__ import annotations

TEXTS = [
    "Hello, world!",
    " leading and trailing ",
    "tabs\tand\nnewlines\r\n\r\n  \n   mixed   runs  ",
    "emoji 😀 👩‍👩‍👧‍👦 🇪🇺 👍🏽",
    "你好，世界。日本語のテキスト、한국어 텍스트",
    "Arabic digits ٣٤٥ and Devanagari ४५ beside 1234567.89",
    "combining: e\u0301 n\u0303 a\u0308\u0323 vs é ñ",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2, 3]}  # comment\n",
    "I'm, you're, WE'LL, they'd'VE it's",
    "\x00\x01\x7f\u00a0\u200b\ufeff\ufffd",
    "שלום مرحبا नमस्ते ไทย",
    "½ ² Ⅷ ① 𝟘𝟙",
    "a" * 300 + " " * 50 + "=" * 81,
    "",
]
