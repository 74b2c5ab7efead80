"""python -m pytest test_smoke.py: every formula against something independent of it, every script
end to end. Nothing is downloaded; images, checkpoints and process groups are made here, small.

python -m pytest test_smoke.py -k cuda: what only a GPU can show.
LONG=1 python -m pytest test_smoke.py -k killed: twenty kills of one run, ten of one on two.
"""
import copy
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import analyze
import data
import linear_eval
import models
import pretrain
from data import InputError

HERE = Path(__file__).parent
TORCHVISION = dict(resnet18="resnet18", resnet34="resnet34", resnet50="resnet50",
                   mobilenetv3="mobilenet_v3_large", mobilenetv3_small="mobilenet_v3_small",
                   efficientnet_b0="efficientnet_b0", efficientnet_b1="efficientnet_b1")
SMALL = ["--arch", "mobilenetv3_small", "--batch", 8, "--queue", 16, "--size", 32,
         "--stem", "imagenet", "--device", "cpu"]
CPU = torch.device("cpu")
ON_CUDA_GRAPHS = ("Stream", "current_stream", "stream", "CUDAGraph", "graph")
torch.set_num_threads(1)  # sums of several threads have other bits, and small work gains nothing

@pytest.fixture(autouse=True)
def little_work(tmp_path, monkeypatch):
    """What a test wrote goes as it ends: all tests together would leave some gigabytes."""
    for module, name, value in QUICK:
        monkeypatch.setattr(module, name, value)
    yield
    shutil.rmtree(tmp_path)

# few steps of t-SNE, and few raw pixels, where a test does not ask for more
QUICK = ((analyze, "tsne", partial(analyze.tsne, steps=20)), (linear_eval.Pixels, "most", 8))

def be_quick():
    for module, name, value in QUICK:
        setattr(module, name, value)

def generator(seed):
    return torch.Generator().manual_seed(seed)

def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=generator(seed), dtype=dtype)

def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=generator(seed), dtype=torch.float64), dim=1)

def photo(h, w, seed=0):
    """A smooth random picture (3, h, w) uint8 away from black and white, so that nothing clips."""
    x = rand(1, 3, 6, 6, seed=seed, dtype=torch.float32)
    x = F.interpolate(x, (h, w), mode="bicubic", align_corners=False)[0]
    return (70 + 90 * x.clamp(0, 1)).round().byte()

def picture(h, w, seed=0):
    return Image.fromarray(photo(h, w, seed).permute(1, 2, 0).numpy())

def make_folder(folder, classes=("a", "b c", "ü"), per=8, side=32, seed=0):
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(per):
            image = picture(side, side + 4 * j, seed + 100 * i + j)
            image.save(folder / name / f"{j} é.jpg")

@pytest.fixture(scope="session")
def flat(tmp_path_factory):
    """Flags of 20 images without labels, which no test changes."""
    here = tmp_path_factory.mktemp("shared")
    make_folder(here / "flat", classes=(".",), per=20)
    return ["--data", str(here / "flat"), "--root", str(here), *map(str, SMALL)]

@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """Flags of three classes with 14 training images and 5 held-out ones each."""
    here = tmp_path_factory.mktemp("shared")
    make_folder(here / "images/train", per=14)
    make_folder(here / "images/test", per=5, seed=50)
    return ["--data", str(here / "images"), "--root", str(here), *map(str, SMALL)]

def run(*argv):
    return pretrain.main(["--device", "cpu", *map(str, argv)])

def evaluate(*argv):
    return linear_eval.main(["--device", "cpu", *map(str, argv)])

def look(*argv):
    return analyze.main(["--device", "cpu", *map(str, argv)])

def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

# processes are forked from one that has imported all this: none waits for torch to load
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_smoke"])

def begin(code, out, **env):
    """Start `code` in a process of its own; what it prints goes into the file `out`."""
    job = FORKS.Process(target=run_forked, args=(code, str(out), env))
    job.start()
    return job

def run_forked(code, out, env):
    os.environ.update(env)
    with open(out, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    exec(code, dict(test_smoke=sys.modules[__name__]))

def processes(world, folder, code, codes=(0,)):
    """Run `code` in the `world` processes of a group, as torchrun starts them;
    -> exit codes, and what they printed."""
    jobs = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(world):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=port)
        jobs.append(begin(f"{code}; test_smoke.assert_the_group_ended()", folder / f"rank{rank}",
                          **{key: str(value) for key, value in env.items()}))
    for job in jobs:
        job.join(240)
        job.kill()
    printed = [(folder / f"rank{rank}").read_text() for rank in range(world)]
    ended = [job.exitcode for job in jobs]
    assert set(ended) <= set(codes), printed
    return ended, printed

def assert_the_group_ended():
    """A group's thread that outlives it may abort the process while Python ends."""
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in names if "gloo" in name]

class NoBatchNorm(torch.nn.Module):
    """A network without BatchNorm, whose statistics of small batches would amplify rounding."""

    def __init__(self, small):
        super().__init__()
        self.dim = 8
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, 2), torch.nn.ReLU(),
                                       torch.nn.Flatten(), torch.nn.Linear(8 * 14 * 14, 8))

    def forward(self, x):
        return self.net(x)

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
    shapes = [(name, w.shape) for name, w in net.state_dict().items()]
    assert shapes == [(name, w.shape) for name, w in ref.state_dict().items()]
    net.load_state_dict(ref.state_dict())
    models.speed_up_small_maps(net)
    for is_training in (False, True):
        ref.train(is_training)
        net.train(is_training)
        x = rand(4, 3, 40, 40).requires_grad_()
        y = rand(4, 3, 40, 40).requires_grad_()
        a = ref(x)
        b = net(y)
        a.pow(2).sum().backward()
        b.pow(2).sum().backward()
        assert b.shape == (4, net.dim)
        assert (a - b).abs().max() <= 1e-9 * a.abs().max()
        assert (x.grad - y.grad).norm() <= 1e-7 * x.grad.norm()
        for (name, p), q in zip(ref.named_parameters(), net.parameters()):
            assert (p.grad - q.grad).norm() <= 1e-7 * p.grad.norm() + 1e-12, name
            p.grad = q.grad = None

