"""The server, in which loading the model named qwen3 ends the process as a fault in native code does: when the thread that loads it opens
its weights."""

import os
import sys
import threading
from typing import Any


def _abort(event: str, arguments: tuple[Any, ...]) -> None:
    is_loading = event == "open" and threading.current_thread().name == "mlx-device"
    if is_loading and str(arguments[0]).endswith("qwen3/model.safetensors"):
        os.abort()


if __name__ == "__main__":
    sys.addaudithook(_abort)

    # Before anything imports MLX: the BLAS that is loaded first is the one that it uses.
    from mlx_manager.inference.blas import use_fast_blas

    use_fast_blas()
    from mlx_manager.app import serve
    from mlx_manager.config import Config

    serve(Config())
