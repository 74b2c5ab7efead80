"""See the feature space of a network, and whether it over-clusters.

    python analyze.py runs/NAME                          # numbers and pictures of a run
    python analyze.py runs/A runs/B random pixels        # side by side, on the images of A
    torchrun --nproc-per-node 8 analyze.py runs/NAME     # features shared out over eight GPUs

Shi et al. 2022 find that small contrastive models solve the pretext task without overfitting and
still make poor features, because they over-cluster: the space is grouped too tightly, into clusters
that do not follow the classes. This file measures each part of that sentence. A checkpoint is
whatever linear_eval.py takes, or `random` (the untrained network), or `pixels`. Into --out go
analysis.json, map.png, similarity.png and, for runs, curves.png.
"""
import argparse
import json
import math
from itertools import cycle, permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

import data
from data import (InputError, init_device, move_to_device, positive, print0, rank_world, run, save,
                  seeded)
from linear_eval import (DEFAULTS, UNTRAINED, accuracy, add_common_flags, extract, folder_of,
                         instance_discrimination, labelled_subset, linear_probe, neighbours,
                         open_checkpoint, to_evaluate, unit)

# -------------------------------------------------------------------------------- 1. the measures
# Features are (N, D), of any length: each measure brings them to length one. Labels y (N,) are
# int64, -1 where unknown. Instance discrimination is in linear_eval.py, since pretrain.py asks for
# it, too.

def alignment(a, b):
    """Mean squared distance of pairs a, b (N, D): 0 (views agree) to 4. Wang & Isola 2020."""
    return (unit(a) - unit(b)).square().sum(1).mean()

def uniformity(x):
    """log of the mean of exp(-2 d^2) over all pairs of x (N, D), whose distance is d: from about -4
    (evenly spread) to 0 (collapsed). Wang & Isola 2020, with t = 2."""
    x = unit(x)
    n = len(x)
    total = -n  # leaves out the n pairs of a point with itself
    for block in x.split(1000):
        similarity = block @ x.T  # d^2 = 2 - 2 similarity
        total += (4 * similarity - 4).exp().sum().item()
    return math.log(total / (n * (n - 1)))

def intra_class_alignment(x, y):
    """Mean squared distance of the pairs of a class, averaged over the classes y of x (N, D): 0
    to 4. NaN if no class has two images. Shi et al. 2022."""
    x, y = unit(x).cpu(), y.cpu()
    means = [torch.pdist(x[y == c]).square().mean() for c in y.unique()]
    return torch.stack(means).nanmean()  # a class of one image has no pair

def cosines(x, y, most=1000):
    """{kind of pair: cosines (P,)} of all pairs of x (N, D), by their classes y. If there are more
    than `most` images, only `most` of them, drawn at random, are compared."""
    rows = torch.randperm(len(x), generator=seeded("pairs"))[:most].to(x.device)
    x, y = unit(x[rows]), y[rows]
    i, j = torch.triu_indices(len(x), len(x), 1)
    cosine = (x @ x.T)[i, j]
    if y.max() < 0:
        return {"two images": cosine}
    is_same = y[i] == y[j]
    return {"same class": cosine[is_same], "other class": cosine[~is_same]}

def best_nn(train_x, train_y, test_x, test_y, most=101):
    """{space: accuracy in %} of kNN with equal votes and the best odd k up to `most` (Shi et al.
    2022, who pick k on the test images, as here).

    Spaces: features as they are (raw), normalized, or minus their mean and then normalized
    (shifted). Where two classes have equally many votes, the lower number wins.
    """
    mean = train_x.mean(0)
    spaces = dict(raw=(train_x, test_x), normalized=(unit(train_x), unit(test_x)),
                  shifted=(unit(train_x - mean), unit(test_x - mean)))
    best = {}
    for name, (train, test) in spaces.items():
        labels = train_y[neighbours(train, test, most)[1]].cpu()  # (n, most), nearest first
        votes = [labels[:, :k].mode(1)[0] for k in range(1, labels.shape[1] + 1, 2)]
        is_right = torch.stack(votes) == test_y.cpu()
        best[name] = 100 * is_right.float().mean(1).max().item()
    return best

