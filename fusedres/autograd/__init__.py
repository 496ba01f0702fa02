"""The torch autograd Functions and operators of a residual block."""
