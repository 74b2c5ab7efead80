"""MoCo v2 pretraining of a small network on unlabeled images, in one file.

    torchrun pretrain.py --arch mobilenetv3 --temp 0.1                      # some minutes on a laptop, no download
    torchrun pretrain.py --data FOLDER --arch mobilenetv3 --temp 0.1        # your own images, with or without labels
    torchrun --nproc-per-node 8 pretrain.py --data FOLDER ...               # eight GPUs; --batch is their total
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 pretrain.py ...  # two nodes
    python pretrain.py --out runs/mine --resume                             # go on with a run (or start it)

The method: He et al. 2020 (MoCo), Chen et al. 2020 (MoCo v2), and for small networks Shi et al. 2022 (ssl-small).
Run it with --help for the table of flags: each with its meaning, its default and where that comes from.
"""
import argparse
import copy
import json
import math
import os
import platform
import resource
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import models
from analyze import alignment, uniformity
from data import InputError, rank_world, say
from linear_eval import extract, knn, pixels_of, ridge

# ------------------------------------------------------------------------------------------------------ the flags

RECIPES = {"moco-v2": {},
           "small": dict(temp=0.1, head="wide", jitter=0.8, hue=0.4, gray=0.5),  # Shi et al. 2022
           "light": dict(symmetric=True, smooth=0.1, head="2048", momentum_end=1.0),  # Lin et al. 2022
           "local": dict(local_crops=6, local_scale=[0.05, 0.3], crop=[0.3, 1.0])}  # Tan et al. 2023


def typed(flags):
    """{name: value} as one types it."""
    words = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


