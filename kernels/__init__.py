"""Triton kernels, installed as `saemnesia_fast.kernels`; relative imports only inside."""

if __name__ == "kernels":
    # The root of a checkout is on sys.path, where transformers looks for the PyPI package `kernels`
    # and compares versions: 0 is older than any it accepts.
    __version__ = "0"