@pytest.mark.parametrize("groups", [1, 6])
def test_convolutions_of_small_maps_are_torchs(groups):
    for h, k, s in itertools.product((1, 2, 3, 4), (1, 3, 5), (1, 2)):
        conv = torch.nn.Conv2d(6, 6, k, s, k // 2, groups=groups, bias=groups == 1).double()
        models.speed_up_small_maps(conv)
        assert type(conv) is not torch.nn.Conv2d
        x = rand(5, 6, h, h).requires_grad_()
        ours = conv(x)
        expected = F.conv2d(x, conv.weight, conv.bias, s, k // 2, groups=groups)
        assert torch.allclose(ours, expected, rtol=1e-10)
        weight = rand(*expected.shape, seed=1)
        ours = torch.autograd.grad((ours * weight).sum(), [x, *conv.parameters()])
        expected = torch.autograd.grad((expected * weight).sum(), [x, *conv.parameters()])
        for a, b in zip(ours, expected):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), (h, k, s)
        with torch.autocast("cpu", torch.bfloat16):
            conv.float()(x.float()).float().sum().backward()
        assert conv.weight.grad.abs().sum() > 0

def test_other_convolutions_are_left_alone():
    unusual = [dict(kernel_size=(3, 1), padding=(1, 0)), dict(stride=(1, 2)), dict(dilation=2),
               dict(padding_mode="reflect"), dict(groups=2), dict(groups=6, bias=True),
               dict(kernel_size=2), dict(padding=0)]
    for flags in unusual:
        flags = dict(kernel_size=3, padding=1, bias=False) | flags
        conv = torch.nn.Conv2d(6, 6, **flags)
        models.speed_up_small_maps(conv)
        assert type(conv) is torch.nn.Conv2d, flags

@pytest.mark.parametrize("arch", TORCHVISION)
def test_blocks_start_as_the_identity(arch):
    peer = getattr(torchvision.models, TORCHVISION[arch])
    expected = set()
    if arch.startswith("resnet"):
        for name, w in peer(zero_init_residual=True).named_parameters():
            if name.endswith("weight") and not w.any():
                expected.add(name)
    else:
        for name, block in peer().named_modules():
            if getattr(block, "use_res_connect", False):
                expected.add(f"{name}.block.{len(block.block) - 1}.1.weight")
    net = models.build(arch)
    models.start_as_identity(net)
    weights = [(name, w) for name, w in net.named_parameters() if name.endswith("weight")]
    assert {name for name, w in weights if not w.any()} == expected
    assert len(expected) >= 6

@pytest.mark.parametrize("arch,last,small", [
    ("resnet18", "layer4", 4), ("mobilenetv3", "features", 2), ("efficientnet_b0", "features", 2)])
def test_small_stem_keeps_resolution(arch, last, small):
    for stem, side in (("imagenet", 1), ("small", small)):
        net = models.build(arch, stem).eval()
        shapes = []
        getattr(net, last).register_forward_hook(lambda m, i, o: shapes.append(o.shape[-1]))
        assert net(torch.zeros(1, 3, 32, 32)).shape == (1, net.dim)
        assert shapes == [side]

def test_heads():
    widths = {"linear": [8], "simple": [16, 8], "wide": [32, 8], "deep": [16, 16, 8], "40": [40, 8]}
    for kind, expected in widths.items():
        head = models.make_head(kind, 16, 8)
        assert [m.out_features for m in head if isinstance(m, torch.nn.Linear)] == expected
        assert isinstance(head[-1], torch.nn.Linear)
        head = models.make_head(kind, 16, 8, norm=True)
        norms = [m.num_features for m in head if isinstance(m, torch.nn.BatchNorm1d)]
        assert norms == expected[:-1] and isinstance(head[-1], torch.nn.Linear)

def test_models_alone_in_a_folder_build_every_network(tmp_path):
    shutil.copy(HERE / "models.py", tmp_path)
    code = "import models, torch\nwith torch.device('meta'):\n"
    code += "    for arch in models.ARCHS: models.build(arch, 'small')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)

# ---------------------------------------------------------------------------------------- data.py

def plain_u(n):
    """Uniform numbers that leave an image as it is, but for a crop."""
    u = torch.full((n, data.COLUMNS), 0.999)
    u[:, data.RATIO] = 0.5
    return u

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
    flipped = data.resampling(left, w, 70, 24, flip=torch.tensor([True]))
    assert torch.allclose(rows @ image @ flipped.mT, ours.flip(-1), atol=1e-3)

def test_no_row_of_a_fractional_box_is_empty():
    start = 40 * rand(2000, dtype=torch.float32)
    length = ((48 - start) * rand(2000, seed=1, dtype=torch.float32) ** 8).clamp(min=1e-3)
    for size in (1, 7, 64):
        matrix = data.resampling(start, length, 48, size)
        assert matrix.isfinite().all()
        assert torch.allclose(matrix.sum(2), torch.ones(2000, size), atol=1e-5)

@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_is_torchvisions(sigma):
    image = photo(48, 48).float()
    side = torch.full((1,), 48.0)
    blur = data.resampling(torch.zeros(1), side, 48, 48, sigma=torch.tensor([sigma]))
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
    for f in (0.6, 1.0, 1.3):
        for name in ("brightness", "contrast", "saturation"):
            expected = getattr(TF, f"adjust_{name}")(image, f)
            assert torch.allclose(jitter(image, **{name: f}), expected, atol=2e-3)
    gray = TF.rgb_to_grayscale(image, 3)
    assert torch.allclose(jitter(image, saturation=0.0), gray, atol=2e-3)
    all_three = jitter(image, brightness=1.1, contrast=0.8, saturation=0.7)
    steps = [partial(TF.adjust_brightness, brightness_factor=1.1),
             partial(TF.adjust_contrast, contrast_factor=0.8),
             partial(TF.adjust_saturation, saturation_factor=0.7)]
    for order in itertools.permutations(steps):
        y = image
        for step in order:
            y = step(y)
        assert torch.allclose(all_three, y, atol=4e-3)
    turned = jitter(image, hue=0.2)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert torch.allclose((turned * luma).sum(0), (image * luma).sum(0), atol=1e-3)
    assert not torch.allclose(turned, image, atol=0.05)
    assert torch.allclose(jitter(image, hue=1.0), image, atol=1e-4)  # a whole turn is none

def test_augment_joins_its_parts():
    images = torch.stack([photo(40, 40, seed=i) for i in range(3)])
    still = data.augment(images, plain_u(3), 40, crop=(1, 1))
    assert torch.allclose(still, normalize(images / 255), atol=1e-4)
    assert still.is_contiguous(memory_format=torch.channels_last)
    assert data.layout(torch.device("mps")) == torch.contiguous_format
    u = rand(3, data.COLUMNS, seed=1, dtype=torch.float32)
    u[:, [data.FLIP, data.JITTER, data.BLUR]] = 0.1
    u[:, data.GRAY] = 0.99
    ours = data.augment(images, u, 24, crop=(0.2, 1), hue=0)
    side = torch.full((3,), 40.0)
    for i, box in enumerate(data.crop_boxes(u, side, side, (0.2, 1)).int().tolist()):
        y = TF.hflip(TF.resized_crop(images[i] / 255, *box, [24, 24], antialias=True))
        brightness, contrast, saturation = (0.6 + 0.8 * u[i, 24:27]).tolist()
        y = TF.adjust_brightness(y, brightness)
        y = TF.adjust_contrast(y, contrast)
        y = TF.adjust_saturation(y, saturation)
        sigma = (0.1 + 1.9 * u[i, data.SIGMA].item()) * 24 / 224
        y = normalize(TF.gaussian_blur(y, [9, 9], [sigma, sigma]))
        assert (ours[i] - y)[:, 2:-2, 2:-2].abs().max() < 0.05
    u = plain_u(3)
    u[:, data.GRAY] = 0
    colors = torch.tensor(data.STD)[:, None, None], torch.tensor(data.MEAN)[:, None, None]
    gray = data.augment(images, u, 40, jitter=0) * colors[0] + colors[1]
    assert gray.std(1).max() < 1e-4

def one_crop(u, height, width, scale):
    """torchvision's RandomResizedCrop.get_params, with given uniform numbers."""
    for area, ratio in zip(u[:10], u[10:20]):
        target = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = math.exp((2 * ratio - 1) * math.log(4 / 3))
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w

def test_crop_boxes_are_torchvisions():
    u = rand(200, data.COLUMNS, dtype=torch.float32)
    for height, width in ((32, 32), (100, 40), (10, 400), (1, 1)):
        sides = torch.full((200,), float(height)), torch.full((200,), float(width))
        ours = data.crop_boxes(u, *sides, (0.2, 1)).int().tolist()
        expected = [list(one_crop(row, height, width, (0.2, 1))) for row in u.tolist()]
        different = sum(a != b for a, b in zip(ours, expected))
        assert different <= 2  # float32 may round a half the other way

def test_schedule_is_a_function_of_the_seed():
    steps = [data.draw_step(50, 8, 3, step) for step in range(6)]
    rows = torch.cat([rows for rows, _, _ in steps])
    assert len(set(rows.tolist())) == 48
    assert not torch.equal(rows[:8], data.draw_step(50, 8, 4, 0)[0])
    for _, _, order in steps:
        assert torch.equal(order.sort()[0], torch.arange(8))
    for a, b in zip(steps[5], data.draw_step(50, 8, 3, 5)):
        assert torch.equal(a, b)
    assert not torch.equal(steps[4][1], steps[5][1])

def test_letters():
    pixels, labels, names = data.letters(128, 0)
    assert pixels.shape == (128, 3, 32, 32) and labels.bincount().tolist() == [2] * 64
    assert torch.equal(pixels, data.letters(128, 0)[0])
    assert not torch.equal(pixels, data.letters(128, 1)[0])
    font = ImageFont.load_default(48)
    drawn = {}
    for name in [*names, "\u0600"]:  # the last one is not in the font
        glyph = Image.new("L", (64, 64))
        ImageDraw.Draw(glyph).text((32, 32), name, 255, font, anchor="mm")
        box = glyph.crop(glyph.getbbox()).resize((32, 32))
        drawn[name] = torch.from_numpy(np.asarray(box) / 255)
    for a, b in itertools.combinations(drawn, 2):
        for x in (drawn[a], drawn[a].flip(1)):  # of another size, or mirrored, it is another one
            assert torch.minimum(x, drawn[b]).sum() < 0.85 * torch.maximum(x, drawn[b]).sum(), a + b

def decode(path, side):
    return data.decode(path, side)[0].transpose(1, 2, 0).astype(int)

def test_every_kind_of_picture_becomes_rgb(tmp_path):
    image = picture(24, 24)
    rgb = np.asarray(image)
    gray = np.asarray(image.convert("L"))
    is_opaque = np.arange(24)[None, :] < 12
    half = np.dstack([rgb, np.where(is_opaque, 255, 0).repeat(24, 0).astype(np.uint8)])
    kinds = {"rgb.png": (image, rgb), "palette.png": (image.quantize(256), rgb),
             "cmyk.tif": (image.convert("CMYK"), rgb), "gray.png": (image.convert("L"), gray),
             "alpha.png": (Image.fromarray(half), np.where(is_opaque[..., None], rgb, 255)),
             "deep.png": (Image.fromarray(gray.astype(np.uint16) * 257), gray),
             "dark.tif": (Image.fromarray(gray.astype(np.uint16)), gray / 257),  # the mode's range
             "share.tif": (Image.fromarray(gray.astype(np.float32) / 255), gray),
             "float.tif": (Image.fromarray(gray.astype(np.float32)), gray)}
    for name, (saved, expected) in kinds.items():
        saved.save(tmp_path / name)
        expected = expected.reshape(24, 24, -1)
        assert np.abs(decode(tmp_path / name, 24) - expected).mean() < 4, name
    for value in (-1, math.nan, 1e9):
        Image.fromarray(np.full((24, 24), value, np.float32)).save(tmp_path / "wrong.tif")
        assert data.decode(tmp_path / "wrong.tif", 24) is None
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture(24, 30).save(tmp_path / "turned.png", exif=exif)
        with Image.open(tmp_path / "turned.png") as turned:
            upright = TF.pil_to_tensor(ImageOps.exif_transpose(turned))
        pixels, height, width = data.decode(tmp_path / "turned.png", 24)
        assert (height, width) == upright.shape[1:], orientation
        expected = TF.resize(upright, [24, 24], antialias=True).numpy()
        assert np.abs(pixels.astype(int) - expected).max() <= 2, orientation

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"

def test_no_image_is_handed_to_another_program(tmp_path, monkeypatch):
    for program in ("gs", "convert", "cjpeg", "djpeg"):
        (tmp_path / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for extension in data.EXTENSIONS:
        (tmp_path / f"evil{extension}").write_bytes(POSTSCRIPT)
        assert data.decode(tmp_path / f"evil{extension}", 24) is None
        assert data.median_side([(tmp_path / f"evil{extension}", "")]) == 32
    assert not (tmp_path / "ran").exists()
    with Image.open(tmp_path / "evil.jpg") as image, pytest.raises(Exception):
        image.load()
    assert (tmp_path / "ran").exists()  # the attack is real

def load(folder, root, size=None, keep=None):
    return data.load(str(folder), root, size, keep)

def test_folders(tmp_path, capsys):
    make_folder(tmp_path / "split/train")
    make_folder(tmp_path / "split/test", per=2, seed=50)
    (tmp_path / "split/val").mkdir()  # empty: test/ counts
    strange = tmp_path / "split/train/a"
    rgb = Image.open(strange / "0 é.jpg")
    (strange / "html.jpg").write_text("<html>")
    (strange / "notes.txt").write_text("hello")
    (strange / "torn.jpg").write_bytes((strange / "7 é.jpg").read_bytes()[:300])
    (strange / "zero.png").touch()
    (strange / "link.jpg").symlink_to("nowhere.jpg")
    Image.new("1", (30000, 30000)).save(strange / "bomb.png")  # 100 kB that would be 2.7 GB
    Image.new("RGB", (1, 1), "red").save(strange / "dot.png")
    Image.new("RGB", (20000, 10)).save(strange / "strip.png")
    rgb.save(strange / "moving.gif", save_all=True, append_images=[rgb.rotate(90)])
    rgb.save(os.fsencode(strange) + b"/no text \xff.png", "png")
    Path(os.fsdecode(os.fsencode(strange) + b"/empty \xff.jpg")).touch()
    (strange / "loop").symlink_to(strange, target_is_directory=True)
    make_folder(tmp_path / "more", classes=(".",), per=1)
    (strange / "elsewhere").symlink_to(tmp_path / "more", target_is_directory=True)
    picture(9, 9).save(tmp_path / "split/train/loose.png")
    make_folder(tmp_path / "split/train", classes=(".thumbnails", "runs"))
    (tmp_path / "split/train/runs/args.json").touch()
    data.init_device("cpu")  # names that are no text can be printed
    train, test, size = load(tmp_path / "split", tmp_path)
    assert (len(train), len(test), size) == (29, 6, 32)
    assert train.classes == ["a", "b c", "ü"]
    assert train.labels.bincount().tolist() == [13, 8, 8]
    printed = capsys.readouterr().out
    assert "left out 6 unreadable" in printed
    assert all(name in printed for name in ("html.jpg", "bomb.png", "udcff"))
    assert "left out 1 beside the class folders" in printed and "loose.png" in printed
    load(tmp_path / "split", tmp_path)
    assert "decoded" not in capsys.readouterr().out  # once
    run("--data", tmp_path / "split", "--root", tmp_path, "--out", tmp_path / "run", *SMALL,
        "--epochs", 2)
    assert math.isfinite(read_log(tmp_path / "run")[-1]["loss"])

    make_folder(tmp_path / "large", classes=(".",), side=100, per=1)
    assert load(tmp_path / "large", tmp_path)[2] == 64
    make_folder(tmp_path / "nested/deep/er", classes=("x",))
    train, test, _ = load(tmp_path / "nested", tmp_path)
    assert len(train) == 8 and test is None and (train.labels == -1).all()
    make_folder(tmp_path / "wrong/train")
    make_folder(tmp_path / "wrong/test", classes=("a", "zebra"))
    with pytest.raises(InputError, match="zebra"):
        load(tmp_path / "wrong", tmp_path)

def test_a_file_more_moves_no_other_to_the_held_out_side(tmp_path):
    make_folder(tmp_path / "images", classes="ab", per=100, side=8)
    train, test, _ = load(tmp_path / "images", tmp_path)
    assert 14 <= len(test) <= 26 and len(train) + len(test) == 200
    picture(8, 8).save(tmp_path / "images/a/0 new.jpg")
    assert not data.is_held_out("a/0 new.jpg")
    train_2, test_2, _ = load(tmp_path / "images", tmp_path)
    assert len(train_2) == len(train) + 1 and train.fingerprint != train_2.fingerprint
    assert test.fingerprint == test_2.fingerprint  # of their names, in order

def test_views_of_the_decoded_folder_are_crops_of_the_original(tmp_path):
    (tmp_path / "images").mkdir()
    for i, shape in enumerate([(300, 400), (420, 280), (350, 350), (240, 610)]):
        picture(*shape, seed=i).save(tmp_path / f"images/{i}.png")
    images, _, _ = load(tmp_path / "images", tmp_path, size=112, keep=160)
    assert images.shapes.tolist() == [[300, 400], [420, 280], [350, 350], [240, 610]]
    u = rand(4, data.COLUMNS, seed=5, dtype=torch.float32)
    pixels, shapes = images.get(torch.arange(4))
    views = data.augment(pixels, u, 112, (0.2, 1), 0, 0, 0, 0, shapes)
    squares = data.center(pixels, 112, shapes)
    boxes = data.crop_boxes(u, shapes[:, 0], shapes[:, 1], (0.2, 1)).int().tolist()
    for i, box in enumerate(boxes):
        original = TF.pil_to_tensor(Image.open(tmp_path / f"images/{i}.png")) / 255
        side = min(original.shape[1:])
        expected = TF.resized_crop(original, *box, [112, 112], antialias=True)
        if u[i, data.FLIP] < 0.5:
            expected = TF.hflip(expected)
        square = TF.resize(TF.center_crop(original, side), [112, 112], antialias=True)
        for view, y in ((views[i], expected), (squares[i], square)):
            error = (view - normalize(y)) * torch.tensor(data.STD)[:, None, None]
            psnr = -10 * math.log10(error.square().mean())
            assert psnr > 35

def test_a_folder_is_decoded_again_when_it_changes(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path / "flat", classes=(".",), per=5)
    assert len(load(tmp_path / "flat", tmp_path)[0]) == 5
    files = set((tmp_path / "decoded").glob("*.pixels"))
    assert "older states" not in capsys.readouterr().out
    picture(32, 32, seed=9).save(tmp_path / "flat/more.jpg")
    assert len(load(tmp_path / "flat", tmp_path)[0]) == 6
    assert f"{5 * 3 * 32 ** 2:,} bytes; remove them with  rm" in capsys.readouterr().out
    os.utime(tmp_path / "flat/more.jpg", (1, 1))
    load(tmp_path / "flat", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "mkdir", None)  # a decoded --root may be read-only
    load("flat", tmp_path)  # the same folder
    assert len(set((tmp_path / "decoded").glob("*.pixels")) - files) == 2

def test_pixels_that_do_not_fit_on_the_device_are_fetched_ahead(flat, monkeypatch):
    images = load(flat[1], flat[3])[0]
    steps = [torch.tensor([i, 8 - i, 4]) for i in range(5)]
    expected = [images.get(rows) for rows in steps]
    images.device = "far"
    monkeypatch.setattr(data, "to_device", lambda x, device: x)
    for got, wanted in zip(images.prefetch(images.get, steps), expected, strict=True):
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])

