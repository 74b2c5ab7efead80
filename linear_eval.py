"""What are the features of a checkpoint worth? Linear probe, kNN, few labels, fine-tuning.

    python linear_eval.py runs/NAME                            # a linear probe, in seconds
    python linear_eval.py runs/NAME --knn                      # and kNN, which trains nothing
    python linear_eval.py runs/NAME --protocol moco            # the probe as published: 100 epochs
    python linear_eval.py runs/NAME --labels 0.01 --finetune   # the whole network, 1 % of labels
    python linear_eval.py runs/NAME --data cifar100            # transfer
    python linear_eval.py random --data FOLDER                 # what no training at all is worth
    torchrun --nproc-per-node 8 linear_eval.py runs/NAME       # features shared out over 8 GPUs
    python linear_eval.py runs/NAME/eval-DATA-fast/classifier.pt --predict IMAGES

A checkpoint is a run's folder, any file of a run, a torchvision state dict, or a file of MoCo,
ssl-small or SEED. Read it from top to bottom: features, kNN, the linear probe, training, results.
"""
import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import data
import models
from data import InputError, print0, rank_world

# ------------------------------------------------------------------------------------- 1. features

BLOCK = 256  # images at a time

@torch.no_grad()
def extract(net, images, size, rows=None, u=None, **augmentation):
    """Features (N, D) of the center squares of `rows` (N,) [all images], and their labels (N,);
    with uniform numbers u (N, data.COLUMNS), of the views that these and the settings of
    data.augment say.

    Each process computes every world-th block, and all get all. So a block, and a feature, is the
    same on any number of processes.
    """
    _, world = rank_world()
    if rows is None:
        rows = torch.arange(len(images))
    rounds = math.ceil(len(rows) / (BLOCK * world))
    progress = data.Progress(rounds)
    features = []
    blocks = data.ahead(partial(fetch_block, images, rows), range(rounds), images.is_far)
    for i, (start, block) in enumerate(blocks):
        pixels, shapes = images.put(*block)
        if u is None:
            views = data.center(pixels, size, shapes)
        else:
            numbers = data.to_device(u[start:start + BLOCK], images.device)
            views = data.augment(pixels, numbers, size, shapes=shapes, **augmentation)
        z = net(views).float()
        z = data.gather(F.pad(z, (0, 0, 0, BLOCK - len(z))))
        features.append(z[:len(rows) - BLOCK * world * i])  # the last round has blocks to spare
        if progress.due():
            progress.show(i + 1, f"features {100 * (i + 1) // rounds} %")
    return torch.cat(features), images.labels[rows].to(images.device)

def fetch_block(images, rows, i):
    """Where this process's block of round i starts in `rows`, and what it holds."""
    rank, world = rank_world()
    start = BLOCK * (i * world + rank)
    if start >= len(rows):  # all processes take part in the last round
        start = 0
    return start, images.fetch(rows[start:start + BLOCK])

class Pixels(nn.Module):
    """Raw pixels as features: (N, 3, S, S) -> (N, 3 s s), averaged down to at most 32 x 32."""

    def forward(self, x):
        side = min(x.shape[-1], 32)
        return F.interpolate(x, (side, side), mode="area").flatten(1)

def unit(x):
    """Rows of x (N, D) at length one, also those of a random EfficientNet, of 1e-14."""
    return F.normalize(x, dim=1, eps=1e-30)

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

# ------------------------------------------------------------------------------------------ 2. kNN

