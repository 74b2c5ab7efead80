"""Images in, two views out.

    train, test, size = load("letters")              # or cifar10, cifar100, stl10, or any folder
    rows, u, order = draw_step(len(train), batch=64, seed=0, step=0)
    pixels, shapes = train.get(rows)
    views = augment(pixels, u[0], size, shapes=shapes)  # (64, 3, size, size), normalized

A data set is one uint8 tensor: on the device if it fits, else a memory-mapped file. A folder is
decoded into such a file once. All random numbers of a step are drawn by `draw_step` from (seed,
step) on the CPU: a seed gives the same views on any device, on any number of processes, and after a
restart.

Read it from top to bottom: augmentation, the draws of a step, data sets, then what is not data.
"""
import ctypes
import fcntl
import hashlib
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
import torch.distributed.nn  # noqa: F401  (imported later it would keep gloo's threads at the end)
from PIL import Image, ImageDraw, ImageFont, ImageOps

# ------------------ 1. augmentation: a function of a batch of images and of uniform random numbers

# ImageNet's mean and deviation, as in torchvision, so that its weights fit
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
YIQ = [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]  # of RGB

# A view needs 32 uniform numbers. What each is for: ten attempts at a crop, then one number each.
AREA = slice(0, 10)
RATIO = slice(10, 20)
TOP, LEFT, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SIGMA = range(20, 31)
COLUMNS = 32

def augment(images, u, size, crop=(0.2, 1.0), jitter=0.4, hue=0.1, gray=0.2, blur=0.5, shapes=None):
    """MoCo v2's augmentation (Chen et al. 2020) of images (n, 3, S, S) uint8.

    Random resized crop of area `crop`; flip, p 0.5; with p 0.8 jitter of brightness, contrast and
    saturation within 1 +- `jitter` and of hue within +- `hue` turns; grayscale with p `gray`;
    Gaussian blur with p `blur` and sigma 0.1..2.0 pixels at 224, scaled with `size`. `u` (n,
    COLUMNS) holds the uniform numbers of each view. `shapes` (n, 2) are the images' heights and
    widths before they were stored as squares. -> views (n, 3, size, size), normalized by MEAN and
    STD.

    All but the clipping to black and white is linear: a matrix on the rows, one on the columns, one
    on the colors. (So blur comes before clipping here, not after it.)
    """
    n, _, side, _ = images.shape
    if shapes is None:
        shapes = u.new_full((n, 2), side)
    box = crop_boxes(u, shapes[:, 0], shapes[:, 1], crop)
    sigma = None
    if blur > 0:  # a sigma of 0 leaves a view as it is
        sigma = torch.where(u[:, BLUR] < blur, (0.1 + 1.9 * u[:, SIGMA]) * size / 224, 0)
    x = cut(images, box, shapes, size, u[:, FLIP] < 0.5, sigma)

    jittered = (u[:, JITTER] < 0.8).float()  # where not, all factors are 1
    lowest = (1 - jitter * jittered).clamp(min=0)
    highest = 1 + jitter * jittered
    saturation = torch.lerp(lowest, highest, u[:, SATURATION])
    on_pixel, on_mean = color_matrix(
        brightness=torch.lerp(lowest, highest, u[:, BRIGHTNESS]),
        contrast=torch.lerp(lowest, highest, u[:, CONTRAST]),
        saturation=torch.where(u[:, GRAY] < gray, 0, saturation),  # 0 is grayscale
        hue=hue * jittered * (2 * u[:, HUE] - 1))

    # ((on_pixel x + on_mean mean(x)) / 255 - MEAN) / STD: normalizing is linear in color, too
    mean, std, _, _ = constants(x.device)
    shift = on_mean @ x.mean(2, keepdim=True) / 255 - mean
    x = torch.baddbmm(shift / std, on_pixel / (255 * std), x)
    x = x.clamp_(-mean / std, (1 - mean) / std)  # black and white
    return x.view(n, 3, size, size).contiguous(memory_format=layout(x.device))

def center(images, size, shapes=None):
    """Evaluation's view of images (n, 3, S, S) uint8: the whole center square, without the margin
    that is usual at 224 pixels -> (n, 3, size, size)."""
    n, _, side, _ = images.shape
    if shapes is None:
        shapes = torch.full((n, 2), float(side), device=images.device)
    shortest = shapes.amin(1, keepdim=True).expand(n, 2)
    box = torch.cat([(shapes - shortest) / 2, shortest], dim=1)
    mean, std, _, _ = constants(images.device)
    x = (cut(images, box, shapes, size) / 255 - mean) / std
    return x.view(n, 3, size, size).contiguous(memory_format=layout(images.device))

