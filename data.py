"""Images in, two views out.

    train, test, size = load("letters")              # or cifar10, cifar100, stl10, or any folder
    rows, u, order = draw_step(len(train), batch=64, seed=0, step=0)
    pixels, shapes = train.get(rows)
    views = augment(pixels, u[0], size, shapes=shapes)  # (64, 3, size, size), normalized

A data set is one uint8 tensor of square images. A folder of images is decoded once into a file,
of which only what is used is read into memory. `move_to_device` copies the tensor to a GPU that has
room for it. All random numbers of a step are drawn by `draw_step` from (seed, step) on the CPU. So
a seed gives the same views on any device, on any number of processes, and after a restart.

Read it from top to bottom: augmentation, the draws of a step, data sets, what all scripts share.
"""
import argparse
import ctypes
import fcntl
import hashlib
import math
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, lru_cache, partial
from itertools import compress, groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  (imported later, it would keep a group from ending)
from PIL import Image, ImageDraw, ImageFont, ImageOps

# ------------------ 1. augmentation: a function of a batch of images and of uniform random numbers

# ImageNet's mean and deviation, as in torchvision, so that torchvision's weights fit
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
YIQ = [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]  # from RGB

# The uniform random numbers of a view are a row of 32 columns. The first twenty are for ten
# attempts at a crop, eleven more have the names below, and the last column is not used.
AREA = slice(0, 10)
RATIO = slice(10, 20)
TOP, LEFT, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SIGMA = range(20, 31)
COLUMNS = 32

def augment(images, u, size, crop=(0.2, 1.0), jitter=0.4, hue=0.1, gray=0.2, blur=0.5, shapes=None):
    """Views (n, 3, size, size) of images (n, 3, S, S) uint8, normalized by MEAN and STD: the
    augmentation of MoCo v2 (Chen et al. 2020).

    Each view is a random resized crop of a share of the area within `crop`. It is flipped with p
    0.5. With p 0.8 its brightness, contrast and saturation change by a factor within 1 +- `jitter`
    and its hue turns by up to `hue` of a full circle. It is gray with p `gray`, and blurred with p
    `blur` by a Gaussian. Its sigma is 0.1 to 2.0 pixels in views of 224 pixels, and in proportion
    in others.

    u (n, COLUMNS) holds the uniform random numbers of each view. shapes (n, 2) holds the heights
    and widths that the images had before they were stored as squares; None: they were squares.

    All but the clipping to black and white is linear: one matrix acts on the rows of an image, one
    on its columns, one on its colors. Blur is part of the first two, so it comes before the
    clipping. jitter, hue, gray and the numbers in crop may also be tensors of one number on the
    device: during pretraining they change from step to step.
    """
    n, _, side, _ = images.shape
    if shapes is None:
        shapes = u.new_full((n, 2), side)
    box = crop_boxes(u, shapes, crop)
    sigma = None
    if blur > 0:  # `resampling` leaves a view with a sigma of 0 as it is
        sigma = torch.where(u[:, BLUR] < blur, (0.1 + 1.9 * u[:, SIGMA]) * size / 224, 0)
    x = cut(images, box, shapes, size, u[:, FLIP] < 0.5, sigma)

    jittered = (u[:, JITTER] < 0.8).float()  # where it is 0, all factors are 1
    lowest = 1 - jitter * jittered
    highest = 1 + jitter * jittered
    factors = torch.lerp(lowest[:, None], highest[:, None], u[:, BRIGHTNESS:HUE])
    brightness, contrast, saturation = factors.T
    saturation = torch.where(u[:, GRAY] < gray, 0, saturation)  # 0 is grayscale
    turns = hue * jittered * (2 * u[:, HUE] - 1)
    on_pixel, on_mean = color_matrix(brightness, contrast, saturation, turns)

    # A jittered pixel is on_pixel x + on_mean mean(x). It is normalized in the same matrix product:
    # ((on_pixel x + on_mean mean(x)) / 255 - MEAN) / STD = shift / STD + on_pixel / (255 STD) x
    mean, std, _, _ = constants(x.device)
    shift = on_mean @ x.mean(2, keepdim=True) / 255 - mean
    x = torch.baddbmm(shift / std, on_pixel / (255 * std), x)
    x = x.clamp_(-mean / std, (1 - mean) / std)  # clip to black and white
    return x.view(n, 3, size, size).contiguous(memory_format=layout(x.device))

