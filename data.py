"""Images in, two views out.

    train, test, size = load("fractals", seed=0)           # or cifar10, cifar100, stl10, caltech101, or any folder of images
    rows, u, perm = schedule(len(train), batch=64, seed=0, step=0)
    views = augment(train.pixels[rows], u[0], size)        # (64, 3, size, size), normalized, channels_last

A data set that fits is decoded once into one uint8 tensor on the device and never touched by a worker again; a
larger one is streamed. Every random number is drawn by `schedule` from (seed, epoch, step) on the CPU, so the same
seed gives the same views on every device, on any number of processes, and after a restart.
"""
import ctypes
import math
import os
import sys
import time
import zlib
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from models import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as everywhere, so that weights can be exchanged


def rank_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start(name):
    """The device `name` (auto: the first there is), and under torchrun this process's one and its process group."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if name == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc gives large tensors back to the kernel, which clears their pages at the next use: at 224 pixels half of a step.
        libc.mallopt(-4, 0), libc.mallopt(-1, -1)  # M_MMAP_MAX: none apart; M_TRIM_THRESHOLD: keep what was freed
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def gather(x):
    """The rows of all processes' `x`, which have one shape, in the order of the processes."""
    if not dist.is_initialized():
        return x
    out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


def save(path, content, keep=None):
    """Write a text or a torch file under a temporary name, then rename it: a reader, and a machine that dies, finds the old
    file or the new one, never half a file. The old one is kept as `keep`. Raises OSError if it can't be written."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch calls a full disk by many names
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written; is the disk full? ({str(error).splitlines()[0]})") from None
    if keep and Path(path).exists():
        os.replace(path, keep)
    os.replace(temporary, path)


def seeded(*key):
    """A CPU generator that is a function of `key`; torch uses 32 bits of a seed, so the key is hashed to 32."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


class Progress:
    """One live line on a terminal, else a plain line every 20 seconds; the first process speaks for all."""

    def __init__(self, every=20):
        self.live, self.last = sys.stdout.isatty(), time.time()
        self.every = 0.1 if self.live else every

    def __call__(self, line, end=False):
        """Show `line()` (made only when it is shown) if it is time to, or `end` the live line with it."""
        if rank_world()[0] == 0 and (end or time.time() - self.last > self.every):
            self.last = time.time()
            print(f"\r\033[K{line()}" if self.live else line(), end="" if self.live and not end else "\n", flush=True)


# ------------------------------------------------------------------------------------------ the embedded data set

