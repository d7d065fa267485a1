from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.tool_formats.tagged import MINIMAX as MINIMAX_CALLS

MINIMAX = Family(
    name="minimax",
    model_types=frozenset({"minimax", "minimax_m2"}),
    tool_format=MINIMAX_CALLS,
    stop_tokens=("[e~[",),
    turn_tokens=("]~!b[", "]~b]"),
)
