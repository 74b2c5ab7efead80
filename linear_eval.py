"""What are the features of a network worth? Linear probe, kNN, few labels, transfer.

    python linear_eval.py runs/NAME                            # a linear probe
    python linear_eval.py runs/NAME --knn                      # and kNN, which trains nothing
    python linear_eval.py runs/NAME --labels 0.01              # with 1 % of the labels
    python linear_eval.py runs/NAME --data cifar100            # transfer to other images
    python linear_eval.py random --data FOLDER                 # what no training at all is worth
    torchrun --nproc-per-node 8 linear_eval.py runs/NAME       # features shared out over 8 GPUs

A checkpoint is a run's folder, its last.pt or backbone.pt, a state dict of torchvision, or a file
of MoCo, ssl-small or SEED; `random` is a network without training, `pixels` stands for the images
themselves. Results go to a folder eval-DATA[-LABELS] in the folder of the checkpoint, or in
runs/random or runs/pixels.

Read this file from top to bottom: features, kNN, the linear probe, what the monitor of pretrain.py
asks for, results, checkpoints, flags.
"""
import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import models
from data import (InputError, fraction, gather, init_device, load_file, move_to_device, positive,
                  print0, rank_world, run, save, seeded, to_device)

# ------------------------------------------------------------------------------------- 1. features

@torch.no_grad()
def extract(net, images, size, rows=None, u=None, **augmentation):
    """Features (N, D) and labels (N,) of the images in `rows` (N,); without `rows`, of all images.

    The network sees the center square of each image. If uniform numbers u (N, data.COLUMNS) are
    given, it sees the augmented view that data.augment makes of them with the settings
    `augmentation`. Each process computes the features of one part of the rows, and all processes
    get the features of all rows. Raises InputError for features that are infinite or NaN.
    """
    rank, world = rank_world()
    if rows is None:
        rows = torch.arange(len(images))
    # All parts have n rows: the last ones are filled up with the first rows.
    n = math.ceil(len(rows) / world)
    part = (rank * n + torch.arange(n)) % len(rows)
    features = []
    for block in part.split(256):
        pixels, shapes = images.get(rows[block])
        if u is None:
            views = data.center(pixels, size, shapes)
        else:
            views = data.augment(pixels, to_device(u[block], images.device), size, shapes=shapes,
                                 **augmentation)
        features.append(net(views).float())
    features = gather(torch.cat(features))[:len(rows)]
    if not features.isfinite().all():
        name = getattr(net, "name", "the network")  # open_checkpoint names it
        raise InputError(f"{name}: some of its features are infinite or NaN; its weights "
                         "have diverged or are damaged")
    return features, images.labels[rows].to(images.device)

class Pixels(nn.Module):
    """Raw pixels as features: (N, 3, S, S) -> (N, 3 s s), resized to at most 32 x 32."""
    most = 32

    def forward(self, x):
        side = min(x.shape[-1], self.most)
        return F.interpolate(x, (side, side), mode="bilinear", antialias=True).flatten(1)

def unit(x):
    """The rows of x (N, D) at length one. The features of a random EfficientNet have a length of
    about 1e-14, which F.normalize with its own `eps` would leave far below one."""
    return F.normalize(x, dim=1, eps=1e-30)

# ------------------------------------------------------------------------------------------ 2. kNN