def layout(device):
    """channels_last is the faster one, but not on a Mac's GPU: PyTorch's BatchNorm has had silently
    wrong gradients on such tensors there (issues 175189, 174345)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last

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
    top, left, height, width = (box.view(n, 2, 2) * scale[:, None]).view(n, 4).T
    down = resampling(top, height, side, size, None, sigma)
    across = resampling(left, width, side, size, flip, sigma)
    x = images.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
    x = down @ x.view(n, side, 3 * side)  # (n, size, 3 * side): rows, then colors
    x = x.view(n, size * 3, side) @ across.mT  # (n, size * 3, size)
    return x.view(n, size, 3, size).transpose(1, 2).reshape(n, 3, size * size)

def resampling(begin, length, source, size, flip=None, sigma=None):
    """Matrices (n, size, source) that cut `length` pixels from `begin` out of an axis, resize, flip
    and blur it; begin, length, flip and sigma are (n,). Pixel j covers [j, j + 1).

    Antialiased bilinear resizing is a triangle filter as wide as the shrinkage. A Gaussian blur of
    `sigma` output pixels is a softmax over squared distances; at the borders it renormalizes.
    """
    begin = begin[:, None, None]
    length = length[:, None, None]
    i = torch.arange(size, device=begin.device)
    j = torch.arange(source, device=begin.device)
    stride = length / size
    middle = begin + (i[:, None] + 0.5) * stride - 0.5  # of output i, in source pixels
    if flip is not None:
        middle = torch.where(flip[:, None, None], middle.flip(1), middle)
    in_box = (j + 1 > begin) & (j < begin + length)  # also pixels that the box cuts: no empty row
    matrix = (1 - (middle - j).abs() / stride.clamp(min=1)).clamp_(min=0) * in_box
    matrix /= matrix.sum(2, keepdim=True)
    if sigma is not None:
        exponent = (i[:, None] - i) ** 2 / (2 * sigma[:, None, None].clamp(min=1e-3) ** 2)
        exponent = exponent.masked_fill(exponent > 20, math.inf)  # weights below e^-20: none
        matrix = (-exponent).softmax(2) @ matrix
    return matrix

def color_matrix(brightness, contrast, saturation, hue):
    """Color jitter as a matrix on a pixel plus one on the view's mean pixel, (n, 3, 3) each.

    Arguments are (n,): factors, and turns for hue. In YIQ, brightness scales everything, contrast
    moves luma towards its mean and scales chroma, saturation scales chroma (0: grayscale), hue
    turns it. All four commute, so torchvision's random order has nothing to choose (except that it
    clips in between). Hue keeps luma, as DALI's and TensorFlow's in YIQ do; torchvision's keeps
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
    _, _, to_yiq, from_yiq = constants(hue.device)
    return from_yiq @ on_pixel @ to_yiq, from_yiq @ on_mean @ to_yiq

# ------------------------------------------------------- 2. the draws: what happens at a step

def draw_step(n, batch, seed, step):
    """The random choices of a step, the same on every process and device.

    -> rows (batch,): which of the n images; u (2, batch, COLUMNS): the uniform numbers of their two
    views; order (batch,): the shuffled order in which the key encoder sees the batch. A pass over
    the images drops the last incomplete batch.
    """
    epoch, i = divmod(step, n // batch)
    rows = order_of_epoch(n, seed, epoch)[i * batch:(i + 1) * batch]
    draw = seeded(seed, "step", step)
    u = torch.rand(2, batch, COLUMNS, generator=draw)
    order = torch.randperm(batch, generator=draw)
    return rows, u, order

@lru_cache(maxsize=2)  # the step that is drawn ahead may be of the next epoch
def order_of_epoch(n, seed, epoch):
    """All n rows, shuffled."""
    return torch.randperm(n, generator=seeded(seed, "epoch", epoch))

def seeded(*key):
    """A CPU generator that is a function of `key` (torch uses 32 bits of a seed)."""
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
    fingerprint: str      # the same only for the same images in the same order

    def __len__(self):
        return len(self.labels)

    def get(self, rows):
        """Rows (n,) -> pixels (n, 3, S, S) and shapes (n, 2), on the device."""
        pixels = self.pixels[to_device(rows, self.pixels.device)]
        return to_device(pixels, self.device), to_device(self.shapes[rows], self.device)

    def prefetch(self, make, items):
        """make(item) for each item; where pixels travel to a device, a thread works one ahead."""
        if self.pixels.device == self.device:
            yield from map(make, items)
            return
        with ThreadPoolExecutor(1) as pool:
            upcoming = None
            for item in items:
                current = upcoming
                upcoming = pool.submit(make, item)
                if current is not None:
                    yield current.result()
            if upcoming is not None:
                yield upcoming.result()

def to_device(x, device):
    if device.type == "cuda" and x.device.type == "cpu":  # without waiting for it
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)