def fractals(n, seed, size=32, classes=64, points=1600):
    """`n` drawings of `classes` iterated function systems (Barnsley 1988): images (n, size, size, 3) uint8, labels (n,).

    A class is a system of 2 to 4 contractive affine maps; the systems are the same for every seed. An image is its
    class's system a little perturbed, in its own pose, zoom, place and light, mirrored or not, in one ink on one paper: if images
    differed in color, that would be the cheapest way to tell them apart, and all that contrastive learning learned; and
    the paper is black, since jitter of a bright one would drown a random network's view of the drawing.
    The chaos game draws all images at once: 16 points of each jump along randomly chosen maps.
    """
    def turn(t):
        return np.stack([np.cos(t), -np.sin(t), np.sin(t), np.cos(t)], -1).reshape(*t.shape, 2, 2).astype(np.float32)

    def play(A, b, p, rng, count):  # A (N, 4, 2, 2), b (N, 4, 2), p (N, 4): cumulative probabilities of the maps
        x, rows, path = np.zeros((len(A), 16, 2), np.float32), np.arange(len(A))[:, None], []
        for step in range(count // 16 + 10):  # the first 10 jumps only lead onto the attractor
            k = (rng.random((len(A), 16, 1), np.float32) > p[:, None]).sum(2)
            x = (A[rows, k] * x[:, :, None]).sum(3) + b[rows, k]
            path.append(x)
        return np.concatenate(path[10:], 1)

    def count(x, side):  # points in the unit square (N, P, 2) -> hits of each cell (N, side, side)
        cell = np.floor(x * side).astype(np.int64)
        index = (np.arange(len(x))[:, None] * side + cell[..., 1]) * side + cell[..., 0]
        inside = ((cell >= 0) & (cell < side)).all(2)
        return np.bincount(index[inside], minlength=len(x) * side * side).reshape(len(x), side, side)

    rng, found = np.random.default_rng(1988), []
    while sum(map(len, found)) < classes:  # draw systems; keep those that are neither sparse, nor solid, nor a line
        s = rng.uniform(0.2, 0.85, (512, 2, 4)).astype(np.float32)
        A = turn(rng.uniform(-np.pi, np.pi, (512, 4))) * s[:, 0, :, None, None]
        A[..., 1] *= (s[:, 1] / s[:, 0])[..., None]
        A = A @ turn(rng.uniform(-np.pi, np.pi, (512, 4)))
        b = rng.uniform(-1, 1, (512, 4, 2)).astype(np.float32)
        p = np.where(np.arange(4) < rng.integers(2, 5, (512, 1)), s.prod(1), 0).cumsum(1)
        p /= p[:, -1:]
        x = play(A, b, p, rng, points)
        low, high = np.percentile(x, (2, 98), axis=1).astype(np.float32)
        middle, extent = (low + high) / 2, (high - low).max(1)
        fill = (count((x - middle[:, None]) / extent[:, None, None] * 0.9 + 0.5, 32) > 0).mean((1, 2))
        good = (fill > 0.2) & (fill < 0.5) & ((high - low).min(1) > 0.4 * extent)
        found.append([np.concatenate([v.reshape(512, -1) for v in (A, b, p, middle, extent)], 1)[good]][0])
    table = np.concatenate(found)[:classes]

    rng, labels = np.random.default_rng([1989, seed]), np.arange(n) % classes
    A, b, p, middle, extent = np.split(table[labels], [16, 24, 28, 30], 1)
    A = A.reshape(n, 4, 2, 2) + rng.normal(0, 0.02, (n, 4, 2, 2)).astype(np.float32)
    A *= np.minimum(1, 0.9 / np.linalg.norm(A, 2, (2, 3), keepdims=True))  # stay contractive
    b = b.reshape(n, 4, 2) + rng.normal(0, 0.02, (n, 4, 2)).astype(np.float32)
    x = (play(A, b, p, rng, points) - middle[:, None]) / extent[:, None]
    x = x @ turn(rng.uniform(-0.35, 0.35, n)) * rng.uniform(0.6, 1.0, (n, 1, 1)) + rng.uniform(0.32, 0.68, (n, 1, 2))
    x[..., 0] = np.where(rng.random((n, 1)) < 0.5, x[..., 0], 1 - x[..., 0])
    hits = count(x, 2 * size)  # twice the resolution, so that the edges come out smooth
    ink = (1 - np.exp(-2 * size * size * hits / points)).reshape(n, size, 2, size, 2).mean((2, 4))[..., None]
    light = rng.uniform(0.6, 1.0, (n, 1, 1, 1))
    picture = (np.array([0.04, 0.05, 0.08]) * (1 - ink) + np.array([0.55, 0.95, 0.65]) * ink) * light
    return (255 * picture.clip(0, 1)).astype(np.uint8), labels


# ------------------------------------------------------------------------------------------------ files of images

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif", ".avif"}
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Image.Transpose that undoes it


def to_rgb(image):
    """Any PIL image as RGB: high bit depths are scaled instead of clipped, transparency shows white paper."""
    if image.mode[0] in "IF":  # 16- and 32-bit integers, floats
        gray = np.asarray(image, np.float32)
        top = gray.max()
        return Image.fromarray((gray * (255 if top <= 1 else 1 if top <= 255 else 1 / 257)).clip(0, 255)
                               .astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decode(path, *cuts):
    """Read a file and cut it: for each of `cuts`, (size, u, scale), the random crops of area `scale` that the uniforms
    u (V, 22) say, or the center square if u is None: a list of (V, 3, size, size) uint8.

    Resampling is PIL's antialiased bilinear. A JPEG is decoded at 1/2, 1/4 or 1/8 where the crops' resolution allows.
    A rotation noted by the camera turns the small crops, not the large picture. Raises whatever PIL raises.
    """
    with Image.open(path) as image:
        w, h = image.size
        side = min(h, w)
        square = [((h - side) / 2, (w - side) / 2, side, side)]
        boxes = [square if u is None else crop_boxes(u, h, w, scale).tolist() for _, u, scale in cuts]
        shrink = min(min(box[2:]) / size for (size, _, _), group in zip(cuts, boxes) for box in group)
        image.draft(None, (int(w / max(shrink, 1)), int(h / max(shrink, 1))))
        fy, fx = image.size[1] / h, image.size[0] / w
        turn = UPRIGHT.get(image.getexif().get(0x0112))
        image, found = to_rgb(image), []
        for (size, _, _), group in zip(cuts, boxes):
            crops = [image.resize((size, size), Image.BILINEAR, (x * fx, y * fy, (x + cw) * fx, (y + ch) * fy), reducing_gap=2)
                     for y, x, ch, cw in group]
            crops = crops if turn is None else [crop.transpose(turn) for crop in crops]
            found.append(torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2))
        return found


def attempt(path, *cuts):
    """`decode`, or None for a file that is no readable image."""
    try:
        return decode(path, *cuts)
    except Exception:  # PIL raises anything from OSError to struct.error on damaged files
        return None


class Stream(torch.utils.data.Dataset):
    """Decodes in the loader's workers: an item is a row and the uniforms of its views (V, columns), which `cuts`, (number,
    size, scale), share out; or a row alone for its center square -> crops of each cut, and the row if unreadable, else -1."""

    def __init__(self, paths, cuts):
        self.paths, self.cuts = paths, cuts

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        row, u = item if isinstance(item, tuple) else (item, None)
        groups = [None] if u is None else u[:sum(n for n, _, _ in self.cuts)].split([n for n, _, _ in self.cuts])
        cuts = [(size, group, scale) for (_, size, scale), group in zip(self.cuts, groups)]
        for i in range(row, row + len(self.paths)):  # an unreadable file is replaced by the next one that is readable
            crops = attempt(self.paths[i % len(self.paths)], *cuts)
            if crops is not None:
                return crops, row if i > row else -1
        raise InputError("no readable image is left")


def scan(folder):
    """The image files under `folder`, sorted, and the first folder below `folder` in which each lies ("" if none)."""
    found, seen = [], {os.path.realpath(folder)}
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if os.path.realpath(os.path.join(here, f)) not in seen)  # links may form a loop
        seen |= {os.path.realpath(os.path.join(here, f)) for f in folders}
        inner = Path(here).relative_to(folder).parts
        found += [(os.path.join(here, f), inner[0] if inner else "") for f in sorted(files)
                  if os.path.splitext(f)[1].lower() in EXTENSIONS and not f.startswith(".")]
    return found


