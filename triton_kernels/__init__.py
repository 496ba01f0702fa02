"""Triton kernels of fusedres, installed as `fusedres.triton_kernels`; imports torch, triton and itself."""

if __name__ != "fusedres.triton_kernels":
    raise ImportError(
        "This folder is fusedres.triton_kernels, found as a bare `triton_kernels`: another project owns that "
        "name. Import fusedres.triton_kernels, and run Python from outside the repository root."
    )