def load(name, root="data", size=None, keep=None, device=torch.device("cpu")):
    """--data `name` -> train Images; held-out Images, None without labels; the side of a view.

    A `size` of None is the images' own side, in a folder at most 224, on a CPU at most 64. `keep`
    is the side at which a folder's images are stored. Raises InputError for what is not there or
    cannot be read.
    """
    if name == "letters":
        size = size or 32
        sets = [letters(5120, 0, size), letters(1280, 1, size)]
    elif name in ("cifar10", "cifar100", "stl10"):
        sets = [torchvision_set(name, root, "train"), torchvision_set(name, root, "test")]
        size = size or sets[0][0].shape[-1]
    else:
        return load_folder(Path(name), Path(root), size, keep, device)
    images = []
    for pixels, labels, classes in sets:
        shapes = torch.full((len(labels), 2), float(pixels.shape[-1]))
        labels = torch.as_tensor(labels).long()
        images.append(Images(pixels, shapes, labels, classes, device, f"{len(labels)} of {name}"))
    return *move_to_device(images, device), size

# What the main command learns from: a class each, none a mirror image or another size of another
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabefghmnrty123456789#$%&*+<=?@[{(~^!;\""

def letters(n, seed, size=32):
    """`n` drawings of GLYPHS -> pixels (n, 3, size, size) uint8, labels (n,), names.

    Each is turned, sheared, zoomed, moved and dimmed at random. All have one ink on one paper: if
    they differed in color, that would be the cheapest way to tell them apart, and all that is
    learned.
    """
    middle = size  # of pictures twice as large, for smooth edges
    font = ImageFont.load_default(1.6 * size)
    glyphs = []
    for glyph in GLYPHS:
        picture = Image.new("L", (2 * size, 2 * size))
        ImageDraw.Draw(picture).text((middle, middle), glyph, 255, font, anchor="mm")
        glyphs.append(picture)
    paper = torch.tensor([0.04, 0.05, 0.08])[:, None, None]
    color = torch.tensor([0.55, 0.95, 0.65])[:, None, None]
    labels = torch.arange(n) % len(GLYPHS)
    numbers = 2 * torch.rand(6, n, generator=seeded("letters", seed)) - 1
    pictures = []
    for label, (turn, shear, zoom, x, y, light) in zip(labels, numbers.T.tolist()):
        # from a pixel of the picture to the place in the glyph that it shows: (a, b; d, e)
        scale = 0.775 + 0.225 * zoom
        cos = math.cos(math.radians(22 * turn)) / scale
        sin = math.sin(math.radians(22 * turn)) / scale
        a, b = cos, 0.25 * shear * cos - sin
        d, e = sin, 0.25 * shear * sin + cos
        x, y = middle * (0.2 * x - 1), middle * (0.2 * y - 1)
        places = (a, b, a * x + b * y + middle, d, e, d * x + e * y + middle)
        glyph = glyphs[label]
        picture = glyph.transform(glyph.size, Image.AFFINE, places, Image.BILINEAR)
        ink = torch.from_numpy(np.array(picture.reduce(2))) / 255
        pictures.append((0.8 + 0.2 * light) * torch.lerp(paper, color, ink))
    return (255 * torch.stack(pictures)).round().byte(), labels, list(GLYPHS)

def torchvision_set(name, root, split):
    """Pixels (N, 3, S, S), labels and class names of one of torchvision's data sets."""
    from torchvision import datasets
    kind = getattr(datasets, name.upper())
    flags = dict(train=split == "train")
    if name == "stl10":
        flags = dict(split="train+unlabeled" if split == "train" else "test")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one process of a node downloads
        kind(root, download=True, **flags)
    if dist.is_initialized():
        dist.barrier()
    images = kind(root, **flags)
    if name == "stl10":
        return torch.from_numpy(images.data), images.labels, list(images.classes)
    pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
    return pixels, images.targets, list(images.classes)

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
              ".pgm", ".avif")
# Pillow opens a file as what it contains, whatever its name: PostScript would run Ghostscript
FORMATS = sorted({kind for extension, kind in Image.registered_extensions().items()
                  if extension in EXTENSIONS})

