"""Images in, two views out.

    train, test, size = load("fractals")             # or cifar10, cifar100, stl10, or any folder
    rows, u, order = schedule(len(train), batch=64, seed=0, step=0)
    pixels, shapes = train.put(*train.fetch(rows))
    views = augment(pixels, u[0], size, shapes=shapes)  # (64, 3, size, size), normalized

A data set is one uint8 tensor: on the device if it fits, else a memory-mapped file. A folder is
decoded into such a file once. All random numbers of a step are drawn by `schedule` from (seed,
step) on the CPU: a seed gives the same views on any device, on any number of processes, and after a
restart.

Read it from top to bottom: augmentation, the schedule, data sets, then processes and files.
"""
import ctypes
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  (see start)
from PIL import Image, ImageOps

# ------------------ 1. augmentation: a function of a batch of images and of uniform random numbers

# ImageNet's mean and deviation, as everywhere, so that weights can be exchanged
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
YIQ = [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]  # of RGB

# A view needs 32 uniform numbers. What each is for: ten attempts at a crop, then one number each.
AREA = slice(0, 10)
RATIO = slice(10, 20)
(TOP, LEFT, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SIGMA,
 HIDE) = range(20, 32)
COLUMNS = 32
CELLS = 16 * 16  # hide-and-seek needs one more for each cell of its finest grid

def augment(images, u, size, crop=(0.2, 1.0), jitter=0.4, hue=0.1, gray=0.2, blur=0.5, shapes=None):
    """MoCo v2's augmentation (Chen et al. 2020) of images (n, 3, S, S) uint8.

    Random resized crop of area `crop`; flip, p 0.5; with p 0.8 jitter of brightness, contrast and
    saturation within 1 +- `jitter` and of hue within +- `hue` turns; grayscale with p `gray`;
    Gaussian blur with p `blur` and sigma 0.1..2.0 pixels at 224, scaled with `size`. `u` (n,
    COLUMNS) holds the uniform numbers of each view; with CELLS columns more, hide-and-seek is the
    last step. `shapes` (n, 2) are the images' heights and widths before they were stored as
    squares. -> views (n, 3, size, size), normalized by MEAN and STD, channels_last.

    All but clipping and hiding is linear: a matrix on the rows, one on the columns, one on the
    colors. (So blur comes before clipping here, not after it.)
    """
    n, _, side, _ = images.shape
    if shapes is None:
        shapes = u.new_full((n, 2), side)
    box = crop_boxes(u, shapes[:, 0], shapes[:, 1], crop)
    sigma = None
    if blur > 0:
        sigma = torch.where(u[:, BLUR] < blur, (0.1 + 1.9 * u[:, SIGMA]) * size / 224, 0)
    x = cut(images, box, shapes, size, u[:, FLIP] < 0.5, sigma)

    jittered = (u[:, JITTER] < 0.8).float()
    lowest = (1 - jitter * jittered).clamp(min=0)
    highest = 1 + jitter * jittered
    saturation = torch.lerp(lowest, highest, u[:, SATURATION])
    on_pixel, on_mean = color_matrix(
        brightness=torch.lerp(lowest, highest, u[:, BRIGHTNESS]),
        contrast=torch.lerp(lowest, highest, u[:, CONTRAST]),
        saturation=torch.where(u[:, GRAY] < gray, 0, saturation),
        hue=hue * jittered * (2 * u[:, HUE] - 1))

    mean, std, _, _ = constants(x.device)
    shift = on_mean @ x.mean(2, keepdim=True) / 255 - mean  # normalizing is linear in color, too
    x = torch.baddbmm(shift / std, on_pixel / (255 * std), x)
    x = x.clamp_(-mean / std, (1 - mean) / std)
    x = x.view(n, 3, size, size).contiguous(memory_format=torch.channels_last)
    if u.shape[1] > COLUMNS:
        x = hide_and_seek(x, u[:, HIDE], u[:, COLUMNS:].view(n, 16, 16))
    return x

def center(images, size, shapes=None):
    """Evaluation's view of images (n, 3, S, S) uint8: the center square, (n, 3, size, size)."""
    n, _, side, _ = images.shape
    if shapes is None:
        shapes = torch.full((n, 2), float(side), device=images.device)
    shortest = shapes.amin(1, keepdim=True).expand(n, 2)
    box = torch.cat([(shapes - shortest) / 2, shortest], dim=1)
    mean, std, _, _ = constants(images.device)
    x = (cut(images, box, shapes, size) / 255 - mean) / std
    return x.view(n, 3, size, size).contiguous(memory_format=torch.channels_last)

