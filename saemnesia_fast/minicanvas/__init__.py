"""MiniCanvas."""
