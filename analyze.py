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
from linear_eval import check_labels, extract, fast_probe, flags, labelled_subset, measure, neighbours, network, pixels_of, read_checkpoint

# ------------------------------------------------------------------------------------------------------ the metrics
# Each a function of tensors alone. Features are (N, D) and are normalized here; labels (N,) are int64.


def instance_discrimination(query, positive, others, top=5):
    """acc@1..`top` in % (top,): is a query's own positive among the j nearest of it and of all other images' `others`?

    All (N, D), row i of image i. For originals o and views a, b of theirs, (o, a, o) is the mode o-a and (b, a, a) the
    mode a-b of Shi et al. 2022. By cosine; a tie counts against the positive: a collapsed space has 0 %, not 100.
    """
    q, p, r = (F.normalize(v, dim=1) for v in (query, positive, others))
    own, nearer = (q * p).sum(1) - 1e-6, []  # rounding must not decide a tie
    for i in range(0, len(q), 1000):
        similarity = q[i:i + 1000] @ r.T
        similarity.diagonal(i).fill_(-2)  # the image itself is no other
        nearer.append((similarity >= own[i:i + 1000, None]).sum(1))
    nearer = torch.cat(nearer)
    return torch.stack([100 * (nearer < j).double().mean() for j in range(1, top + 1)])


def alignment(a, b):
    """Mean squared distance of the positive pairs a, b (N, D): 0 (views agree) .. 4 (Wang & Isola 2020, alpha 2)."""
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()


def uniformity(x):
    """log of the mean of exp(-2 d^2) over all pairs of x (N, D): about -4 (evenly spread) .. 0 (collapsed).

    Wang & Isola 2020, t 2; exact: every pair once, in blocks.
    """
    x, total, n = F.normalize(x, dim=1), 0.0, len(x)
    for i in range(0, n, 1000):
        total += (x[i:i + 1000] @ x[i:].T).mul_(4).sub_(4).exp_().triu_(1).sum(dtype=torch.float64)
    return (total / (n * (n - 1) / 2)).log()


def class_distances(x, y):
    """Mean squared distance within and between the classes y of x (N, D): each 0..4, between at most 2 on average.

    Within: over the pairs of a class, then over the classes (the intra-class alignment of Shi et al. 2022); a class of
    one image has no pair and is left out. Between: over all pairs of different classes. Unit vectors with sum s have
    sum |x_i - x_j|^2 = 2 n^2 - 2 |s|^2 over ordered pairs, so no pair is ever formed.
    """
    x, y = F.normalize(x.double(), dim=1), y.unique(return_inverse=True)[1]
    n = y.bincount().double()
    s = x.new_zeros(len(n), x.shape[1]).index_add_(0, y, x)
    sums = 2 * n ** 2 - 2 * s.square().sum(1)
    many = n > 1
    within = (sums[many] / (n * (n - 1))[many]).mean()
    between = (2 * len(x) ** 2 - 2 * s.sum(0).square().sum() - sums.sum()) / (len(x) ** 2 - (n ** 2).sum())
    return within.clamp(min=0), between.clamp(min=0)


def purity(x, y, k=10):
    """Mean share in % of an image's `k` nearest others in x (N, D) that are of its class."""
    x = F.normalize(x, dim=1)
    x, rows = x.float(), torch.arange(len(x), device=x.device)[:, None]
    near = neighbours(x, x, min(k + 1, len(x)))[1]
    other = near != rows
    other[:, -1] &= ~other.all(1)  # among duplicates an image may not be its own nearest: still k others
    return 100 * ((y[near] == y[:, None]) & other).sum(1).double().div(other.sum(1)).mean()


def effective_rank(x):
    """exp of the entropy of the singular values of centered x (N, D): 1 .. min(N - 1, D) directions in use (Roy & Vetterli 2007)."""
    x = F.normalize(x.double(), dim=1)
    x = x - x.mean(0)
    s = torch.linalg.eigvalsh(x.T @ x if len(x) > x.shape[1] else x @ x.T).clamp(min=0).sqrt()
    return torch.special.entr(s / s.sum().clamp(min=1e-300)).sum().exp()


def kmeans(x, k, seed=0, steps=50):
    """Clusters (N,) of x (N, D) by Lloyd's algorithm from k-means++ seeds (Arthur & Vassilvitskii 2007)."""
    x, draw = F.normalize(x.float(), dim=1), data.seeded("kmeans", seed)
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
    """Mutual information of clusters and classes (N,) over the entropy of the classes, in %: how much of an image's
    class its cluster tells, 0 .. 100. With few images a cluster it is above 0 by chance: compare equal numbers."""
    cluster, y = cluster.unique(return_inverse=True)[1], y.unique(return_inverse=True)[1]
    joint = torch.bincount(cluster * (y.max() + 1) + y, minlength=(cluster.max() + 1) * (y.max() + 1)).double().view(-1, int(y.max()) + 1) / len(y)
    entropy = lambda p: torch.special.entr(p).sum()  # noqa: E731
    return 100 * (entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint)) / entropy(joint.sum(0)).clamp(min=1e-300)