@cache
def constants(device):
    """Mean and deviation (3, 1), RGB -> YIQ and back (3, 3), on the device once."""
    yiq = torch.tensor(YIQ)
    mean = torch.tensor(MEAN)[:, None]
    std = torch.tensor(STD)[:, None]
    return mean.to(device), std.to(device), yiq.to(device), torch.linalg.inv(yiq).to(device)

def crop_boxes(u, heights, widths, scale):
    """Random resized crop (Szegedy et al. 2015) of images of `heights` and `widths` (n,).

    -> boxes (n, 4): top, left, height, width. Of ten attempts at an area in `scale` and an aspect
    ratio in 3/4..4/3 the first that fits counts, else the largest centered box within those ratios:
    torchvision's RandomResizedCrop, for all images at once.
    """
    area = (heights * widths)[:, None] * (scale[0] + (scale[1] - scale[0]) * u[:, AREA])
    ratio = torch.exp((2 * u[:, RATIO] - 1) * math.log(4 / 3))
    w = (area * ratio).sqrt().round()
    h = (area / ratio).sqrt().round()
    fits = (w > 0) & (h > 0) & (w <= widths[:, None]) & (h <= heights[:, None])
    first = fits.int().argmax(1, keepdim=True)
    any_fits = fits.any(1)
    largest_h = torch.minimum(heights, (widths * 4 / 3).round().clamp(min=1))
    largest_w = torch.minimum(widths, (heights * 4 / 3).round().clamp(min=1))
    h = torch.where(any_fits, h.gather(1, first)[:, 0], largest_h)
    w = torch.where(any_fits, w.gather(1, first)[:, 0], largest_w)
    top = torch.where(any_fits, u[:, TOP] * (heights - h + 1), (heights - h) / 2).floor()
    left = torch.where(any_fits, u[:, LEFT] * (widths - w + 1), (widths - w) / 2).floor()
    return torch.stack([top, left, h, w], 1)

def cut(images, box, shapes, size, flip=None, sigma=None):
    """A box (n, 4) of each image (n, 3, S, S), resized, flipped and blurred: (n, 3, size * size).

    A box counts the pixels of the original (`shapes`), of which the image is a resized copy.
    """
    n, _, side, _ = images.shape
    scale = side / shapes  # (n, 2): stored pixels per original pixel
    rows = resampling(box[:, 0] * scale[:, 0], box[:, 2] * scale[:, 0], side, size, None, sigma)
    columns = resampling(box[:, 1] * scale[:, 1], box[:, 3] * scale[:, 1], side, size, flip, sigma)
    x = images.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
    x = rows @ x.view(n, side, 3 * side)  # (n, size, 3 * side)
    x = x.view(n, size * 3, side) @ columns.mT  # (n, size * 3, size)
    return x.view(n, size, 3, size).transpose(1, 2).reshape(n, 3, size * size)

def resampling(start, length, source, size, flip=None, sigma=None):
    """Matrices (n, size, source) that cut `length` pixels from `start` out of an axis, resize, flip
    and blur it; start, length, flip and sigma are (n,).

    Antialiased bilinear resizing is a triangle filter as wide as the shrinkage. A Gaussian blur of
    `sigma` output pixels is a softmax over squared distances; at the borders it renormalizes.
    """
    start = start[:, None, None]
    length = length[:, None, None]
    i = torch.arange(size, device=start.device)
    j = torch.arange(source, device=start.device)
    stride = length / size
    middle = start + (i[:, None] + 0.5) * stride - 0.5  # of output i, in source pixels
    if flip is not None:
        middle = torch.where(flip[:, None, None], middle.flip(1), middle)
    in_box = (j + 1 > start) & (j < start + length)  # also pixels that the box cuts: no empty row
    matrix = (1 - (middle - j).abs() / stride.clamp(min=1)).clamp_(min=0) * in_box
    matrix /= matrix.sum(2, keepdim=True)
    if sigma is not None:
        exponent = (i[:, None] - i) ** 2 / (2 * sigma[:, None, None].clamp(min=1e-3) ** 2)
        exponent = exponent.masked_fill(exponent > 20, math.inf)  # denormals are slow, not sharper
        matrix = (-exponent).softmax(2) @ matrix
    return matrix

