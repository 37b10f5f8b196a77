"""Online: tensors in, tensors out. `ops` is public; it checks, then calls the kernels' operators or the reference.

`outlook` tells what a step would take, of shapes alone.
"""
