"""A transformers model as attention sees it, by official interfaces alone: nothing of an architecture is known here.

states (modes and gradients, put back), masks (what a mask says, once a pass), interface (another attention function
inside a block), layers (which layers fill a cache, found by a short pass), ropes (their rotations, checked against the
keys themselves), weights (k_proj and v_proj of Linear models, for what reads weights)

transformers is imported by the first call.
"""
