"""What mlx-lm's batch generator does with a workload when nobody has to be told: no HTTP, no threads, no text.

A program, not a module: it runs in a process of its own, in any Python that has mlx-lm. Its argument is the folder of a model. It
reads a workload a line from standard input, and writes a line for each: both JSON.
"""
# pyright: basic

import json
import sys
from itertools import islice
from os import dup, fdopen
from time import perf_counter

from mlx_lm import load
from mlx_lm.generate import BatchGenerator


def main() -> None:
    answers = fdopen(dup(1), "w")
    sys.stdout = sys.stderr  # what libraries print is no answer
    model, tokenizer, *_ = load(sys.argv[1])
    stop_tokens = [[token] for token in tokenizer.eos_token_ids]
    answers.write("{}\n")  # loaded
    answers.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False)
            for text in asked["prompts"]
        ]
        answers.write(json.dumps(_run(model, prompts, stop_tokens, asked)) + "\n")
        answers.flush()


def _run(model, prompts, stop_tokens, asked) -> dict[str, float]:
    """A closed loop, as the clients are: one that has ended makes room for the next."""
    at_once, max_tokens = asked["concurrency"], asked["max_tokens"]
    waiting = iter(prompts)
    generator = BatchGenerator(model, max_tokens=max_tokens, stop_tokens=stop_tokens, completion_batch_size=at_once)
    num_tokens = 0
    began = perf_counter()
    generator.insert(list(islice(waiting, at_once)))
    while responses := generator.next_generated():
        num_tokens += len(responses)
        num_ended = sum(response.finish_reason is not None for response in responses)
        if more := list(islice(waiting, num_ended)):
            generator.insert(more)
    wall_s = perf_counter() - began
    generator.close()
    return {"num_tokens": num_tokens, "wall_s": wall_s}


main()