def load_folder(folder, root, size, keep, device):
    """Folders train/CLASS/* with test/ or val/ beside them, or CLASS/*, or images without labels.

    Without test/ or val/ about every tenth labelled image is held out, by a hash of its name: a
    file more moves no other one to the other side.
    """
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder; or letters, cifar10, cifar100, stl10")
    inner = folder / "train" if (folder / "train").is_dir() else folder
    train = scan(inner)
    if not train:
        raise InputError(f"--data {inner}: no image in it (looked for {' '.join(EXTENSIONS)})")
    stray = [path for path, name in train if name == ""]
    classes = sorted({name for _, name in train} - {""})
    test = []
    if len(classes) < 2 or 2 * len(stray) >= len(train):  # a single folder, or mostly loose images
        classes = []
    else:
        if stray:
            print0(f"left out {len(stray)} beside the class folders: {some(stray)}")
        train = [file for file in train if file[1] != ""]
        for name in ("val", "test"):  # test/ counts, if both have images
            if inner != folder and (folder / name).is_dir():
                test = [file for file in scan(folder / name) if file[1] != ""] or test
        if not test:
            test = [file for file in train if is_held_out(os.path.relpath(file[0], folder))]
            held = set(test)
            train = [file for file in train if file not in held]
    for path, name in test:
        if name not in classes:
            raise InputError(f"--data {path}: its class {name!r} is not in {inner}")

    side = median_side(train)
    size = size or min(64 if device.type == "cpu" else 224, max(32, side // 32 * 32))
    keep = keep or min(max(size, side), size * 3 // 2)  # half as much again: few crops are enlarged
    images = []
    for part, files in (("train", train), ("test", test)):
        name = f"{folder.resolve().name}-{part}-{keep}px-"
        if files:
            images.append(decoded(files, folder, classes, keep, root / "decoded", name, device))
    return *move_to_device(images, device), size

def is_held_out(name):
    return zlib.crc32(os.fsencode(name)) % 10 == 0

def some(names):
    """The first of them, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")

def scan(folder):
    """The image files under `folder`, in order, as (path, first folder below it, "" if none).

    Hidden files and folders do not count, nor does what these scripts wrote.
    """
    files = []
    visited = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in visited or not {"args.json", "analysis.json"}.isdisjoint(names):
            folders.clear()  # links may form a loop; a run or a result
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
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
            with Image.open(path, formats=FORMATS) as image:
                sides.append(min(image.size))
        except Exception:  # PIL raises anything from OSError to struct.error on damaged files
            continue
    return int(np.median(sides)) if sides else 32

def decoded(files, source, classes, side, folder, prefix, device):
    """The Images of `files`, (path, class name) each, below `source`, as squares of `side` pixels.

    The first call decodes them into a file in `folder`, called `prefix` and a hash of their names,
    sizes and times. Unreadable ones are left out. Of processes that want the same file, one makes
    it and the others wait.
    """
    names = [os.fsencode(os.path.relpath(path, source)) for path, _ in files]
    state = hashlib.sha1()
    for (path, _), name in zip(files, names):
        state.update(name)
        if os.path.exists(path):  # no link to nowhere
            status = os.stat(path)
            state.update(f" {status.st_size} {status.st_mtime_ns} ".encode())
    pixel_file = folder / f"{prefix}{state.hexdigest()[:16]}.pixels"
    index_file = pixel_file.with_suffix(".index")
    if not index_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(pixel_file.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)  # ends with its process, however that ends
                for left_over in folder.glob(f"{pixel_file.stem}.*.tmp"):
                    left_over.unlink()
            except OSError:  # a file system without locks: each process decodes for itself
                pass
            if not index_file.exists():
                decode_files([path for path, _ in files], side, pixel_file, index_file)
                older = sorted(set(folder.glob(f"{prefix}*.pixels")) - {pixel_file})
                if older:
                    size = sum(path.stat().st_size for path in older)
                    print(f"of older states of the folder there are {size:,} bytes; remove them "
                          f"with  rm {' '.join(f'{path.parent / path.stem}.*' for path in older)}")
    index = load_file(index_file)
    rows = index["rows"].tolist()
    if not rows:
        raise InputError(f"--data {source}: none of its {len(files):,} image files is readable")
    shape = (len(rows), 3, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that cannot be written: nobody writes
        pixels = torch.from_numpy(np.memmap(pixel_file, np.uint8, "r", shape=shape))
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number.get(files[row][1], -1) for row in rows])
    digest = hashlib.sha1(b"\n".join(names[row] for row in rows)).hexdigest()[:16]
    return Images(pixels, index["shapes"], labels, classes, device, f"{len(rows)}, {digest}")

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
    progress = Progress(len(paths), is_shown=True)
    temporary = pixel_file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file, ThreadPool(min(16, os.cpu_count())) as pool:
            for first in range(0, len(paths), 256):  # so many images wait for the disk, no more
                images = pool.map(partial(decode, side=side), paths[first:first + 256])
                for row, image in enumerate(images, first):
                    if image is not None:
                        pixels, height, width = image
                        file.write(pixels.tobytes())
                        shapes.append((height, width))
                        rows.append(row)
                if progress.due():
                    progress.show(first, f"decoding {first:,}/{len(paths):,} images")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, pixel_file)
        save(temporary, dict(rows=torch.tensor(rows).long(), shapes=torch.tensor(shapes).float()))
        os.replace(temporary, index_file)  # each file at once, also where two processes decode
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"--root: {error}; make room, or name another --root") from None
    print(f"decoded {len(rows):,} images in {time.time() - progress.started:.1f} s to {pixel_file}")
    bad = [paths[row] for row in sorted(set(range(len(paths))) - set(rows))]
    if bad:
        print(f"left out {len(bad)} unreadable: {some(bad)}", flush=True)

def decode(path, side):
    """The image in a file: pixels (3, side, side) uint8, height, width; None if unreadable."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) > 4:  # orientation: rows and columns change places
                width, height = height, width
            image.draft(None, (side, side))  # a JPEG at 1/2, 1/4 or 1/8, if that is large enough
            ImageOps.exif_transpose(image, in_place=True)
            image = as_rgb(image).resize((side, side), Image.BILINEAR, reducing_gap=2)
    except Exception:  # PIL raises anything from OSError to struct.error on damaged files
        return None
    return np.asarray(image).transpose(2, 0, 1), height, width

def as_rgb(image):
    """Any PIL image as RGB: more than 8 bits are scaled; behind transparency is white.

    Integers of 16 bits are scaled by their range, the same for all images, floats from 0..1, 0..255
    or 0..65535. Raises ValueError for what is below 0, above that, or no number.
    """
    if image.mode[0] in "IF":
        gray = np.asarray(image, np.float32)
        highest = gray.max()
        if not (gray.min() >= 0 and highest <= 65535):
            raise ValueError("pixels beyond 0..65535")
        scale = 65535
        if image.mode == "F" and highest <= 255:
            scale = 1 if highest <= 1 else 255
        image = Image.fromarray((gray * (255 / scale)).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def move_to_device(images, device):
    """[train] or [train, test] -> train, test or None; pixels on the device if there is room."""
    for part in images:
        # thrice: the rest is for the network
        room = torch.tensor(3 * part.pixels.numel() < free_memory(device), device=device).int()
        if dist.is_initialized():  # one answer for all processes: the slowest sets their pace
            dist.all_reduce(room, dist.ReduceOp.MIN)
        if device.type != "cpu" and room.item():
            part.pixels = part.pixels.to(device)
    return images[0], images[1] if len(images) > 1 else None

def free_memory(device):
    """Bytes that may be used on the device; of memory shared with the CPU half."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

# ------------------------------------------------ 4. what is not data: device, processes, files

class InputError(ValueError):
    """Something the user gave is wrong: one line that names the flag or file and how to fix it."""

def init_device(name):
    """The device called `name` (auto: the first there is); under torchrun also the group."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
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
        # At 224 pixels that is half of a step. So: no memory maps (-4), and nothing given back (-1)
        ctypes.CDLL(None).mallopt(-4, 0)
        ctypes.CDLL(None).mallopt(-1, -1)
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # float32 means it: no TF32
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # other nodes may decode
    return device

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
    """Copy the first process's BatchNorm statistics to all others."""
    if dist.is_initialized():
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)

def print0(line):
    """Print, on the first process only."""
    if rank_world()[0] == 0:
        print(line, flush=True)

class Progress:
    """Every 20 seconds, how far a loop is."""

    def __init__(self, total, done=0, is_shown=None):
        self.total = total
        self.first = done
        self.started = self.printed = time.time()
        self.is_shown = rank_world()[0] == 0 if is_shown is None else is_shown

    def due(self):
        return self.is_shown and time.time() - self.printed > 20

    def show(self, done, text):
        """Print `text` and the time left."""
        self.printed = time.time()
        seconds = (self.printed - self.started) / max(1, done - self.first) * (self.total - done)
        print(f"{text}  {timedelta(seconds=int(seconds))} left", flush=True)

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
