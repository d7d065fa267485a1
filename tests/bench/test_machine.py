import platform

from mlx_manager.bench.machine import command_line, this_machine


def test_a_command_line_can_be_typed_again_and_holds_no_secret() -> None:
    argv = ["/usr/bin/mlx-manager", "bench", "--prompt", "a b", "--api-key", "sk-1", "--token=sk-2", "--keys", "3"]
    assert command_line(argv) == "mlx-manager bench --prompt 'a b' --api-key *** --token=*** --keys 3"


def test_this_machine_is_described() -> None:
    machine = this_machine(["mlx-manager", "bench"])
    assert machine.cpu
    assert machine.num_cores >= 1
    assert machine.memory_bytes > 2**28
    assert machine.python == platform.python_version()
    assert "mlx-lm" in dict(machine.packages)
    assert machine.command == "mlx-manager bench"
    assert machine.python in machine.line
