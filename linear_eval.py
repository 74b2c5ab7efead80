"""What are the features of a checkpoint worth? Linear probe, kNN, few labels, transfer.

    python linear_eval.py runs/NAME                            # a linear probe, in seconds
    python linear_eval.py runs/NAME --knn                      # and kNN, which trains nothing
    python linear_eval.py runs/NAME --labels 0.01              # with 1 % of the labels
    python linear_eval.py runs/NAME --data cifar100            # transfer
    python linear_eval.py random --data FOLDER                 # what no training at all is worth
    torchrun --nproc-per-node 8 linear_eval.py runs/NAME       # features shared out over 8 GPUs

A checkpoint is a run's folder, any file of a run, a torchvision state dict, or a file of MoCo,
ssl-small or SEED. Read it from top to bottom: features, kNN, the linear probe, the monitor of
pretraining, results, then checkpoints and flags.
"""
import argparse
import json
import math
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
import models
from data import (InputError, Progress, gather, init_device, load_file, print0, rank_world, save,
                  seeded, to_device)

# ------------------------------------------------------------------------------------- 1. features

BLOCK = 256  # images at a time

@torch.no_grad()
def extract(net, images, size, rows=None, u=None, **augmentation):
    """Features (N, D) of the center squares of `rows` (N,) [all images], and their labels (N,); or,
    with uniform numbers u (N, data.COLUMNS), of augmented views by the settings of data.augment.

    Each process computes one share of the rows, and all get all.
    """
    rank, world = rank_world()
    if rows is None:
        rows = torch.arange(len(images))
    n = math.ceil(len(rows) / world)
    mine = torch.arange(rank * n, (rank + 1) * n) % len(rows)  # the last share is filled up
    blocks = mine.split(BLOCK)
    progress = Progress(len(blocks))
    features = []
    pixels_of_blocks = images.prefetch(images.get, [rows[block] for block in blocks])
    for block, (pixels, shapes) in zip(blocks, pixels_of_blocks):
        if u is None:
            views = data.center(pixels, size, shapes)
        else:
            numbers = to_device(u[block], images.device)
            views = data.augment(pixels, numbers, size, shapes=shapes, **augmentation)
        features.append(net(views).float())
        if progress.due():
            progress.show(len(features), "features")
    return gather(torch.cat(features))[:len(rows)], images.labels[rows].to(images.device)

class Pixels(nn.Module):
    """Raw pixels as features: (N, 3, S, S) -> (N, 3 s s), resized to at most 32 x 32."""
    most = 32

    def forward(self, x):
        s = x.shape[-1]
        length = torch.tensor([s], device=x.device)
        matrix = data.resampling(0 * length, length, s, min(s, self.most))
        return (matrix @ x @ matrix.mT).flatten(1)

def unit(x):
    """Rows of x (N, D) at length one, also those of a random EfficientNet, of length 1e-14."""
    return F.normalize(x, dim=1, eps=1e-30)

# ------------------------------------------------------------------------------------------ 2. kNN