def neighbours(train_x, test_x, k):
    """The k rows of train_x (N, D) that are nearest to each row of test_x (n, D).

    -> squared distances (n, k), nearest first, and the numbers (n, k) of these rows. If train_x has
    fewer than k rows, k is their number.
    """
    # |x - t|^2 = |x|^2 - 2 (x.t - |t|^2 / 2): the larger x.t - |t|^2 / 2, the nearer is t to x.
    half_squares = train_x.square().sum(1) / 2
    distances = []
    numbers = []
    for x in test_x.split(max(1, 2 ** 26 // len(train_x))):  # 256 MB of the n x N table at a time
        nearness, near = torch.addmm(-half_squares, x, train_x.T).topk(min(k, len(train_x)))
        distances.append((x.square().sum(1, keepdim=True) - 2 * nearness).clamp(min=0))
        numbers.append(near)
    return torch.cat(distances), torch.cat(numbers)

def vote(squares, labels, classes, temperature=0.1):
    """Weighted kNN (Wu et al. 2018, section 3.4): each neighbour votes for its label with the
    weight exp(cosine similarity / temperature). -> scores (n, classes).

    `squares` (n, k) are the squared distances d^2 of the neighbours, `labels` (n, k) their labels.
    Features have length one, so the cosine similarity is 1 - d^2 / 2.
    """
    weights = ((1 - squares / 2) / temperature).exp()
    scores = torch.zeros(len(labels), classes, device=labels.device)
    return scores.scatter_add_(1, labels, weights)

def knn(train_x, train_y, test_x, test_y, k=200):
    """Accuracy in % of the weighted vote of the k nearest. Features are (N, D) and of any length,
    labels are (N,)."""
    distances, near = neighbours(unit(train_x), unit(test_x), k)
    return accuracy(vote(distances, train_y[near], int(train_y.max()) + 1), test_y)

# ------------------------------------------------------------------------------ 3. the linear probe

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
STEPS = 30  # of L-BFGS at most; on four sets of features, more steps picked the same penalty

def linear_probe(x, y, classes):
    """The best linear classifier of features x (N, D) with labels y (N,): its weight (classes, D)
    and bias (classes,).

    This is multinomial logistic regression on standardized features, which needs no learning rate.
    Its penalty is chosen on a fifth of the images: the one of PENALTIES with which a classifier
    that is fitted to the other four fifths is right most often. Then it is fitted to all images. At
    the two smallest penalties, with few images, a fit may stop before it has reached the lowest
    loss.
    """
    mean, std = mean_and_std(x)
    z = F.pad((x - mean) / std, (0, 1), value=1)  # a last column of ones, for the bias
    covariance = (z.T @ z / len(z)).cpu().double()
    is_held = every_fifth(y)

    def held_out_accuracy(penalty):
        W = fit(z[~is_held], y[~is_held], classes, penalty, covariance)
        return accuracy(z[is_held] @ W, y[is_held])

    best = max(PENALTIES, key=held_out_accuracy)  # of equal ones, the first
    W = fit(z, y, classes, best, covariance)
    # z @ W = ((x - mean) / std) @ W[:-1] + W[-1], written as a classifier of x
    weight = W[:-1].T / std
    return weight, W[-1] - weight @ mean

def fit(z, y, classes, penalty, covariance):
    """W (D + 1, classes) that minimizes the mean cross-entropy of z @ W with labels y (N,), plus
    penalty / 2 times the sum of the squares of W. z (N, D + 1) holds D features and a column of
    ones.

    L-BFGS needs few steps if the loss curves about equally in all directions. So it does not search
    for W, but for U = L^T W. L L^T is an upper bound on the curvature of the loss: half of z's
    `covariance` (D + 1, D + 1) (Boehning 1992) plus the penalty. Then no direction of U has a
    curvature above about 1. This changes how fast W is found, not which W. On 10,000 images of
    CIFAR-10 with 1,024 features, at a penalty of 0.001, 30 steps in U reach a loss for which W
    itself needs 100 to 200.
    """
    # At least 0.001: else rounding in the covariance could leave the bound without a factor L.
    bound = covariance / 2 + max(penalty, 1e-3) * torch.eye(len(covariance))
    upper = torch.linalg.cholesky(bound, upper=True).float().to(z.device)  # L^T
    U = torch.zeros(z.shape[1], classes, device=z.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([U], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss_and_gradient():
        optimizer.zero_grad()
        W = torch.linalg.solve_triangular(upper, U, upper=True)
        loss = F.cross_entropy(z @ W, y) + penalty / 2 * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(loss_and_gradient)
    return torch.linalg.solve_triangular(upper, U.detach(), upper=True)

def mean_and_std(x):
    """Mean (D,) and standard deviation (D,) of the columns of x (N, D).

    No deviation is below a millionth of the largest deviation or of the column's mean: a column
    that varies less than that varies by rounding alone, and must not be scaled up.
    """
    mean = x.mean(0)
    std = x.std(0, correction=0)
    least = 1e-6 * torch.maximum(std.max(), mean.abs()) + 1e-30
    return mean, std.maximum(least)

def every_fifth(y):
    """A mask (N,), true for every fifth image, counted class after class: each has its share."""
    mask = torch.zeros_like(y, dtype=torch.bool)
    mask[y.argsort(stable=True)[4::5]] = True
    return mask

def accuracy(scores, y):
    """Accuracy in % of scores (N, classes) for labels (N,)."""
    return 100 * (scores.argmax(1) == y).float().mean().item()

# -------------------------------------------- 4. for the monitor of a run, with labels and without

def judge(network, train, test, size, with_probe=False):
    """{"knn": %} of a network's features on labelled held-out images; `with_probe` also "linear".

    At most 50,000 random training images serve as neighbours and for the probe, on a CPU 10,000.
    """
    most = 10_000 if train.device.type == "cpu" else 50_000
    rows = (train.labels >= 0).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=seeded("probe"))[:most]]
    train_x, train_y = extract(network, train, size, rows)
    test_x, test_y = extract(network, test, size)
    measures = dict(knn=knn(train_x, train_y, test_x, test_y))
    if with_probe:
        weight, bias = linear_probe(train_x, train_y, len(train.classes))
        measures["linear"] = accuracy(F.linear(test_x, weight, bias), test_y)
    return measures

def found(network, images, size, **augmentation):
    """The share in % of images, of up to 2,000, whose second view is nearer to their own first view
    than to the first view of any other. `augmentation` are data.augment's settings."""
    rows = torch.randperm(len(images), generator=seeded("apart"))[:2000]
    views = torch.rand(2, len(rows), data.COLUMNS, generator=seeded("views"))
    a, b = [extract(network, images, size, rows, u, **augmentation)[0] for u in views]
    return instance_discrimination(b, a, a)[0].item()

def instance_discrimination(query, own, others):
    """acc@1 to acc@5 in % (5,). acc@j is the share of queries whose own vector is among the j
    nearest vectors, if this own vector and all `others` but one are compared.

    query, own and others are (N, D). Row i of each belongs to image i, and row i of `others` is the
    one that query i leaves out. With originals o and two views a and b of each image, Shi et al.
    2022, section 3, have two modes: o-a is (query, own, others) = (o, a, o), and a-b is (b, a, a).
    Similarity is the cosine. A tie counts against the query, so that a collapsed space has 0 %, not
    100 %.
    """
    q, p, r = unit(query), unit(own), unit(others)
    similarity_to_own = (q * p).sum(1) - 1e-5  # rounding must not decide a tie
    nearer = []
    for i in range(0, len(q), 1000):
        similarity = q[i:i + 1000] @ r.T
        similarity.diagonal(i).fill_(-2)  # the image itself
        nearer.append((similarity >= similarity_to_own[i:i + 1000, None]).sum(1))
    nearer = torch.cat(nearer)
    return torch.stack([100 * (nearer < j).float().mean() for j in range(1, 6)])

# -------------------------------------------------------------------------------------- 5. results

def measure(scores, y):
    """{measure: %} of scores (N, C) for labels (N,): top-1 with the ends of its 95 % interval
    (Wilson 1927), top-5, and the mean over the classes of their accuracies."""
    n, classes = scores.shape
    is_right = scores.topk(min(5, classes)).indices == y[:, None]
    right = is_right[:, 0].sum().item()
    square = 1.96 ** 2  # 95 % of a normal distribution lie within 1.96 deviations
    middle = (right + square / 2) / (n + square)
    half = 1.96 / (n + square) * math.sqrt(right * (n - right) / n + square / 4)
    return dict(top1=100 * right / n, low=100 * (middle - half), high=100 * (middle + half),
                top5=100 * is_right.any(1).float().mean().item(),
                mean_per_class=accuracy_of_classes(scores, y).nanmean().item())

def accuracy_of_classes(scores, y):
    """Accuracy in % (C,) of scores (N, C) in each class; nan for a class without an image."""
    count = y.bincount(minlength=scores.shape[1])
    right = y[scores.argmax(1) == y].bincount(minlength=scores.shape[1])
    return 100 * right / count

def knn_table(train_x, train_y, test_x, test_y, classes):
    """{name: measures} of weighted kNN for some k."""
    distances, near = neighbours(unit(train_x), unit(test_x), 200)
    table = {}
    for k in (1, 10, 20, 100, 200):
        if k <= near.shape[1]:
            scores = vote(distances[:, :k], train_y[near[:, :k]], classes)
            table[f"kNN, k {k}, T 0.1"] = measure(scores, test_y)
    return table

def folder_of(name):
    """The folder of a checkpoint: the run itself, that of a file, runs/random or runs/pixels."""
    path = Path(name)
    if name in UNTRAINED:
        path = Path("runs", name)
    elif path.is_file():
        path = path.parent
    return path

def folder_of_results(args, data_set):
    """--out, or eval-DATA[-LABELS] in the folder of the checkpoint."""
    name = f"eval-{Path(data_set).resolve().name}"
    if args.labels != "1.0":
        name = f"{name}-{args.labels}"
    return Path(args.out or folder_of(args.checkpoint) / name)

# ---------------------------------------------------------------------------------- 6. checkpoints

UNTRAINED = ("random", "pixels")
# Flags whose values may also come from the checkpoint (its args.json or result.json), and the
# values they have if neither the user nor the checkpoint gives one. For a size of None, data.load
# picks one.
DEFAULTS = dict(arch="mobilenetv3", stem="imagenet", size=None, data="letters")

def read_checkpoint(path, arch=None, stem=None):
    """The network in a checkpoint, with its weights, and what is known of it: a dict of arch and
    stem, and of size and data where they are known. No code in the file is run.

    `path` is a run's folder or one of the files that `read_state` reads. What is known comes from
    args.json or result.json in its folder, or from `args` in the file; a typed `arch` comes before
    that. Raises InputError if the file does not hold the whole of that network, or a network with
    another stem.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "backbone.pt"
    state, known = read_state(path)
    arch = arch or known.get("arch")
    if arch not in models.ARCHS:
        raise InputError(f"{path}: of which network? Name it with --arch")
    with torch.device("meta"):  # for its names alone: on this device no weight is drawn
        names = list(models.build(arch).state_dict())
    weights = weights_of(state, arch, names)
    if arch.startswith("resnet") and names[0] in weights:  # the first kernel, 3x3 or 7x7
        known["stem"] = "small" if weights[names[0]].shape[2:] == (3, 3) else "imagenet"
    known.setdefault("stem", stem or "imagenet")
    if stem not in (None, known["stem"]):
        raise InputError(f"--stem {stem}: {path} has the stem {known['stem']}; leave --stem out")
    net = models.build(arch, known["stem"])
    try:
        net.load_state_dict(weights)
    except RuntimeError:
        raise InputError(f"{path}: its weights are not those of {arch}; name the right --arch"
                         ) from None
    print0(f"{path}: {arch}, {len(names)} of its {len(state)} tensors")
    return net, known | dict(arch=arch)

def read_state(path):
    """{name: tensor} of a file, and what is known of its network.

    The file is a state dict, as torchvision's are, or holds one as `state_dict` (MoCo, ssl-small,
    SEED) or `model` (last.pt). Raises InputError if it holds no tensors.
    """
    content = load_file(path)
    if not isinstance(content, dict):
        content = {}
    state = content
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    tensors = {name: value for name, value in state.items()
               if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no state dict")
    flags = content.get("args", {})
    for name in ("args.json", "result.json"):  # of a run, of an evaluation
        file = path.parent / name
        if file.is_file():
            flags = json.loads(file.read_text())
    known = {key: flags[key] for key in DEFAULTS if flags.get(key) is not None}
    return tensors, known

def weights_of(state, arch, names):
    """{name: tensor} of the backbone in a checkpoint's `state`, without heads and other networks.
    `names` are the names of the backbone's own tensors, in order.

    In the checkpoint, a prefix may stand before each name: none in torchvision's,
    `module.encoder_q.` in MoCo's, `encoder_q.backbone.` in last.pt. It is found by the first name,
    conv1.weight in a ResNet. layer1.0.conv1.weight ends with it, too, so the shortest prefix is the
    right one. Key encoders and teachers (SEED) are left out.
    """
    prefixes = [name.removesuffix(names[0]) for name in state if name.endswith(names[0])
                and "encoder_k." not in name and "teacher." not in name]
    prefix = min(prefixes, key=len, default="")
    parts = tuple({prefix + name.split(".")[0] + "." for name in names})  # features., classifier.
    last = prefix + models.last_linear(arch) + "."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()
            if name.startswith(parts) and not name.startswith(last)}

def open_checkpoint(name, args, defaults=DEFAULTS):
    """The network called `name`, and for it the values of the flags in `defaults`, {flag: value}:
    the typed one, else what is known of the checkpoint, else the default. `random` has the weights
    that a run of this seed draws, before --zero-init or --init change them."""
    net = Pixels()
    known = {}
    if name not in UNTRAINED:
        net, known = read_checkpoint(name, args.arch, args.stem)
    typed = {key: getattr(args, key) for key in defaults if getattr(args, key) is not None}
    values = defaults | known | typed
    if name == "random":
        torch.manual_seed(args.seed)
        net = models.build(values["arch"], values["stem"])
    net.name = name  # for messages
    return net, values

def to_evaluate(net, device):
    """The network in evaluation mode on the device."""
    if device.type == "cpu":
        models.speed_up_small_maps(net)
    return net.eval().to(device, memory_format=data.layout(device))

# -------------------------------------------------------------------------------- 7. labels, flags

def labelled_subset(labels, wanted, seed):
    """Random rows (n,) of the labelled images, sorted. `wanted` is a text: with a point, the share
    to take of each class ("0.01"; "1.0" is all), but at least one image; without, the number to
    take of each class ("25"). Raises InputError for any other text."""
    try:
        amount = fraction(wanted) if "." in wanted else positive(wanted)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"--labels {error}") from None
    order = torch.randperm(len(labels), generator=seeded("labels", seed))
    rows = []
    for c in range(int(labels.max()) + 1):
        rows_of_class = order[labels[order] == c]
        n = max(1, round(amount * len(rows_of_class))) if "." in wanted else amount
        rows.append(rows_of_class[:n])
    return torch.cat(rows).sort().values

def add_common_flags(parser):
    """The flags of this file and of analyze.py. In brackets stands what holds without the flag."""
    add = parser.add_argument
    add("--data", help="letters, cifar10, cifar100, stl10 or a folder [the checkpoint's, or "
                       "letters]")
    add("--root", default="data", help="folder of downloaded and decoded data sets [data]")
    add("--size", type=positive, help="side of an image in pixels [the checkpoint's]")
    add("--arch", choices=models.ARCHS, help="[the checkpoint's, or mobilenetv3]")
    add("--stem", choices=models.STEMS, help="[the checkpoint's, or imagenet]")
    add("--out", help="folder of the results [in the checkpoint's folder]")
    add("--seed", type=int, default=0, help="of random weights, subsets and crops [0]")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu [the first there is]")

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder, a checkpoint file, random or pixels")
    parser.add_argument("--knn", action="store_true", help="also weighted kNN, for some k")
    parser.add_argument("--labels", default="1.0", help="a share of each class (0.01), or a number "
                                                        "of images of each class (25) [1.0: all]")
    add_common_flags(parser)
    args = parser.parse_args(argv)

    device = init_device(args.device)
    net, values = open_checkpoint(args.checkpoint, args)
    data_set = values["data"]
    out = folder_of_results(args, data_set)
    to_evaluate(net, device)
    train, test, size = data.load(data_set, args.root, values["size"], device)
    if test is None:
        raise InputError(f"--data {data_set}: an evaluation needs labels (a folder for each "
                         "of at least two classes) and held-out images")
    move_to_device(train, test)
    # a class whose training images are all unreadable is never predicted: its test images are wrong
    rows = labelled_subset(train.labels, args.labels, args.seed)
    classes = len(train.classes)
    print0(f"{net.name} at {size} pixels on {data_set}: {len(rows)} training and {len(test)} "
           "test images")

    train_x, train_y = extract(net, train, size, rows)
    test_x, test_y = extract(net, test, size)
    table = {}
    if args.knn:
        table = knn_table(train_x, train_y, test_x, test_y, classes)
    weight, bias = linear_probe(train_x, train_y, classes)
    scores = F.linear(test_x, weight, bias)
    table["linear"] = measure(scores, test_y)

    if rank_world()[0] == 0:
        print("\n                       top-1 %   95 % from          to     top-5 %  class mean")
        for name, measures in table.items():
            print(f"{name:<18}" + "".join(f"{value:>12.2f}" for value in measures.values()))
        out.mkdir(parents=True, exist_ok=True)
        weights = net.to("cpu", memory_format=torch.contiguous_format).state_dict()
        last = models.last_linear(values["arch"])
        weights |= {f"{last}.weight": weight.cpu(), f"{last}.bias": bias.cpu()}
        save(out / "classifier.pt", weights)
        percents = accuracy_of_classes(scores, test_y).tolist()  # nan without a test image
        per_class = {name: p for name, p in zip(train.classes, percents) if not math.isnan(p)}
        result = vars(args) | values | dict(size=size, classes=train.classes, table=table,
                                            per_class=per_class)
        save(out / "result.json", json.dumps(result, indent=1))
        print(f"\nIn {out}: result.json; classifier.pt, the network and its linear classifier with "
              "torchvision's names")
    return table

if __name__ == "__main__":
    run(main)