def instance_metrics(o, a, b, y):
    """{name: value} for one sample of images: features (N, D) of originals o and of views a, b."""
    oa = instance_discrimination(o, a, o)
    ab = instance_discrimination(b, a, a)
    measures = dict(oa=oa[0], ab=ab[0], ab5=ab[4], alignment_oa=alignment(o, a),
                    alignment_ab=alignment(a, b), uniformity=uniformity(o))
    if y.max() >= 0:
        is_close = cosines(o, y)["other class"] > 0.5
        measures |= dict(intra=intra_class_alignment(o, y), intra_views=intra_class_alignment(a, y),
                         close=100 * is_close.float().mean())
    # the mean over no pair is NaN, which JSON does not know
    return {name: float(value) for name, value in measures.items() if not math.isnan(value)}

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
    "close": "pairs of different classes with a cosine above 0.5, %",
    "nn_raw": "best-NN, raw %",
    "nn_normalized": "best-NN, normalized %",
    "nn_shifted": "best-NN, shifted %",
    "linear": "linear accuracy %",
}

def table(results):
    """Markdown with a row for each measure and a column for each network: `train / held-out`, or
    one number where only one of the two is measured."""
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---:|" * len(results)]
    for key, text in ROWS.items():
        digits = 1 if "%" in text else 3
        cells = []
        for measures in results.values():
            splits = (measures["train"], measures.get("held-out", {}))
            cells.append(" / ".join(f"{split[key]:.{digits}f}" for split in splits if key in split))
        if any(cells):
            lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

# Network a over-clusters compared with b if all four differences b - a are beyond these margins: a
# is tighter (intra-class alignment of b is larger), less spread (uniformity of b is lower) and less
# accurate. By chance alone, such a difference has a standard deviation of 0.017 (intra-class
# alignment) or 0.035 (uniformity) over the choice of 500 images of 10 classes of Tiny ImageNet, and
# of 0.7 points for accuracies near 50 % on 10,000 images. A margin is two of these deviations, but
# for intra-class alignment, whose differences are small, it is one.
MARGINS = dict(intra=0.017, uniformity=-0.07, nn_normalized=1.5, linear=1.5)

def diagnosis(results):
    """A sentence for each pair of trained networks of which one over-clusters by Shi et al. 2022:
    on held-out images its space is tighter and less spread than the other's, and yet its neighbours
    and its linear probe are worse."""
    held = {}
    for name, measures in results.items():
        if name not in UNTRAINED and measures.get("held-out", {}).keys() >= MARGINS.keys():
            held[name] = measures["held-out"]
    sentences = []
    for (name, a), (other, b) in permutations(held.items(), 2):
        more = {key: b[key] - a[key] for key in MARGINS}
        # dividing by the margin turns the sign of uniformity
        if all(more[key] / margin > 1 for key, margin in MARGINS.items()):
            sentences.append(f"{name} over-clusters compared with {other}: its space is tighter "
                             "and less spread, yet best-NN is "
                             f"{more['nn_normalized']:.1f} and linear accuracy "
                             f"{more['linear']:.1f} points lower")
    return sentences

# --------------------------------------------------------------------------------- 3. the pictures

def tsne(x, steps=1000, k=15):
    """Coordinates (N, 2) of x (N, D), N up to about 2,000, by t-SNE (van der Maaten & Hinton 2008).

    Each of the k nearest neighbours weighs the same, which gives almost the same map as weights by
    distance (Boehm et al. 2022). The learning rate is N / 12 (Belkina et al. 2019).
    """
    n = len(x)
    k = max(1, min(k, n - 1))
    near = torch.cdist(x, x).fill_diagonal_(math.inf).topk(k, largest=False)[1]
    p = torch.zeros(n, n).scatter_(1, near, 1 / k)
    p = (p + p.T) / (2 * n)  # sums to 1
    y = 1e-4 * torch.randn(n, 2, generator=seeded("map"))
    optimizer = torch.optim.SGD([y], lr=n / 12, momentum=0.8)
    for step in range(steps):
        attraction = 12 if step < steps / 4 else 1  # clusters form first, then they spread
        w = (1 / (1 + torch.cdist(y, y).square())).fill_diagonal_(0)
        force = w * (attraction * p - w / w.sum())
        y.grad = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        optimizer.step()
    return y

# Samples are {name of a network: (images, rows, labels, o, views)}, as `look` returns them. A
# picture is drawn twice as large and then shrunk, for smooth edges.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")  # Okabe, Ito
SIDE = 640  # of a panel's axes
LARGE, SMALL = ImageFont.load_default(30), ImageFont.load_default(24)