def center(images, size, shapes):
    """The largest center square of each image, resized: views (n, 3, size, size) for evaluation.

    images (n, 3, S, S) are uint8. shapes (n, 2) are the heights and widths that they had before
    they were stored as squares.
    """
    shortest = shapes.amin(1, keepdim=True).expand_as(shapes)
    box = torch.cat([(shapes - shortest) / 2, shortest], 1)
    mean, std, _, _ = constants(images.device)
    x = (cut(images, box, shapes, size) / 255 - mean) / std
    return x.view(-1, 3, size, size).contiguous(memory_format=layout(images.device))

def layout(device):
    """The memory format of images: channels_last, which is faster, except on a Mac's GPU, where
    PyTorch's BatchNorm has had wrong gradients in it (PyTorch's issues 175189, 174345)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last

@cache
def constants(device):
    """On the device: MEAN and STD (3, 1), and the matrices RGB -> YIQ and back (3, 3)."""
    yiq = torch.tensor(YIQ)
    columns = torch.tensor([MEAN, STD])[:, :, None]
    return [x.to(device) for x in (*columns, yiq, torch.linalg.inv(yiq))]

def crop_boxes(u, shapes, crop):
    """Boxes (n, 4), each a top, left, height and width in pixels, of random resized crops (Szegedy
    et al. 2015) of images with these heights and widths (n, 2).

    A box has an area within `crop` of the image's and an aspect ratio within 3/4..4/3. Of ten
    attempts the first that fits into the image counts. If none fits, the box is the largest
    centered one within those ratios. torchvision's RandomResizedCrop does so for one image.
    """
    area = shapes.prod(1, keepdim=True) * (crop[0] + (crop[1] - crop[0]) * u[:, AREA])
    ratio = torch.exp((2 * u[:, RATIO] - 1) * math.log(4 / 3))
    attempts = torch.stack([area / ratio, area * ratio], 2).sqrt().round()  # heights and widths
    fits = ((attempts > 0) & (attempts <= shapes[:, None])).all(2)
    first = fits.int().argmax(1)[:, None, None]  # of equal values argmax finds the first
    any_fits = fits.any(1, keepdim=True)
    # no side is longer than 4/3 of the other
    largest = torch.minimum(shapes, (shapes.flip(1) * 4 / 3).round().clamp(min=1))
    extent = torch.where(any_fits, attempts.take_along_dim(first, 1)[:, 0], largest)
    rest = shapes - extent
    corner = torch.where(any_fits, u[:, TOP:LEFT + 1] * (rest + 1), rest / 2).floor()
    return torch.cat([corner, extent], 1)

def cut(images, box, shapes, size, flip=None, sigma=None):
    """The box of each image (n, 3, S, S), resized, flipped and blurred: (n, 3, size * size).

    box (n, 4) is in pixels of the original images, whose heights and widths are shapes (n, 2). For
    flip and sigma see `resampling`.
    """
    side = images.shape[-1]
    scale = side / shapes  # stored pixels per original pixel, along the height and the width
    top, left, height, width = (box * scale.repeat(1, 2)).T
    down = resampling(top, height, side, size, None, sigma)
    across = resampling(left, width, side, size, flip, sigma)
    x = torch.einsum("nyi,ncij->nycj", down, images.float())  # (n, size, 3, S)
    return torch.einsum("nycj,nxj->ncyx", x, across).flatten(2)

def resampling(begin, length, source, size, flip=None, sigma=None):
    """Matrices (n, size, source) for an axis of `source` pixels: they take the `length` pixels that
    start at `begin`, resize them to `size`, flip them where `flip` is true, and blur them.

    begin, length, flip and sigma are (n,); pixel j of an axis covers [j, j + 1). In antialiased
    bilinear resizing, an output pixel is a weighted mean of the pixels around its middle. Weights
    fall to zero in a distance of length / size pixels, at least of one. A Gaussian blur of `sigma`
    output pixels is a softmax of -distance^2 / (2 sigma^2), so weights sum to one at borders, too.
    """
    begin = begin[:, None, None]
    length = length[:, None, None]
    i = torch.arange(size, device=begin.device)
    j = torch.arange(source, device=begin.device)
    stride = length / size
    middle = begin + (i[:, None] + 0.5) * stride - 0.5  # of output i, in source pixels
    if flip is not None:
        middle = torch.where(flip[:, None, None], middle.flip(1), middle)
    # A pixel that the box cuts through counts as inside, so that no row of the matrix is empty.
    in_box = (j + 1 > begin) & (j < begin + length)
    matrix = (1 - (middle - j).abs() / stride.clamp(min=1)).clamp_(min=0) * in_box
    matrix /= matrix.sum(2, keepdim=True)
    if sigma is not None:
        # At a sigma near 0, each pixel keeps all its weight. Weights below e^-20 become 0.
        exponent = (i[:, None] - i) ** 2 / (2 * sigma[:, None, None].clamp(min=1e-3) ** 2)
        exponent = exponent.masked_fill(exponent > 20, math.inf)
        matrix = (-exponent).softmax(2) @ matrix
    return matrix

def color_matrix(brightness, contrast, saturation, hue):
    """Color jitter as two matrices (n, 3, 3): one on a pixel, one on the mean pixel of the view.
    The jittered pixel is the sum of the two products.

    brightness, contrast and saturation are factors (n,), hue is an angle (n,) in turns. In YIQ,

        luma'   = brightness * contrast * luma + brightness * (1 - contrast) * mean luma
        chroma' = brightness * contrast * saturation * (chroma turned by the angle)

    The four changes commute. So their order, which torchvision draws at random, does not matter,
    but for its clipping in between. A turn of hue keeps luma here, as in DALI and TensorFlow;
    torchvision's keeps the value of HSV.
    """
    luma = brightness * contrast
    chroma = luma * saturation
    angle = 2 * math.pi * hue
    cos = chroma * angle.cos()
    sin = chroma * angle.sin()
    zero = torch.zeros_like(luma)
    on_pixel = torch.stack([luma, zero, zero,
                            zero, cos, -sin,
                            zero, sin, cos], 1).view(-1, 3, 3)
    on_mean = torch.zeros_like(on_pixel)
    on_mean[:, 0, 0] = brightness - luma
    _, _, to_yiq, from_yiq = constants(hue.device)
    return from_yiq @ on_pixel @ to_yiq, from_yiq @ on_mean @ to_yiq

# ------------------------------------------------------- 2. the draws: what happens at a step

def draw_step(n, batch, seed, step):
    """The random choices of a step, which are the same on every process and device.

    -> rows (batch,): which of the n images; u (2, batch, COLUMNS): the uniform numbers of their two
    views; order (batch,): the shuffled order in which the key encoder sees the batch. An epoch is
    n // batch steps; the images that are left over come in other epochs.
    """
    epoch, i = divmod(step, n // batch)
    rows = order_of_epoch(n, seed, epoch)[i * batch:(i + 1) * batch]
    draw = seeded(seed, "step", step)
    u = torch.rand(2, batch, COLUMNS, generator=draw)
    order = torch.randperm(batch, generator=draw)
    return rows, u, order

@lru_cache(maxsize=1)
def order_of_epoch(n, seed, epoch):
    """All n rows, shuffled."""
    return torch.randperm(n, generator=seeded(seed, "epoch", epoch))

def seeded(*key):
    """A random generator on the CPU, the same for the same `key` of numbers and words."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))