def neighbours(train_x, test_x, k):
    """The k nearest rows of train_x (N, D) to each of test_x (n, D): squared distances and rows (n,
    k), nearest first."""
    half_squares = train_x.square().sum(1) / 2
    distances = []
    rows = []
    for x in test_x.split(max(1, 2 ** 26 // len(train_x))):  # a part of the n x N table at a time
        nearness, row = torch.addmm(-half_squares, x, train_x.T).topk(min(k, len(train_x)))
        distances.append((x.square().sum(1, keepdim=True) - 2 * nearness).clamp(min=0))
        rows.append(row)
    return torch.cat(distances), torch.cat(rows)

def vote(distances, labels, classes, temperature):
    """Weighted kNN (Wu et al. 2018): squared distances and labels (n, k) of unit neighbours ->
    scores (n, classes)."""
    weights = ((1 - distances / 2) / temperature).exp()  # of the cosine similarity
    scores = torch.zeros(len(labels), classes, device=labels.device)
    return scores.scatter_add_(1, labels, weights)

def knn(train_x, train_y, test_x, test_y, k=200, temperature=0.1):
    """Accuracy in % of the weighted vote of the k nearest on features (N, D), normalized here."""
    distances, rows = neighbours(unit(train_x), unit(test_x), k)
    scores = vote(distances, train_y[rows], int(train_y.max()) + 1, temperature)
    return 100 * (scores.argmax(1) == test_y).float().mean().item()

# --------------- 3. the linear probe: the one that the monitor, the report and analyze.py use, too

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)

def linear_probe(x, y, classes):
    """The best linear classifier of features x (N, D) with labels y (N,): weight (classes, D) and
    bias (classes,), for features as they are.

    Multinomial logistic regression on standardized features, so no learning rate has to fit. The
    penalty is picked on every fifth image of a class, then all images are used.
    """
    mean, std = mean_and_std(x)
    z = F.pad((x - mean) / std, (0, 1), value=1)  # a last column of ones, for the bias
    spectrum = torch.linalg.eigh((z.T @ z / len(z)).cpu().double())
    is_held = held_out(y)
    penalty = PENALTIES[2]
    W = None
    if is_held.any():
        best = -1.0
        rest_z, rest_y = z[~is_held], y[~is_held]
        held_z, held_y = z[is_held], y[is_held]
        for candidate in PENALTIES:
            W = fit(rest_z, rest_y, classes, candidate, spectrum, W, steps=15)
            right = ((held_z @ W).argmax(1) == held_y).float().mean().item()
            if right > best:
                best = right
                penalty = candidate
    W = fit(z, y, classes, penalty, spectrum, W)
    weight = (W[:-1] / std[:, None]).T.contiguous()
    return weight, W[-1] - weight @ mean

def mean_and_std(x):
    """Of each column of x (N, D); what varies by rounding alone, or far less than others, counts as
    constant."""
    mean = x.mean(0)
    std = x.std(0, correction=0)
    least = 1e-6 * torch.maximum(std.max(), mean.abs())
    return mean, std.maximum(least).clamp(min=1e-30)

def held_out(y):
    """A mask (N,) of every fifth image of each class; of a class of 2 to 4 images, the last one."""
    mask = torch.zeros_like(y, dtype=torch.bool)
    for c in y.unique():
        rows = (y == c).nonzero()[:, 0]
        if len(rows) >= 5:
            mask[rows[4::5]] = True
        elif len(rows) > 1:
            mask[rows[-1]] = True
    return mask

def fit(z, y, classes, penalty, spectrum, start=None, steps=30):
    """W (D, classes) that minimizes mean cross-entropy of z @ W + penalty / 2 |W|^2, by L-BFGS.

    `spectrum`: the covariance's eigenvalues (D,) and eigenvectors (D, D). Cross-entropy's curvature
    is at most half the covariance (Boehning 1992). Along its eigenvectors, each divided by the root
    of that curvature plus the penalty, all directions are about equally steep: few steps suffice.
    """
    variances, directions = spectrum
    scale = (variances.clamp(min=0) / 2 + penalty).sqrt()  # rounding leaves some below zero
    P = (directions / scale).float().to(z.device)  # W = P U
    U = torch.zeros(z.shape[1], classes, device=z.device)
    if start is not None:
        U = (scale[:, None] * (directions.T @ start.cpu().double())).float().to(z.device)
    optimizer = torch.optim.LBFGS([U], max_iter=steps, max_eval=steps,
                                  line_search_fn="strong_wolfe")
    optimizer.step(partial(probe_loss, U, P, z, y, penalty))
    return P @ U

def probe_loss(U, P, z, y, penalty):
    """The loss of W = P U, in blocks of rows that stay in the cache; sets U.grad."""
    W = P @ U
    loss = penalty / 2 * W.square().sum()
    gradient = penalty * W
    for z_block, y_block in zip(z.split(8192), y.split(8192)):
        log_p = (z_block @ W).log_softmax(1)
        loss = loss + F.nll_loss(log_p, y_block, reduction="sum") / len(y)
        error = log_p.exp() - F.one_hot(y_block, W.shape[1])
        gradient = gradient + z_block.T @ error / len(y)
    U.grad = P.T @ gradient
    return loss

def accuracy(weight, bias, x, y):
    """Of a linear classifier on features x (N, D), in %."""
    return 100 * (F.linear(x, weight, bias).argmax(1) == y).float().mean().item()

# ----------------- 4. training on labels: the probe as published (He et al. 2020), and fine-tuning

def train(net, head, images, rows, args, crop, finetune):
    """Train `head` by SGD on random crops and flips of `rows`; with `finetune` the net, too."""
    rank, world = rank_world()
    batch = min(args.batch, len(rows)) // world * world
    epoch_steps = len(rows) // batch
    steps = args.epochs * epoch_steps
    mine = slice(rank * batch // world, (rank + 1) * batch // world)
    parameters = list(head.parameters())
    if finetune:
        parameters += list(net.parameters())
    optimizer = torch.optim.SGD(parameters, args.lr, momentum=0.9, weight_decay=args.wd)
    net.train(finetune)
    head.train()
    progress = data.Progress(steps)
    for step in range(steps):
        picked, u, _ = data.schedule(len(rows), batch, args.seed, step)
        y = data.to_device(images.labels[rows[picked]], images.device)
        pixels, shapes = images.put(*images.fetch(rows[picked[mine]]))
        views = data.augment(pixels, data.to_device(u[0, mine], images.device), args.size, crop,
                             jitter=0, hue=0, gray=0, blur=0, shapes=shapes)
        if finetune:
            factor = data.cosine(1, 0, step / steps)
        else:  # a tenth from 60 % on, a hundredth from 80 % on
            epochs_done = step // epoch_steps / args.epochs
            factor = 0.1 ** ((epochs_done >= 0.6) + (epochs_done >= 0.8))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * batch / args.batch * factor

        with torch.set_grad_enabled(finetune):
            z = net(views).float()
        if finetune:
            loss = F.cross_entropy(head(z), y[mine])
        else:  # every process takes the same step on the whole batch, as one alone would
            loss = F.cross_entropy(head(data.gather(z)), y)
        optimizer.zero_grad()
        loss.backward()
        if finetune and world > 1:
            for p in parameters:
                data.mean_over_processes(p.grad)
        optimizer.step()
        if progress.due():
            progress.show(step + 1, f"epoch {step // epoch_steps + 1}/{args.epochs}  "
                                    f"loss {loss.item():.3f}")
    if finetune:
        data.share_buffers(net)
        data.share_buffers(head)
    net.eval()

def finetuned(net, images, rows, x, weight, bias, args):
    """Fine-tune `net` from the probe (weight, bias) of its features x on: another weight and bias.

    While the features change, a BatchNorm holds them standardized; in the end it is folded in.
    """
    mean, std = mean_and_std(x)
    norm = nn.BatchNorm1d(net.dim, affine=False, device=x.device)
    linear = nn.Linear(net.dim, len(bias), device=x.device)
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(std ** 2)
        linear.weight.copy_(weight * std)
        linear.bias.copy_(bias + weight @ mean)
    head = nn.Sequential(norm, linear)
    train(net, head, images, rows, args, args.crop or (0.2, 1), finetune=True)
    weight = linear.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return weight, linear.bias.detach() - weight @ norm.running_mean

def published(net, images, rows, classes, args, crop):
    """The weight and bias that MoCo's protocol trains on the frozen net."""
    torch.manual_seed(args.seed)
    linear = nn.Linear(net.dim, classes)
    nn.init.normal_(linear.weight, 0, 0.01)
    nn.init.zeros_(linear.bias)
    linear.to(images.device)
    train(net, linear, images, rows, args, crop, finetune=False)
    return linear.weight.detach(), linear.bias.detach()

# -------------------------------------------------------------------------------------- 5. results

def measure(scores, y):
    """Scores (N, C), labels (N,) -> top-1 with 95 % interval (Wilson 1927), top-5, per class."""
    n, classes = scores.shape
    is_right = scores.topk(min(5, classes)).indices == y[:, None]
    table = confusion(scores, y)
    count = table.sum(1)
    per_class = (table.diag() / count)[count > 0]
    p = is_right[:, 0].float().mean().item()
    z = 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return dict(top1=100 * p, low=100 * (middle - half), high=100 * (middle + half),
                top5=100 * is_right.any(1).float().mean().item(),
                mean_per_class=100 * per_class.mean().item())

def confusion(scores, y):
    """(C, C) counts on the CPU: row the class, column the answer."""
    classes = scores.shape[1]
    cell = y * classes + scores.argmax(1)
    return torch.bincount(cell, minlength=classes * classes).view(classes, classes).cpu()

def draw_confusion(table, names, path):
    """The confusion of classes as a picture: each row sums to one, dark is much."""
    c = len(names)
    cell = max(3, min(40, 900 // c))
    font = ImageFont.load_default(max(8, min(15, 900 // c)))
    margin = 16 + int(max(font.getlength(name) for name in names))
    share = (table / table.sum(1, keepdim=True).clamp(min=1)).numpy()[..., None]
    dark = share ** 0.6  # 1 % is to be seen
    colors = (255 * (1 - dark) + np.array([8, 48, 107]) * dark).round().astype(np.uint8)
    picture = Image.new("RGB", (margin + c * cell + 8, 24 + c * cell + 8), "white")
    picture.paste(Image.fromarray(colors).resize((c * cell, c * cell), 0), (margin, 24))
    draw = ImageDraw.Draw(picture)
    draw.text((margin, 4), "row: class, column: answer, in the same order", "black")
    for i, name in enumerate(names):
        draw.text((margin - 6, 24 + (i + 0.5) * cell), name, "black", font, anchor="rm")
    picture.save(path)

def write(args, protocol, table, net, weight, bias, confused, names, seconds):
    """Print the table; leave it, the confusion and the classifier in the folder of the results."""
    print(f"\n{args.checkpoint} on {args.data}, {int(confused.sum()):,} test images, "
          f"{seconds:.0f} s\n{'':<26}{'top-1 %':>9}{'95 % interval':>16}{'top-5 %':>9}"
          f"{'mean per class %':>18}")
    for name, row in table.items():
        print(f"{name:<26}{row['top1']:>9.2f}{row['low']:>9.2f}..{row['high']:<5.2f}"
              f"{row['top5']:>9.2f}{row['mean_per_class']:>18.2f}")
    pairs = (confused + confused.T).triu(1)
    i, j = divmod(int(pairs.argmax()), len(names))
    if pairs[i, j] > 0:
        print(f"most confused: {names[i]} and {names[j]} ({pairs[i, j]} times)")

    out = Path(args.out) if args.out else default_folder(args, protocol)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: w.cpu().contiguous() for name, w in net.state_dict().items()}
    last = models.last_linear(args.arch)
    weights |= {f"{last}.weight": weight.cpu(), f"{last}.bias": bias.cpu()}
    data.save(out / "classifier.pt", weights)
    keys = ("arch", "stem", "size", "data", "root", "keep")
    network = {key: getattr(args, key) for key in keys} | dict(classes=names)
    data.save(out / "args.json", json.dumps(network, indent=1))
    each = 100 * confused.diag() / confused.sum(1).clamp(min=1)
    data.save(out / "result.json", json.dumps(dict(
        args=vars(args), table=table, seconds=seconds, test_images=int(confused.sum()),
        per_class=dict(zip(names, each.tolist())), confusion=confused.tolist()), indent=1))
    draw_confusion(confused, names, out / "confusion.png")
    print(f"\nIn {out}: result.json, confusion.png, classifier.pt (torchvision's names, with the "
          f"last Linear). Use it:\n  python linear_eval.py {out}/classifier.pt --predict IMAGES")

def default_folder(args, protocol):
    """Beside the checkpoint: eval-DATA-PROTOCOL[-LABELS]."""
    folder = Path(args.checkpoint)
    if args.checkpoint == "random":
        folder = Path("runs") / f"random-{args.arch}"
    elif not folder.is_dir():
        folder = folder.parent
    labels = f"-{args.labels}" if args.labels else ""
    return folder / f"eval-{Path(args.data).resolve().name}-{protocol}{labels}"

def predict(args):
    """Print the most probable classes of each image of --predict, by a classifier.pt."""
    weights, info = models.read_backbone(args.checkpoint, args.arch)
    content = data.load_file(args.checkpoint)
    last = models.last_linear(info["arch"])
    if f"{last}.weight" not in content:
        raise InputError(f"{args.checkpoint}: has no classifier; linear_eval.py makes one from it "
                         "and labelled images")
    weight, bias = content[f"{last}.weight"], content[f"{last}.bias"]
    names = info.get("classes") or [f"class {i}" for i in range(len(bias))]
    net = models.build(info["arch"], info.get("stem") or "imagenet").eval()
    net.load_state_dict(weights)
    size = args.size or info.get("size") or 224
    for path in args.predict:
        image = data.decode(path, info.get("keep") or size * 3 // 2)
        if image is None:
            raise InputError(f"--predict {path}: not readable as an image")
        pixels, height, width = image
        shape = torch.tensor([[height, width]]).float()
        with torch.no_grad():
            z = net(data.center(torch.from_numpy(pixels.copy())[None], size, shape))
        shares, best = F.linear(z, weight, bias)[0].softmax(0).topk(min(3, len(names)))
        answers = [f"{names[i]} {100 * p:.1f} %" for p, i in zip(shares.tolist(), best.tolist())]
        print(f"{path}: {', '.join(answers)}")

# ---------------------------------------------------- 6. what is evaluated: flags, network, images

def add_common_flags(parser):
    """The flags of this file and of analyze.py. In brackets: what a flag is if it is not given."""
    add = parser.add_argument
    add("--data", help="fractals, cifar10, cifar100, stl10 or a folder [the checkpoint's]")
    add("--root", help="folder of downloaded and decoded data sets [the checkpoint's, or data]")
    add("--size", type=int, help="side of an image in pixels [the checkpoint's]")
    add("--keep", type=int, help="side at which a folder's images are stored [as for pretraining]")
    add("--arch", help=f"[the checkpoint's] {', '.join(models.ARCHS)}")
    add("--stem", choices=["imagenet", "small"],
        help="[the checkpoint's; small up to 64 pixels, but not on a CPU]")
    add("--out", help="folder of the results [beside the checkpoint]")
    add("--seed", type=int, default=0, help="of random weights, subsets and crops [0]")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu [the first there is]")

def read_checkpoint(name, args):
    """The weights of a checkpoint, None for `random`, and `args` with what was open filled in."""
    args = argparse.Namespace(**vars(args))
    state = None
    info = {}
    if name != "random":
        state, info = models.read_backbone(name, args.arch)
        dropped = info["dropped"]
        print0(f"{name}: {info['arch']}, {len(state)} tensors; dropped {len(dropped)} others "
               f"{dropped[:3] if dropped else ''}")
    args.trained_on = info.get("data")
    if args.data is not None:  # other images: the checkpoint's folders are not theirs
        info = {key: info[key] for key in ("arch", "stem", "size") if key in info}
    defaults = dict(arch="mobilenetv3", stem=None, size=None, data="fractals", root="data",
                    keep=None)
    for key, default in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, info.get(key) or default)
    return state, args

def load_network(state, args, device):
    """The network of a checkpoint, or the one that a run with this seed draws (its baseline)."""
    if args.stem is None:
        args.stem = models.default_stem(args.size, device.type == "cpu")
    torch.manual_seed(args.seed)
    net = models.build(args.arch, args.stem)
    if state is not None:
        try:
            net.load_state_dict(state)
        except RuntimeError:
            raise InputError(f"--stem {args.stem}: the checkpoint has the other stem") from None
    if device.type == "cpu":
        models.speed_up_small_maps(net)
    return net.eval().to(device, memory_format=torch.channels_last)

def check_labels(train_set, test_set, name):
    """InputError unless the images have the labels that an evaluation needs."""
    wrong = None
    if not train_set.classes:
        wrong = "no labels; an evaluation needs a folder for each of at least two classes"
    elif test_set is None:
        wrong = "no held-out image; add a folder test/ beside train/, or more images"
    for c, label in enumerate(train_set.classes):
        if not (train_set.labels == c).any():
            wrong = f"class {label} has no training image; add one, or remove the class"
    if wrong:
        raise InputError(f"--data {name}: {wrong}")

def labelled_subset(labels, wanted, seed):
    """Rows of a class-balanced subset: a share ("0.01") of labels, or a number ("25") a class."""
    classes = int(labels.max()) + 1
    try:
        number = float(wanted) if "." in wanted else int(wanted)
    except ValueError:
        number = 0
    if number <= 0 or ("." in wanted and number > 1):
        raise InputError(f"--labels {wanted}: neither a share such as 0.01 nor a number of images "
                         "a class such as 25")
    if "." in wanted:
        number = max(1, round(number * int((labels >= 0).sum()) / classes))
    order = torch.randperm(len(labels), generator=data.seeded("labels", seed))
    rows = [order[labels[order] == c][:number] for c in range(classes)]
    return torch.cat(rows).sort()[0]

def knn_table(train_x, train_y, test_x, test_y, classes):
    """{name: measures} of weighted kNN for some k."""
    distances, rows = neighbours(unit(train_x), unit(test_x), 200)
    table = {}
    for k in (1, 10, 20, 100, 200):
        if k <= rows.shape[1]:
            scores = vote(distances[:, :k], train_y[rows[:, :k]], classes, temperature=0.1)
            table[f"kNN, k {k}, T 0.1"] = measure(scores, test_y)
    return table

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder, a checkpoint file, or random")
    add_common_flags(parser)
    add = parser.add_argument
    add("--protocol", default="fast", choices=["fast", "moco"],
        help="fast: one pass over the images; moco: 100 epochs of crops, SGD at lr 30 [fast]")
    add("--knn", action="store_true", help="also weighted kNN, for some k")
    add("--finetune", action="store_true", help="train the whole network, from the fast probe on")
    add("--labels", help="a share (0.01) of the labels, or so many a class (25), by --seed [all]")
    add("--epochs", type=int, help="[moco: 100; fine-tuning: 30]")
    add("--batch", type=int, default=256, help="images in a step, over all processes [256]")
    add("--lr", type=float, help="for a batch of that size [moco: 30; fine-tuning: 0.03]")
    add("--wd", type=float, help="weight decay [moco: 0; fine-tuning: 1e-4]")
    add("--crop", type=float, nargs=2, metavar=("LO", "HI"),
        help="area of the crops [0.08 1; for transfer 0.6 1, for fine-tuning 0.2 1, as published]")
    add("--predict", nargs="+", metavar="IMAGE",
        help="name the classes of these images; the checkpoint is a classifier.pt made here")
    args = parser.parse_args(argv)
    usual = dict(epochs=100, lr=30.0, wd=0.0)
    if args.finetune:
        usual = dict(epochs=30, lr=0.03, wd=1e-4)
    for key, value in usual.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if min(args.epochs, args.batch, args.lr) <= 0:
        raise InputError("--epochs, --batch, --lr: must be above 0")
    return args

def main(argv=None):
    args = parse(argv)
    if args.predict:
        return predict(args)
    began = time.time()
    device = data.start(args.device)
    state, args = read_checkpoint(args.checkpoint, args)
    train_set, test_set, args.size = data.load(args.data, args.root, args.size, args.keep, device)
    check_labels(train_set, test_set, args.data)
    classes = len(train_set.classes)
    net = load_network(state, args, device)
    rows = (train_set.labels >= 0).nonzero()[:, 0]
    if args.labels is not None:
        rows = labelled_subset(train_set.labels, args.labels, args.seed)
    print0(f"{args.arch} at {args.size} pixels on {args.data}: {len(rows):,} training and "
           f"{len(test_set):,} test images, {classes} classes")

    table = {}
    is_published = args.protocol == "moco" and not args.finetune
    test_x, test_y = extract(net, test_set, args.size)
    if args.knn or not is_published:
        train_x, train_y = extract(net, train_set, args.size, rows)
    if args.knn:
        table = knn_table(train_x, train_y, test_x, test_y, classes)
    if is_published:
        is_transfer = args.trained_on not in (None, args.data)
        crop = args.crop or ((0.6, 1) if is_transfer else (0.08, 1))
        weight, bias = published(net, train_set, rows, classes, args, crop)
        protocol = "moco"
        name = f"linear, moco, {args.epochs} epochs"
    else:
        weight, bias = linear_probe(train_x, train_y, classes)
        protocol = "fast"
        name = "linear, fast"
    if args.finetune:
        weight, bias = finetuned(net, train_set, rows, train_x, weight, bias, args)
        protocol = "finetune"
        name = f"fine-tuned, {args.epochs} epochs"
        test_x, test_y = extract(net, test_set, args.size)  # by the network as it is now
    scores = F.linear(test_x, weight, bias)
    table[name] = measure(scores, test_y)
    if rank_world()[0] == 0:
        write(args, protocol, table, net, weight, bias, confusion(scores, test_y),
              train_set.classes, time.time() - began)
    if dist.is_initialized():
        dist.destroy_process_group()
    return table

if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:  # OSError: a folder or disk that cannot be written
        sys.exit(f"linear_eval.py: {error}")