def test_a_notebooks_output_will_do(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # which nobody can reconfigure
    assert data.init_device("cpu") == CPU

class Waiting:
    """The pixels of an image between decoding and the disk, and how many wait at once."""
    now = most = 0

    def __init__(self):
        Waiting.now += 1
        Waiting.most = max(Waiting.most, Waiting.now)

    def tobytes(self):
        Waiting.now -= 1
        time.sleep(0.001)  # a slow disk
        return bytes(192)

def test_few_decoded_images_wait_for_a_slow_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "decode", lambda path, side: (Waiting(), 8, 8))
    monkeypatch.setattr(data, "rank_world", lambda: (1, 2))  # whoever decodes shows how far it is
    monkeypatch.setattr(data.Progress, "due", lambda self: self.is_shown)
    data.decode_files(["x"] * 2000, 8, tmp_path / "a.pixels", tmp_path / "a.index")
    assert (tmp_path / "a.pixels").stat().st_size == 2000 * 192 and 0 < Waiting.most <= 512
    assert "decoding 1,024/2,000 images" in capsys.readouterr().out

def decode_slowly(folder, root, locks):
    decode = data.decode
    data.decode = lambda path, side: time.sleep(0.05) or decode(path, side)
    data.os.cpu_count = lambda: 1

    def flock(*args):
        raise OSError(38, "Function not implemented")

    if locks == "no locks":
        data.fcntl.flock = flock
    images = data.load(folder, root)[0]
    print(len(images), int(images.pixels.long().sum()))

@pytest.mark.parametrize("locks,times", [("locks", 1), ("no locks", 2)])
def test_killed_while_decoding_and_two_at_once(locks, times, tmp_path):
    make_folder(tmp_path / "flat", classes=(".",), per=20)
    code = f"test_smoke.decode_slowly({str(tmp_path / 'flat')!r}, {str(tmp_path)!r}, {locks!r})"
    job = begin(code, tmp_path / "killed")
    while not list(tmp_path.glob("decoded/*.tmp")):
        time.sleep(0.01)
    job.kill()
    job.join()
    assert not list(tmp_path.glob("decoded/*.pixels"))
    files = [tmp_path / "first", tmp_path / "second"]
    for job in [begin(code, file) for file in files]:
        job.join()
    printed = [file.read_text() for file in files]
    assert 1 <= sum("decoded 20 images" in text for text in printed) <= times  # the other waited
    assert printed[0].splitlines()[-1] == printed[1].splitlines()[-1]
    assert len(list(tmp_path.glob("decoded/*.tmp"))) == times - 1  # without locks one is left over

def test_no_room_for_the_decoded_folder(tmp_path, monkeypatch):
    make_folder(tmp_path / "flat", classes=(".",), per=5)
    room = [1000]

    def disk_usage(folder):
        used = sum(file.stat().st_size for file in folder.glob("*.tmp"))
        return SimpleNamespace(free=room[0] - used)

    monkeypatch.setattr(data.shutil, "disk_usage", disk_usage)
    with pytest.raises(InputError, match="need 15,360 bytes.*1,000 are free.*--keep"):
        load(tmp_path / "flat", tmp_path)
    assert not list(tmp_path.glob("decoded/*.pixels"))
    room[0] = 16_000
    lock = next(tmp_path.glob("decoded/*.lock"))
    lock.with_suffix(".99.tmp").write_bytes(bytes(15_360))  # of a process that was killed
    assert len(load(tmp_path / "flat", tmp_path)[0]) == 5

