"""Offline: a model and text in, `Factors` out.

batches -> calibrate, moments -> averages, clusters -> ranks, bits, segments -> methods/ by problem -> compress ->
refine, nested; arguments are checked first; substitute and propagate run the model on other keys and values;
compressibility says how far a model can go.
"""
