"""The loop of a kernel that a GPU spends its time in: instructions by name, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "DMMA", "FFMA")
CLASSES = {  # what an instruction is for, by how its name begins
    "products": ("HMMA", "HGMMA", "UTCHMMA"),
    "logic": ("LOP3", "PRMT", "SHF", "PLOP3", "SEL", "FSEL", "MOV", "BMSK"),
    "float": ("FFMA", "FMUL", "FADD", "FMNMX", "HMUL2", "HADD2", "HFMA2", "F2FP", "MUFU", "F2F", "I2F", "I2FP"),
    "addresses": ("IMAD", "IADD3", "LEA", "VIADD", "ISETP", "UIADD3", "UIMAD", "ULEA", "VIMNMX", "IABS", "IMNMX"),
    "copies": ("LDGSTS", "LDSM", "LDS", "STS", "LDG", "STG", "LDGDEPBAR", "DEPBAR", "LDC", "ULDC", "STSM"),
    "barriers": ("BAR", "MEMBAR", "FENCE", "SYNCS", "WARPSYNC"),
    "exchanges": ("SHFL",),
    "spills": ("STL", "LDL"),
}


def loop(cubin: bytes) -> Counter[str]:
    """Instructions of the longest loop that multiplies, without what follows a dot in their names; none without one."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([str(TOOLS / "cuobjdump"), "-sass", file.name], text=True)
    lines = [(int(at, 16), name.split(".")[0], rest) for at, name, rest in LINE.findall(text)]
    found: Counter[str] = Counter()
    for at, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name != "BRA" or target is None or (begin := int(target[1], 16)) > at:
            continue
        own = Counter(n for where, n, _ in lines if begin <= where <= at)
        if any(own[n] for n in PRODUCTS) and own.total() > found.total():
            found = own
    return found


def mix(instructions: Counter[str]) -> dict[str, int]:
    """Instructions by class."""
    found = {name: sum(instructions[n] for n in names) for name, names in CLASSES.items()}
    return found | {"rest": instructions.total() - sum(found.values())}
