"""`python -m saemnesia_fast` is `saemnesia-fast`."""

from .cli.main import main

if __name__ == "__main__":
    main()