def color_matrix(brightness, contrast, saturation, hue):
    """Color jitter as a matrix on a pixel plus one on the view's mean pixel, (n, 3, 3) each.

    Arguments are (n,): factors, and turns for hue. In YIQ, brightness scales everything, contrast
    moves luma towards its mean and scales chroma, saturation scales chroma (0: grayscale), hue
    turns it. All four commute: torchvision's random order has nothing to choose (but for its
    clipping in between). Hue keeps luma, as DALI's and TensorFlow's in YIQ do; torchvision's keeps
    value.
    """
    luma = brightness * contrast
    chroma = luma * saturation
    angle = 2 * math.pi * hue
    on_pixel = torch.zeros(len(hue), 3, 3, device=hue.device)
    on_pixel[:, 0, 0] = luma
    on_pixel[:, 1, 1] = chroma * angle.cos()
    on_pixel[:, 1, 2] = -chroma * angle.sin()
    on_pixel[:, 2, 1] = chroma * angle.sin()
    on_pixel[:, 2, 2] = chroma * angle.cos()
    on_mean = torch.zeros_like(on_pixel)
    on_mean[:, 0, 0] = brightness - luma
    _, _, to_yiq, to_rgb = constants(hue.device)
    return to_rgb @ on_pixel @ to_yiq, to_rgb @ on_mean @ to_yiq

def hide_and_seek(x, level, cells):
    """Hide cells of x (n, 3, S, S) with the mean (Singh & Lee 2017, as in Shi et al. 2022).

    `level` (n,) picks a grid of cells of 1/16, 1/8 or 1/4 of the side, or none. A cell is hidden
    where `cells` (n, 16, 16) < 0.5.
    """
    n, _, _, side = x.shape
    choice = (4 * level).long()
    grid = torch.where(choice < 3, 16 >> choice, 0)[:, None]  # cells in a row: 16, 8, 4 or none
    cell = torch.arange(side, device=x.device) * grid // side  # (n, S): of each row, and column
    image = torch.arange(n, device=x.device)[:, None, None]
    hidden = cells[image, cell[:, :, None], cell[:, None, :]] < 0.5
    hidden &= grid[:, :, None] > 0
    return x.masked_fill(hidden[:, None], 0)

# --------------------------------------------------------- 2. the schedule: what happens at a step

def schedule(n, batch, seed, step, hide=False, local=0):
    """The random choices of a step, the same on every process and device.

    -> rows (batch,): which of the n images; u (2 + local, batch, COLUMNS or with `hide` COLUMNS +
    CELLS): the uniform numbers of their query views, key views and `local` more views; order
    (batch,): the shuffled order in which the key encoder sees the batch. A pass over the images
    drops the last incomplete batch.
    """
    epoch, i = divmod(step, n // batch)
    rows = order_of_epoch(n, seed, epoch)[i * batch:(i + 1) * batch]
    draw = seeded(seed, "step", step)
    columns = COLUMNS + CELLS if hide else COLUMNS
    u = torch.rand(2, batch, columns, generator=draw)
    order = torch.randperm(batch, generator=draw)
    if local > 0:
        u = torch.cat([u, torch.rand(local, batch, columns, generator=draw)])
    return rows, u, order

@lru_cache(maxsize=2)
def order_of_epoch(n, seed, epoch):
    return torch.randperm(n, generator=seeded(seed, "epoch", epoch))

def cosine(start, end, t):
    """From `start` at t = 0 to `end` at t = 1, along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * t))

def seeded(*key):
    """A CPU generator that is a function of `key`, hashed to 32 bits, as torch uses no more."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))

# ----------------------------------------------------------------------------------- 3. data sets

@dataclass
class Images:
    """A set of images, each stored whole as a square, whatever its aspect ratio was."""
    pixels: torch.Tensor  # (N, 3, S, S) uint8: on the device, or a memory-mapped file
    shapes: torch.Tensor  # (N, 2) float32: the heights and widths that the images had
    labels: torch.Tensor  # (N,) int64, -1 where unknown
    classes: list         # their names, empty without labels
    device: torch.device
    is_far: bool = False  # the device is no CPU, and the pixels are not on it

    def __len__(self):
        return len(self.labels)

    def fetch(self, rows):
        """What `put` needs of `rows` (n,), still on the CPU."""
        if self.is_far:
            return self.pixels[rows], self.shapes[rows]
        return rows, self.shapes[rows]

    def put(self, pixels_or_rows, shapes):
        """What `fetch` gave -> pixels (n, 3, S, S) and shapes (n, 2) on the device."""
        pixels = to_device(pixels_or_rows, self.device)
        if not self.is_far:
            pixels = self.pixels[pixels]
        return pixels, to_device(shapes, self.device)

def to_device(x, device):
    if device.type == "cuda":  # without waiting for it
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)

