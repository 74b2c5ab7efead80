"""MoCo v2 pretraining of a small network on unlabeled images.

    python pretrain.py --arch mobilenetv3 --temp 0.1       # some minutes on a laptop, no download
    python pretrain.py --data FOLDER --temp 0.1            # your own images, with or without labels
    torchrun --nproc-per-node 8 pretrain.py --data FOLDER  # eight GPUs; --batch is their total
    python pretrain.py --out runs/mine --resume            # go on with a run

The method: He et al. 2020 (MoCo), Chen et al. 2020 (MoCo v2), for small networks Shi et al. 2022.
Read it from top to bottom: the method, one step, the training loop. Then, as needed: the details
of the loss, views, networks, optimizer, monitor and report, the run's folder, flags.
"""
import argparse
import copy
import gc
import json
import math
import os
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import models
from data import (InputError, Progress, gather, init_device, load_file, mean_over_processes, print0,
                  rank_world, save, share_buffers, to_device)
from linear_eval import (Parser, Pixels, count, factor, judge, number, read_checkpoint, read_head,
                         read_json, share, side, to_evaluate)

# ----------------------------------------------------------------------------------- 1. the method

class Encoder(nn.Module):
    """Backbone and projection head: a list of image batches -> their unit embeddings, concatenated.

    A list, because with --symmetric both views of an image are queries, and each batch of views has
    BatchNorm statistics of its own.
    """

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, batches):
        embeddings = []
        for images in batches:
            z = self.head(self.backbone(images))
            embeddings.append(F.normalize(z.float(), dim=1))
        return torch.cat(embeddings)

