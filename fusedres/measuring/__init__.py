"""Holds a patched model against the unpatched one: its results, its time, and what is faster where."""