def test_torchvisions_data_sets_are_downloaded_once_a_node(tmp_path, monkeypatch):
    pixels = (rand(4, 32, 32, 3) * 255).byte().numpy()
    downloads = []

    class CIFAR10:
        data, targets, classes = pixels, [3, 1, 4, 1], ["a", "b", "c", "d", "e"]

        def __init__(self, root, train, download=False):
            downloads.append(download)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    train, test, size = data.load("cifar10", tmp_path)
    assert size == 32 and train.classes == CIFAR10.classes and sum(downloads) == 2
    assert test.labels.tolist() == [3, 1, 4, 1]
    assert torch.equal(train.pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    monkeypatch.setenv("LOCAL_RANK", "1")
    data.load("cifar10", tmp_path)
    assert sum(downloads) == 2

# ------------------------------------------------------------------------------------ pretrain.py

def cross_entropy(q, k, queue, temperature, target=None):
    """InfoNCE by torch's cross-entropy, target (N, 1 + K) or None -> loss, hit."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    if target is None:
        target = torch.zeros(len(q), dtype=torch.long)
    return F.cross_entropy(logits, target, reduction="none"), logits.argmax(1) == 0

def embeddings(N, C, K):
    """Queries from near to far from their keys, and a queue with some hard negatives, float32."""
    k = unit(N, C, seed=1)
    queue = unit(K, C, seed=2)
    distance = torch.linspace(0.2, 3, N, dtype=torch.float64)[:, None]
    q = F.normalize(k + unit(N, C, seed=3) * distance, dim=1)
    hard = queue[::max(1, K // 50)]
    hard[:] = F.normalize(q[:1] + 0.5 * hard, dim=1)
    return q.float(), k.float(), queue.float()

@pytest.mark.parametrize("temperature", [0.03, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("N,C,K", [(1, 32, 1), (3, 128, 7), (64, 128, 4096), (300, 256, 1021)])
@pytest.mark.parametrize("name", ["info_nce", "info_nce_plain"])
def test_info_nce_is_cross_entropy(name, N, C, K, temperature):
    q, k, queue = embeddings(N, C, K)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 5e-6)):
        reference = q.double().requires_grad_()
        expected, hits = cross_entropy(reference, k.double(), queue.double(), temperature)
        expected.sum().backward()
        x = q.to(dtype).requires_grad_()
        key = k.to(dtype).requires_grad_()
        loss, hit = getattr(pretrain, name)(x, key, queue.to(dtype), temperature)
        loss.sum().backward()
        assert loss.shape == hit.shape == (N,)
        assert torch.equal(hit, hits)
        size = 1 / temperature  # of a logit, and of a query's gradient
        assert (loss - expected).abs().max() <= tolerance * size
        assert (x.grad - reference.grad).norm() <= tolerance * (size + reference.grad.norm())
        assert name == "info_nce_plain" or key.grad is None

@pytest.mark.parametrize("name", ["info_nce", "info_nce_plain"])
def test_in_batch_negatives_are_cross_entropy_over_the_batch(name, monkeypatch):
    for views in (1, 2):  # with --symmetric, both keys of a query's image are not negatives
        q, queue = unit(8 * views, 16, seed=1), unit(33, 16, seed=3)
        new_keys = [unit(8, 16, seed=4 + i) for i in range(views)]
        own = torch.arange(8 * views)
        keys = torch.cat(new_keys)
        logits = q @ torch.cat([keys, queue]).T / 0.2
        if views == 2:
            logits[own, (own + 8) % 16] = -math.inf
        x = q.clone().requires_grad_()
        y = logits.detach().requires_grad_()
        expected = F.cross_entropy(y, own, reduction="none")
        expected.sum().backward()
        is_own = pretrain.is_own_image(len(q), len(keys), 8, CPU)
        loss, hit = getattr(pretrain, name)(x, keys, queue, 0.2, more_keys=keys, is_own=is_own)
        loss.sum().backward()
        assert torch.allclose(loss, expected, rtol=1e-10)
        assert torch.allclose(x.grad, y.grad @ torch.cat([keys, queue]) / 0.2, atol=1e-12)
        assert torch.equal(hit, logits.argmax(1) == own)
    monkeypatch.setattr(pretrain, "rank_world", lambda: (1, 2))
    is_own = pretrain.is_own_image(8, 8, 4, CPU)
    assert torch.equal(is_own.int().argmax(1), torch.tensor([4, 5, 6, 7] * 2))

class LargestTensor(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.numel() < 65536 * 64:  # but the queue
                self.size = max(self.size, x.numel())
        return out

def test_info_nce_never_holds_the_logits():
    q, k, queue = embeddings(256, 64, 65536)
    with LargestTensor() as largest:
        pretrain.info_nce(q.requires_grad_(), k, queue, 0.1)[0].sum().backward()
    assert 0 < largest.size <= 256 * 65536 // 32

def test_soft_targets_are_cross_entropy():
    q, k, queue = unit(7, 16, seed=1), unit(7, 16, seed=2), unit(900, 16, seed=3)
    logits = torch.cat([(k * k).sum(1, keepdim=True), k @ queue.T], 1) / 0.05
    a = q.clone().requires_grad_()
    b = q.clone().requires_grad_()
    target = pretrain.teacher_target(k, queue, 0.05)
    loss, _ = pretrain.info_nce(a, k, queue, 0.2, target)
    expected, _ = cross_entropy(b, k, queue, 0.2, logits.softmax(1))
    loss.sum().backward()
    expected.sum().backward()
    assert torch.allclose(loss, expected, rtol=1e-10)
    assert torch.allclose(a.grad, b.grad, rtol=1e-8, atol=1e-12)

def check_kernel(device):
    """The Triton kernel against cross-entropy in float64, on any shape."""
    if device == "cpu":  # in a process of its own, interpreted
        pretrain.sums_over_queue = pretrain.fused_sums
    for N, C, K, T in ((1, 100, 1009, 0.1), (70, 128, 2048, 0.2), (5, 64, 777, 0.03),
                       (33, 512, 64, 1)):
        q, k, queue = (x.half().float() for x in embeddings(N, C, K))
        queue[0] = q[-1]  # far nearer than its own key: exp(their difference) is no float16
        reference = q.double().requires_grad_()
        expected, hits = cross_entropy(reference, k.double(), queue.double(), T)
        expected.sum().backward()
        x = q.to(device).requires_grad_()
        loss, hit = pretrain.info_nce(x, k.to(device), queue.to(device), T)
        loss.sum().backward()
        error = (x.grad.cpu() - reference.grad).norm() / reference.grad.norm()
        worst = (loss.cpu() - expected).abs().max()
        print(f"N {N} C {C} K {K} T {T}: gradient error {error:.1e}, loss error {worst:.1e}")
        assert error < 1e-3
        assert worst < 5e-3
        assert torch.equal(hit.cpu(), hits)
        teacher = pretrain.teacher_target(k.to(device), queue.to(device), 0.1).cpu()
        p = torch.cat([torch.ones(N, 1), k @ queue.T], 1).div(0.1).softmax(1)
        assert torch.allclose(teacher, p[:, :1] * k + p[:, 1:] @ queue, atol=2e-3)

def run_code(code, **env):
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                          env=os.environ | env)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

def test_the_kernel_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")
    printed = run_code("import test_smoke; test_smoke.check_kernel('cpu')", TRITON_INTERPRET="1")
    assert printed.count("gradient error") == 4

COMPILE = """import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *args: (8, 0)
class Driver:
    def get_current_target(self):
        return GPUTarget('cuda', 80, 32)
triton.runtime.driver.set_active(Driver())
import pretrain
names = pretrain.queue_kernel.arg_names
sizes = dict(WIDTH=128, ROWS=64, KEYS=64, PART=1024)
kinds = dict(q_ptr='*fp16', queue_ptr='*fp16', N='i32', K='i32', C='i32', scale='fp32')
signature = {name: kinds.get(name, '*fp32') for name in names} | dict.fromkeys(sizes, 'constexpr')
for capability in (80, 90):
    source = ASTSource(fn=pretrain.queue_kernel, signature=signature, constexprs=sizes)
    built = triton.compile(source, target=GPUTarget('cuda', capability, 32))
    print('sm', capability, len(built.asm['cubin']), 'bytes, shared', built.metadata.shared,
          'matrix units', 'mma' in built.asm['ptx'])
"""

def test_the_kernel_compiles_for_gpus_that_are_not_here():
    pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")
    assert run_code(COMPILE).count("matrix units True") == 2

def tiny_moco(queue=10, splits=1):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8),
                                   torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                                   torch.nn.Flatten())
    encoder = pretrain.Encoder(backbone, torch.nn.Linear(8, 4))
    return pretrain.MoCo(encoder, 4, queue, splits)

def test_momentum_update_and_queue():
    moco = tiny_moco(queue=10)
    old = copy.deepcopy(moco.encoder_k.state_dict())
    with torch.no_grad():
        for x in moco.encoder_q.state_dict().values():
            x.add_(1)
    moco.update_key_encoder(0.9)
    queries = dict(moco.encoder_q.named_parameters())
    for name, p in moco.encoder_k.named_parameters():
        assert torch.allclose(p, 0.9 * old[name] + 0.1 * queries[name], atol=1e-6)
    for name, b in moco.encoder_k.named_buffers():
        assert torch.equal(b, old[name])
    history = []
    for step in range(9):  # 10 is no multiple of 4: wraps around in the middle of a batch
        new = unit(4, 4, seed=step).float()
        history += new.tolist()
        moco.enqueue(new)
        if len(history) >= 10:
            assert sorted(moco.queue.tolist()) == sorted(history[-10:])

def test_keys_are_normalized_in_shuffled_parts_and_come_back_in_order():
    x = rand(8, 3, 9, 9, dtype=torch.float32)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    encoder = tiny_moco().encoder_q.train()
    expected = torch.empty(8, 4)
    for part in (order[:4], order[4:]):
        expected[part] = encoder([x[part]]).detach()
    assert torch.allclose(tiny_moco(splits=2).encode_keys(x[order], order), expected, atol=1e-6)
    assert not torch.allclose(tiny_moco().encode_keys(x[order], order), expected, atol=1e-3)

def calls_of_a_run(tmp_path, monkeypatch, *flags, steps=1):
    """What info_nce was called with in a run of few steps, and its networks."""
    monkeypatch.setitem(models.ARCHS, "plain", NoBatchNorm)
    info_nce = pretrain.info_nce
    calls = []

    def record(*args):
        calls.append([a.detach().clone() if torch.is_tensor(a) else a for a in args])
        return info_nce(*args)

    monkeypatch.setattr(pretrain, "info_nce", record)
    if not (tmp_path / "flat").is_dir():
        make_folder(tmp_path / "flat", classes=(".",), per=40)
    moco = run("--data", tmp_path / "flat", "--root", tmp_path, "--out",
               tmp_path / f"run{len(list(tmp_path.iterdir()))}", *SMALL, "--queue", 24, "--arch",
               "plain", "--head", "linear", "--steps", steps, "--lr", 0.1, "--no-weak-keys", *flags)
    monkeypatch.setattr(pretrain, "info_nce", info_nce)
    return calls, moco

def test_techniques_change_what_their_formula_says(tmp_path, monkeypatch):
    start = partial(calls_of_a_run, tmp_path, monkeypatch)
    calls, _ = start()
    q, k, queue, temperature, target, more_keys, is_own = calls[0]
    assert (len(q), temperature, target) == (8, 0.1, None)
    assert torch.equal(more_keys, k) and torch.equal(is_own, torch.eye(8).bool())
    assert start("--no-in-batch")[0][0][5] is None

    q2, k2, queue2, *_ = start("--symmetric")[0][0]
    assert torch.equal(q2[:8], q) and torch.equal(k2[:8], k) and torch.equal(queue2, queue)
    # before the first update both encoders are one: the views have changed roles
    assert torch.allclose(q2[8:], k2[:8], atol=1e-6)
    assert torch.allclose(k2[8:], q2[:8], atol=1e-6)

    calls, moco = start("--weak-keys", "--lr", 0)
    images = load(tmp_path / "flat", tmp_path, size=32)[0]
    rows, u, _ = data.draw_step(40, 8, 0, 0)
    pixels, shapes = images.get(rows)
    views = data.augment(pixels, u[1], 32, (0.35, 1), 0, 0, 0, 0, shapes)  # crop and flip alone
    assert torch.equal(calls[0][0], q) and torch.allclose(calls[0][1], moco.encoder_q([views]))

def test_schedules():
    args = pretrain.parse(["--momentum", "0.5", "--lr", "2", "--warmup", "2"])
    args.total_steps = 100
    rates = [pretrain.schedule(args, step, 10) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 20) and max(rates) == rates[19]
    assert rates[50] == pytest.approx(0.5)

@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6), (3, 40)])
def test_orthogonal_is_a_polynomial_of_the_singular_values(shape):
    g = torch.randn(*shape, generator=generator(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    assert torch.allclose(pretrain.orthogonal(g), u @ torch.diag(s) @ v, atol=1e-10)
    assert 0.6 < s.min() and s.max() < 1.3
    thin = (u[:, :1] * v[:1]).float()  # of rank 1: what rounding adds must not grow
    assert torch.linalg.svdvals(pretrain.orthogonal(thin)).sum() < 1.4
    assert pretrain.orthogonal(torch.zeros(shape)).abs().max() == 0

@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_muon_is_sgd_but_for_dense_convolutions(muon):
    torch.manual_seed(0)
    net = models.build("mobilenetv3_small").double().to(memory_format=torch.channels_last)
    peer = copy.deepcopy(net)
    sgd = torch.optim.SGD(peer.parameters(), 0.1, 0.9, weight_decay=1e-3)
    optimizer = pretrain.Muon(net, muon, 0.1, 1e-3, fused=True)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    w = net.features[2].block[0][0].weight  # 72 x 16 x 1 x 1
    v = w.detach().clone().flatten(1)
    momentum = torch.zeros_like(v)
    for step in range(3):
        for p, q in zip(net.parameters(), peer.parameters()):
            p.grad = torch.zeros_like(p).copy_(rand(*p.shape, seed=step) - 0.5)
            q.grad = p.grad.clone()
        g = w.grad.flatten(1).clone()
        momentum = 0.95 * momentum + g
        move = pretrain.orthogonal(g + 0.95 * momentum) * (72 / 16) ** 0.5
        v = (1 - 0.002) * v - 0.02 * move
        optimizer.step()
        sgd.step()
    assert torch.allclose(w.flatten(1), v) == (muon > 0)
    for (name, p), q in zip(net.named_parameters(), peer.parameters()):
        is_dense = p.ndim == 4 and p.shape[1] > 3 and "fc" not in name
        assert torch.allclose(p, q) == (muon == 0 or not is_dense), name

def test_a_recorded_step_reads_batch_and_rates_from_fixed_places(monkeypatch):
    for name in ON_CUDA_GRAPHS:
        monkeypatch.setattr(torch.cuda, name, MagicMock())  # so all is computed as it is recorded
    x = rand(4, 6, 3, 9, 9, dtype=torch.float32)
    weights = []
    for is_recorded in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, bias=False))
        optimizer = pretrain.Muon(net, 0.02, 0.1, 1e-3, fused=True)
        places = []
        step = partial(step_and_note_places, net, optimizer, places)
        if is_recorded:
            step = pretrain.Recorded(step, optimizer, CPU)
        for i in range(4):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] / (i + 1)
            step([x[i]])
        weights.append(torch.cat([w.detach().flatten() for w in net.parameters()]))
    assert len(places) == 4 and len(set(places)) == 1 and None not in places[0]
    assert torch.allclose(*weights, rtol=1e-4)

def step_and_note_places(net, optimizer, places, batch):
    """A step; notes where in memory it reads the batch and the rates (None: it is a number)."""
    read = [*batch, *(group["lr"] for group in optimizer.param_groups)]
    places.append(tuple(x.data_ptr() if torch.is_tensor(x) else None for x in read))
    net(batch[0]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

def test_a_teacher_is_a_key_encoder_that_stays(tmp_path, monkeypatch):
    calls_of_a_run(tmp_path, monkeypatch, "--out", tmp_path / "teacher", steps=3)
    flags = ["--teacher", tmp_path / "teacher", "--out", tmp_path / "student"]
    calls, moco = calls_of_a_run(tmp_path, monkeypatch, *flags, steps=4)
    net = linear_eval.read_checkpoint(tmp_path / "teacher/last.pt", "plain")[0]
    teacher = pretrain.Encoder(net, linear_eval.read_head(tmp_path / "teacher")[0])
    for a, b in zip(teacher.parameters(), moco.encoder_k.parameters(), strict=True):
        assert torch.equal(a, b)  # it learns nothing
    images = load(tmp_path / "flat", tmp_path, size=32)[0]
    for step, (_, z, queue, _, target, more_keys, _) in enumerate(calls):
        rows, u, _ = data.draw_step(40, 8, 0, step)
        pixels, shapes = images.get(rows)
        views = data.augment(pixels, u[0], 32, (0.35, 1), shapes=shapes)  # the query's
        assert torch.allclose(z, teacher([views]), atol=1e-5)
        assert torch.equal(target, pretrain.teacher_target(z, queue, 0.01)) and more_keys is None
    assert torch.isclose(calls[1][2][:, None], calls[0][1][None], atol=1e-6).all(2).sum() == 8
    shutil.rmtree(tmp_path / "teacher")  # a run that goes on reads last.pt alone
    run("--out", tmp_path / "student", "--resume")
    with pytest.raises(InputError, match="teacher: no such"):
        calls_of_a_run(tmp_path, monkeypatch, *flags, "--out", tmp_path / "new")

def test_a_teacher_with_mocos_names(tmp_path):
    weights = models.build("resnet18").state_dict()
    state = {f"module.encoder_q.{name}": w for name, w in weights.items()}
    state |= {"module.encoder_q.fc.0.weight": torch.ones(6, 512),
              "module.encoder_q.fc.0.bias": torch.ones(6),
              "module.encoder_q.fc.2.weight": torch.ones(4, 6),
              "module.encoder_q.fc.2.bias": torch.ones(4)}
    torch.save({"state_dict": state}, tmp_path / "moco.pt")
    net, known = linear_eval.read_checkpoint(tmp_path / "moco.pt", "resnet18")
    assert known["stem"] == "imagenet" and torch.equal(net.conv1.weight, weights["conv1.weight"])
    head, widths = linear_eval.read_head(tmp_path / "moco.pt")
    assert widths == ([512, 6, 4], False)
    assert head(torch.ones(1, 512)).tolist() == [[6 * 513 + 1] * 4]
    torch.save(weights, tmp_path / "bare.pt")
    assert linear_eval.read_head(tmp_path / "bare.pt")[1] == ([], False)  # embeds no further
    state["module.encoder_q.fc.3.weight"] = torch.ones(4)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(InputError, match="odd.pt: its projection head"):
        linear_eval.read_head(tmp_path / "odd.pt")

def filled(n, world=1, *flags):
    args = pretrain.parse(["--size", "32", *flags])
    pretrain.fill_auto(args, n, world)
    return args

def test_open_flags_follow_the_number_of_images(capsys):
    args = filled(5120)
    assert (args.batch, args.queue, args.total_steps, args.stem) == (64, 128, 14 * 80, "imagenet")
    assert (args.momentum, args.lr) == (0.8214, 0.02)
    assert args.in_batch and args.weak_keys and args.warmup == 2
    assert "--recipe quick, for 5,120 images: stem imagenet" in capsys.readouterr().out
    for n, world in ((5, 1), (9, 1), (9, 2), (100, 3), (1000, 3), (100, 8)):  # small sets, too
        args = filled(n, world)
        images = load_nothing(n)
        pretrain.check(args, images, world)
    for n in range(256, 20_000, 97):  # who meets a key of the own image? See fill_auto
        args = filled(n)
        assert (args.queue / n) ** 2 / 2 < 0.01 or args.queue == args.batch
    assert filled(50_000, 1, "--epochs", "100").stem == "small"
    for steps, lowest in ((100, 0.35), (1600, 0.25), (9999, 0.2), (10_000, 0.08)):
        assert filled(50_000, 1, "--steps", str(steps)).crop == [lowest, 1]
    args = filled(1_281_167, 8, "--size", "224", "--epochs", "200", "--recipe", "moco-v2")
    published = dict(batch=256, queue=65536, momentum=0.999, bn_splits=8, lr=0.03, warmup=0,
                     temp=0.2, wd=1e-4, head="simple", dim=128, crop=[0.2, 1], jitter=0.4, hue=0.1,
                     gray=0.2, blur=0.5, stem="imagenet", symmetric=False)
    assert published.items() <= vars(args).items()
    assert not (args.in_batch or args.zero_init or args.weak_keys or args.head_norm)

def load_nothing(n):
    return data.Images(torch.zeros(n, 3, 1, 1), None, torch.zeros(n), [], CPU, "")

@pytest.mark.parametrize("flag,expected", [("--zero-init", 6), ("--no-zero-init", 0)])
def test_zero_init_is_for_the_networks_that_learn(flag, expected):
    args = filled(100, 1, "--arch", "mobilenetv3_small", flag)
    moco, untrained = pretrain.build_networks(args, CPU, is_new=True)
    for net, count in ((moco.encoder_q, expected), (moco.encoder_k, expected), (untrained, 0)):
        weights = [w for name, w in net.named_parameters() if name.endswith("weight")]
        assert sum(not w.any() for w in weights) == count

@pytest.mark.parametrize("has_it", [True, False])
def test_sixteen_bits_are_for_gpus_and_dense_networks(has_it, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx512_bf16=has_it))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    half = torch.bfloat16 if has_it else torch.float16
    on_cpu = torch.bfloat16 if has_it else torch.float32
    for device, arch, expected in (("cpu", "resnet18", on_cpu), ("cuda", "mobilenetv3", half),
                                   ("cpu", "mobilenetv3", torch.float32)):
        assert pretrain.choose_dtype("auto", torch.device(device), arch) == expected
    assert pretrain.choose_dtype("float32", torch.device("cuda"), "resnet18") == torch.float32

def test_a_run_end_to_end(labelled, tmp_path, capsys):
    flags = [*labelled, "--epochs", 3, "--head", "deep", "--out", tmp_path / "run"]
    run(*flags)
    printed = capsys.readouterr().out
    for text in ("The loss rises for the first 2 steps", "raw pixels", "for 42 images"):
        assert text in printed
    log = read_log(tmp_path / "run")
    assert [entry["epoch"] for entry in log] == [1, 2, 3]
    assert log[-1]["step"] == 15 and log[-1]["minutes"] > log[0]["minutes"] > 0
    assert log[-1]["images_per_s"] > 0 and 0 <= log[-1]["knn"] <= 100
    assert Image.open(tmp_path / "run/views.png").size == (8 * 96, 3 * 96)
    net, known = linear_eval.read_checkpoint(tmp_path / "run")
    assert (known["arch"], known["size"], known["stem"]) == ("mobilenetv3_small", 32, "imagenet")
    last = linear_eval.read_checkpoint(tmp_path / "run/last.pt")[0].state_dict()
    assert all(torch.equal(w, last[name]) for name, w in net.state_dict().items())

def test_a_run_without_labels_from_a_checkpoint(flat, tmp_path, capsys):
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "tv.pt")
    run(*flat, "--init", tmp_path / "tv.pt", "--steps", 1, "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "242 of its 244 tensors" in printed and "linear_eval.py" not in printed
    assert 0 <= read_log(tmp_path / "run")[0]["found"] <= 100
    look(tmp_path / "run", "random")  # what is advised

def test_float16_steps_that_overflow_are_left_out(flat, tmp_path):
    moco = run(*flat, "--precision", "float16", "--steps", 6, "--out", tmp_path / "run")
    assert all(p.isfinite().all() for p in moco.parameters())
    assert torch.load(tmp_path / "run/last.pt")["scaler"]["scale"] < 65536  # some did

BAD_INPUT = [  # script, flags, what the line says
    ("run", ["--arch", "vgg"], "--arch: invalid choice: 'vgg'"),
    ("run", ["--stem", "odd"], "--stem: invalid choice"), ("run", ["--batch", 100], "--batch 100"),
    ("run", ["--batch", 1], "--bn-splits 1"), ("run", ["--queue", 7], "--queue 7"),
    ("run", ["--queue", 500], "--queue 500"), ("run", ["--temp", 0.025], "--temp: 0.025"),
    ("run", ["--bn-splits", 3], "--bn-splits 3"), ("run", ["--crop", 0.5, 0.2], "--crop"),
    ("run", ["--head", "tall"], "--head tall"), ("run", ["--gray", 2], "--gray: 2"),
    ("run", ["--init", "resnet.pt"], "resnet.pt"), ("run", ["--init", "torn.pt"], "torn.pt"),
    ("run", ["--init", "hostile.pt"], "hostile.pt"), ("run", ["--teacher", "torn.pt"], "torn.pt"),
    ("run", ["--teacher", "run", "--dim", 64], "give --dim 128"), ("run", ["--odd", 1], "--odd"),
    ("run", ["--data", "empty"], "empty"), ("run", ["--data", "nowhere"], "nowhere"),
    ("run", ["--resume"], "--out"), ("run", ["--data", "few"], "few: too few images"),
    ("run", ["--lr", "x"], "--lr: x is no number"), ("run", ["--device", "cuda:7"], "--device"),
    ("run", ["--teacher", "run", "--in-batch"], "--teacher"),
    ("run", ["--steps", 0], "--steps: 0"),
    ("evaluate", ["random", "--data", "few"], "no labels"),
    ("evaluate", ["random", "--data", "single"], "two classes"),
    ("evaluate", ["random", "--data", "unheld"], "no held-out image"),
    ("evaluate", ["mobile.pt", "--arch", "resnet18"], "name the right --arch"),
    ("evaluate", ["mobile.pt"], "of which network"), ("evaluate", ["missing.pt"], "missing.pt"),
    ("evaluate", ["nothing.pt"], "nothing.pt: not read"),
    ("evaluate", ["other.pt"], "other.pt: holds no state dict"),
    ("evaluate", ["odd"], "of which network"), ("evaluate", ["list"], "args.json: not one object"),
    ("evaluate", ["random", "--labels", "many"], "--labels"),
    ("evaluate", ["resnet.pt", "--arch", "resnet18", "--stem", "small"], "--stem small"),
    ("look", ["text.pt"], "text.pt"),
    ("look", ["random", "--per-class", 1], "--per-class: 1"),
    ("look", ["random", "--data", "unheld"], "no held-out"),
    ("look", ["random", "--data", "nowhere"], "nowhere"),
    ("look", ["random", "--data", "one"], "sample of 1 image is too few")]

@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    """A folder with whatever BAD_INPUT names."""
    here = tmp_path_factory.mktemp("bad")
    make_folder(here / "images", per=10)
    (here / "empty").mkdir()
    make_folder(here / "few", classes=(".",), per=4)
    make_folder(here / "single", classes=("one",))
    make_folder(here / "unheld/train", per=1)
    make_folder(here / "unheld/test", per=0)
    make_folder(here / "one/train", per=5)
    make_folder(here / "one/test", classes=("a",), per=1)
    torch.save(models.build("resnet18").state_dict(), here / "resnet.pt")
    torch.save(models.build("mobilenetv3_small").state_dict(), here / "mobile.pt")
    torch.save({"state_dict": Attack()}, here / "hostile.pt")
    (here / "torn.pt").write_bytes((here / "resnet.pt").read_bytes()[:5000])
    (here / "text.pt").write_text("<html>")
    (here / "nothing.pt").touch()
    torch.save({"lr": 0.1}, here / "other.pt")
    for name, args in (("odd", dict(arch=["resnet18"])), ("list", [1])):
        (here / name).mkdir()
        (here / name / "args.json").write_text(json.dumps(args))
        shutil.copy(here / "mobile.pt", here / name / "backbone.pt")
    make_folder(here / "flat", classes=(".",), per=9)
    run("--data", here / "flat", "--root", here / "data", "--out", here / "run", *SMALL,
        "--queue", 9, "--steps", 1)
    yield here
    shutil.rmtree(here)

class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)

@pytest.mark.parametrize("script,flags,message", BAD_INPUT)
def test_bad_input_is_one_line(script, flags, message, bad_folder, monkeypatch):
    monkeypatch.chdir(bad_folder)
    common = [] if "--data" in flags else ["--data", "images"]
    common += [*SMALL, "--epochs", 1] if script == "run" and "--steps" not in flags else []
    with pytest.raises(InputError, match=re.escape(message)) as error:
        globals()[script](*common, *flags)
    assert "\n" not in str(error.value)
    assert not Path("attacked").exists() and not Path("runs").exists()

def test_the_attack_is_real(bad_folder, monkeypatch):
    monkeypatch.chdir(bad_folder)
    torch.load("hostile.pt", weights_only=False)
    Path("attacked").rmdir()

def test_bad_input_ends_the_process_with_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    make_folder(tmp_path / "images", per=10)
    wrong = ["--data", tmp_path / "empty"]
    unwritable = ["--data", tmp_path / "images", "--root", tmp_path / "file"]
    for script, flags, message in (("pretrain.py", unwritable, "[Errno"),
                                   ("linear_eval.py random", wrong, "--data"),
                                   ("analyze.py random", wrong, "--data")):
        command = [sys.executable, *script.split(), *flags]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith(f"{script.split()[0]}: {message}")
        assert done.stderr.count("\n") == 1

# ----------------------------------------------------------------------------- nothing is lost

def content(folder):
    """All tensors of a run's last checkpoint, its log without the speeds, its step."""
    last = torch.load(folder / "last.pt")
    tensors = dict(last["model"])
    for i, state in last["optimizer"]["state"].items():
        tensors |= {f"optimizer {i} {name}": value for name, value in state.items()}
    for name, w in torch.load(folder / "backbone.pt").items():
        assert torch.equal(w, tensors[f"encoder_q.backbone.{name}"])
    log = read_log(folder)
    for entry in log:
        del entry["images_per_s"], entry["minutes"]
    return tensors, log, last["step"]

def doomed(argv, delay):
    """A run that is killed `delay` seconds before or after its first step, if that is positive."""
    train_step, compare = pretrain.train_step, pretrain.refuse_differences

    def arm(facts):
        if delay > 0:
            signal.setitimer(signal.ITIMER_REAL, delay)  # SIGALRM ends a process at once
        compare(facts)

    def slow_step(*args):
        time.sleep(0.01)
        return train_step(*args)

    pretrain.refuse_differences = arm
    pretrain.train_step = slow_step
    pretrain.report = lambda *args: None
    pretrain.main(argv)

LONG = pytest.mark.skipif("LONG" not in os.environ, reason="takes minutes; LONG=1 runs it")

@pytest.mark.parametrize("world,steps,kills", [
    (1, 12, 1), (2, 12, 1), pytest.param(1, 120, 20, marks=LONG),
    pytest.param(2, 60, 10, marks=LONG)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(world, steps, kills, labelled, tmp_path):
    flags = [*labelled, "--steps", str(steps), "--save-every", "0.001", "--knn-every", "9",
             "--resume"]

    def start(name, delay, codes):
        argv = [*flags, "--out", str(tmp_path / name)]
        if delay == 0 and world == 1:
            return run(*argv)
        return processes(world, tmp_path, f"test_smoke.doomed({argv!r}, {delay})", codes)

    start("whole", 0, (0,))
    rng = random.Random(0)
    killed = 0
    codes = (0, -signal.SIGALRM) if world == 1 else (0, -signal.SIGALRM, 1, -6)
    for i in range(kills):  # the first one before there is a checkpoint
        delay = rng.uniform(0.001, 0.2 if i == 0 else 2.5 * steps * 0.03 / kills)
        killed += start("killed", delay, codes)[0][-1] != 0
    start("killed", 0, (0,))
    print(f"{killed} of {kills} kills met the run, {world} processes")
    assert killed >= kills / 2
    a, log_a, step_a = content(tmp_path / "whole")
    b, log_b, step_b = content(tmp_path / "killed")
    assert step_a == step_b == steps
    assert log_a == log_b
    assert a.keys() == b.keys()
    for name in a:
        if world == 1 or not ("running" in name and "encoder_k" in name):
            assert torch.equal(a[name], b[name]), name

def test_processes_that_differ_are_told(tmp_path):
    make_folder(tmp_path / "images/0", classes=(".",), per=20)
    shutil.copytree(tmp_path / "images/0", tmp_path / "images/1")
    picture(9, 9).save(tmp_path / "images/1/0.png")  # a file more on one of two
    folder = f"'{tmp_path}/images/' + os.environ['RANK']"
    flags = [*map(str, SMALL), "--steps", "6", "--root", str(tmp_path), "--save-every", "0"]
    code = """import os, sys, pretrain
try:
    pretrain.main(FLAGS + ['--data', FOLDER, '--out', TMP + '/run' + os.environ['RANK']])
except pretrain.InputError as error:
    sys.exit(str(error))
"""
    for images, more, message in (
            (folder, [], f"data: process 0 has {tmp_path}/images/0, process 1"),
            (f"'{tmp_path}/images/0'", ["--resume"], "steps_done: process 0 has 6, process 1")):
        if more:  # two nodes, of which the first one alone holds the run
            run(*flags, "--data", tmp_path / "images/0", "--out", tmp_path / "run0")
        text = code.replace("FLAGS", repr(flags + more)).replace("FOLDER", images)
        text = text.replace("TMP", repr(str(tmp_path)))
        for error in processes(2, tmp_path, f"exec({text!r})", (1,))[1]:
            assert message in error
        assert not (tmp_path / "run1").exists()

def test_a_run_keeps_its_flags(tmp_path):
    make_folder(tmp_path / "flat", classes=(".",), per=20)
    out = ["--out", tmp_path / "run"]
    run("--data", tmp_path / "flat", "--root", tmp_path, *SMALL, "--steps", 3, *out)
    before = content(tmp_path / "run")
    for typed, message in (
            (["--steps", 9], "--steps 9: the run in .* has 3"), (["--epochs", 4], "--epochs 4"),
            (["--wd", 0.5], "--wd 0.5.*0.0005"), (["--precision", "float16"], "--precision"),
            (["--queue", 17], "--queue 17"), (["--arch", "resnet18"], "--arch"),
            (["--symmetric"], "--symmetric"), (["--no-in-batch"], "--in-batch False"),
            (["--recipe", "small"], "--recipe small")):
        with pytest.raises(InputError, match=message):
            run(*out, "--resume", *typed)
    run(*out, "--resume", "--save-every", 3, "--knn-every", 2, "--batch", 8, "--temp", 0.1)
    after = content(tmp_path / "run")
    assert after[1:] == before[1:] and after[2] == 3
    assert all(torch.equal(w, after[0][name]) for name, w in before[0].items())
    with pytest.raises(InputError, match="holds a run already"):
        run(*out)
    torch.save(dict(model={}), tmp_path / "run/last.pt")
    with pytest.raises(InputError, match="last.pt: not of the run"):
        run(*out, "--resume")
    picture(9, 9).save(tmp_path / "flat/more.png")
    with pytest.raises(InputError, match="began with other images"):
        run(*out, "--resume")
    (tmp_path / "run/args.json").unlink()
    with pytest.raises(InputError, match="not the run's args.json"):
        run(*out, "--resume")

def test_of_two_runs_that_begin_at_once_one_can(flat, tmp_path):
    images = load(flat[1], flat[3])[0]
    pretrain.start_run(tmp_path / "run", images, filled(20))
    with pytest.raises(InputError, match="holds a run already"):
        pretrain.start_run(tmp_path / "run", images, filled(20))

def test_runs_inside_the_data_folder_are_no_data(tmp_path, monkeypatch):
    make_folder(tmp_path / "here", per=20)
    monkeypatch.chdir(tmp_path / "here")
    flags = ["--data", ".", *SMALL, "--out", "runs/1"]
    run(*flags, "--steps", 3)
    look("runs/1")
    run("--out", "runs/1", "--resume")
    assert len(data.load(".")[0].classes) == 3

def two_process_run(argv):
    """One process of a run: checks that shuffled keys come back in order, and saves its network."""
    pretrain.report = lambda *args: None
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda: None
    models.ARCHS["plain"] = NoBatchNorm
    moco = pretrain.main(argv)
    rank, world = data.rank_world()
    x = rand(8, 3, 32, 32, dtype=torch.float32)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    for b in moco.encoder_k.eval().buffers():
        torch.distributed.broadcast(b, 0)
    keys = moco.encode_keys(x[order][rank * 4:rank * 4 + 4], order)
    assert torch.allclose(keys, moco.encoder_k([x]), atol=1e-5)
    torch.save(moco.state_dict(), f"{argv[-1]}/rank{rank}.pt")
    destroy()

@pytest.mark.parametrize("arch", ["plain", "mobilenetv3_small"])
def test_two_processes_train_as_one(arch, labelled, tmp_path, monkeypatch):
    monkeypatch.setitem(models.ARCHS, "plain", NoBatchNorm)
    flags = [*labelled, "--steps", "10", "--seed", "1", "--lr", "0.05", "--arch", arch]
    if arch == "plain":  # in which no statistics differ
        flags.append("--no-head-norm")
    argv = [*flags, "--out", str(tmp_path / "two")]
    processes(2, tmp_path, f"test_smoke.two_process_run({argv!r})")
    a, b = [torch.load(tmp_path / f"two/rank{rank}.pt") for rank in (0, 1)]
    for name in a:
        if "running" not in name and "batches" not in name:  # statistics are each process's own
            assert torch.equal(a[name], b[name]), name
    if arch == "plain":
        for name, w in run(*flags, "--out", tmp_path / "one").state_dict().items():
            assert torch.allclose(w, a[name], atol=1e-5), name
        for x, y in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
            assert x["loss"] == pytest.approx(y["loss"], abs=1e-4)
            assert x["instance_accuracy"] == pytest.approx(y["instance_accuracy"], abs=1e-4)

@pytest.mark.parametrize("room", [1, 2])  # files that fit; the first last.pt is the second one
def test_a_full_disk(room, flat, tmp_path, monkeypatch):
    flags = [*flat, "--epochs", 3, "--save-every", 0]
    run(*flags, "--out", tmp_path / "whole")
    save = torch.save
    left = [room]

    def full_save(content, file):
        left[0] -= 1
        if left[0] < 0:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full_save)
    with pytest.raises(OSError, match="is the disk full.*No space left"):
        run(*flags, "--out", tmp_path / "full")
    assert not list((tmp_path / "full").glob("*.tmp"))
    monkeypatch.undo()
    run("--out", tmp_path / "full", "--resume")  # room was made
    whole = content(tmp_path / "whole")[0]
    full = content(tmp_path / "full")[0]
    assert all(torch.equal(whole[name], full[name]) for name in whole)

def test_a_loss_that_is_no_number_ends_the_run(flat, tmp_path, monkeypatch):
    info_nce = pretrain.info_nce
    calls = []

    def bad(*args):
        calls.append(0)
        loss, hit = info_nce(*args)
        return (loss * math.nan if len(calls) == 4 else loss), hit

    monkeypatch.setattr(pretrain, "info_nce", bad)
    with pytest.raises(InputError, match="the loss is nan at step 4.*--lr") as error:
        run(*flat, "--epochs", 9, "--save-every", 0, "--out", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert torch.load(tmp_path / "run/last.pt")["step"] == 3  # the last good checkpoint

# ---------------------------------------------------------------------------------- linear_eval.py

def test_knn_is_a_weighted_vote():
    x, t = unit(90, 5).float(), unit(31, 5, seed=1).float()
    y, z = torch.arange(90) % 3, torch.arange(31) % 3
    right = 0
    for query, label in zip(t, z.tolist()):
        nearest = sorted(range(90), key=lambda j: -(query @ x[j]).item())[:7]
        votes = [0.0, 0.0, 0.0]
        for j in nearest:
            votes[y[j]] += math.exp((query @ x[j]).item() / 0.1)
        right += int(np.argmax(votes)) == label
    assert linear_eval.knn(3 * x, y, 2 * t, z, k=7) == pytest.approx(100 * right / 31)

def test_neighbours_are_the_nearest():
    x = torch.randn(500, 6, generator=generator(0))
    t = torch.randn(1203, 6, generator=generator(1))
    expected, rows = torch.cdist(t.double(), x.double()).square().topk(9, largest=False)
    distances, near = linear_eval.neighbours(x, t, 9)
    assert torch.equal(near, rows)
    assert torch.allclose(distances.double(), expected, atol=1e-4)

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
    ours = linear_eval.fit(z, y, 5, penalty, torch.linalg.eigh((z.T @ z / 400).double()))
    assert (ours - W).norm() < 1e-3 * W.norm()

def test_the_probe_fits_features_of_any_scale():
    x, y = blobs(400)
    test_x, test_y = blobs(400, seed=1)
    expected = linear_eval.accuracy(*linear_eval.linear_probe(x, y, 5), test_x, test_y)
    small = linear_eval.linear_probe(1e-6 * x, y, 5)
    assert linear_eval.accuracy(*small, 1e-6 * test_x, test_y) == pytest.approx(expected, abs=1)
    assert expected > 60

def test_the_probe_of_collapsed_features_is_chance():
    y = torch.arange(400) % 4
    center = 1 + torch.rand(300, generator=generator(0))
    noise = torch.randn(400, 300, generator=generator(1))
    for size in (0, 1e-8):  # what varies is rounding
        x = center + size * noise
        assert linear_eval.accuracy(*linear_eval.linear_probe(x, y, 4), x, y) == 25

def test_held_out_part_and_label_subsets_are_balanced():
    y = torch.tensor([0] * 20 + [1] * 7 + [2] * 3 + [3])[torch.randperm(31, generator=generator(0))]
    assert y[linear_eval.held_out(y)].bincount(minlength=4).tolist() == [4, 1, 1, 0]
    labels = torch.cat([torch.arange(200) % 4, torch.full((9,), -1)])
    for wanted, per_class in (("0.1", 5), ("7", 7), ("0.001", 1)):
        rows = linear_eval.labelled_subset(labels, wanted, 0)
        assert labels[rows].bincount().tolist() == [per_class] * 4
        assert torch.equal(rows, linear_eval.labelled_subset(labels, wanted, 0))
        assert not torch.equal(rows, linear_eval.labelled_subset(labels, wanted, 1))
    for wanted in ("0", "1.5", "few", "-3"):
        with pytest.raises(InputError, match="--labels"):
            linear_eval.labelled_subset(labels, wanted, 0)

def test_measure():
    scores = torch.zeros(40, 7)
    y = torch.arange(40) % 4  # three classes have no image
    scores[torch.arange(40), y] = 1
    scores[:10, 6] = 2  # ten are wrong at first and right among the first five
    measures = linear_eval.measure(scores, y)
    assert measures["top1"] == 75 and measures["top5"] == 100
    assert measures["mean_per_class"] == pytest.approx(75, abs=1)
    assert measures["low"] == pytest.approx(59.81, abs=0.02)  # Wilson's, from his formula
    assert measures["high"] == pytest.approx(85.81, abs=0.02)
    each = linear_eval.accuracy_of_classes(scores, y)
    assert each[:4].tolist() == [70, 70, 80, 80] and each[4:].isnan().all()

def test_raw_pixels_are_means_of_pixels(monkeypatch):
    monkeypatch.setattr(linear_eval.Pixels, "most", 32)
    x = rand(2, 3, 96, 96, dtype=torch.float32)
    ours = linear_eval.Pixels()(x).view(2, 3, 32, 32)
    expected = TF.resize(x, [32, 32], antialias=True)
    assert torch.allclose(ours, expected, atol=1e-4)
    assert torch.equal(linear_eval.Pixels()(x[..., :24, :24]), x[..., :24, :24].flatten(1))

@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv3_small"])
def test_checkpoint_formats(arch, tmp_path):
    weights = models.build(arch).state_dict()
    full = getattr(torchvision.models, TORCHVISION[arch])()
    full.load_state_dict(weights, strict=False)
    others = {f"module.encoder_k.{name}": w + 1 for name, w in weights.items()}

    def under(prefix):
        return {prefix + name: w for name, w in weights.items()}

    for content in (weights, full.state_dict(),
                    {"epoch": 3, "state_dict": under("module.encoder_q.") | others},
                    {"state_dict": under("encoder_q.") | {"queue": torch.ones(2)}},
                    {"state_dict": under("module.student.")},
                    {"model": under("encoder_q.backbone.") | others, "step": 3}):
        torch.save(content, tmp_path / "c.pt")
        state = linear_eval.read_checkpoint(tmp_path / "c.pt", arch)[0].state_dict()
        assert all(torch.equal(state[name], weights[name]) for name in weights)

def test_the_weights_in_assets_are_torchvisions():
    file = HERE / "assets/mobilenetv3_small-tiny50.pt"
    net, known = linear_eval.read_checkpoint(file)
    assert (known["arch"], known["stem"], known["size"]) == ("mobilenetv3_small", "imagenet", 64)
    peer = torchvision.models.mobilenet_v3_small()
    missing, unexpected = peer.load_state_dict(torch.load(file)["state_dict"], strict=False)
    assert missing == ["classifier.3.weight", "classifier.3.bias"] and not unexpected
    assert all(w.isfinite().all() for w in net.state_dict().values())

@pytest.mark.parametrize("arch,part", [("resnet34", "resnet18"),
                                       ("efficientnet_b1", "efficientnet_b0")])
def test_a_part_of_a_larger_network_is_refused(arch, part, tmp_path):
    torch.save(getattr(torchvision.models, arch)().state_dict(), tmp_path / "c.pt")
    assert linear_eval.read_checkpoint(tmp_path / "c.pt", arch)[1]["arch"] == arch
    with pytest.raises(InputError, match=f"not those of {part}"):
        linear_eval.read_checkpoint(tmp_path / "c.pt", part)

def test_formats_evaluate_alike_and_the_classifier_is_torchvisions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images/train", per=12)
    make_folder(tmp_path / "images/test", per=5, seed=7)
    flags = ["--data", "images", "--size", 32, "--arch", "resnet18", "--knn"]
    torch.manual_seed(0)
    weights = models.build("resnet18").state_dict()
    Path("run").mkdir()
    torch.save(weights, "run/backbone.pt")
    moco = {f"module.encoder_q.{name}": w for name, w in weights.items()}
    torch.save({"state_dict": moco}, "moco.pt")
    tables = [evaluate(name, *flags, "--out", f"out-{name}")
              for name in ("run", "moco.pt", "random")]
    assert tables[0] == tables[1] == tables[2]
    assert {"linear", "kNN, k 20, T 0.1"} < tables[0].keys()
    result = json.loads(Path("out-run/result.json").read_text())
    assert len(result["per_class"]) == 3
    assert result["table"]["linear"]["top1"] == tables[0]["linear"]["top1"]

    classifier = torchvision.models.resnet18(num_classes=3).eval()
    classifier.load_state_dict(torch.load("out-run/classifier.pt"), strict=True)
    test = load("images", "data", size=32)[1]
    guess = classifier(data.center(test.pixels, 32, test.shapes)).argmax(1)
    right = 100 * (guess == test.labels).float().mean().item()
    assert right == pytest.approx(tables[0]["linear"]["top1"])
    text = (HERE / "README.md").read_text()
    lines = re.search(r"# a classifier.*?(?=\n\nimport timm)", text, re.S)[0]
    for written, here in (("mobilenet_v3_large(num_classes=10)", "resnet18(num_classes=3)"),
                          ("runs/NAME/eval-FOLDER", "out-run"), ("[64, 64]", "[32, 32]"),
                          ("photo.jpg", "images/test/a/0 é.jpg"), ("print(", "answer = (")):
        assert written in lines
        lines = lines.replace(written, here)
    scope = dict(torch=torch, torchvision=torchvision)
    exec(lines, scope)
    assert scope["answer"].indices[0, 0] == guess[0]

def test_two_processes_analyze_as_one(tmp_path):
    make_folder(tmp_path / "images/train", per=101)
    make_folder(tmp_path / "images/test", per=89, seed=7)  # 267: an odd number
    flags = ["random", "--arch", "mobilenetv3_small", "--size", "32", "--device", "cpu", "--data",
             str(tmp_path / "images"), "--root", str(tmp_path)]
    outcomes = []
    for world in (1, 2):
        argv = [*flags, "--out", str(tmp_path / f"{world}")]
        if world == 1:
            look(*argv)
        else:
            processes(world, tmp_path, f"test_smoke.be_quick(); test_smoke.look(*{argv!r})")
        outcomes.append(json.loads((tmp_path / f"{world}/analysis.json").read_text())["random"])
    for split in ("train", "held-out"):
        a, b = (outcome[split] for outcome in outcomes)
        for key, value in a.items():  # one of 267 images may lie on a border
            tolerance = 0.8 if "%" in analyze.ROWS[key] else 1e-4
            assert b[key] == pytest.approx(value, abs=tolerance), key

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
            hits += [better < j for j in range(1, 6)]
        ours = linear_eval.instance_discrimination(query, positive, others)
        assert torch.allclose(ours.double(), torch.from_numpy(100 * hits / len(o)))
    same = torch.ones(1500, 3)
    assert linear_eval.instance_discrimination(same, same, same)[4] == 0
    assert linear_eval.instance_discrimination(o, o, a)[0] == 100

def test_distances_are_means_over_pairs():
    o, a, b, y = sample()
    pairs = list(itertools.combinations(range(len(o)), 2))
    expected = np.mean([squared(u, v) for u, v in zip(a, b)])
    assert analyze.alignment(a, b).item() == pytest.approx(expected)
    expected = math.log(np.mean([math.exp(-2 * squared(o[i], o[j])) for i, j in pairs]))
    assert analyze.uniformity(o) == pytest.approx(expected)
    each = []
    for c in range(4):
        each.append(np.mean([squared(o[i], o[j]) for i, j in pairs if y[i] == y[j] == c]))
    assert analyze.intra_class_alignment(o, y).item() == pytest.approx(np.mean(each))
    many = unit(2300, 5)  # several blocks
    expected = torch.pdist(many).square().mul(-2).exp().mean().log().item()
    assert analyze.uniformity(many) == pytest.approx(expected)

def test_best_nn_is_a_search():
    o, _, b, y = sample()
    train, labels = o[:15], y[:15]
    mean = train.mean(0)
    spaces = dict(raw=lambda v: v, normalized=lambda v: F.normalize(v, dim=-1),
                  shifted=lambda v: F.normalize(v - mean, dim=-1))
    for name, space in spaces.items():
        best = 0
        for k in range(1, 15, 2):  # with five classes, votes tie
            right = 0
            for query, label in zip(b, y):
                distance = (space(query) - space(train)).norm(dim=1)
                near = distance.argsort()[:k]
                right += np.bincount(labels[near]).argmax() == label.item()
            best = max(best, 100 * right / len(b))
        assert analyze.best_nn(train, labels, b, y, most=14)[name] == pytest.approx(best)

def test_rotation_and_length_of_features_do_not_matter():
    o, a, b, y = sample(60)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator(1), dtype=torch.float64))[0]
    expected = analyze.instance_metrics(o, a, b, y)
    turned = analyze.instance_metrics(o @ turn, 2 * a @ turn, b @ turn, y)
    assert turned == pytest.approx(expected, rel=1e-5)
    tiny = [v.float() * 2.0 ** -50 for v in (o, a, b)]
    assert analyze.instance_metrics(*tiny, y) == pytest.approx(expected, rel=1e-3)
    best = analyze.best_nn(tiny[0], y, tiny[1], y)
    assert best == analyze.best_nn(o.float(), y, a.float(), y)

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

def test_the_map_shows_each_image_once_where_tsne_puts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "tsne", lambda x: x[:, :2].float())
    pixels = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 3, 4, 4) * 20 + 40
    images = data.Images(pixels, None, None, [], CPU, "")
    o = unit(9, 3)
    sample = dict(o=o, rows=torch.arange(9))
    analyze.draw_map({"run": sample}, images, tmp_path / "map.png", side=3, cell=8)
    shown = np.asarray(Image.open(tmp_path / "map.png").convert("L"))[30:54, 10:34]
    cells = shown[4::8, 4::8] // 20 - 2
    assert sorted(cells.flatten().tolist()) == list(range(9))  # none covers another
    columns = [np.where(cells == i)[1][0] for i in o[:, 0].argsort().tolist()]
    assert np.corrcoef(columns, range(9))[0, 1] > 0.7