def load(name, root="data", size=None, keep=None, device=torch.device("cpu"), most=224):
    """--data `name` -> train Images; held-out Images, None without labels; the side of a view.

    A `size` of None is the images' own, for a folder at `most` so many pixels. `keep` is the side
    at which a folder's images are stored. Raises InputError for what is not there or cannot be
    read.
    """
    if name == "fractals":
        size = size or 32
        classes = [f"fractal {i}" for i in range(64)]
        sets = [(*fractals(5120, 0, size), classes), (*fractals(1280, 1, size), classes)]
    elif name in ("cifar10", "cifar100", "stl10"):
        sets = [torchvision_set(name, root, "train"), torchvision_set(name, root, "test")]
        size = size or sets[0][0].shape[-1]
    else:
        return load_folder(Path(name), Path(root), size, keep, device, most)
    images = []
    for pixels, labels, classes in sets:
        shapes = torch.full((len(labels), 2), float(pixels.shape[-1]))
        images.append(Images(pixels, shapes, torch.as_tensor(labels).long(), classes, device))
    return *move_to_device(images, device), size

def torchvision_set(name, root, split):
    """Pixels (N, 3, S, S), labels and class names of one of torchvision's data sets."""
    from torchvision import datasets
    kind = getattr(datasets, name.upper())
    flags = dict(train=split == "train")
    if name == "stl10":
        flags = dict(split=split.replace("train", "train+unlabeled"))
    if rank_world()[0] == 0:  # one process downloads, the others wait and then find the files
        kind(root, download=True, **flags)
    if dist.is_initialized():
        dist.barrier()
    images = kind(root, **flags)
    if name == "stl10":
        return torch.from_numpy(images.data), images.labels, list(images.classes)
    pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
    return pixels, images.targets, list(images.classes)