AUTO = {}  # flags whose default depends on the data: name -> rule of n images and the flags before it


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(name, default, kind, text, rule=None, **more):
        if rule:
            AUTO[name[2:].replace("-", "_")] = rule
        if kind is bool:
            return group.add_argument(name, action="store_true", help=text)
        shown = "auto" if default is None else " ".join(map(str, default)) if isinstance(default, list) else default

        def read(value):  # a default of None stands for auto
            return None if default is None and value == "auto" else kind(value)

        read.__name__ = kind.__name__
        group.add_argument(name, default=default, type=read, help=f"{text} [{shown}]", **more)

    group = parser.add_argument_group("data")
    flag("--data", "fractals", str, "fractals (drawn in memory), cifar10, cifar100, stl10, or a folder of images")
    flag("--root", "data", str, "where torchvision's data sets are, or are downloaded to")
    flag("--size", None, int, "side of a view in pixels; auto: the images' shorter side, at most 224")
    flag("--stream", "auto", str, "read files while training (on) or decode all into memory once (off)",
         choices=["auto", "on", "off"])
    flag("--workers", None, int, "decoding threads or processes; auto: the cores of this process, at most 16",
         lambda n, a: max(1, min(16, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))

    group = parser.add_argument_group("network")
    flag("--arch", "mobilenetv3", str, ", ".join(models.ARCHS))
    flag("--stem", None, str, "imagenet, or small (stride 1, for small images); auto: small up to 64 pixels, but imagenet for "
         "the fractals, for speed",
         lambda n, a: "small" if a.size <= 64 and a.data != "fractals" else "imagenet")
    flag("--head", "simple", str, f"projection head: {', '.join(models.HEADS)}, or a hidden width; MoCo v2: simple, "
         "Shi 2022: wide")
    flag("--dim", 128, int, "width C of the embedding (MoCo)")
    flag("--init", "random", str, "where the backbone starts: random, or a checkpoint of any known format")

    group = parser.add_argument_group("contrast")
    flag("--temp", 0.2, float, "temperature of InfoNCE; MoCo v2: 0.2, Shi 2022: 0.1")
    flag("--momentum", None, float, "m of the key encoder; MoCo: 0.999; auto: that for runs of 100,000 steps, 0.99 from 5,000, "
         "else 0.8, for a key encoder that lags by more than a few per cent of the run teaches the past",
         lambda n, a: 0.999 if total_steps(n, a) >= 100_000 else 0.99 if total_steps(n, a) >= 5_000 else 0.8)
    flag("--queue", None, int, "negatives K; MoCo: 65536; auto: a power of two up to a tenth of the images, and so short that "
         "its oldest keys are no staler than MoCo's own, K / batch = 0.256 / (1 - m), but 2 batches: queries tell stale keys from "
         "new ones instead of one image from another",
         lambda n, a: min(n, max(2 * a.batch * (1 + a.symmetric),
                                 power(min(65536, n // 10, 0.2561 * a.batch / max(1e-6, 1 - a.momentum))))))
    flag("--bn-splits", None, int, "sub-batches, over all processes, in which the shuffled keys meet BatchNorm; auto: MoCo's 8, "
         "fewer if they would have under 64 images, but 2",
         lambda n, a: next((s for s in range(max(2, rank_world()[1], min(8, a.batch // 64)), 0, -1)
                           if a.batch % s == 0 and s % rank_world()[1] == 0), rank_world()[1]))

    group = parser.add_argument_group("beyond MoCo v2")
    flag("--symmetric", False, bool, "both views are query and key (MoCo's CIFAR notebook; Lin 2022)")
    flag("--smooth", 0, float, "S: the target is 1 - S on the positive, S / k on each of the k nearest queue keys (Lin 2022)")
    flag("--smooth-k", 5, int, "that k")
    flag("--local-crops", 0, int, "N local query views more, all matched to the key (Tan 2023: 6)")
    flag("--local-size", None, int, "their side in pixels; auto: Tan 2023's 128 of 224, in multiples of 4",
         lambda n, a: max(8, round(a.size * 128 / 224 / 4) * 4))
    flag("--local-scale", [0.05, 0.3], float, "range of their area; Tan 2023: with --crop 0.3 1", nargs=2,
         metavar=("LO", "HI"))
    flag("--momentum-end", None, float, "the key encoder's m goes from --momentum to this along a cosine (Lin 2022: 1); auto: stays",
         lambda n, a: a.momentum)
    flag("--teacher", None, str, "distill this checkpoint (SEED, Fang 2021) for --teacher-epochs, then contrast; its embedding "
         "has to have --dim numbers")
    flag("--teacher-arch", None, str, "its network, where the file fits several")
    flag("--teacher-epochs", None, float, "auto: a tenth of the run, the paper's initialization; as many as --epochs: "
         "distillation alone", lambda n, a: total_steps(n, a) / steps_an_epoch(n, a) / 10)
    flag("--teacher-temp", 0.01, float, "temperature of the teacher's softmax (SEED)")

    group = parser.add_argument_group("augmentation (defaults: MoCo v2)")
    flag("--crop", [0.2, 1.0], float, "range of the random resized crop's area", nargs=2, metavar=("LO", "HI"))
    flag("--jitter", 0.4, float, "strength of brightness, contrast and saturation jitter, p 0.8; Shi 2022: 0.8")
    flag("--hue", 0.1, float, "range of hue jitter in turns, p 0.8; Shi 2022: 0.4")
    flag("--gray", 0.2, float, "probability of grayscale; Shi 2022: 0.5")
    flag("--blur", 0.5, float, "probability of Gaussian blur, sigma 0.1..2.0 at 224 pixels")
    flag("--hide", False, bool, "hide-and-seek: hide cells of a grid with the mean (Singh & Lee 2017, Shi 2022)")

    group = parser.add_argument_group("optimization")
    flag("--epochs", None, int, "passes over the images; auto: MoCo's 200, for fractals 14",
         lambda n, a: 14 if a.data == "fractals" else 200)
    flag("--steps", 0, int, "steps of the whole run instead of --epochs; 0: as many as --epochs says")
    flag("--batch", None, int, "images in a step, over all processes; MoCo: 256; auto: a power of two up to 1/80 of the images, "
         "32 to 256",
         lambda n, a: max(2, min(max(32, power(min(256, n // 80))), power(n // 4)) // rank_world()[1] * rank_world()[1]))
    flag("--lr", None, float, "learning rate of SGD; auto: MoCo's 0.03 per 256 images in a batch, 0.04 in runs under 5,000 "
         "steps",
         lambda n, a: (0.04 if total_steps(n, a) < 5_000 else 0.03) * a.batch / 256)
    flag("--wd", 1e-4, float, "weight decay (MoCo); SGD's momentum is 0.9")
    flag("--warmup", 0, float, "epochs of linear warm-up (MoCo: none)")
    flag("--schedule", "cosine", str, "of the learning rate (MoCo v2: cosine)", choices=["cosine", "constant"])

    group = parser.add_argument_group("run")
    flag("--recipe", "moco-v2", str, "a set of the flags above, each of which still overrides it: " + "; ".join(
         f"{name}: {typed(flags) or 'the defaults'}" for name, flags in RECIPES.items()), choices=list(RECIPES))
    flag("--out", None, str, "folder of the run; auto: the next free runs/DATA-ARCH-N")
    flag("--resume", False, bool, "go on with the run in --out, with its flags; start one if there is none")
    flag("--save-every", 10, float, "minutes between checkpoints within an epoch; there is one at the end of each, too")
    flag("--seed", 0, int, "of weights, order and views")
    flag("--device", "auto", str, "cuda, mps or cpu; auto: the first there is")
    flag("--precision", "auto", str, "of the networks, bfloat16 by autocast; auto: bfloat16 on CUDA",
         choices=["auto", "float32", "bfloat16"])
    flag("--compile", "auto", str, "torch.compile with CUDA graphs; auto: on CUDA", choices=["auto", "on", "off"])
    flag("--knn-every", None, int, "epochs between looks at held-out images; auto: a fifth of the run",
         lambda n, a: max(1, total_steps(n, a) // steps_an_epoch(n, a) // 5))
    flag("--profile", 0, int, "run N steps, print where their time goes as one JSON object, and end")

    args = parser.parse_args(argv)
    if args.recipe != "moco-v2":
        parser.set_defaults(**RECIPES[args.recipe])
        args = parser.parse_args(argv)
    if args.resume:
        if not args.out:
            raise InputError("--resume: name the run's folder with --out")
        if (Path(args.out) / "args.json").is_file():
            parser.set_defaults(**models.read_json(Path(args.out) / "args.json"))
            args = parser.parse_args(argv)
    return args


def steps_an_epoch(n, args):
    return max(1, n // max(1, args.batch))  # the last incomplete batch is dropped


def total_steps(n, args):
    return args.steps or args.epochs * steps_an_epoch(n, args)


def power(n):
    """The largest power of two up to n."""
    return 1 << max(0, int(n).bit_length() - 1)


def resolve(args, n):
    """Fill in what is `auto`, in an order in which each rule finds what it needs, and refuse what cannot work."""
    rules = ["stem", "batch", "epochs", "momentum", "momentum_end", "queue", "bn_splits", "lr", "knn_every", "local_size",
             "teacher_epochs"]
    unused = ["momentum_end"] + ["local_size"] * (not args.local_crops) + ["teacher_epochs"] * (not args.teacher)
    picked = [name for name in rules if getattr(args, name) is None]
    for name in picked:
        setattr(args, name, AUTO[name](n, args))
    if args.recipe != "moco-v2":
        say(f"--recipe {args.recipe}: {typed({name: getattr(args, name) for name in RECIPES[args.recipe]})}")
    if shown := [name for name in picked if name not in unused]:
        say(f"picked for {n:,} images: " + ", ".join(typed({name: getattr(args, name)}) for name in shown))
    world = rank_world()[1]
    for wrong, message in [
        (args.batch > n, f"--batch {args.batch}: there are only {n} images; lower it"),
        (args.batch < 2 or args.batch % world,
         f"--batch {args.batch}: must be at least 2 and a multiple of the {world} processes"),
        (args.queue <= args.batch * (1 + args.symmetric),
         f"--queue {args.queue}: must be larger than --batch {args.batch}" + ", twice with --symmetric" * args.symmetric),
        (args.queue > n,
         f"--queue {args.queue}: must not exceed the {n} images, or an image meets itself as a negative"),
        (args.bn_splits < 1 or args.batch % args.bn_splits or args.bn_splits % world or args.batch < 2 * args.bn_splits,
         f"--bn-splits {args.bn_splits}: must divide --batch {args.batch} into parts of 2 or more, "
         f"the same number on each of {world} processes"),
        (not args.temp > 0, f"--temp {args.temp}: must be above 0; 0.05 to 0.5 is usual"),
        (not 0 <= args.momentum <= 1, f"--momentum {args.momentum}: must be within 0..1"),
        (not 0 <= args.momentum_end <= 1, f"--momentum-end {args.momentum_end}: must be within 0..1"),
        *((not 0 < low <= high <= 1, f"{name} {low} {high}: must be 0 < LO <= HI <= 1")
          for name, (low, high) in (("--crop", args.crop), ("--local-scale", args.local_scale))),
        (not 0 <= args.smooth < 1 or not 0 < args.smooth_k <= args.queue,
         f"--smooth {args.smooth:g} --smooth-k {args.smooth_k}: must be within 0..1 and 1..--queue"),
        (args.local_crops < 0 or args.local_size < 8,
         f"--local-crops {args.local_crops} --local-size {args.local_size}: must not be negative, and at least 8 pixels"),
        (not args.teacher_temp > 0, f"--teacher-temp {args.teacher_temp}: must be above 0"),
        (min(args.jitter, args.hue, args.gray, args.blur) < 0, "--jitter, --hue, --gray, --blur: must not be negative"),
        (min(args.dim, args.epochs, args.lr, args.knn_every) <= 0,
         "--dim, --epochs, --lr, --knn-every: must be above 0"),
    ]:
        if wrong:
            raise InputError(message)


# ----------------------------------------------------------------------------------------------------- the method

class Encoder(nn.Module):
    """Backbone and projection head: images (N, 3, H, W) -> unit embeddings (N, C)."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x, splits=1):
        """In `splits` sub-batches, each with BatchNorm statistics of its own."""
        return torch.cat([F.normalize(self.head(self.backbone(part)).float(), dim=1) for part in x.chunk(splits)])


class MoCo(nn.Module):
    """A query encoder that learns, a key encoder that follows it, and a queue of past keys (He et al. 2020, algorithm 1)."""

    def __init__(self, encoder, dim, queue, momentum):
        super().__init__()
        self.encoder_q, self.encoder_k = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))
        self.momentum = momentum

    @torch.no_grad()
    def update_key_encoder(self):
        """f_k <- m f_k + (1 - m) f_q for all parameters at once (eq. 2); its BatchNorm statistics are its own."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.momentum)

    @torch.no_grad()
    def start_from_query(self, generator):
        """After a distillation: the key encoder becomes the query encoder, the queue random keys."""
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.queue.copy_(F.normalize(torch.randn(self.queue.shape, generator=generator), dim=1))

    @torch.no_grad()
    def keys(self, v_k, perm, splits):
        """Unit keys (B, C) of the whole batch in the order of its queries, from this process's share (n, 3, H, W) of the
        views in the order `perm`: so a query's BatchNorm statistics are of other images than its key's (section 3.3)."""
        k = data.gather(self.encoder_k(v_k, splits))
        return unshuffle(k, perm)

    @torch.no_grad()
    def enqueue(self, k, step):
        """Overwrite the oldest keys with the B new ones, around the end of the queue where it comes to that."""
        at = torch.arange(step * len(k), (step + 1) * len(k), device=k.device) % len(self.queue)
        self.queue.index_copy_(0, at, k.to(self.queue.dtype))


def info_nce(q, k, queue, temperature, target=None):
    """InfoNCE of queries q (N, C) with positives k (N, C) and negatives queue (K, C), unit rows (Oord et al. 2018).

    -> loss (N,), and hits (N,): is the positive more similar than every negative. Only q gets a gradient. `target` (N, C)
    makes it the cross-entropy against any distribution over [k_i, queue]: it is the mean key t_i under that, k_i if None.

    The loss is attention with the queue as keys and as values: attention returns o_i = sum_j p_ij queue_j under the
    softmax p over the negatives, and the log-sum-exp s_i of their logits, here less the positive's, q_i.k_i / T. Then

        loss_i = log(1 + e^s_i)        d loss_i / d q_i = sigmoid(s_i) (o_i - k_i) / T

    so the forward pass already holds the gradient, and neither pass ever holds the N x K logits. Another target adds
    q_i.(k_i - t_i) / T to the loss, and (k_i - t_i) / T to the gradient.
    """
    x, k, queue = q.detach(), k.detach(), queue.detach()
    if q.device.type == "cpu" and len(q) * len(queue) <= 2 ** 18:  # few logits do not average the rounding of 1 / T away,
        x, k, queue = x.double(), k.double(), queue.double()       # and few cost nothing in double
    similarity = (x * k).sum(1)
    o, s, top = attend(x, queue, 1 / temperature, similarity / temperature)
    loss, gradient = F.softplus(s), s.sigmoid()[:, None] * (o - k)
    if target is not None:
        loss, gradient = loss + (x * (k - target)).sum(1) / temperature, gradient + (k - target)
    gradient = (gradient / temperature).to(q.dtype)
    return loss.to(q.dtype) + ((q - q.detach()) * gradient).sum(1), similarity > top  # adds 0, and `gradient` to q's


def attend(q, queue, scale, shift):
    """Attention of q (N, C) over queue (K, C) as keys and values.

    -> output (N, C), log-sum-exp of the logits q.queue_j * `scale` less `shift` (N,), largest q.queue_j (N,).
    """
    if q.is_cuda:  # PyTorch's flash attention in float16; few queries fill a GPU when the queue lies along the batch
        half, K = queue.half(), len(queue)
        parts = next(p for p in range(64, 0, -1) if K % p == 0)
        kv, qh = half.view(parts, 1, K // parts, -1), q.half()
        o, s = torch.ops.aten._scaled_dot_product_flash_attention(qh.expand(parts, 1, *q.shape), kv, kv, scale=scale)[:2]
        s, top = s[:, 0], torch.stack([(qh @ part.T).amax(1) for part in half.split(8192)]).amax(0)
        return torch.einsum("pn,pnc->nc", s.softmax(0), o[:, 0].float()), s.logsumexp(0) - shift, top.to(q.dtype)
    # Blocks that stay in the cache. Less the positive's logit, the logits of unit rows are at most 2 / T: no overflow down
    # to T 0.025, where a bound takes over, so no running maximum is needed, and the largest similarity comes out of the
    # same pass: PyTorch's CPU flash attention is 1.15 times as fast but lacks it, the compiled plain formula takes 1.6
    # times as long (N 256, C 128, K 65536, 2 cores).
    base = shift.clamp(min=scale - 80)[:, None]
    total, top, o = 0, q.new_full((len(q),), -math.inf), torch.zeros_like(q)
    for block in queue.split(max(128, 2 ** 18 // len(q))):
        p = torch.addmm(-base, q, block.T, alpha=scale)
        top = torch.maximum(top, p.amax(1))
        total = total + p.exp_().sum(1)
        o.addmm_(p, block)
    base = base[:, 0]
    return o / total.clamp(min=1e-38)[:, None], total.log() + (base - shift), (top + base) / scale


def smooth_target(q, k, queue, share, n):
    """Mean key (N, C) when `share` of the target lies evenly on the n queue keys nearest to the query (Lin et al. 2022)."""
    near, row = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.long, device=q.device)
    for start in range(0, len(queue), 4096):  # only a block of the N x K similarities is ever there
        more, where = (q @ queue[start:start + 4096].to(q.dtype).T).topk(min(n, len(queue) - start))
        near, pick = torch.cat([near, more], 1).topk(min(n, near.shape[1] + more.shape[1]))
        row = torch.cat([row, where + start], 1).gather(1, pick)
    return (1 - share) * k + share * queue[row].to(k.dtype).mean(1)


def teacher_target(z, queue, temperature):
    """Mean key (N, C) under the teacher's softmax over [its embedding z (N, C), queue of such embeddings] (Fang et al. 2021)."""
    o, s, _ = attend(z, queue.to(z.dtype) if not z.is_cuda else queue, 1 / temperature, z.square().sum(1) / temperature)
    return torch.lerp(z, o, s.sigmoid()[:, None])


# ------------------------------------------------------------------------------------------------- views to train on

STRENGTHS = ("jitter", "hue", "gray", "blur")  # of data.augment


def unshuffle(x, perm):
    """Rows that came in the order `perm`, in their own order again."""
    return torch.empty_like(x).index_copy_(0, perm, x)


def batches(images, args, steps, device, rank, world, mark=lambda phase: None):
    """For each of `steps`: this process's n query views, its share of the shuffled batch's key views, the shuffle, and
    the local query views or None. With --symmetric, 2 n query views and key views: the second n have changed roles."""
    n = args.batch // world
    mine = slice(rank * n, (rank + 1) * n)
    settings = {name: getattr(args, name) for name in STRENGTHS}

    def draw(step):
        return data.schedule(len(images), args.batch, args.seed, step, args.hide, args.local_crops)

    def put(x):  # without waiting for the device
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

    def items():  # the loader's workers cut the very crops that `schedule` says
        for rows, u, _ in map(draw, steps):
            yield list(zip(rows[mine].tolist(), u[:, mine, :22].transpose(0, 1)))

    streamed = images.pixels is None
    cuts = [(2, args.size, args.crop), (args.local_crops, args.local_size, args.local_scale)][:1 + (args.local_crops > 0)]
    stream = images.stream(items(), device, args.workers, cuts) if streamed else None
    for step in steps:
        rows, u, perm = draw(step)
        shuffled = perm[mine]
        if streamed:
            crops = next(stream)  # (n, 2, 3, S, S), and of the local views (n, L, 3, s, s)
            own, own_local = [c.unbind(1) for c in (*crops, crops[0])][:2]
        else:  # a process that has all images need not be sent any: it picks its share of the shuffled rows
            own = own_local = [images.pixels[put(rows[mine])]] * max(2, args.local_crops)
            other = images.pixels[put(rows[shuffled])]
        mark("data")
        crop, local = (None, None) if streamed else (args.crop, args.local_scale)
        v_q, v_k = [], []
        for query, key in ((0, 1), (1, 0)) if args.symmetric else ((0, 1),):
            if streamed:  # save_views asks for a world of one, on the first process of many
                other = (data.gather(own[key]) if world > 1 else own[key])[put(shuffled)]
            v_q.append(data.augment(own[query], put(u[query, mine]), args.size, crop, **settings))
            v_k.append(data.augment(other, put(u[key, shuffled]), args.size, crop, **settings))
        v_l = [data.augment(own_local[i], put(u[2 + i, mine]), args.local_size, local, **settings)
               for i in range(args.local_crops)]
        mark("views")
        yield torch.cat(v_q), torch.cat(v_k), put(perm), torch.cat(v_l) if v_l else None


def ahead(batches):
    """On CUDA, the next batch's views are made on a stream of their own while the network works on this one's."""
    side = torch.cuda.Stream()

    def fetch():
        with torch.cuda.stream(side):
            return next(batches, None)

    batch = fetch()
    while batch is not None:
        torch.cuda.current_stream().wait_stream(side)
        for x in filter(torch.is_tensor, batch):
            x.record_stream(torch.cuda.current_stream())
        now, batch = batch, fetch()
        yield now


def save_views(images, args, path):
    """A grid: the first eight images of the first batch (top) and their two views as the network sees them."""
    few = copy.copy(args)
    few.batch, few.symmetric, few.local_crops = min(8, len(images)), False, 0
    v_q, v_k, perm, _ = next(batches(images, few, range(1), torch.device("cpu"), 0, 1))
    rows = data.schedule(len(images), few.batch, args.seed, 0)[0]
    original = data.center(images.squares(rows, args.size), args.size)
    grid = torch.stack([original, v_q, unshuffle(v_k, perm)])
    mean, std = torch.tensor(data.MEAN), torch.tensor(data.STD)
    grid = (grid.permute(0, 3, 1, 4, 2) * std + mean).mul(255).round().clamp(0, 255).byte()
    s = max(1, 96 // args.size)  # small views are enlarged
    grid = grid.repeat_interleave(s, 1).repeat_interleave(s, 3)
    Image.fromarray(grid.reshape(3 * args.size * s, few.batch * args.size * s, 3).numpy()).save(path)


# ------------------------------------------------------------------------------------------------------- the run

def main(argv=None):
    args = parse(argv)

    # Where: torchrun says which process this is; a single one needs no process group.
    device = data.start(args.device)
    rank, world = rank_world()
    args.workers = AUTO["workers"](0, args) if args.workers is None else args.workers

    # What: images, then the flags that follow from their number, then the folder of the run.
    if args.init != "random":  # before the images, so that a wrong file is refused at once
        initial, found = models.read_backbone(args.init, args.arch)
    train, test, args.size = data.load(args.data, args.root, args.size, args.seed, device, args.stream, args.workers)
    n = len(train)
    resolve(args, n)
    epoch_steps, steps = steps_an_epoch(n, args), total_steps(n, args)

    # The networks. Every process starts from the same seed, so none needs to be sent weights.
    torch.manual_seed(args.seed)
    backbone = models.build(args.arch, args.stem, args.size)
    untrained = copy.deepcopy(backbone)
    if args.init != "random":
        own = backbone.state_dict()
        if any(own[k].shape != v.shape for k, v in initial.items()):
            raise InputError(f"--init {args.init}: has the {found['stem']} stem; give it as --stem")
        backbone.load_state_dict(initial)
        say(f"--init {args.init}: {found['arch']}, dropped {len(found['dropped'])} other tensors")
    teacher, distilled = None, 0
    if args.teacher:
        teacher = Encoder(*models.read_teacher(args.teacher, args.teacher_arch, args.stem)).eval().requires_grad_(False)
        teacher.to(device, memory_format=torch.channels_last)
        with torch.no_grad():
            width = teacher(torch.zeros(1, 3, args.size, args.size, device=device)).shape[1]
        if width != args.dim:
            raise InputError(f"--teacher {args.teacher}: embeds in {width} dimensions; give --dim {width}")
        distilled = min(steps, round(args.teacher_epochs * epoch_steps))
    moco = MoCo(Encoder(backbone, models.make_head(args.head, backbone.dim, args.dim)), args.dim, args.queue, args.momentum)
    moco.to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        moco.queue = moco.queue.half()  # what flash attention reads; a unit vector loses nothing that the loss notices
    encoder_q = moco.encoder_q
    compiled = args.compile == "on" or (args.compile == "auto" and device.type == "cuda")
    if compiled:  # small networks are launch-bound
        moco.encoder_q.compile(mode="reduce-overhead")
        moco.encoder_k.compile(mode="reduce-overhead")
    if world > 1:  # averages gradients; each process keeps its BatchNorm statistics, and the first one's count
        encoder_q = nn.parallel.DistributedDataParallel(encoder_q, broadcast_buffers=False)
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), args.lr, momentum=0.9, weight_decay=args.wd,
                                fused=device.type in ("cuda", "cpu"))
    half = args.precision == "bfloat16" or (args.precision == "auto" and device.type == "cuda")
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=half)  # noqa: E731

    def step_once(step, v_q, v_k, perm, v_l, mark=lambda phase: None):
        """One step of MoCo v2: loss, instance accuracy and mean cosine between the queries, as a tensor (3,)."""
        n, ways, target = args.batch // world, 1 + args.symmetric, None
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, steps, epoch_steps)
        moco.momentum = args.momentum_end + (args.momentum - args.momentum_end) * 0.5 * (1 + math.cos(math.pi * step / steps))
        if compiled:  # a CUDA graph's outputs last until the next step
            torch.compiler.cudagraph_mark_step_begin()
        if args.head == "dropout":  # a function of the step, as all that is random, so that a resumed run draws the same
            torch.manual_seed(data.seeded(args.seed, "dropout", step).initial_seed())
        if teacher and step == distilled:
            moco.start_from_query(data.seeded(args.seed, "queue"))
        with autocast():
            q = encoder_q(v_q, ways)
            if v_l is not None:
                q = torch.cat([q, encoder_q(v_l)])
        mark("query_forward")
        with autocast():
            if step < distilled:  # teacher and student see the same view
                own = teacher(v_q)
                k = data.gather(own)
            else:
                moco.update_key_encoder()
                k = torch.cat([moco.keys(v, perm, args.bn_splits // world) for v in v_k.chunk(ways)])
                own = k.view(ways, args.batch, -1)[:, rank * n:(rank + 1) * n].flatten(0, 1)  # the keys of q
        own = torch.cat([own, own[:n].repeat(args.local_crops, 1)])
        mark("keys")
        if step < distilled:
            target = teacher_target(own, moco.queue, args.teacher_temp)
        elif args.smooth:
            target = smooth_target(q.detach(), own, moco.queue, args.smooth, args.smooth_k)
        loss, hit = info_nce(q, own, moco.queue, args.temp, target)
        mark("loss")
        loss.mean().backward()
        mark("backward")
        optimizer.step()
        optimizer.zero_grad()
        moco.enqueue(k, step)
        mark("update")
        return torch.stack([loss.detach().mean(), hit[:ways * n].float().mean(), q.detach().mean(0).square().sum()])

    if args.profile:
        return profile(args, train, device, moco, encoder_q, step_once, autocast)

    out = choose_folder(args, rank)  # only now that all flags are known to be good

    # How far: a run that was stopped goes on where its last checkpoint was written. last.pt holds everything; what else is
    # in the folder is derived from it, so it does not matter between which two files a run is killed.
    first, log, started = 0, [], time.time()
    history = torch.zeros(epoch_steps, 3, device=device)  # what step_once says of this epoch's steps
    last = newest_checkpoint(out) if args.resume else None
    if last:
        moco.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        first, log, started = last["step"], last["log"], started - last["seconds"]
        history[:first % epoch_steps] = last["history"].to(device)
        say(f"resumed {out} at step {first} of {steps}")
    elif rank == 0:
        save_views(train, args, out / "views.png")

    def derive():
        data.save(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
        data.save(out / "backbone.pt", {k: v.cpu().contiguous() for k, v in moco.encoder_q.backbone.state_dict().items()})

    def save(step):
        if rank == 0:
            try:
                data.save(out / "last.pt", dict(model=moco.state_dict(), optimizer=optimizer.state_dict(), step=step, log=log,
                                                history=history[:step % epoch_steps].cpu(), seconds=time.time() - started,
                                                args=vars(args)), keep=out / "previous.pt")
                derive()
            except OSError as error:
                if step == steps:
                    raise InputError(f"{error}: the run is at its end, but not saved; make room, then go on with "
                                     "--resume") from None
                say(f"{error}: not saved; the checkpoint before is whole, training goes on, and the next save tries again")

    def check(step, done):
        """End a run whose numbers went bad, before it overwrites its last good checkpoint."""
        bad = (~history[:done, 0].isfinite()).nonzero()
        before = f"{out}/last.pt is from before, if there is one"
        if len(bad):
            i = bad[0, 0].item()
            raise InputError(f"the loss is {history[i, 0].item()} at step {step + 1 - done + i}: the weights have grown without "
                             f"bound; lower --lr (now {args.lr:g}), raise --temp or add --warmup; {before}")
        if done >= 20 and history[done - 20:done, 2].min() > 0.9999:
            raise InputError(f"at step {step} all queries are alike (mean cosine over 0.9999): the network has collapsed; lower "
                             f"--lr (now {args.lr:g}), or look at views.png: are the images all alike? {before}")

    if rank == 0:
        data.save(out / "args.json", json.dumps(vars(args), indent=1))
        if last:
            derive()
    say(f"{args.arch}, {sum(p.numel() for p in backbone.parameters()) / 1e6:.1f} M parameters, on {world} x {device.type}: "
        f"{n:,} images at {args.size} pixels, {steps:,} steps of {args.batch}, in {out}\n"
        f"The loss rises for the first {-(-args.queue // args.batch)} steps, while the random keys that the queue starts with "
        f"make way for real ones, towards ln(K + 1) = {math.log(args.queue + 1):.2f}; from there it should fall.")

    # The loop.
    views = batches(train, args, range(first, steps), device, rank, world)
    progress, epoch_start, epoch_first, saved = data.Progress(), time.time(), first, time.time()
    stop, release_signals = catch_signals()
    moco.train()
    for step, batch in enumerate(ahead(views) if device.type == "cuda" else views, first):
        done = step % epoch_steps + 1  # steps of this epoch
        epoch = step // epoch_steps + 1
        history[done - 1] = step_once(step, *batch)

        def so_far():  # in this epoch
            check(step, done)
            return *history[:done].mean(0).tolist(), (step + 1 - epoch_first) * args.batch / (time.time() - epoch_start)

        def line(loss, accuracy, alike, speed):
            left = (steps - step - 1) * args.batch / speed
            return (f"epoch {epoch}/{-(-steps // epoch_steps)}  loss {loss:.3f}  instance accuracy {100 * accuracy:.1f} %  "
                    f"{speed:.0f} images/s  {int(left // 60)}:{int(left % 60):02} left")

        progress(lambda: line(*so_far()))
        ended = done == epoch_steps or step + 1 == steps
        due = agree(2 if stop else time.time() - saved > 60 * args.save_every) if world == 1 or step % 10 == 9 else 0
        if not (ended or due):
            continue
        if world > 1:
            dist.all_reduce(history)
            history /= world
        loss, accuracy, alike, speed = so_far()
        if ended:
            for buffer in moco.encoder_q.buffers() if world > 1 else []:
                dist.broadcast(buffer, 0)
            entry = dict(epoch=epoch, step=step + 1, loss=loss, instance_accuracy=100 * accuracy, query_similarity=alike,
                         lr=optimizer.param_groups[0]["lr"], images_per_s=speed)
            shown = line(loss, accuracy, alike, speed)
            if epoch % args.knn_every == 0 or step + 1 == steps:
                moco.eval()
                entry |= judge(moco.encoder_q.backbone, train, test, args, device, linear=False)
                moco.train()
                shown += "".join(f"  {key} {entry[key]:.2f}" for key in ("knn", "alignment", "uniformity") if key in entry)
            log.append(entry | dict(seconds=time.time() - started))
            progress(lambda: shown, end=True)
        save(step + 1)
        saved = time.time()
        if ended:
            history.zero_()
            epoch_start, epoch_first = time.time(), step + 1
        if due == 2 and step + 1 < steps:
            release_signals()
            say(f"\nstopped and saved at step {step + 1} of {steps}; go on with: python pretrain.py --out {out} --resume")
            sys.exit(128 + (stop or [signal.SIGTERM])[0])

    release_signals()
    moco.eval()
    report(moco.encoder_q.backbone, untrained.to(device).eval(), train, test, args, device, out)
    if world > 1:
        dist.destroy_process_group()
    return moco


def catch_signals():
    """A list that SIGTERM and Ctrl-C are noted in, so that the loop can end between two steps; and what undoes that."""
    caught = []
    before = {number: signal.signal(number, lambda number, frame: caught.append(number))
              for number in (signal.SIGTERM, signal.SIGINT)}
    return caught, lambda: [signal.signal(number, handler) for number, handler in before.items()]


def agree(wish):
    """The largest wish of all processes, so that all save or stop at the same step."""
    wish = torch.tensor(int(wish))
    if dist.is_initialized():
        dist.all_reduce(wish, dist.ReduceOp.MAX)
    return wish.item()


def newest_checkpoint(out):
    """The content of last.pt, or, if that is damaged, of the one before; None if a run was not there yet."""
    paths, damaged = [out / name for name in ("last.pt", "previous.pt") if (out / name).is_file()], []
    for path in paths:
        try:
            content = models.load_file(path)
            if zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
                raise InputError(f"{path}: its checksums do not fit")
            break
        except (InputError, zipfile.BadZipFile) as error:
            say(f"warning: {error}" + (f"; going back to {paths[1]}" if path != paths[-1] else ""))
            damaged.append(path)
    if paths == damaged:
        if paths:
            raise InputError(f"--resume: no checkpoint in {out} can be read; start again with another --out")
        return None
    if dist.is_initialized():
        dist.barrier()
    for path in damaged if rank_world()[0] == 0 else []:  # or the next save would keep it in the good one's place
        os.replace(path, f"{path}.damaged")
    return content


def choose_folder(args, rank):
    """The run's folder, made: --out, or the next free runs/DATA-ARCH-N."""
    if args.out is None:
        chosen = [None]
        if rank == 0:
            Path("runs").mkdir(exist_ok=True)
            for i in range(1, 10**6):  # making it claims it, also from a run that starts at the same moment
                path = Path("runs") / f"{Path(args.data).resolve().name}-{args.arch}-{i}"
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    continue
            chosen = [str(path)]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen, 0)
        args.out = chosen[0]
    out = Path(args.out)
    if not args.resume and any((out / name).exists() for name in ("last.pt", "previous.pt", "log.jsonl")):
        raise InputError(f"--out {out}: holds a run already; go on with it (--resume) or name another folder")
    if dist.is_initialized():
        dist.barrier()
    out.mkdir(parents=True, exist_ok=True)
    return out


def learning_rate(args, step, steps, epoch_steps):
    warm = min(1, (step + 1) / (args.warmup * epoch_steps)) if args.warmup else 1
    return args.lr * warm * (0.5 * (1 + math.cos(math.pi * step / steps)) if args.schedule == "cosine" else 1)


def judge(network, train, test, args, device, linear=True):
    """kNN and, if wanted, linear accuracy on held-out images, or where there are no labels alignment and uniformity."""
    if test is None:
        return views_apart(network, train, args, device)
    features = probe_features(network, train, test, args, device)
    return dict(knn=knn(*features)) | (dict(linear=ridge(*features)) if linear else {})


def views_apart(network, images, args, device):
    """Alignment and uniformity of two views, drawn as in training, of up to 2,000 images."""
    rows = torch.randperm(len(images), generator=data.seeded("apart"))[:2000]
    settings = {name: getattr(args, name) for name in ("crop", *STRENGTHS)}
    uniforms = torch.rand(2, len(rows), data.COLUMNS, generator=data.seeded("views"))
    a, b = (extract(network, images, args.size, device, rows, args.workers, u=u, **settings)[0] for u in uniforms)
    return dict(alignment=alignment(a, b).item(), uniformity=uniformity(a).item())


def probe_features(network, train, test, args, device):
    """train_x, train_y, test_x, test_y of the labelled images: at most 50,000 to train on, 10,000 on a CPU."""
    limit = 10_000 if device.type == "cpu" else 50_000
    rows = (train.labels >= 0).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=data.seeded("probe"))[:limit]]
    return (*extract(network, train, args.size, device, rows, args.workers),
            *extract(network, test, args.size, device, workers=args.workers))


def report(network, untrained, train, test, args, device, out):
    """The end: what the features are worth beside those of random weights and beside raw pixels, and what to do next."""
    networks, heads = {"learned": network, "random weights": untrained}, ("alignment", "uniformity")
    note, digits = "lower is better, of both together", 3
    if test is not None:
        networks["raw pixels"], heads, digits = pixels_of(args.size), ("kNN %", "linear %"), 1
        note = f"{len(test):,} held-out images, {len(test.classes)} classes"
    say(f"\n{'features':<16}{heads[0]:>11}{heads[1]:>12}   ({note})")
    for name, net in networks.items():
        say(f"{name:<16}" + "{:>11.{d}f}{:>12.{d}f}".format(*judge(net, train, test, args, device).values(), d=digits))
    say(f"\nThe network is {out}/backbone.pt (torchvision's names). Look at {out}/views.png and {out}/log.jsonl, then try\n"
        + f"  python linear_eval.py {out}\n" * (test is not None)
        + f"  torchrun pretrain.py --data FOLDER --arch {args.arch} --temp {args.temp:g}")


def profile(args, train, device, moco, encoder_q, step_once, autocast):
    """Print where the time of --profile N steps goes, and how much of a step the bare network work would take."""
    rank, world = rank_world()
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    phases, last = {}, [0.0]

    def mark(phase):  # waiting at each border spoils the overlap: phases are timed in steps of their own
        wait()
        now = time.perf_counter()
        phases[phase] = phases.get(phase, 0) + now - last[0]
        last[0] = now

    def timed(count, marked):
        nothing = lambda phase: None  # noqa: E731
        views = batches(train, args, range(count + 3), device, rank, world, mark if marked else nothing)
        start = 0
        for step, batch in enumerate(ahead(views) if device.type == "cuda" and not marked else views):
            if step == 3:  # warm-up
                wait()
                phases.clear()
                start = last[0] = time.perf_counter()
            step_once(step, *batch, mark if marked else nothing)
        wait()
        return time.perf_counter() - start

    def bare(count):
        v_q, v_k, _, v_l = next(batches(train, args, range(1), device, rank, world))
        for step in range(count + 3):
            if step == 3:
                wait()
                start = time.perf_counter()
            with autocast():
                q = encoder_q(v_q, 1 + args.symmetric).sum() + (encoder_q(v_l).sum() if v_l is not None else 0)
                with torch.no_grad():
                    moco.encoder_k(v_k, args.bn_splits // world)
            q.backward()
            moco.encoder_q.zero_grad()
        wait()
        return time.perf_counter() - start

    moco.train()
    runs = [(timed(args.profile, False), bare(args.profile)) for _ in range(3)]
    step, network = map(min, zip(*runs))  # the speed of a shared machine drifts
    timed(args.profile, True)
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        name = f"{device.type} {platform.machine()}, {torch.get_num_threads()} threads"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    say(json.dumps(dict(device=name, arch=args.arch, size=args.size, batch=args.batch, queue=args.queue,
                        images_per_s=round(args.profile * args.batch / step, 1), peak_memory_mb=round(peak / 2**20),
                        **{phase: round(1000 * seconds / args.profile, 2) for phase, seconds in phases.items()},
                        efficiency=round(network / step, 3))))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"pretrain.py: {error}")
