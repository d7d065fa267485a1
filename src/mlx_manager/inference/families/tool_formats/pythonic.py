"""`[get_weather(city="Paris"), add(a=1, b=2)]` as the whole reply, perhaps in a code fence (Gemma 3)."""

import ast
import re
from collections.abc import Sequence

from mlx_manager.core.requests import ToolSpec
from mlx_manager.inference.families.family import Call

start = ""
end = ""
_FENCE = re.compile(r"^```(?:tool_code|python)?\s*\n(.*?)\n?```$", re.DOTALL)
_OPENING = re.compile(r"\s*\[?\s*([A-Za-z_][\w.]*\s*(\(|$)|$)")
_OPENING_FENCES = ("```tool_code\n", "```python\n", "```\n")


def may_begin(text: str) -> bool:
    text = text.lstrip()
    for fence in _OPENING_FENCES:
        if fence.startswith(text):
            return True
        if text.startswith(fence):
            return re.match(_OPENING, text[len(fence) :]) is not None
    return text.startswith("[") and re.match(_OPENING, text) is not None


def parse(text: str, tools: Sequence[ToolSpec]) -> list[Call] | None:
    text = text.strip()
    if fenced := _FENCE.match(text):
        text = fenced[1].strip()
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    offered = {tool.name for tool in tools}
    calls: list[Call] = []
    for node in nodes:
        if not isinstance(node, ast.Call) or node.args or (name := ast.unparse(node.func)) not in offered:
            return None
        try:
            arguments = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg is not None}
        except ValueError:
            return None
        calls.append(Call(name, arguments))
    return calls or None
