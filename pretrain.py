"""MoCo v2 pretraining of a small network on unlabeled images.

    torchrun pretrain.py --arch mobilenetv3 --temp 0.1     # some minutes on a laptop, no download
    torchrun pretrain.py --data FOLDER --temp 0.1          # your own images, with or without labels
    torchrun --nproc-per-node 8 pretrain.py --data FOLDER  # eight GPUs; --batch is their total
    python pretrain.py --out runs/mine --resume            # go on with a run, or start it

The method: He et al. 2020 (MoCo), Chen et al. 2020 (MoCo v2), for small networks Shi et al. 2022.
Read it from top to bottom: the method, one step, the training loop. Then, as needed: the details
of the loss, views, networks, monitor and report, files, flags.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import linear_eval
import models
from data import InputError, cosine, mean_over_processes, print0, rank_world

# ----------------------------------------------------------------------------------- 1. the method

class Encoder(nn.Module):
    """Backbone and projection head: a list of image batches -> their unit embeddings, concatenated.

    Each batch of the list has BatchNorm statistics of its own.
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
    """BatchNorm of each of `splits` parts of the batch by itself (MoCo's CIFAR notebook)."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return torch.cat([nn.BatchNorm2d.forward(self, part) for part in x.chunk(self.splits)])

class MoCo(nn.Module):
    """A query encoder that learns, a key encoder that follows it, and a queue of past keys."""

    def __init__(self, encoder, dim, queue_size, splits):
        super().__init__()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        for layer in self.encoder_k.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.__class__ = SplitBatchNorm  # the same weights under the same names
                layer.splits = splits
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))

    @torch.no_grad()
    def update_key_encoder(self, m):
        """f_k <- m f_k + (1 - m) f_q (eq. 2): weights only; BatchNorm's statistics are its own."""
        keys = list(self.encoder_k.parameters())
        torch._foreach_lerp_(keys, list(self.encoder_q.parameters()), 1 - m)  # all at once

    @torch.no_grad()
    def encode_keys(self, views, order):
        """Keys (B, C) of the whole batch from this process's share of views in shuffled `order`.

        Shuffling BN (section 3.3): keys meet BatchNorm in other company than their queries, in
        parts. Else a query could find its key by the batch statistics that both share.
        """
        shuffled = data.gather(self.encoder_k([views]))
        keys = torch.empty_like(shuffled)
        keys[order] = shuffled
        return keys

    @torch.no_grad()
    def enqueue(self, keys, step):
        """The keys (B, C) of a step overwrite the oldest ones: the queue is a ring."""
        rows = torch.arange(step * len(keys), (step + 1) * len(keys), device=keys.device)
        self.queue[rows % len(self.queue)] = keys

def info_nce_plain(q, k, queue, temperature, target=None, fresh=None):
    """InfoNCE as a formula: cross-entropy of a softmax over [own key, all keys of the queue].

    q, k, target (N, C), queue (K, C), rows of length one -> loss (N,), and whether a query's own
    key is nearer than all others (N,). `target` is the mean key under the wanted distribution: k
    in MoCo (Oord et al. 2018), softer in section 4. `fresh` are more negatives, for in-batch ones:
    keys (M, C), and where a query and a key are of one image (N, M).
    """
    target = k if target is None else target
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
    if fresh is not None:
        keys, is_own = fresh
        others = (q @ keys.T / temperature).masked_fill(is_own, -math.inf)
        logits = torch.cat([logits, others], dim=1)
    loss = logits.logsumexp(1) - (q * target).sum(1) / temperature
    return loss, logits[:, 0] > logits[:, 1:].amax(1)

def info_nce(q, k, queue, temperature, target=None, fresh=None):
    """The same without the N x (1 + K) logits in memory, in one pass. Only q gets a gradient.

    The gradient of a log-sum-exp is a mean under the softmax, which is what attention computes. So
    the forward pass already holds  d loss / d q = (mean key under the softmax - target) / T.
    """
    with torch.no_grad():
        target = k if target is None else target
        mean, loss, hit = softmax_over_keys(q, k, queue, temperature, fresh)
        loss += (q * (k - target)).sum(1) / temperature  # it was relative to the logit of k
        gradient = (mean - target) / temperature
    zero = ((q - q.detach()) * gradient).sum(1)  # but it has that gradient
    return loss + zero, hit

# ------------------------------------------------------------------------------------- 2. one step

