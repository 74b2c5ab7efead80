"""What are the features of a checkpoint worth? Linear probe, kNN, few labels, fine-tuning, transfer.

    python linear_eval.py runs/NAME                                   # a linear probe, in seconds
    python linear_eval.py runs/NAME --knn                             # and weighted kNN, which trains nothing
    python linear_eval.py runs/NAME --protocol moco                   # the probe as published: 100 epochs at lr 30
    python linear_eval.py runs/NAME --labels 0.01 --finetune          # the whole network on 1 % of the labels
    python linear_eval.py runs/NAME --data cifar100                   # transfer
    python linear_eval.py random --arch mobilenetv3 --data FOLDER     # what no training at all is worth
    torchrun --nproc-per-node 8 linear_eval.py runs/NAME              # features shared out over eight GPUs
    python linear_eval.py runs/NAME/eval-DATA-fast/classifier.pt --predict IMAGES   # use the result

A checkpoint is a run's folder, any file of a run, a torchvision state dict, or a file of MoCo, ssl-small or SEED.
"""
import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import data
import models
from data import InputError, rank_world, say

# ------------------------------------------------------------------------------------------- networks and features


def flags(parser):
    """The flags that say what is evaluated, for this file and analyze.py."""
    parser.add_argument("--data", help="fractals, cifar10, cifar100, stl10, caltech101 or a folder [what the checkpoint was "
                        "trained on]")
    parser.add_argument("--root", default="data", help="where torchvision's data sets are, or are downloaded to [data]")
    parser.add_argument("--size", type=int, help="side of an image in pixels [the checkpoint's]")
    parser.add_argument("--arch", help=f"where the checkpoint does not tell: {', '.join(models.ARCHS)}")
    parser.add_argument("--stem", choices=["imagenet", "small"], help="[the checkpoint's; small up to 64 pixels, but not for fractals]")
    parser.add_argument("--stream", default="auto", choices=["auto", "on", "off"],
                        help="read files as they are needed, or all at once [auto: by free memory]")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1),
                        help="decoding threads or processes [the cores, at most 16]")
    parser.add_argument("--memory", type=float,
                        help="GB of features to hold in memory; more go to a temporary file [a third of what is free]")
    parser.add_argument("--out", help="folder of the results [beside the checkpoint]")
    parser.add_argument("--seed", type=int, default=0, help="of random weights, subsets and crops [0]")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu [the first there is]")


def read_checkpoint(name, args):
    """(state dict or None for `random`, what is known: `arch`, `stem`, `size`, `data`, `root`), the flags' word first."""
    state, known = (None, {}) if name == "random" else models.read_backbone(name, args.arch)
    known["trained_on"] = known.get("data")
    for key, default in dict(arch="mobilenetv3", stem=None, size=None, data="fractals", root="data").items():
        given = getattr(args, key) if key != "root" or args.data else None  # --root belongs to --data
        known[key] = given or known.get(key) or (args.root if key == "root" else default)
    if state:
        say(f"{name}: {known['arch']}, {len(state)} tensors; dropped {len(known['dropped'])}"
            + (f" ({', '.join(known['dropped'][:3])} ...)" if known["dropped"] else ""))
    return state, known


def network(state, known, seed):
    """The network of a checkpoint, or one with the random weights that pretraining with this `seed` starts from."""
    torch.manual_seed(seed)
    known["stem"] = known["stem"] or ("small" if known["size"] <= 64 and known["data"] != "fractals" else "imagenet")
    net = models.build(known["arch"], known["stem"])
    if state is not None:
        try:
            net.load_state_dict(state)
        except RuntimeError:
            raise InputError(f"--stem {known['stem']}: the checkpoint has the other stem") from None
    return net.eval().to(memory_format=torch.channels_last)


