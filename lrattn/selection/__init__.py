"""Which tokens a cache keeps: one policy, one file, one function

    kept(held) -> [B, T] bool

of what a layer holds after a pass (lrattn/selection/held.py). First and recent tokens are kept whatever it says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lrattn.factors.selection import Selection
from lrattn.selection import chunkkv, curdkv, l2norm, refreekv, zipcache
from lrattn.selection.held import Held


@dataclass(frozen=True)
class Policy:
    """One way to choose tokens.

    Args:
        kept: see above.
        probes: of a pass, the last queries whose probabilities it looks at; 0: none.
        whole: first layers, which keep every token.
        counted: whether it keeps a share of the tokens that it is given; else it finds out how many.
    """

    kept: Callable[[Held], Tensor]
    probes: int = 0
    whole: int = 0
    counted: bool = True


POLICIES: dict[str, Policy] = {
    "l2norm": Policy(l2norm.kept, whole=2),
    "curdkv": Policy(curdkv.kept),
    "chunkkv": Policy(chunkkv.kept, probes=32),
    "refreekv": Policy(refreekv.kept, probes=32, counted=False),
    "zipcache": Policy(zipcache.kept, probes=32),
}
KEEP = 0.5  # where the caller names no share


def policy_of(selection: Selection) -> Policy:
    """Raises: ValueError for an unknown policy, or a share for one that takes none."""
    if selection.policy not in POLICIES:
        raise ValueError(f"select: expected a policy out of {sorted(POLICIES)}, got {selection.policy!r}")
    policy = POLICIES[selection.policy]
    if not policy.counted and selection.keep is not None:
        raise ValueError(f"keep: expected None with {selection.policy!r}, which finds it, got {selection.keep}")
    return policy


def selection_of(select: Selection | str | None) -> Selection | None:
    """A Selection or its words; None: every token is kept. Raises: ValueError for what no policy is or can do."""
    found = Selection.of(select)
    if found is not None:
        policy_of(found)
    return found


def shares(selection: Selection, layers: int) -> list[float]:
    """What each layer keeps of its tokens, `keep` over all; 1 where the policy itself finds it.

    Raises: ValueError as `policy_of`, or for a share that leaves nothing beside the layers that keep every token.
    """
    policy = policy_of(selection)
    if not policy.counted:
        return [1.0] * layers
    keep, whole = KEEP if selection.keep is None else selection.keep, min(policy.whole, layers - 1)
    others = (keep * layers - whole) / (layers - whole)
    if others <= 0:
        raise ValueError(
            f"keep: expected more than {whole} of {layers} layers, which {selection.policy!r} leaves whole, got {keep}"
        )
    return [1.0] * whole + [others] * (layers - whole)


__all__ = ["POLICIES", "Held", "Policy", "Selection", "policy_of", "selection_of", "shares"]
