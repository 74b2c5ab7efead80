"""See the feature space of a network, and whether it over-clusters.

    python analyze.py runs/NAME                          # numbers and pictures of a run
    python analyze.py runs/A runs/B random pixels        # side by side, on the images of A
    torchrun --nproc-per-node 8 analyze.py runs/NAME     # features shared out over eight GPUs

Shi et al. 2022 find that small contrastive models solve the pretext task without overfitting and
still make poor features, because they over-cluster: the space is grouped too tightly, into clusters
that do not follow the classes. This file measures each part of that sentence. A checkpoint is
whatever linear_eval.py takes, or `random` (the untrained network), or `pixels`. Into --out go
analysis.json, map.png, similarity.png and, of runs, curves.png.
"""
import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
from data import InputError, init_device, print0, rank_world, save, seeded
from linear_eval import (Parser, Pixels, accuracy, add_common_flags, check_labels, extract,
                         instance_discrimination, labelled_subset, linear_probe, neighbours, number,
                         open_checkpoint, to_evaluate, unit)

# ---------------------------------------------------------------------------------- 1. the metrics
# Features are (N, D) and are normalized here; labels y (N,) are int64. The first one, instance
# discrimination, stands in linear_eval.py: it also judges a run without labels.

def alignment(a, b):
    """Mean squared distance of pairs a, b (N, D): 0 (views agree) .. 4 (Wang & Isola 2020)."""
    return (unit(a) - unit(b)).square().sum(1).mean()

def uniformity(x):
    """log of the mean of exp(-2 d^2) over all pairs of x (N, D): about -4 (evenly spread) .. 0
    (collapsed). Wang & Isola 2020, t 2; exact: every pair once, in blocks."""
    x = unit(x)
    n = len(x)
    total = 0.0
    for i in range(0, n, 1000):
        similarity = x[i:i + 1000] @ x[i:].T  # d^2 = 2 - 2 similarity
        total += (4 * similarity - 4).exp().triu(1).sum().item()
    return math.log(total / (n * (n - 1) / 2))

def intra_class_alignment(x, y):
    """Mean squared distance over the pairs of a class, then over the classes y of x (N, D): 0..4
    (Shi et al. 2022). The squared distances of n unit vectors with sum s add up to 2 n^2 - 2 |s|^2
    over ordered pairs, so no pair is ever formed."""
    x = unit(x)
    y = y.unique(return_inverse=True)[1]
    n = y.bincount().float()
    s = x.new_zeros(len(n), x.shape[1]).index_add_(0, y, x)
    sums = 2 * n ** 2 - 2 * s.square().sum(1)
    many = n > 1  # a class of one image has no pair
    return (sums[many] / (n * (n - 1))[many]).mean()

def best_nn(train_x, train_y, test_x, test_y, most=101):
    """{space: accuracy in %} of the best odd k up to `most` in an unweighted vote (Shi 2022, who
    pick k on the test images, too).

    Spaces: features as they are (raw), normalized, or minus their mean and then normalized
    (shifted). Equal votes go to the class with the lower number.
    """
    mean = train_x.mean(0)
    spaces = dict(raw=(train_x, test_x), normalized=(unit(train_x), unit(test_x)),
                  shifted=(unit(train_x - mean), unit(test_x - mean)))
    best = {}
    for name, (train, test) in spaces.items():
        labels = train_y[neighbours(train, test, most)[1]]  # (n, most), nearest first
        votes = F.one_hot(labels[:, 0], int(train_y.max()) + 1)
        best[name] = 0.0
        for k in range(1, labels.shape[1] + 1, 2):
            if k > 1:  # two more neighbours vote
                votes.scatter_add_(1, labels[:, k - 2:k], torch.ones_like(labels[:, k - 2:k]))
            right = (votes.argmax(1) == test_y).float().mean().item()
            best[name] = max(best[name], 100 * right)
    return best

def instance_metrics(o, a, b, y):
    """All metrics of one sample of images: features of originals and two views, labels or -1."""
    oa = instance_discrimination(o, a, o)
    ab = instance_discrimination(b, a, a)
    measures = dict(oa=oa[0], ab=ab[0], ab5=ab[4], alignment_oa=alignment(o, a),
                    alignment_ab=alignment(a, b), uniformity=uniformity(o))
    if y.max() >= 0:
        measures["intra"] = intra_class_alignment(o, y)
        measures["intra_views"] = intra_class_alignment(a, y)
    return {name: float(value) for name, value in measures.items()}

