"""The `saemnesia-fast` command."""
