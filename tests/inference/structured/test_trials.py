"""A grammar that cannot be compiled in time harms nobody: it is tried in a process that is ended, and another takes its place."""

import gc
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from llguidance import LLMatcher

from mlx_manager.core.errors import InvalidField, Overloaded
from mlx_manager.core.requests import Regex
from mlx_manager.inference.structured.compiler import Compiler, grammar_of, json_grammar
from tests.e2e.serving import FIXTURE_MODELS
from tests.inference.fixture_models import dialect

MODEL = "qwen3"
ENDLESS = json_grammar({"multipleOf": 2147483648}, strict=False)
DEEP = grammar_of(Regex("(" * 30_000 + "a" + ")" * 30_000))
SLOW_AT_EACH_TOKEN = grammar_of(Regex("~((😀){60000})"))
GOOD = json_grammar({"type": "object", "properties": {"city": {"type": "string"}}}, strict=False)


def good(i: int) -> str:
    return json_grammar({"enum": [f"number {i}"]}, strict=False)


def new_compiler() -> Compiler:
    spoken = dialect(MODEL)
    compiler = Compiler(spoken.tokenizer, vocab_size=spoken.vocab_size, stop_tokens=sorted(spoken.stop_tokens))
    compiler.compile(GOOD, "f")
    return compiler


@pytest.fixture(autouse=True)
def others() -> set[psutil.Process]:
    """What other tests have left running."""
    gc.collect()
    return set(processes())


@pytest.fixture
def compiler(others: set[psutil.Process]) -> Compiler:
    return new_compiler()


def processes() -> list[psutil.Process]:
    """Of this one, those that try grammars."""
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("trial_process" in argument for argument in process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def seconds(work: object) -> float:
    began = time.monotonic()
    assert callable(work)
    work()
    return time.monotonic() - began


def refused(compiler: Compiler, grammar: str) -> str:
    with pytest.raises(InvalidField) as error:
        compiler.compile(grammar, "the field")
    assert error.value.param == "the field"
    return error.value.message


def test_a_grammar_that_is_never_done_is_refused_in_time(compiler: Compiler) -> None:
    assert seconds(lambda: refused(compiler, ENDLESS)) < 3
    assert "more than 2 seconds" in refused(compiler, ENDLESS)


def test_a_grammar_that_would_keep_a_batch_waiting_at_each_token_is_refused(compiler: Compiler) -> None:
    assert "each token" in refused(compiler, SLOW_AT_EACH_TOKEN)


def test_a_grammar_that_ends_its_process_ends_no_other(compiler: Compiler) -> None:
    refused(compiler, DEEP)
    assert not compiler.compile(GOOD, "f").is_error()


def test_ordinary_grammars_pass_while_the_endless_ones_wait_for_their_end(compiler: Compiler) -> None:
    def outcome(i: int) -> type[Exception]:
        with pytest.raises((InvalidField, Overloaded)) as error:
            compiler.compile(json_grammar({"multipleOf": 2147483648 + 2 * i}, strict=False), "f")
        return error.type

    with ThreadPoolExecutor(20) as pool:
        bombs = [pool.submit(outcome, i) for i in range(20)]
        times = [seconds(lambda i=i: compiler.compile(good(i), "f")) for i in range(9)]
        assert sorted(times)[4] < 1, times
        outcomes = [bomb.result() for bomb in bombs]
    assert outcomes.count(InvalidField) >= 8


def test_what_a_grammar_can_say_is_what_it_could_before(compiler: Compiler) -> None:
    matcher = compiler.compile(grammar_of(Regex("[ab]{2}")), "f")
    copy = compiler.compile(grammar_of(Regex("[ab]{2}")), "f")
    tokens = dialect(MODEL).tokenizer.encode("ab", add_special_tokens=False)
    assert all(matcher.consume_token(t) for t in tokens)
    assert matcher.is_accepting()
    assert not copy.is_accepting()


def test_a_process_that_was_ended_is_replaced(compiler: Compiler, others: set[psutil.Process]) -> None:
    compiler.compile(GOOD, "f")
    for process in set(processes()) - others:
        process.send_signal(signal.SIGKILL)
    assert not compiler.compile(good(1), "f").is_error()


def test_signals_for_the_server_do_not_end_it(compiler: Compiler, others: set[psutil.Process]) -> None:
    first = min(set(processes()) - others, key=lambda process: process.create_time())
    for process in set(processes()) - others:
        for meant_for_others in (signal.SIGTERM, signal.SIGINT):
            process.send_signal(meant_for_others)
    compiler.compile(good(1), "f")
    assert first in processes()


@pytest.mark.skipif(sys.platform != "linux", reason="no other kernel keeps such a limit, or tells of it")
def test_a_fork_has_little_memory_and_goes_on_behind_others(compiler: Compiler, others: set[psutil.Process]) -> None:
    with ThreadPoolExecutor(1) as pool:
        bomb = pool.submit(refused, compiler, ENDLESS)
        time.sleep(0.5)
        forks = set(processes()) - others
        (fork,) = [p for p in forks if p.nice() > psutil.Process().nice()]
        limits = Path(f"/proc/{fork.pid}/limits").read_text()
        bomb.result()
    (space,) = [line for line in limits.splitlines() if line.startswith("Max address space")]
    assert int(space.split()[3]) < 4 << 30


def test_nothing_is_left_of_it_once_nobody_compiles(others: set[psutil.Process]) -> None:
    compiler = new_compiler()
    assert set(processes()) - others
    del compiler
    gc.collect()
    psutil.wait_procs(set(processes()) - others, timeout=5)
    assert set(processes()) <= others


def test_when_its_server_is_killed_it_ends_by_itself() -> None:
    program = (
        "import sys, time; from pathlib import Path; from mlx_manager.inference.structured.trials import Trials;"
        "trials = Trials(Path(sys.argv[1]).read_text(), vocab_size=1216, stop_tokens=[0]);"
        "print(trials.error(sys.argv[2]), flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", program, str(FIXTURE_MODELS / MODEL / "tokenizer.json"), GOOD]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"\n"
        started = psutil.Process(server.pid).children(recursive=True)
        server.kill()
    assert started
    assert psutil.wait_procs(started, timeout=5)[1] == []


def test_words_of_the_compiler_come_through(compiler: Compiler) -> None:
    assert "zzz" in refused(compiler, LLMatcher.grammar_from_json_schema({"type": "zzz"}))
