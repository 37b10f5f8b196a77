"""GPUs by name, as the data sheets of their vendors have them.

Sources: NVIDIA H100 (SXM5 80 GB), H200 (SXM), A100 (SXM 80 GB) and Blackwell (B200, of HGX B200) data sheets, and AMD's
of Instinct MI300X: bytes a second of memory, and operations a second of bfloat16 in dense matrices, without sparsity.
Multiprocessors, or compute units, are those that are enabled.
"""

from __future__ import annotations

from typing import NamedTuple

SUSTAINED = 3.08 / 3.35  # of the memory rate of the sheet, as an H100 has it; taken for all


class GPU(NamedTuple):
    family: str  # whose rows of the launch table it takes
    processors: int
    sheet: float  # bytes of memory a second
    tensor: float  # operations a second

    @property
    def memory(self) -> float:
        """Bytes a second that are reached."""
        return self.sheet * SUSTAINED


GPUS = {
    "h100": GPU("sm90", 132, 3.35e12, 989.4e12),
    "h200": GPU("sm90", 132, 4.8e12, 989.4e12),
    "a100": GPU("sm80", 108, 2.039e12, 312e12),
    "b200": GPU("sm100", 148, 8e12, 2250e12),
    "mi300x": GPU("gfx9", 304, 5.3e12, 1307.4e12),
}
