"""`<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>` (LFM 2)."""

from mlx_manager.inference.families.tool_formats import pythonic

start = "<|tool_call_start|>"
end = "<|tool_call_end|>"
streams = ()
may_begin = pythonic.may_begin
is_open = pythonic.is_open
parse = pythonic.parse