# ------------------------------------------------------------------ 2. the table and the diagnosis

ROWS = {  # name in analysis.json -> row of the table
    "oa": "instance discrimination o-a, acc@1 %",
    "ab": "instance discrimination a-b, acc@1 %",
    "ab5": "instance discrimination a-b, acc@5 %",
    "alignment_oa": "alignment (o, a)",
    "alignment_ab": "alignment (a, b)",
    "intra": "intra-class alignment, originals",
    "intra_views": "intra-class alignment, views",
    "uniformity": "uniformity",
    "nn_raw": "best-NN, raw %",
    "nn_normalized": "best-NN, normalized %",
    "nn_shifted": "best-NN, shifted %",
    "linear": "linear accuracy %",
}

def table(results):
    """Markdown: a row a metric, a column a checkpoint; train / held-out where both are measured."""
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    for key, text in ROWS.items():
        digits = 1 if "%" in text else 3
        cells = []
        for r in results.values():
            parts = [r[split] for split in ("train", "held-out") if key in r.get(split, {})]
            cells.append(" / ".join(f"{part[key]:.{digits}f}" for part in parts))
        if any(cells):
            lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

def diagnosis(results):
    """A sentence for each pair of trained networks of which all held-out numbers agree with Shi et
    al. 2022: one over-clusters beside the other. It is tighter and less spread, and yet its
    neighbours and its linear probe are worse."""
    lines = []
    held = {name: r["held-out"] for name, r in results.items()
            if "linear" in r.get("held-out", {}) and name not in ("random", "pixels")}
    for name, a in held.items():
        for other, b in held.items():
            tighter = a["intra"] < b["intra"] and a["uniformity"] > b["uniformity"]
            worse = a["nn_normalized"] < b["nn_normalized"] and a["linear"] < b["linear"]
            if tighter and worse:
                lines.append(
                    f"{name} over-clusters beside {other}: intra-class alignment {a['intra']:.3f} "
                    f"< {b['intra']:.3f} and uniformity {a['uniformity']:.3f} > "
                    f"{b['uniformity']:.3f}, yet best-NN is "
                    f"{b['nn_normalized'] - a['nn_normalized']:.1f} and linear accuracy "
                    f"{b['linear'] - a['linear']:.1f} points lower; {a['ab']:.0f} and "
                    f"{b['ab']:.0f} % of the images find their other view first")
    return lines

# -------------------------------------------------------------------- 3. the map, and the pictures