def best_nn(train_x, train_y, test_x, test_y, most=101):
    """{space: (accuracy in %, its k)}: the best odd k up to `most` of the unweighted nearest-neighbour vote (Shi et al. 2022).

    Euclidean, of features as they are (`raw`), normalized, or less the mean of the training features and then normalized
    (`shifted`). Equal votes go to the class with the lower number, as scikit-learn's do.
    """
    mean, found = train_x.float().mean(0), {}
    spaces = {"raw": lambda x: x.float(), "normalized": lambda x: F.normalize(x.float(), dim=1), "shifted": lambda x: F.normalize(x.float() - mean, dim=1)}
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
    x = x.double() - x.double().mean(0)
    _, _, v = torch.linalg.svd(x, full_matrices=False) if min(x.shape) < 500 else torch.svd_lowrank(x, 10, 8)[:3]
    v = v.mT if min(x.shape) < 500 else v
    v = v[:, :2] * v[:, :2].sum(0).sign()  # a singular vector's sign is arbitrary
    return (x @ v).float()


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
SHAPES, SHOWN, S = 3, 14, 2  # classes have a color and a shape; so many fit a legend; drawn S times as large, then shrunk


class Panel:
    """One pair of axes in a picture: ticks, names, and points, lines and a legend in data coordinates."""

    def __init__(self, picture, box, xs, ys, title, x_name, y_name):
        self.draw, (left, top, right, bottom) = ImageDraw.Draw(picture), (S * v for v in box)
        self.font, small = ImageFont.load_default(S * 12), ImageFont.load_default(S * 11)
        self.right, self.top = right, top
        self.draw.text((left, top - S * 8), title, "black", ImageFont.load_default(S * 14), anchor="ls")
        (x0, x1), (y0, y1) = ((lo - 0.04 * (hi - lo or 1), hi + 0.04 * (hi - lo or 1)) for lo, hi in (xs, ys))
        self.at = lambda x, y: (left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top))
        for low, high, horizontal in ((x0, x1, True), (y0, y1, False)):
            rough = (high - low) / 5
            unit = 10 ** math.floor(math.log10(rough))
            tick = unit * next(f for f in (1, 2, 5, 10) if f * unit >= rough)
            for i in range(math.ceil(low / tick), math.floor(high / tick) + 1):
                x, y = self.at(i * tick, y0) if horizontal else self.at(x0, i * tick)
                self.draw.line((x, top, x, bottom) if horizontal else (left, y, right, y), "#E8E8E8", S)
                self.draw.text((x, y + S * 4) if horizontal else (x - S * 5, y), f"{i * tick:.6g}", "#444444", small, anchor="ma" if horizontal else "rm")
        self.draw.rectangle((left, top, right, bottom), outline="#888888", width=S)
        self.draw.text(((left + right) / 2, bottom + S * 20), x_name, "black", self.font, anchor="ma")
        name = Image.new("RGB", (bottom - top, S * 16), "white")
        ImageDraw.Draw(name).text(((bottom - top) / 2, S * 8), y_name, "black", self.font, anchor="mm")
        picture.paste(name.transpose(Image.ROTATE_90), (left - S * 50, top))

    def mark(self, x, y, kind, r=3):
        """A point of class `kind`: circle, square or triangle."""
        (x, y), r, color = self.at(x, y), S * r, COLORS[kind % len(COLORS)]
        shape = kind // len(COLORS) % SHAPES
        if shape == 2:
            self.draw.polygon((x, y - 1.2 * r, x + 1.1 * r, y + r, x - 1.1 * r, y + r), color)
        else:
            (self.draw.rectangle if shape else self.draw.ellipse)((x - r, y - r, x + r, y + r), color)

    def line(self, xs, ys, color, width=2):
        self.draw.line([self.at(x, y) for x, y in zip(xs, ys)], color, S * width, joint="curve")

    def legend(self, names, inside=True):
        """A line of its color for each name in the upper right corner, or beside the panel a class's mark."""
        widest = max(self.draw.textlength(name, self.font) for name in names)
        x = self.right - widest - S * 12 if inside else self.right + S * 26
        if inside:
            self.draw.rectangle((x - S * 30, self.top + S * 4, self.right - S * 4, self.top + S * (10 + 18 * len(names))), "white")
        for i, name in enumerate(names):
            y = self.top + S * (16 + 18 * i)
            self.draw.text((x, y), name, "black", self.font, anchor="lm")
            if inside:
                self.draw.line((x - S * 26, y, x - S * 6, y), COLORS[i % len(COLORS)], S * 3)
            else:
                at, self.at = self.at, lambda x, y: (x, y)
                self.mark(x - S * 12, y, i, 4)
                self.at = at


def sheet(columns, rows, side=0):
    """An empty picture for `columns` x `rows` panels, and the boxes of the panels, row by row."""
    boxes = [(66 + 400 * c, 42 + 400 * r, 386 + 400 * c, 352 + 400 * r) for r in range(rows) for c in range(columns)]
    return Image.new("RGB", (S * (400 * columns + 10 + side), S * 400 * rows), "white"), boxes


