"""MoCo v2 pretraining of a small network on unlabeled images.

    python pretrain.py --arch mobilenetv3 --temp 0.1       # some minutes on a laptop, no download
    python pretrain.py --data FOLDER                       # your own images, with or without labels
    torchrun --nproc-per-node 8 pretrain.py --data FOLDER  # eight GPUs; --batch is their total
    python pretrain.py --out runs/mine --resume            # go on with a run

The method: He et al. 2020 (MoCo), Chen et al. 2020 (MoCo v2), for small networks Shi et al. 2022.
Read it from top to bottom: the method, one step, the training loop. Then, as needed: networks and
optimizer, monitor and report, the run's folder, rules, flags and recipes.

Letters in shapes: B images in the batch of a step, over all processes; N = B / processes, those of
one process; C numbers in an embedding; K keys in the queue.

For readers who know MoCo: whatever the flags, these details differ from MoCo v2, from its CIFAR-10
notebook, or from both.

- The keys of a batch enter the queue before the loss, not after it. So the keys of the other
  images of the batch are negatives, too. If they entered after it, a query's own key would be the
  only new one, and a query could find it by that alone.
- BatchNorm of queries: over all queries of a process at once (MoCo: over the 32 of a GPU; the
  notebook: in eight parts, like keys).
- All networks start as He et al. 2015 propose, which makes the weights of the head's Linears 2.45
  times as large as torch's default. The head's last Linear starts at four times that.
- BatchNorm has torch's momentum of 0.1 (torchvision's MobileNetV3: 0.01).
- The learning rate changes at every step, not at every epoch.
- Pixels are normalized by ImageNet's mean and deviation, whatever the data set.
- Hue turns in YIQ, not in HSV. Blur comes before colors are clipped to black and white, and its
  sigma shrinks with the view.
- The images of a folder are stored, by default, at most 1.5 times as large as a view, and crops are
  cut from these.
- Where they are not typed, batch, momentum, queue, BatchNorm splits and stem follow rules of this
  file.
- The whole center square of an image is evaluated, without the margin that is usual at 224 pixels.
"""
import argparse
import contextlib
import copy
import gc
import json
import math
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
import models
from data import (InputError, fraction, gather, init_device, load_file, locked,
                  mean_over_processes, move_to_device, positive, print0, rank_world, run, save,
                  share_buffers, to_device)
from linear_eval import Pixels, found, judge, read_checkpoint, to_evaluate

# ----------------------------------------------------------------------------------- 1. the method

class Encoder(nn.Module):
    """Backbone and projection head: images (N, 3, H, W) -> embeddings (N, C) of length one."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images):
        z = self.head(self.backbone(images))
        return F.normalize(z.float(), dim=1)  # in float32, also where the networks have 16 bits

class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm of each of `splits` parts of the batch by itself (MoCo's CIFAR notebook). The key
    encoder stays in train mode, so its running statistics are not used."""
    splits = 1

    def forward(self, x):
        parts = x.tensor_split(self.splits)
        return torch.cat([nn.BatchNorm2d.forward(self, part) for part in parts])

