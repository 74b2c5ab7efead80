"""See the feature space of a network, and whether it over-clusters.

    python analyze.py runs/NAME                                  # numbers, a verdict and four pictures of a run
    python analyze.py runs/A runs/B random pixels --data FOLDER  # side by side, on these images
    torchrun --nproc-per-node 8 analyze.py runs/NAME             # features shared out over eight GPUs

Shi et al. 2022 find that small contrastive models solve the pretext task without overfitting and still make poor
features, because they over-cluster: the space is grouped too tightly, into clusters that do not follow the classes.
This file measures each part of that sentence. A checkpoint is whatever linear_eval.py takes, or the word `random`
(the untrained network) or `pixels`. Into --out go analysis.json, space.png, similarity.png, neighbours.png, curves.png.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
from data import InputError, rank_world, say
from linear_eval import (check_labels, extract, fast_probe, flags, labelled_subset, measure, neighbours, network, pixels_of,
                         read_checkpoint, unit)

# ------------------------------------------------------------------------------------------------------ the metrics
# Each a function of tensors alone. Features are (N, D) and are normalized here; labels (N,) are int64.


def instance_discrimination(query, positive, others, top=5):
    """acc@1..`top` in % (top,): is a query's own positive among the j nearest of it and of all other images' `others`?

    All (N, D), row i of image i. For originals o and views a, b of theirs, (o, a, o) is the mode o-a and (b, a, a) the
    mode a-b of Shi et al. 2022. By cosine; a tie counts against the positive: a collapsed space has 0 %, not 100.
    """
    q, p, r = (unit(v) for v in (query, positive, others))
    own, nearer = (q * p).sum(1) - 1e-6, []  # rounding must not decide a tie
    for i in range(0, len(q), 1000):
        similarity = q[i:i + 1000] @ r.T
        similarity.diagonal(i).fill_(-2)  # the image itself is no other
        nearer.append((similarity >= own[i:i + 1000, None]).sum(1))
    nearer = torch.cat(nearer)
    return torch.stack([100 * (nearer < j).double().mean() for j in range(1, top + 1)])


def alignment(a, b):
    """Mean squared distance of the positive pairs a, b (N, D): 0 (views agree) .. 4 (Wang & Isola 2020, alpha 2)."""
    return (unit(a) - unit(b)).square().sum(1).mean()


def uniformity(x):
    """log of the mean of exp(-2 d^2) over all pairs of x (N, D): about -4 (evenly spread) .. 0 (collapsed).

    Wang & Isola 2020, t 2; exact: every pair once, in blocks.
    """
    x, total, n = unit(x), 0.0, len(x)
    for i in range(0, n, 1000):
        total += (x[i:i + 1000] @ x[i:].T).mul_(4).sub_(4).exp_().triu_(1).sum(dtype=torch.float64)
    return (total / (n * (n - 1) / 2)).log()


def class_distances(x, y):
    """Mean squared distance within and between the classes y of x (N, D): each 0..4, between at most 2 on average.

    Within: over the pairs of a class, then over the classes (the intra-class alignment of Shi et al. 2022); a class of
    one image has no pair and is left out. Between: over all pairs of different classes. Unit vectors with sum s have
    sum |x_i - x_j|^2 = 2 n^2 - 2 |s|^2 over ordered pairs, so no pair is ever formed.
    """
    x, y = unit(x.double()), y.unique(return_inverse=True)[1]
    n = y.bincount().double()
    s = x.new_zeros(len(n), x.shape[1]).index_add_(0, y, x)
    sums = 2 * n ** 2 - 2 * s.square().sum(1)
    many = n > 1
    within = (sums[many] / (n * (n - 1))[many]).mean()
    between = (2 * len(x) ** 2 - 2 * s.sum(0).square().sum() - sums.sum()) / (len(x) ** 2 - (n ** 2).sum())
    return within.clamp(min=0), between.clamp(min=0)


def purity(x, y, k=10):
    """Mean share in % of an image's `k` nearest others in x (N, D) that are of its class."""
    x = unit(x)
    x, rows = x.float(), torch.arange(len(x), device=x.device)[:, None]
    near = neighbours(x, x, min(k + 1, len(x)))[1]
    other = near != rows
    other[:, -1] &= ~other.all(1)  # among duplicates an image may not be its own nearest: still k others
    return 100 * ((y[near] == y[:, None]) & other).sum(1).double().div(other.sum(1)).mean()