def allocate(n, d, device, memory=None):
    """Room for features (n, d): float32 on the device, or beyond `memory` GB bfloat16 in a file that vanishes by itself.

    1.3 million features of 1280 numbers are 6.7 GB in memory, or 3.3 GB in the file. (float16 would round the features of
    a random MobileNetV3, near 1e-10, to zero.)
    """
    limit = data.free_memory(device) / 3 if memory is None else memory * 1e9
    if 4 * n * d <= limit:
        return torch.empty(n, d, device=device)
    with tempfile.NamedTemporaryFile(prefix="features-") as file:  # unlinked at once, the map keeps it
        say(f"{4e-9 * n * d:.2f} GB of features, --memory {limit / 1e9:.2f}: kept in half precision in a file in "
            + tempfile.gettempdir())
        return torch.from_file(file.name, shared=True, size=n * d, dtype=torch.bfloat16).view(n, d)


@torch.no_grad()
def extract(net, images, size, device, rows=None, workers=2, memory=None, u=None, **augmentation):
    """Features (N, D) of the center squares of `images` (those in `rows`), in order, and their labels (N,); with uniforms
    u (N, data.COLUMNS), of the augmented views that u and the settings of data.augment say.

    Every process computes every world-th block of 256 and all get all, so that a block, and so a feature, is the same
    on any number of processes. A file that turns out to be unreadable is left out.
    """
    rank, world = rank_world()
    rows = torch.arange(len(images)) if rows is None else rows
    blocks, x, progress, start = rows.split(256), None, data.Progress(), time.time()
    rounds = -(-len(blocks) // world)
    mine = list(blocks[rank::world])
    mine += [rows[:1]] * (rounds - len(mine))  # all processes take part in the last round
    draws = [None] * rounds if u is None else (list(u.split(256))[rank::world] + [u[:1]] * rounds)[:rounds]
    items = [block.tolist() if v is None else list(zip(block.tolist(), v[:, None, :22])) for block, v in zip(mine, draws)]
    crop = augmentation.pop("crop", (0.2, 1.0))
    crops = None if images.paths is None else images.stream(items, device, workers, [(1, size, crop)])
    good = torch.ones(len(rows), dtype=torch.bool)
    for i, block in enumerate(mine):
        pixels = next(crops)[0][:, 0] if crops else images.pixels[block.to(images.pixels.device)]
        v = draws[i]
        z = net(data.center(pixels, size) if v is None else
                data.augment(pixels, v.to(device), size, None if crops else crop, **augmentation)).float()
        fine = torch.tensor([row not in images.bad for row in block.tolist()], device=device)
        z = torch.cat([z, fine[:, None]], 1)
        z = data.gather(F.pad(z, (0, 0, 0, 256 - len(z))))[:len(rows) - 256 * world * i]
        x = allocate(len(rows), z.shape[1] - 1, device, memory) if x is None else x
        there = slice(256 * world * i, 256 * world * i + len(z))
        x[there], good[there] = z[:, :-1].to(x.dtype), z[:, -1].bool().cpu()
        progress(lambda: f"features {100 * (i + 1) // rounds} %, {(time.time() - start) * (rounds / (i + 1) - 1):.0f} s left")
    images.leave_out(rows[~good].tolist())  # what another process met, too
    return (x, images.labels[rows].to(device)) if good.all() else (x[good.to(x.device)], images.labels[rows[good]].to(device))


def pixels_of(size):
    """Raw pixels as features: images (N, 3, S, S) -> (N, 3 s s), area-averaged down to at most 32 x 32."""
    return lambda x: F.interpolate(x, (min(size, 32),) * 2, mode="area").flatten(1)


# ------------------------------------------------------------------------------------------------------- the probes

def unit(x):
    """Rows of x (N, D) at length one, also a random EfficientNet's features near 1e-14, below F.normalize's usual eps."""
    return F.normalize(x, dim=1, eps=1e-30)


def neighbours(train_x, test_x, k):
    """The k nearest rows of train_x (N, D) to each of test_x (n, D): squared distances and rows (n, k), nearest first."""
    found = []
    for x in test_x.split(1000):
        x, best, start = x.float(), None, 0
        for block in train_x.split(65536):  # an N x n table of distances never exists
            block = block.to(x.device).float()
            near, row = torch.addmm(-0.5 * block.square().sum(1), x, block.T).topk(min(k, len(block)))
            row += start
            if best is not None:
                near, pick = torch.cat([best[0], near], 1).topk(min(k, near.shape[1] + best[0].shape[1]))
                row = torch.cat([best[1], row], 1).gather(1, pick)
            best, start = (near, row), start + len(block)
        found.append(((x.square().sum(1, keepdim=True) - 2 * best[0]).clamp_(min=0), best[1]))
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def vote(distance, labels, classes, temperature):
    """Weighted kNN (Wu et al. 2018): squared distances and labels (n, k) of unit neighbours -> scores (n, classes)."""
    weight = ((1 - distance / 2) / temperature).exp()  # the cosine similarity of unit vectors
    return torch.zeros(len(labels), classes, device=labels.device).scatter_add_(1, labels, weight)


def knn(train_x, train_y, test_x, test_y, k=200, temperature=0.1):
    """Accuracy in % of the weighted k-nearest-neighbour vote on features of any length, normalized here."""
    distance, near = neighbours(unit(train_x), unit(test_x), min(k, len(train_x)))
    guess = vote(distance, train_y[near], int(train_y.max()) + 1, temperature).argmax(1)
    return 100 * (guess == test_y).double().mean().item()


def held_out(labels):
    """A mask (N,) of about every fifth image of each class, none of a class with one: to pick penalties on."""
    place, count = torch.zeros_like(labels), labels.bincount(minlength=1)[labels]
    order = labels.argsort(stable=True)
    first = labels[order].bincount().cumsum(0)[labels[order]] - count[order]
    place[order] = torch.arange(len(labels), device=labels.device) - first
    return (place % 5 == 4) | ((count < 5) & (count > 1) & (place == count - 1))


def ridge(train_x, train_y, test_x, test_y):
    """Accuracy in % of a linear probe in closed form: ridge regression of one-hot labels on standardized features.

    The penalty is picked on every fifth training image, then the probe is solved again with all of them.
    """
    mean, std = train_x.mean(0), train_x.std(0)
    std = std.clamp(min=1e-6 * std.max())  # a random MobileNetV3 has features near 1e-10: constant is relative
    x, t = ((v - mean).div(std).cpu().double() for v in (train_x, test_x))
    y, labels = F.one_hot(train_y).cpu().double(), train_y.cpu()

    def solve(rows, penalties, x_test):
        a, b = x[rows], y[rows] - y[rows].mean(0)
        gram, right, eye = a.T @ a, a.T @ b, torch.eye(a.shape[1], dtype=a.dtype)
        for penalty in penalties:
            weight = torch.cholesky_solve(right, torch.linalg.cholesky(gram + penalty * len(a) * eye))
            yield (x_test @ weight + y[rows].mean(0)).argmax(1)

    held = held_out(labels)
    penalties = [1e-3, 1e-2, 1e-1, 1, 10]
    scores = [(guess == labels[held]).double().mean().item() for guess in solve(~held, penalties, x[held])]
    best = penalties[int(np.argmax(scores))]
    return 100 * (next(solve(held | True, [best], t)) == test_y.cpu()).double().mean().item()


class Standardized:
    """Features (N, D) wherever they lie, in blocks on the device with mean 0, variance 1 and a last column of ones."""

    def __init__(self, x, device):
        self.x, self.device = x, device
        blocks = x.split(8192)
        self.mean = sum(b.to(device).float().sum(0) for b in blocks) / len(x)
        std = (sum((b.to(device).float() - self.mean).square().sum(0) for b in blocks) / len(x)).sqrt()
        self.std = std.clamp(min=1e-6 * std.max()).clamp(min=1e-30)  # what is constant is constant relative to the others

    def blocks(self, x=None, use=None):
        """(block (n, D + 1), its rows) of x, by default of the features themselves, and only of the rows in the mask."""
        x = self.x if x is None else x
        rows = torch.arange(len(x)) if use is None else use.cpu().nonzero()[:, 0]
        for part in rows.split(8192):
            block = (x[part.to(x.device)].to(self.device).float() - self.mean) / self.std
            yield F.pad(block, (0, 1), value=1), part.to(self.device)


def logistic(features, y, classes, penalties, use=None, start=None, steps=100):
    """Linear classifiers (G, D + 1, classes) of `Standardized` features with labels y, one for each of G penalties.

    Each minimizes mean cross-entropy + penalty / 2 |W|^2 over the rows in the mask `use`. It is one problem for L-BFGS,
    with one matrix product a block for all, so there is no learning rate to fit. Cross-entropy's curvature is at most half
    the features' covariance (Boehning 1992): along that one's eigenvectors, each scaled by 1 / sqrt(eigenvalue / 2 +
    penalty), all directions are about equally steep, which saves most of the steps.
    """
    penalty = torch.tensor(penalties, device=y.device)[:, None]
    n, G = len(y) if use is None else int(use.sum()), len(penalties)
    once = [*features.blocks(use=use)] if features.x.dtype == torch.float32 else None  # standardized once, if in memory
    eigenvalue, Q = torch.linalg.eigh(sum(a.T @ a for a, _ in once or features.blocks(use=use)) / n)
    kept = eigenvalue > 1e-7 * eigenvalue[-1]  # the penalty keeps W in the span of the features
    Q, scale = Q[:, kept], (eigenvalue[kept, None, None] / 2 + penalty).rsqrt()
    U = torch.zeros(Q.shape[1], G, classes, device=y.device)
    U = U if start is None else torch.einsum("dr,gdc->rgc", Q, start) / scale
    progress, began, calls = data.Progress(), time.time(), 0

    def objective():
        nonlocal calls
        V = scale * U
        flat, loss, gradient = Q @ V.flatten(1), (penalty / 2 * V.square()).sum(), 0
        for a, rows in once or features.blocks(use=use):
            log_p = (a @ flat).view(len(a), G, classes).log_softmax(2)
            label = y[rows, None, None].expand(-1, G, 1)
            loss -= log_p.gather(2, label).sum() / n
            error = log_p.exp_().scatter_add_(2, label, log_p.new_full((len(a), G, 1), -1))
            gradient = gradient + a.T @ error.view(len(a), -1)
        U.grad = scale * ((Q.T @ gradient).view(-1, G, classes) / n + penalty * V)
        calls += 1
        progress(lambda: f"probe {100 * calls // steps} %, {(time.time() - began) * (steps / calls - 1):.0f} s left")
        return loss

    torch.optim.LBFGS([U], max_iter=steps, max_eval=steps, history_size=10, tolerance_grad=1e-6, tolerance_change=1e-9,
                      line_search_fn="strong_wolfe").step(objective)
    return torch.einsum("dr,rgc->gdc", Q, scale * U)


PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


def fast_probe(x, y, classes, device):
    """The best linear classifier of features x (N, D) with labels y: weight (classes, D) and bias (classes,).

    The penalty is picked on held-out training images; then that classifier goes on with all of them.
    """
    features, held, best, W = Standardized(x, device), held_out(y), 2, None
    if held.any():
        W = logistic(features, y, classes, PENALTIES, ~held)
        right = sum(((a @ W).argmax(2) == y[rows]).sum(1) for a, rows in features.blocks(use=held)).tolist()
        best = right.index(max(right))
        W = W[best:best + 1]
        say(f"picked penalty {PENALTIES[best]:g}: held-out training images right by penalty, "
            + ", ".join(f"{p:g}: {100 * r / int(held.sum()):.1f} %" for p, r in zip(PENALTIES, right)))
    W = logistic(features, y, classes, PENALTIES[best:best + 1], start=W)[0]
    weight = (W[:-1] / features.std[:, None]).T.contiguous()  # for features as they are, not standardized
    return weight, W[-1] - weight @ features.mean


def train(net, head, images, rows, args, size, crop, device, frozen):
    """Train `head` by SGD on random crops and flips of `rows`: on the frozen net (the published probe), or with the net."""
    rank, world = rank_world()
    batch = min(args.batch, len(rows)) // world * world
    epoch_steps, n = len(rows) // batch, batch // world
    mine = slice(rank * n, (rank + 1) * n)
    parameters = [*head.parameters(), *([] if frozen else net.parameters())]
    optimizer = torch.optim.SGD(parameters, args.lr, momentum=0.9, weight_decay=args.wd)
    schedule = lambda step: data.schedule(len(rows), batch, args.seed, step)  # noqa: E731
    steps = args.epochs * epoch_steps

    def items():
        for picked, u, _ in map(schedule, range(steps)):
            yield list(zip(rows[picked[mine]].tolist(), u[:1, mine, :22].transpose(0, 1)))

    crops = None if images.paths is None else images.stream(items(), device, args.workers, [(1, size, crop)])
    net.train(not frozen), head.train()
    progress, start = data.Progress(), time.time()
    for step in range(steps):
        picked, u, _ = schedule(step)
        x = next(crops)[0][:, 0] if crops else images.pixels[rows[picked[mine]].to(device)]
        x = data.augment(x, u[0, mine].to(device), size, None if crops else crop, jitter=0, hue=0, gray=0, blur=0)
        done = step // epoch_steps / args.epochs
        for group in optimizer.param_groups:  # published: a tenth at 60 % and at 80 %; fine-tuning: cosine
            group["lr"] = args.lr * batch / args.batch * (
                0.1 ** ((done >= 0.6) + (done >= 0.8)) if frozen else 0.5 * (1 + math.cos(math.pi * step / steps)))
        y = images.labels[rows[picked]].to(device)
        with torch.set_grad_enabled(not frozen):
            z = net(x).float()
        if frozen:  # every process takes the same step on the whole batch, as one alone would
            loss = F.cross_entropy(head(data.gather(z)), y, ignore_index=-1)
        else:
            loss = F.cross_entropy(head(z), y[mine], ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        if world > 1 and not frozen:
            for p in parameters:
                torch.distributed.all_reduce(p.grad)
                p.grad /= world
        optimizer.step()
        progress(lambda: f"epoch {step // epoch_steps + 1}/{args.epochs}  loss {loss.item():.3f}  "
                         f"{int((time.time() - start) * (steps / (step + 1) - 1))} s left")
    if world > 1 and not frozen:
        for buffer in [*net.buffers(), *head.buffers()]:  # the first process's BatchNorm statistics
            torch.distributed.broadcast(buffer, 0)
    net.eval()


# ------------------------------------------------------------------------------------------------------ the results

def measure(scores, y):
    """Scores (N, C) and labels (N,) -> top-1, its 95 % interval (Wilson 1927), top-5 and mean per-class accuracy in %."""
    n, classes = scores.shape
    ranked = scores.topk(min(5, classes)).indices == y[:, None]
    right = ranked[:, 0].double()
    count = y.bincount(minlength=classes)
    each = torch.zeros(classes, dtype=torch.float64, device=y.device).scatter_add_(0, y, right) / count
    p, z = right.mean().item(), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (100 * v / (1 + z * z / n) for v in (middle - half, middle + half))
    return dict(top1=100 * p, low=low, high=high, top5=100 * ranked.any(1).double().mean().item(),
                mean_per_class=100 * each[count > 0].mean().item())


def confusion(scores, y):
    """(C, C) counts: row the class, column the answer."""
    classes = scores.shape[1]
    return torch.bincount(y * classes + scores.argmax(1), minlength=classes * classes).view(classes, classes).cpu()


def draw_confusion(table, names, path):
    """The confusion of classes as a picture: each row sums to one, dark is much."""
    c = len(names)
    cell, font = max(3, min(40, 900 // c)), ImageFont.load_default(max(8, min(15, 900 // c)))
    margin = 16 + int(max(font.getlength(name) for name in [*names, "row: class"]))
    share = (table / table.sum(1, keepdim=True).clamp(min=1)).numpy()[..., None]
    colors = np.array([255, 255, 255]) * (1 - share ** 0.6) + np.array([8, 48, 107]) * share ** 0.6  # 1 % is to be seen
    picture = Image.new("RGB", (margin + c * cell + 10, margin + c * cell + 10), "white")
    cells = Image.fromarray(colors.round().astype(np.uint8)).resize((c * cell, c * cell), Image.NEAREST)
    picture.paste(cells, (margin, margin))
    for anchor, x, turn in (("rm", margin - 6, None), ("lm", 6, Image.ROTATE_90)):  # classes to the left, answers above
        strip = Image.new("RGB", (margin, c * cell), "white")
        for i, name in enumerate(names):
            ImageDraw.Draw(strip).text((x, (i + 0.5) * cell), name, "black", font, anchor=anchor)
        picture.paste(strip.transpose(turn) if turn else strip, (margin, 0) if turn else (0, margin))
    ImageDraw.Draw(picture).rectangle((margin - 1, margin - 1, margin + c * cell, margin + c * cell), outline="gray")
    if cell >= 24:
        for i in range(c):
            for j in range(c):
                at, color = (margin + (j + 0.5) * cell, margin + (i + 0.5) * cell), "white" if share[i, j, 0] > 0.4 else "black"
                ImageDraw.Draw(picture).text(at, f"{100 * share[i, j, 0]:.0f}", color, font, anchor="mm")
    ImageDraw.Draw(picture).text((4, 4), "row: class\ncolumn: answer", "gray", ImageFont.load_default(10))
    picture.save(path)


def predict(args):
    """Print the most probable classes of each image of --predict."""
    state, info = models.read_backbone(args.checkpoint, args.arch)
    full, last, names = models.load_file(args.checkpoint), models.last_linear(info["arch"]), info.get("classes")
    if f"{last}.weight" not in full:
        raise InputError(f"{args.checkpoint}: has no classifier; linear_eval.py makes one from it and labelled images")
    names = names or [f"class {i}" for i in range(len(full[f"{last}.bias"]))]
    net = models.build(info["arch"], info["stem"] or args.stem or "imagenet").eval()
    net.load_state_dict(state)
    size, bad = args.size or info["size"] or 224, []
    for path in args.predict:
        crop = data.attempt(path, (size, None, None))
        if crop is None:
            bad.append(path)
            continue
        with torch.no_grad():
            p = F.linear(net(data.center(crop[0], size)), full[f"{last}.weight"], full[f"{last}.bias"])[0].softmax(0)
        print(f"{path}: " + ", ".join(f"{names[i]} {100 * p[i]:.1f} %" for i in p.topk(min(3, len(names))).indices.tolist()))
    if bad:
        raise InputError(f"--predict: not readable as an image: {', '.join(bad)}")


# ---------------------------------------------------------------------------------------------------------- the run

def labelled_subset(labels, wanted, seed):
    """Rows of a class-balanced subset: `wanted` is a share ("0.01") of the labelled images or a number a class ("25")."""
    classes, order = labels.max().item() + 1, torch.randperm(len(labels), generator=data.seeded("labels", seed))
    try:
        per = max(1, round(float(wanted) * int((labels >= 0).sum()) / classes)) if "." in wanted else int(wanted)
        assert 0 < per and not ("." in wanted and float(wanted) > 1)
    except (ValueError, AssertionError):
        raise InputError(f"--labels {wanted}: neither a share such as 0.01 nor a number of images a class such as 25") from None
    return torch.cat([order[labels[order] == c][:per] for c in range(classes)]).sort()[0]


def check_labels(train, test, name):
    """Refuse data whose labels an evaluation cannot use."""
    if not train.classes:
        raise InputError(f"--data {name}: no labels; an evaluation needs a folder for each of at least two classes")
    if test is None or len(test) == 0:
        raise InputError(f"--data {name}: no held-out image; add a folder test/ beside train/, or more images")
    absent = set(range(len(train.classes))) - set(train.labels.tolist())
    if absent:
        raise InputError(f"--data {name}: class {train.classes[min(absent)]} has no training image; add one, or remove the class")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder, a checkpoint file, or random")
    flags(parser)
    parser.add_argument("--protocol", default="fast", choices=["fast", "moco"],
                        help="fast: one pass over the images, then the best of some penalties; moco: 100 epochs of random "
                             "crops, SGD at lr 30 (He et al. 2020) [fast]")
    parser.add_argument("--knn", action="store_true", help="also weighted kNN (Wu et al. 2018) for some k and temperatures")
    parser.add_argument("--finetune", action="store_true", help="train the whole network, from that probe's classifier on")
    parser.add_argument("--labels", help="use a share (0.01) of the labels, or so many a class (25), the same for a --seed [all]")
    parser.add_argument("--epochs", type=int, help="[moco: 100; fine-tuning: 30]")
    parser.add_argument("--batch", type=int, default=256, help="images in a step, over all processes [256]")
    parser.add_argument("--lr", type=float, help="for a batch of that size [moco: 30; fine-tuning: 0.03]")
    parser.add_argument("--wd", type=float, help="weight decay [moco: 0; fine-tuning: 1e-4]")
    parser.add_argument("--crop", type=float, nargs=2, metavar=("LO", "HI"),
                        help="area of the random crops [0.08 1; as published for transfer 0.6 1, and for fine-tuning 0.2 1]")
    parser.add_argument("--predict", nargs="+", metavar="IMAGE",
                        help="name the classes of these images; the checkpoint is a classifier.pt made here")
    args = parser.parse_args(argv)
    if args.predict:
        return predict(args)
    began, device = time.time(), data.start(args.device)
    protocol = "finetune" if args.finetune else args.protocol
    usual = dict(epochs=30, lr=0.03, wd=1e-4) if args.finetune else dict(epochs=100, lr=30.0, wd=0.0)
    for key, value in usual.items():
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    if min(args.epochs, args.batch, args.lr) <= 0:
        raise InputError("--epochs, --batch, --lr: must be above 0")

    state, known = read_checkpoint(args.checkpoint, args)
    train_set, test_set, known["size"] = data.load(known["data"], known["root"], known["size"], args.seed, device, args.stream,
                                                   args.workers)
    check_labels(train_set, test_set, known["data"])
    net, size, classes = network(state, known, args.seed).to(device), known["size"], len(train_set.classes)
    rows = (train_set.labels >= 0).nonzero()[:, 0]
    rows = rows if args.labels is None else labelled_subset(train_set.labels, args.labels, args.seed)
    say(f"{known['arch']} at {size} pixels on {known['data']}: {len(rows):,} training and {len(test_set):,} test images, "
        f"{classes} classes")

    def features(images, rows=None):
        return extract(net, images, size, device, rows, args.workers, args.memory)

    table = {}
    if args.knn or protocol != "moco":
        train_x, train_y = features(train_set, rows)
    if args.knn:
        test_x, test_y = features(test_set)
        near = neighbours(unit(train_x), unit(test_x), min(200, len(train_x)))
        for k in (1, 10, 20, 100, 200):
            for temperature in (0.07, 0.1, 0.2):
                if k <= near[1].shape[1]:
                    scores = vote(near[0][:, :k], train_y[near[1][:, :k]], classes, temperature)
                    table[f"kNN, k {k}, T {temperature:g}"] = measure(scores, test_y)
    torch.manual_seed(args.seed)
    if protocol == "moco":
        linear = nn.Linear(net.dim, classes, device=device)
        nn.init.normal_(linear.weight, 0, 0.01), nn.init.zeros_(linear.bias)
        transfer = known["trained_on"] not in (None, known["data"])
        train(net, linear, train_set, rows, args, size, args.crop or ((0.6, 1) if transfer else (0.08, 1)), device, True)
        weight, bias = linear.weight.detach(), linear.bias.detach()
    else:
        weight, bias = fast_probe(train_x, train_y, classes, device)
    if args.finetune:  # the classifier behind a BatchNorm, for the features change; at the end the two are one again
        norm, linear = nn.BatchNorm1d(net.dim, affine=False, device=device), nn.Linear(net.dim, classes, device=device)
        standardized = Standardized(train_x, device)
        with torch.no_grad():
            norm.running_mean.copy_(standardized.mean), norm.running_var.copy_(standardized.std ** 2)
            linear.weight.copy_(weight * standardized.std), linear.bias.copy_(bias + weight @ standardized.mean)
        train(net, nn.Sequential(norm, linear), train_set, rows, args, size, args.crop or (0.2, 1), device, False)
        weight = linear.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        bias = linear.bias.detach() - weight @ norm.running_mean
    test_x, test_y = features(test_set)
    scores = torch.cat([F.linear(x.to(device).float(), weight, bias) for x in test_x.split(8192)])
    name = {"fast": "linear, fast", "moco": f"linear, moco, {args.epochs} epochs",
            "finetune": f"fine-tuned, {args.epochs} epochs"}[protocol]
    table[name] = measure(scores, test_y)
    if rank_world()[0] == 0:
        write(args, known, protocol, table, net, weight, bias, confusion(scores, test_y), train_set.classes,
              time.time() - began)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return table


def write(args, known, protocol, table, net, weight, bias, confused, names, seconds):
    """Print the table; leave it, the classes' accuracies, the confusion and the classifier in the folder of the results."""
    labels = f", {args.labels} {'of the labels' if '.' in args.labels else 'labels a class'}" if args.labels else ""
    print(f"\n{args.checkpoint} on {known['data']}{labels}, {int(confused.sum()):,} test images, {seconds:.0f} s\n"
          f"{'':<26}{'top-1 %':>9}{'95 % interval':>16}{'top-5 %':>9}{'mean per class %':>18}")
    for name, row in table.items():
        print(f"{name:<26}{row['top1']:>9.2f}{row['low']:>9.2f}..{row['high']:<5.2f}{row['top5']:>9.2f}"
              f"{row['mean_per_class']:>18.2f}")
    each = 100 * confused.diag() / confused.sum(1).clamp(min=1)
    pairs = confused + confused.T
    pairs = [(i, j, int(pairs[i, j])) for i in range(len(names)) for j in range(i)]
    pairs = [(names[j], names[i], count) for i, j, count in sorted(pairs, key=lambda pair: -pair[2])[:3]]
    ranked = [f"{names[i]} {each[i]:.1f} %" for i in sorted(range(len(names)), key=lambda i: each[i])]
    print(f"hardest classes: {', '.join(ranked[:5])}; easiest: {', '.join(ranked[:-6:-1])}\n"
          f"most confused: {', '.join(f'{a} and {b} ({count})' for a, b, count in pairs)}")

    path = Path(args.checkpoint)
    beside = Path("runs") / f"random-{known['arch']}" if args.checkpoint == "random" else path if path.is_dir() else path.parent
    label = f"-{args.labels}" if args.labels else ""
    out = Path(args.out) if args.out else beside / f"eval-{Path(known['data']).resolve().name}-{protocol}{label}"
    out.mkdir(parents=True, exist_ok=True)
    last = models.last_linear(known["arch"])
    backbone = {k: v.cpu().contiguous() for k, v in net.state_dict().items()}
    data.save(out / "classifier.pt", backbone | {f"{last}.weight": weight.cpu(), f"{last}.bias": bias.cpu()})
    described = {k: known[k] for k in ("arch", "stem", "size", "data", "root")} | dict(classes=names)
    (out / "args.json").write_text(json.dumps(described, indent=1))
    (out / "result.json").write_text(json.dumps(dict(
        checkpoint=args.checkpoint, args=vars(args), table=table, seconds=seconds, test_images=int(confused.sum()),
        per_class=dict(zip(names, each.tolist())), most_confused=pairs, confusion=confused.tolist()), indent=1))
    draw_confusion(confused, names, out / "confusion.png")
    print(f"\nIn {out}: result.json, confusion.png and classifier.pt (torchvision's names, last Linear included). Use it:\n"
          f"  python linear_eval.py {out}/classifier.pt --predict IMAGES")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"linear_eval.py: {error}")