def train_step(moco, encoder_q, teacher, optimizer, scaler, autocast, views, step, args):
    """Queries, keys, loss, update. `encoder_q` is moco.encoder_q, under torchrun wrapped in DDP.

    -> (2,): mean loss, and instance accuracy: the share of queries whose own key is the nearest.
    """
    query_views, key_views, order = views
    rank, world = rank_world()
    n = args.batch // world  # images of this process
    is_distilling = teacher is not None and step < args.teacher_steps

    with autocast:
        q = encoder_q(query_views)
        if is_distilling:  # the teacher sees the very views that the student sees
            own_keys = [teacher([view]) for view in query_views[:len(key_views)]]
            new_keys = [data.gather(keys) for keys in own_keys]
        else:
            m = cosine(args.momentum, args.momentum_end, step / args.total_steps)
            moco.update_key_encoder(m)
            new_keys = [moco.encode_keys(view, order) for view in key_views]
            own_keys = [keys[rank * n:(rank + 1) * n] for keys in new_keys]
    new_keys = torch.cat(new_keys)
    k = torch.cat(own_keys + [own_keys[0]] * args.local_crops)  # each local view has the first key

    target = None
    if is_distilling:
        target = teacher_target(k, moco.queue, args.teacher_temp)
    elif args.smooth > 0:
        target = smooth_target(q.detach(), k, moco.queue, args.smooth, args.smooth_k)
    fresh = None
    if args.in_batch and not is_distilling:
        fresh = other_keys(new_keys, len(q), n, rank, world)
    loss, hit = info_nce(q, k, moco.queue, args.temp, target, fresh)

    scaler.scale(loss.mean()).backward()  # scales for float16 alone
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    moco.enqueue(new_keys, step)
    full_size = n * len(key_views)  # queries that are no local views
    return mean_over_processes(torch.stack([loss.detach().mean(), hit[:full_size].float().mean()]))

# ---------------------------------------------------------------------------- 3. the training loop

def main(argv=None):
    args = parse(argv)
    device = data.start(args.device)  # under torchrun also the process group
    rank, world = rank_world()

    # images, and the flags that follow from their number
    most = 64 if device.type == "cpu" else 224  # pixels, where --size is left open
    train, test, args.size = data.load(args.data, args.root, args.size, args.keep, device, most)
    fill_auto(args, len(train), world, device.type == "cpu")
    check(args, len(train), world)
    epoch_steps = len(train) // args.batch
    steps = args.total_steps

    # networks: from the same seed, every process draws the same weights
    torch.manual_seed(args.seed)
    moco, teacher, untrained = build_networks(args, device)
    encoder_q = DistributedDataParallel(moco.encoder_q) if world > 1 else moco.encoder_q
    dtype = choose_dtype(args.precision, device, args.arch)
    # not fused in float16: torch's momentum is garbage after a first step that overflows
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), args.lr, 0.9, weight_decay=args.wd,
                                fused=device.type != "mps" and dtype != torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # where the run is: steps done, an entry per epoch, sums of this epoch's losses and accuracies
    out, first, log, sums = start_or_resume(args, moco, optimizer, scaler, train)
    print0(f"{args.arch} on {world} x {device.type}: {len(train):,} images at {args.size} pixels, "
           f"steps {first:,} to {steps:,} of {args.batch} images, in {out}")
    print0(f"The loss rises for the first {math.ceil(args.queue / args.batch)} steps, while real "
           "keys take the place of the random ones in the queue; then it should fall.")

    moco.train()
    data.allow_tf32(True)
    progress = data.Progress(steps, first)
    epoch_began = saved = time.time()
    epoch_first = first
    batches = data.ahead(partial(fetch_batch, train, args), range(first, steps), train.is_far)
    for step, batch in enumerate(batches, first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, epoch_steps)
        if teacher is not None and step == args.teacher_steps:
            end_distillation(moco, args.seed)
        torch.manual_seed(data.seeded(args.seed, "dropout", step).initial_seed())  # for dropout
        views = make_views(train, batch, args)
        sums += train_step(moco, encoder_q, teacher, optimizer, scaler, autocast, views, step, args)

        # the rest reads the loss, which waits for the device: only where there is something to do
        done = step % epoch_steps + 1  # steps of this epoch
        epoch_ends = done == epoch_steps or step + 1 == steps
        save_is_due = rank == 0 and time.time() - saved > 60 * args.save_every
        if not (epoch_ends or save_is_due or progress.due()):
            continue
        loss, accuracy = (sums / done).tolist()
        refuse_infinite(loss, step, out, args)
        speed = (step + 1 - epoch_first) * args.batch / (time.time() - epoch_began)
        epoch = step // epoch_steps + 1
        line = (f"epoch {epoch}/{math.ceil(steps / epoch_steps)}  loss {loss:.3f}  "
                f"instance accuracy {100 * accuracy:.1f} %  {speed:.0f} images/s")
        if epoch_ends:
            entry = dict(epoch=epoch, step=step + 1, loss=loss, instance_accuracy=100 * accuracy,
                         lr=optimizer.param_groups[0]["lr"], images_per_s=speed)
            if epoch % args.knn_every == 0 or step + 1 == steps:
                measures = monitor(moco, train, test, args)
                line += "".join(f"  {name} {value:.2f}" for name, value in measures.items())
                entry |= measures
            log.append(entry)
            sums.zero_()
        if rank == 0:
            progress.show(step + 1, line, end=epoch_ends)
            if epoch_ends or save_is_due:
                save(out, moco, optimizer, scaler, step + 1, log, sums, args)
                saved = time.time()
        if epoch_ends:
            epoch_began = time.time()
            epoch_first = step + 1

    report(out, moco.encoder_q.backbone, untrained, train, test, args)
    if world > 1:
        dist.destroy_process_group()
    return moco

