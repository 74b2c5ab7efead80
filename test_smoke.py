"""python -m pytest test_smoke.py: every formula is compared with something independent of it, and
every script runs from end to end. Nothing is downloaded; images and checkpoints are made here.

python -m pytest test_smoke.py -k cuda: what only a GPU can show.
"""
import argparse
import copy
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import socket
import sys
import time
from contextlib import nullcontext
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import RandomResizedCrop

import analyze
import data
import linear_eval
import models
import pretrain
from data import InputError

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
TORCHVISION = dict(resnet18="resnet18", resnet34="resnet34", resnet50="resnet50",
                   mobilenetv3="mobilenet_v3_large", mobilenetv3_small="mobilenet_v3_small",
                   efficientnet_b0="efficientnet_b0", efficientnet_b1="efficientnet_b1")
SMALL = "--arch mobilenetv3_small --batch 8 --queue 16 --size 32 --stem imagenet".split()
CPU = torch.device("cpu")
torch.set_num_threads(1)  # sums of several threads have other bits, and small work gains nothing

def be_quick(setattr=setattr):
    """Few steps of t-SNE and few raw pixels, where a test does not ask for more."""
    setattr(analyze, "tsne", partial(analyze.tsne, steps=20))
    setattr(linear_eval.Pixels, "most", 8)

@pytest.fixture(autouse=True)
def little_work(tmp_path, monkeypatch):
    """Removes what a test wrote when it ends: all tests together would leave some gigabytes."""
    be_quick(monkeypatch.setattr)
    yield
    shutil.rmtree(tmp_path)

def generator(seed):
    return torch.Generator().manual_seed(seed)

def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=generator(seed), dtype=dtype)

def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=generator(seed), dtype=torch.float64), dim=1)

def photo(h, w, seed=0):
    """A smooth random picture (3, h, w) uint8 away from black and white, so that nothing clips."""
    x = F.interpolate(rand(1, 3, 6, 6, seed=seed), (h, w), mode="bicubic", align_corners=False)[0]
    return (70 + 90 * x.clamp(0, 1)).round().byte()

def picture(h, w, seed=0):
    return TF.to_pil_image(photo(h, w, seed))

def make_folder(folder, classes=("a", "b c", "ü"), per=8, side=32, seed=0):
    """`per` images in a folder for each class, of which the first one alone is square."""
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(per):
            image = picture(side, side + 4 * j, seed + 100 * i + j)
            image.save(folder / name / f"{j} é.jpg")

@pytest.fixture(scope="session")
def flat(tmp_path_factory):
    """Flags of 20 images without labels, which no test changes."""
    here = tmp_path_factory.mktemp("flat")
    make_folder(here / "images", classes=".", per=20)
    return ["--data", str(here / "images"), "--root", str(here), *SMALL]

@pytest.fixture(scope="session")
def flat_images(flat):
    return load(flat[1], flat[3], size=32)[0]

@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Flags of three classes with 14 training images and 5 held-out ones each."""
    here = tmp_path_factory.mktemp("labelled")
    make_folder(here / "images/train", per=14)
    make_folder(here / "images/test", per=5, seed=50)
    return ["--data", str(here / "images"), "--root", str(here), *SMALL]

def run(*argv):
    return pretrain.main(["--device", "cpu", *map(str, argv)])

def evaluate(*argv):
    return linear_eval.main(["--device", "cpu", *map(str, argv)])

def look(*argv):
    return analyze.main(["--device", "cpu", *map(str, argv)])

def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

# new processes are forked from one that has imported all this, and do not wait for torch to load
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_smoke"])

def processes(world, function, *args):
    """What function(*args) returns in each of the `world` processes of a group, which are started
    as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = FORKS.SimpleQueue()
    jobs = []
    for rank in range(world):
        member = (rank, world, port, results, function, args)
        jobs.append(FORKS.Process(target=be_process, args=member))
        jobs[-1].start()
    for job in jobs:
        job.join(100)
        job.kill()
    assert [job.exitcode for job in jobs] == [0] * world
    return [result for _, result in sorted(results.get() for _ in jobs)]

def be_process(rank, world, port, results, function, args):
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()})
    be_quick()
    results.put((rank, function(*args)))
    if dist.is_initialized():
        dist.destroy_process_group()

