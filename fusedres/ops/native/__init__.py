"""The native backend: its library, the calls of its operators, and what it does not serve."""
