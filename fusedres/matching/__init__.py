"""Finds residual blocks: dry runs of a module, its dataflow, and the plan that matches it."""