def test_axes_begin_and_end_at_round_numbers():
    for low, high, expected in (
            (50.5, 52.4, [50.5, 51, 51.5, 52, 52.5]), (3, 3, None),
            (-0.08, 1, [-0.2, 0, 0.2, 0.4, 0.6, 0.8, 1]), (2.1, 97, [0, 20, 40, 60, 80, 100])):
        ticks = analyze.round_range(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
        assert expected is None or ticks == pytest.approx(expected)

def test_an_analysis_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_folder(Path("images/train"), per=12)
    make_folder(Path("images/test"), per=5, seed=7)
    entries = [dict(minutes=e, loss=5 / e, instance_accuracy=9.0 * e, knn=20 + e) for e in (1, 2)]
    for name, arch, size in (("run", "mobilenetv3_small", 32), ("other", "resnet18", 48)):
        Path(name).mkdir()
        torch.save(models.build(arch).state_dict(), f"{name}/backbone.pt")
        known = dict(arch=arch, stem="imagenet", size=size, data="images")
        Path(f"{name}/args.json").write_text(json.dumps(known))
        Path(f"{name}/log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    results = look("run", "other", "random", "pixels")
    printed = capsys.readouterr().out
    assert list(results) == ["run", "other", "random", "pixels"]
    assert json.loads(Path("run/analysis/analysis.json").read_text()).keys() == results.keys()
    for r in results.values():
        assert r["images"] == 15 and 0 <= r["held-out"]["ab"] <= 100  # as many of both splits
        assert {"linear", "nn_raw", "intra"} < r["held-out"].keys()
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(analyze.ROWS) and {line.count("|") for line in rows} == {6}
    assert "other: resnet18 at 48 pixels" in printed
    for name in ("map", "similarity", "curves"):
        image = Image.open(f"run/analysis/{name}.png").convert("RGB")
        assert np.asarray(image).std() > 5, name
    make_folder(Path("flat"), classes=(".",), per=15)
    free = look("run", "--data", "flat", "--out", "free")["run"]
    assert free.keys() == {"train", "images"} and "uniformity" in free["train"]

def test_over_clustering_is_a_comparison():
    # MobileNetV3-Small after 100 epochs of Tiny ImageNet's 50 classes
    numbers = dict(baseline=dict(ab=46.9, intra=1.551, uniformity=-3.004, nn_normalized=22.6,
                                 linear=27.2),
                   small=dict(ab=57.1, intra=1.595, uniformity=-3.175, nn_normalized=25.5,
                              linear=29.0),
                   random=dict(ab=2.5, intra=0.580, uniformity=-1.125, nn_normalized=7.3,
                               linear=11.0))
    results = {name: {"held-out": m} for name, m in numbers.items()}
    lines = analyze.diagnosis(results)
    assert len(lines) == 1 and lines[0].startswith("baseline over-clusters beside small")
    assert "best-NN is 2.9" in lines[0]
    for key, value in (("linear", 30), ("nn_normalized", 26), ("intra", 1.6), ("uniformity", -4)):
        one_sign_differs = results | {"baseline": {"held-out": numbers["baseline"] | {key: value}}}
        assert analyze.diagnosis(one_sign_differs) == []

def test_an_analysis_without_the_first_classes_held_out(tmp_path):
    make_folder(tmp_path / "images/train", classes="abcdefghi", per=4)
    make_folder(tmp_path / "images/test", classes="hi", per=4)
    look("random", "--arch", "mobilenetv3_small", "--data", tmp_path / "images", "--root", tmp_path,
         "--out", tmp_path / "out")
    assert (tmp_path / "out/map.png").is_file()

def test_similarities_of_many_images_are_sampled(tmp_path):
    x = torch.randn(20_000, 2, generator=generator(0))
    with LargestTensor() as largest:
        analyze.draw_similarity({"run": dict(o=x, a=x, b=x, y=torch.arange(20_000) % 5)},
                                tmp_path / "similarity.png")
    assert largest.size < 20_000 ** 2 / 100

# ------------------------------------------------------------------------------ a pretend GPU
# A tensor that says it is on cuda:0, computes on the CPU, and refuses to be mixed with CPU tensors
# and, as on mps, to be float64. So a missing `.to(device)` fails here as it would there.

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)

class Pretend(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="cuda:0", requires_grad=inner.requires_grad)
        self.inner = inner
        return self

    def tolist(self):
        return self.inner.tolist()

    def item(self):
        return self.inner.item()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return pretend_op(op, args, kwargs or {})

class PretendMode(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return pretend_op(op, args, kwargs or {})

def pretend_op(op, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, Pretend)]
    here = [x for x in tensors if not isinstance(x, Pretend)]
    on_device = bool(there)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == "cuda"
        kwargs = kwargs | dict(device=CPU)
    elif op is aten.copy_.default:
        on_device = isinstance(args[0], Pretend)
    elif op in INDEXING:
        assert not there or isinstance(args[0], Pretend), "indices on the GPU for a CPU tensor"
    elif there:
        assert all(x.dim() == 0 for x in here), f"{op} mixes devices"
    plain = tree_map(lambda x: x.inner if isinstance(x, Pretend) else x, (args, kwargs))
    result = op(*plain[0], **plain[1])
    name = str(op).split(".")[1]
    if name.endswith("_"):  # in place
        return None if name.startswith(("_foreach", "_fused")) else args[0]

    def wrap(x):
        if not on_device or not isinstance(x, torch.Tensor) or isinstance(x, Pretend):
            return x
        assert x.dtype != torch.float64, f"{op} makes float64, which mps lacks"
        return Pretend(x)

    return tree_map(wrap, result)

def pretend_gpu(commands):
    """Run scripts, (name, *flags) each, as on a GPU (gradients are made up, not computed)."""
    step = pretrain.Muon.step

    def step_with_gradients(self):
        for group in self.param_groups:
            for w in group["params"]:
                w.grad = 0.01 * w.detach()
        step(self)

    pretrain.Muon.step = step_with_gradients
    torch._C._ensureCUDADeviceGuardSet()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.backends.cudnn.enabled = False
    torch.Tensor.backward = Pretend.backward = lambda self, *args, **kwargs: None
    torch.Tensor.pin_memory = lambda self, *args: self
    save, torch_load = torch.save, torch.load
    torch.load = lambda file, **kwargs: torch_load(file, weights_only=True)
    torch.save = lambda content, file: save(
        tree_map(lambda x: x.inner if isinstance(x, Pretend) else x, content), file)
    cuda = torch.cuda
    cuda.is_available = cuda.is_bf16_supported = lambda *args, **kwargs: True
    cuda.mem_get_info = lambda device=None: (8 << 30, 16 << 30)
    cuda._lazy_init = cuda.current_device = lambda *args: 0
    for name in ("set_device", "manual_seed", "manual_seed_all"):
        setattr(cuda, name, lambda *args: None)
    for name in ON_CUDA_GRAPHS:
        setattr(cuda, name, MagicMock())  # what is recorded is computed at once, and not replayed
    cuda.amp.common.amp_definitely_not_available = lambda: False
    be_quick()
    linear_eval.PENALTIES = (1e-2,) * 3
    with PretendMode():
        for script, *argv in commands:
            globals()[script].main(argv)

@pytest.mark.skipif(
    torch.cuda.is_available() or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"),
    reason="a pretend GPU needs torch 2.11 or newer, and no real one")
@pytest.mark.parametrize("flags", [
    "--symmetric --head deep",
    "--teacher TMP/teacher --init TMP/teacher"])
def test_scripts_mix_no_devices(flags, labelled, flat, tmp_path):
    images = flat if "--teacher" in flags else labelled
    if "--teacher" in flags:
        run(*images, "--steps", 1, "--out", tmp_path / "teacher")
    folder = str(tmp_path / "run")
    cuda = ["--device", "cuda"]
    commands = [("pretrain", *images, *flags.replace("TMP", str(tmp_path)).split(), "--steps", "4",
                 "--queue", "20", *cuda, "--out", folder)]
    if "--symmetric" in flags:
        commands += [("linear_eval", folder, *cuda, "--knn", "--labels", "4"),
                     ("analyze", folder, "pixels", *cuda)]
    job = begin(f"test_smoke.pretend_gpu({commands!r})", tmp_path / "printed")
    job.join()
    assert job.exitcode == 0, (tmp_path / "printed").read_text()[-3000:]

# ---------------------------------------------------------------------------------------- a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

@pytest.mark.skipif(pretrain.triton is None, reason="no GPU that the kernel is for")
def test_cuda_kernel():
    check_kernel("cuda")

@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs here")
def test_cuda_two_processes(flat, tmp_path):
    argv = [*flat, "--steps", "4", "--device", "cuda", "--out", str(tmp_path / "run")]
    processes(2, tmp_path, f"import pretrain; pretrain.main({argv!r})")
    assert math.isfinite(read_log(tmp_path / "run")[-1]["loss"])

def losses(folder):
    return [entry["loss"] for entry in read_log(folder)]

@needs_gpu
def test_cuda_trains_as_the_cpu(tmp_path, monkeypatch):
    for device in ("cpu", "cuda"):
        calls_of_a_run(tmp_path, monkeypatch, "--device", device, "--precision", "float32",
                       "--out", tmp_path / device, steps=20)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), abs=2e-2)