def draw_map(samples, path, side=20, cell=64):
    """For each network a square of images, arranged by t-SNE: what lies close together is alike to
    the network."""
    pictures = []
    for title, (images, rows, _, o, _) in samples.items():
        n = min(side, math.isqrt(len(rows)))
        some = torch.linspace(0, len(rows) - 1, n * n).long()
        x, y = tsne(o[some]).T
        columns = x.argsort().view(n, n)  # n images in each of n columns, from left to right
        columns = columns.gather(1, y[columns].argsort(1))  # each from top to bottom
        pixels = images.get(rows[some[columns.T.flatten()]])[0].float().cpu()
        tiles = F.interpolate(pixels, cell, mode="area").byte()
        grid = make_grid(tiles, nrow=n, padding=0).permute(1, 2, 0)
        picture = Image.new("RGB", (n * cell + 40, n * cell + 80), "white")
        text = f"{title[-30:]}: {n * n} images by t-SNE"
        ImageDraw.Draw(picture).text((20, 14), text, "black", LARGE)
        picture.paste(Image.fromarray(grid.numpy()), (20, 60))
        pictures.append(picture.reduce(2))
    save_row(pictures, path)

def save_row(pictures, path):
    """Save pictures (PIL, of one height) in a row."""
    Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], 1)).save(path)

def draw_panel(title, x_name, lines, low, high, shade=()):
    """A picture of lines {name: points (n, 2)} in axes from the point `low` to the point `high`.
    The area with the corners `shade` (m, 2) is filled."""
    picture = Image.new("RGB", (SIDE + 160, SIDE + 220), "white")
    draw = ImageDraw.Draw(picture)
    span = np.subtract(high, low)
    start = np.array([100, SIDE + 120])  # the pixel of `low`
    scale = SIDE / span * (1, -1)  # y grows downwards in a picture
    draw.text((100, 20), title[-50:], "black", LARGE)
    draw.text((100 + SIDE / 2, SIDE + 176), x_name, "black", SMALL, "mt")
    if shade:
        draw.polygon((start + scale * np.subtract(shade, low)).flatten().tolist(), "#BFE5D9")
    for part in (0, 0.25, 0.5, 0.75, 1):
        x, y = start + part * scale * span
        draw.line((100, y, SIDE + 100, y), "#DDDDDD", 2)
        draw.text((x, SIDE + 134), f"{low[0] + part * span[0]:.3g}", "black", SMALL, "mt")
        draw.text((86, y), f"{low[1] + part * span[1]:.3g}", "black", SMALL, "rm")
    x = 100
    for color, (name, points) in zip(cycle(COLORS), lines.items()):
        draw.line((start + scale * (points - low)).flatten().tolist(), color, 5, "curve")
        draw.text((x, 72), name[-30:], color, SMALL)
        x += 30 + draw.textlength(name[-30:], SMALL)
    return picture.reduce(2)

def draw_similarity(samples, path, most=5):
    """Densities of the cosines of two views of an image, and of two images by their classes. They
    are cut off at `most`, so that all networks have the same axes."""
    pictures = []
    for title, (_, _, labels, o, views) in samples.items():
        kinds = {"two views": (views[1:] * views[:-1]).sum(2).flatten()} | cosines(o, labels)
        lines = {}
        shade = []
        for kind, values in kinds.items():
            n = max(1, len(values))
            count, edges = np.histogram(values, 40, (-1, 1))  # 40 bins of 0.05: 20 of them are 1
            points = np.stack([edges[:-1] + 0.025, (20 * count / n).clip(max=most)], 1)
            if kind == "other class":
                kind += f": {100 * (values > 0.5).sum() / n:.0f} % above 0.5"
                shade = [(0.5, 0), *points[30:], (1, 0)]
            lines[kind] = points
        pictures.append(draw_panel(f"{title}: density of pairs", "cosine similarity", lines,
                                   (-1, 0), (1, most), shade))
    save_row(pictures, path)

TITLES = dict(loss="loss", instance_accuracy="instance accuracy (%)", knn="kNN accuracy (%)",
              found="views that find each other (%)")

