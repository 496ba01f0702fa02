"""The backends: one module each, all with the signatures of `fusedres.raw_ops.RawOps`."""