# ----------------------------------------------------------------------------------- 3. data sets

@dataclass
class Images:
    """A set of images, each stretched to a square of S pixels, with nothing cut off. `shapes` has
    the original heights and widths, so that crops have the right aspect ratio."""
    pixels: torch.Tensor  # (N, 3, S, S) uint8: on the device, in memory, or mapped from a file
    shapes: torch.Tensor  # (N, 2) float32: the heights and widths that the images had
    labels: torch.Tensor  # (N,) int64, -1 where unknown
    classes: list         # the names of the labels, empty without labels
    device: torch.device  # where `get` puts the images
    fingerprint: str      # which images these are: of a folder a hash of names and sizes

    def __len__(self):
        return len(self.labels)

    def get(self, rows):
        """Rows (n,) -> pixels (n, 3, S, S) and shapes (n, 2), on the device."""
        pixels = self.pixels[to_device(rows, self.pixels.device)]
        return to_device(pixels, self.device), to_device(self.shapes[rows], self.device)

def load(name, root="data", size=None, device=torch.device("cpu")):
    """The data set `name` -> training Images; held-out Images, None without labels; the side of a
    view in pixels.

    `name` is letters, cifar10, cifar100, stl10 or a folder. Downloads and decoded images go to the
    folder `root`. A `size` of None is 32 for letters and the images' own side for the downloaded
    sets; for folders see `load_folder`. Raises InputError for what is not there or cannot be read.
    """
    if name == "letters":
        parts = [letters(5120, 0, size or 32), letters(1280, 1, size or 32)]
    elif name in ("cifar10", "cifar100", "stl10"):
        parts = [torchvision_set(name, root, is_train) for is_train in (True, False)]
    else:
        return load_folder(Path(name), Path(root), size, device)
    sets = []
    for pixels, labels, classes in parts:
        shapes = torch.full((len(labels), 2), pixels.shape[-1]).float()
        labels = torch.as_tensor(labels).long()
        sets.append(Images(pixels, shapes, labels, classes, device, f"{len(labels)} of {name}"))
    return *sets, size or pixels.shape[-1]