def effective_rank(x):
    """exp of the entropy of the singular values of centered x (N, D): 1 .. min(N - 1, D) directions in use (Roy & Vetterli 2007)."""
    x = unit(x.double())
    x = x - x.mean(0)
    s = torch.linalg.eigvalsh(x.T @ x if len(x) > x.shape[1] else x @ x.T).clamp(min=0).sqrt()
    return torch.special.entr(s / s.sum().clamp(min=1e-300)).sum().exp()


def kmeans(x, k, seed=0, steps=50):
    """Clusters (N,) of x (N, D) by Lloyd's algorithm from k-means++ seeds (Arthur & Vassilvitskii 2007)."""
    x, draw = unit(x.float()), data.seeded("kmeans", seed)
    centers, nearest = x[:1], torch.full((len(x),), math.inf, device=x.device)
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, (x - centers[-1]).square().sum(1))
        weight = nearest.cpu() if nearest.sum() > 0 else torch.ones(len(x))
        centers = torch.cat([centers, x[torch.multinomial(weight, 1, generator=draw).to(x.device)]])
    cluster = None
    for _ in range(steps):
        last, cluster = cluster, torch.addmm(-0.5 * centers.square().sum(1), x, centers.T).argmax(1)
        if last is not None and torch.equal(last, cluster):
            break
        count = cluster.bincount(minlength=k)[:, None]
        centers = torch.where(count > 0, torch.zeros_like(centers).index_add_(0, cluster, x) / count.clamp(min=1), centers)
    return cluster


def cluster_information(cluster, y):
    """How much of an image's class its cluster tells, in %: mutual information of clusters and classes (N,), int64, over
    the entropy of the classes, both less what shuffled classes would give (adjusted as by Vinh et al. 2010): 0 (as by
    chance) .. 100 (a cluster has one class)."""
    def information(cluster, y):
        joint = torch.bincount(cluster * classes + y, minlength=int(cluster.max() + 1) * classes).double().view(-1, classes) / len(y)
        return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)

    entropy = lambda p: torch.special.entr(p).sum()  # noqa: E731
    y = y.unique(return_inverse=True)[1]
    classes, draw = int(y.max()) + 1, data.seeded("shuffle")
    chance = sum(information(cluster, y[torch.randperm(len(y), generator=draw).to(y.device)]) for _ in range(10)) / 10
    return 100 * (information(cluster, y) - chance) / (information(y, y) - chance).clamp(min=1e-300)


def best_nn(train_x, train_y, test_x, test_y, most=101):
    """{space: (accuracy in %, its k)}: the best odd k up to `most` of the unweighted nearest-neighbour vote (Shi et al. 2022).

    Euclidean, of features as they are (`raw`), normalized, or less the mean of the training features and then normalized
    (`shifted`). Equal votes go to the class with the lower number, as scikit-learn's do.
    """
    mean, found = train_x.float().mean(0), {}
    spaces = {"raw": lambda x: x.float(), "normalized": lambda x: unit(x.float()),
              "shifted": lambda x: unit(x.float() - mean)}
    for name, space in spaces.items():
        near = train_y[neighbours(space(train_x), space(test_x), min(most, len(train_x)))[1]]
        votes, scores = torch.zeros(len(near), int(train_y.max()) + 1, device=near.device), {}
        for k in range(1, near.shape[1] + 1):  # one more neighbour votes
            votes.scatter_add_(1, near[:, k - 1:k], torch.ones_like(votes[:, :1]))
            if k % 2:
                scores[k] = 100 * (votes.argmax(1) == test_y).double().mean().item()
        k = max(scores, key=scores.get)
        found[name] = scores[k], k
    return found