class Tiny(torch.nn.Sequential):
    """A network that is fast: images (N, 3, H, W) -> features (N, 8)."""
    dim = 8

    def __init__(self, small=False, norm=torch.nn.BatchNorm2d):
        super().__init__(torch.nn.Conv2d(3, 8, 5, 2), torch.nn.Conv2d(8, 8, 3, bias=False),
                         norm(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                         torch.nn.Flatten())

# the statistics of small batches would amplify rounding
NoBatchNorm = partial(Tiny, norm=torch.nn.Identity)

@pytest.fixture
def tiny(monkeypatch):
    """The network in SMALL is Tiny where it does not matter which it is."""
    monkeypatch.setitem(models.ARCHS, "mobilenetv3_small", Tiny)

# -------------------------------------------------------------------------------------- models.py

def reference_network(arch):
    """torchvision's network in double precision, its last Linear and its dropout taken out."""
    flags = dict(stochastic_depth_prob=0) if arch.startswith("eff") else {}
    net = getattr(torchvision.models, TORCHVISION[arch])(**flags)
    if arch.startswith("resnet"):
        net.fc = torch.nn.Identity()
    elif arch.startswith("mobile"):
        net.classifier = net.classifier[:2]
    else:
        net.classifier = torch.nn.Identity()
    for m in net.modules():  # statistics and affine parameters that matter
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            torch.nn.init.normal_(m.bias, 0, 0.1)
    return net.double()

@pytest.mark.parametrize("arch", TORCHVISION)
def test_network_is_torchvisions(arch):
    torch.manual_seed(0)
    ref = reference_network(arch)
    net = models.build(arch, "imagenet").double()
    assert list(net.state_dict()) == list(ref.state_dict())
    net.load_state_dict(ref.state_dict())
    models.speed_up_small_maps(net)
    for side, is_training in ((32, False), (32, True), (40, True)):  # maps end as 1x1 or 2x2
        x = rand(4, 3, side, side, dtype=torch.float64).requires_grad_()
        y = x.detach().clone().requires_grad_()
        a = ref.train(is_training)(x)
        b = net.train(is_training)(y)
        a.pow(2).sum().backward()
        b.pow(2).sum().backward()
        assert b.shape == (4, net.dim)
        assert (a - b).abs().max() <= 1e-9 * a.abs().max()
        for p, q in zip((x, *ref.parameters()), (y, *net.parameters())):
            assert (p.grad - q.grad).norm() <= 1e-7 * p.grad.norm() + 1e-9
            p.grad = q.grad = None

def zero_weights(net):
    return {name for name, w in net.named_parameters() if name.endswith("weight") and not w.any()}

@pytest.mark.parametrize("arch", TORCHVISION)
def test_blocks_start_as_the_identity(arch):
    peer = getattr(torchvision.models, TORCHVISION[arch])
    if arch.startswith("resnet"):
        expected = zero_weights(peer(zero_init_residual=True))
    else:
        expected = {f"{name}.block.{len(block.block) - 1}.1.weight" for name, block
                    in peer().named_modules() if getattr(block, "use_res_connect", False)}
    net = models.build(arch)
    models.start_as_identity(net)
    assert zero_weights(net) == expected and len(expected) >= 6

@pytest.mark.parametrize("arch,last,small", [
    ("resnet18", "layer4", 4), ("mobilenetv3", "features", 2), ("efficientnet_b0", "features", 2)])
def test_small_stem_keeps_resolution(arch, last, small):
    shapes = []
    for stem in ("imagenet", "small"):
        net = models.build(arch, stem).eval()
        getattr(net, last).register_forward_hook(lambda m, i, o: shapes.append(o.shape[-1]))
        assert net(torch.zeros(1, 3, 32, 32)).shape == (1, net.dim)
    assert shapes == [1, small]

@pytest.mark.parametrize("kind,widths", [
    ("linear", [8]), ("simple", [16, 8]), ("wide", [32, 8]), ("deep", [16, 16, 8])])
def test_heads(kind, widths):
    head = models.make_head(kind, 16, 8)
    assert [m.out_features for m in head[::2]] == widths

def test_models_needs_torch_alone():
    modules = re.findall(r"^ *(?:from|import) (\w+)", (HERE / "models.py").read_text(), re.M)
    assert set(modules) == {"math", "functools", "torch"}

# ---------------------------------------------------------------------------------------- data.py

def normalize(x):
    return TF.normalize(x, data.MEAN, data.STD)

@pytest.mark.parametrize("box", [(0, 0, 50, 70), (3, 10, 40, 33), (20, 5, 9, 12), (49, 69, 1, 1)])
def test_resampling_is_torchs_antialiased_crop(box):
    image = photo(50, 70).float()
    top, left, h, w = torch.tensor([box]).float().T
    rows = data.resampling(top, h, 50, 24)
    columns = data.resampling(left, w, 70, 24)
    ours = rows @ image @ columns.mT
    expected = TF.resized_crop(image, *box, [24, 24], antialias=True)
    assert (ours - expected).abs().max() < 0.02

def test_no_row_of_a_fractional_box_is_empty():
    begin = 40 * rand(2000)
    length = ((48 - begin) * rand(2000, seed=1) ** 8).clamp(min=1e-3)
    for size in (1, 7, 64):
        rows = data.resampling(begin, length, 48, size).sum(2)
        assert_close(rows, torch.ones(2000, size))

@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_is_torchvisions(sigma):
    image = photo(48, 48).float()
    side = torch.full((1,), 48.0)
    blur = data.resampling(0 * side, side, 48, 48, sigma=torch.tensor([sigma]))
    difference = blur @ image @ blur.mT - TF.gaussian_blur(image, [25, 25], [sigma, sigma])
    assert difference[:, 13:-13, 13:-13].abs().max() < 0.01  # torchvision reflects at the border

def jitter(image, **factors):
    """An image (3, H, W) in 0..1 through data.color_matrix."""
    given = dict(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0) | factors
    given = {name: torch.tensor([value]) for name, value in given.items()}
    on_pixel, on_mean = data.color_matrix(**given)
    mean = image.mean((1, 2))[:, None]
    return (on_pixel[0] @ image.flatten(1) + on_mean[0] @ mean).view(image.shape)

def test_color_is_torchvisions():
    image = photo(32, 32).float() / 255
    factors = dict(brightness=1.1, contrast=0.8, saturation=0.7)
    for order in itertools.permutations(factors):
        expected = image
        for name in order:
            expected = getattr(TF, f"adjust_{name}")(expected, factors[name])
        assert_close(jitter(image, **factors), expected, atol=4e-3, rtol=0)
    gray = TF.rgb_to_grayscale(image, 3)
    assert_close(jitter(image, saturation=0.0), gray, atol=2e-3, rtol=0)
    turned = jitter(image, hue=0.2)
    assert_close(TF.rgb_to_grayscale(turned), gray[:1], atol=2e-3, rtol=0)
    assert_close(jitter(turned, hue=0.8), image)  # a whole turn is none

def test_augment_joins_its_parts():
    images = torch.stack([photo(40, 40, seed=i) for i in range(3)])
    u = torch.full((3, data.COLUMNS), 0.999)
    u[:, data.RATIO] = 0.5
    still = data.augment(images, u, 40, crop=(1, 1))
    assert_close(still, normalize(images / 255), atol=1e-4, rtol=0)
    u = rand(3, data.COLUMNS, seed=1)
    u[:, [data.FLIP, data.JITTER, data.BLUR]] = 0.1
    u[:, data.GRAY] = torch.tensor([0.99, 0.99, 0])
    ours = data.augment(images, u, 24, crop=(0.2, 1), hue=0)
    sides = torch.full((3, 2), 40.0)
    for i, box in enumerate(data.crop_boxes(u, sides, (0.2, 1)).int().tolist()):
        y = TF.hflip(TF.resized_crop(images[i] / 255, *box, [24, 24], antialias=True))
        brightness, contrast, saturation = 0.6 + 0.8 * u[i, data.BRIGHTNESS:data.HUE]
        y = TF.adjust_contrast(TF.adjust_brightness(y, brightness), contrast)
        y = TF.adjust_saturation(y, saturation if i < 2 else 0)
        sigma = (0.1 + 1.9 * u[i, data.SIGMA].item()) * 24 / 224
        y = normalize(TF.gaussian_blur(y, [9, 9], [sigma, sigma]))
        assert (ours[i] - y)[:, 2:-2, 2:-2].abs().max() < 0.05

def one_crop(u, height, width, scale):
    """torchvision's RandomResizedCrop, which is given its uniform numbers."""
    uniform = iter(torch.stack([u[data.AREA], u[data.RATIO]], 1).flatten())
    place = iter(u[[data.TOP, data.LEFT]])
    scaled = lambda x, low, high: x.fill_(low + (high - low) * next(uniform))
    with patch.object(torch.Tensor, "uniform_", scaled):
        with patch.object(torch, "randint", lambda low, high, size: (next(place) * high).int()):
            image = torch.empty(1, height, width)
            return RandomResizedCrop.get_params(image, scale, [3 / 4, 4 / 3])

@pytest.mark.parametrize("height,width", [(32, 32), (100, 40), (10, 400), (1, 1)])
def test_crop_boxes_are_torchvisions(height, width):
    u = rand(200, data.COLUMNS)
    shapes = torch.tensor([[height, width]]).float().repeat(200, 1)
    ours = data.crop_boxes(u, shapes, (0.2, 1)).int().tolist()
    expected = [list(one_crop(row, height, width, (0.2, 1))) for row in u]
    assert sum(map(list.__ne__, ours, expected)) <= 2  # float32 may round a half the other way

def test_the_draws_of_a_step_are_a_function_of_seed_and_step():
    steps = [data.draw_step(50, 8, 3, step) for step in range(6)]
    assert len(torch.cat([rows for rows, _, _ in steps]).unique()) == 48
    assert not torch.equal(steps[0][0], data.draw_step(50, 8, 4, 0)[0])
    assert all(order.sort()[0].tolist() == list(range(8)) for _, _, order in steps)
    assert_close(steps[5], data.draw_step(50, 8, 3, 5), rtol=0, atol=0)
    assert not torch.equal(steps[4][1], steps[5][1])

def test_letters():
    pixels, labels, names = data.letters(128, 0)
    assert pixels.shape == (128, 3, 32, 32) and labels.bincount().tolist() == [2] * len(names)
    same, another = data.letters(128, 0)[0], data.letters(128, 1)[0]
    assert torch.equal(pixels, same) and not torch.equal(pixels, another)

def load(folder, root, size=None):
    return data.load(str(folder), str(root), size)

def test_every_kind_of_picture_becomes_rgb(tmp_path):
    image = picture(24, 24)
    gray = image.convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    for name, saved, expected in (
            ("palette.png", image.quantize(256), image), ("cmyk.tif", image.convert("CMYK"), image),
            ("deep.png", deep, gray)):
        saved.save(tmp_path / name)
        pixels, _, _ = data.decode(tmp_path / name, 24)
        error = pixels - TF.pil_to_tensor(expected).numpy().astype(int)
        assert np.abs(error).mean() < 4, name

@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_are_turned_upright(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"turned.{kind}"
    picture(24, 30).save(file, exif=exif, quality=99)
    upright = TF.pil_to_tensor(ImageOps.exif_transpose(Image.open(file)))
    pixels, height, width = data.decode(file, 24)
    assert (height, width) == upright.shape[1:]
    expected = TF.resize(upright, [24, 24], antialias=True).numpy()
    assert np.abs(pixels.astype(int) - expected).max() <= 4

def test_no_image_is_handed_to_another_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "evil.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    assert data.decode(tmp_path / "evil.jpg", 24) is None
    assert not (tmp_path / "ran").exists()

def test_folders(tmp_path, capsys):
    make_folder(tmp_path / "split/train")
    make_folder(tmp_path / "split/test", per=2, seed=50)
    make_folder(tmp_path / "split/valid", classes="x")  # test/ counts
    strange = tmp_path / "split/train/a"
    (strange / "html.jpg").write_text("<html>")
    (strange / "torn.jpg").write_bytes((strange / "7 é.jpg").read_bytes()[:300])
    Image.new("1", (30000, 30000)).save(strange / "bomb.png")  # 100 kB that would be 2.7 GB
    picture(9, 9).save(os.fsencode(strange) + b"/no text \xff.png", "png")
    make_folder(tmp_path / "split/train", classes=(".thumbnails", "runs"))
    (tmp_path / "split/train/runs/args.json").touch()
    data.init_device("cpu")  # then names that are no text can be printed
    train, test, size = load(tmp_path / "split", tmp_path)
    assert (len(test), size) == (6, 32)
    assert train.classes == ["a", "b c", "ü"]
    assert train.labels.bincount().tolist() == [9, 8, 8]
    printed = capsys.readouterr().out
    for name in ("3 unreadable", "html.jpg", "torn.jpg"):
        assert name in printed
    picture(9, 9).save(tmp_path / "split/train/loose.png")
    train, test, _ = load(tmp_path / "split", tmp_path)
    assert (len(train), test, train.classes) == (26, None, [])
    assert "no labels" in capsys.readouterr().out

def test_a_class_may_be_called_train(tmp_path):
    make_folder(tmp_path / "images", classes=("bus", "car", "train"), per=30, side=8)
    train, test, _ = load(tmp_path / "images", tmp_path)
    assert train.classes == ["bus", "car", "train"] and len(train) + len(test) == 90

def test_a_class_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    make_folder(tmp_path / "images")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b c"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="b c"):
        load(tmp_path / "images", tmp_path)

def test_what_is_held_out_depends_on_the_names_of_class_and_file_alone(tmp_path):
    make_folder(tmp_path / "images/train", classes="ab", per=100, side=8)
    train, test, _ = load(tmp_path / "images", tmp_path)
    assert 10 <= len(test) <= 30 and len(train) + len(test) == 200
    (tmp_path / "images/train").rename(tmp_path / "renamed")
    assert torch.equal(load(tmp_path / "renamed", tmp_path)[1].pixels, test.pixels)
    picture(8, 8).save(tmp_path / "renamed/a/new.jpg")
    assert len(load(tmp_path / "renamed", tmp_path)[1]) - len(test) in (0, 1)

def test_small_classes_have_images_on_both_sides(tmp_path):
    make_folder(tmp_path / "images", classes=map(str, range(20)), per=2, side=8)
    for images in load(tmp_path / "images", tmp_path)[:2]:
        assert images.labels.tolist() == list(range(20))

def test_views_of_the_decoded_folder_are_crops_of_the_original(tmp_path):
    (tmp_path / "images").mkdir()
    shapes = [[300, 400], [420, 280], [350, 350], [240, 610]]
    for i, shape in enumerate(shapes):
        picture(*shape, seed=i).save(tmp_path / f"images/{i}.png")
    images, _, _ = load(tmp_path / "images", tmp_path, size=112)
    assert images.shapes.tolist() == shapes
    u = rand(4, data.COLUMNS, seed=5)
    pixels, sides = images.get(torch.arange(4))
    views = data.augment(pixels, u, 112, (0.2, 1), 0, 0, 0, 0, sides)
    boxes = data.crop_boxes(u, sides, (0.2, 1)).int().tolist()
    for i, box in enumerate(boxes):
        original = photo(*shapes[i], seed=i) / 255
        crop = TF.resized_crop(original, *box, [112, 112], antialias=True)
        if u[i, data.FLIP] < 0.5:
            crop = TF.hflip(crop)
        error = (views[i] - normalize(crop)) * torch.tensor(data.STD)[:, None, None]
        assert -10 * math.log10(error.square().mean()) > 35  # PSNR

def test_a_folder_is_decoded_again_when_it_changes(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path / "flat", classes=".", per=5)
    images = [load(tmp_path / "flat", tmp_path)[0]]
    for name in ("0 é.jpg", "more.jpg"):  # another image of that name, a new one
        picture(32, 32, seed=9).save(tmp_path / "flat" / name, quality=30)
        images.append(load(tmp_path / "flat", tmp_path)[0])
    assert [len(x) for x in images] == [5, 5, 6]
    assert len({x.fingerprint for x in images}) == 3
    capsys.readouterr()
    monkeypatch.setattr(Path, "mkdir", None)  # a folder once decoded may be read-only
    monkeypatch.chdir(tmp_path)
    assert len(load("flat", ".")[0]) == 6
    assert "decoded" not in capsys.readouterr().out

def test_large_images_are_decoded_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGE", 100)
    picture(20, 20).save(tmp_path / "large.png")
    as_rgb = data.as_rgb
    running = []

    def slow(image):
        running.append(image)
        time.sleep(0.02)
        assert running.pop() is image and not running
        return as_rgb(image)

    monkeypatch.setattr(data, "as_rgb", slow)
    with ThreadPool(4) as pool:
        assert None not in pool.map(partial(data.decode, side=8), 4 * [tmp_path / "large.png"])

def decode_slowly(folder, root):
    decode = data.decode
    data.decode = lambda path, side: time.sleep(0.05) or decode(path, side)
    images = data.load(folder, root)[0]
    print(len(images), images.pixels.long().sum(), file=open(f"{root}/{os.getpid()}.txt", "w"))

def test_killed_while_decoding_and_two_at_once(tmp_path):
    make_folder(tmp_path / "flat", classes=".", per=20)
    jobs = []
    for _ in range(3):
        jobs.append(FORKS.Process(target=decode_slowly, args=(tmp_path / "flat", tmp_path)))
    jobs[0].start()
    while not list(tmp_path.glob("decoded/*tmp*")):
        time.sleep(0.01)
    jobs[0].kill()
    for job in jobs[1:]:
        job.start()
    for job in jobs[1:]:
        job.join()
    one, other = [file.read_text() for file in tmp_path.glob("*.txt")]
    assert one == other and one.startswith("20 ")
    assert len(list(tmp_path.glob("decoded/*.pixels"))) == 1

def test_torchvisions_data_sets(tmp_path, monkeypatch):
    pixels = (rand(4, 32, 32, 3) * 255).byte().numpy()

    class CIFAR10:
        data, targets, classes = pixels, [3, 1, 4, 1], "abcde"

        def __init__(self, root, train, download):
            assert download

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    train, test, size = data.load("cifar10", str(tmp_path))
    assert size == 32 and test.labels.tolist() == [3, 1, 4, 1]
    assert torch.equal(train.pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2))

def test_a_file_that_is_written_is_never_seen_half_done(tmp_path, monkeypatch):
    file = tmp_path / "last.pt"
    data.save(file, 1)
    write = torch.save

    def slow_save(content, opened):
        opened.write(b"half")
        assert data.load_file(file) == 1
        with monkeypatch.context() as another_process:
            another_process.setattr(torch, "save", write)
            another_process.setattr(os, "getpid", lambda: 1)
            data.save(file, 2)
        opened.seek(0)
        write(content, opened)

    monkeypatch.setattr(torch, "save", slow_save)
    data.save(file, 3)
    assert data.load_file(file) == 3 and os.listdir(tmp_path) == ["last.pt"]

def full_disk(*args):
    raise OSError(28, "No space left on device")

# ------------------------------------------------------------------------------------ pretrain.py

def embeddings(N, C, K):
    """Queries, near to far from their keys; the rows of these keys in the queue; the queue, with
    some hard negatives. Queries and keys are float64."""
    queue = unit(K, C, seed=2)
    order = torch.randperm(K, generator=generator(1))
    own, hard = order[:N], order[N::2]
    distance = torch.linspace(0.2, 3, N, dtype=torch.float64)[:, None]
    q = F.normalize(queue[own] + unit(N, C, seed=3) * distance, dim=1)
    queue[hard] = F.normalize(q[:1] + 0.5 * queue[hard], dim=1)
    queue[own[0]] = -q[0]  # nearly the smallest softmax weight there can be
    return q, own, queue

def cross_entropy(q, own, queue, temperature):
    """InfoNCE as papers write it, -log(exp(q.k / T) / sum_j exp(q.u_j / T)), and its gradient."""
    q = q.detach().clone().requires_grad_()
    exponentials = (q @ queue.T / temperature).exp()
    loss = -(exponentials[range(len(q)), own] / exponentials.sum(1)).log().mean()
    return loss.detach(), torch.autograd.grad(loss, q)[0]

@pytest.mark.parametrize("temperature", [0.03, 0.2, 1.0])
@pytest.mark.parametrize("N,C,K", [(1, 32, 1), (3, 100, 7), (64, 128, 4096), (300, 256, 1021)])
@pytest.mark.parametrize("name", ["info_nce", "info_nce_plain"])
def test_info_nce_is_cross_entropy(name, N, C, K, temperature):
    loss, gradient = cross_entropy(*embeddings(N, C, K), temperature)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 5e-6)):
        q, own, queue = embeddings(N, C, K)
        q, queue = q.to(dtype).requires_grad_(), queue.to(dtype).requires_grad_()
        ours = getattr(pretrain, name)(q, own, queue, temperature)
        ours.backward()
        size = tolerance / temperature  # a logit's, and that of a query's gradient
        assert abs(ours - loss) <= size
        assert (q.grad - gradient).norm() <= size * (1 + gradient.norm())
        assert name == "info_nce_plain" or queue.grad is None

