"""What an answer is held to where it may call tools and its text must have a form too.

Owns the joining of both into one grammar: the answer is calls, or it is text of the form.
"""

from __future__ import annotations

import json

from graphllm.structured_outputs import StructuredOutputs

_START = "start:"


def calls_or_form(calls: str, form: StructuredOutputs) -> StructuredOutputs | None:
    """Either of both; None for forms that cannot be joined to another grammar.

    calls: Lark text whose first rule is `start`, see `OutputFormat.required_grammar`.
    """
    answer = _answer_rules(form)
    if answer is None or form.whitespace_pattern is not None or not calls.startswith(_START):
        return None
    rules = f"start: calls | answer\ncalls:{calls.removeprefix(_START).rstrip()}\n{answer}\n"
    return StructuredOutputs(
        grammar=rules,
        starts_after=form.starts_after,
        disable_additional_properties=form.disable_additional_properties,
    )


def _answer_rules(form: StructuredOutputs) -> str | None:
    """The form as a rule called `answer`."""
    if form.json_object:
        return 'answer: %json {"type": "object"}'
    if form.json is not None and form.json.lstrip().startswith("{"):
        return f"answer: %json {form.json}"
    if form.choice is not None:
        return "answer: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in form.choice)
    if form.regex is not None and "\n" not in form.regex:
        pattern = form.regex.replace("\\/", "/").replace("/", "\\/")
        return f"answer: ANSWER\nANSWER: /{pattern}/"
    return None
