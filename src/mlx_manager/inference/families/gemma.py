from mlx_manager.inference.families.family import THOUGHT, Family
from mlx_manager.inference.families.tool_formats import pythonic
from mlx_manager.inference.families.tool_formats.braced import GEMMA4 as GEMMA4_CALLS

GEMMA = Family(
    name="gemma",
    model_types=frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"}),
    tool_format=pythonic,
    stop_tokens=("<end_of_turn>", "<eos>"),
    turn_tokens=("<start_of_turn>",),
)

GEMMA4 = Family(
    name="gemma4",
    model_types=frozenset({"gemma4", "gemma4_text", "gemma4_unified"}),
    tool_format=GEMMA4_CALLS,
    reasoning_tags=(THOUGHT,),
    # A call waits for its result, which only we give.
    stop_tokens=("<turn|>", "<eos>", "<|tool_response>"),
    turn_tokens=("<|turn>",),
)