def move_to_device(train, test):
    """Move the pixels of both sets, in place, to their GPU if they need at most a third of the
    memory that is free there: the rest is for the network. (A Mac's GPU gets batch after batch.)"""
    for images in (train, test):
        if images is not None and images.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(images.device)
            if 3 * images.pixels.numel() < free:
                images.pixels = images.pixels.to(images.device)

# The classes of the letters. No class is the mirror image of another, or another at another size.
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabefghmnrty123456789#$%&*+<=?@[{(~^!;\""

def letters(n, seed, size=32):
    """`n` drawings of GLYPHS -> pixels (n, 3, size, size) uint8, labels (n,), names.

    Each is turned, sheared, zoomed, moved and dimmed at random. All have the same ink and the same
    paper: if they differed in color, color would be the cheapest way to tell them apart, and
    nothing else would be learned.
    """
    font = ImageFont.load_default(1.6 * size)
    large = (2 * size, 2 * size)  # drawn so large and then halved, for smooth edges
    middle = size
    glyphs = []
    for glyph in GLYPHS:
        picture = Image.new("L", large)
        ImageDraw.Draw(picture).text((middle, middle), glyph, 255, font, anchor="mm")
        glyphs.append(picture)
    paper = torch.tensor([0.04, 0.05, 0.08])[:, None, None]
    color = torch.tensor([0.55, 0.95, 0.65])[:, None, None]
    labels = torch.arange(n) % len(GLYPHS)
    numbers = 2 * torch.rand(6, n, generator=seeded("letters", seed)) - 1
    pictures = []
    for label, (turn, shear, zoom, x, y, light) in zip(labels, numbers.T.tolist()):
        # Pixel (column, row) of the new picture is read from the glyph's picture at (a column + b
        # row + c, d column + e row + f): a shear, then a turn by 22 degrees at most, divided by the
        # zoom. c and f keep the middle in place, but for the move by x and y.
        angle = math.radians(22 * turn)
        scale = 0.775 + 0.225 * zoom
        a = math.cos(angle) / scale
        d = math.sin(angle) / scale
        b = 0.25 * shear * a - d
        e = 0.25 * shear * d + a
        x = middle * (0.2 * x - 1)
        y = middle * (0.2 * y - 1)
        places = (a, b, a * x + b * y + middle, d, e, d * x + e * y + middle)
        picture = glyphs[label].transform(large, Image.AFFINE, places, Image.BILINEAR)
        ink = torch.from_numpy(np.array(picture.reduce(2))) / 255
        picture = (0.8 + 0.2 * light) * torch.lerp(paper, color, ink)
        pictures.append((255 * picture).round().byte())
    return torch.stack(pictures), labels, list(GLYPHS)