@dataclass
class Images:
    """A set of images: `labels` (N,) int64 with -1 for unknown, and `pixels` (N, 3, R, R) uint8, or None and `paths`."""
    labels: torch.Tensor
    classes: list
    pixels: torch.Tensor = None
    paths: list = None
    bad: set = field(default_factory=set)  # rows of unreadable files

    def __len__(self):
        return len(self.labels)

    def readable(self):
        """The rows whose files have not turned out to be unreadable."""
        return torch.tensor([row for row in range(len(self)) if row not in self.bad])

    def leave_out(self, rows):
        """Note that the files of `rows` are unreadable; their labels become unknown (-1)."""
        self.bad |= set(rows)
        self.labels[list(rows)] = -1

    def squares(self, rows, size):
        """The center squares of `rows`, (n, 3, R, R) uint8 on the CPU."""
        if self.paths is None:
            return self.pixels[rows.to(self.pixels.device)].cpu()
        return torch.cat([Stream(self.paths, [(1, size, None)])[row][0][0] for row in rows.tolist()])

    def stream(self, items, device, workers, cuts):
        """For each of `items`, a list of what `Stream` takes: for each of `cuts` uint8 crops (n, V, 3, size, size).

        A file that turns out to be unreadable is named once, and its label becomes unknown (-1).
        """
        loader = torch.utils.data.DataLoader(
            Stream(self.paths, cuts), batch_sampler=items, num_workers=workers, pin_memory=device.type == "cuda",
            generator=seeded("workers"))  # else it would draw from the numbers that dropout draws from
        for crops, unreadable in loader:
            new = {row for row in unreadable.tolist() if row >= 0} - self.bad
            report_unreadable([self.paths[row] for row in sorted(new)])
            self.leave_out(new)
            yield [c.to(device, non_blocking=True) for c in crops]


