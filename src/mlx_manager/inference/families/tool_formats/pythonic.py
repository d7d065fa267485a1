"""`[get_weather(city="Paris"), add(a=1, b=2)]` as the whole reply, perhaps in a code fence (Gemma 3)."""

import ast
import re
import warnings
from collections.abc import Sequence

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import Call, Section
from mlx_manager.inference.families.tool_formats.json_call import make_call, read_literal

start = ""
end = ""
streams = ()
_FENCE = re.compile(r"^```(?:tool_code|python)?\s*\n(.*?)\n?```$", re.DOTALL)
_OPENING = re.compile(r"\s*\[?\s*([A-Za-z_][\w.]*\s*(\(|\Z)|\Z)")
_OPENING_FENCES = ("```tool_code\n", "```python\n", "```\n")


def may_begin(text: str) -> bool:
    text = text.lstrip()
    for fence in _OPENING_FENCES:
        if fence.startswith(text):
            return True
        if text.startswith(fence):
            return _OPENING.match(text, len(fence)) is not None
    return text.startswith("[") and _OPENING.match(text) is not None


def is_open(text: str) -> bool:
    return False


def parse(text: str, tools: Sequence[ToolSpec]) -> Section | None:
    code = text.strip()
    if fenced := _FENCE.match(code):
        code = fenced[1].strip()
    tree = _expression(code)
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    offered = {tool.name for tool in tools}
    calls = [_call(node, offered) for node in nodes]
    whole = tuple(call for call in calls if call is not None)
    return Section(whole, len(text)) if whole and len(whole) == len(calls) else None


def _expression(code: str) -> ast.expr | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr | None, offered: set[str]) -> Call | None:
    if not isinstance(node, ast.Call) or node.args or (name := ast.unparse(node.func)) not in offered:
        return None
    if any(keyword.arg is None for keyword in node.keywords):  # **something
        return None
    return make_call(name, {keyword.arg: read_literal(_JsonWords().visit(keyword.value)) for keyword in node.keywords})


class _JsonWords(ast.NodeTransformer):
    """Templates show lists and objects as JSON, and models mix the two."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        words = {"true": True, "false": False, "null": None}
        return ast.copy_location(ast.Constant(words[node.id]), node) if node.id in words else node