class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm of each of `splits` parts of the batch by itself (MoCo's CIFAR notebook). Each part
    enters the running statistics."""
    splits = 1

    def _check_input_dim(self, x):
        pass  # maps of the backbone, vectors of the head

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        parts = []
        for part in x.chunk(self.splits):
            parts.append(super().forward(part))
        return torch.cat(parts)

class MoCo(nn.Module):
    """A query encoder that learns, a key encoder that follows it, and a queue of past keys."""

    def __init__(self, encoder, dim, queue_size, splits):
        super().__init__()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        for layer in self.encoder_k.modules():
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                layer.__class__ = SplitBatchNorm  # its weights and statistics stay
                layer.splits = splits
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))  # where in the queue

    @torch.no_grad()
    def update_key_encoder(self, m):
        """f_k <- m f_k + (1 - m) f_q (eq. 2): weights only; BatchNorm's statistics are its own."""
        weights_k = list(self.encoder_k.parameters())
        weights_q = list(self.encoder_q.parameters())
        torch._foreach_lerp_(weights_k, weights_q, 1 - m)  # k.lerp_(q, 1 - m) for all, in one call

    @torch.no_grad()
    def encode_keys(self, views, order):
        """Keys (B, C) of the whole batch from this process's share of views in shuffled `order`.

        Shuffling BN (section 3.3): keys meet BatchNorm in other company than their queries, in
        parts. Else a query could find its key by the batch statistics that both share.
        """
        shuffled = gather(self.encoder_k([views]))
        keys = torch.empty_like(shuffled)
        keys[order] = shuffled  # undo the shuffle
        return keys

    @torch.no_grad()
    def enqueue(self, keys):
        """The keys (B, C) of a step overwrite the oldest ones: the queue is a ring."""
        places = self.oldest + torch.arange(len(keys), device=keys.device)
        self.queue[places % len(self.queue)] = keys
        self.oldest.add_(len(keys)).remainder_(len(self.queue))

def info_nce_plain(q, k, queue, temperature, target=None, more_keys=None, is_own=None):
    """InfoNCE as a formula: cross-entropy of a softmax over [own key, all keys of the queue].

    q, k (N, C), queue (K, C) -> loss (N,), and whether a query's own key is nearer than all others
    (N,). `target` (N, C) is the mean key under the wanted distribution: k in MoCo (Oord et al.
    2018). A soft target p over keys u_j adds  log-sum-exp - sum_j p_j q.u_j / T,  and that sum is
    q.target / T. `more_keys` (M, C) are negatives, too, unless `is_own` (N, M): of one image.
    """
    target = k if target is None else target
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
    if more_keys is not None:
        others = (q @ more_keys.T / temperature).masked_fill(is_own, -math.inf)
        logits = torch.cat([logits, others], dim=1)
    loss = logits.logsumexp(1) - (q * target).sum(1) / temperature
    return loss, logits[:, 0] > logits[:, 1:].amax(1)

def info_nce(q, k, queue, temperature, target=None, more_keys=None, is_own=None):
    """The same without the N x (1 + K) logits in memory, in one pass. Only q gets a gradient.

    Rows must have length one, and T must be 0.03 or more: see `softmax_over_keys`. The gradient of
    a log-sum-exp is a mean under the softmax, which is what attention computes. So the forward pass
    already holds  d loss / d q = (mean key under the softmax - target) / T.
    """
    with torch.no_grad():
        target = k if target is None else target
        mean, loss, hit = softmax_over_keys(q, k, queue, temperature, more_keys, is_own)
        loss += (q * (k - target)).sum(1) / temperature  # log-sum-exp - q.k becomes .. - q.target
        gradient = (mean - target) / temperature
    carrier = ((q - q.detach()) * gradient).sum(1)  # worth 0, but d carrier / d q = gradient
    return loss + carrier, hit

# ------------------------------------------------------------------------------------- 2. one step

def train_step(moco, encoder_q, optimizer, scaler, autocast, args, batch):
    """Views, queries, keys, loss, update. `encoder_q` is moco.encoder_q, under torchrun wrapped in
    DDP; `batch` is what load_batch returns.

    -> (2,): mean loss, and instance accuracy: the share of queries whose own key is the nearest.
    """
    query_views, key_views, order = make_views(batch, args)
    rank, world = rank_world()
    n = args.batch // world  # images of this process

    with autocast:
        q = encoder_q(query_views)
        if args.teacher is None:  # MoCo: update, then encode. A teacher stays as it is
            moco.update_key_encoder(args.momentum)
        new_keys = [moco.encode_keys(view, order) for view in key_views]
    k = torch.cat([keys[rank * n:(rank + 1) * n] for keys in new_keys])
    new_keys = torch.cat(new_keys)

    target = more_keys = is_own = None
    if args.teacher is not None:
        target = teacher_target(k, moco.queue, args.teacher_temp)
    if args.in_batch:
        more_keys = new_keys
        is_own = is_own_image(len(q), len(new_keys), n, q.device)
    loss, hit = info_nce(q, k, moco.queue, args.temp, target, more_keys, is_own)

    scaler.scale(loss.mean()).backward()  # scales for float16 alone
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    moco.enqueue(new_keys)
    return mean_over_processes(torch.stack([loss.detach().mean(), hit.float().mean()]))

# ---------------------------------------------------------------------------- 3. the training loop

def main(argv=None):
    args = parse(argv)
    device = init_device(args.device)  # under torchrun also the process group
    rank, world = rank_world()

    # images, and the flags that follow from their number
    train, test, args.size = data.load(args.data, args.root, args.size, args.keep, device)
    fill_auto(args, len(train), world)
    check(args, train, world)
    epoch_steps = len(train) // args.batch
    steps = args.total_steps

    # networks: from the same seed, every process draws the same weights
    out = Path(args.out or next_free_folder(args))
    last = None  # the last checkpoint of a run that goes on
    if args.resume and (out / "last.pt").exists():
        last = load_file(out / "last.pt")
    torch.manual_seed(args.seed)
    moco, untrained = build_networks(args, device, is_new=last is None)
    encoder_q = DistributedDataParallel(moco.encoder_q) if world > 1 else moco.encoder_q
    dtype = choose_dtype(args.precision, device, args.arch)
    # saves a twentieth of a step on a CPU, and reads the rate of a recorded one on the GPU; in
    # float16, an overflow would stay in the momentum
    fused = device.type in ("cpu", "cuda") and dtype != torch.float16
    optimizer = Muon(moco.encoder_q, args.muon, args.lr, args.wd, fused)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    take_step = partial(train_step, moco, encoder_q, optimizer, scaler, autocast, args)
    # not in float16, where a step asks whether a gradient has overflowed
    if device.type == "cuda" and world == 1 and dtype != torch.float16:
        take_step = Recorded(take_step, optimizer, device)

    # where the run is: steps done, an entry per epoch, sums of this epoch's losses and accuracies
    first, log, sums = 0, [], torch.zeros(2, device=device)
    if last is not None:
        first, log, sums = restore(last, moco, optimizer, scaler, device)
    args.images = train.fingerprint
    state = dict(steps_done=first, digest_of_log=zlib.crc32(repr(log).encode()))
    refuse_differences(vars(args) | dict(out=None) | state)  # a node may call its folder otherwise
    if last is None:
        start_run(out, train, args)
    print0(f"{args.arch} on {world} x {device.type}: {len(train):,} images at {args.size} pixels, "
           f"steps {first:,} to {steps:,} of {args.batch} images, in {out}")
    if first == 0:
        print0(f"The loss rises for the first {math.ceil(args.queue / args.batch)} steps, while "
               "real keys take the place of the random ones in the queue; then it should fall.")

    minutes = log[-1]["minutes"] if log else 0.0  # trained before
    progress = Progress(steps, first)
    saved = time.time()
    batches = train.prefetch(partial(load_batch, train, args), range(first, steps))
    for step, batch in enumerate(batches, first):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(args, step, epoch_steps)
        sums += take_step(batch)

        # the rest reads the loss, which waits for the device: only where there is something to do
        done = step % epoch_steps + 1  # steps of this epoch
        run_ends = step + 1 == steps
        epoch_ends = done == epoch_steps or run_ends
        save_is_due = rank == 0 and (run_ends or time.time() - saved > 60 * args.save_every)
        if not (epoch_ends or save_is_due or progress.due()):
            continue
        loss, accuracy = (sums / done).tolist()
        stop_if_diverged(loss, step, out, args)
        epoch = step // epoch_steps + 1
        seconds = time.time() - progress.started
        entry = dict(epoch=epoch, step=step + 1, minutes=minutes + seconds / 60, loss=loss,
                     instance_accuracy=100 * accuracy, lr=float(optimizer.param_groups[0]["lr"]),
                     images_per_s=(step + 1 - first) * args.batch / seconds)
        if epoch_ends:
            if epoch % args.knn_every == 0 or run_ends:
                entry |= monitor(moco, train, test, args)
            log.append(entry)
            sums.zero_()
        if rank == 0:
            progress.show(step + 1, in_words(entry))
            if save_is_due:
                save_run(out, moco, optimizer, scaler, step + 1, log, sums)
                saved = time.time()

    report(out, moco.encoder_q.backbone, untrained, train, test, args)
    if world > 1:
        dist.destroy_process_group()
    return moco

# ------------------------------------ 4. details of the loss: the sum over the queue, soft targets

def softmax_over_keys(q, k, queue, temperature, more_keys=None, is_own=None):
    """The softmax of q over [k, queue, more_keys], as above -> the mean key under it (N, C);
    log-sum-exp of the logits minus the own one (N,); is the own key nearer than all others (N,).

    Minus the own logit all is a sum over the queue, and exp needs no running maximum: rows have
    length one, so no logit is above 2 / T, 67 at T 0.03, and float32 holds 65,536 e^67.
    """
    own = (q * k).sum(1) / temperature
    s, o, top = sums_over_queue(q, queue, 1 / temperature, own)
    if more_keys is not None:
        logits = torch.addmm(-own[:, None], q, more_keys.T, alpha=1 / temperature)
        add_to_sums(s, o, top, logits.masked_fill_(is_own, -math.inf), more_keys)
    mean = (o + k) / (1 + s)[:, None]  # the own key's weight is exp(0)
    return mean, s.log1p(), top < 0

def sums_over_queue(q, queue, scale, own):
    """With w_ij = exp(scale q_i.u_j - own_i) over the keys u_j of the queue (K, C):

    s = sum_j w_ij (N,); o = sum_j w_ij u_j (N, C); the largest logit minus the own one (N,).
    """
    if triton is not None and q.is_cuda and q.shape[1] <= 1024:  # wider, it takes much memory
        return fused_sums(q, queue, scale, own)
    s = torch.zeros_like(own)
    o = torch.zeros_like(q)
    top = torch.full_like(own, -math.inf)
    for keys in queue.split(max(128, 2 ** 18 // len(q))):  # 1 MB of logits stays in the cache
        logits = torch.addmm(-own[:, None], q, keys.T, alpha=scale)
        add_to_sums(s, o, top, logits, keys)
    return s, o, top

def add_to_sums(s, o, top, logits, keys):
    """Take keys (M, C) and their logits (N, M) minus the own one into the sums, all in place; the
    logits are used up."""
    torch.maximum(top, logits.amax(1), out=top)
    weights = logits.exp_()
    s += weights.sum(1)
    o.addmm_(weights, keys)

triton = None
if "TRITON_INTERPRET" in os.environ or (
        torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)):
    try:
        import triton
        import triton.language as tl
        if "TRITON_INTERPRET" not in os.environ:
            triton.runtime.driver.active.get_current_target()  # raises without driver or compiler
    except Exception as error:
        print0(f"No Triton ({str(error).splitlines()[0]}): InfoNCE in blocks, which is slower")
        triton = None

if triton is not None:
    @triton.jit
    def queue_kernel(q_ptr, queue_ptr, own_ptr, s_ptr, o_ptr, top_ptr, N, K, C, scale,
                     WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
                     PART: tl.constexpr):
        # one program: ROWS queries, and a PART of the queue in blocks of KEYS
        query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        part = tl.program_id(1)
        column = tl.arange(0, WIDTH)  # C of them exist
        at = query[:, None] * C + column
        exists = (query[:, None] < N) & (column < C)
        q = tl.load(q_ptr + at, mask=exists, other=0.0)
        own = tl.load(own_ptr + query, mask=query < N, other=0.0)
        s = tl.zeros([ROWS], tl.float32)
        o = tl.zeros([ROWS, WIDTH], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        for begin in range(0, PART, KEYS):
            key = part * PART + begin + tl.arange(0, KEYS)
            keys = tl.load(queue_ptr + key[:, None] * C + column,
                           mask=(key[:, None] < K) & (column < C), other=0.0)
            logits = tl.dot(q, tl.trans(keys)) * scale - own[:, None]
            logits = tl.where(key[None, :] < K, logits, float("-inf"))
            # float16 holds weights up to 65504: here they are relative to the top so far
            new_top = tl.maximum(top, tl.max(logits, 1))
            shrink = tl.exp(top - new_top)
            weights = tl.exp(logits - new_top[:, None])
            s = s * shrink + tl.sum(weights, 1)
            o = o * shrink[:, None] + tl.dot(weights.to(keys.dtype), keys)
            top = new_top
        s *= tl.exp(top)
        o *= tl.exp(top)[:, None]
        # each part has a place of its own: no order of additions is left to chance
        tl.store(s_ptr + part * N + query, s, mask=query < N)
        tl.store(top_ptr + part * N + query, top, mask=query < N)
        tl.store(o_ptr + part * N * C + at, o, mask=exists)

def fused_sums(q, queue, scale, own, part=1024):
    """sums_over_queue as one Triton kernel: float16 operands, float32 sums."""
    n, c = q.shape
    parts = triton.cdiv(len(queue), part)
    s = own.new_empty(parts, n)
    top = own.new_empty(parts, n)
    o = own.new_empty(parts, n, c)
    width = max(16, triton.next_power_of_2(c))
    block = max(16, min(64, 8192 // width))  # of queries, and of keys: all must fit on the chip
    queue_kernel[(triton.cdiv(n, block), parts)](
        q.half().contiguous(), queue.half(), own, s, o, top, n, len(queue), c, scale,
        WIDTH=width, ROWS=block, KEYS=block, PART=part)
    return s.sum(0), o.sum(0), top.amax(0)

def is_own_image(queries, keys, n, device):
    """Of in-batch negatives: which of a step's keys are of a query's own image (queries, keys)?

    All keys of the queue are older than a query's own key. Where the encoder moves fast, at the
    start and in short runs, age tells them apart, and the network learns that first. Keys of other
    images as fresh as the own one (SimCLR, MoCo v3) leave nothing to learn from age.
    """
    rank, world = rank_world()
    image_of_query = rank * n + torch.arange(queries, device=device) % n
    image_of_key = torch.arange(keys, device=device) % (n * world)
    return image_of_query[:, None] == image_of_key

def teacher_target(z, queue, temperature):
    """The mean key under the teacher's softmax over [its embedding z, a queue of such] (SEED)."""
    return softmax_over_keys(z, z, queue, temperature)[0]

# ------- 5. views: a function of the step, so that a resumed run sees what an undisturbed one sees

def load_batch(images, args, step):
    """Pixels, shapes and uniform numbers of this process's queries, the same of its share of the
    shuffled keys, and the shuffled order of the whole batch: seven tensors on the device."""
    rows, u, order = data.draw_step(len(images), args.batch, args.seed, step)
    rank, world = rank_world()
    mine = slice(rank * args.batch // world, (rank + 1) * args.batch // world)
    queries = *images.get(rows[mine]), to_device(u[:, mine], images.device)
    shuffled = order[mine]
    keys = *images.get(rows[shuffled]), to_device(u[:, shuffled], images.device)
    return *queries, *keys, to_device(order, images.device)

def make_views(batch, args):
    """-> query views, key views (lists of image batches), and the order of the latter."""
    queries, keys, order = batch[:3], batch[3:6], batch[6]
    numbers = [(0, 1), (1, 0)] if args.symmetric else [(0, 1)]  # both views change roles
    if args.teacher is not None:  # the teacher sees the very view that the student sees
        numbers = [(query, query) for query, _ in numbers]
    query_views = [make_view(queries, query, args) for query, _ in numbers]
    key_views = [make_view(keys, key, args, args.weak_keys) for _, key in numbers]
    return query_views, key_views, order

def make_view(batch, i, args, is_weak=False):
    """View 0 or 1 of a batch; a weak one is cropped and flipped alone."""
    pixels, shapes, u = batch
    colors = dict(jitter=0, hue=0, gray=0, blur=0) if is_weak else {}
    return data.augment(pixels, u[i], args.size, shapes=shapes, **augmentation(args) | colors)

def augmentation(args):
    return dict(crop=args.crop, jitter=args.jitter, hue=args.hue, gray=args.gray, blur=args.blur)

def save_views(images, args, path):
    """A grid: eight images (top) and two views of each, as the network sees them."""
    n = min(8, len(images))
    rows, u, _ = data.draw_step(len(images), n, args.seed, 0)
    pixels, shapes = images.get(rows)
    batch = pixels, shapes, to_device(u, images.device)
    original = data.center(pixels, args.size, shapes)
    key_views = make_view(batch, 1, args, args.weak_keys)
    views = torch.cat([original, make_view(batch, 0, args), key_views]).cpu()
    views = views * torch.tensor(data.STD)[:, None, None] + torch.tensor(data.MEAN)[:, None, None]
    views = F.interpolate(views, scale_factor=max(1, 96 // args.size))
    grid = torch.cat([torch.cat(list(row), dim=2) for row in views.split(n)], dim=1)
    grid = (255 * grid).round().clamp(0, 255).byte()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)

# ------------------------------------------------------------------------------------- 6. networks

def build_networks(args, device, is_new):
    """MoCo, and the backbone as it was drawn, on the device. A run that goes on (not `is_new`) has
    its weights from last.pt, and reads no other file."""
    backbone = models.build(args.arch, args.stem)
    untrained = to_evaluate(copy.deepcopy(backbone), device)  # for the report
    if args.zero_init:
        models.start_as_identity(backbone)
    if args.init is not None and is_new:
        backbone.load_state_dict(read_checkpoint(args.init, args.arch, args.stem)[0].state_dict())
    head = models.make_head(args.head, backbone.dim, args.dim, args.head_norm)
    encoder = Encoder(backbone, head)
    moco = MoCo(encoder, args.dim, args.queue, args.bn_splits // rank_world()[1])
    if args.teacher is not None:
        moco.encoder_k = build_teacher(args, is_new).eval().requires_grad_(False)
    moco.to(device, memory_format=data.layout(device))
    if device.type == "cpu":
        models.speed_up_small_maps(moco)
    return moco, untrained

def build_teacher(args, is_new):
    """SEED (Fang et al. 2021) is MoCo whose key encoder is a trained network that stays as it is,
    sees the query's own view, and says how much each key of the queue resembles it."""
    if is_new:
        backbone, known = read_checkpoint(args.teacher, args.teacher_arch)
        head, args.teacher_head = read_head(args.teacher)
        args.teacher_arch, args.teacher_stem = known["arch"], known["stem"]
    else:
        backbone = models.build(args.teacher_arch, args.teacher_stem)
        head = models.perceptron(*args.teacher_head)
    width = ([backbone.dim] + args.teacher_head[0])[-1]
    if width != args.dim:
        raise InputError(f"--teacher {args.teacher}: embeds in {width} dimensions; "
                         f"give --dim {width}")
    return Encoder(backbone, head)

def choose_dtype(precision, device, arch):
    """auto: on GPUs bfloat16, or float16 where they lack it (T4); on CPUs that have bfloat16 that
    for ResNets (depthwise convolutions are slower in it there); else float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_it else torch.float16
    has_it = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if has_it and arch.startswith("resnet") else torch.float32

# ----------------------------------------------------------- 7. the optimizer, a step on a GPU

class Muon(torch.optim.SGD):
    """SGD with momentum; with a rate `muon` > 0, dense convolutions that BatchNorm follows move by
    orthogonal matrices (Jordan et al. 2024), but not the first one.

    A gradient is mostly a few directions, those in which many images agree. Made orthogonal, it
    moves a layer equally far in all: the features that few images ask for are learned as soon.
    Weights that move so decay by a tenth of the rate, whatever `wd` is.
    """

    def __init__(self, net, muon, lr, wd, fused):
        convolutions = []
        for layer in net.modules():
            if muon > 0 and isinstance(layer, nn.Conv2d) and layer.bias is None:
                if layer.groups == 1 and layer.in_channels > 3:
                    convolutions.append(layer.weight)
        chosen = set(convolutions)
        others = [w for w in net.parameters() if w not in chosen]
        groups = [dict(params=others, peak_lr=lr)]
        if convolutions:
            groups.append(dict(params=convolutions, peak_lr=muon))
        super().__init__(groups, lr, 0.9, weight_decay=wd, fused=fused)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups[1:]:
            # a tensor, as where a step is recorded, and made without waiting for the device
            rate = group["lr"] * torch.ones((), device=group["params"][0].device)
            for w in group["params"]:
                if "momentum_buffer" not in self.state[w]:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
                momentum = self.state[w]["momentum_buffer"].mul_(0.95).add_(w.grad)
                g = w.grad.add(momentum, alpha=0.95).flatten(1)  # a row for each output channel
                move = orthogonal(g) * max(1, len(g) / g.shape[1]) ** 0.5
                w.mul_(1 - 0.1 * group["lr"]).addcmul_(move.view_as(w), rate, value=-1)
                w.grad = None  # done
        super().step()

def orthogonal(g):
    """U V^T of a matrix g = U S V^T, but for singular values of 0.7 to 1.2.

    Five of Jordan's Newton-Schulz steps  x <- p(a) x,  a = x x^T,  p(a) = 3.4445 - 4.775 a +
    2.0315 a^2.  All a and p(a) commute, so the steps are taken on the small square a alone.
    """
    if len(g) > g.shape[1]:
        return orthogonal(g.T).T
    x = g / g.norm().clamp(min=1e-12)
    a = x @ x.T
    product = one = torch.eye(len(a), dtype=a.dtype, device=a.device)
    for step in range(5):
        if step > 0:
            a = p @ a @ p  # x x^T of the x after the last step
        p = 3.4445 * one - 4.775 * a + 2.0315 * a @ a
        product = p @ product
    return product @ x

class Recorded:
    """A step on a GPU, recorded once as a CUDA graph, then replayed on other numbers in the same
    places. A step is thousands of small kernels: of ResNet-18 and 512 images an H200 runs them in
    20 ms, but Python takes 39 to 54 to launch them one by one."""

    def __init__(self, take_step, optimizer, device):
        self.take_step = take_step
        self.groups = optimizer.param_groups
        self.rates = [torch.zeros((), device=device) for _ in self.groups]
        self.batch = self.graph = None
        self.usual = 3  # steps first, in which libraries choose their kernels

    def __call__(self, batch):
        if self.batch is None:
            self.batch = [x.clone() for x in batch]
        for place, x in zip(self.batch, batch):
            place.copy_(x)
        for group, rate in zip(self.groups, self.rates):
            group["lr"] = rate.fill_(group["lr"])
        if self.usual > 0:
            self.usual -= 1
            side = torch.cuda.Stream()  # as PyTorch's notes on CUDA graphs ask for
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = self.take_step(self.batch)
            torch.cuda.current_stream().wait_stream(side)
            return result
        if self.graph is None:
            gc.collect()  # CUDA refuses to free another graph while one is recorded
            self.graph = torch.cuda.CUDAGraph()
            # other threads go on: one may be loading the next batch
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = self.take_step(self.batch)  # runs nothing yet
        self.graph.replay()
        return self.result

# --------------------------------------------------------------------------- 8. monitor and report

def monitor(moco, train, test, args):
    """What `judge` says of the backbone while it trains: {measure: %}."""
    share_buffers(moco.encoder_q)
    moco.encoder_q.eval()
    measures = judge(moco.encoder_q.backbone, train, test, args.size, **augmentation(args))
    moco.encoder_q.train()
    return measures

def report(out, learned, untrained, train, test, args):
    """What the features are worth, beside those of random weights and beside raw pixels."""
    networks = {"learned": learned.eval(), "random weights": untrained, "raw pixels": Pixels()}
    print0("")
    for name, network in networks.items():
        measures = judge(network, train, test, args.size, with_probe=True, **augmentation(args))
        if name == "learned":
            names = [key.replace("knn", "kNN") + " %" for key in measures]
            print0("features        " + "".join(f"{key:>12}" for key in names))
        print0(f"{name:<16}" + "".join(f"{value:>12.2f}" for value in measures.values()))
    if test is None:
        print0("(found: so many images are found first by another view of themselves)")
    else:
        print0(f"({len(test):,} held-out images, {len(train.classes)} classes)\n\n"
               f"python linear_eval.py {out}       # more numbers")
    print0(f"python analyze.py {out} random    # a map of the images, and the feature space\n"
           f"{out}/backbone.pt is the network, with torchvision's names; views.png, what it saw")

# --------------------------------------------------------------------------- 9. the run's folder

def in_words(entry):
    """An entry of the log as a line."""
    words = []
    for key, value in entry.items():
        shown = value if isinstance(value, int) else f"{value:.4g}"
        words.append(f"{key.replace('_', ' ')} {shown}")
    return "  ".join(words)

def next_free_folder(args):
    """runs/DATA-ARCH-1, or the first number that is not taken."""
    i = 1
    while (path := Path("runs") / f"{Path(args.data).resolve().name}-{args.arch}-{i}").exists():
        i += 1
    return path

def restore(last, moco, optimizer, scaler, device):
    """-> steps done, log, sums of the epoch so far."""
    fused = optimizer.param_groups[0]["fused"]
    try:
        moco.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        scaler.load_state_dict(last["scaler"])
        step, log, sums = last["step"], last["log"], last["sums"].to(device)
    except (RuntimeError, LookupError, TypeError, ValueError):
        raise InputError("last.pt: not of the run that args.json beside it describes") from None
    for group in optimizer.param_groups:
        group["fused"] = fused  # the device may be another one
    return step, log, sums

def refuse_differences(facts):
    """End all processes with one line unless they hold the same facts, {what: value}."""
    if not dist.is_initialized():
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    for what in facts:
        for rank, other in enumerate(everyone):
            if other[what] != everyone[0][what]:
                raise InputError(
                    f"{what}: process 0 has {everyone[0][what]}, process {rank} has {other[what]}; "
                    "give all nodes the same flags, images and folder of the run")

def start_run(out, train, args):
    """args.json: the flags; views.png: what the network sees."""
    if rank_world()[0] > 0:
        return
    out.mkdir(parents=True, exist_ok=True)
    if not (args.resume and (out / "args.json").exists()):
        try:
            with open(out / "args.json", "x") as file:  # of two runs that begin at once, one can
                file.write(json.dumps(vars(args), indent=1))
        except FileExistsError:
            raise holds_a_run(out) from None
    save_views(train, args, out / "views.png")

def holds_a_run(out):
    return InputError(f"--out {out}: holds a run already; go on with it (--resume), or name "
                      "another folder")

def save_run(out, moco, optimizer, scaler, step, log, sums):
    """backbone.pt: the network; log.jsonl: an object an epoch; last.pt: all that --resume needs.

    last.pt comes last: killed before it is renamed, a run goes on from the one before.
    """
    backbone = {k: v.cpu().contiguous() for k, v in moco.encoder_q.backbone.state_dict().items()}
    save(out / "backbone.pt", backbone)
    save(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    save(out / "last.pt", dict(
        model=moco.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
        step=step, log=log, sums=sums))

def stop_if_diverged(loss, step, out, args):
    """End a run whose loss is no number, before it overwrites its last good checkpoint."""
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is {loss} at step {step + 1}, or soon before: the weights have grown "
            f"without bound; lower --lr (now {args.lr:g}), raise --temp or add --warmup; "
            f"{out}/last.pt is from before, if there is one")

# ------------------------------------------------------------------------- 10. schedules and flags

def schedule(args, step, epoch_steps):
    """Of the learning rates: a linear warm-up times half a cosine, from one down to zero."""
    warmup = 1.0
    if args.warmup > 0:
        warmup = min(1, (step + 1) / (args.warmup * epoch_steps))
    return warmup * 0.5 * (1 + math.cos(math.pi * step / args.total_steps))

# MoCo v2 (Chen et al. 2020); `quick` is a MoCo, too, for minutes to hours: keys of weak views cost
# nothing and say more, the others make the start fast. What it leaves open, fill_auto picks.
MOCO_V2 = dict(temp=0.2, muon=0.0, wd=1e-4, head_norm=False, weak_keys=False, in_batch=False,
               zero_init=False, stem="imagenet", warmup=0.0, crop=[0.2, 1.0])
RECIPES = {
    "quick": dict(temp=0.1, muon=0.02, wd=5e-4, head_norm=True, zero_init=True),
    "moco-v2": MOCO_V2,
    "small": MOCO_V2 | dict(temp=0.1, head="wide", jitter=0.8, hue=0.4, gray=0.5),  # Shi 2022
}

def parse(argv):
    """Flags. In brackets: the default, or the rule in fill_auto that picks it; where there are two,
    that of the recipe `quick` and MoCo v2's."""
    parser = Parser(__doc__)
    switch = argparse.BooleanOptionalAction
    temperature = partial(number, 0.03, 99, float)  # see softmax_over_keys

    add = parser.add_argument_group("data").add_argument
    add("--data", default="letters", help="letters, cifar10, cifar100, stl10, or a folder")
    add("--root", default="data", help="folder of downloaded and decoded data sets [data]")
    add("--size", type=side, help="of a view [the images' own, at most 224, on a CPU 64]")
    add("--keep", type=side, help="of a stored image [its own, from --size to 1.5 --size]")

    add = parser.add_argument_group("network").add_argument
    add("--arch", default="mobilenetv3", choices=list(models.ARCHS), help="[mobilenetv3]")
    add("--stem", choices=models.STEMS, help="[small from 5,000 steps on, up to 64 pixels; "
        "MoCo: imagenet]")
    add("--head", default="simple", help="linear, simple, wide (Shi 2022), deep, a width [simple]")
    add("--head-norm", action=switch, help="BatchNorm in the head (SimCLR) [on; MoCo: off]")
    add("--dim", type=count, default=128, help="width C of the embedding [128]")
    add("--init", help="start from the backbone of this checkpoint [random weights]")
    add("--zero-init", action=switch, help="blocks start as the identity (Goyal 2017) [on; MoCo: "
        "off]")

    add = parser.add_argument_group("contrast").add_argument
    add("--temp", type=temperature, help="temperature T [0.1, as Shi 2022; MoCo: 0.2]")
    add("--momentum", type=share, help="m of the key encoder [1 - 200 / steps, 0.8 to 0.999]")
    add("--queue", type=count, help="keys K [a tenth of the images, none staler than MoCo's]")
    add("--in-batch", action=switch, help="negatives from the step (SimCLR) [on; MoCo: off]")
    add("--weak-keys", action=switch, help="keys of crops without colors (Wang 2022) [on; MoCo: "
        "off]")
    add("--bn-splits", type=count, help="parts of the keys for BatchNorm [8, of 64 images or more]")
    add("--symmetric", action="store_true", help="both views are query and key (MoCo v3)")
    add("--teacher", help="distill this checkpoint (SEED, Fang 2021); --init then starts a MoCo "
        "from the result")
    add("--teacher-arch", choices=list(models.ARCHS), help="[as its args.json says]")
    add("--teacher-temp", type=partial(number, 0.003, 99, float), default=0.01, help="[0.01]")

    add = parser.add_argument_group("augmentation").add_argument
    add("--crop", type=share, nargs=2, metavar=("LO", "HI"), help="range of its area [0.2 1, in "
        "runs under 2,000 steps up to 0.35 1, from 10,000 on 0.08 1; MoCo: 0.2 1]")
    add("--jitter", type=factor, default=0.4, help="of brightness, contrast, saturation [0.4]")
    add("--hue", type=factor, default=0.1, help="jitter in turns [0.1]")
    add("--gray", type=share, default=0.2, help="probability of grayscale [0.2]")
    add("--blur", type=share, default=0.5, help="probability of Gaussian blur [0.5]")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=count, help="passes over the images [75,000 of 32 pixels, 10 or more]")
    add("--steps", type=count, help="length of the run in steps, instead of --epochs")
    add("--batch", type=count, help="images a step, over all processes [1/80 of all, 64 to 256]")
    add("--lr", type=factor, help="of SGD [0.8 T for 256 images; MoCo: 0.03]")
    add("--muon", type=share, help="rate of convolutions with Muon (Jordan 2024) [0.02; MoCo: 0, "
        "which is SGD]")
    add("--wd", type=share, help="weight decay [5e-4; MoCo: 1e-4]")
    add("--warmup", type=factor, help="in epochs, linear [2, or a seventh of all; MoCo: 0]")

    add = parser.add_argument_group("run").add_argument
    add("--recipe", default="quick", choices=list(RECIPES), help="values of flags above [quick]")
    add("--out", help="folder of the run [runs/DATA-ARCH-N]")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--save-every", type=factor, default=1, help="minutes between checkpoints [1]")
    add("--knn-every", type=count, help="epochs between looks at held-out images [1/5 of the run]")
    add("--seed", type=int, default=0, help="of weights, order and views [0]")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu [the first there is]")
    add("--precision", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the networks [on GPUs bfloat16, or float16; for ResNets bfloat16 on CPUs that "
        "have it; else float32]")

    parser.set_defaults(**RECIPES[parser.parse_args(argv).recipe])  # what is typed overrides them
    args = parser.parse_args(argv)
    untyped = argparse.Namespace(**dict.fromkeys(vars(args)))
    return flags_of_the_run(args, vars(parser.parse_args(argv, untyped)))

def flags_of_the_run(args, typed):
    """A run that goes on keeps its flags; only where and how it runs may be typed anew."""
    if args.out is None:
        if args.resume:
            raise InputError("--resume: name the run's folder with --out")
        return args
    file = Path(args.out) / "args.json"
    if not file.is_file():
        if (Path(args.out) / "last.pt").exists():
            raise InputError(f"--out {args.out}: holds last.pt, but not the run's args.json")
        return args
    if not args.resume:
        raise holds_a_run(args.out)
    saved = read_json(file)
    if not vars(args).keys() <= saved.keys():
        raise InputError(f"{file}: of another version, without "
                         f"{min(vars(args).keys() - saved.keys())}; begin another run")
    for name, value in typed.items():
        if value is None or name in ("out", "resume"):
            continue
        if name in ("device", "save_every", "knn_every"):
            saved[name] = value
        elif value != saved[name]:
            raise InputError(f"--{name.replace('_', '-')} {value}: the run in {args.out} has "
                             f"{saved[name]}; leave the flag out, or begin another run")
    return argparse.Namespace(**(saved | dict(out=args.out, resume=True)))

def fill_auto(args, n, world):
    """Flags left open, from the number n of images. Each rule may use the flags above it."""
    open_flags = [name for name, value in vars(args).items() if value is None]
    if args.batch is None:
        args.batch = power_of_two(min(256, max(64, n // 80), n // 4))
        args.batch = math.ceil(max(4, args.batch) / world) * world
    if args.epochs is None and args.steps is None:
        args.epochs = max(10, min(200, 2_400_000 // args.size // n))
    epoch_steps = max(1, n // args.batch)
    args.total_steps = args.steps or args.epochs * epoch_steps
    if args.stem is None:  # larger maps take several times as long, and pay in long runs
        args.stem = "imagenet" if args.total_steps < 5_000 or args.size > 64 else "small"
    for name in ("in_batch", "weak_keys"):
        if name in open_flags:  # SEED has the queue alone, and the same view for both
            setattr(args, name, args.teacher is None)
    if args.lr is None:  # a loss with 1 / T in it has gradients with 1 / T in them
        peak = 0.8 * args.temp if args.recipe == "quick" else 0.03
        args.lr = round(peak * args.batch / 256, 5)
    if args.warmup is None:  # a network that outruns its keys has no time to recover
        args.warmup = round(min(2, args.total_steps / epoch_steps / 7), 2)
    if args.crop is None:  # two small crops have little in common, which takes long to learn; in
        # long runs two larger ones are told from all others by their layout, and teach no more
        is_long = args.total_steps >= 10_000
        lowest = 0.08 if is_long else min(0.35, max(0.2, 400 / args.total_steps))
        args.crop = [round(lowest, 3), 1.0]
    if args.momentum is None:  # in a short run a slow key encoder would never catch up. This gives
        # 0.99 at the length of MoCo's CIFAR-10 notebook, and 0.999 at that of its ImageNet runs
        args.momentum = round(min(0.999, max(0.8, 1 - 200 / args.total_steps)), 4)
    if args.queue is None:
        # MoCo's queue spans 256 steps, in which f_k moves by 256 (1 - m) = 0.256; staler keys are
        # told from new ones. With an eighth of the images or less, fewer than 1 % of the queries
        # meet a key of their own image, from the end of the epoch before
        keys = 2 * args.batch if args.symmetric else args.batch
        spanned = round(0.256 / max(1e-6, 1 - args.momentum), 3)
        longest = power_of_two(min(65536, n // 10, spanned * args.batch))
        args.queue = max(keys, min(max(2 * keys, longest), n // 8))
    if args.bn_splits is None:  # MoCo's 8, but parts of at least 64 images, and at least 2 parts
        most = max(2, world, min(8, args.batch // 64))
        fitting = [i for i in range(world, most + 1, world) if args.batch % i == 0]
        args.bn_splits = max(fitting, default=world)
    if args.knn_every is None:
        args.knn_every = max(1, args.total_steps // epoch_steps // 5)
    values = {name: getattr(args, name) for name in open_flags}
    picked = ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
    print0(f"--recipe {args.recipe}, for {n:,} images: {picked}")

def power_of_two(n):
    """The largest one up to n."""
    return 2 ** int(math.log2(max(1, n)))

def check(args, images, world):
    """Refuse what cannot work, in one line that says how to fix it."""
    n = len(images)
    keys = 2 * args.batch if args.symmetric else args.batch
    splits = args.bn_splits
    if getattr(args, "images", images.fingerprint) != images.fingerprint:
        raise InputError(f"--data {args.data}: the run in {args.out} began with other images; put "
                         "them back, or begin another run (--init takes its weights)")
    if n < 5:
        raise InputError(f"--data {args.data}: too few images to learn from ({n}); add some")
    if args.batch > n:
        raise InputError(f"--batch {args.batch}: there are only {n} images; lower it")
    if args.batch % world != 0:
        raise InputError(f"--batch {args.batch}: must be a multiple of the {world} processes")
    if not keys <= args.queue <= n:
        raise InputError(f"--queue {args.queue}: must be at least the {keys} keys of a step, and "
                         f"at most the {n} images")
    if splits < 1 or args.batch % splits != 0 or splits % world != 0 or args.batch < 2 * splits:
        raise InputError(f"--bn-splits {splits}: must divide --batch {args.batch} into parts of 2 "
                         f"or more, the same number on each of {world} processes")
    if args.head not in models.HEADS and not (args.head.isdigit() and int(args.head) > 0):
        raise InputError(f"--head {args.head}: choose from {', '.join(models.HEADS)}, or a width")
    if args.teacher is not None and (args.in_batch or args.weak_keys):
        raise InputError("--teacher: takes neither --in-batch nor --weak-keys")
    if args.crop[0] > args.crop[1]:
        raise InputError(f"--crop {args.crop[0]:g} {args.crop[1]:g}: LO must be at most HI")

if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:  # OSError: a folder or disk that cannot be written
        sys.exit(f"pretrain.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\npretrain.py: stopped; go on with --out FOLDER --resume")
