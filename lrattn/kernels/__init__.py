"""Triton kernels, in the order of a call: write, rebuild, scores (or absorb), values, combine.

Each file holds one kernel and the function that launches it; they take tensors and numbers. `launch` chooses their
block sizes, `decode` runs them one after the other, and this package alone imports triton.
"""
