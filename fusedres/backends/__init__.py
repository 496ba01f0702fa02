"""The backends, one module or folder each: what of `fusedres.raw_ops` each computes, and what it leaves."""