# ------------------------------------ 4. details of the loss: the sum over the queue, soft targets

def softmax_over_keys(q, k, queue, temperature, fresh=None):
    """The softmax of q over [k, queue, fresh keys]: q, k (N, C), queue (K, C), `fresh` as above.

    -> the mean key under it (N, C); log-sum-exp of the logits minus the own one (N,); is the own
    key nearer than all others (N,). Relative to the own logit all is a sum over the queue, and exp
    needs no running maximum: rows have length one, so that is at most 2 / T, 80 at T 1/40.
    """
    own = (q * k).sum(1) / temperature
    total, weighted, top = sums_over_queue(q, queue, 1 / temperature, own)
    if fresh is not None:
        keys, is_own = fresh
        logits = torch.addmm(-own[:, None], q, keys.T, alpha=1 / temperature)
        add_to_sums(total, weighted, top, logits.masked_fill_(is_own, -math.inf), keys)
    mean = (weighted + k) / (1 + total)[:, None]  # the own key's weight is exp(0)
    return mean, total.log1p(), top < 0

def sums_over_queue(q, queue, scale, own):
    """With w_ij = exp(scale q_i.u_j - own_i) over the keys u_j of the queue (K, C):

    sum_j w_ij (N,); sum_j w_ij u_j (N, C); the largest logit minus the own one (N,).
    """
    if triton is not None and q.is_cuda and q.shape[1] <= 1024:  # wider, it takes much memory
        return fused_sums(q, queue, scale, own)
    total = torch.zeros_like(own)
    weighted = torch.zeros_like(q)
    top = torch.full_like(own, -math.inf)
    for keys in queue.split(max(128, 2 ** 18 // len(q))):  # blocks of logits that stay in the cache
        logits = torch.addmm(-own[:, None], q, keys.T, alpha=scale)
        add_to_sums(total, weighted, top, logits, keys)
    return total, weighted, top

def add_to_sums(total, weighted, top, logits, keys):
    """Take keys (M, C) and their logits (N, M) minus the own one into the sums, all in place."""
    torch.maximum(top, logits.amax(1), out=top)
    weights = logits.exp_()
    total += weights.sum(1)
    weighted.addmm_(weights, keys)

triton = None
if "TRITON_INTERPRET" in os.environ or (
        torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)):
    try:
        import triton
        import triton.language as tl
        if "TRITON_INTERPRET" not in os.environ:
            triton.runtime.driver.active.get_current_target()  # is all there that it needs?
    except Exception as error:
        print0(f"No Triton ({str(error).splitlines()[0]}): InfoNCE in blocks, which is slower")
        triton = None

if triton is not None:
    @triton.jit
    def queue_kernel(q_ptr, queue_ptr, own_ptr, total_ptr, weighted_ptr, top_ptr, N, K, C, scale,
                     WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
                     PART: tl.constexpr):
        # one program: ROWS queries, and a PART of the queue in blocks of KEYS
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        part = tl.program_id(1)
        columns = tl.arange(0, WIDTH)  # C of them exist
        at = rows[:, None] * C + columns
        exists = (rows[:, None] < N) & (columns < C)
        q = tl.load(q_ptr + at, mask=exists, other=0.0)
        own = tl.load(own_ptr + rows, mask=rows < N, other=0.0)
        total = tl.zeros([ROWS], tl.float32)
        weighted = tl.zeros([ROWS, WIDTH], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        for start in range(0, PART, KEYS):
            number = part * PART + start + tl.arange(0, KEYS)
            keys = tl.load(queue_ptr + number[:, None] * C + columns,
                           mask=(number[:, None] < K) & (columns < C), other=0.0)
            logits = tl.dot(q, tl.trans(keys)) * scale - own[:, None]
            logits = tl.where(number[None, :] < K, logits, float("-inf"))
            # float16 holds weights up to 65504: those of the sums so far are relative to the top
            new_top = tl.maximum(top, tl.max(logits, 1))
            shrink = tl.exp(top - new_top)
            weights = tl.exp(logits - new_top[:, None])
            total = total * shrink + tl.sum(weights, 1)
            weighted = weighted * shrink[:, None] + tl.dot(weights.to(keys.dtype), keys)
            top = new_top
        total *= tl.exp(top)
        weighted *= tl.exp(top)[:, None]
        # each part has a place of its own: no order of additions is left to chance
        tl.store(total_ptr + part * N + rows, total, mask=rows < N)
        tl.store(top_ptr + part * N + rows, top, mask=rows < N)
        tl.store(weighted_ptr + part * N * C + at, weighted, mask=exists)

def fused_sums(q, queue, scale, own, part=1024):
    """sums_over_queue as one Triton kernel: float16 operands, float32 sums."""
    n, c = q.shape
    parts = triton.cdiv(len(queue), part)
    total = own.new_empty(parts, n)
    top = own.new_empty(parts, n)
    weighted = own.new_empty(parts, n, c)
    width = max(16, triton.next_power_of_2(c))
    rows = max(16, min(64, 8192 // width))
    queue_kernel[(triton.cdiv(n, rows), parts)](
        q.half().contiguous(), queue.half(), own, total, weighted, top, n, len(queue), c, scale,
        WIDTH=width, ROWS=rows, KEYS=rows, PART=part)
    return total.sum(0), weighted.sum(0), top.amax(0)

def other_keys(keys, queries, n, rank, world):
    """In-batch negatives: the keys of this step, and which are of a query's own image (N, M).

    All keys of the queue are older than a query's own key. Where the encoder moves fast, at the
    start and in short runs, age tells them apart, and the network learns that first. Keys of other
    images as fresh as the own one (SimCLR, MoCo v3) leave nothing to learn from age.
    """
    image_of_key = torch.arange(len(keys), device=keys.device) % (n * world)
    image_of_query = rank * n + torch.arange(queries, device=keys.device) % n
    return keys, image_of_query[:, None] == image_of_key

def smooth_target(q, k, queue, share, n):
    """1 - share on the own key, the rest evenly on the n nearest keys of the queue (Lin 2022)."""
    nearest = (q @ queue.T).topk(n, dim=1).indices
    return (1 - share) * k + share * queue[nearest].mean(1)

def teacher_target(z, queue, temperature):
    """The mean key under the teacher's softmax over [its embedding z, a queue of such] (SEED)."""
    return softmax_over_keys(z, z, queue, temperature)[0]

@torch.no_grad()
def end_distillation(moco, seed):
    """The key encoder becomes the query encoder; the queue, full of the teacher's keys, random."""
    moco.encoder_k.load_state_dict(moco.encoder_q.state_dict())
    noise = torch.randn(moco.queue.shape, generator=data.seeded(seed, "queue"))
    moco.queue.copy_(F.normalize(noise, dim=1))

# ------- 5. views: a function of the step, so that a resumed run sees what an undisturbed one sees

def fetch_batch(images, args, step):
    """What a step needs, still on the CPU: images and uniform numbers of this process's queries,
    then of its share of the shuffled keys; the shuffled order of the batch."""
    rows, u, order = data.schedule(len(images), args.batch, args.seed, step, args.hide,
                                   args.local_crops)
    rank, world = rank_world()
    mine = slice(rank * args.batch // world, (rank + 1) * args.batch // world)
    queries = images.fetch(rows[mine]), u[:, mine]
    keys = images.fetch(rows[order[mine]]), u[:, order[mine]]
    return queries, keys, order

def make_views(images, batch, args):
    """-> query views, key views (lists of batches), and the order of the latter, on the device."""
    queries, keys, order = batch
    queries = put(images, *queries)
    keys = put(images, *keys)
    query_views = [view_of(queries, 0, args)]
    key_views = [view_of(keys, 1, args)]
    if args.symmetric:  # the two views change roles
        query_views.append(view_of(queries, 1, args))
        key_views.append(view_of(keys, 0, args))
    if args.local_crops > 0:
        small = [view_of(queries, 2 + i, args, is_local=True) for i in range(args.local_crops)]
        query_views.append(torch.cat(small))
    return query_views, key_views, data.to_device(order, images.device)

def put(images, fetched, u):
    """Pixels, shapes and uniform numbers on the device."""
    return *images.put(*fetched), data.to_device(u, images.device)

def view_of(images, number, args, is_local=False):
    """View `number` of images = (pixels, shapes, uniform numbers)."""
    pixels, shapes, u = images
    size = args.local_size if is_local else args.size
    crop = args.local_scale if is_local else args.crop
    return data.augment(pixels, u[number], size, crop, args.jitter, args.hue, args.gray, args.blur,
                        shapes)

def save_views(images, args, path):
    """A grid: eight images (top) and two views of each, as the network sees them."""
    n = min(8, len(images))
    rows, u, _ = data.schedule(len(images), n, args.seed, 0)
    batch = put(images, images.fetch(rows), u)
    original = data.center(batch[0], args.size, batch[1])
    grid = torch.stack([original, view_of(batch, 0, args), view_of(batch, 1, args)]).cpu()
    grid = grid.permute(0, 3, 1, 4, 2)  # (3, size, n, size, colors)
    grid = grid * torch.tensor(data.STD) + torch.tensor(data.MEAN)
    grid = grid.mul(255).round().clamp(0, 255).byte().reshape(3 * args.size, n * args.size, 3)
    enlarge = max(1, 96 // args.size)
    picture = Image.fromarray(grid.numpy())
    picture.resize((picture.width * enlarge, picture.height * enlarge), Image.NEAREST).save(path)

# ------------------------------------------------------------------------------------- 6. networks

def build_networks(args, device):
    """MoCo, the teacher or None, and the backbone as it was drawn, all on the device."""
    backbone = models.build(args.arch, args.stem, args.size)
    untrained = copy.deepcopy(backbone).eval().to(device, memory_format=torch.channels_last)
    if args.zero_init:
        models.start_as_identity(backbone)
    if args.init is not None:
        weights, info = models.read_backbone(args.init, args.arch)
        try:
            backbone.load_state_dict(weights)
        except RuntimeError:
            raise InputError(f"--init {args.init}: has the {info['stem']} stem; give it as --stem")
        print0(f"--init {args.init}: {info['arch']}, dropped {len(info['dropped'])} other tensors")
    head = models.make_head(args.head, backbone.dim, args.dim)
    encoder = Encoder(backbone, head)
    moco = MoCo(encoder, args.dim, args.queue, args.bn_splits // rank_world()[1])
    moco.to(device, memory_format=torch.channels_last)
    if device.type == "cpu":
        models.speed_up_small_maps(moco)
    if args.teacher is None:
        return moco, None, untrained
    teacher = Encoder(*models.read_teacher(args.teacher, args.teacher_arch))
    teacher.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    width = teacher([torch.zeros(1, 3, args.size, args.size, device=device)]).shape[1]
    if width != args.dim:
        raise InputError(f"--teacher {args.teacher}: embeds in {width} dimensions; "
                         f"give --dim {width}")
    return moco, teacher, untrained

def choose_dtype(precision, device, arch):
    """auto: bfloat16 on GPUs that have it (not T4s: they are fast in float16), and for ResNets on
    CPUs that have it (depthwise convolutions are slower in it there); else float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type == "cpu" and arch.startswith("resnet"):
        features = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 has no such function
        if features.get("avx512_bf16"):
            return torch.bfloat16
    return torch.float32

# --------------------------------------------------------------------------- 7. monitor and report

def monitor(moco, train, test, args):
    """What `judge` says of the backbone while it trains."""
    data.share_buffers(moco.encoder_q)
    moco.eval()
    data.allow_tf32(False)
    measures = judge(moco.encoder_q.backbone, train, test, args)
    data.allow_tf32(True)
    moco.train()
    return measures

def judge(network, train, test, args, probe=False):
    """kNN and, with `probe`, linear accuracy in % of a network's features on held-out images.

    Neighbours and probe come from at most 50,000 training images, 10,000 on a CPU. Without labels:
    alignment and uniformity of two views, drawn as in training, of up to 2,000 images; lower is
    better, of both together.
    """
    if test is None:
        rows = torch.randperm(len(train), generator=data.seeded("apart"))[:2000]
        views = torch.rand(2, len(rows), data.COLUMNS, generator=data.seeded("views"))
        a, b = [linear_eval.extract(network, train, args.size, rows, u, crop=args.crop,
                                    jitter=args.jitter, hue=args.hue, gray=args.gray,
                                    blur=args.blur)[0] for u in views]
        return dict(alignment=linear_eval.alignment(a, b).item(),
                    uniformity=linear_eval.uniformity(a))
    rows = (train.labels >= 0).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=data.seeded("probe"))]
    rows = rows[:10_000 if train.device.type == "cpu" else 50_000]
    train_x, train_y = linear_eval.extract(network, train, args.size, rows)
    test_x, test_y = linear_eval.extract(network, test, args.size)
    measures = dict(knn=linear_eval.knn(train_x, train_y, test_x, test_y))
    if probe:
        weight, bias = linear_eval.linear_probe(train_x, train_y, len(train.classes))
        measures["linear"] = linear_eval.accuracy(weight, bias, test_x, test_y)
    return measures

def report(out, learned, untrained, train, test, args):
    """What the features are worth, beside those of random weights and beside raw pixels."""
    data.allow_tf32(False)
    networks = {"learned": learned.eval(), "random weights": untrained}
    if test is None:
        print0("\nfeatures          alignment  uniformity")
    else:
        print0(f"\nfeatures              kNN %    linear %   ({len(test):,} held-out images, "
               f"{len(train.classes)} classes)")
        networks["raw pixels"] = linear_eval.Pixels()
    for name, network in networks.items():
        first, second = judge(network, train, test, args, probe=True).values()
        print0(f"{name:<16}{first:>11.2f}{second:>12.2f}")
    print0(f"\nThe network is {out}/backbone.pt (torchvision's names). Look at {out}/views.png, try"
           f"\n  python linear_eval.py {out}\n  python analyze.py {out} random")

# ---------------------------------------------------------------------------------------- 8. files

def start_or_resume(args, moco, optimizer, scaler, train):
    """Make the run's folder, or with --resume load its last checkpoint if there is one.

    -> the folder, steps done, log, sums of the epoch so far.
    """
    out = Path(args.out or next_free_folder(args))
    if args.resume and (out / "last.pt").exists():
        last = data.load_file(out / "last.pt")
        moco.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        scaler.load_state_dict(last["scaler"])
        return out, last["step"], last["log"], last["sums"].to(train.device)
    if (out / "last.pt").exists() or (out / "log.jsonl").exists():
        raise InputError(f"--out {out}: holds a run already; go on with it (--resume), or name "
                         "another folder")
    if rank_world()[0] == 0:
        out.mkdir(parents=True, exist_ok=True)
        data.save(out / "args.json", json.dumps(vars(args), indent=1))
        save_views(train, args, out / "views.png")
    return out, 0, [], torch.zeros(2, device=train.device)

def next_free_folder(args):
    """runs/DATA-ARCH-1, or the first number that is not taken."""
    i = 1
    while (path := Path("runs") / f"{Path(args.data).resolve().name}-{args.arch}-{i}").exists():
        i += 1
    return path

def save(out, moco, optimizer, scaler, step, log, sums, args):
    """backbone.pt: the network; log.jsonl: an object an epoch; last.pt: all that --resume needs.

    last.pt comes last: killed before it is renamed, a run goes on from the one before.
    """
    backbone = {k: v.cpu().contiguous() for k, v in moco.encoder_q.backbone.state_dict().items()}
    try:
        data.save(out / "backbone.pt", backbone)
        data.save(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
        data.save(out / "last.pt", dict(
            model=moco.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
            step=step, log=log, sums=sums))
    except OSError as error:
        if step == args.total_steps:
            raise InputError(f"{error}: the run is at its end, but not saved; make room, then go "
                             "on with --resume") from None
        print(f"{error}: not saved; training goes on, and the next save tries again", flush=True)

def refuse_infinite(loss, step, out, args):
    """End a run whose loss is no number, before it overwrites its last good checkpoint."""
    if not math.isfinite(loss):
        raise InputError(
            f"the loss is {loss} at step {step + 1}, or soon before: the weights have grown "
            f"without bound; lower --lr (now {args.lr:g}), raise --temp or add --warmup; "
            f"{out}/last.pt is from before, if there is one")

# -------------------------------------------------------------------------- 9. schedules and flags

def learning_rate(args, step, epoch_steps):
    warmup = 1.0
    if args.warmup > 0:
        warmup = min(1, (step + 1) / (args.warmup * epoch_steps))
    if args.schedule == "constant":
        return warmup * args.lr
    return warmup * cosine(args.lr, 0, step / args.total_steps)

RECIPES = {
    "moco-v2": {},
    "small": dict(temp=0.1, head="wide", jitter=0.8, hue=0.4, gray=0.5),  # Shi et al. 2022
    "light": dict(symmetric=True, smooth=0.1, head="2048", momentum_end=1.0),  # Lin et al. 2022
    "local": dict(local_crops=6, local_scale=[0.05, 0.3], crop=[0.3, 1.0]),  # Tan et al. 2023
}

def parse(argv):
    """Flags. In brackets: the default, or the rule in fill_auto that picks it."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="fractals", help="fractals, cifar10, cifar100, stl10, or a folder")
    add("--root", default="data", help="folder of downloaded and decoded data sets [data]")
    add("--size", type=int, help="side of a view [the images' shorter side, at most 224, on a "
        "CPU 64]")
    add("--keep", type=int, help="side at which a folder's images are stored [theirs, from --size "
        "to 1.5 --size]")

    add = parser.add_argument_group("network").add_argument
    add("--arch", default="mobilenetv3", help=", ".join(models.ARCHS))
    add("--stem", help="imagenet, or small (stride 1) [small to 64 pixels, not on a CPU]")
    add("--head", default="simple", help="linear, simple, wide, deep, dropout, or a hidden width "
        "[simple; Shi 2022: wide]")
    add("--dim", type=int, default=128, help="width C of the embedding [128]")
    add("--init", help="start from the backbone of this checkpoint [random weights]")
    add("--zero-init", action=argparse.BooleanOptionalAction, help="residual blocks start as the "
        "identity (Goyal 2017) [in runs under 5,000 steps]")

    add = parser.add_argument_group("contrast").add_argument
    add("--temp", type=float, default=0.2, help="temperature T [0.2; Shi 2022: 0.1]")
    add("--momentum", type=float, help="m of the key encoder [MoCo: 0.999; 0.99 under 100,000 "
        "steps, 0.8 under 5,000]")
    add("--queue", type=int, help="keys K in the queue [MoCo: 65536; a tenth of the images, and no "
        "key staler than MoCo's]")
    add("--in-batch", action=argparse.BooleanOptionalAction, help="the step's other keys are "
        "negatives, too (SimCLR, MoCo v3) [in runs under 5,000 steps]")
    add("--bn-splits", type=int, help="parts of the shuffled keys for BatchNorm [MoCo: 8; at "
        "least 2, of 64 images or more]")

    add = parser.add_argument_group("beyond MoCo v2").add_argument
    add("--symmetric", action="store_true", help="both views are query and key (Lin 2022)")
    add("--smooth", type=float, default=0, help="share of the target on near keys (Lin 2022) [0]")
    add("--smooth-k", type=int, default=5, help="on how many [5]")
    add("--momentum-end", type=float, help="m goes there along a cosine (Lin 2022: 1) [constant]")
    add("--local-crops", type=int, default=0, help="small query views more (Tan 2023: 6) [0]")
    add("--local-size", type=int, help="their side in pixels [4/7 of --size, as 128 of 224]")
    add("--local-scale", type=float, default=[0.05, 0.3], nargs=2, metavar=("LO", "HI"),
        help="range of their area [0.05 0.3]")
    add("--teacher", help="distill this checkpoint first (SEED, Fang 2021)")
    add("--teacher-arch", help="its network, where args.json does not tell")
    add("--teacher-epochs", type=float, help="for how long [a tenth of the run]")
    add("--teacher-temp", type=float, default=0.01, help="temperature of its softmax [0.01]")

    add = parser.add_argument_group("augmentation").add_argument
    add("--crop", type=float, nargs=2, metavar=("LO", "HI"),
        help="range of the crop's area [MoCo: 0.2 1; 0.35 1 under 2,000 steps]")
    add("--jitter", type=float, default=0.4, help="of brightness and the like [0.4; Shi 2022: 0.8]")
    add("--hue", type=float, default=0.1, help="hue jitter in turns [0.1; Shi 2022: 0.4]")
    add("--gray", type=float, default=0.2, help="probability of grayscale [0.2; Shi 2022: 0.5]")
    add("--blur", type=float, default=0.5, help="probability of Gaussian blur [0.5]")
    add("--hide", action="store_true", help="hide-and-seek (Singh & Lee 2017, Shi 2022)")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=int, help="passes over the images [MoCo: 200; on a CPU fewer: a first "
        "result in minutes]")
    add("--steps", type=int, default=0, help="length of the run in steps, instead of --epochs")
    add("--batch", type=int, help="images a step, over all processes [MoCo: 256; 1/80 of all, at "
        "least 64]")
    add("--lr", type=float, help="of SGD [MoCo: 0.03 per 256 images a step; 0.04 to 5,000 steps]")
    add("--wd", type=float, default=1e-4, help="weight decay [1e-4]")
    add("--warmup", type=float, help="epochs of linear warm-up [MoCo: 0; 2 under 5,000 steps]")
    add("--schedule", default="cosine", choices=["cosine", "constant"], help="of --lr [cosine]")

    add = parser.add_argument_group("run").add_argument
    add("--recipe", default="moco-v2", choices=list(RECIPES), help="a set of the flags above, each "
        "of which still overrides it [moco-v2]")
    add("--out", help="folder of the run [runs/DATA-ARCH-N]")
    add("--resume", action="store_true", help="go on with the run in --out, with its flags")
    add("--save-every", type=float, default=10, help="minutes between checkpoints in an epoch [10]")
    add("--knn-every", type=int, help="epochs between looks at held-out images [1/5 of the run]")
    add("--seed", type=int, default=0, help="of weights, order and views [0]")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu [the first there is]")
    add("--precision", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the networks [bfloat16 on GPUs that have it, and for ResNets on such CPUs; else "
        "float32; on a T4: float16]")

    # a recipe, and the flags of a run that goes on, are defaults: what is typed overrides them
    args = parser.parse_args(argv)
    parser.set_defaults(**RECIPES[args.recipe])
    if args.resume:
        if args.out is None:
            raise InputError("--resume: name the run's folder with --out")
        if (Path(args.out) / "args.json").is_file():
            parser.set_defaults(**data.read_json(Path(args.out) / "args.json"))
    return parser.parse_args(argv)

def fill_auto(args, n, world, on_cpu=False):
    """Flags left open, from the number n of images. Each rule may use the flags above it."""
    open_flags = [name for name, value in vars(args).items() if value is None]
    if args.stem is None:
        args.stem = models.default_stem(args.size, on_cpu)
    if args.batch is None:
        args.batch = power_of_two(min(256, max(64, n // 80), n // 4))
        args.batch = math.ceil(max(4, args.batch) / world) * world
    if args.epochs is None:
        args.epochs = 200
        if on_cpu:  # 75,000 images at 32 pixels: a first result in minutes
            args.epochs = max(10, min(200, 2_400_000 // args.size // n))
    epoch_steps = max(1, n // max(1, args.batch))
    args.total_steps = args.steps or args.epochs * epoch_steps
    is_short = args.total_steps < 5_000
    if args.momentum is None:  # a key encoder that lags far behind in a short run teaches the past
        args.momentum = 0.999
        if args.total_steps < 100_000:
            args.momentum = 0.99
        if is_short:
            args.momentum = 0.8
    if args.zero_init is None:  # see models.start_as_identity
        args.zero_init = is_short
    if args.in_batch is None:  # see other_keys
        args.in_batch = is_short
    if args.crop is None:  # two small crops of an image have little in common: that takes long
        args.crop = [0.35, 1.0] if args.total_steps < 2_000 else [0.2, 1.0]
    if args.queue is None:  # no key staler than MoCo's, of 256 steps at m = 0.999: else queries
        # learn to tell old keys from new ones
        keys = 2 * args.batch if args.symmetric else args.batch
        steps = round(0.256 / max(1e-6, 1 - args.momentum), 3)
        longest = power_of_two(min(65536, n // 10, steps * args.batch))
        args.queue = min(n, max(2 * keys, longest))
    if args.bn_splits is None:  # MoCo's 8, but parts of at least 64 images, and at least 2 parts
        most = max(2, world, min(8, args.batch // 64))
        fitting = [i for i in range(world, most + 1, world) if args.batch % i == 0]
        args.bn_splits = max(fitting, default=world)
    if args.lr is None:
        args.lr = (0.04 if is_short else 0.03) * args.batch / 256
    if args.warmup is None:
        args.warmup = 0
        if is_short:  # a network that outruns its keys has no time to recover
            args.warmup = min(2, args.total_steps / epoch_steps / 7)
    if args.knn_every is None:
        args.knn_every = max(1, args.total_steps // epoch_steps // 5)
    picked = [name for name in open_flags if getattr(args, name) is not None]
    if picked:
        print0(f"picked for {n:,} images: " + " ".join(
            f"--{name.replace('_', '-')} {getattr(args, name)}" for name in picked))
    if args.momentum_end is None:
        args.momentum_end = args.momentum
    if args.local_size is None:
        args.local_size = max(8, round(args.size / 7) * 4)
    if args.teacher_epochs is None:
        args.teacher_epochs = args.total_steps / epoch_steps / 10
    args.teacher_steps = min(args.total_steps, round(args.teacher_epochs * epoch_steps))

def power_of_two(n):
    """The largest one up to n."""
    return 2 ** int(math.log2(max(1, n)))

def check(args, n, world):
    """Refuse what cannot work, in one line that says how to fix it."""
    keys = 2 * args.batch if args.symmetric else args.batch
    splits = args.bn_splits
    if n < 5:
        raise InputError(f"--data {args.data}: too few images to learn from ({n}); add some")
    if args.batch > n:
        raise InputError(f"--batch {args.batch}: there are only {n} images; lower it")
    if args.batch < 2 or args.batch % world != 0:
        raise InputError(f"--batch {args.batch}: must be 2 or more, a multiple of the {world} "
                         "processes")
    if not keys < args.queue <= n:  # beyond, an image would meet itself as a negative
        raise InputError(f"--queue {args.queue}: must be more than the {keys} keys of a step, and "
                         f"at most the {n} images")
    if splits < 1 or args.batch % splits != 0 or splits % world != 0 or args.batch < 2 * splits:
        raise InputError(f"--bn-splits {splits}: must divide --batch {args.batch} into parts of 2 "
                         f"or more, the same number on each of {world} processes")
    if args.temp < 0.025:  # see softmax_over_keys
        raise InputError(f"--temp {args.temp}: must be 0.025 or more; 0.05 to 0.5 is usual")
    for flag, low, high in (("momentum", 0, 1), ("momentum_end", 0, 1), ("smooth", 0, 0.999),
                            ("smooth_k", 1, args.queue), ("local_crops", 0, 99),
                            ("local_size", 8, 4096), ("teacher_temp", 1e-4, 99), ("jitter", 0, 99),
                            ("hue", 0, 99), ("gray", 0, 1), ("blur", 0, 1), ("dim", 1, 65536),
                            ("epochs", 1, 1e9), ("steps", 0, 1e12), ("lr", 1e-12, 1e3),
                            ("knn_every", 1, 1e9), ("size", 8, 4096)):
        value = getattr(args, flag)
        if not low <= value <= high:
            raise InputError(f"--{flag.replace('_', '-')} {value}: must be within {low}..{high}")
    for flag in ("crop", "local_scale"):
        low, high = getattr(args, flag)
        if not 0 < low <= high <= 1:
            raise InputError(f"--{flag.replace('_', '-')} {low} {high}: must be 0 < LO <= HI <= 1")

if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:  # OSError: a folder or disk that cannot be written
        sys.exit(f"pretrain.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\npretrain.py: stopped; go on with --out FOLDER --resume")
