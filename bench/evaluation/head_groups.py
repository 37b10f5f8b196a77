"""Head clustering on real heads: the energy of the keys that groups of heads lose, by how the groups were found.

python -m bench.evaluation.head_groups [--plot-only]

MiniLM has 12 real heads a layer. SmolLM2 with its 3 kv heads copied three times and shuffled has a known answer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

import lrattn
from bench.support import models, report, texts
from lrattn.compression import clusters
from lrattn.compression.moments import about
from lrattn.compression.sums import second_moment
from lrattn.integrations.transformers.load import read_windows
from lrattn.models.layers import attention_layers

PATH = report.RESULTS / "head_groups.json"
SIZES = (2, 3, 4)
SHARE = 0.5  # rank of a group / its full rank
WINDOWS, LENGTH = 20, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot-only", action="store_true")
    if not parser.parse_args().plot_only:
        report.save(PATH, {"share": SHARE, "minilm": minilm(), "smollm2_mha": smollm2_mha()})
    results = json.loads(PATH.read_text())
    print(table(results))
    plot(results, PATH.with_suffix(".png"))


def ways(gram: Tensor, size: int, rank: int) -> dict[str, clusters.Groups]:
    return {
        "contiguous": clusters.contiguous(len(gram), size),
        "greedy": clusters.greedy(gram, size),
        "balanced": clusters.balanced(gram, size, rank),
    }


@torch.no_grad()
def minilm() -> dict[str, Any]:
    """Share of the key energy that is kept at half the rank: layers x sizes x ways."""
    model, tokenizer = models.minilm()
    windows = read_windows(tokenizer, texts.wikipedia("calibration"), LENGTH, WINDOWS)
    linears = [layer.attention.self.key for layer in model.encoder.layer]
    moments = [torch.zeros(k.in_features, k.in_features, dtype=torch.float64) for k in linears]

    def watch(total: Tensor) -> Any:
        def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            for row in args[0]:
                total.add_(second_moment(row))

        return hook

    for linear, total in zip(linears, moments, strict=True):
        linear.register_forward_pre_hook(watch(total))
    for ids in tqdm(windows.split(4), desc="MiniLM", unit="batch"):
        model(input_ids=ids)
    rows = []
    for i, (linear, moment) in enumerate(zip(linears, moments, strict=True)):
        weight = linear.weight.double().unflatten(0, (model.config.num_attention_heads, -1))
        gram = clusters.outputs_gram(weight, moment)
        for size in SIZES:
            rank = int(SHARE * size * weight.shape[1])
            kept = {name: 1 - clusters.lost(gram, groups, rank) for name, groups in ways(gram, size, rank).items()}
            rows.append({"layer": i, "group_size": size, "rank": rank, "energy_kept": kept})
    return {"tokens": windows.numel(), "heads": len(weight), "head_dim": weight.shape[1], "rows": rows}


def smollm2_mha() -> dict[str, Any]:
    """In how many layers the three copies of each head were put together again."""
    model, tokenizer = models.smollm2_mha()
    windows = read_windows(tokenizer, texts.wikipedia("calibration"), LENGTH, 4)
    moments = lrattn.calibrate(model, windows.split(1))
    order, found = models.mha_order(), dict.fromkeys(("contiguous", "greedy", "balanced"), 0)
    layers = attention_layers(model)
    for i, layer in enumerate(layers):
        heads = torch.eye(layer.dense, dtype=torch.float64).unflatten(0, (layer.num_kv_heads, -1))
        gram = clusters.outputs_gram(heads, about(moments.sum("before", i), None)[: layer.dense, : layer.dense])
        for name, groups in ways(gram, 3, layer.head_dim).items():
            found[name] += all(len({order[h] // 3 for h in heads}) == 1 for heads in groups)
    return {"layers": len(layers), "layers_with_copies_together": found}


def table(results: dict[str, Any]) -> str:
    lines = [f"MiniLM, 12 heads: key energy kept at {results['share']:.0%} of the rank", ""]
    lines += [f"{'layer':>5} {'heads a group':>14} {'contiguous':>11} {'greedy':>8} {'balanced':>9}"]
    for row in results["minilm"]["rows"]:
        kept = row["energy_kept"]
        numbers = f"{kept['contiguous']:>11.4f} {kept['greedy']:>8.4f} {kept['balanced']:>9.4f}"
        lines.append(f"{row['layer']:>5} {row['group_size']:>14} {numbers}")
    known = results["smollm2_mha"]
    together = ", ".join(f"{name} {n}" for name, n in known["layers_with_copies_together"].items())
    return "\n".join([*lines, "", f"SmolLM2, shuffled copies together again, of {known['layers']} layers: {together}"])


def plot(results: dict[str, Any], path: Path) -> None:
    """Energy lost by layer, one panel a group size."""
    figure, axes = plt.subplots(1, len(SIZES), figsize=(10.5, 3.6), layout="constrained", sharey=True)
    for axis, size in zip(axes, SIZES, strict=True):
        rows = [row for row in results["minilm"]["rows"] if row["group_size"] == size]
        for n, name in enumerate(("contiguous", "greedy", "balanced")):
            places = [row["layer"] + 0.27 * (n - 1) for row in rows]
            axis.bar(places, [1 - row["energy_kept"][name] for row in rows], width=0.25, label=name)
        axis.set(xlabel="layer", xticks=range(len(rows)))
        axis.set_title(f"{size} heads a group, rank {rows[0]['rank']} of {2 * rows[0]['rank']}", fontsize="medium")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("key energy lost")
    axes[0].legend()
    figure.suptitle("all-MiniLM-L6-v2, 12 real heads: which heads share a latent", fontsize="medium")
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
