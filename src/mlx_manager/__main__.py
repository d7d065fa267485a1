"""`python -m mlx_manager` and the `mlx-manager` command."""


def main() -> None:
    # Before anything imports MLX: the BLAS that is loaded first is the one that it uses.
    from mlx_manager.inference.blas import use_fast_blas  # noqa: PLC0415

    use_fast_blas()
    from mlx_manager.cli import app  # noqa: PLC0415

    app()


if __name__ == "__main__":
    main()
