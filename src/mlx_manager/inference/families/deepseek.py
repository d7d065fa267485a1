from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.tool_formats.marked import DEEPSEEK as DEEPSEEK_CALLS

DEEPSEEK = Family(
    name="deepseek",
    model_types=frozenset({"deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32"}),
    tool_format=DEEPSEEK_CALLS,
    stop_tokens=("<｜end▁of▁sentence｜>",),
    turn_tokens=("<｜User｜>", "<｜Assistant｜>"),
)