def torchvision_set(name, root, is_train):
    """Pixels (N, 3, S, S), labels (N,) and class names of one of torchvision's data sets."""
    from torchvision import datasets
    kind = getattr(datasets, name.upper())
    flags = dict(train=is_train)
    if name == "stl10":
        flags = dict(split="train+unlabeled" if is_train else "test")
    try:
        with locked(Path(root) / f"{name}.lock"):  # one process downloads, the others find it there
            images = kind(root, download=True, **flags)
    except (OSError, RuntimeError) as error:  # no network, no room, or a damaged file
        raise InputError(f"--data {name}: not in {root}, nor downloaded to it ({error}); try "
                         "again, or name another --root") from None
    if name == "stl10":
        return torch.from_numpy(images.data), images.labels, list(images.classes)
    pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
    return pixels, images.targets, list(images.classes)

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
              ".pgm", ".avif")
# Pillow looks at what is in a file, not at its name. Without this list it would hand a file of
# PostScript that is called .jpg to Ghostscript, which runs it as a program.
FORMATS = sorted({kind for extension, kind in Image.registered_extensions().items()
                  if extension in EXTENSIONS})

TESTS = ("test", "val", "valid")  # names of a folder of held-out images

def load_folder(folder, root, size, device):
    """The images of a folder -> training Images; held-out Images or None; the side of a view.

    The folder holds CLASS/*, or train/CLASS/* and perhaps test/CLASS/*, which may also be called
    val/ or valid/. If there are several of these, the first one counts. If there is none,
    `hold_out` picks some of each class. If there are fewer than two classes, or if any image for
    training lies outside of the class folders, the images have no labels: all of these train, and
    test/ does not count.

    A `size` of None is the median of the images' shorter sides, rounded down to a multiple of 32,
    within 32..224, or on a CPU within 32..64. Images are stored as squares whose side is that
    median, but at least `size` and at most 1.5 times `size`: at 1.5 times few crops have to be
    enlarged.
    """
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder; or letters, cifar10, cifar100, stl10")
    train_folder = test_folder = folder
    train = names = scan(folder)
    test = []
    parts = {first_folder(name) for name in names}
    if "train" in parts and parts <= {"", "train", *TESTS}:  # else train/ is a class
        train_folder = folder / "train"
        train = below("train/", names)
        for part in TESTS:
            if part in parts and not test:
                test_folder = folder / part
                test = below(f"{part}/", names)
    if not train:
        raise InputError(f"--data {folder}: no image in it (looked for {' '.join(EXTENSIONS)}; "
                         "folders with an args.json or analysis.json do not count)")
    classes = sorted({first_folder(name) for name in train})
    if "" in classes and len(classes) > 2:
        loose = [name for name in train if "/" not in name]
        print0(f"no labels, since images lie outside of the class folders, such as {loose[0]}")
    if "" in classes or len(classes) < 2:
        classes = []
        test = []
    elif not test:
        test_folder = train_folder
        test = hold_out(train)
        train = sorted(set(train) - set(test))
    for name in test:
        if first_folder(name) not in classes:
            raise InputError(f"--data {test_folder / name}: {train_folder} has no such class")

    side = median_side([train_folder / name for name in train])
    most = 64 if device.type == "cpu" else 224
    size = size or min(most, max(32, side // 32 * 32))
    side = min(max(size, side), size * 3 // 2)
    load_part = partial(decoded, classes=classes, side=side, out=root / "decoded", device=device)
    return load_part(train_folder, train), load_part(test_folder, test), size

def scan(folder):
    """The names below `folder`, sorted, of the image files in it and in its folders. Hidden files
    and folders do not count, nor do those in which these scripts wrote results."""
    found = []
    for here, folders, files in os.walk(folder, onerror=refuse_folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if "args.json" in files or "analysis.json" in files:
            folders.clear()
            continue
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                found.append(os.path.relpath(os.path.join(here, name), folder))
    return sorted(found)

def refuse_folder(error):
    raise InputError(f"--data {error.filename}: {error.strerror}")

def first_folder(name):
    """The first folder in the name of a file, "" if there is none."""
    return name.split("/")[0] if "/" in name else ""

def below(folder, names):
    """The names that begin with `folder`, without it."""
    return [name.removeprefix(folder) for name in names if name.startswith(folder)]

def hold_out(names):
    """Those of the sorted names CLASS/* that are held out: of each class a tenth, but at least one
    image, and not the only one. A hash of the names picks them. So a new file moves at most one
    other image from training to held-out, or back."""
    held = []
    for _, members in groupby(names, first_folder):
        members = sorted(members, key=lambda name: zlib.crc32(os.fsencode(name)))
        n = len(members)
        held += members[:min(max(1, n // 10), n - 1)]
    return sorted(held)

def median_side(paths):
    """The median of the images' shorter sides, from the headers of 399 of them at most; 32 if none
    can be read."""
    sides = []
    for path in paths[::max(1, len(paths) // 200)]:
        try:
            with Image.open(path, formats=FORMATS) as image:
                sides.append(min(image.size))
        except Exception:  # PIL raises anything from OSError to struct.error on damaged files
            continue
    return int(np.median(sides)) if sides else 32

def decoded(folder, names, classes, side, out, device):
    """The Images of the files `names` in `folder`, as squares of `side` pixels; None for no file.

    They are decoded once, into a file in the folder `out` that is called by a hash of their
    paths, sizes and times. Of processes that need the same file, one decodes, the others wait.
    """
    if not names:
        return None
    paths = [folder / name for name in names]
    states = [os.stat(path, follow_symlinks=path.exists()) for path in paths]  # links may dangle
    sizes = [(name, state.st_size) for name, state in zip(names, states)]
    times = [state.st_mtime_ns for state in states]
    key = digest([str(folder.resolve()), sizes, times])
    file = out / f"{folder.resolve().name}-{side}px-{key}.pixels"
    if not file.exists():
        with locked(file.with_suffix(".lock")):
            if not file.exists():  # unless another process has just decoded them
                decode_files(paths, side, file)
    n = len(names)
    shapes = torch.from_numpy(np.fromfile(file, np.float32, 2 * n)).view(n, 2)
    # "c": whoever writes to the pixels changes a copy in memory, never the file
    pixels = np.memmap(file, np.uint8, "c", offset=8 * n).reshape(-1, 3, side, side)
    is_readable = shapes[:, 0] > 0
    unreadable = list(compress(names, (~is_readable).tolist()))
    if unreadable:
        print0(f"left out {len(unreadable)} unreadable images: {', '.join(unreadable[:5])}")
    names = list(compress(names, is_readable.tolist()))
    number = {label: i for i, label in enumerate(classes)}
    labels = torch.tensor([number.get(first_folder(name), -1) for name in names])
    return Images(torch.from_numpy(pixels), shapes[is_readable], labels, classes, device,
                  fingerprint=f"{len(names)} {digest(sizes)}")

def digest(values):
    return hashlib.sha1(repr(values).encode()).hexdigest()[:16]

def decode_files(paths, side, file):
    """Decode n images into a file: first heights and widths (n, 2) float32, 0 for an unreadable
    image; then the pixels (3, side, side) uint8 of each readable one."""
    shapes = np.zeros((len(paths), 2), np.float32)
    with writing(file) as output, ThreadPool(min(16, os.cpu_count())) as pool:
        output.write(shapes)  # zeros, in the place of what is known at the end
        for first in range(0, len(paths), 256):  # at most 256 decoded images are in memory
            if first % 2560 == 0:
                print(f"decoding {first:,}/{len(paths):,} images", flush=True)
            images = pool.map(partial(decode, side=side), paths[first:first + 256])
            for row, image in enumerate(images, first):
                if image is not None:
                    pixels, height, width = image
                    shapes[row] = height, width
                    output.write(pixels.tobytes())
        if not shapes.any():
            raise InputError(f"--data: none of {len(paths):,} is readable, such as {paths[0]}")
        output.seek(0)
        output.write(shapes)
    print(f"decoded {len(paths):,} images to {file}", flush=True)

# A large image may need 2 GB of memory, also where its file is small. So one thread decodes all
# large ones, one after the other. (A lock would not do: malloc keeps the memory of each thread.)
LARGE = 2 ** 24  # pixels
large_images = ThreadPoolExecutor(1)

def decode(path, side):
    """The image in a file: pixels (3, side, side) uint8, height, width; None if unreadable."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            image.draft(None, (side, side))  # a JPEG at 1/2, 1/4 or 1/8, if that is large enough
            stored = image.size
            if math.prod(stored) > LARGE:
                small, upright = large_images.submit(shrink, image, side).result()
            else:
                small, upright = shrink(image, side)
    except Exception:  # PIL raises anything from OSError to struct.error on damaged files
        return None
    if upright != stored:  # rows and columns have changed places
        width, height = height, width
    return np.asarray(small).transpose(2, 0, 1), height, width

def shrink(image, side):
    """A PIL image -> the same, upright, as RGB of side x side; its upright width and height."""
    ImageOps.exif_transpose(image, in_place=True)
    return as_rgb(image).resize((side, side), Image.BILINEAR, reducing_gap=2), image.size

def as_rgb(image):
    """Any PIL image as RGB: 16 bits are scaled to 8, and behind transparency is white.

    Raises ValueError for numbers beyond 16 bits and for floats, whose white may be any number.
    """
    if image.mode[0] in "IF":  # modes I and I;16 are integers, F is floats
        gray = np.asarray(image)
        if image.mode == "F" or gray.min() < 0 or gray.max() > 65535:
            raise ValueError
        image = Image.fromarray((gray / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

# ------------------------------- 4. what all scripts share: errors, flags, device, processes, files

class InputError(ValueError):
    """Something the user gave is wrong: one line that names the flag or file and how to fix it."""

def run(main):
    """Call a script's main(), and end with one line instead of a traceback where the user can help:
    on a wrong flag or file, on what the disk refuses, and on Ctrl-C."""
    script = Path(sys.argv[0]).name
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (InputError, OSError) as error:
        sys.exit(f"{script}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\n{script}: stopped; pretrain.py goes on with --out FOLDER --resume")

def positive(text):
    """The type of a flag that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)

def fraction(text):
    """The type of a flag that is a number within 0..1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no number within 0..1")
    return value

def init_device(name):
    """The device called `name`; auto is the first there is of cuda, mps and cpu. Under torchrun,
    this also makes the group of processes."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    if name == "cuda":  # each process has its own; touching the first one would take memory there
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    libc = ctypes.CDLL(None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    elif hasattr(libc, "mallopt"):
        # glibc gives the memory of large tensors back to the kernel, which has to clear it before
        # the next use. At 224 pixels that takes half of a step on a CPU. So glibc may neither map
        # memory for a tensor (M_MMAP_MAX, -4) nor give any back (M_TRIM_THRESHOLD, -1).
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # float32 means float32, not TF32
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # gloo for tensors on the CPU, nccl for those on a GPU; one process may decode for hours
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device

def to_device(x, device):
    """A tensor on the device. The CPU does not wait for a copy to a GPU."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)

def rank_world():
    """The number of this process, and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

def gather(x):
    """The rows of all processes' x, in the order of the processes; each x has the same shape."""
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

@contextmanager
def locked(path, wait=True):
    """Hold the file `path` while the `with` block runs, against all other processes.

    The lock ends with its process, however that ends. If another process holds the file, wait, or
    with `wait` False raise InputError. Where the file system has no locks, nothing is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    with open(path, "w") as file:
        try:
            fcntl.flock(file, kind)
        except BlockingIOError:
            raise InputError(f"{path.parent}: another process works in this folder") from None
        except OSError:
            pass
        yield

@contextmanager
def writing(path):
    """The file `path`, opened to be written. It has its name only when the `with` block has ended:
    nobody ever sees half a file. Raises OSError if it cannot be written."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch calls a full disk by many names
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written; is the disk full? ({reason})") from None
    finally:
        temporary.unlink(missing_ok=True)

def save(path, content):
    """Write a text or a torch file."""
    with writing(path) as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            torch.save(content, file)

def load_file(path):
    """What torch.load reads from a file, onto the CPU and without running code that is in the file.
    Raises InputError if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such checkpoint file") from None
    except Exception as error:  # cut off, no torch file, or one that would run code
        raise InputError(f"{path}: not read ({type(error).__name__}): torn, no checkpoint, or more "
                         "than tensors and plain values; save its state_dict() alone") from None