class LargestTensor(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            self.size = max(self.size, x.numel() if torch.is_tensor(x) else 0)
        return out

def test_info_nce_never_holds_the_logits():
    for name, fits in (("info_nce", True), ("info_nce_plain", False)):
        q, own, queue = embeddings(256, 16, 16384)
        with LargestTensor() as largest:
            q = q.float().requires_grad_()
            getattr(pretrain, name)(q, own, queue.float(), 0.1).backward()
        assert (largest.size < 256 * 16384 / 4) == fits

def test_instance_accuracy():
    q, own, queue = embeddings(100, 16, 500)
    expected = [(queue @ x).argsort()[-1] == row for x, row in zip(q[:64], own)]
    assert 0 < sum(expected) < 64
    assert pretrain.instance_accuracy(q, own, queue) == pytest.approx(np.mean(expected))

def tiny_moco(queue=10, splits=1):
    torch.manual_seed(0)
    encoder = pretrain.Encoder(Tiny(), torch.nn.Linear(8, 4))
    return pretrain.MoCo(encoder, 4, queue, splits)

def prepare_step(args, queue, muon):
    """A MoCo, its optimizer and scaler, and a function that takes a step."""
    moco = tiny_moco(queue)
    optimizer = pretrain.Muon(moco.encoder_q, 0.1, muon, 1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parts = moco, moco.encoder_q, optimizer, scaler, nullcontext(), args
    return moco, optimizer, scaler, partial(pretrain.train_step, *parts)

def test_the_queue_holds_the_latest_keys():
    moco = tiny_moco()
    history = []
    for step in range(9):  # 10 is no multiple of 4: wraps around in the middle of a batch
        keys = unit(4, 4, seed=step).float()
        history += keys.tolist()
        assert_close(moco.queue[moco.enqueue(keys)], keys)
        if len(history) >= 10:
            assert sorted(moco.queue.tolist()) == sorted(history[-10:])

def test_keys_are_normalized_in_shuffled_parts_and_come_back_in_order():
    x = rand(8, 3, 16, 16)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    encoder = tiny_moco().encoder_q.train()
    expected = torch.empty(8, 4)
    for part in (order[:4], order[4:]):
        expected[part] = encoder(x[part]).detach()
    assert_close(expected.norm(dim=1), torch.ones(8))
    assert_close(tiny_moco(splits=2).encode_keys(x[order], order), expected)
    assert not torch.allclose(tiny_moco().encode_keys(x[order], order), expected, atol=1e-3)

@pytest.mark.parametrize("keys", ["--weak-keys", "--no-weak-keys"])
def test_a_step_is_what_the_readme_says(keys, flat_images):
    args = filled(20, *SMALL, keys, "--temp", "0.3", "--momentum", "0.9", "--crop", "0.3", "0.9")
    moco, _, _, take_step = prepare_step(args, queue=16, muon=0)
    moco.hardness.fill_(0.5)
    q, k = [copy.deepcopy(net) for net in (moco.encoder_q, moco.encoder_k)]
    queue = moco.queue.clone()
    sgd = torch.optim.SGD(q.parameters(), 0.1, 0.9, weight_decay=1e-3)
    for step in range(3):
        h = moco.hardness.item()
        weak = dict(jitter=0.4 * h, hue=0.1 * h, gray=0.2 * h, blur=0)
        loss, accuracy = take_step(pretrain.load_batch(flat_images, args, step))
        assert moco.hardness.item() == pytest.approx(h + 0.01 * (accuracy - 0.6))
        rows, u, _ = data.draw_step(20, 8, 0, step)
        pixels, shapes = flat_images.get(rows)
        crop = (0.3 * (1 - 0.6 * h), 0.9)
        augment = partial(data.augment, pixels, size=32, crop=crop, shapes=shapes)
        for new, old in zip(q.parameters(), k.parameters()):
            old.copy_(0.9 * old + 0.1 * new.detach())
        own = range(8 * step % 16, 8 * step % 16 + 8)
        queue[own] = k(augment(u=u[1], **weak if keys == "--weak-keys" else {}))
        embedded = q(augment(u=u[0]))
        expected, gradient = cross_entropy(embedded, own, queue, 0.3)
        hits = (embedded @ queue.T).argmax(1) == torch.tensor(own)
        assert accuracy == hits.float().mean()
        embedded.backward(gradient)
        sgd.step()
        sgd.zero_grad()
        assert_close((loss, moco.queue), (expected, queue))
    assert_close(moco.encoder_q.state_dict(), q.state_dict())
    assert_close(moco.encoder_k.state_dict(), k.state_dict())

def test_schedule():
    args = pretrain.parse(["--warmup", "2", "--steps", "100"])
    rates = [pretrain.schedule(args, step, 10) for step in range(100)]
    assert max(rates) == rates[19] and rates[-1] < 0.001
    assert [rates[0], rates[50]] == pytest.approx([1 / 20, 0.5])

@pytest.mark.parametrize("shape", [(5, 8), (6, 6), (3, 40), (192, 200)])
def test_orthogonal_is_a_polynomial_of_the_singular_values(shape):
    g = torch.randn(*shape, generator=generator(0), dtype=torch.float64)
    expected = []
    for part in g.split(64):  # above 160 rows
        u, s, v = torch.linalg.svd(part, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
        expected.append(u @ torch.diag(s) @ v)
    assert_close(pretrain.orthogonal(g), torch.cat(expected))
    assert_close(pretrain.orthogonal(g.T), torch.cat(expected).T)
    assert pretrain.orthogonal(0 * g).abs().max() == 0

@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_muon_is_sgd_but_for_dense_convolutions(muon):
    torch.manual_seed(0)
    net = models.build("mobilenetv3_small").double().to(memory_format=torch.channels_last)
    peer = copy.deepcopy(net)
    sgd = torch.optim.SGD(peer.parameters(), 0.1, 0.9, weight_decay=1e-3)
    optimizer = pretrain.Muon(net, 0.1, muon, 1e-3)  # its rates are right without a schedule
    expected = {name: w.detach().clone() for name, w in net.named_parameters()}
    momentum = {}
    for step in range(3):
        for (name, w), v in zip(net.named_parameters(), peer.parameters()):
            v.grad = rand(*w.shape, seed=step, dtype=torch.float64) - 0.5
            w.grad = torch.zeros_like(w).copy_(v.grad)
            if muon > 0 and w.ndim == 4 and w.shape[1] > 3 and "fc" not in name:
                momentum[name] = 0.95 * momentum.get(name, 0) + v.grad
                g = (v.grad + 0.95 * momentum[name]).flatten(1)
                move = pretrain.orthogonal(g) * max(1, len(g) / g.shape[1]) ** 0.5
                expected[name] = (1 - 0.1 * muon) * expected[name] - muon * move.view_as(v)
        optimizer.step()
        sgd.step()
        expected |= {name: v for name, v in peer.named_parameters() if name not in momentum}
    assert_close(dict(net.named_parameters()), expected)

class Graph(TorchDispatchMode):
    """A CUDA graph without a GPU: replays operations on the same tensors, with the same numbers."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.replays = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.operations.append((op, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        if self.replays == 1:
            return  # unlike on a GPU, these operations ran while they were recorded
        for op, args, kwargs, out in self.operations:
            for place, x in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs))):
                if torch.is_tensor(x) and x.data_ptr() != place.data_ptr():
                    place.copy_(x)

def test_a_recorded_step_of_a_resumed_run_is_a_step(flat_images, tmp_path, monkeypatch):
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **flags: graph)
    args = filled(20, *SMALL)
    ends = []
    for is_recorded in (False, True):
        moco, optimizer, scaler, step = prepare_step(args, queue=20, muon=0.02)
        if is_recorded:
            step = pretrain.Recorded(step)
        pretrain.save_run(tmp_path, moco, optimizer, scaler, 0, [])
        pretrain.restore(tmp_path / "last.pt", moco, optimizer, scaler)
        losses = []
        for i in range(9):
            optimizer.scale_rates(1 / (i + 1))
            losses.append(step(pretrain.load_batch(flat_images, args, i)).clone())
        ends.append((losses, moco.state_dict()))
    assert_close(*ends)
    assert step.graph.replays == 6

def test_views_get_harder_while_the_task_is_too_easy():
    hardness = torch.tensor(0.5)
    for accuracy, steps, expected in ((0.7, 100, 0.6), (0.7, 900, 1), (0.55, 50, 0.975)):
        for _ in range(steps):
            pretrain.steer(hardness, torch.tensor(accuracy), target=0.6)
        assert hardness.item() == pytest.approx(expected, abs=1e-4)

def filled(n, *flags, world=1):
    """The flags of a run of n images, all of which must have passed the check."""
    args = pretrain.parse(["--data", "folder", "--size", "32", *flags])
    images = data.Images(None, None, torch.zeros(n), [], CPU, "")
    with patch.object(pretrain, "rank_world", lambda: (0, world)):
        pretrain.apply_rules(args, n)
        pretrain.check(args, images)
    return args

def test_open_flags_follow_the_number_of_images():
    args = filled(5120, "--data", "letters")
    assert (args.batch, args.queue, args.steps, args.momentum) == (64, 128, 14 * 80, 0.8214)
    for n in range(256, 20_000, 97):  # few queries meet an old key of their own image
        args = filled(n, "--recipe", "moco-v2")
        assert args.queue <= max(n / 10, 2 * args.batch)
    for n, picked in (
            (600, dict(warmup=0, queue=128, lr=0.02, muon=0.02, crop=[0.222, 1], bn_splits=2)),
            (4000, dict(epochs=200, queue=128, muon=0.0079, stem="imagenet", momentum=0.9839,
                        warmup=10)),
            (50_000, dict(epochs=20, queue=512, stem="small")),
            (60_000, dict(epochs=17, queue=512, lr=0.08, muon=0.014, crop=[0.2, 1], bn_splits=4,
                          stem="small", warmup=0))):
        assert picked.items() <= vars(filled(n)).items()
    for n, epochs, queue in ((400, "9", 128), (5000, "999", 256), (50_000, "40", 2048)):
        assert filled(n, "--recipe", "moco-v2", "--epochs", epochs).queue == queue
    assert filled(50_000, "--recipe", "moco-v2").stem == "small"
    assert filled(50_000, "--epochs", "40").warmup == 2
    assert filled(50_000, "--size", "64").stem == "imagenet"
    assert filled(1_000_000, "--steps", "100").stem == "imagenet"
    with pytest.raises(InputError, match="--steps.*--epochs"):
        filled(5120, "--steps", "7", "--epochs", "9")
    published = dict(batch=256, queue=65536, momentum=0.999, bn_splits=8, lr=0.03, warmup=0,
                     temp=0.2, wd=1e-4, head="simple", dim=128, crop=[0.2, 1], jitter=0.4, hue=0.1,
                     gray=0.2, blur=0.5, muon=0, weak_keys=False)
    args = filled(1_281_167, "--size", "224", "--epochs", "200", "--recipe", "moco-v2", world=8)
    assert published.items() <= vars(args).items()
    for n, world in ((5, 1), (9, 2), (16, 8), (63, 8), (100, 3)):
        filled(n, world=world)
    with pytest.raises(InputError, match="--batch 9: must be .* a multiple of 2"):
        filled(100, "--batch", "9", world=2)

def test_a_run_end_to_end(labelled, tmp_path, capsys):
    moco = run(*labelled, "--epochs", 2, "--out", tmp_path / "run")
    assert moco.queue.shape == (16, 128) and moco.encoder_k.backbone.features[0][1].splits == 2
    printed = capsys.readouterr().out
    for text in ("steps 0 to", "raw pixels", "for 42 images"):
        assert text in printed
    log = read_log(tmp_path / "run")
    assert [entry["epoch"] for entry in log] == [1, 2] and log[-1]["step"] == 10
    assert log[-1]["images_per_s"] > 0 and 0 <= log[-1]["knn"] <= 100
    assert Image.open(tmp_path / "run/views.png").size == (8 * 96, 3 * 96)
    nets = [linear_eval.read_checkpoint(tmp_path / "run" / name)[0] for name in ("", "last.pt")]
    assert_close(*[net.state_dict() for net in nets], rtol=0, atol=0)

def test_a_run_without_labels_from_a_checkpoint(flat, tmp_path, capsys):
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "tv.pt")
    run(*flat, "--init", tmp_path / "tv.pt", "--steps", 1, "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "242 of its 244 tensors" in printed and "linear_eval.py" not in printed
    assert 0 <= read_log(tmp_path / "run")[0]["found"] <= 100
    look(tmp_path / "run", "random")  # what is advised

@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv3_small"])
def test_a_checkpoint_brings_its_stem(arch, flat, tmp_path):
    (tmp_path / "old").mkdir()
    net = models.build(arch, "small")
    torch.save(net.state_dict(), tmp_path / "old/backbone.pt")
    (tmp_path / "old/args.json").write_text(json.dumps(dict(arch=arch, stem="small")))
    moco = run(*flat[:-2], "--init", tmp_path / "old", "--arch", arch, "--steps", 1, "--lr", 0,
               "--muon", 0, "--out", tmp_path / "new")
    assert json.loads((tmp_path / "new/args.json").read_text())["stem"] == "small"
    assert_close(list(moco.encoder_q.backbone.parameters()), list(net.parameters()))

def test_float16_steps_that_overflow_are_left_out(flat, tmp_path):
    moco = run(*flat, "--precision", "float16", "--steps", 6, "--out", tmp_path / "run")
    assert all(p.isfinite().all() for p in moco.parameters())
    assert torch.load(tmp_path / "run/last.pt")["scaler"]["scale"] < 65536  # some did

BAD_INPUT = """
run --batch 100 -> --batch 100
run --batch 1 -> --batch 1
run --queue 7 -> --queue 7
run --queue 500 -> --queue 500
run --temp 0.025 -> --temp 0.025
run --temp nan -> --temp nan
run --bn-splits 5 -> --bn-splits 5
run --crop 0.5 0.2 -> --crop
run --gray 2 -> --gray
run --dim 0 -> --dim
run --device meta -> --device meta
run --resume -> --out
run --data empty -> empty
run --data nowhere -> nowhere
run --data few -> few
run --data strange -> no such class
run --init mobile.pt --arch resnet18 -> mobile.pt
run --init torn.pt -> torn.pt
run --init hostile.pt -> hostile.pt
evaluate random --data few -> classes
evaluate random --data unheld -> held-out
run --data cifar10 --root text.pt -> --data cifar10
evaluate random --labels many -> --labels
evaluate random --labels 1.5 -> --labels
evaluate mobile.pt -> --arch
evaluate missing.pt -> missing.pt
evaluate empty -> empty
evaluate text.pt -> text.pt
evaluate other.pt -> other.pt
evaluate integers.pt --arch resnet18 -> integers.pt
evaluate scalar.pt --arch resnet18 -> scalar.pt
evaluate larger.pt --arch resnet18 -> resnet18
evaluate resnet.pt --arch resnet18 --stem small -> stem imagenet
evaluate nan.pt --arch mobilenetv3_small -> features
look nan.pt --arch mobilenetv3_small -> features
look text.pt -> text.pt
look random --data one -> two images
look random --data nowhere -> nowhere"""

class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)

@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    """A folder with whatever BAD_INPUT names."""
    here = tmp_path_factory.mktemp("bad")
    make_folder(here / "images", per=10)
    (here / "empty").mkdir()
    make_folder(here / "few", classes=".", per=4)
    make_folder(here / "strange/train")
    make_folder(here / "strange/valid", classes="A")
    make_folder(here / "unheld/train", per=1)
    make_folder(here / "unheld/test", per=0)
    make_folder(here / "one/train", per=5)
    make_folder(here / "one/test", classes="a", per=1)
    mobile = models.build("mobilenetv3_small").state_dict()
    resnet = models.build("resnet18").state_dict()
    larger = torchvision.models.resnet34().state_dict()
    contents = dict(mobile=mobile, resnet=resnet, larger=larger, hostile={"state_dict": Attack()},
                    other={"lr": 0.1}, integers={1: torch.ones(3)},
                    scalar=resnet | {"conv1.weight": torch.ones(())},
                    nan={name: w * math.nan for name, w in mobile.items()})
    for name, content in contents.items():
        torch.save(content, here / f"{name}.pt")
    (here / "torn.pt").write_bytes((here / "mobile.pt").read_bytes()[:5000])
    (here / "text.pt").write_text("<html>")
    yield here
    shutil.rmtree(here)

@pytest.mark.parametrize("line", BAD_INPUT.split("\n")[1:])
def test_bad_input_is_one_line(line, bad_folder, monkeypatch, capsys):
    monkeypatch.chdir(bad_folder)
    command, message = line.split(" -> ")
    script, *flags = command.split()
    common = ["--data", "images"]
    if script == "run":
        common += [*SMALL, "--epochs", 1]
    with pytest.raises((InputError, SystemExit)) as error:
        globals()[script](*common, *flags)
    assert "\n" not in str(error.value)
    assert message in str(error.value) + capsys.readouterr().err
    assert not Path("attacked").exists() and not Path("runs").exists()

@pytest.mark.parametrize("script", ["pretrain.py", "linear_eval.py random", "analyze.py random"])
def test_bad_input_ends_a_script_with_one_line(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*script.split(), "--data", str(tmp_path), "--device", "cpu"])
    name = sys.argv[0]
    with pytest.raises(SystemExit, match=f"{name}: --data {tmp_path}"):
        runpy.run_path(HERE / name, run_name="__main__")

@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_script_ends_with_one_line(error):
    with pytest.raises(SystemExit, match=r"\A\n?[\w./-]+: .*\Z"):
        data.run(MagicMock(side_effect=error))

# ----------------------------------------------------------------------------- nothing is lost

def break_off(module, name, calls, setattr=setattr):
    """Let one of the next calls of a function fail."""
    function = getattr(module, name)
    outcomes = [function] * (calls - 1) + [full_disk] + [function] * 99
    setattr(module, name, lambda *args: outcomes.pop(0)(*args))

@pytest.mark.parametrize("module,name,calls", [
    (pretrain, "train_step", 3), (pretrain, "train_step", 8), (torch, "save", 1),
    (torch, "save", 4)])
def test_a_run_that_breaks_off_ends_as_another(module, name, calls, labelled, tiny, tmp_path,
                                               monkeypatch):
    train_step = pretrain.train_step
    minutes = []
    clock = MagicMock(monotonic=lambda: 60.0 * len(minutes))  # a step takes a minute
    monkeypatch.setattr(pretrain, "time", clock)
    monkeypatch.setattr(pretrain, "train_step", lambda *args: minutes.append(1)
                        or train_step(*args))
    flags = [*labelled, "--steps", 12]
    run(*flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as broken:
        break_off(module, name, calls, broken.setattr)
        with pytest.raises(OSError, match="No space left"):
            run(*flags, "--out", tmp_path / "parts")
    run("--out", tmp_path / "parts", "--resume")
    parts, whole = [torch.load(file) for file in sorted(tmp_path.glob("*/last.pt"))]
    assert_close(parts, whole, rtol=0, atol=0)
    assert [entry["minutes"] for entry in parts["log"]] == [5, 10, 12]

def test_of_two_that_go_on_with_a_run_the_second_is_refused(flat, tiny, tmp_path, monkeypatch):
    train_step = pretrain.train_step

    def step(*args):
        with pytest.raises(InputError, match="another process"):
            run("--out", tmp_path / "run", "--resume")
        return train_step(*args)

    monkeypatch.setattr(pretrain, "train_step", step)
    run(*flat, "--steps", 1, "--out", tmp_path / "run")

def test_a_run_keeps_its_flags(tiny, tmp_path):
    make_folder(tmp_path / "flat", classes=".", per=20)
    out = ["--out", tmp_path / "run"]
    run("--data", tmp_path / "flat", "--root", tmp_path, *SMALL, "--steps", 3, *out)
    before = torch.load(tmp_path / "run/last.pt")
    for typed in ("--steps 9", "--epochs 4", "--wd 0.5", "--queue 17", "--arch resnet18",
                  "--recipe small"):
        with pytest.raises(InputError, match=typed):
            run(*out, "--resume", *typed.split())
    run(*out, "--resume", "--batch", 8, "--precision", "float16")
    assert_close(torch.load(tmp_path / "run/last.pt"), before, rtol=0, atol=0)
    with pytest.raises(InputError, match="--resume"):
        run(*out)
    for wrong in (dict(model={}), dict(log=5), dict(step="x"), dict(optimizer=None)):
        torch.save(before | wrong, tmp_path / "run/last.pt")
        with pytest.raises(InputError, match="last.pt: not of the run"):
            run(*out, "--resume")
    picture(32, 32, seed=9).save(tmp_path / "flat/0 é.jpg", quality=30)
    with pytest.raises(InputError, match="other images"):
        run(*out, "--resume")
    (tmp_path / "run/args.json").unlink()
    with pytest.raises(InputError, match="holds last.pt, but not the args.json"):
        run(*out, "--resume")

def test_runs_inside_the_data_folder_are_no_data(tiny, tmp_path, monkeypatch):
    make_folder(tmp_path / "here", per=20)
    monkeypatch.chdir(tmp_path / "here")
    run("--data", ".", *SMALL, "--out", "runs/1", "--steps", 3)
    look("runs/1", "random")
    run("--out", "runs/1", "--resume")
    assert len(data.load(".")[0].classes) == 3

def test_weights_that_are_no_numbers_end_the_run(labelled, tiny, tmp_path, monkeypatch):
    train_step = pretrain.train_step
    steps = []

    def step(moco, *args):
        steps.append(train_step(moco, *args))
        if len(steps) == 10:  # the last update of the second epoch
            next(moco.encoder_q.parameters()).data.fill_(math.nan)
        return steps[-1]

    monkeypatch.setattr(pretrain, "train_step", step)
    with pytest.raises(InputError, match="step 10.*--lr"):
        run(*labelled, "--epochs", 9, "--out", tmp_path / "run")
    last = torch.load(tmp_path / "run/last.pt")
    assert last["step"] == 5 and all(x.isfinite().all() for x in last["model"].values())

def differ(folder):
    """What processes are told that have other images, runs or labels."""
    rank = int(os.environ["RANK"])
    told = []
    for images, out in ((rank, "new"), (0, "run"), (2 * rank, "new")):
        argv = ["--data", f"{folder}/{images}", "--root", folder, *SMALL, "--steps", "2",
                "--device", "cpu", "--out", f"{folder}/{out}{rank}", "--resume"]
        with pytest.raises(InputError) as error:
            pretrain.main(argv)
        told.append(str(error.value))
        dist.destroy_process_group()
    return told

def test_processes_that_differ_are_told(tmp_path):
    make_folder(tmp_path / "0", classes=".", per=20)
    make_folder(tmp_path / "1", classes=".", per=21)
    make_folder(tmp_path / "2", per=20)
    run("--data", tmp_path / "0", "--root", tmp_path, *SMALL, "--steps", 2, "--out",
        tmp_path / "run0")
    for told in processes(2, differ, str(tmp_path)):
        for line, what in zip(told, ("images", "steps_done", "images"), strict=True):
            assert what in line and "\n" not in line
    assert not list(tmp_path.glob("*1/last.pt"))

def train_in_two_parts(argv):
    models.ARCHS["mobilenetv3_small"] = NoBatchNorm
    break_off(pretrain, "train_step", 8)
    with pytest.raises(OSError):
        pretrain.main(argv)
    dist.destroy_process_group()
    moco = pretrain.main([*argv, "--resume"])
    torch.save(moco.state_dict(), f"{argv[-1]}/rank{os.environ['RANK']}.pt")

def test_two_processes_train_as_one_also_after_a_stop(labelled, tmp_path, monkeypatch):
    monkeypatch.setitem(models.ARCHS, "mobilenetv3_small", NoBatchNorm)
    flags = [*labelled, "--steps", "12", "--seed", "1", "--lr", "0.05",
             "--target", "0.01", "--device", "cpu", "--out"]
    processes(2, train_in_two_parts, [*flags, str(tmp_path / "two")])
    one = pretrain.main([*flags, str(tmp_path / "one")])
    for rank in (0, 1):
        two = torch.load(tmp_path / f"two/rank{rank}.pt")
        assert_close(two, one.state_dict(), atol=1e-5, rtol=0)
    for x, y in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for name in ("step", "loss", "instance_accuracy", "hardness", "lr"):
            assert x[name] == pytest.approx(y[name], abs=1e-4)
    assert x["knn"] == y["knn"] and 0 < x["hardness"] < 1

# ---------------------------------------------------------------------------------- linear_eval.py

def test_knn_is_a_weighted_vote():
    x, t = unit(90, 5).float(), unit(31, 5, seed=1).float()
    y, z = torch.arange(90) % 3, torch.arange(31) % 3
    right = 0
    for query, label in zip(t, z):
        votes = torch.zeros(3)
        for j in (x @ query).argsort(descending=True)[:7]:
            votes[y[j]] += (x[j] @ query / 0.1).exp()
        right += (votes.argmax() == label).item()
    assert linear_eval.knn(3 * x, y, 2 * t, z, k=7) == pytest.approx(100 * right / 31)

def test_neighbours_are_the_nearest():
    x = torch.randn(500, 6, generator=generator(0))
    t = torch.randn(1203, 6, generator=generator(1))
    expected, rows = torch.cdist(t.double(), x.double()).square().topk(9, largest=False)
    distances, near = linear_eval.neighbours(x, t, 9)
    assert torch.equal(near, rows)
    assert_close(distances.double(), expected, atol=1e-4, rtol=0)

def blobs(n, classes=5, width=12, seed=0):
    """Features (n, width) around class centers, some columns large or small, and labels."""
    y = torch.arange(n) % classes
    noise = torch.randn(n, width, generator=generator(seed), dtype=torch.float64)
    x = 3 * unit(classes, width, seed=99)[y] + 1.2 * noise
    return (x * torch.logspace(-3, 2, width, dtype=torch.float64) + torch.arange(width)).float(), y

@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_the_linear_probe_is_the_converged_solution(penalty):
    x, y = blobs(400)
    mean, std = linear_eval.mean_and_std(x)
    z = F.pad((x - mean) / std, (0, 1), value=1)
    W = torch.zeros(13, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=2000, tolerance_grad=1e-10, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(z.double() @ W, y) + penalty / 2 * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    ours = linear_eval.fit(z, y, 5, penalty, (z.T @ z / 400).double())
    assert (ours - W).norm() < 1e-3 * W.norm()

def test_the_probe_fits_features_of_any_scale_and_none_that_collapsed():
    x, y = blobs(400)
    test_x, test_y = blobs(400, seed=1)
    for scale in (1, 1e-6):
        weight, bias = linear_eval.linear_probe(scale * x, y, 5)
        assert linear_eval.accuracy(F.linear(scale * test_x, weight, bias), test_y) > 60
    for size in (0, 1e-8):  # what varies is rounding
        x = 1 + rand(300) + size * torch.randn(400, 300, generator=generator(1))
        assert linear_eval.accuracy(F.linear(x, *linear_eval.linear_probe(x, y, 5)), y) < 21

def test_held_out_part_and_label_subsets():
    y = torch.tensor([0] * 20 + [1] * 7 + [2] * 3 + [3])[torch.randperm(31, generator=generator(0))]
    assert y[linear_eval.every_fifth(y)].bincount(minlength=4).tolist() == [4, 1, 1, 0]
    balanced = torch.cat([torch.arange(200) % 4, torch.full((9,), -1)])
    unbalanced = torch.tensor([0] * 100 + [1] * 20 + [-1])
    for labels, wanted, counts in (
            (balanced, "7", [7] * 4), (balanced, "0.001", [1] * 4), (unbalanced, "0.1", [10, 2]),
            (unbalanced, "1.0", [100, 20])):
        rows, same, another = [linear_eval.labelled_subset(labels, wanted, i) for i in (0, 0, 1)]
        assert labels[rows].bincount().tolist() == counts and torch.equal(rows, same)
        assert torch.equal(rows, another) == (wanted == "1.0")

def test_measure():
    y = torch.arange(40) % 4
    scores = F.one_hot(y, 7).float()  # three classes have no image
    scores[:10, 6] = 2  # ten are wrong at first and right among the first five
    expected = dict(top1=75, top5=100, mean_per_class=75, low=59.81, high=85.81)  # Wilson's formula
    assert linear_eval.measure(scores, y) == pytest.approx(expected, abs=0.02)

def test_raw_pixels_are_means_of_pixels(monkeypatch):
    monkeypatch.setattr(linear_eval.Pixels, "most", 32)
    x = rand(2, 3, 96, 96)
    expected = TF.resize(x, [32, 32], antialias=True).flatten(1)
    assert_close(linear_eval.Pixels()(x), expected, atol=1e-4, rtol=0)

@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv3_small"])
def test_checkpoint_formats(arch, tmp_path):
    weights = models.build(arch).state_dict()
    full = getattr(torchvision.models, TORCHVISION[arch])()
    full.load_state_dict(weights, strict=False)
    keys = {f"module.encoder_k.{name}": w + 1 for name, w in weights.items()}
    contents = [weights, full.state_dict()]
    for prefix, key, more in (("module.", "state_dict", {}), ("module.student.", "state_dict", {}),
                              ("module.encoder_q.", "state_dict", keys),
                              ("encoder_q.backbone.", "model", keys)):
        state = {prefix + name: w for name, w in weights.items()}
        contents.append({key: state | more, "step": 3})
    for content in contents:
        torch.save(content, tmp_path / "c.pt")
        net = linear_eval.read_checkpoint(tmp_path / "c.pt", arch)[0]
        assert_close(net.state_dict(), weights, rtol=0, atol=0)

def test_the_weights_in_assets_are_torchvisions():
    net, known = linear_eval.read_checkpoint(HERE / "assets/mobilenetv3_small-tiny50.pt")
    assert known["size"] == 64
    peer = torchvision.models.mobilenet_v3_small()
    missing, unexpected = peer.load_state_dict(net.state_dict(), strict=False)
    assert missing == ["classifier.3.weight", "classifier.3.bias"] and not unexpected

@pytest.mark.parametrize("typed", [{}, dict(size=24), dict(data="there")])
def test_what_is_typed_comes_before_what_a_checkpoint_says(typed, tmp_path):
    torch.save(models.build("resnet18", "small").state_dict(), tmp_path / "backbone.pt")
    known = dict(arch="resnet18", stem="small", size=48, data="here")
    (tmp_path / "args.json").write_text(json.dumps(known | dict(root="elsewhere")))
    args = argparse.Namespace(**dict.fromkeys(known) | dict(seed=0, root="data") | typed)
    values = linear_eval.DEFAULTS
    for name in (str(tmp_path), "random", "pixels"):  # the latter ones are as the first one
        values = linear_eval.open_checkpoint(name, args, values)[1]
        assert values == known | typed and args.root == "data"

def test_an_evaluation_end_to_end_and_the_readmes_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images/train", per=12, side=64)
    make_folder(tmp_path / "images/test", side=64, seed=7)
    flags = ["--data", "images", "--size", 32, "--arch", "resnet18", "--knn", "--out"]
    torch.manual_seed(0)
    Path("run").mkdir()
    torch.save(models.build("resnet18").state_dict(), "run/backbone.pt")
    tables = [evaluate(name, *flags, f"out-{name}") for name in ("run", "random")]
    tables.append(evaluate("out-run/classifier.pt", "--knn", "--out", "again"))
    assert tables[0] == tables[1] == tables[2] and {"linear", "kNN, k 20, T 0.1"} < tables[0].keys()
    result = json.loads(Path("out-run/result.json").read_text())
    assert result["table"] == tables[0] and result["classes"] == ["a", "b c", "ü"]

    classifier = torchvision.models.resnet18(num_classes=3).eval()
    classifier.load_state_dict(torch.load("out-run/classifier.pt"))
    test = load("images", "data", size=32)[1]
    guess = classifier(data.center(test.pixels, 32, test.shapes))
    right = 100 * (guess.argmax(1) == test.labels).float().mean().item()
    assert right == pytest.approx(tables[0]["linear"]["top1"])
    lines = re.search(r"```python\n(from PIL.*?)```", README, re.S)[1]
    for written, here in (("mobilenet_v3_large(num_classes=10)", "resnet18(num_classes=3)"),
                          ("runs/NAME/eval-FOLDER", "out-run"), ("64", "32"),
                          ("photo.jpg", "images/test/a/3 é.jpg"), ("print(", "answer = (")):
        assert written in lines
        lines = lines.replace(written, here)
    scope = dict(torch=torch, torchvision=torchvision)
    exec(lines, scope)
    assert_close(scope["answer"].values[0], guess[3].softmax(0).topk(3)[0], atol=0.02,
                 rtol=0)

# ------------------------------------------------------------------------------------- analyze.py

def squared(a, b):
    return (F.normalize(a, dim=0) - F.normalize(b, dim=0)).square().sum().item()

def sample(n=23, width=6, classes=4):
    """Originals, two views and labels, with a duplicated image and a class of one image."""
    o = torch.randn(n, width, generator=generator(0), dtype=torch.float64) + 0.5
    o[5] = o[6]
    a = o + 2 * unit(n, width, seed=1)
    b = o + 2 * unit(n, width, seed=2)
    y = torch.arange(n) % classes
    y[-1] = classes
    return o, a, b, y

def test_instance_discrimination_is_a_search():
    o, a, b, _ = sample()
    for query, positive, others in ((o, a, o), (b, a, a)):
        hits = np.zeros(5)
        for i in range(len(o)):
            own = squared(query[i], positive[i])
            better = sum(squared(query[i], others[j]) <= own for j in range(len(o)) if j != i)
            hits += better < np.arange(1, 6)
        ours = linear_eval.instance_discrimination(query, positive, others)
        assert ours.tolist() == pytest.approx(100 * hits / len(o))
    same = torch.ones(1500, 3)
    assert linear_eval.instance_discrimination(same, same, same)[4] == 0
    assert linear_eval.instance_discrimination(o, o, a)[0] == 100

def test_found_compares_two_views_of_an_image(flat_images):
    pixels = linear_eval.Pixels()
    hard, easy = [linear_eval.found(pixels, flat_images, 32, jitter=jitter) for jitter in (0.4, 0)]
    assert 0 < hard < easy
    assert linear_eval.found(lambda x: pixels(0 * x + 1), flat_images, 32) == 0

def test_distances_are_means_over_pairs():
    o, a, b, y = sample()
    pairs = list(itertools.combinations(range(len(o)), 2))
    expected = np.mean([squared(u, v) for u, v in zip(a, b)])
    assert analyze.alignment(a, b).item() == pytest.approx(expected)
    each = []
    for c in range(4):
        each.append(np.mean([squared(o[i], o[j]) for i, j in pairs if y[i] == y[j] == c]))
    assert analyze.intra_class_alignment(o, y).item() == pytest.approx(np.mean(each))
    many = unit(2300, 5)  # several blocks
    expected = torch.pdist(many).square().mul(-2).exp().mean().log().item()
    assert analyze.uniformity(3 * many) == pytest.approx(expected)

def test_best_nn_is_a_search():
    o, _, b, y = sample()
    train, labels = o[:15], y[:15]
    spaces = dict(raw=lambda v: v, normalized=lambda v: F.normalize(v, dim=-1),
                  shifted=lambda v: F.normalize(v - train.mean(0), dim=-1))
    for name, space in spaces.items():
        order = torch.cdist(space(b), space(train)).argsort(1)
        best = 0
        for k in range(1, 15, 2):  # with five classes, votes tie
            votes = np.array([np.bincount(labels[near]).argmax() for near in order[:, :k]])
            best = max(best, 100 * (votes == y.numpy()).mean())
        assert analyze.best_nn(train, labels, b, y, most=14)[name] == pytest.approx(best)

def test_tsne():
    y = torch.arange(300) % 6
    x = unit(6, 30, seed=3)[y] + 0.6 * unit(300, 30)
    flat = analyze.tsne(x, steps=500)
    near = torch.cdist(flat, flat).fill_diagonal_(math.inf).topk(10, largest=False).indices
    rank = torch.cdist(x, x).argsort(1).argsort(1)
    missed = (rank.gather(1, near) - 10).clamp(min=0).sum()  # Venna & Kaski 2001
    assert 1 - 2 / (300 * 10 * (600 - 31)) * missed > 0.9
    assert (y[near] == y[:, None]).double().mean() > 0.95
    assert analyze.tsne(torch.ones(4, 3)).isfinite().all()

def test_an_analysis_end_to_end(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_folder(Path("images/train"), per=12)
    make_folder(Path("images/test"), per=5, seed=7)
    entries = [dict(minutes=e, loss=5 / e, instance_accuracy=9.0 * e, knn=20 + e) for e in (1, 2)]
    for name, size, images in (("run", 32, "images"), ("other", 48, "not used")):
        Path(name).mkdir()
        torch.save(Tiny().state_dict(), f"{name}/backbone.pt")
        known = dict(arch="mobilenetv3_small", size=size, data=images)
        Path(f"{name}/args.json").write_text(json.dumps(known))
        Path(f"{name}/log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    names = ["run", "other", "random", "pixels"]
    results = look(*names)
    printed = capsys.readouterr().out
    assert list(json.loads(Path("run/analysis/analysis.json").read_text())) == names
    for r in results.values():
        assert r["images"] == 15 and r["held-out"].keys() == analyze.ROWS.keys()
    assert "other: mobilenetv3_small at 48 pixels on images" in printed
    for name in ("map", "similarity", "curves"):
        image = Image.open(f"run/analysis/{name}.png").convert("RGB")
        assert np.asarray(image).std() > 5, name
    make_folder(Path("single/train"), classes="abcd", per=2)  # a sample has one image of a class
    make_folder(Path("single/test"), classes="bcd", per=1)
    look("run", "--data", "single", "--out", "single")
    assert "NaN" not in Path("single/analysis.json").read_text()

def test_over_clustering_is_a_comparison():
    # MobileNetV3-Small after 100 epochs of Tiny ImageNet's 50 classes
    small = dict(intra=1.595, uniformity=-3.175, nn_normalized=25.5, linear=29.0)
    moco = dict(intra=1.551, uniformity=-3.004, nn_normalized=22.6, linear=27.2)
    for change in ({}, dict(linear=30), dict(nn_normalized=26), dict(intra=1.6),
                   dict(uniformity=-4)):
        networks = dict(moco=moco | change, small=small)
        said = analyze.diagnosis({name: {"held-out": m} for name, m in networks.items()})
        assert [line.split()[0] for line in said] == ["moco"] * (not change)

# ---------------------------------------------------------------------------------------- a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

@needs_gpu
@pytest.mark.parametrize("N,C,K", [(1, 100, 1009), (70, 128, 2048), (33, 512, 64),
                                   (1024, 128, 65536)])
def test_cuda_info_nce_is_fused_and_right(N, C, K):
    loss, gradient = cross_entropy(*embeddings(N, C, K), 0.1)
    q, own, queue = [x.cuda() for x in embeddings(N, C, K)]
    q, queue = q.float().requires_grad_(), queue.float()
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fused):  # raises where none of these is possible
        ours = pretrain.info_nce(q, own, queue, 0.1)
        ours.backward()
    assert abs(ours.item() - loss) < 5e-3
    assert (q.grad.cpu() - gradient).norm() < 1e-3 * gradient.norm()

def losses(folder):
    return [entry["loss"] for entry in read_log(folder)]

@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_cuda_records_learns_and_resumes(precision, tmp_path, monkeypatch):
    flags = ["--arch", "mobilenetv3_small", "--epochs", 4, "--precision", precision, "--device",
             "cuda", "--out"]
    run(*flags, tmp_path / "whole")
    expected = losses(tmp_path / "whole")
    assert read_log(tmp_path / "whole")[-1]["instance_accuracy"] > 3
    with monkeypatch.context() as broken:
        break_off(data, "draw_step", 200, broken.setattr)
        with pytest.raises(OSError):
            run(*flags, tmp_path / "parts")
    run("--out", tmp_path / "parts", "--device", "cuda", "--resume")
    assert losses(tmp_path / "parts") == pytest.approx(expected, abs=0.1)
    monkeypatch.setattr(pretrain, "Recorded", lambda take_step: take_step)
    run(*flags, tmp_path / "usual")
    assert losses(tmp_path / "usual") == pytest.approx(expected, abs=0.1)

# --------------------------------------------------------------------------------------- README.md

def test_the_readme_names_what_is_there(capsys):
    for script in (run, evaluate, look):
        with pytest.raises(SystemExit):
            script("--help")
    helps = capsys.readouterr().out
    flags = set(re.findall(r"--[a-z][a-z-]+", README))
    assert len(flags) > 15
    assert not [flag for flag in flags if f"{flag} " not in helps]
    step = re.search(r"`pretrain.py`: (`.*`)\):\n", README)[1]
    assert all(hasattr(pretrain, name) for name in step[1:-1].split("`, `"))
    for file in re.findall(r"\]\((assets/.*?)\)", README):
        assert (HERE / file).is_file()