def finish(picture, path):
    picture.resize((picture.width // S, picture.height // S), Image.LANCZOS).save(path)


def span(values):
    return min(map(min, values)), max(map(max, values))


def draw_space(seen, classes, path):
    """t-SNE and PCA of the originals by class, and below one class with each original joined to its two views."""
    shown = min(SHOWN, max(1, len(classes)))
    picture, boxes = sheet(len(seen), 3, 20 + 8 * max(map(len, classes[:shown])) if classes else 0)
    for column, (name, s) in enumerate(seen.items()):
        y = s["y"]
        some = (y < shown).nonzero()[:, 0][:2000]
        one = (y == y[0]).nonzero()[:, 0][:50]  # of the views: the first class
        few = f", {shown} of {len(classes)} classes" if shown < len(classes) else ""
        for row, method in enumerate((tsne, pca)):
            p = method(F.normalize(s["o"][some], dim=1)).tolist()
            axis = ("t-SNE", "PCA")[row]
            panel = Panel(picture, boxes[row * len(seen) + column], *map(span, zip(*[[[v[0]], [v[1]]] for v in p])), f"{name}{few}", f"{axis} 1", f"{axis} 2")
            for (u, v), label in zip(p, y[some].tolist()):
                panel.mark(u, v, max(0, label))
            if column == len(seen) - 1 and classes:
                panel.legend(classes[:shown], inside=False)
        p = tsne(F.normalize(torch.cat([s[v][one] for v in "oab"]), dim=1)).tolist()
        what = classes[y[0]] if classes else "50 images"
        panel = Panel(picture, boxes[2 * len(seen) + column], *map(span, zip(*[[[v[0]], [v[1]]] for v in p])), f"{what}: originals and two views each", "t-SNE 1", "t-SNE 2")
        for i in range(len(one)):
            for j in (i + len(one), i + 2 * len(one)):
                panel.line(*zip(p[i], p[j]), "#AAAAAA", 1)
        for i, (u, v) in enumerate(p):
            panel.mark(u, v, i // len(one), 3 - (i >= len(one)))
        if column == len(seen) - 1:
            panel.legend(["original", "view a", "view b"], inside=False)
    finish(picture, path)


def draw_similarity(seen, path):
    """How alike positive pairs, images of one class and images of different classes are: densities of cosines."""
    picture, boxes = sheet(len(seen), 1)
    for box, (name, s) in zip(boxes, seen.items()):
        o, a, b = (F.normalize(s[v], dim=1) for v in "oab")
        pairs, upper = o @ o.T, torch.ones(len(o), len(o)).triu(1).bool()
        same = s["y"][:, None] == s["y"]
        kinds = {"two views": (a * b).sum(1), "same class": pairs[upper & same], "other class": pairs[upper & ~same]}
        kinds = kinds if s["y"].max() >= 0 else {"two views": (a * b).sum(1), "two images": pairs[upper]}
        low = max(-1, min(v.min().item() for v in kinds.values() if len(v)) - 0.02)
        counts = {kind: torch.histc(v, 60, low, 1) / max(1, len(v)) * 60 / (1 - low) for kind, v in kinds.items()}
        middle = [low + (i + 0.5) * (1 - low) / 60 for i in range(60)]
        panel = Panel(picture, box, (low, 1), (0, max(c.max().item() for c in counts.values())), name, "cosine similarity", "density")
        for color, c in zip(COLORS, counts.values()):
            panel.line(middle, c.tolist(), color)
        panel.legend(list(counts))
    finish(picture, path)


def draw_neighbours(seen, train, held, path, cell=64):
    """Query images, one a row, and their nearest training images; another class is framed."""
    queries, near = len(next(iter(seen.values()))["query"]), next(iter(seen.values()))["near"].shape[1]
    block = (near + 1) * cell + 60
    picture = Image.new("RGB", (S * (block * len(seen) + 10), S * (queries * (cell + 6) + 44)), "white")
    draw = ImageDraw.Draw(picture)
    for column, (name, s) in enumerate(seen.items()):
        draw.text((S * (10 + column * block), S * 14), name, "black", ImageFont.load_default(S * 14), anchor="lm")
        draw.text((S * (10 + column * block), S * 31), "query, then its nearest in training" + (" (framed: another class)" if train.classes else ""), "#444444", ImageFont.load_default(S * 11), anchor="lm")
        for r, (query, rows) in enumerate(zip(s["query"].tolist(), s["near"])):
            images = [held.squares(torch.tensor([query]), 64), train.squares(rows, 64)]
            for c, image in enumerate(i for group in images for i in group):
                x, y = S * (10 + column * block + c * (cell + 3) + 10 * (c > 0)), S * (42 + r * (cell + 6))
                picture.paste(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((S * cell, S * cell), Image.LANCZOS), (x, y))
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
        panel = Panel(picture, box, *(span([v]) for v in zip(*points)), "", "epoch", text)
        for color, line in zip(COLORS, lines.values()):
            panel.line(*zip(*line or [(0, 0)]), color)
            for x, y in line:
                panel.mark(x, y, COLORS.index(color), 2)
        if key == next(iter(wanted)):
            panel.legend(list(lines))
    finish(picture, path)