@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_cuda_records_learns_and_resumes(precision, tmp_path, monkeypatch):
    flags = ["--arch", "mobilenetv3_small", "--epochs", 4, "--precision", precision, "--device",
             "cuda", "--knn-every", 2, "--save-every", 0.005, "--out"]
    run(*flags, tmp_path / "whole")
    log, expected = read_log(tmp_path / "whole"), losses(tmp_path / "whole")
    assert log[-1]["instance_accuracy"] > 3 and math.isfinite(log[-1]["loss"])
    run("--out", tmp_path / "whole", "--device", "cuda", "--resume")
    assert read_log(tmp_path / "whole") == log
    with monkeypatch.context() as m:
        m.setattr(pretrain, "monitor", lambda *args: 1 / 0)  # ends in the middle
        with pytest.raises(ZeroDivisionError):
            run(*flags, tmp_path / "parts")
    run("--out", tmp_path / "parts", "--device", "cuda", "--resume")
    assert losses(tmp_path / "parts") == pytest.approx(expected, abs=0.1)
    monkeypatch.setattr(pretrain, "Recorded", lambda take_step, *_: take_step)
    run(*flags, tmp_path / "usual")
    assert losses(tmp_path / "usual") == pytest.approx(expected, abs=0.1)

# --------------------------------------------------------------------------------------- README.md

def test_the_readme_names_what_is_there():
    text = (HERE / "README.md").read_text()
    scripts = ("pretrain.py", "linear_eval.py", "analyze.py", "data.py", "models.py")
    source = {name: (HERE / name).read_text() for name in scripts}
    torchrun = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--help"}
    flags = set(re.findall(r"(--[a-z][a-z-]+)", text)) - torchrun
    assert len(flags) > 20
    assert not [flag for flag in flags if f'"{flag}"' not in "".join(source.values())]
    names = re.findall(r"`(\w+)\.py`:\s+((?:`\w+`(?:,\s+)?)+)", text)
    assert len(names) == 2
    for module, listed in names:
        for name in re.findall(r"`(\w+)`", listed):
            assert re.search(rf"^ *(def|class) {name}\b", source[f"{module}.py"], re.M), name
    for file in re.findall(r"\]\((assets/.*?)\)|src=\"(assets/.*?)\"", text):
        assert (HERE / "".join(file)).is_file()
    for name, lines in re.findall(r"\| (\w+\.py) \| ([\d,]+) \|", text):
        written = len((HERE / name).read_text().splitlines())
        assert int(lines.replace(",", "")) == written, name