def draw_curves(logs, path):
    """The measures of TITLES in logs {name of a run: entries}, by minutes trained. No picture is
    saved if the logs have none."""
    pictures = []
    for key, title in TITLES.items():
        lines = {}
        for name, log in logs.items():
            points = [(entry["minutes"], entry[key]) for entry in log if key in entry]
            if points:
                lines[name] = np.array(points)
        if lines:
            points = np.concatenate(list(lines.values()))
            # axes from one multiple of 4, 0.4, 40 .. to another, so that their quarters are round
            step = 4 * 10 ** np.floor(np.log10(np.ptp(points, 0) / 4 + 1e-3))
            low = step * (points.min(0) // step)
            high = step * (points.max(0) // step + 1)
            pictures.append(draw_panel(title, "minutes of training", lines, low, high))
    if pictures:
        save_row(pictures, path)

# -------------------------------------------------------------------------------------- 4. the run

VIEWS = 6  # of each image, for similarity.png; the measures use the first two

def look(net, train, held, size, args):
    """Measures {"images": n, split: {name: value}} of a network, and a sample of held-out images
    (without labels, of training images) for the pictures.

    The sample is a tuple: the Images; the N rows of them; their labels (N,); features of length one
    of the images (N, D) and of random views of each (VIEWS, N, D). Views are MoCo v2's, whatever
    the network was trained with, so that networks can be compared.
    """
    splits = {"train": train}
    if held is not None:
        splits["held-out"] = held
    rows = {split: sample_rows(images, args) for split, images in splits.items()}
    n = min(map(len, rows.values()))  # as many of each split: it is easier to be found among few
    if n < 2:
        raise InputError("--data: fewer than two images to compare; add some")
    measures = {"images": n}
    for split, images in splits.items():
        chosen = rows[split][:n].sort()[0]
        draws = torch.rand(VIEWS, n, data.COLUMNS, generator=seeded("views", args.seed, split))
        o, y = extract(net, images, size, chosen)
        views = torch.stack([unit(extract(net, images, size, chosen, u)[0]) for u in draws])
        measures[split] = instance_metrics(o, views[0], views[1], y)
    sample = images, chosen, y.cpu(), unit(o).cpu(), views.cpu()  # of the last split
    if held is not None:  # neighbours and the linear probe are measured on whole splits
        train_x, train_y = extract(net, train, size, (train.labels >= 0).nonzero()[:, 0])
        test_x, test_y = extract(net, held, size)
        weight, bias = linear_probe(train_x, train_y, len(train.classes))
        scores = F.linear(test_x, weight, bias)
        measures["held-out"]["linear"] = accuracy(scores, test_y)
        for space, value in best_nn(train_x, train_y, test_x, test_y).items():
            measures["held-out"][f"nn_{space}"] = value
    return measures, sample

def sample_rows(images, args):
    """Shuffled rows: --per-class of each class or, without labels, ten times as many in all."""
    rows = torch.arange(len(images))
    most = 10 * args.per_class
    if images.classes:
        rows = labelled_subset(images.labels, str(args.per_class), args.seed)
        most = len(rows)
    return rows[torch.randperm(len(rows), generator=seeded("part", args.seed))[:most]]

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="+", help="runs, checkpoint files, random, pixels")
    add_common_flags(parser)
    parser.add_argument("--per-class", type=positive, default=50,
                        help="images of a class in the sample, for all but best-NN and linear [50]")
    args = parser.parse_args(argv)
    device = init_device(args.device)

    # The first network decides on the images. Where nothing else is known of the others, they take
    # its arch, stem and size. random and pixels come last, as False sorts before True.
    opened = []
    defaults = DEFAULTS
    for name in sorted(dict.fromkeys(args.checkpoint), key=UNTRAINED.__contains__):
        net, values = open_checkpoint(name, args, defaults)
        opened.append((net, values))
        defaults = opened[0][1]
        args.data = defaults["data"]
    loaded = {}  # all networks of one size see the same images in memory
    results = {}
    samples = {}
    for net, values in opened:
        name, size = net.name, values["size"]
        if size not in loaded:
            loaded[size] = data.load(args.data, args.root, size, device)
            move_to_device(*loaded[size][:2])
        train, held, size = loaded[size]
        print0(f"{name}: {values['arch']} at {size} pixels on {args.data}")
        to_evaluate(net, device)
        results[name], samples[name] = look(net, train, held, size, args)
    if rank_world()[0] == 0:
        write(results, samples, args)
    return results

def write(results, samples, args):
    """Print the table and the diagnosis, and write all files."""
    names = list(results)
    print(f"\n{table(results)}\n\ntrain / held-out, {results[names[0]]['images']} images each; "
          "best-NN and linear accuracy on whole splits\n")
    for sentence in diagnosis(results):
        print(f"- {sentence}.")
    out = Path(args.out or folder_of(names[0]) / "analysis")
    out.mkdir(parents=True, exist_ok=True)
    save(out / "analysis.json", json.dumps(results, indent=1))
    draw_map(samples, out / "map.png")
    draw_similarity(samples, out / "similarity.png")
    logs = {}
    for name in names:
        log = folder_of(name) / "log.jsonl"
        if log.is_file():
            logs[name] = [json.loads(line) for line in log.read_text().splitlines()]
    draw_curves(logs, out / "curves.png")
    print(f"\nIn {out}: analysis.json and the pictures")

if __name__ == "__main__":
    run(main)