def load_folder(folder, root, size, keep, device, most):
    """Folders train/CLASS/* with val/ or test/ beside them, or CLASS/*, or images without labels.

    Without val/ or test/ every tenth labelled image is held out; without labels none is.
    """
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder; or fractals, cifar10, cifar100, stl10")
    inner = folder / "train" if (folder / "train").is_dir() else folder
    train = scan(inner)
    if not train:
        raise InputError(f"--data {inner}: no image in it (looked for {' '.join(EXTENSIONS)})")
    test = []
    classes = sorted({name for _, name in train})
    if "" in classes or len(classes) < 2:  # images beside folders, or a single folder: no labels
        classes = []
    else:
        for name in ("test", "val"):
            if inner != folder and (folder / name).is_dir():
                test = scan(folder / name)
        if not test:
            test = train[9::10]
            del train[9::10]
    for path, name in test:
        if name not in classes:
            raise InputError(f"--data {path}: its class {name!r} is not in {inner}")

    side = median_side(train)
    size = size or min(most, max(32, side // 32 * 32))
    keep = keep or min(max(size, side), size * 3 // 2)  # a reserve: few crops are enlarged
    images = []
    for files in (train, test):
        if files:
            images.append(decoded(files, classes, keep, root / "decoded", folder, device))
    return *move_to_device(images, device), size

def move_to_device(images, device):
    """[train, test or nothing] -> train, test or None; pixels on the device if there is room."""
    for part in images:
        if device.type == "cpu":
            break
        room = torch.tensor(int(3 * part.pixels.numel() < free_memory(device)), device=device)
        if dist.is_initialized():  # all processes or none, or they would not work alike
            dist.all_reduce(room, dist.ReduceOp.MIN)
        part.is_far = not room.item()
        if not part.is_far:
            part.pixels = part.pixels.to(device)
    return images[0], images[1] if len(images) > 1 else None

def free_memory(device):
    """Bytes that may be used on the device; of shared memory half."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
              ".jfif", ".avif")

def scan(folder):
    """The image files under `folder`, in order, as (path, first folder below it, "" if none)."""
    files = []
    visited = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in visited:  # links may form a loop
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        below = os.path.relpath(here, folder).split(os.sep)[0]
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                files.append((os.path.join(here, name), "" if below == "." else below))
    return files

def median_side(files):
    """The median of the images' shorter sides, from the headers of 200 of them."""
    sides = []
    for path, _ in files[::max(1, len(files) // 200)]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except Exception:  # PIL raises anything from OSError to struct.error on damaged files
            continue
    return int(np.median(sides)) if sides else 32

def decoded(files, classes, side, folder, source, device):
    """The Images of `files`, (path, class name) each, decoded into a file in `folder` at first.

    That file's name has a fingerprint of the names in `source`, sizes and times of `files`.
    Unreadable ones are left out. Of processes that want the same file, one makes it and the others
    wait.
    """
    fingerprint = hashlib.sha1()
    for path, _ in files:
        fingerprint.update(os.fsencode(path.removeprefix(str(source))))
        try:
            status = os.stat(path)
        except OSError:  # a link to nowhere
            continue
        fingerprint.update(f" {status.st_size} {status.st_mtime_ns} ".encode())
    name = f"{source.resolve().name}-{side}px-{fingerprint.hexdigest()[:16]}"
    pixel_file = folder / f"{name}.pixels"
    index_file = folder / f"{name}.index"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with its process, however that ends
        if not index_file.exists():
            decode_files([path for path, _ in files], side, pixel_file, index_file)
    index = load_file(index_file)
    rows = index["rows"]
    if len(rows) == 0:
        raise InputError(f"--data {source}: none of its {len(files):,} image files is readable")
    shape = (len(rows), 3, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that cannot be written: nobody writes
        pixels = torch.from_numpy(np.memmap(pixel_file, np.uint8, "r", shape=shape))
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number.get(name, -1) for _, name in files])[rows]
    return Images(pixels, index["shapes"], labels, classes, device)

def decode_files(paths, side, pixel_file, index_file):
    """Write the pixels of all readable images to one file, their rows and shapes to another."""
    needed = 3 * side * side * len(paths)
    free = shutil.disk_usage(pixel_file.parent).free
    if needed > free:
        raise InputError(f"--root: {len(paths):,} images of {side} x {side} pixels need {needed:,} "
                         f"bytes in {pixel_file.parent}, where {free:,} are free; lower --keep or "
                         "--size, or name another --root")
    rows = []
    shapes = []
    progress = Progress(len(paths))
    temporary = pixel_file.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file, ThreadPool(os.cpu_count()) as pool:
            for row, image in enumerate(pool.imap(partial(decode, side=side), paths, 16)):
                if image is not None:
                    pixels, height, width = image
                    file.write(pixels.tobytes())
                    shapes.append((height, width))
                    rows.append(row)
                if progress.due():
                    progress.show(row + 1, f"decoding {row + 1:,}/{len(paths):,} images")
        os.replace(temporary, pixel_file)
        save(index_file, dict(rows=torch.tensor(rows).long(), shapes=torch.tensor(shapes).float()))
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"--root: {error}; make room, or name another --root") from None
    seconds = time.time() - progress.started
    print(f"decoded {len(rows):,} images in {seconds:.1f} s to {pixel_file}")
    bad = [paths[row] for row in sorted(set(range(len(paths))) - set(rows))]
    if bad:
        more = ", ..." if len(bad) > 5 else ""
        print(f"left out {len(bad)} unreadable: {', '.join(bad[:5])}{more}", flush=True)

def decode(path, side):
    """The image in a file: pixels (3, side, side) uint8, height, width; None if unreadable."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) > 4:  # orientation: rows and columns change places
                width, height = height, width
            image.draft(None, (side, side))  # a JPEG at 1/2, 1/4 or 1/8, if that is large enough
            ImageOps.exif_transpose(image, in_place=True)
            image = to_rgb(image).resize((side, side), Image.BILINEAR, reducing_gap=2)
    except Exception:  # PIL raises anything from OSError to struct.error on damaged files
        return None
    return np.asarray(image).transpose(2, 0, 1), height, width

def to_rgb(image):
    """Any PIL image as RGB: 16 bits are scaled, not clipped; behind transparency is white."""
    if image.mode[0] in "IF":  # integers of 16 or 32 bits, floats
        gray = np.asarray(image, np.float32)
        image = Image.fromarray((gray * (255 / max(255, gray.max()))).clip(0).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

# The embedded data set. A class is an iterated function system: 2 to 4 maps x -> A x + b that
# contract the plane (Barnsley 1988). Jumping along randomly chosen ones draws its attractor.

def fractals(n, seed, size=32, classes=64, points=1600):
    """`n` drawings of `classes` fractals -> pixels (n, 3, size, size) uint8, labels (n,).

    The classes are the same for every seed. An image is its class's system, a little perturbed, in
    its own pose, zoom, place and light, mirrored or not. All have one ink on one dark paper: if
    they differed in color, that would be the cheapest way to tell them apart, and all that is
    learned.
    """
    systems = fractal_systems(classes, points)
    rng = np.random.default_rng([1989, seed])
    labels = np.arange(n) % classes
    A, b, p, middle, extent = (values[labels] for values in systems)
    A = A + rng.normal(0, 0.02, A.shape).astype(np.float32)
    A *= np.minimum(1, 0.9 / np.linalg.norm(A, 2, (2, 3), keepdims=True))  # stay contractive
    b = b + rng.normal(0, 0.02, b.shape).astype(np.float32)
    x = chaos_game(A, b, p, rng, points)
    turn = rotation(rng.uniform(-0.35, 0.35, n))
    zoom = rng.uniform(0.6, 1.0, (n, 1, 1))
    place = rng.uniform(0.32, 0.68, (n, 1, 2))
    mirrored = rng.random((n, 1)) >= 0.5
    light = rng.uniform(0.6, 1.0, (n, 1, 1, 1))
    paper = np.array([0.04, 0.05, 0.08])[:, None, None]
    color = np.array([0.55, 0.95, 0.65])[:, None, None]
    pictures = []
    for i in range(0, n, 64):  # some at a time: in the cache
        part = slice(i, i + 64)
        at = (x[part] - middle[part, None]) / extent[part, None, None]
        at = at @ turn[part] * zoom[part] + place[part]
        at[..., 0] = np.where(mirrored[part], 1 - at[..., 0], at[..., 0])
        hits = count_hits(at, 2 * size)  # twice the resolution, for smooth edges
        ink = 1 - np.exp(-2 * size * size * hits / points)
        ink = ink.reshape(-1, size, 2, size, 2).mean((2, 4))[:, None]
        picture = (paper * (1 - ink) + color * ink) * light[part]
        pictures.append((255 * picture.clip(0, 1)).astype(np.uint8))
    return torch.from_numpy(np.concatenate(pictures)), labels

@lru_cache(maxsize=2)
def fractal_systems(classes, points):
    """Maps A (classes, 4, 2, 2) and b (classes, 4, 2), cumulative probabilities p (classes, 4), and
    the middle (classes, 2) and extent (classes,) of what they draw."""
    rng = np.random.default_rng(1988)
    batches = []
    while sum(len(batch[0]) for batch in batches) < classes:
        stretch = rng.uniform(0.2, 0.85, (512, 2, 4)).astype(np.float32)
        A = rotation(rng.uniform(-np.pi, np.pi, (512, 4))) * stretch[:, 0, :, None, None]
        A[..., 1] *= (stretch[:, 1] / stretch[:, 0])[..., None]
        A = A @ rotation(rng.uniform(-np.pi, np.pi, (512, 4)))
        b = rng.uniform(-1, 1, (512, 4, 2)).astype(np.float32)
        is_used = np.arange(4) < rng.integers(2, 5, (512, 1))
        p = np.where(is_used, stretch.prod(1), 0).cumsum(1)
        p /= p[:, -1:]
        x = chaos_game(A, b, p, rng, points)
        low, high = np.percentile(x, (2, 98), axis=1).astype(np.float32)
        middle = (low + high) / 2
        extent = (high - low).max(1)
        # keep what is neither sparse, nor solid, nor a line
        centered = (x - middle[:, None]) / extent[:, None, None] * 0.9 + 0.5
        fill = (count_hits(centered, 32) > 0).mean((1, 2))
        good = (fill > 0.2) & (fill < 0.5) & ((high - low).min(1) > 0.4 * extent)
        batches.append([values[good] for values in (A, b, p, middle, extent)])
    return [np.concatenate(values)[:classes] for values in zip(*batches)]

def chaos_game(A, b, p, rng, count):
    """`count` points (n, count, 2) on n attractors: 16 jumpers each, 10 jumps to get there."""
    n = len(A)
    x = np.zeros((n, 16, 2), np.float32)
    system = np.arange(n)[:, None]
    path = []
    for _ in range(count // 16 + 10):
        k = (rng.random((n, 16, 1), np.float32) > p[:, None]).sum(2)  # which map each jumper takes
        x = (A[system, k] * x[:, :, None]).sum(3) + b[system, k]
        path.append(x)
    return np.concatenate(path[10:], 1)

def count_hits(x, side):
    """Points x (n, count, 2) in the unit square -> hits of each cell (n, side, side)."""
    n = len(x)
    cell = np.floor(x * side).astype(np.int64)
    index = (np.arange(n)[:, None] * side + cell[..., 1]) * side + cell[..., 0]
    inside = ((cell >= 0) & (cell < side)).all(2)
    return np.bincount(index[inside], minlength=n * side * side).reshape(n, side, side)

def rotation(angle):
    """Angles of any shape (...) -> rotation matrices (..., 2, 2)."""
    matrix = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1)
    return matrix.reshape(*angle.shape, 2, 2).astype(np.float32)

# ------------------------------------------------------------------------- 4. processes and files

class InputError(ValueError):
    """Something the user gave is wrong: one line that names the flag or file and how to fix it."""

def start(name):
    """The device called `name` (auto: the first there is); under torchrun also the group.

    Optimizers import torch.distributed.nn, whose default arguments name the group. Imported after
    the group is made it would keep the group's threads, which abort some processes at their end.
    """
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name == "cuda":  # each process its own; touching the first one would take memory there
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    elif device.type == "cpu" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc gives large tensors back to the kernel, which clears their pages at the next use.
        # At 224 pixels that is half of a step. So: none apart (M_MMAP_MAX), all kept (M_TRIM_..).
        ctypes.CDLL(None).mallopt(-4, 0)
        ctypes.CDLL(None).mallopt(-1, -1)
    allow_tf32(False)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # other nodes may decode
    return device

def allow_tf32(allowed):
    """TF32 has 10 bits of mantissa: enough to train, too few to tell near neighbours apart."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"

def rank_world():
    """Which process this is, and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def gather(x):
    """The rows of all processes' x, which have one shape, in the order of the processes."""
    if not dist.is_initialized():
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)

def mean_over_processes(x):
    """The mean of all processes' x, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x

def share_buffers(net):
    """All processes take the first one's buffers: each has BatchNorm statistics of its own."""
    if dist.is_initialized():
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)

def print0(line):
    """Print, on the first process only."""
    if rank_world()[0] == 0:
        print(line, flush=True)

def ahead(make, steps, use_thread):
    """make(step) for each of `steps`, a range; a thread makes the next while this one is used."""
    if not use_thread:
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(1) as pool:
        upcoming = None
        for step in steps:
            current = upcoming or pool.submit(make, step)
            if step + 1 in steps:
                upcoming = pool.submit(make, step + 1)
            yield current.result()

class Progress:
    """One live line on a terminal, elsewhere a line every 20 seconds; on the first process only."""

    def __init__(self, total, done=0):
        self.total = total
        self.first = done
        self.started = self.printed = time.time()
        self.is_live = sys.stdout.isatty()

    def due(self):
        pause = 0.1 if self.is_live else 20
        return rank_world()[0] == 0 and time.time() - self.printed > pause

    def show(self, done, text, end=False):
        """Print `text` and the time left; `end` starts a new line after it."""
        self.printed = time.time()
        a_step = (self.printed - self.started) / max(1, done - self.first)
        minutes, seconds = divmod(int(a_step * (self.total - done)), 60)
        text += f"  {minutes}:{seconds:02} left"
        if self.is_live:
            text = f"\r\033[K{text}"  # over the line before
        is_open = self.is_live and not end
        print(text, end="" if is_open else "\n", flush=True)

def save(path, content):
    """Write a text or a torch file under a temporary name, then rename it: never half a file.

    Raises OSError if it cannot be written.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch calls a full disk by many names
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written; is the disk full? ({reason})") from None

def load_file(path):
    """torch.load onto the CPU, which never runs code from the file; InputError if unreadable."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such checkpoint file") from None
    except Exception as error:  # torn, no torch file, or one that would run code
        raise InputError(f"{path}: not read ({type(error).__name__}): torn, no checkpoint, or more "
                         "than tensors and plain values; save its state_dict() alone") from None

def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError:
        raise InputError(f"{path}: not readable as JSON; delete it, and give its flags") from None