def neighbours(train_x, test_x, k):
    """The k nearest rows of train_x (N, D) to each of test_x (n, D): squared distances and their
    numbers (n, k), nearest first."""
    half_squares = train_x.square().sum(1) / 2
    distances = []
    numbers = []
    for x in test_x.split(max(1, 2 ** 26 // len(train_x))):  # 256 MB of the n x N table at a time
        nearness, near = torch.addmm(-half_squares, x, train_x.T).topk(min(k, len(train_x)))
        distances.append((x.square().sum(1, keepdim=True) - 2 * nearness).clamp(min=0))
        numbers.append(near)
    return torch.cat(distances), torch.cat(numbers)

def vote(distances, labels, classes, temperature):
    """Weighted kNN (Wu et al. 2018): squared distances and labels (n, k) of unit neighbours ->
    scores (n, classes)."""
    weights = ((1 - distances / 2) / temperature).exp()  # of the cosine similarity
    scores = torch.zeros(len(labels), classes, device=labels.device)
    return scores.scatter_add_(1, labels, weights)

def knn(train_x, train_y, test_x, test_y, k=200, temperature=0.1):
    """Accuracy in % of the weighted vote of the k nearest on features (N, D), normalized here."""
    distances, near = neighbours(unit(train_x), unit(test_x), k)
    scores = vote(distances, train_y[near], int(train_y.max()) + 1, temperature)
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
    # of all rows: it does not say what is found, only how fast
    spectrum = torch.linalg.eigh((z.T @ z / len(z)).cpu().double())
    is_held = held_out(y)
    penalty = PENALTIES[2]  # where no class has a second image
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

# ----------------- 4. while pretraining: kNN on labels, or without them: which view is found first

def instance_discrimination(query, positive, others, top=5):
    """acc@1..`top` in % (top,): is a query's positive among the j nearest of it and all `others`?

    All (N, D), row i of image i, whose own row in `others` does not count. For originals o and
    views a, b, (o, a, o) is mode o-a and (b, a, a) mode a-b of Shi et al. 2022, whose query is b.
    By cosine; a tie counts against the positive: a collapsed space has 0 %, not 100.
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

def judge(network, train, test, size, with_probe=False, **augmentation):
    """{measure: %} of a network's features on held-out images: kNN, and `with_probe` linear.

    Neighbours and probe come from at most 50,000 training images, 10,000 on a CPU. Without labels:
    of up to 2,000 images, how many does a second view, drawn as in training, find first?
    """
    if test is None:
        rows = torch.randperm(len(train), generator=seeded("apart"))[:2000]
        views = torch.rand(2, len(rows), data.COLUMNS, generator=seeded("views"))
        a, b = [extract(network, train, size, rows, u, **augmentation)[0] for u in views]
        return dict(found=instance_discrimination(b, a, a)[0].item())
    rows = (train.labels >= 0).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=seeded("probe"))]
    rows = rows[:10_000 if train.device.type == "cpu" else 50_000]
    train_x, train_y = extract(network, train, size, rows)
    test_x, test_y = extract(network, test, size)
    measures = dict(knn=knn(train_x, train_y, test_x, test_y))
    if with_probe:
        weight, bias = linear_probe(train_x, train_y, len(train.classes))
        measures["linear"] = accuracy(weight, bias, test_x, test_y)
    return measures

# -------------------------------------------------------------------------------------- 5. results

def measure(scores, y):
    """Scores (N, C), labels (N,) -> top-1 with 95 % interval (Wilson 1927), top-5, mean per class,
    all in %."""
    n, classes = scores.shape
    is_right = scores.topk(min(5, classes)).indices == y[:, None]
    p = is_right[:, 0].float().mean().item()
    z = 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    each = accuracy_of_classes(scores, y)
    return dict(top1=100 * p, low=100 * (middle - half), high=100 * (middle + half),
                top5=100 * is_right.any(1).float().mean().item(),
                mean_per_class=each[~each.isnan()].mean().item())

def accuracy_of_classes(scores, y):
    """In % (C,); nan where a class has no image."""
    count = y.bincount(minlength=scores.shape[1])
    right = y[scores.argmax(1) == y].bincount(minlength=scores.shape[1])
    return 100 * right / count

def knn_table(train_x, train_y, test_x, test_y, classes):
    """{name: measures} of weighted kNN for some k."""
    distances, near = neighbours(unit(train_x), unit(test_x), 200)
    table = {}
    for k in (1, 10, 20, 100, 200):
        if k <= near.shape[1]:
            scores = vote(distances[:, :k], train_y[near[:, :k]], classes, temperature=0.1)
            table[f"kNN, k {k}, T 0.1"] = measure(scores, test_y)
    return table

def write(args, table, net, weight, bias, per_class, seconds):
    """Print the table; leave it and the classifier in the folder of the results."""
    print(f"\n{args.checkpoint} on {args.data}, {seconds:.0f} s\n{'':<26}{'top-1 %':>9}"
          f"{'95 % interval':>16}{'top-5 %':>9}{'mean per class %':>18}")
    for name, row in table.items():
        print(f"{name:<26}{row['top1']:>9.2f}{row['low']:>9.2f}..{row['high']:<5.2f}"
              f"{row['top5']:>9.2f}{row['mean_per_class']:>18.2f}")
    out = Path(args.out or default_folder(args))
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: w.cpu().contiguous() for name, w in net.state_dict().items()}
    last = models.last_linear(args.arch)
    weights |= {f"{last}.weight": weight.cpu(), f"{last}.bias": bias.cpu()}
    save(out / "classifier.pt", weights)
    network = {key: getattr(args, key) for key in DEFAULTS}
    save(out / "args.json", json.dumps(network | dict(classes=list(per_class)), indent=1))
    save(out / "result.json", json.dumps(dict(args=vars(args), table=table, seconds=seconds,
                                              per_class=per_class), indent=1))
    print(f"\nIn {out}: result.json, and classifier.pt for torchvision's {args.arch}")

def default_folder(args):
    """Beside the checkpoint: eval-DATA[-LABELS]."""
    folder = Path(args.checkpoint)
    if args.checkpoint == "random":
        folder = Path("runs") / f"random-{args.arch}"
    elif not folder.is_dir():
        folder = folder.parent
    labels = f"-{args.labels}" if args.labels else ""
    return folder / f"eval-{Path(args.data).resolve().name}{labels}"

# ---------------------------------------------------------------------------------- 6. checkpoints

# What stands before the names of a backbone's tensors: in last.pt, in checkpoints of MoCo and
# ssl-small (the query encoder), of SEED, of a DataParallel; in torchvision's nothing.
PREFIXES = ("encoder_q.backbone.", "module.encoder_q.", "encoder_q.", "module.student.", "student.",
            "module.", "")
# what args.json may say of a checkpoint, and what holds where nothing is said
DEFAULTS = dict(arch="mobilenetv3", stem="imagenet", size=None, data="letters", root="data",
                keep=None)

def read_checkpoint(path, arch=None, stem=None):
    """The network in a checkpoint: a run's folder, last.pt, backbone.pt, a torchvision state dict,
    or a file with a `state_dict` as MoCo, ssl-small and SEED write it. Never runs code from it.

    -> the network with its weights; what is known of it, by args.json beside the file or `args` in
    it. `arch` and `stem` come before that. Raises InputError if the file does not hold that
    network, or holds a larger one.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "backbone.pt"
    state, known = read_state(path)
    if (path.parent / "args.json").is_file():
        known = read_json(path.parent / "args.json")
    known = {name: known[name] for name in DEFAULTS if known.get(name) is not None}
    arch = arch or known.get("arch")
    if arch not in list(models.ARCHS):
        raise InputError(f"{path}: of which network? Name it with --arch")
    with torch.device("meta"):  # a name, without drawing weights
        first = next(iter(models.build(arch).state_dict()))
    prefix = ""
    for candidate in reversed(PREFIXES):
        if candidate + first in state:
            prefix = candidate
    if arch.startswith("resnet") and prefix + first in state:  # its first kernel shows the stem
        known["stem"] = "small" if state[prefix + first].shape[-1] == 3 else "imagenet"
        if stem not in (None, known["stem"]):
            raise InputError(f"--stem {stem}: {path} has the other stem")
    stem = stem or known.get("stem") or DEFAULTS["stem"]
    net = models.build(arch, stem)
    weights = {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}
    others = [name for name in weights if name.startswith(f"{models.last_linear(arch)}.")]
    for name in others:
        del weights[name]
    try:
        net.load_state_dict(weights)
    except RuntimeError:
        raise InputError(f"{path}: its weights (such as {next(iter(state))}) are not those of "
                         f"{arch}; name the right --arch") from None
    print0(f"{path}: {arch}, {len(weights)} of its {len(state)} tensors")
    return net, known | dict(arch=arch, stem=stem)

def read_state(path):
    """{name: tensor} of a checkpoint file, and the flags in it; InputError without tensors."""
    state = content = load_file(path)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if isinstance(state, dict):
        state = {name: w for name, w in state.items() if isinstance(w, torch.Tensor)}
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path}: holds no state dict")
    flags = content.get("args")
    return state, flags if isinstance(flags, dict) else {}

def read_json(path):
    """{name: value} of a file that holds one object."""
    try:
        content = json.loads(Path(path).read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not one object of JSON; delete it and pass its flags yourself")
    return content

def read_head(path):
    """The projection head in a run or a MoCo checkpoint, and what `perceptron` makes it of; without
    one, an empty Sequential."""
    path = Path(path)
    if path.is_dir():
        path = path / "last.pt"
    state = {}
    for name, value in read_state(path)[0].items():
        match = re.fullmatch(r"(?:module\.)?encoder_q\.(?:head|fc)\.(\d+\..+)", name)
        if match is not None:
            state[match[1]] = value
    shapes = [w.shape for w in state.values() if w.ndim == 2]  # of the Linears, (out, in)
    widths = [shape[1] for shape in shapes[:1]] + [shape[0] for shape in shapes]
    norm = any(name.endswith("running_mean") for name in state)
    head = models.perceptron(widths, norm)
    try:
        head.load_state_dict(state)
    except RuntimeError:
        raise InputError(f"{path}: its projection head is no perceptron with ReLUs") from None
    return head, (widths, norm)

def open_checkpoint(name, args):
    """The network of a checkpoint, or for `random` the weights from which a run with this seed
    starts; and `args` with what was open filled in."""
    args = argparse.Namespace(**vars(args))
    known = {}
    if name != "random":
        net, known = read_checkpoint(name, args.arch, args.stem)
    if args.data is not None:  # where the checkpoint's images lie says nothing of others
        known = {key: known[key] for key in ("arch", "stem", "size") if key in known}
    for key, default in DEFAULTS.items():
        if getattr(args, key) is None:
            setattr(args, key, known.get(key, default))
    if name == "random":
        torch.manual_seed(args.seed)
        net = models.build(args.arch, args.stem)
    return net, args

def to_evaluate(net, device):
    if device.type == "cpu":
        models.speed_up_small_maps(net)
    return net.eval().to(device, memory_format=data.layout(device))

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
        n = float(wanted) if "." in wanted else int(wanted)
    except ValueError:
        n = 0
    if n <= 0 or ("." in wanted and n > 1):
        raise InputError(f"--labels {wanted}: neither a share such as 0.01 nor a number of images "
                         "a class such as 25")
    if "." in wanted:
        n = max(1, round(n * int((labels >= 0).sum()) / classes))
    order = torch.randperm(len(labels), generator=seeded("labels", seed))
    rows = [order[labels[order] == c][:n] for c in range(classes)]
    return torch.cat(rows).sort()[0]

# ---------------------------------------------------------------------------------------- 7. flags

class Parser(argparse.ArgumentParser):
    """Shows the script's docstring, and answers a wrong flag with one line."""

    def __init__(self, text):
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise InputError(message.removeprefix("argument "))

def number(low, high, kind, text):
    """A number typed for a flag; as the flag's type it has its first three arguments by partial."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text} is no {what} within {low:g}..{high:g}")
    return value

count = partial(number, 1, 1e12, int)
side = partial(number, 8, 4096, int)  # of an image, in pixels
share = partial(number, 0, 1, float)
factor = partial(number, 0, 1e6, float)

def add_common_flags(parser):
    """The flags of this file and of analyze.py. In brackets: what a flag is if it is not given."""
    add = parser.add_argument
    add("--data", help="letters, cifar10, cifar100, stl10 or a folder [the checkpoint's]")
    add("--root", help="folder of downloaded and decoded data sets [the checkpoint's, or data]")
    add("--size", type=side, help="side of an image in pixels [the checkpoint's]")
    add("--keep", type=side, help="side at which a folder's images are stored [the checkpoint's]")
    add("--arch", choices=list(models.ARCHS), help="[the checkpoint's]")
    add("--stem", choices=models.STEMS, help="[the checkpoint's, or imagenet]")
    add("--out", help="folder of the results [beside the checkpoint]")
    add("--seed", type=int, default=0, help="of random weights, subsets and crops [0]")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu [the first there is]")

def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a run's folder, a checkpoint file, or random")
    add_common_flags(parser)
    add = parser.add_argument
    add("--knn", action="store_true", help="also weighted kNN, for some k")
    add("--labels", help="a share of the labels (0.01; 1.0 is all), or so many a class (25) [all]")
    return parser.parse_args(argv)

def main(argv=None):
    args = parse(argv)
    began = time.time()
    device = init_device(args.device)
    net, args = open_checkpoint(args.checkpoint, args)
    net = to_evaluate(net, device)
    train_set, test_set, args.size = data.load(args.data, args.root, args.size, args.keep, device)
    check_labels(train_set, test_set, args.data)
    classes = train_set.classes
    rows = (train_set.labels >= 0).nonzero()[:, 0]
    if args.labels is not None:
        rows = labelled_subset(train_set.labels, args.labels, args.seed)
    print0(f"{args.arch} at {args.size} pixels on {args.data}: {len(rows):,} training and "
           f"{len(test_set):,} test images, {len(classes)} classes")

    test_x, test_y = extract(net, test_set, args.size)
    train_x, train_y = extract(net, train_set, args.size, rows)
    table = {}
    if args.knn:
        table = knn_table(train_x, train_y, test_x, test_y, len(classes))
    weight, bias = linear_probe(train_x, train_y, len(classes))
    scores = F.linear(test_x, weight, bias)
    table["linear"] = measure(scores, test_y)
    if rank_world()[0] == 0:
        each = accuracy_of_classes(scores, test_y).tolist()
        per_class = {name: None if math.isnan(p) else p for name, p in zip(classes, each)}
        write(args, table, net, weight, bias, per_class, time.time() - began)
    if dist.is_initialized():
        dist.destroy_process_group()
    return table

if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:  # OSError: a folder or disk that cannot be written
        sys.exit(f"linear_eval.py: {error}")