class MoCo(nn.Module):
    """A query encoder that learns, a key encoder that follows it, a queue of the latest keys."""

    def __init__(self, encoder, dim, queue_size, splits):
        super().__init__()
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        for layer in self.encoder_k.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.__class__ = SplitBatchNorm  # another forward pass for the same weights
                layer.splits = splits  # on this process
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("next_row", torch.zeros((), dtype=torch.long))  # of the oldest key
        self.register_buffer("hardness", torch.zeros(()))  # of views, 0 to 1: see make_views, steer

    @torch.no_grad()
    def update_key_encoder(self, m):
        """f_k <- m f_k + (1 - m) f_q (He et al. 2020, eq. 2), for all weights."""
        weights_k = list(self.encoder_k.parameters())
        weights_q = list(self.encoder_q.parameters())
        torch._foreach_lerp_(weights_k, weights_q, 1 - m)  # k.lerp_(q, 1 - m) for all, in one call

    @torch.no_grad()
    def encode_keys(self, views, order):
        """Key views (N, 3, H, W) of this process -> all keys (B, C), in the order of the batch.

        Shuffling BN (He et al. 2020, section 3.3): BatchNorm mixes the images of a batch. If a
        query and its key were normalized by the same images, the query could find the key by the
        mean and the variance that both have in them. So the key views come in another order, and
        BatchNorm normalizes parts of them by themselves. `order` (B,) says which image of the batch
        comes at which place: see `load_batch`.
        """
        shuffled = gather(self.encoder_k(views))
        keys = torch.empty_like(shuffled)
        keys[order] = shuffled  # shuffled[i] is the key of the batch's row order[i]
        return keys

    @torch.no_grad()
    def enqueue(self, keys):
        """The keys (B, C) of a step overwrite the oldest ones: the queue is a ring. -> the rows
        (B,) of the queue that hold them now."""
        rows = (self.next_row + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys
        self.next_row.add_(len(keys)).remainder_(len(self.queue))
        return rows

def share_of_process(x):
    """Of the rows of x, which all processes have, those that this process works on."""
    rank, world = rank_world()
    return x.chunk(world)[rank]

def info_nce_plain(q, own, queue, temperature):
    """InfoNCE (Oord et al. 2018) as a formula: which key in the queue is a query's own?

    Queries q (N, C) and the queue (K, C), all of length one; `own` (N,), the row of the queue that
    holds the own key of each query -> the mean cross-entropy of a softmax over the queue.
    """
    return F.cross_entropy(q @ queue.T / temperature, own)

def info_nce(q, own, queue, temperature):
    """info_nce_plain by one call of torch's attention, which never holds the N x K logits. Only q
    gets a gradient. With w_j the softmax weights of the queue's keys u_j, and k the own key,

        loss = -log w_own        dloss/dq = (sum_j w_j u_j - k) / T

    Attention computes such weighted sums, but it does not return w_own. So the queue gets one more
    row: zeros, and a 1 in a new last coordinate. In this coordinate, each query has q.k. So the new
    row has the same logit as the own key. Its softmax weight s comes out as the last coordinate of
    the result, since all other rows have a 0 there. These share the rest, 1 - s, as before:

        queries = [q, q.k]   keys = values = [[queue, 0], [0, 1]]
        result = [(1 - s) sum_j w_j u_j, s]   w_own = s / (1 - s)
    """
    c = q.shape[1]
    with torch.no_grad():
        k = queue[own]
        extra = 8 - c % 8  # one column would do, but GPUs ask for a width that is a multiple of 8
        queries = F.pad(q, (0, extra))
        queries[:, c] = (q * k).sum(1)
        keys = F.pad(queue, (0, extra, 0, 1))  # and one row
        keys[-1, c] = 1
        queries, keys = queries[None, None], keys[None, None]  # one head of one sequence
        result = F.scaled_dot_product_attention(queries, keys, keys, scale=1 / temperature)[0, 0]
        s = result[:, c]  # exp(-2 / T) / (K + 1) or more: large enough for a float32 if T >= 0.03
        loss = ((1 - s) / s).log()
        gradient = (result[:, :c] / (1 - s)[:, None] - k) / temperature
    # q - q.detach() is zero, but its gradient is one: the loss stays, q gets the gradient
    return (loss + ((q - q.detach()) * gradient).sum(1)).mean()

@torch.no_grad()
def instance_accuracy(q, own, queue):
    """The share of queries whose own key is the nearest of the queue. For speed, it is measured on
    the first 64 queries."""
    nearest = (q[:64] @ queue.T).argmax(1)
    return (nearest == own[:64]).float().mean()

# ------------------------------------------------------------------------------------- 2. one step

def train_step(moco, encoder_q, optimizer, scaler, autocast, args, batch):
    """One step. `batch` is what `load_batch` returns. `encoder_q` is moco.encoder_q; where there
    are several processes, DDP wraps it.

    -> (2,): the loss and the instance accuracy, each the mean over all processes.
    """
    query_views, key_views = make_views(batch, args, moco.hardness)
    with autocast:
        q = encoder_q(query_views)
        moco.update_key_encoder(args.momentum)
        keys = moco.encode_keys(key_views, batch["order"])  # of all processes
    own = share_of_process(moco.enqueue(keys))  # where the queue holds the keys of q
    loss = info_nce(q, own, moco.queue, args.temp)
    accuracy = instance_accuracy(q, own, moco.queue)

    scaler.scale(loss).backward()  # the scale is 1 except in float16
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    means = mean_over_processes(torch.stack([loss.detach(), accuracy]))
    steer(moco.hardness, means[1], args.target)
    return means

def load_batch(images, args, step):
    """What this process needs for a step, {name: tensor on the device}.

    It encodes the queries of N images, its part of the batch, and the keys of N random images:
    `order` is a random order of the B images, of which it takes its part. So BatchNorm sees a query
    and its key among different images. MoCo sends views from GPU to GPU for that. Here each process
    makes the views that it needs.

    query_pixels, query_shapes and query_u are the N images of its queries and the uniform numbers
    of their views (data.draw_step), key_pixels, key_shapes and key_u those of its keys.
    """
    rows, u, order = data.draw_step(len(images), args.batch, args.seed, step)
    queries = share_of_process(torch.arange(args.batch))
    keys = share_of_process(order)
    batch = dict(order=to_device(order, images.device))
    batch["query_pixels"], batch["query_shapes"] = images.get(rows[queries])
    batch["key_pixels"], batch["key_shapes"] = images.get(rows[keys])
    batch["query_u"] = to_device(u[0, queries], images.device)
    batch["key_u"] = to_device(u[1, keys], images.device)
    return batch

def make_views(batch, args, hardness):
    """-> query views and key views, (N, 3, size, size) each.

    `hardness`, from 0 to 1, is set by `steer`. At 0 the views are as the flags say. At 1 the
    smallest crop has 0.4 times the area that --crop says (0.08 instead of 0.2), and weak keys have
    colors as strong as those of queries. Weak keys are never blurred.
    """
    flags = augmentation(args)
    smallest, largest = args.crop
    flags["crop"] = [(1 - 0.6 * hardness) * smallest, largest]
    key_flags = flags
    if args.weak_keys:
        key_flags = flags | dict(jitter=hardness * args.jitter, hue=hardness * args.hue,
                                 gray=hardness * args.gray, blur=0)
    query_views = data.augment(batch["query_pixels"], batch["query_u"], args.size,
                               shapes=batch["query_shapes"], **flags)
    key_views = data.augment(batch["key_pixels"], batch["key_u"], args.size,
                             shapes=batch["key_shapes"], **key_flags)
    return query_views, key_views

@torch.no_grad()
def steer(hardness, accuracy, target):
    """Change `hardness` in place: up after a step whose instance accuracy is above `target`, since
    a task that is too easy teaches little, else down. An accuracy that stays 0.1 above the target
    takes it from 0 to 1 in a thousand steps. A target of 1 leaves it at 0."""
    hardness.add_(0.01 * (accuracy - target)).clamp_(0, 1)

def augmentation(args):
    """The flags that say how views are drawn, by the names of data.augment's arguments."""
    return dict(crop=args.crop, jitter=args.jitter, hue=args.hue, gray=args.gray, blur=args.blur)

# ---------------------------------------------------------------------------- 3. the training loop

def main(argv=None):
    args = parse(argv)
    device = init_device(args.device)  # under torchrun, this also makes the group of processes
    train, test, args.size = data.load(args.data, args.root, args.size, device)
    out = Path(args.out or next_free_folder(args))
    is_resumed = args.resume and (out / "last.pt").exists()
    start = None  # the network of --init; a resumed run takes its weights from last.pt
    if args.init is not None and not is_resumed:
        # --stem is still None unless typed, so that the checkpoint's own comes before pick_stem
        start, known = read_checkpoint(args.init, args.arch, args.stem)
        args.stem = known["stem"]
    apply_rules(args, len(train))
    check(args, train)
    args.fingerprint = train.fingerprint  # for args.json: `check` compares it where a run goes on
    lock = contextlib.nullcontext()
    if rank_world()[0] == 0:  # two runs in one folder would overwrite each other
        lock = locked(out / "lock", wait=False)
    with lock:
        return pretrain(args, out, is_resumed, start, train, test, device)

def pretrain(args, out, is_resumed, start, train, test, device):
    """Train, save, report -> the trained MoCo. All flags in `args` have values; `start` is the
    network of --init or None."""
    # from the same seed, every process draws the same weights
    torch.manual_seed(args.seed)
    backbone = models.build(args.arch, args.stem)
    untrained = to_evaluate(copy.deepcopy(backbone), device)  # for the report, as drawn
    if args.zero_init:
        models.start_as_identity(backbone)
    if start is not None:
        backbone.load_state_dict(start.state_dict())
    encoder = Encoder(backbone, models.make_head(args.head, backbone.dim, args.dim))
    moco = MoCo(encoder, args.dim, args.queue, args.bn_splits // rank_world()[1])
    moco.to(device, memory_format=data.layout(device))
    if device.type == "cpu":
        models.speed_up_small_maps(moco)
    dtype = choose_dtype(args.precision, device, args.arch)
    # A fused step of SGD saves a twentieth of the time on a CPU, and on a GPU it reads the rate
    # from the device. But where float16 overflows, the overflow would stay in the momentum.
    fused = device.type in ("cpu", "cuda") and dtype != torch.float16
    optimizer = Muon(moco.encoder_q, args.lr, args.muon, args.wd, fused)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    first, log = 0, []  # the first step, and an entry for each epoch before it
    if is_resumed:
        first, log = restore(out / "last.pt", moco, optimizer, scaler)
    refuse_differences(args, first)  # from here on, processes wait for each other
    if not is_resumed and rank_world()[0] == 0:
        save(out / "args.json", json.dumps(vars(args), indent=1))
        save_views(train, args, out / "views.png")
    print0(f"{out}: {args.arch} on {device.type}, {len(train):,} images at {args.size} pixels, "
           f"steps {first:,} to {args.steps:,}")

    move_to_device(train, test)
    encoder_q = moco.encoder_q
    if dist.is_initialized():
        encoder_q = DistributedDataParallel(moco.encoder_q)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    take_step = partial(train_step, moco, encoder_q, optimizer, scaler, autocast, args)
    if device.type == "cuda" and not dist.is_initialized() and dtype != torch.float16:
        take_step = Recorded(take_step)  # a step in float16 must ask whether it has overflowed
    minutes = log[-1]["minutes"] if log else 0.0  # trained before
    started = said = time.monotonic()
    epoch_length = epoch_steps(args, len(train))
    sums = torch.zeros(2, device=device)  # of loss and accuracy in this epoch
    for step in range(first, args.steps):
        optimizer.scale_rates(schedule(args, step, epoch_length))
        sums += take_step(load_batch(train, args, step))

        epoch, i = divmod(step, epoch_length)
        run_ends = step + 1 == args.steps
        epoch_ends = run_ends or i + 1 == epoch_length
        if not epoch_ends and time.monotonic() - said < 20:
            continue  # reading the loss, as below, makes Python wait for the device
        loss, accuracy = (sums / (i + 1)).tolist()
        seconds = time.monotonic() - started
        entry = dict(epoch=epoch + 1, step=step + 1, minutes=minutes + seconds / 60, loss=loss,
                     instance_accuracy=100 * accuracy, hardness=moco.hardness.item(),
                     lr=optimizer.param_groups[0]["lr"].item(),
                     images_per_s=(step + 1 - first) * args.batch / seconds)
        if epoch_ends:
            stop_if_diverged(loss, moco, step, args)
            if run_ends or (epoch + 1) % args.knn_every == 0:
                share_buffers(moco.encoder_q)  # BatchNorm's: DDP does so only before a step
                entry |= monitor(moco.encoder_q.backbone.eval(), train, test, args)
                moco.encoder_q.train()
            log.append(entry)
            sums.zero_()
            if run_ends or (epoch + 1) % max(1, args.epochs // 50) == 0:
                save_run(out, moco, optimizer, scaler, step + 1, log)
        said = time.monotonic()
        left = (said - started) / (step + 1 - first) * (args.steps - step - 1)
        print0(f"{in_words(entry)}  {timedelta(seconds=int(left))} left")

    report(out, moco.encoder_q.backbone, untrained, train, test, args)
    return moco

# --------------------------------------------------------------------------- 4. networks, optimizer

def choose_dtype(precision, device, arch):
    """The type in which the networks compute. "auto" is bfloat16 on a GPU, or float16 if the GPU
    has no bfloat16 (T4). On a CPU that has bfloat16, ResNets compute in it. The other networks do
    not, since it makes depthwise convolutions slower there. All else is float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_it else torch.float16
    has_it = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if has_it and arch.startswith("resnet") else torch.float32

class Muon(torch.optim.SGD):
    """SGD with momentum 0.9. If `muon` is above 0, most convolutions use Muon (Jordan et al. 2024)
    instead: all that have a BatchNorm after them, except the depthwise ones and the first one,
    which reads the colors.

    Muon moves a weight matrix by a nearly orthogonal matrix, made from its gradient, times the rate
    `muon`. A plain gradient is mostly a few directions, those in which many images agree. Made
    orthogonal, it moves the layer equally far in all directions, so features that few images ask
    for are learned as early as the others. In place of `wd`, these weights have a weight decay of
    0.1.

    The learning rates are tensors on the device. `scale_rates` writes them, and a step that was
    recorded (see `Recorded`) reads them.
    """

    def __init__(self, net, lr, muon, wd, fused=False):
        # in these networks, no bias means that BatchNorm follows
        convolutions = [layer.weight for layer in net.modules()
                        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and muon > 0
                        and layer.bias is None and layer.in_channels > 3]
        chosen = set(convolutions)
        others = [w for w in net.parameters() if w not in chosen]
        groups = [dict(params=others, peak_lr=lr), dict(params=convolutions, peak_lr=muon)]
        super().__init__(groups, lr, momentum=0.9, weight_decay=wd, fused=fused)
        for group in self.param_groups:
            group["lr"] = torch.tensor(float(group["peak_lr"]), device=others[0].device)
        for w in convolutions:
            self.state[w]["momentum_buffer"] = torch.zeros_like(w)

    def scale_rates(self, factor):
        """Set each group's rate to `factor` times its peak."""
        for group in self.param_groups:
            group["lr"].fill_(factor * group["peak_lr"])

    @torch.no_grad()
    def step(self):
        group = self.param_groups[1]
        for w in group["params"]:
            momentum = self.state[w]["momentum_buffer"]
            torch.add(w.grad, momentum, alpha=0.95, out=momentum)  # grad + 0.95 momentum
            g = w.grad.add(momentum, alpha=0.95)  # Nesterov: grad + 0.95 of the new momentum
            g = g.permute(0, 2, 3, 1)  # the order of numbers in memory, with channels_last
            rows = g.flatten(1)  # one for each output channel
            scale = max(1, len(rows) / rows.shape[1]) ** 0.5  # as in Jordan's
            move = orthogonal(rows).view_as(g).permute(0, 3, 1, 2)  # U V^T
            w.mul_(1 - 0.1 * group["lr"])  # weight decay
            w.addcmul_(move, group["lr"], value=-scale)  # w -= scale lr U V^T
            w.grad = None  # so that SGD's step leaves w as it is
        super().step()

def orthogonal(g):
    """U V^T of a matrix g = U S V^T, nearly: most singular values become 0.7 to 1.2.

    Jordan's Newton-Schulz loop begins with x = g / |g| (Frobenius) and takes five steps

        x <- p x        p = 3.4445 I - 4.775 a + 2.0315 a^2        a = x x^T

    which bring its singular values near 1. Here x is not computed: as p is symmetric, the next a is
    (p x) (p x)^T = p a p. So the loop has small matrices alone, whose side is the shorter one of g,
    and g is multiplied once, by the product of the five p. That takes a fifth to two thirds of the
    time of Jordan's loop.

    A shorter side above 160, as in ResNets, is cut into parts of 64, each of which is made
    orthogonal by itself. The whole then has singular values up to about 3. On a ResNet-18 that
    takes a sixth of the time, and the network learns as well.
    """
    if len(g) > g.shape[1]:
        return orthogonal(g.T).T
    parts = g
    if len(g) > 160 and len(g) % 64 == 0:
        parts = g.unflatten(0, (-1, 64))  # (n, 64, width): what follows is done for each of the n
    a = parts @ parts.mT
    # the trace, |g|^2
    square = a.trace() if parts is g else a.diagonal(0, 1, 2).sum(1)[:, None, None]
    a /= square.clamp_(min=1e-24)
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    product = one
    for _ in range(5):
        p = 3.4445 * one - 4.775 * a + 2.0315 * a @ a
        product = p @ product
        a = p @ a @ p
    return (product / square.sqrt() @ parts).view_as(g)

class Recorded:
    """A step on a GPU, recorded once as a CUDA graph, then replayed on other numbers in the same
    places. A step is thousands of small kernels: of ResNet-18 and 512 images an H200 runs them in
    20 ms, but Python takes 39 to 54 ms to launch them one by one."""
    usual = 3  # steps taken as usual before the recording: in them, libraries choose their kernels

    def __init__(self, take_step):
        self.take_step = take_step
        self.batch = self.graph = None

    def __call__(self, batch):
        if self.batch is None:
            self.batch = {name: x.clone() for name, x in batch.items()}
        for name, x in batch.items():
            self.batch[name].copy_(x)
        if self.usual > 0:
            self.usual -= 1
            stream = torch.cuda.Stream()  # as PyTorch's notes on CUDA graphs ask for
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = self.take_step(self.batch)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if self.graph is None:
            gc.collect()  # CUDA refuses to free another graph while one is recorded
            self.graph = torch.cuda.CUDAGraph()
            # While one thread records, CUDA forbids calls that a graph cannot hold. "thread_local"
            # forbids them to this thread only: PyTorch's other threads may go on making them.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = self.take_step(self.batch)  # runs nothing yet
        self.graph.replay()
        return self.result

def schedule(args, step, epoch_length):
    """The learning rates as a share of their peaks: a linear warm-up times half a cosine."""
    warmup = min(1, (step + 1) / max(1, args.warmup * epoch_length))
    return warmup * 0.5 * (1 + math.cos(math.pi * step / args.steps))

# --------------------------------------------------------------------------- 5. monitor and report

def monitor(network, train, test, args, with_probe=False):
    """{name: %} of the network: with labels, kNN accuracy on held-out images and, `with_probe`,
    linear accuracy; without labels "found", the share of images whose second view finds the first.
    """
    if test is None:
        return dict(found=found(network, train, args.size, **augmentation(args)))
    return judge(network, train, test, args.size, with_probe)

def report(out, learned, untrained, train, test, args):
    """Print what the features are worth, and what random weights and raw pixels are worth."""
    networks = {"learned": learned.eval(), "random weights": untrained, "raw pixels": Pixels()}
    print0("")
    for name, network in networks.items():
        print0(f"{name:<16}{in_words(monitor(network, train, test, args, with_probe=True))}")
    if test is None:
        print0("(found: % of images whose second view is nearest to their own first view)")
    else:
        print0(f"(% of {len(test):,} held-out images, {len(train.classes)} classes)\n\n"
               f"python linear_eval.py {out}       # more numbers")
    print0(f"python analyze.py {out} random    # a map of the images, and the feature space\n"
           f"{out}/backbone.pt is the network, with torchvision's names; views.png, what it saw")

def in_words(numbers):
    """{name: number} as a line."""
    words = []
    for name, value in numbers.items():
        shown = value if isinstance(value, int) else f"{value:.4g}"
        words.append(f"{name.replace('_', ' ')} {shown}")
    return "   ".join(words)

# --------------------------------------------------------------------------- 6. the run's folder

def next_free_folder(args):
    """runs/DATA-ARCH-1, or the first number that is not taken."""
    i = 1
    while (path := Path("runs") / f"{Path(args.data).resolve().name}-{args.arch}-{i}").exists():
        i += 1
    return path

def save_views(images, args, path):
    """A grid of three rows: eight images, a query view of each, a key view of each."""
    from torchvision.utils import save_image
    batch = load_batch(images, args, step=0)
    # In training, keys are in another order than queries. Here both views are of the same images.
    batch |= dict(key_pixels=batch["query_pixels"], key_shapes=batch["query_shapes"])
    originals = data.center(batch["query_pixels"], args.size, batch["query_shapes"])
    rows = torch.stack([originals, *make_views(batch, args, hardness=0)])[:, :8].cpu()
    views = rows * torch.tensor(data.STD)[:, None, None] + torch.tensor(data.MEAN)[:, None, None]
    views = F.interpolate(views.flatten(0, 1), scale_factor=max(1, 96 // args.size))
    save_image(views, path, nrow=rows.shape[1], padding=0)

def save_run(out, moco, optimizer, scaler, step, log):
    """backbone.pt: the network; log.jsonl: one object an epoch; last.pt: all that --resume needs.

    last.pt comes last: a run that is killed before goes on from the last.pt that was there.
    """
    if rank_world()[0] > 0:
        return
    backbone = {k: v.cpu().contiguous() for k, v in moco.encoder_q.backbone.state_dict().items()}
    save(out / "backbone.pt", backbone)
    save(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
    save(out / "last.pt", dict(model=moco.state_dict(), optimizer=optimizer.state_dict(),
                               scaler=scaler.state_dict(), step=step, log=log))

def restore(path, moco, optimizer, scaler):
    """Load a last.pt -> the steps done and the log."""
    last = load_file(path)
    try:
        moco.load_state_dict(last["model"])
        for saved, own in zip(last["optimizer"]["param_groups"], optimizer.param_groups):
            # a recorded step reads the rate on this device
            saved.update(lr=own["lr"], fused=own["fused"])
        optimizer.load_state_dict(last["optimizer"])  # raises an error if of other weights
        if last["scaler"]:  # empty, if the run had no float16 before
            scaler.load_state_dict(last["scaler"])
        step, log = int(last["step"]), list(last["log"])
    except Exception:  # whatever else a file may hold
        raise InputError(f"{path}: not of the run that args.json beside it describes, or of an "
                         "older pretrain.py") from None
    return step, log

def refuse_differences(args, first):
    """End all processes with one line unless they have the same flags, images and steps done."""
    if not dist.is_initialized():
        return
    # paths may differ between machines
    facts = vars(args) | dict(steps_done=first, out="", data="", root="")
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, facts)
    for what in facts:
        values = [theirs.get(what) for theirs in everyone]
        if values.count(values[0]) < len(values):
            raise InputError(f"{what}: the processes have {values}; give all nodes the same flags, "
                             "images and run")

def stop_if_diverged(loss, moco, step, args):
    """End a run whose loss or weights are infinite or NaN, before they overwrite its checkpoint."""
    weights = moco.encoder_q.state_dict().values()
    if not (math.isfinite(loss) and all(w.isfinite().all() for w in weights)):
        raise InputError(
            f"the loss is {loss:g} at step {step + 1}, or weights have grown without bound; lower "
            f"--lr (now {args.lr:g}) or --muon, raise --temp, or add --warmup; a last.pt in the "
            "run's folder is from before")

# ------------------------------------------------------------------------- 7. rules, flags, recipes
#
# Where does a flag get its value? From the first of these that has one:
#   1. the command line
#   2. args.json, if a run goes on
#   3. the recipe, if it has a value for the flag
#   4. the recipe, if it has a rule: one of the functions pick_... (But with --init, the stem is the
#      checkpoint's.)
# `parse` does 1 to 3. A flag for which a rule has to decide is still None then. When the images are
# known, `apply_rules` does 4, in the order of FLAGS. So a rule may use n, the number of images, and
# the flags that stand before its own in FLAGS. (One exception: pick_epochs uses --steps, if typed.)
# --help shows the docstring of a rule where other flags show a value.

def epoch_steps(args, n):
    """Steps of an epoch; the last incomplete batch is dropped."""
    return max(1, n // args.batch)

def pick_batch(args, n):
    """1/80 of the images, within 64 to 256, but at most a quarter of them; a power of two"""
    world = rank_world()[1]
    batch = max(2 * world, 4, power_of_two(min(256, max(64, n // 80), n // 4)))
    return math.ceil(batch / world) * world

def pick_epochs(args, n):
    """as many as show a million images, but 10 to 200; for letters 14"""
    if args.steps is not None:
        return math.ceil(args.steps / epoch_steps(args, n))
    return 14 if args.data == "letters" else max(10, min(200, math.ceil(1_000_000 / n)))

def pick_steps(args, n):
    """by --epochs"""
    return args.epochs * epoch_steps(args, n)

def pick_stem(args, n):
    """small if the run shows about a million images, in views below 64 pixels, else imagenet"""
    # Its maps are larger, so a step of a MobileNet takes two to three times as long, which pays in
    # long runs. (900,000, since an epoch drops its last incomplete batch.)
    return "small" if args.steps * args.batch > 900_000 and args.size < 64 else "imagenet"

def pick_quick_lr(args, n):
    """0.8 T for 256 images"""
    # a loss with 1 / T in it has gradients with 1 / T in them
    return round(0.8 * args.temp * args.batch / 256, 5)

def pick_muon(args, n):
    """0.02, in runs above 1,950 steps less, as 1 / sqrt(steps)"""
    # a long run has time for small steps, and ends higher with them
    return round(0.02 * min(1, 1950 / args.steps) ** 0.5, 4)

def pick_lr(args, n):
    """0.03 for 256 images"""
    return round(0.03 * args.batch / 256, 5)

def pick_warmup(args, n):
    """a twentieth of the run; none in runs of up to 5,000 steps"""
    # it helps 40 epochs of CIFAR-10, but not 16: see assets/results.md
    return round(args.steps / epoch_steps(args, n) / 20, 4) if args.steps > 5000 else 0.0

def pick_crop(args, n):
    """0.2 1; in runs under 2,000 steps the 0.2 grows up to 0.35"""
    # a short run has no time to learn what two small crops share
    return [round(min(0.35, max(0.2, 400 / args.steps)), 3), 1.0]

def pick_momentum(args, n):
    """1 - 200 / steps, 0.8 to 0.999"""
    # in a short run a slow key encoder would never catch up. This gives 0.99 at the length of
    # MoCo's CIFAR-10 notebook, and 0.999 at that of its ImageNet runs
    return round(min(0.999, max(0.8, 1 - 200 / args.steps)), 4)

def pick_quick_queue(args, n):
    """two batches"""
    # in runs of some thousand steps, the older keys of a longer queue cost more than they bring
    return min(2 * args.batch, n)

def pick_queue(args, n):
    """a tenth of the images, no keys staler than MoCo's, but two batches at least"""
    # MoCo's oldest keys are 256 steps old. Since then its key encoder, with m = 0.999, has moved by
    # 256 (1 - m) = 0.256 of the way to the query encoder. With another m, it does so in:
    steps = round(0.256 / max(1e-6, 1 - args.momentum), 3)
    longest = power_of_two(min(65536, n // 10, steps * args.batch))
    return max(pick_quick_queue(args, n), longest)

def pick_bn_splits(args, n):
    """8, or fewer, so that each has 64 images, but at least 2"""
    world = rank_world()[1]
    splits = min(8, args.batch // 2, max(2, args.batch // 64))
    return max(1, splits // world) * world  # as many on each process

def pick_knn_every(args, n):
    """1/5 of the run"""
    return max(1, args.epochs // 5)

def power_of_two(n):
    """The largest power of two that is at most n."""
    return 2 ** int(math.log2(max(1, n)))

# what argparse has to know of each kind of flag
TEXT = dict()
WHOLE = dict(type=positive)
FRACTION = dict(type=fraction)
NUMBER = dict(type=float)
SWITCH = dict(action=argparse.BooleanOptionalAction)

# In the order in which rules pick: name, kind, value in the recipe moco-v2 or the rule that picks
# it, help.
FLAGS = [
    ("data", TEXT, "letters", "letters, cifar10, cifar100, stl10, or a folder"),
    ("root", TEXT, "data", "folder of downloaded and decoded data sets"),
    ("size", WHOLE, None, "side of a view [letters: 32; a folder: its median side, within 32 to "
     "224, on a CPU 32 to 64; other sets: their own]"),
    ("arch", dict(choices=models.ARCHS), "mobilenetv3", "the backbone"),
    ("head", dict(choices=models.HEADS), "simple", "the projection head"),
    ("dim", WHOLE, 128, "width C of the embedding"),
    ("init", TEXT, None, "start from the backbone of this checkpoint [random weights]"),
    ("zero_init", SWITCH, False, "blocks start as the identity (Goyal 2017)"),
    ("batch", WHOLE, pick_batch, "images a step, over all processes"),
    ("epochs", WHOLE, pick_epochs, "passes over the images"),
    ("steps", WHOLE, pick_steps, "length of the run in steps, instead of --epochs"),
    ("stem", dict(choices=models.STEMS), pick_stem, "first layers of the backbone"),
    ("temp", NUMBER, 0.2, "temperature T"),
    ("momentum", FRACTION, pick_momentum, "m of the key encoder"),
    ("queue", WHOLE, pick_queue, "number K of keys"),
    ("bn_splits", WHOLE, pick_bn_splits, "parts of the keys for BatchNorm"),
    ("weak_keys", SWITCH, False, "keys are of views only cropped and flipped (Wang 2022), until "
     "--target makes them harder"),
    ("crop", dict(type=fraction, nargs=2), [0.2, 1.0], "smallest and largest area of a crop, "
     "before --target makes them harder"),
    ("target", FRACTION, 1.0, "instance accuracy above which crops get smaller and weak keys get "
     "colors; 1: never"),
    ("jitter", FRACTION, 0.4, "of brightness, contrast and saturation"),
    ("hue", FRACTION, 0.1, "jitter of hue, in turns"),
    ("gray", FRACTION, 0.2, "probability of grayscale"),
    ("blur", FRACTION, 0.5, "probability of Gaussian blur"),
    ("lr", FRACTION, pick_lr, "learning rate of SGD"),
    ("muon", FRACTION, 0.0, "learning rate of convolutions with Muon (Jordan 2024); 0: SGD"),
    ("wd", FRACTION, 1e-4, "weight decay"),
    ("warmup", NUMBER, 0.0, "epochs in which learning rates rise linearly to their peaks"),
    ("knn_every", WHOLE, pick_knn_every, "epochs between looks at held-out images"),
    ("seed", dict(type=int), 0, "of weights, order and views"),
    ("device", TEXT, "auto", "cuda, cuda:1, mps or cpu; auto is the first there is"),
    ("precision", dict(choices=("auto", "float32", "bfloat16", "float16")), "auto",
     "of the networks; auto is bfloat16 or float16 on a GPU, bfloat16 for ResNets on a CPU that "
     "has it, else float32"),
]

# Chen et al. 2020; data, network and rules are ours
MOCO_V2 = {name: value for name, _, value, _ in FLAGS}

RECIPES = {  # the first one is the default
    # for minutes to hours: assets/results.md says what each part gives
    "quick": MOCO_V2 | dict(temp=0.1, weak_keys=True, zero_init=True, muon=pick_muon, wd=5e-4,
                            queue=pick_quick_queue, crop=pick_crop, target=0.6, lr=pick_quick_lr,
                            warmup=pick_warmup),
    "moco-v2": MOCO_V2,
    "small": MOCO_V2 | dict(temp=0.1, head="wide", jitter=0.8, hue=0.4, gray=0.5),  # Shi 2022
}

def parse(argv):
    """The flags typed, those of the run that goes on, and the recipe's values. What rules pick is
    still None."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = list(RECIPES)
    parser.add_argument("--recipe", choices=recipes,
                        help=f"a set of default values [{recipes[0]}; its values are in brackets]")
    parser.add_argument("--out", help="folder of the run [runs/DATA-ARCH-N]")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out, or begin it")
    for name, kind, _, text in FLAGS:
        value = RECIPES[recipes[0]][name]
        if callable(value):
            value = value.__doc__
        if value is not None:
            text += f" [{value}]"
        parser.add_argument(f"--{name.replace('_', '-')}", help=text.replace("%", "%%"), **kind)
    args = parser.parse_args(argv)  # what is not typed is None
    if args.steps is not None and args.epochs is not None:
        raise InputError("--steps, --epochs: give one of the two")
    args = add_saved_flags(args)
    args.recipe = args.recipe or recipes[0]
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None and not callable(value):
            setattr(args, name, value)
    return args

def apply_rules(args, n):
    """Let the recipe's rules pick the flags that are still open, for n images."""
    picked = []
    for name, rule in RECIPES[args.recipe].items():
        if getattr(args, name) is None and callable(rule):
            setattr(args, name, rule(args, n))
            picked.append(f"{name} {getattr(args, name)}")
    if picked:
        print0(f"--recipe {args.recipe}, for {n:,} images: {', '.join(picked)} (a typed flag wins, "
               "such as fewer --epochs for a first look)")

def add_saved_flags(args):
    """A run that goes on keeps its flags; only where and how it runs may be typed anew."""
    if args.resume and args.out is None:
        raise InputError("--resume: name the run's folder with --out")
    if args.out is None or not (Path(args.out) / "args.json").is_file():
        if args.resume and (Path(args.out) / "last.pt").exists():
            raise InputError(f"--out {args.out}: holds last.pt, but not the args.json of its run")
        return args
    if not args.resume:
        raise InputError(f"--out {args.out}: holds a run; go on with it (--resume), or name "
                         "another folder")
    saved = json.loads((Path(args.out) / "args.json").read_text())
    for name, value in vars(args).items():
        if name in ("out", "resume", "data", "root", "device", "precision", "knn_every"):
            saved[name] = value or saved.get(name)
        elif value not in (None, saved.get(name)):
            raise InputError(f"--{name.replace('_', '-')} {value}: the run in {args.out} has "
                             f"{saved.get(name)}; leave the flag out, or begin another run")
    return argparse.Namespace(**(vars(args) | saved))

def check(args, images):
    """Refuse what cannot work, in one line that says how to fix it."""
    n = len(images)
    world = rank_world()[1]
    if getattr(args, "fingerprint", images.fingerprint) != images.fingerprint:
        raise InputError(f"--data {args.data}: the run in {args.out} began with other images; put "
                         "them back, or begin another run (--init takes its weights)")
    if n < max(5, 2 * world):
        raise InputError(f"--data {args.data}: {n} images are too few to learn from; add some")
    rules = [  # flag, whether it can work, what it must be
        ("batch", 2 * world <= args.batch <= n and args.batch % world == 0,
         f"from {2 * world} to the {n} images there are, and a multiple of {world} processes"),
        ("queue", args.batch <= args.queue <= n,
         f"from the {args.batch} keys of a step to the {n} images there are"),
        ("bn_splits", args.bn_splits % world == 0 and 2 * args.bn_splits <= args.batch,
         f"a multiple of {world} processes, and leave parts of 2 or more of --batch {args.batch}"),
        ("crop", args.crop[0] <= args.crop[1], "the smaller area, then the larger one"),
        # below 0.03, float32 could not hold the weight of an own key in the softmax
        ("temp", 0.03 <= args.temp < math.inf, "0.03 or more")]
    for name, can_work, wanted in rules:
        if not can_work:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {wanted}")

if __name__ == "__main__":
    run(main)
