"""`make report` counts what is there."""

import ast

from quire.models.registry import FAMILIES
from scripts.report import MODELS, functions, repeated, users


def test_every_family_is_counted() -> None:
    found = functions()
    assert found.keys() == set(FAMILIES.values())
    assert len(found["qwen.qwen2"]) == 1
    text = (MODELS / "gpt.py").read_text()
    (node,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "gpt2")
    assert found["gpt.gpt2"][-1] == text.splitlines()[node.end_lineno - 1].strip()


def test_fields_have_their_users() -> None:
    found = users()
    assert {"gpt_oss.gpt_oss", "granite.granite_swa"} <= found["Attention.sinks"]
    assert "llama.llama" not in found["Attention.sinks"]
    assert "gemma.gemma2" in found["Attention.window"]
    assert found["Decoder.blocks"] == set(FAMILIES.values())


def test_runs_of_equal_lines_are_found() -> None:
    texts = {"a": list("xabcdy"), "b": list("abcdz"), "c": list("abxcd")}
    assert [*repeated(texts)] == [("a", "b", 4)]
