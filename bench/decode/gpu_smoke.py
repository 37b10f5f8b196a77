"""The first look at a GPU: what it is, and one tiny decode step through the kernels against the truth.

    python -m bench.decode.gpu_smoke [--cases] [--dry]

--cases runs every case of tests/support/cases.py too, against the reference in float64: for a machine without pytest.
--dry does the same in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import torch
from torch import Tensor

import lrattn
from bench.decode import timing
from bench.decode.decode_problem import attend, make
from bench.decode.decode_providers import ours
from bench.decode.decode_shapes import Shape
from bench.decode.gpu_decode import DRY_MODELS, TOLERANCE
from bench.support import report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", action="store_true")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    for name, what in report.machine().items():
        print(f"{name:8} {what}")
    device, dtype = ("cpu", torch.float16) if args.dry else ("cuda", torch.bfloat16)
    for model in DRY_MODELS:
        x = make(Shape(model, "Palu", 0.5), 200, 2, dtype, device)
        truth = torch.stack([attend(x.q[b], *x.heads(b)) for b in range(2)])
        print(f"{model.name}, {dtype}: right to {timing.gate(ours(x)(), truth, TOLERANCE):.1e}")
    return every_case(device, dtype) if args.cases else 0


def every_case(device: str, dtype: torch.dtype) -> int:
    """Every case of the tests; 1 if one fails."""
    cases: Any = importlib.import_module("cases")
    attend_to: Any = lrattn.decode_attention
    failed = 0
    for case in cases.CASES:
        layer, *tensors, kwargs = cases.make(case, dtype)
        wide = (None if x is None else x.double() for x in tensors)
        true = attend_to(*wide, layer.to(dtype=torch.float64), **kwargs)
        moved = (None if x is None else x.to(device) for x in tensors)
        there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in kwargs.items()}
        try:
            out = attend_to(*moved, layer.to(device), backend="triton", **there)
            print(f"{case}: right to {timing.gate(out.cpu(), true, TOLERANCE):.1e}")
        except Exception as error:  # the others are run too
            failed += 1
            print(f"{case}: FAILED: {type(error).__name__}: {error}")
    print(f"{len(cases.CASES)} cases, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
