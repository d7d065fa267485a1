from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.tool_formats import pythonic

GEMMA = Family(
    name="gemma",
    model_types=frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"}),
    tool_format=pythonic,
    stop_tokens=("<end_of_turn>", "<eos>"),
    turn_tokens=("<start_of_turn>",),
)