def tsne(x, perplexity=30, steps=1000):
    """Coordinates (N, 2) of x (N, D), N to about 2,000, by t-SNE (van der Maaten & Hinton 2008),
    with a learning rate of N / 12 (Belkina et al. 2019)."""
    n = len(x)
    perplexity = min(perplexity, (n - 1) / 3)
    d = torch.cdist(x.float(), x.float()).square()
    d = (d / d.mean().clamp(min=1e-30)).fill_diagonal_(math.inf)
    low = torch.zeros(n, 1)
    high = torch.full((n, 1), math.inf)
    beta = torch.ones(n, 1)
    for _ in range(40):  # bisect each point's precision until its neighbourhood has the perplexity
        p = (-beta * d).softmax(1)
        too_wide = torch.special.entr(p).sum(1, keepdim=True) > math.log(perplexity)
        low = torch.where(too_wide, beta, low)
        high = torch.where(too_wide, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    p = (p + p.T) / (2 * n)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    y = u[:, :2] * s[:2]  # starts as the two directions of largest variance, small
    y = 1e-4 * y / y[:, 0].std().clamp(min=1e-30)
    velocity = torch.zeros_like(y)
    gain = torch.ones_like(y)
    for step in range(steps):
        is_early = step < 250  # early exaggeration
        w = 1 / (1 + torch.cdist(y, y).square())
        w.fill_diagonal_(0)
        force = w * ((12 * p if is_early else p) - w / w.sum())
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        gain = torch.where(gradient * velocity < 0, gain + 0.2, gain * 0.8).clamp_(min=0.01)
        velocity = (0.5 if is_early else 0.8) * velocity - n / 12 * gain * gradient
        y = y + velocity
    return y - y.mean(0)

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555")  # Okabe, Ito
ZOOM = 2  # pictures are drawn twice as large, then shrunk
SIDE = 400  # of a panel
INSIDE = 310  # of its axes

class Sheet:
    """A picture with panels of SIDE x SIDE, pairs of axes with points and lines in their data."""

    def __init__(self, width, height):
        self.picture = Image.new("RGB", (ZOOM * width, ZOOM * height), "white")
        self.draw = ImageDraw.Draw(self.picture)

    def text(self, x, y, text, size=12, anchor="lm"):
        font = ImageFont.load_default(ZOOM * size)
        self.draw.text((ZOOM * x, ZOOM * y), text, "black", font, anchor=anchor)

    def panel(self, column, points, title, x_name, y_name=""):
        """Turn to a panel, whose axes span `points` (n, 2), from one round number to another."""
        self.left = SIDE * column + 62
        self.top = 44
        points = np.asarray(points)
        ticks = [round_range(points[:, i].min(), points[:, i].max()) for i in (0, 1)]
        self.low = np.array([ticks[0][0], ticks[1][0]])
        self.span = np.array([ticks[0][-1], ticks[1][-1]]) - self.low
        corners = (self.left, self.top, self.left + INSIDE, self.top + INSIDE)
        self.draw.rectangle([ZOOM * v for v in corners], outline="#888888", width=ZOOM)
        self.text(self.left, self.top - 26, title, 14)
        self.text(self.left, self.top - 10, y_name, 11)
        self.text(self.left + INSIDE / 2, self.top + INSIDE + 32, x_name, 12, "mm")
        for x in ticks[0]:
            at = self.at((x, self.low[1]))[0] / ZOOM
            self.text(at, self.top + INSIDE + 12, f"{x:g}", 11, "mm")
        for y in ticks[1]:
            self.text(self.left - 6, self.at((self.low[0], y))[1] / ZOOM, f"{y:g}", 11, "rm")

    def at(self, point):
        x, y = (np.asarray(point) - self.low) / self.span
        return ZOOM * (self.left + INSIDE * x), ZOOM * (self.top + INSIDE * (1 - y))

    def line(self, points, color, width=2):
        self.draw.line([self.at(p) for p in points], color, ZOOM * width, joint="curve")

    def legend(self, names, x, y):
        for i, name in enumerate(names):
            dot = (x - 14, y + 17 * i - 4, x - 6, y + 17 * i + 4)
            self.draw.ellipse([ZOOM * v for v in dot], COLORS[i % len(COLORS)])
            self.text(x, y + 17 * i, name)

    def save(self, path):
        size = (self.picture.width // ZOOM, self.picture.height // ZOOM)
        self.picture.resize(size, Image.LANCZOS).quantize(256).save(path)

def round_range(low, high):
    """Three to eight round numbers, evenly spaced, that span low..high."""
    high = max(high, low + 1e-6)
    step = 10.0 ** math.floor(math.log10(high - low))
    step *= min(part for part in (0.2, 0.5, 1, 2) if (high - low) / (part * step) <= 6)
    first = math.floor(low / step + 1e-6)
    last = math.ceil(high / step - 1e-6)
    return [round(i * step, 9) for i in range(first, last + 1)]

def draw_map(samples, images, path, side=20, cell=32):
    """Images where t-SNE puts them, each in the nearest free cell of a grid: what lies close
    together is alike to the network."""
    side = min(side, math.ceil(min(len(s["o"]) for s in samples.values()) ** 0.5))
    sheet = Sheet((side * cell + 20) * len(samples), side * cell + 40)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    for column, (name, s) in enumerate(samples.items()):
        some = torch.randperm(len(s["o"]), generator=seeded("map"))[:side * side]
        p = tsne(unit(s["o"][some]))
        p = p.argsort(0).argsort(0) / len(p) * (side - 1)  # evenly spread along both axes
        left = (side * cell + 20) * column + 10
        sheet.text(left, 16, f"{name}: where t-SNE puts {len(some)} images", 14)
        free = places.clone()
        for point, row in zip(p, s["rows"][some]):
            nearest = (free - point).square().sum(1).argmin()
            x, y = (free[nearest] * cell).tolist()
            free[nearest] = math.inf
            pixels = images.pixels[row].permute(1, 2, 0).cpu().numpy()
            tile = Image.fromarray(pixels).resize((ZOOM * cell, ZOOM * cell))
            sheet.picture.paste(tile, (round(ZOOM * (left + x)), round(ZOOM * (30 + y))))
    sheet.save(path)

def cosines(s, most=1000):
    """{kind: cosines} of a sample: two views of an image, images of a class, and of others."""
    some = torch.randperm(len(s["o"]), generator=seeded("pairs"))[:most]
    o = unit(s["o"][some])
    y = s["y"][some]
    i, j = torch.triu_indices(len(o), len(o), 1)
    cosine = (o @ o.T)[i, j]
    kinds = {"two views": (unit(s["a"]) * unit(s["b"])).sum(1)}
    if y.max() < 0:
        return kinds | {"two images": cosine}
    return kinds | {"same class": cosine[y[i] == y[j]], "other class": cosine[y[i] != y[j]]}

def draw_similarity(samples, path, bins=32):
    """Densities of `cosines`, on the same axes for all networks."""
    sheet = Sheet(SIDE * len(samples), SIDE)
    x = (torch.arange(bins) + 0.5) * 2 / bins - 1
    curves = {}
    for name, s in samples.items():
        curves[name] = {}
        for kind, value in cosines(s).items():
            density = torch.histc(value, bins, -1, 1) / max(1, len(value)) * bins / 2
            curves[name][kind] = torch.stack([x, density], 1).numpy()
    points = np.concatenate([curve for kinds in curves.values() for curve in kinds.values()])
    for column, (name, kinds) in enumerate(curves.items()):
        sheet.panel(column, points, name, "cosine similarity", "density")
        for color, curve in zip(COLORS, kinds.values()):
            sheet.line(curve, color)
        sheet.legend(kinds, sheet.left + 20, sheet.top + 14)
    sheet.save(path)

def draw_curves(logs, path):
    """Loss, instance accuracy and kNN (without labels: found) of runs' logs, by minutes trained.

    Runs named NAME-seed0, NAME-seed1 .. share a color.
    """
    groups = [name.split("-seed")[0] for name in logs]
    kinds = list(dict.fromkeys(groups))
    keys = [key for key in ("loss", "instance_accuracy", "knn", "found")
            if any(key in entry for log in logs.values() for entry in log)]
    sheet = Sheet(SIDE * len(keys) + 140, SIDE)
    for column, key in enumerate(keys):
        curves = [[(entry["minutes"], entry[key]) for entry in log if key in entry]
                  for log in logs.values()]
        points = [point for curve in curves for point in curve]
        sheet.panel(column, points, key.replace("_", " "), "minutes")
        for group, curve in zip(groups, curves):
            sheet.line(curve, COLORS[kinds.index(group) % len(COLORS)])
    sheet.legend(kinds, SIDE * len(keys) + 20, 60)
    sheet.save(path)

# -------------------------------------------------------------------------------------- 4. the run

def sample_splits(train, held, args):
    """{split: (images, rows)}: --per-class images of each class, or without labels ten times as
    many; as many of both splits, because among fewer one is found sooner."""
    splits = {"train": train}
    if held is not None:
        splits["held-out"] = held
    sampled = {}
    for split, images in splits.items():
        if images.classes:
            rows = labelled_subset(images.labels, str(args.per_class), args.seed)
        else:
            rows = torch.arange(len(images))
        order = torch.randperm(len(rows), generator=seeded("part", args.seed))
        sampled[split] = rows[order]
    n = min([len(rows) for rows in sampled.values()])
    if not train.classes:
        n = min(n, 10 * args.per_class)
    if n < 2:
        raise InputError(f"--data: a sample of {n} image is too few to compare; add some")
    return {split: (splits[split], rows[:n].sort()[0]) for split, rows in sampled.items()}

def look(net, train, held, size, args):
    """(measures, what the pictures need) of one network. Views are MoCo v2's, whatever the network
    was trained with, so that networks can be compared."""
    measures = {}
    for split, (images, rows) in sample_splits(train, held, args).items():
        draw = seeded("views", args.seed, split)
        views = torch.rand(2, len(rows), data.COLUMNS, generator=draw)
        o, y = extract(net, images, size, rows)
        a, b = [extract(net, images, size, rows, u)[0] for u in views]
        measures["images"] = len(rows)
        measures[split] = instance_metrics(o, a, b, y)
        sample = dict(o=o.cpu(), a=a.cpu(), b=b.cpu(), y=y.cpu(), rows=rows)
    if train.classes:  # neighbours and the linear probe, on whole splits
        train_x, train_y = extract(net, train, size, (train.labels >= 0).nonzero()[:, 0])
        test_x, test_y = extract(net, held, size)
        weight, bias = linear_probe(train_x, train_y, len(train.classes))
        measures["held-out"]["linear"] = accuracy(weight, bias, test_x, test_y)
        for space, value in best_nn(train_x, train_y, test_x, test_y).items():
            measures["held-out"][f"nn_{space}"] = value
    return measures, sample

def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", nargs="+", help="runs, checkpoint files, random, pixels")
    add_common_flags(parser)
    parser.add_argument("--per-class", type=partial(number, 2, 1e6, int), default=50,
                        help="images of a class in the sample, for all but best-NN and linear [50]")
    args = parser.parse_args(argv)
    device = init_device(args.device)

    # the networks; the first one says which images, `random` and `pixels` have its size, too
    names = list(dict.fromkeys(args.checkpoint))
    names.sort(key=lambda name: name in ("random", "pixels"))
    networks = {}
    first = args
    for name in names:
        known = ("data", "root", "keep")
        if name in ("random", "pixels"):
            known += ("arch", "stem", "size")
        flags = argparse.Namespace(**vars(args) | {key: getattr(first, key) for key in known})
        net, flags = open_checkpoint("random" if name == "pixels" else name, flags)
        networks[name] = (Pixels() if name == "pixels" else to_evaluate(net, device), flags)
        if name == names[0]:
            first = flags

    # the images, once for each size; then what each network makes of them
    loaded = {}
    results = {}
    samples = {}
    for name, (net, flags) in networks.items():
        if flags.size not in loaded:
            loaded[flags.size] = data.load(flags.data, flags.root, flags.size, flags.keep, device)
        train, held, size = loaded[flags.size]
        if train.classes:
            check_labels(train, held, flags.data)
        print0(f"{name}: {flags.arch} at {size} pixels on {flags.data}")
        results[name], samples[name] = look(net, train, held, size, args)
    if rank_world()[0] == 0:
        write(results, samples, train, held, args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return results

def write(results, samples, train, held, args):
    """Print the table and the diagnosis, and write all files."""
    n = next(iter(results.values()))["images"]
    print(f"\n{table(results)}\n\ntrain / held-out, {n} images each; best-NN and linear accuracy "
          "on whole splits\n")
    for sentence in diagnosis(results):
        print(f"- {sentence}.")
    first = Path(next(iter(results)))
    if not first.is_dir():
        first = Path("runs")
    out = Path(args.out or first / "analysis")
    out.mkdir(parents=True, exist_ok=True)
    save(out / "analysis.json", json.dumps(results, indent=1))
    short = [Path(name).name for name in results]
    if len(set(short)) < len(short):
        short = list(results)
    samples = dict(zip(short, samples.values()))
    draw_map(samples, held or train, out / "map.png")
    draw_similarity(samples, out / "similarity.png")
    logs = {}
    for name, path in zip(short, map(Path, results)):
        file = path / "log.jsonl" if path.is_dir() else path.parent / "log.jsonl"
        if file.is_file():
            log = [json.loads(line) for line in file.read_text().splitlines()]
            if log and "minutes" in log[0]:  # older logs have none
                logs[name] = log
    if logs:
        draw_curves(logs, out / "curves.png")
    print(f"\nIn {out}: analysis.json, map.png, similarity.png"
          f"{', curves.png' if logs else ''}")

if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:  # OSError: a folder or disk that cannot be written
        sys.exit(f"analyze.py: {error}")
