"""`python -m saemnesia_fast.minicanvas` makes the benchmark from nothing."""

import logging
import os


def main() -> None:
    # Read by the libraries when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    import torch
    import tyro

    from .build import BuildConfig, Builder

    config = tyro.cli(BuildConfig, prog="python -m saemnesia_fast.minicanvas")
    if config.threads:
        torch.set_num_threads(config.threads)
    Builder(config).run()


if __name__ == "__main__":
    main()
