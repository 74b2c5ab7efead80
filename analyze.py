"""See the feature space of a network, and whether it over-clusters.

    python analyze.py runs/NAME                          # numbers and four pictures of a run
    python analyze.py runs/A runs/B random pixels        # side by side, on the images of A
    torchrun --nproc-per-node 8 analyze.py runs/NAME     # features shared out over eight GPUs

Shi et al. 2022 find that small contrastive models solve the pretext task without overfitting and
still make poor features, because they over-cluster: the space is grouped too tightly, into clusters
that do not follow the classes. This file measures each part of that sentence. A checkpoint is
whatever linear_eval.py takes, or `random` (the untrained network), or `pixels`. Into --out go
analysis.json, space.png, similarity.png, neighbours.png and, of runs, curves.png.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import linear_eval
from data import InputError, print0, rank_world
from linear_eval import alignment, extract, neighbours, uniformity, unit

# ---------------------------------------------------------------------------------- 1. the metrics
# Features are (N, D) and are normalized here; labels y (N,) are int64.

def instance_discrimination(query, positive, others, top=5):
    """acc@1..`top` in % (top,): is a query's positive among the j nearest of it and all `others`?

    All (N, D), row i of image i, whose own row in `others` does not count. For originals o and
    views a, b, (o, a, o) is mode o-a and (b, a, a) mode a-b of Shi et al. 2022. By cosine; a tie
    counts against the positive: a collapsed space has 0 %, not 100.
    """
    q, p, r = unit(query), unit(positive), unit(others)
    own = (q * p).sum(1) - 1e-6  # rounding must not decide a tie
    nearer = []
    for i in range(0, len(q), 1000):
        similarity = q[i:i + 1000] @ r.T
        similarity.diagonal(i).fill_(-2)  # the image itself
        nearer.append((similarity >= own[i:i + 1000, None]).sum(1))
    nearer = torch.cat(nearer)
    return torch.stack([100 * (nearer < j).float().mean() for j in range(1, top + 1)])

def class_distances(x, y):
    """Mean squared distance within and between the classes y of x (N, D), each 0..4.

    Within: over the pairs of a class, then over the classes (the intra-class alignment of Shi et
    al. 2022). Between: over all pairs of different classes. The squared distances of n unit vectors
    with sum s add up to 2 n^2 - 2 |s|^2 over ordered pairs, so no pair is ever formed.
    """
    x = unit(x)
    y = y.unique(return_inverse=True)[1]
    n = y.bincount().float()
    s = x.new_zeros(len(n), x.shape[1]).index_add_(0, y, x)
    sums = 2 * n ** 2 - 2 * s.square().sum(1)
    many = n > 1  # a class of one image has no pair
    within = (sums[many] / (n * (n - 1))[many]).mean()
    between = 2 * len(x) ** 2 - 2 * s.sum(0).square().sum() - sums.sum()
    return within, between / (len(x) ** 2 - (n ** 2).sum())

def effective_rank(x):
    """How many directions of centered x (N, D) are in use: exp of the entropy of its singular
    values (Roy & Vetterli 2007), 1 .. min(N - 1, D)."""
    x = unit(x)
    s = torch.linalg.svdvals((x - x.mean(0)).cpu().double())
    p = s / s.sum().clamp(min=1e-300)
    return torch.special.entr(p).sum().exp()

def best_nn(train_x, train_y, test_x, test_y, most=101):
    """{space: accuracy in %} of the best odd k up to `most` in an unweighted vote (Shi 2022).

    Spaces: features as they are (raw), normalized, or minus their mean and then normalized
    (shifted). Equal votes go to the class with the lower number.
    """
    mean = train_x.mean(0)
    spaces = dict(raw=(train_x, test_x), normalized=(unit(train_x), unit(test_x)),
                  shifted=(unit(train_x - mean), unit(test_x - mean)))
    best = {}
    for name, (train, test) in spaces.items():
        labels = train_y[neighbours(train, test, most)[1]]
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
                    alignment_ab=alignment(a, b), uniformity=uniformity(o), rank=effective_rank(o))
    if y.max() >= 0:
        within, between = class_distances(o, y)
        measures |= dict(intra=within, intra_views=class_distances(a, y)[0], ratio=within / between)
    return {name: float(value) for name, value in measures.items()}

# ------------------------------------------------------------------ 2. the table and the diagnosis

ROWS = {  # name in analysis.json -> row of the table
    "oa": "instance discrimination o-a, acc@1 %", "ab": "instance discrimination a-b, acc@1 %",
    "ab5": "instance discrimination a-b, acc@5 %", "alignment_oa": "alignment (o, a)",
    "alignment_ab": "alignment (a, b)", "intra": "intra-class alignment, originals",
    "intra_views": "intra-class alignment, views", "ratio": "intra-class / between-class distance",
    "uniformity": "uniformity", "rank": "effective rank", "nn_raw": "best-NN, raw %",
    "nn_normalized": "best-NN, normalized %", "nn_shifted": "best-NN, shifted %",
    "linear": "linear accuracy %"}

def table(results):
    """Markdown: a row a metric, a column a checkpoint; train / held-out where both are measured."""
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    for key, text in ROWS.items():
        digits = 1 if "%" in text or key == "rank" else 3
        cells = []
        for r in results.values():
            parts = [r[split] for split in ("train", "held-out") if key in r.get(split, {})]
            cells.append(" / ".join(f"{part[key]:.{digits}f}" for part in parts))
        if any(cells):
            lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

def over_clusters(a, b):
    """Does the space with held-out measures a over-cluster beside that with b? (Shi et al. 2022)

    It has learned the pretext task, too (a quarter of the images, and half as many as b); it is
    tighter and less spread; and yet its neighbours and its linear probe are worse.
    """
    learned = a["ab"] >= max(25, b["ab"] / 2)
    tighter = a["intra"] < b["intra"] and a["uniformity"] > b["uniformity"]
    worse = a["nn_normalized"] < b["nn_normalized"] and a["linear"] < b["linear"]
    return learned and tighter and worse

def verdict(name, results):
    """What the numbers of `name` say: of it alone whether it overfits the pretext task, and beside
    the others whether it over-clusters, which is a comparison."""
    train = results[name]["train"]
    held = results[name].get("held-out", train)
    n = results[name]["images"]
    text = f"{name}: {held['ab']:.0f} % of {n} images find their other view first"
    if held is not train:
        gap = train["ab"] - held["ab"]
        error = math.sqrt(2 * max(held["ab"] * (100 - held["ab"]), 100) / n)  # of that difference
        overfits = gap > max(5, 2 * error)
        text += f" ({gap:+.1f} in training: {'overfitted' if overfits else 'not overfitted'})"
    for other, r in results.items():
        if "linear" in held and over_clusters(held, r["held-out"]):
            b = r["held-out"]
            text += (f"; beside {other} it over-clusters: tighter (intra-class alignment "
                     f"{held['intra']:.3f} < {b['intra']:.3f}), less spread (uniformity "
                     f"{held['uniformity']:.3f} > {b['uniformity']:.3f}), yet best-NN is "
                     f"{b['nn_normalized'] - held['nn_normalized']:.1f} and linear accuracy "
                     f"{b['linear'] - held['linear']:.1f} points lower")
    return text

# ------------------------------------------------------------------ 3. the space in two dimensions

def pca(x):
    """Coordinates (N, 2) of x (N, D) along its two directions of largest variance."""
    x = x.double()
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    p = u[:, :2] * s[:2]
    return (p * p.gather(0, p.abs().argmax(0, keepdim=True)).sign()).float()  # signs are arbitrary

def tsne(x, perplexity=30, steps=1000):
    """Coordinates (N, 2) of x (N, D), N to about 2,000, by t-SNE (van der Maaten & Hinton 2008) in
    steps of N / 12 (Belkina et al. 2019)."""
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
    y = pca(x)
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

# --------------------------------------------------------------------------------- 4. the pictures

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555")  # Okabe, Ito
ZOOM = 2  # pictures are drawn twice as large, then shrunk
SIDE = 400  # of a panel

class Sheet:
    """A picture with panels of SIDE x SIDE, pairs of axes with points and lines in their data."""

    def __init__(self, width, height):
        self.picture = Image.new("RGB", (ZOOM * width, ZOOM * height), "white")
        self.draw = ImageDraw.Draw(self.picture)

    def text(self, x, y, text, size=12, anchor="lm"):
        font = ImageFont.load_default(ZOOM * size)
        self.draw.text((ZOOM * x, ZOOM * y), text, "black", font, anchor=anchor)

    def panel(self, column, row, points, title, x_name="", y_name=""):
        """Turn to a panel, whose axes span `points` (n, 2)."""
        self.left = SIDE * column + 62
        self.top = SIDE * row + 34
        self.low = np.min(points, 0)
        self.span = np.maximum(np.max(points, 0) - self.low, 1e-9)
        self.draw.rectangle([ZOOM * v for v in (self.left - 8, self.top - 8, self.left + 328,
                                                self.top + 318)], outline="#888888", width=ZOOM)
        self.text(self.left, self.top - 20, title, 14)
        self.text(self.left + 160, self.top + 350, x_name, anchor="mm")
        self.text(self.left, self.top + 350, y_name)
        for share in (0, 0.5, 1):
            x, y = self.low + share * self.span
            self.text(self.left + 320 * share, self.top + 330, f"{x:.3g}", 11, "mm")
            self.text(self.left - 12, self.top + 310 * (1 - share), f"{y:.3g}", 11, "rm")

    def at(self, point):
        x, y = (np.asarray(point) - self.low) / self.span
        return ZOOM * (self.left + 320 * x), ZOOM * (self.top + 310 * (1 - y))

    def dot(self, x, y, kind, radius=3):
        """At pixels x, y, in the color of class `kind`."""
        r = ZOOM * radius
        self.draw.ellipse((x - r, y - r, x + r, y + r), COLORS[kind % len(COLORS)])

    def line(self, points, color, width=2):
        self.draw.line([self.at(p) for p in points], color, ZOOM * width, joint="curve")

    def legend(self, names, x, y):
        for i, name in enumerate(names):
            self.dot(ZOOM * (x - 10), ZOOM * (y + 17 * i), i, 4)
            self.text(x, y + 17 * i, name)

    def save(self, path):
        size = (self.picture.width // ZOOM, self.picture.height // ZOOM)
        self.picture.resize(size, Image.LANCZOS).quantize(256).save(path)

def draw_space(samples, classes, path):
    """t-SNE and PCA of the originals by class; below, the originals of a class and their views."""
    sheet = Sheet(SIDE * len(samples) + 140, SIDE * 3)
    shown = classes[:len(COLORS)]
    for column, (name, s) in enumerate(samples.items()):
        rows = (s["y"] < len(COLORS)).nonzero()[:700, 0]
        for row, (method, project) in enumerate({"t-SNE": tsne, "PCA": pca}.items()):
            p = project(unit(s["o"][rows])).numpy()
            sheet.panel(column, row, p, f"{name}: {method}, {len(shown)} of {len(classes)} classes")
            for point, label in zip(p, s["y"][rows].tolist()):
                sheet.dot(*sheet.at(point), max(0, label))
        one = (s["y"] == s["y"][0]).nonzero()[:50, 0]
        p = tsne(unit(torch.cat([s[view][one] for view in "oab"]))).numpy()
        what = classes[s["y"][0]] if classes else "images"
        sheet.panel(column, 2, p, f"{name}: {what}, two views each")
        for original, a, b in zip(*np.split(p, 3)):
            sheet.line([a, original, b], "#AAAAAA", 1)
            for kind, point in enumerate((original, a, b)):
                sheet.dot(*sheet.at(point), kind)
    sheet.legend(shown, SIDE * len(samples) + 20, 40)
    sheet.legend(["original", "view a", "view b"], SIDE * len(samples) + 20, 2 * SIDE + 40)
    sheet.save(path)

def draw_similarity(samples, path):
    """Densities of the cosines of two views of an image, of images of a class, and of others."""
    sheet = Sheet(SIDE * len(samples), SIDE)
    for column, (name, s) in enumerate(samples.items()):
        o = unit(s["o"])
        pairs = torch.triu_indices(len(o), len(o), 1)
        cosine = (o @ o.T)[pairs[0], pairs[1]]
        same = s["y"][pairs[0]] == s["y"][pairs[1]]
        kinds = {"two views": (unit(s["a"]) * unit(s["b"])).sum(1), "two images": cosine}
        if s["y"].max() >= 0:
            kinds = {"two views": kinds["two views"], "same class": cosine[same],
                     "other class": cosine[~same]}
        low = min(value.min().item() for value in kinds.values())
        x = low + (torch.arange(40) + 0.5) * (1 - low) / 40
        curves = {}
        for kind, value in kinds.items():
            density = torch.histc(value, 40, low, 1) / len(value) * 40 / (1 - low)
            curves[kind] = torch.stack([x, density], 1).numpy()
        points = np.concatenate(list(curves.values()))
        sheet.panel(column, 0, points, name, "cosine similarity", "density")
        for color, curve in zip(COLORS, curves.values()):
            sheet.line(curve, color)
        sheet.legend(curves, sheet.left + 20, sheet.top + 10)
    sheet.save(path)

def draw_neighbours(samples, train, held, path, cell=64):
    """Query images, one a row, and their nearest training images; another class is framed."""
    first = next(iter(samples.values()))
    width = (first["near"].shape[1] + 1) * (cell + 4) + 30
    height = len(first["query"]) * (cell + 4) + 34
    sheet = Sheet(width * len(samples), height)
    for column, (name, s) in enumerate(samples.items()):
        sheet.text(width * column + 8, 16, f"{name}: query, its nearest (framed: another class)")
        for r, query in enumerate(s["query"].tolist()):
            images = [(held, query)] + [(train, row) for row in s["near"][r].tolist()]
            for c, (source, row) in enumerate(images):
                pixels = source.pixels[row].permute(1, 2, 0).cpu().numpy()
                x = ZOOM * (width * column + 8 + c * (cell + 4) + (8 if c > 0 else 0))
                y = ZOOM * (30 + r * (cell + 4))
                side = ZOOM * cell
                sheet.picture.paste(Image.fromarray(pixels).resize((side, side)), (x, y))
                if source.labels[row] != held.labels[query]:
                    sheet.draw.rectangle((x, y, x + side, y + side), outline="#D55E00", width=6)
    sheet.save(path)

def draw_curves(logs, path):
    """Loss, instance accuracy and kNN (without labels: uniformity) by epoch, of runs' logs.

    Runs named NAME-seed0, NAME-seed1 .. share a color.
    """
    groups = [name.split("-seed")[0] for name in logs]
    kinds = list(dict.fromkeys(groups))
    keys = [key for key in ("loss", "instance_accuracy", "knn", "uniformity")
            if any(key in entry for log in logs.values() for entry in log)]
    sheet = Sheet(SIDE * len(keys), SIDE)
    for column, key in enumerate(keys):
        curves = [[(entry["epoch"], entry[key]) for entry in log if key in entry]
                  for log in logs.values()]
        points = [point for curve in curves for point in curve]
        sheet.panel(column, 0, points, key.replace("_", " "), "epoch")
        for group, curve in zip(groups, curves):
            sheet.line(curve, COLORS[kinds.index(group) % len(COLORS)])
    sheet.legend(kinds, 90, SIDE - 100 - 17 * len(kinds))
    sheet.save(path)

# -------------------------------------------------------------------------------------- 5. the run

def sample_rows(images, args):
    """--per-class images of each class, or without labels ten times as many."""
    if images.classes:
        return linear_eval.labelled_subset(images.labels, str(args.per_class), args.seed)
    order = torch.randperm(len(images), generator=data.seeded("sample", args.seed))
    return order[:10 * args.per_class]

def look(net, train, held, size, args):
    """(measures, what the pictures need) of one network."""
    splits = {"train": train}
    if held is not None:
        splits["held-out"] = held
    sampled = {split: sample_rows(images, args) for split, images in splits.items()}
    n = min(len(rows) for rows in sampled.values())  # of each: among fewer, one is found sooner
    if n < 2:
        raise InputError(f"--data: a sample of {n} image is too few to compare; add some")
    measures = dict(images=n)
    for split, images in splits.items():
        order = torch.randperm(len(sampled[split]), generator=data.seeded("part", args.seed))
        rows = sampled[split][order[:n].sort()[0]]
        draw = data.seeded("views", args.seed, split)
        views = torch.rand(2, n, data.COLUMNS, generator=draw)
        o, y = extract(net, images, size, rows)
        a, b = [extract(net, images, size, rows, u)[0] for u in views]
        measures[split] = instance_metrics(o, a, b, y)
    sample = dict(o=o.cpu(), a=a.cpu(), b=b.cpu(), y=y.cpu())

    # on whole splits: neighbours and the linear probe
    rows = (train.labels >= 0).nonzero()[:, 0] if train.classes else None
    train_x, train_y = extract(net, train, size, rows)
    if train.classes:
        test_x, test_y = extract(net, held, size)
        probe = linear_eval.linear_probe(train_x, train_y, len(train.classes))
        measures["held-out"]["linear"] = linear_eval.accuracy(*probe, test_x, test_y)
        for space, value in best_nn(train_x, train_y, test_x, test_y).items():
            measures["held-out"][f"nn_{space}"] = value

    # eight queries and their nearest training images; without held-out ones, not the query itself
    source = train if held is None else held
    sample["query"] = torch.randperm(len(source), generator=data.seeded("queries", args.seed))[:8]
    queries = extract(net, source, size, sample["query"])[0]
    near = neighbours(unit(train_x), unit(queries), 9)[1].cpu()
    near = near[:, 1:] if held is None else near[:, :8]
    sample["near"] = near if rows is None else rows[near]
    return measures, sample

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="+", help="runs, checkpoint files, random, pixels")
    linear_eval.add_common_flags(parser)
    parser.add_argument("--per-class", type=int, default=50,
                        help="images of a class in the sample, for all but best-NN and linear [50]")
    args = parser.parse_args(argv)
    if args.per_class < 2:
        raise InputError(f"--per-class {args.per_class}: must be at least 2")
    device = data.start(args.device)
    names = list(dict.fromkeys(args.checkpoint))
    names.sort(key=lambda name: name in ("random", "pixels"))  # words follow the first checkpoint
    results = {}
    samples = {}
    loaded = {}
    for name in names:
        source = "random" if name == "pixels" else name
        state, own = linear_eval.read_checkpoint(source, args)
        if name == names[0]:
            first = own
        own.data, own.root, own.keep = first.data, first.root, first.keep
        if state is None:
            own.arch, own.stem, own.size = first.arch, first.stem, first.size
        if own.size not in loaded:
            loaded[own.size] = data.load(own.data, own.root, own.size, own.keep, device)
        train, held, own.size = loaded[own.size]
        if train.classes:
            linear_eval.check_labels(train, held, own.data)
        if name == "pixels":
            net = linear_eval.Pixels()
        else:
            net = linear_eval.load_network(state, own, device)
        print0(f"{name}: {own.arch} at {own.size} pixels on {own.data}")
        results[name], samples[name] = look(net, train, held, own.size, args)
    if rank_world()[0] == 0:
        write(results, samples, train, held, args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return results

def write(results, samples, train, held, args):
    """Print the table and the verdicts, and write all files."""
    n = next(iter(results.values()))["images"]
    print(f"\n{table(results)}\n\ntrain / held-out, {n} images each; best-NN and linear accuracy "
          "on whole splits\n")
    for name, r in results.items():
        r["verdict"] = verdict(name, results)
        print(f"- {r['verdict']}.")
    first = Path(next(iter(results)))
    if not first.is_dir():
        first = Path("runs")
    out = Path(args.out or first / "analysis")
    out.mkdir(parents=True, exist_ok=True)
    data.save(out / "analysis.json", json.dumps(results, indent=1))
    short = [Path(name).name for name in results]
    if len(set(short)) < len(short):
        short = list(results)
    samples = dict(zip(short, samples.values()))
    draw_space(samples, train.classes, out / "space.png")
    draw_similarity(samples, out / "similarity.png")
    draw_neighbours(samples, train, held or train, out / "neighbours.png")
    logs = {}
    for name, path in zip(short, map(Path, results)):
        file = path / "log.jsonl" if path.is_dir() else path.parent / "log.jsonl"
        if file.is_file():
            logs[name] = [json.loads(line) for line in file.read_text().splitlines()]
    if logs:
        draw_curves(logs, out / "curves.png")
    print(f"\nIn {out}: analysis.json, space.png, similarity.png, neighbours.png"
          f"{', curves.png' if logs else ''}")

if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:  # OSError: a folder or disk that cannot be written
        sys.exit(f"analyze.py: {error}")