# ------------------------------------------------------------------------------------------- the space in two dimensions

def pca(x):
    """The two directions of largest variance of x (N, D): coordinates (N, 2)."""
    u, s, _ = torch.pca_lowrank(x.double(), min(10, *x.shape), niter=8)
    u = u[:, :2] * s[:2]
    return (u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()).float()  # a direction's sign is arbitrary


def tsne(x, perplexity=30, steps=1000):
    """t-SNE (van der Maaten & Hinton 2008) of x (N, D), a few thousand rows: coordinates (N, 2).

    Exact, from the PCA, with the usual early exaggeration of 12, momentum and gains; blocks of rows stay in the cache.
    """
    n, perplexity = len(x), min(perplexity, (len(x) - 1) / 3)
    d = torch.cdist(x.float(), x.float()).square()
    d = (d / d.mean().clamp(min=1e-30)).fill_diagonal_(math.inf)
    low, high, beta = torch.zeros(n, 1), torch.full((n, 1), math.inf), torch.ones(n, 1)
    for _ in range(40):  # bisect all points' precisions at once, until their neighbourhoods have the perplexity
        p = (-beta * d).softmax(1)
        flat = torch.special.entr(p).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(flat, beta, low), torch.where(flat, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    p = (p + p.T) / (2 * n)
    y = pca(x)
    y = 1e-4 * y / y[:, 0].std().clamp(min=1e-30)
    velocity, gain, gradient, rate = torch.zeros_like(y), torch.ones_like(y), torch.empty_like(y), max(50, n / 48)
    parts = [slice(i, i + 256) for i in range(0, n, 256)]
    for step in range(steps):
        early, squares, total, push = step < 250, y.square().sum(1), 0.0, torch.empty_like(y)
        y1 = F.pad(y, (0, 1), value=1)  # a column of ones, so that one product gives W y and the rows' sums of W
        for rows in parts:
            w = torch.addmm(squares + 1, y[rows], y.T, alpha=-2).add_(squares[rows, None]).reciprocal_()
            w.diagonal(rows.start).zero_()
            total += w.sum()
            pull, away = (w * p[rows]) @ y1, w.square_() @ y1
            gradient[rows] = (12 if early else 1) * (pull[:, 2:] * y[rows] - pull[:, :2])
            push[rows] = away[:, 2:] * y[rows] - away[:, :2]
        gradient = 4 * (gradient - push / total)
        gain = torch.where(gradient * velocity < 0, gain + 0.2, gain * 0.8).clamp_(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gain * gradient
        y = y + velocity
    return y - y.mean(0)


# ------------------------------------------------------------------------------------------------------- the pictures

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555")  # Okabe & Ito: told apart by all
SHOWN, S = 14, 2  # so many classes have a color and a shape of their own; pictures are drawn S times as large, then shrunk


class Panel:
    """One pair of axes in a picture: ticks, names, and points, lines and a legend in data coordinates."""

    def __init__(self, picture, box, xs, ys, title, x_name, y_name):
        self.draw, (left, top, right, bottom) = ImageDraw.Draw(picture), (S * v for v in box)
        self.font, small = ImageFont.load_default(S * 12), ImageFont.load_default(S * 11)
        self.left, self.right, self.top = left, right, top
        self.draw.text((left, top - S * 8), title, "black", ImageFont.load_default(S * 14), anchor="ls")
        (x0, x1), (y0, y1) = ((lo - 0.04 * (hi - lo or 1), hi + 0.04 * (hi - lo or 1)) for lo, hi in (xs, ys))
        self.at = lambda x, y: (left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top))
        for low, high, horizontal in ((x0, x1, True), (y0, y1, False)):
            rough = (high - low) / 5
            decade = 10 ** math.floor(math.log10(rough))
            tick = decade * next(f for f in (1, 2, 5, 10) if f * decade >= rough)
            for i in range(math.ceil(low / tick), math.floor(high / tick) + 1):
                x, y = self.at(i * tick, y0) if horizontal else self.at(x0, i * tick)
                self.draw.line((x, top, x, bottom) if horizontal else (left, y, right, y), "#E8E8E8", S)
                at, anchor = ((x, y + S * 4), "ma") if horizontal else ((x - S * 5, y), "rm")
                self.draw.text(at, f"{i * tick:.6g}", "#444444", small, anchor=anchor)
        self.draw.rectangle((left, top, right, bottom), outline="#888888", width=S)
        self.draw.text(((left + right) / 2, bottom + S * 20), x_name, "black", self.font, anchor="ma")
        name = Image.new("RGB", (bottom - top, S * 16), "white")
        ImageDraw.Draw(name).text(((bottom - top) / 2, S * 8), y_name, "black", self.font, anchor="mm")
        picture.paste(name.transpose(Image.ROTATE_90), (left - S * 50, top))

    def shape(self, x, y, kind, r):
        draw = self.draw.ellipse if kind < len(COLORS) else self.draw.rectangle
        draw((x - S * r, y - S * r, x + S * r, y + S * r), COLORS[kind % len(COLORS)])

    def mark(self, x, y, kind, r=3):
        """A point of class `kind`, 0..13."""
        self.shape(*self.at(x, y), kind, r)

    def line(self, xs, ys, color, width=2):
        self.draw.line([self.at(x, y) for x, y in zip(xs, ys)], color, S * width, joint="curve")

    def legend(self, names, corner=None):
        """A line of its color for each name in the `corner` left or right, or without one a class's mark beside the panel."""
        widest = max(self.draw.textlength(name, self.font) for name in names)
        x = {"right": self.right - widest - S * 12, "left": self.left + S * 38}.get(corner, self.right + S * 26)
        if corner:
            bottom = self.top + S * (10 + 18 * len(names))
            self.draw.rectangle((x - S * 30, self.top + S * 4, x + widest + S * 6, bottom), "white")
        for i, name in enumerate(names):
            y = self.top + S * (16 + 18 * i)
            self.draw.text((x, y), name, "black", self.font, anchor="lm")
            if corner:
                self.draw.line((x - S * 26, y, x - S * 6, y), COLORS[i % len(COLORS)], S * 3)
            else:
                self.shape(x - S * 12, y, i, 4)


def sheet(columns, rows, side=0):
    """An empty picture for `columns` x `rows` panels, and the boxes of the panels, row by row."""
    boxes = [(66 + 400 * c, 42 + 400 * r, 386 + 400 * c, 352 + 400 * r) for r in range(rows) for c in range(columns)]
    return Image.new("RGB", (S * (400 * columns + 10 + side), S * 400 * rows), "white"), boxes


def finish(picture, path):
    picture.resize((picture.width // S, picture.height // S), Image.LANCZOS).save(path)


def spans(points):
    """(lowest, highest) of each coordinate of `points`."""
    return [(min(v), max(v)) for v in zip(*points)]


def draw_space(seen, classes, path):
    """t-SNE and PCA of the originals by class, and below one class with each original joined to its two views."""
    shown = min(SHOWN, max(1, len(classes)))
    picture, boxes = sheet(len(seen), 3, 20 + 8 * max(map(len, classes[:shown])) if classes else 0)
    for column, (name, s) in enumerate(seen.items()):
        y = s["y"]
        some = (y < shown).nonzero()[:, 0][:2000]  # t-SNE takes time with the square of their number
        one = (y == y[0]).nonzero()[:, 0][:50]  # of the views: the first class
        few = f", {shown} of {len(classes)} classes" if shown < len(classes) else ""
        for row, method in enumerate((tsne, pca)):
            p = method(unit(s["o"][some])).tolist()
            axis = ("t-SNE", "PCA")[row]
            panel = Panel(picture, boxes[row * len(seen) + column], *spans(p), f"{name}{few}",
                          f"{axis} 1", f"{axis} 2")
            for (u, v), label in zip(p, y[some].tolist()):
                panel.mark(u, v, max(0, label))
            if column == len(seen) - 1 and classes:
                panel.legend(classes[:shown])
        p = tsne(unit(torch.cat([s[v][one] for v in "oab"]))).tolist()
        what = classes[y[0]] if classes else "50 images"
        panel = Panel(picture, boxes[2 * len(seen) + column], *spans(p),
                      f"{what}: originals and two views each", "t-SNE 1", "t-SNE 2")
        for i in range(len(one)):
            for j in (i + len(one), i + 2 * len(one)):
                panel.line(*zip(p[i], p[j]), "#AAAAAA", 1)
        for i, (u, v) in enumerate(p):
            panel.mark(u, v, i // len(one), 3 - (i >= len(one)))
        if column == len(seen) - 1:
            panel.legend(["original", "view a", "view b"])
    finish(picture, path)


def draw_similarity(seen, path):
    """How alike positive pairs, images of one class and images of different classes are: densities of cosines."""
    picture, boxes = sheet(len(seen), 1)
    for box, (name, s) in zip(boxes, seen.items()):
        o, a, b = (unit(s[v]) for v in "oab")
        pairs, upper = o @ o.T, torch.ones(len(o), len(o)).triu(1).bool()
        same = s["y"][:, None] == s["y"]
        kinds = {"two views": (a * b).sum(1), "same class": pairs[upper & same], "other class": pairs[upper & ~same]}
        kinds = kinds if s["y"].max() >= 0 else {"two views": (a * b).sum(1), "two images": pairs[upper]}
        low = max(-1, min(v.min().item() for v in kinds.values() if len(v)) - 0.02)
        counts = {kind: torch.histc(v, 40, low, 1) / max(1, len(v)) * 40 / (1 - low) for kind, v in kinds.items()}
        middle = [low + (i + 0.5) * (1 - low) / 40 for i in range(40)]
        panel = Panel(picture, box, (low, 1), (0, max(c.max().item() for c in counts.values())), name,
                      "cosine similarity", "density")
        for color, c in zip(COLORS, counts.values()):
            panel.line(middle, c.tolist(), color)
        panel.legend(list(counts), "left")
    finish(picture, path)


def draw_neighbours(seen, train, held, path, cell=64):
    """Query images, one a row, and their nearest training images; another class is framed."""
    queries, near = len(next(iter(seen.values()))["query"]), next(iter(seen.values()))["near"].shape[1]
    block = (near + 1) * cell + 60
    picture = Image.new("RGB", (S * (block * len(seen) + 10), S * (queries * (cell + 6) + 44)), "white")
    draw = ImageDraw.Draw(picture)
    for column, (name, s) in enumerate(seen.items()):
        draw.text((S * (10 + column * block), S * 14), name, "black", ImageFont.load_default(S * 14), anchor="lm")
        draw.text((S * (10 + column * block), S * 31), "query, then its nearest in training"
                  + " (framed: another class)" * bool(train.classes), "#444444", ImageFont.load_default(S * 11), anchor="lm")
        for r, (query, rows) in enumerate(zip(s["query"].tolist(), s["near"])):
            images = [held.squares(torch.tensor([query]), 64), train.squares(rows, 64)]
            for c, image in enumerate(i for group in images for i in group):
                x, y = S * (10 + column * block + c * (cell + 3) + 10 * (c > 0)), S * (42 + r * (cell + 6))
                image = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((S * cell, S * cell), Image.LANCZOS)
                picture.paste(image, (x, y))
                if c and train.classes and train.labels[rows[c - 1]] != held.labels[query]:
                    draw.rectangle((x, y, x + S * cell - 1, y + S * cell - 1), outline="#D55E00", width=S * 3)
    finish(picture, path)


def draw_curves(logs, path):
    """Loss, instance accuracy and kNN (without labels: uniformity) of runs against epochs, from their log.jsonl."""
    wanted = {"loss": "loss", "instance_accuracy": "instance accuracy, %", "knn": "held-out kNN, %", "uniformity": "uniformity"}
    wanted = {key: text for key, text in wanted.items() if any(key in e for log in logs.values() for e in log)}
    picture, boxes = sheet(len(wanted), 1)
    for box, (key, text) in zip(boxes, wanted.items()):
        lines = {name: [(e["epoch"], e[key]) for e in log if key in e] for name, log in logs.items()}
        points = [p for line in lines.values() for p in line]
        panel = Panel(picture, box, *spans(points), "", "epoch", text)
        for color, line in zip(COLORS, lines.values()):
            panel.line(*zip(*line or [(0, 0)]), color)
            for x, y in line:
                panel.mark(x, y, COLORS.index(color), 2)
        if key == next(iter(wanted)):
            panel.legend(list(lines), "right")
    finish(picture, path)


# -------------------------------------------------------------------------------------------------- table and verdict

ROWS = {  # name in analysis.json -> (row of the table, which way is better)
    "oa": ("instance discrimination o-a, acc@1 %", "+"), "ab": ("instance discrimination a-b, acc@1 %", "+"),
    "ab5": ("instance discrimination a-b, acc@5 %", "+"),
    "alignment_oa": ("alignment (o, a)", "-"), "alignment_ab": ("alignment (a, b)", "-"),
    "intra": ("intra-class alignment, originals", "-"), "intra_views": ("intra-class alignment, views", "-"),
    "uniformity": ("uniformity", "-"), "rank": ("effective rank", "+"),
    "ratio": ("intra-class / between-class distance", "-"), "purity": ("10-neighbour purity %", "+"),
    "clusters": ("class information of clusters %", "+"),
    "nn_raw": ("best-NN, raw %", "+"), "nn_normalized": ("best-NN, normalized %", "+"), "nn_shifted": ("best-NN, shifted %", "+"),
    "linear": ("linear accuracy %", "+")}


def instance_metrics(o, a, b, y):
    """The metrics of one sample of images: features of originals and two views (N, D), labels (N,), -1 where unknown."""
    oa, ab = instance_discrimination(o, a, o), instance_discrimination(b, a, a)
    found = dict(oa=oa[0], ab=ab[0], ab5=ab[4], alignment_oa=alignment(o, a), alignment_ab=alignment(a, b),
                 uniformity=uniformity(o), rank=effective_rank(o))
    if y.max() >= 0:
        within, between = class_distances(o, y)
        found |= dict(intra=within, intra_views=class_distances(a, y)[0], ratio=within / between.clamp(min=1e-30),
                      purity=purity(o, y))
    return {name: v.item() for name, v in found.items()} | dict(oa_top=oa.tolist(), ab_top=ab.tolist())


def verdict(name, results):
    """What the numbers of `name` say, beside those of the other checkpoints.

    The rule. Solved: acc@1 in mode a-b of at least 80 % on held-out images (on training images where none are held out),
    half solved from 50 %. Overfitted: it is above its held-out value by more than 5 points and by more than twice the
    standard error of that difference. Over-clustered can only be what has half solved it. Beside another checkpoint: no
    worse at it (within 5 points) and tighter (lower intra-class alignment) or less spread (higher uniformity), yet best-NN
    or linear accuracy is at least 2 points lower and the other not higher. On its own: the mean distance within a class is
    over 80 % of that between classes.
    """
    r = results[name]
    seen, n = r.get("held-out") or r["train"], r["images"]
    if name == "pixels":
        return "the images themselves: what a feature has to beat."
    ab, words = seen["ab"], []
    words.append(("solves" if ab >= 80 else "half solves" if ab >= 50 else "does not solve")
                 + f" the pretext task ({ab:.0f} % of {n} images find their view first)")
    if "held-out" in r:
        gap, error = r["train"]["ab"] - ab, 100 * math.sqrt(2 * max(ab * (100 - ab), 1) / 1e4 / n)
        words.append(f"{'overfits it' if gap > max(5, 2 * error) else 'does not overfit it'} (train - held-out {gap:+.1f} points)")
    if "ratio" not in seen:
        return "; ".join(words) + ". Without labels, clusters cannot be compared with classes."
    beaten = []
    for other, s in results.items():
        t = s.get("held-out", {})
        if ab < 50 or other in (name, "pixels") or "ratio" not in t:
            continue
        less = [t[k] - seen[k] for k in ("nn_normalized", "linear")]
        tighter = seen["intra"] < t["intra"] or seen["uniformity"] > t["uniformity"]
        if ab >= t["ab"] - 5 and tighter and max(less) >= 2 and min(less) >= 0:
            beaten.append(f"{other} (best-NN {less[0]:+.1f}, linear {less[1]:+.1f} points there)")
    if beaten:
        words.append(f"over-clusters beside {', '.join(beaten)}: as good at the pretext task, tighter or less spread, and "
                     "worse for the classes")
    elif ab >= 50 and seen["ratio"] > 0.8:
        words.append(f"over-clusters: images of a class lie {100 * seen['ratio']:.0f} % as far apart as those of different classes")
    else:
        words.append(f"no over-clustering seen (distance within a class {100 * seen['ratio']:.0f} % of that between classes)")
    return "; ".join(words) + "."


def table(results, names):
    """Markdown: a row a metric, a column a checkpoint, headed by `names`; train / held-out where both are measured."""
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(results)]
    for key, (text, better) in ROWS.items():
        cells = [[f"{part[key]:.3f}" if abs(part[key]) < 10 and "%" not in text else f"{part[key]:.1f}"
                  for part in (r["train"], r.get("held-out", {})) if key in part] for r in results.values()]
        if any(cells):
            lines.append(f"| {text} ({'higher' if better == '+' else 'lower'} is better) | "
                         + " | ".join(" / ".join(c) for c in cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- the run

def look(net, train, held, size, args, device):
    """(numbers, what the pictures need) of one network: metrics of a sample of each split, then those of whole splits."""
    numbers, seen = {}, None
    for name, images in (("train", train), ("held-out", held)):
        if images is None:
            continue
        rows = labelled_subset(images.labels, str(args.per_class), args.seed) if train.classes else \
            torch.randperm(len(images), generator=data.seeded("sample", args.seed))[:10 * args.per_class]
        u = torch.rand(2, len(rows), data.COLUMNS, generator=data.seeded("views", args.seed, name))
        features = [extract(net, images, size, device, rows, args.workers, u=v) for v in (None, *u)]
        (o, y), a, b = features[0], features[1][0], features[2][0]
        numbers[name], seen = instance_metrics(o, a, b, y), dict(o=o.cpu(), a=a.cpu(), b=b.cpu(), y=y.cpu())
        numbers["images"] = len(o)
    whole = extract(net, train, size, device, None, args.workers, args.memory)
    if train.classes:
        test = extract(net, held, size, device, None, args.workers, args.memory)
        classes = len(train.classes)
        known = (whole[1] >= 0).cpu()
        x, y = (whole[0], whole[1]) if known.all() else (whole[0][known.to(whole[0].device)], whole[1][known.to(device)])
        weight, bias = fast_probe(x, y, classes, device)
        scores = torch.cat([F.linear(v.to(device).float(), weight, bias) for v in test[0].split(8192)])
        nn = best_nn(x, y, *test)
        numbers["held-out"] |= {f"nn_{space}": accuracy for space, (accuracy, _) in nn.items()} | dict(
            nn_k={space: k for space, (_, k) in nn.items()}, linear=measure(scores, test[1])["top1"],
            clusters=cluster_information(kmeans(test[0], 4 * classes, args.seed), test[1]).item())
    source = held if held is not None else train
    candidates = source.readable()
    seen["query"] = candidates[torch.randperm(len(candidates), generator=data.seeded("queries", args.seed))[:8]]
    queries = extract(net, source, size, device, seen["query"], args.workers)[0]
    near = neighbours(unit(whole[0].float()), unit(queries), 9)[1].cpu()
    near = near[:, :8] if held is not None else near[:, 1:]  # a training image is its own nearest
    seen["near"] = train.readable()[near]  # `whole` has only these rows
    return numbers, seen


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="+",
                        help="runs' folders, checkpoint files, random or pixels; what a word needs to know is the first file's")
    flags(parser)
    parser.add_argument("--per-class", type=int, default=50,
                        help="images of each class in the sample for all but best-NN, linear and clusters [50]")
    args = parser.parse_args(argv)
    if args.per_class < 2:
        raise InputError(f"--per-class {args.per_class}: must be at least 2")
    began, device = time.time(), data.start(args.device)
    names = list(dict.fromkeys(args.checkpoint))
    checkpoints = {name: read_checkpoint("random" if name == "pixels" else name, args) for name in names}
    first = next((known for state, known in checkpoints.values() if state), checkpoints[names[0]][1])
    results, seen, loaded = {}, {}, None
    for name, (state, known) in checkpoints.items():
        known |= {key: first[key] for key in (("data", "root") if state else ("data", "root", "arch", "size", "stem"))}
        if loaded is None or known["size"] not in (None, loaded):
            train, held, loaded = data.load(known["data"], known["root"], known["size"], args.seed, device, args.stream,
                                            args.workers)
            if train.classes:
                check_labels(train, held, known["data"])
        known["size"] = size = loaded
        net = pixels_of(size) if name == "pixels" else network(state, known, args.seed).to(device)
        say(f"{name}: {'pixels' if name == 'pixels' else known['arch']} at {size} pixels on {known['data']}")
        results[name], seen[name] = look(net, train, held, size, args, device)
    if rank_world()[0] == 0:
        for name in results:
            results[name]["verdict"] = verdict(name, results)
        short = {name: Path(name).name if len({Path(n).name for n in names}) == len(names) else name for name in names}
        print("\n" + table(results, short.values()) + f"\n\ntrain / held-out, {args.per_class if train.classes else 10 * args.per_class} images"
              + (" of each class" if train.classes else "") + "; best-NN, linear accuracy and clusters: whole splits\n")
        for name in results:
            print(f"- {name} {results[name]['verdict']}")
        out = Path(args.out) if args.out else Path(names[0]) / "analysis" if Path(names[0]).is_dir() else Path("runs") / "analysis"
        out.mkdir(parents=True, exist_ok=True)
        (out / "analysis.json").write_text(json.dumps(results, indent=1))
        seen = {short[name]: s for name, s in seen.items()}
        draw_space(seen, train.classes, out / "space.png")
        draw_similarity(seen, out / "similarity.png")
        draw_neighbours(seen, train, train if held is None else held, out / "neighbours.png")
        logs = {short[n]: p / "log.jsonl" for n in names for p in (Path(n), Path(n).parent) if (p / "log.jsonl").is_file()}
        if logs:
            logs = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in logs.items()}
            draw_curves(logs, out / "curves.png")
        print(f"\nIn {out}: analysis.json, space.png, similarity.png, neighbours.png{', curves.png' * bool(logs)}; "
              f"{time.time() - began:.0f} s")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return results


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"analyze.py: {error}")
