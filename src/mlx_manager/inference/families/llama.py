from mlx_manager.inference.families.family import Family
from mlx_manager.inference.families.tool_formats import llama_json

LLAMA = Family(
    name="llama",
    model_types=frozenset({"llama"}),
    tool_format=llama_json,
    # Checkpoints often name <|end_of_text|> alone as eos; a turn of an instruct model ends with one of the others.
    stop_tokens=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
)
