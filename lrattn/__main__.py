"""The command line: python -m lrattn compress | eval | generate | info."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lrattn import Factors, __version__, compress, in_kv_space, narrowed
from lrattn.attention.gpus import GPUS
from lrattn.compression import compressibility
from lrattn.compression.arguments import read_share
from lrattn.compression.bits import Bits, ladder_of
from lrattn.compression.methods import DEFAULT, METHODS
from lrattn.compression.ranks import RULES
from lrattn.compression.recipe import recipe_of
from lrattn.compression.residual import unlike
from lrattn.compression.whole import check_method
from lrattn.factors import safefile
from lrattn.factors.formats import WIDTHS
from lrattn.factors.summary import comparison, headline, made, summarize, table, used
from lrattn.selection import selection_of

EXAMPLES = """\
A model is a folder that save_pretrained wrote, a .gguf file, or a model in the hub's local cache; nothing is fetched.

examples (`make demo` unpacks this model and these texts):
  python -m lrattn compress .cache/smollm2 --text .cache/wikipedia-calibration.txt --windows 4 --out factors.safetensors
  python -m lrattn info factors.safetensors
  python -m lrattn eval .cache/smollm2 --factors factors.safetensors --text .cache/wikipedia-evaluation.txt --windows 2
  python -m lrattn generate .cache/smollm2 --factors factors.safetensors --chat --prompt "What is a volcano?"
