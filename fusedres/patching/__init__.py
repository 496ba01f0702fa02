"""Changes a model: looks for its blocks, gives them a patched class, runs their calls, reports, and undoes it."""