def load_folder(folder, size, device, stream, workers, per_class=None):
    """Train and held-out Images of a folder: train/CLASS/* with val/ or test/, CLASS/*, or images without labels.

    Without val/ or test/ every tenth labelled image is held out, or all but `per_class` of each class; without labels
    nothing is.
    """
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder, and not one of fractals, cifar10, cifar100, stl10, caltech101")
    parts = [folder / "train"] if (folder / "train").is_dir() else [folder]
    parts += [folder / held for held in ("val", "test") if parts[0] != folder and (folder / held).is_dir()][:1]
    found = [scan(part) for part in parts]
    if not found[0]:
        raise InputError(f"--data {parts[0]}: no image in it (looked for {' '.join(sorted(EXTENSIONS))})")
    classes = sorted({name for _, name in found[0]})
    if "" in classes or len(classes) < 2:  # images beside the folders, or a single folder: no labels
        classes, found = [], found[:1]
    elif per_class:
        classes = [name for name in classes if name != "BACKGROUND_Google"]  # Caltech-101's, which torchvision leaves out, too
        groups = [[f for f in found[0] if f[1] == name] for name in classes]
        orders = [torch.randperm(len(g), generator=seeded("split", name)).tolist() for g, name in zip(groups, classes)]
        found = [[g[i] for g, order in zip(groups, orders) for i in sorted(order[part])]
                 for part in (slice(per_class), slice(per_class, None))]
    elif len(found) == 1:
        found = [[f for i, f in enumerate(found[0]) if i % 10 != 9], found[0][9::10]]
    elif {name for _, name in found[1]} - set(classes):
        extra = sorted({name for _, name in found[1]} - set(classes))
        raise InputError(f"--data {parts[1]}: class {extra[0]} is not in {parts[0]}")

    sides = []  # the resolution to work at, and to keep in memory, comes from a sample of the headers
    for path, _ in found[0][::max(1, len(found[0]) // 200)]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except Exception:
            continue
    side = int(np.median(sides)) if sides else 32
    size = size or min(224, max(32, side // 32 * 32))
    keep = min(max(size, side), size * 3 // 2)  # some reserve, so that a crop of the resident copy is seldom enlarged
    needed, free = sum(map(len, found)) * 3 * keep * keep, free_memory(device)
    if stream == "auto":
        stream = "on" if needed > free / 2 else "off"
        say(f"{needed / 1e9:.2f} GB of pixels at {keep}x{keep}, {free / 1e9:.1f} GB free: "
            + ("streamed from disk" if stream == "on" else "decoded once, kept in memory"))
    index = {name: i for i, name in enumerate(classes)}
    sets = []
    for files in found:
        labels = torch.tensor([index.get(name, -1) for _, name in files])
        images = Images(labels, classes, paths=[path for path, _ in files])
        sets.append(images if stream == "on" else decode_all(images, keep, device, workers))
    if len(sets[0]) == 0:
        raise InputError(f"--data {folder}: none of its {len(found[0])} image files is readable")
    return sets[0], sets[1] if len(sets) > 1 else None, size


def free_memory(device):
    """Bytes free for this process on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def decode_all(images, side, device, workers):
    """The same Images with `pixels` (N, 3, side, side) on the device; unreadable files are left out and named.

    Each process decodes its share; the sum over processes of what is zero elsewhere is the whole.
    """
    rank, world = rank_world()
    pixels = torch.zeros(len(images), 3, side, side, dtype=torch.uint8)
    good = torch.zeros(len(images), dtype=torch.uint8)
    mine, progress, start = range(rank, len(images), world), Progress(), time.time()
    with ThreadPool(max(1, workers)) as pool:  # PIL decodes outside of Python's lock
        for done, (i, crop) in enumerate(zip(mine, pool.imap(lambda i: attempt(images.paths[i], (side, None, None)), mine)), 1):
            if crop is not None:
                pixels[i], good[i] = crop[0][0], 1
            progress(lambda: f"decoding {done}/{len(mine)} images, {done / (time.time() - start):.0f} a second")
    pixels, good = pixels.to(device), good.to(device)
    if world > 1:
        dist.all_reduce(pixels), dist.all_reduce(good)
    good = good.cpu().bool()
    if rank == 0:
        report_unreadable([path for path, fine in zip(images.paths, good.tolist()) if not fine])
    return Images(images.labels[good], images.classes, pixels if good.all() else pixels[good.to(device)])


def report_unreadable(paths):
    if paths:
        print(f"skipped {len(paths)} unreadable file{'s' * (len(paths) > 1)}: {', '.join(map(str, paths[:5]))}"
            + (f" and {len(paths) - 5} more" if len(paths) > 5 else ""), flush=True)  # by the process that met them


def say(line):
    if rank_world()[0] == 0:
        print(line, flush=True)


def load(name, root="data", size=None, seed=0, device="cpu", stream="auto", workers=2):
    """(train, test, size) for --data `name`; `test` is None without labels, `size` is picked from the images if None."""
    device = torch.device(device)
    if name == "fractals":
        start, size = time.time(), size or 32
        arrays = [(*fractals(n, split, size), [f"fractal {i}" for i in range(64)]) for split, n in enumerate((5120, 1280))]
        say(f"drew 5,120 + 1,280 fractals of 64 kinds in {time.time() - start:.1f} s")
    elif name in ("cifar10", "cifar100", "stl10"):
        from torchvision import datasets
        kind = getattr(datasets, name.upper())
        splits = [dict(split="train+unlabeled"), dict(split="test")] if name == "stl10" else [dict(train=True), dict(train=False)]
        if rank_world()[0] == 0:  # one process downloads, the others wait and then find the files
            [kind(root, download=True, **split) for split in splits]
        if dist.is_initialized():
            dist.barrier()
        arrays = []
        for split in splits:
            part = kind(root, **split)
            pixels = part.data if name != "stl10" else part.data.transpose(0, 2, 3, 1)
            arrays.append((pixels, part.labels if name == "stl10" else part.targets, list(part.classes)))
        size = size or arrays[0][0].shape[1]
    elif name == "caltech101":
        folder = Path(root) / "caltech101/101_ObjectCategories"
        if rank_world()[0] == 0:
            from torchvision import datasets
            datasets.Caltech101(root, download=True)
        if dist.is_initialized():
            dist.barrier()
        return load_folder(folder, size, device, stream, workers, per_class=30)  # the split that is usually reported
    else:
        return load_folder(Path(name), size, device, stream, workers)
    train, test = (Images(torch.as_tensor(y).long(), classes, torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().to(device))
                   for x, y, classes in arrays)
    return train, test, size


# ------------------------------------------------------------------------------- augmentation, batched on the device

COLUMNS, CELLS = 32, 256  # uniform numbers a view needs; hide-and-seek's grid needs 16 x 16 more


def crop_boxes(u, height, width, scale):
    """Random resized crop (Szegedy et al. 2015): boxes (n, 4) of top, left, height, width for uniforms u (n, >= 22).

    Ten attempts at an area in `scale` and an aspect ratio in 3/4..4/3; the first that fits counts, else the largest
    centered box within those ratios: torchvision's RandomResizedCrop, all images at once.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, :10])
    ratio = torch.exp((2 * u[:, 10:20] - 1) * math.log(4 / 3))
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h, fits = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], fits.any(1)
    h = torch.where(fits, h, min(height, max(1, round(width * 4 / 3))))
    w = torch.where(fits, w, min(width, max(1, round(height * 4 / 3))))
    top = torch.where(fits, (u[:, 20] * (height - h + 1)).floor(), ((height - h) / 2).floor())
    left = torch.where(fits, (u[:, 21] * (width - w + 1)).floor(), ((width - w) / 2).floor())
    return torch.stack([top, left, h, w], 1)


def resampling(start, length, source, size, flip=None, sigma=None):
    """Matrices (n, size, source) that cut `length` pixels from `start`, resize, flip (n,) and blur (n,) one axis.

    Antialiased bilinear resizing is a triangle filter as wide as the shrinkage; a Gaussian blur of `sigma` output
    pixels is a softmax over squared distances, which at the borders renormalizes where others reflect. Both are
    linear, so one product of an image with its row and its column matrix does them all.
    """
    start, length = start[:, None, None], length[:, None, None]
    i, j = torch.arange(size, device=start.device), torch.arange(source, device=start.device)
    stride = length / size
    center = start + (i[:, None] + 0.5) * stride - 0.5
    if flip is not None:
        center = torch.where(flip[:, None, None], center.flip(1), center)
    matrix = (1 - (center - j).abs() / stride.clamp(min=1)).clamp_(min=0) * ((j >= start) & (j < start + length))
    matrix /= matrix.sum(2, keepdim=True)
    if sigma is not None:
        power = (i[:, None] - i) ** 2 / (2 * sigma[:, None, None].clamp(min=1e-3) ** 2)
        blur = (-power).masked_fill(power > 20, -math.inf).softmax(2)  # a tail of denormals would be slow, not sharper
        matrix = blur @ matrix
    return matrix


YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])  # of RGB


def color_matrix(brightness, contrast, saturation, hue):
    """Color jitter as one matrix: (n,) factors and hue angle in turns -> (n, 3, 3) on a pixel and (n, 3, 3) on the
    view's mean pixel; the jittered pixel is their sum.

    In YIQ, brightness scales everything, contrast moves luma towards its mean and scales chroma, saturation scales
    chroma and hue turns it: all four commute, so torchvision's random order has nothing to choose (but for its
    clipping between the steps). Brightness, contrast and saturation (0: grayscale) are torchvision's; hue turns
    chroma and keeps luma, as TensorFlow's adjust_hsv_in_yiq and DALI do, where torchvision turns HSV's hue and keeps
    value.
    """
    turn, luma, chroma = 2 * math.pi * hue, brightness * contrast, brightness * contrast * saturation
    on_pixel = torch.zeros(len(turn), 3, 3, device=turn.device)
    on_pixel[:, 0, 0] = luma
    on_pixel[:, 1, 1] = on_pixel[:, 2, 2] = chroma * turn.cos()
    on_pixel[:, 2, 1] = chroma * turn.sin()
    on_pixel[:, 1, 2] = -on_pixel[:, 2, 1]
    on_mean = torch.zeros_like(on_pixel)
    on_mean[:, 0, 0] = brightness - luma
    to_yiq = YIQ.to(turn.device)
    to_rgb = torch.linalg.inv(YIQ).to(turn.device)
    return to_rgb @ on_pixel @ to_yiq, to_rgb @ on_mean @ to_yiq


def augment(images, u, size, crop=(0.2, 1.0), jitter=0.4, hue=0.1, gray=0.2, blur=0.5):
    """MoCo v2's augmentation of a batch (Chen et al. 2020b), a function of images (n, 3, H, W) uint8 and uniforms u.

    Random resized crop of area `crop` (None: `images` are crops already), flip p 0.5; p 0.8 color jitter of brightness,
    contrast, saturation in 1 +- `jitter` and hue in +- `hue` turns; grayscale p `gray`; Gaussian blur p `blur` with
    sigma 0.1..2.0 pixels at 224, scaled with `size`; and, where u has its columns, hide-and-seek. u is (n, COLUMNS) or
    (n, COLUMNS + CELLS) in [0, 1). Returns (n, 3, size, size) float32, normalized by MEAN and STD, channels_last.

    All but clipping and hiding is linear: rows, columns, color. (So blur comes before clipping here, not after.)
    """
    n, _, height, width = images.shape
    apply, b, c, s, h, gray_u, blur_u, sigma, level = u[:, 23:COLUMNS].T
    box = crop_boxes(u, height, width, crop) if crop else u.new_tensor([0, 0, height, width]).expand(n, 4)
    sigma = torch.where(blur_u < blur, (0.1 + 1.9 * sigma) * size / 224, 0) if blur else None
    rows = resampling(box[:, 0], box[:, 2], height, size, None, sigma)
    columns = resampling(box[:, 1], box[:, 3], width, size, u[:, 22] < 0.5, sigma)
    x = images.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)  # (n, H, 3, W)
    x = rows @ x.view(n, height, 3 * width)
    x = x.view(n, size * 3, width) @ columns.mT
    x = x.view(n, size, 3, size).transpose(1, 2).reshape(n, 3, size * size)

    strength = jitter * (apply < 0.8)  # 0 leaves the image as it is
    factor = [1 + strength * (2 * v - 1) if jitter <= 1 else (1 - strength).clamp(min=0) * (1 - v) + (1 + strength) * v
              for v in (b, c, s)]
    on_pixel, on_mean = color_matrix(factor[0], factor[1], torch.where(gray_u < gray, 0, factor[2]),
                                     hue * (apply < 0.8) * (2 * h - 1))
    mean, std = x.new_tensor(MEAN)[:, None], x.new_tensor(STD)[:, None]
    shift = on_mean @ x.mean(2, keepdim=True) / 255 - mean  # normalizing is linear in color, too
    x = torch.baddbmm(shift / std, on_pixel / (255 * std), x)
    x = x.clamp_(-mean / std, (1 - mean) / std)
    x = x.view(n, 3, size, size).contiguous(memory_format=torch.channels_last)
    return hide_and_seek(x, level, u[:, COLUMNS:].view(n, 16, 16)) if u.shape[1] > COLUMNS else x


def hide_and_seek(x, level, cells):
    """Hide cells of x (n, 3, S, S), normalized, with the mean (Singh & Lee 2017, as in Shi et al. 2022).

    `level` (n,) picks a grid of cells of 1/16, 1/8, 1/4 of the side, or none; a cell with `cells` (n, 16, 16) < 0.5 is
    hidden.
    """
    n, size = len(x), x.shape[-1]
    grid = torch.tensor([16, 8, 4, 0], device=x.device)[(4 * level).long()]
    cell = torch.arange(size, device=x.device) * grid[:, None] // size  # (n, S): the row, and the column, of a pixel
    hidden = cells[torch.arange(n, device=x.device)[:, None, None], cell[:, :, None], cell[:, None, :]] < 0.5
    return x.masked_fill((hidden & (grid > 0)[:, None, None])[:, None], 0)


def center(images, size):
    """Evaluation's view: images (n, 3, R, R) uint8 -> (n, 3, size, size) normalized, channels_last."""
    x = images.float()
    if x.shape[-1] != size:
        x = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
    mean, std = x.new_tensor(MEAN)[:, None, None], x.new_tensor(STD)[:, None, None]
    return ((x / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------- batches

def schedule(n, batch, seed, step, hide=False, local=0):
    """What happens at `step`, the same on every process and device, as a function of its arguments.

    Returns rows (batch,): which of the n images; u (2 + local, batch, columns): the uniforms of their query and key views
    and of `local` more; and perm (batch,): the order in which the key encoder sees them (batch shuffling).
    """
    epoch, i = divmod(step, n // batch)
    if schedule.order[0] != (n, seed, epoch):
        schedule.order = (n, seed, epoch), torch.randperm(n, generator=seeded(seed, "epoch", epoch))
    draw = seeded(seed, "step", step)
    u = torch.rand(2, batch, COLUMNS + CELLS * hide, generator=draw)
    perm = torch.randperm(batch, generator=draw)
    u = torch.cat([u, torch.rand(local, *u.shape[1:], generator=draw)]) if local else u
    return schedule.order[1][i * batch:(i + 1) * batch], u, perm


schedule.order = None, None