"""

MODEL = "folder, .gguf file, or model in the hub's local cache"
WHERE = "cpu, cuda, cuda:1 ... (default cpu)"
SHARED = {"auto": None, "no": False, "ride": "ride", "joint": True}
STATE = "calibration file, written as it goes and gone on from; --refine goes on from STATE.<hash of the run>.refine"
SELECT = "tokens that a cache keeps: POLICY, POLICY:SHARE or POLICY:SHARE:EVERY, such as curdkv:0.5"
FAR = "the dense window the cache will hold: gradients count beyond it (default: the method's; 0 0 for none)"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, not the whole usage."""
        self.exit(2, f"lrattn: {message} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    try:
        lines, results = args.run(args)
        print(json.dumps(results, indent=1) if args.json else lines, flush=True)
    except BrokenPipeError:  # whoever read it has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit("lrattn: " + " ".join(str(error).split())) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        got = " ".join(str(error).split()) or type(error).__name__
        less = "a shorter --length and a narrower --dtype take less"
        raise SystemExit(f"lrattn: memory: expected enough, got none left ({got}); {less}") from error
    except KeyboardInterrupt:
        print("lrattn: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _parser() -> Parser:
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES}
    parser = Parser(prog="python -m lrattn", description="Attention directly on low-rank KV caches.", **style)
    parser.add_argument("--version", action="version", version=f"lrattn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="compress | eval | generate | info")

    def command(name: str, run: Any, about: str) -> Parser:
        added: Parser = commands.add_parser(name, help=about, description=about, **style)
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON to stdout")
        return added

    def model(added: Parser, about: str = MODEL, device: str | None = "cpu", where: str = WHERE, **more: Any) -> None:
        added.add_argument("model", help=about, **more)
        added.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
        added.add_argument("--device", default=device, help=where)

    def text(added: Parser, windows: int, about: str = "") -> None:
        added.add_argument("--text", type=Path, required=not about, help=about or "UTF-8 text file")
        added.add_argument("--windows", type=int, default=windows, help=f"at most this many (default {windows})")
        added.add_argument("--length", type=int, default=1024, help="tokens a window (default 1024)")

    def factors(added: Parser) -> None:
        added.add_argument("--factors", type=Path, help="factors file; without it the model is used as it is")
        added.add_argument("--method", choices=METHODS, help="make factors first, by this method, instead of --factors")
        added.add_argument("--calibration", type=Path, help="UTF-8 text file for --method, 16 windows of 1024 tokens")
        added.add_argument(
            "--keep", type=read_share, help="fewer of the factors' latents, of plain ones; or of --method"
        )
        added.add_argument("--select", help=SELECT)
        added.add_argument("--recent", type=int, help="last tokens also held dense (default: as the factors say)")
        added.add_argument("--sinks", type=int, help="first tokens also held dense (default: as the factors say)")

    added = command("compress", _compress, "Factor a model's key and value projections, calibrated on a text.")
    model(added)
    text(added, 16)
    added.add_argument("--method", default=DEFAULT, choices=METHODS, help=f"default {DEFAULT}")
    added.add_argument(
        "--keep", type=read_share, help="bytes of the latent cache / dense (default 0.125; 0.5 at 16 bits)"
    )
    added.add_argument("--bytes-per-token", type=int, metavar="N", help="of the latent cache, instead of --keep")
    added.add_argument("--bits", type=_bits, help="of a latent: 16, 8, 4, 2, several (8,4) or auto (default of lrattn)")
    added.add_argument("--ranks", choices=RULES, help=f"what shares them out (default: the method's, most {RULES[0]})")
    added.add_argument("--shared", default="auto", choices=SHARED, help="keys and values in one row (auto: by method)")
    added.add_argument("--chunk", type=int, help="positions in a chunk, of method lrattn (default 512)")
    added.add_argument("--span", type=int, help="neighbouring layers that share a row (default 1; commonkv 4)")
    added.add_argument("--positions", type=int, metavar="N", help="make factors of rotated keys for 0 .. N - 1")
    added.add_argument("--far", type=int, nargs=2, metavar=("RECENT", "SINKS"), help=FAR)
    added.add_argument("--refine", type=int, default=0, metavar="STEPS", help="distil the factors (default 0: no)")
    added.add_argument("--nested", action="store_true", help="distil all prefixes of plain latents, for --keep of eval")
    added.add_argument("--select", help=SELECT)
    added.add_argument("--salient", type=read_share, metavar="SHARE", help="of the tokens, held with twice the bytes")
    added.add_argument("--group-size", type=int, default=4, help="kv heads that share a key latent (default 4)")
    added.add_argument("--shards", type=int, default=1, help="tensor-parallel ranks no key group may lie across")
    added.add_argument("--state", type=Path, help=STATE)
    added.add_argument("--out", type=Path, required=True, help="factors file to write")

    added = command("eval", _eval, "Perplexity on a text: of the latent cache with --factors, else of the model.")
    model(added)
    text(added, 8)
    factors(added)
    added.add_argument("--read", type=int, help="tokens of a window read first, not scored (default 0; --select: half)")

    added = command("generate", _generate, "Generate text from the latent cache with --factors, else from a dense one.")
    model(added)
    added.add_argument("--prompt", required=True)
    added.add_argument("--chat", action="store_true", help="put the prompt in the tokenizer's chat template")
    factors(added)
    added.add_argument("--tokens", type=int, default=64, help="new tokens at most (default 64)")
    added.add_argument("--beams", type=int, default=1, help="beam search over this many (default 1: none)")
    added.add_argument("--temperature", type=float, default=0.0, help="sample at this temperature (default 0: greedy)")
    added.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")

    about = "What a factors file holds, several side by side; what a decode step on it would take of a GPU; or how "
    about += "compressible keys and values are on a text."
    added = command("info", _info, about)
    where = f"with --plan one of {', '.join(GPUS)} (default h100); with a text {WHERE}"
    model(added, f"factors files; with --compressibility a model: {MODEL}", None, where, nargs="+", metavar="file")
    added.add_argument("--plan", action="store_true", help="how a GPU would take a decode step [estimated]")
    added.add_argument("--context", type=int, help="tokens a sequence, with --plan (default 32768)")
    added.add_argument("--batch", type=int, help="sequences, with --plan (default 1)")
    added.add_argument("--query-heads", type=int, help="with --plan (default: as the model's config has them)")
    added.add_argument("--compressibility", action="store_true", help="effective ranks of a model's keys and values")
    text(added, 8, "UTF-8 text file: of --compressibility; else what the factors lose of it, by the model they are of")
    added.add_argument("--plot", type=Path, help="image of the effective ranks to write")
    return parser


def _is_of_memory(error: Exception) -> bool:
    """Whether an allocator had no memory left; that of the CPU has no error of its own."""
    own = ("DefaultCPUAllocator", "not enough memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in own)


def _bits(text: str) -> Bits:
    try:
        return text if text == "auto" else ladder_of([int(n) for n in text.split(",")])
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto, or numbers out of {WIDTHS} like 8,4,2, got {text}") from None


def _compress(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    safefile.check_target("out", args.out)
    if args.state is not None:
        safefile.check_target("state", args.state)
        if os.path.realpath(args.state) == os.path.realpath(args.out):
            raise ValueError(f"state: expected another file than --out, got {args.state}")
    recipe_of(args.method, args.ranks, SHARED[args.shared], args.chunk, args.positions, args.span)  # before a model
    selection_of(args.select)
    model, windows, _ = _read(args.model, args)
    begin = time.perf_counter()
    names = "method keep group_size ranks refine nested state shards bits bytes_per_token chunk positions span"
    choice: dict[str, Any] = {name: getattr(args, name) for name in (*names.split(), "select", "salient")}
    far = None if args.far is None else tuple(args.far)
    factors = compress(model, windows.split(1), shared=SHARED[args.shared], far=far, **choice)
    factors.save(args.out)
    seconds = time.perf_counter() - begin
    results = {"out": str(args.out), "windows": list(windows.shape), "seconds": seconds, **summarize(factors)}
    read = f"calibrated on {windows.shape[0]} windows of {windows.shape[1]} tokens, {seconds:.0f} s in all"
    return f"{headline(results)}\n{read}\nwrote {args.out}, {args.out.stat().st_size / 2**20:.1f} MiB", results


def _eval(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from lrattn.integrations.transformers.either import attending, new_cache
    from lrattn.integrations.transformers.perplexity import perplexity

    if args.read is not None and not 0 <= args.read < args.length:
        raise ValueError(f"read: expected fewer tokens than a window's {args.length}, got {args.read}")
    factors = _load_factors(args)
    model, windows, tokenizer = _read(args.model, args)
    factors = _fitted(factors, model, tokenizer, args)
    halved = args.read is None and factors is not None and factors.select is not None
    read = windows.shape[1] // 2 if halved else args.read or 0
    step = factors.near_or(args.recent, None)[0] or 1 if factors is not None and factors.span > 1 else 0
    cache = partial(new_cache, factors, args.recent, args.sinks) if read or step else None
    with attending(model, factors, args.recent, args.sinks):
        found = perplexity(model, windows, read=read, step=step, cache=cache)
    results = {
        **used(factors, args.recent, args.sinks),
        "perplexity": found,
        "windows": list(windows.shape),
        "read": read,
    }
    of = f"over {len(windows)} windows of {windows.shape[1]} tokens"
    of += f", of the tokens after the first {read}" if read else ""
    told, compared = unlike(model, factors, windows.split(1))
    return f"{made(results)}: perplexity {found:.3f} {of}{told}", results | compared


def _generate(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from lrattn.integrations.transformers.generate import generate
    from lrattn.integrations.transformers.load import load_model

    factors = _load_factors(args)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    factors = _fitted(factors, model, tokenizer, args)
    options = ("chat", "tokens", "beams", "temperature", "seed", "recent", "sinks")
    choice = {name: getattr(args, name) for name in options}
    results = {**used(factors, args.recent, args.sinks), **generate(model, tokenizer, factors, args.prompt, **choice)}
    speed = f"{results['tokens']} tokens, {results['tokens_per_second']:.1f} a second"
    return f"{results['text'].strip()}\n\n{made(results)}: {speed}, cache {results['cache_bytes']:,} bytes", results


def _info(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    if args.compressibility and args.plan:
        raise ValueError("plan: expected none with --compressibility, got --plan")
    plan, ranks, read = args.plan, args.compressibility, args.text is not None
    only = dict.fromkeys(("context", "batch", "query_heads"), (plan, "with --plan"))
    only |= {"plot": (ranks, "with --compressibility"), "text": (not plan, "without --plan")}
    only["device"] = plan or ranks or read, "with --plan, --compressibility or --text"
    for name, (allowed, told) in only.items():
        if not allowed and (given := getattr(args, name)) is not None:
            raise ValueError(f"{name.replace('_', '-')}: expected only {told}, got {given}")
    if plan or ranks or read:
        return (_plan if plan else _compressibility if ranks else _on_text)(args)
    summaries = {path: summarize(Factors.load(path)) for path in args.model}
    if len(summaries) > 1:
        return comparison(summaries), summaries
    (summary,) = summaries.values()
    return table(summary), summary


def _on_text(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """A file of factors, and what they lose of a text by the model that they were made of."""
    if len(args.model) > 1:
        raise ValueError(f"file: expected one file of factors with --text, got {len(args.model)}")
    factors, args.device = Factors.load(args.model[0]), args.device or "cpu"
    if factors.residual is None or not factors.model:
        raise ValueError("text: expected none, as the factors do not say what they lose of the text they were made of")
    model, windows, _ = _read(factors.model, args)
    told, compared = unlike(model, factors.to(model.device, model.dtype), windows.split(1))
    return f"{table(summary := summarize(factors))}\n{told}", summary | compared


def _plan(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from lrattn.attention import outlook

    if len(args.model) > 1:
        raise ValueError(f"file: expected one file of factors with --plan, got {len(args.model)}")
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    gpu: str = args.device or "h100"
    context, batch = (n if given is None else given for n, given in ((32768, args.context), (1, args.batch)))
    outlook.check(gpu, context, batch, dtype)  # before a file is read
    factors = Factors.load(args.model[0])
    heads = args.query_heads
    if heads is None:
        from lrattn.integrations.transformers.load import query_heads_of

        heads = query_heads_of(factors)
    results = outlook.outlook(factors.to(dtype=dtype), heads, gpu, context, batch)
    return outlook.table(results), results


def _compressibility(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    if args.text is None:
        raise ValueError("text: expected a file with --compressibility, got None")
    if len(args.model) > 1:
        raise ValueError(f"file: expected one model with --compressibility, got {len(args.model)}")
    (name,), figure = args.model, None
    args.device = "cpu" if args.device is None else args.device
    if args.plot is not None:
        safefile.check_target("plot", args.plot)
        figure = compressibility.canvas(args.plot)
    model, windows, _ = _read(name, args)
    lines, results = compressibility.measured(model, windows, figure, args.plot)
    return lines, {"model": name, "text": str(args.text)} | results


def _read(name: str, args: argparse.Namespace) -> tuple[Any, Tensor, Any]:
    """The model, windows of the text that it has positions for, and its tokenizer."""
    from lrattn.integrations.transformers.load import load_model, read_text, read_windows
    from lrattn.models.interface import positions_of

    text = read_text(args.text)
    model, tokenizer = load_model(name, args.dtype, args.device)
    windows, most = read_windows(tokenizer, text, args.length, args.windows), positions_of(model)
    if most is not None and windows.shape[1] > most:
        raise ValueError(f"length: expected at most {most} tokens, the model's positions, got {args.length}")
    return model, windows, tokenizer


def _load_factors(args: argparse.Namespace) -> Factors | None:
    """Those of a file; None where they are to be made, or there are none."""
    select, beside = selection_of(args.select), "with --factors" if args.factors else "without --factors or --method"
    alone = () if args.method else ("keep", "recent", "sinks", "select", "calibration")
    for name in ("method", "calibration") if args.factors else alone:
        if getattr(args, name):
            raise ValueError(f"{name}: expected none {beside}, got {getattr(args, name)}")
    if args.method is not None:
        check_method(args.method, args.keep, args.select, args.calibration is not None)
    if args.factors is None:
        return None
    factors = Factors.load(args.factors)
    factors = factors if args.keep is None else narrowed(factors, args.keep)
    return factors if select is None else replace(factors, select=select)


def _fitted(factors: Factors | None, model: Any, tokenizer: Any, args: argparse.Namespace) -> Factors | None:
    """In the model's dtype, on its device; of an older file with a write side of the model's. Or made by --method."""
    if factors is None:
        from lrattn.integrations.transformers.load import read_text, read_windows
        from lrattn.models.interface import positions_of

        text, length = args.calibration, min(1024, positions_of(model) or 1024)
        batches = text and read_windows(tokenizer, read_text(text, "calibration"), length, 16).split(1)
        return args.method and compress(model, batches, args.method, args.keep, select=args.select)
    factors = factors.to(model.device, model.dtype)
    older = any(side.of_inputs for layer in factors.layers for side in (layer.keys, layer.values))
    return in_kv_space(factors, model) if older else factors


if __name__ == "__main__":
    main()
