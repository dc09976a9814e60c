"""The modes of `main.py`, a file each, and what only they need."""
