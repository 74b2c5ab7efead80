"""python -m pytest test_smoke.py: every formula against something independent of it, every script end to end.

Nothing is downloaded; images, checkpoints and process groups are made here, small.
"""
import copy
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import analyze
import data
import linear_eval
import models
import pretrain
from data import InputError

HERE = Path(__file__).parent
TORCHVISION = {"resnet18": "resnet18", "resnet34": "resnet34", "resnet50": "resnet50", "mobilenetv3": "mobilenet_v3_large",
               "mobilenetv3_small": "mobilenet_v3_small", "efficientnet_b0": "efficientnet_b0", "efficientnet_b1": "efficientnet_b1"}

LONG = pytest.mark.skipif(not os.environ.get("LONG"), reason="takes minutes; LONG=1 runs it")


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1).to(dtype)


# --------------------------------------------------------------------------------------------------------- models.py

def theirs(arch):
    """torchvision's network in double precision, its last Linear and its dropout taken out."""
    net = getattr(torchvision.models, TORCHVISION[arch])(**{"stochastic_depth_prob": 0} if "efficient" in arch else {})
    if arch.startswith("resnet"):
        net.fc = torch.nn.Identity()
    else:
        net.classifier = net.classifier[:2] if arch.startswith("mobile") else torch.nn.Identity()
    return net.double()


@pytest.mark.parametrize("arch", TORCHVISION)
def test_network_is_torchvisions(arch):
    torch.manual_seed(0)
    ref, net = theirs(arch), models.build(arch, "imagenet").double()
    for m in ref.modules():  # statistics and affine parameters that matter
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(m.weight, 0.5, 1.5), torch.nn.init.normal_(m.bias, 0, 0.1)
    assert [(k, v.shape) for k, v in net.state_dict().items()] == [(k, v.shape) for k, v in ref.state_dict().items()]
    net.load_state_dict(ref.state_dict())
    for mode in (False, True):
        ref.train(mode), net.train(mode)
        x, y = rand(4, 3, 64, 64).requires_grad_(), rand(4, 3, 64, 64).requires_grad_()
        a, b = ref(x), net(y)
        assert b.shape == (4, net.dim)
        assert (a - b).abs().max() <= 1e-9 * a.abs().max()
        a.pow(2).sum().backward(), b.pow(2).sum().backward()
        assert (x.grad - y.grad).norm() <= 1e-7 * x.grad.norm()
        for (name, p), q in zip(ref.named_parameters(), net.parameters()):
            assert (p.grad - q.grad).norm() <= 1e-7 * p.grad.norm() + 1e-12, name
            p.grad = q.grad = None


@pytest.mark.parametrize("groups", [1, 6])
def test_convolutions_of_tiny_maps_are_torchs(groups):
    for h, k, s in itertools.product((1, 2, 3, 4), (3, 5), (1, 2)):
        conv, x = models.Conv2d(6, 6, k, s, k // 2, groups=groups, bias=groups == 1).double(), rand(5, 6, h, h).requires_grad_()
        ours, torchs = conv(x), F.conv2d(x, conv.weight, conv.bias, s, k // 2, groups=groups)
        weight = rand(*torchs.shape, seed=1)
        for a, b in zip(*(torch.autograd.grad((y * weight).sum(), [x, *conv.parameters()]) for y in (ours, torchs))):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), (h, k, s)
        assert torch.allclose(ours, torchs, rtol=1e-10)
        with torch.autocast("cpu", torch.bfloat16):
            conv.float()(x.float()).float().sum().backward()
        assert conv.weight.grad.dtype == torch.float32 and conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("arch", TORCHVISION)
def test_weights_load_into_torchvision(arch):
    ref = getattr(torchvision.models, TORCHVISION[arch])(num_classes=7)
    missing, unexpected = ref.load_state_dict(models.build(arch).state_dict(), strict=False)
    last = {"resnet": "fc", "mobile": "classifier.3", "effici": "classifier.1"}[arch[:6]]
    assert missing == [f"{last}.weight", f"{last}.bias"] and not unexpected


def test_small_stem_keeps_resolution():
    for arch, inner in (("resnet18", lambda n: n.layer4), ("mobilenetv3", lambda n: n.features), ("efficientnet_b0", lambda n: n.features)):
        sides = {}
        for stem in ("imagenet", "small"):
            net, shape = models.build(arch, stem).eval(), []
            inner(net).register_forward_hook(lambda m, i, o, shape=shape: shape.append(o.shape[-1]))
            assert net(torch.zeros(1, 3, 32, 32)).shape == (1, net.dim)
            sides[stem] = shape[0]
        assert sides["imagenet"] == 1 and sides["small"] == (4 if arch == "resnet18" else 2)
    assert models.build("resnet18", size=64).conv1.kernel_size == (3, 3) and models.build("resnet18", size=96).conv1.kernel_size == (7, 7)


def test_heads():
    widths = {"linear": [16, 8], "simple": [16, 16, 8], "wide": [16, 32, 8], "deep": [16, 16, 16, 8], "dropout": [16, 16, 8], "40": [16, 40, 8]}
    for kind, expected in widths.items():
        linear = [m for m in models.make_head(kind, 16, 8) if isinstance(m, torch.nn.Linear)]
        assert [linear[0].in_features] + [m.out_features for m in linear] == expected
        assert isinstance(models.make_head(kind, 16, 8)[-1], torch.nn.Linear)
    assert models.make_head("dropout", 16, 8)[2].p == 0.5
    with pytest.raises(InputError, match="--head"):
        models.make_head("nothing", 16)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv3_small"])
def test_read_backbone_formats(arch, tmp_path):
    net, file = models.build(arch, "imagenet"), tmp_path / "c.pt"
    weights, tv = net.state_dict(), getattr(torchvision.models, TORCHVISION[arch])()
    tv.load_state_dict(weights, strict=False)
    last, head = ("fc", {"fc.0.weight": torch.ones(2, 2)}) if arch == "resnet18" else ("classifier.3", {"classifier.4.weight": torch.ones(2)})
    other = {k: v + 1 for k, v in weights.items()}
    for content, dropped in [
        (tv.state_dict(), [f"{last}.weight", f"{last}.bias"]),
        (weights, []),
        ({"epoch": 3, "state_dict": {**{f"module.encoder_k.{k}": v for k, v in other.items()}, "module.queue": torch.ones(2),
                                     **{f"module.encoder_q.{k}": v for k, v in (weights | head).items()}}}, ["module.queue", f"module.encoder_q.{next(iter(head))}"]),
        ({"state_dict": {f"encoder_q.{k}": v for k, v in weights.items()}}, []),
        ({"state_dict": {f"module.student.{k}": v for k, v in weights.items()}}, []),
        ({"model": {f"encoder_q.backbone.{k}": v for k, v in weights.items()} | {"queue": torch.ones(2)}, "step": 3}, ["queue"]),
    ]:
        torch.save(content, file)
        state, info = models.read_backbone(file)
        assert info["arch"] == arch and state.keys() == weights.keys()
        assert all(torch.equal(state[k], weights[k]) for k in weights)
        assert set(dropped) <= set(info["dropped"]) and not set(info["dropped"]) & {f"module.encoder_q.{k}" for k in weights}
    with pytest.raises(InputError, match="name the right --arch"):
        models.read_backbone(file, "efficientnet_b0")


def test_a_checkpoint_is_read_as_the_largest_network_that_fits(tmp_path):
    for arch, part in (("resnet34", "resnet18"), ("efficientnet_b1", "efficientnet_b0"), ("mobilenetv3", None)):
        torch.save(getattr(torchvision.models, TORCHVISION[arch])().state_dict(), tmp_path / "c.pt")
        assert models.read_backbone(tmp_path / "c.pt")[1]["arch"].startswith(arch) and models.read_backbone(tmp_path / "c.pt", arch)[1]["arch"] == arch
        if part:  # its tensors are all there
            with pytest.raises(InputError, match=f"those of {arch}, not of {part}"):
                models.read_backbone(tmp_path / "c.pt", part)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_hostile_and_broken_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Attack()}, "hostile.pt")
    Path("text.pt").write_text("<html>not found</html>")
    torch.save(models.build("resnet18").state_dict(), "whole.pt")
    Path("torn.pt").write_bytes(Path("whole.pt").read_bytes()[:100_000])
    Path("empty.pt").touch()
    torch.save({"lr": 0.1}, "other.pt")
    for name in ("hostile", "text", "torn", "empty", "other", "missing"):
        with pytest.raises(InputError, match=name) as error:
            models.read_backbone(f"{name}.pt")
        assert "\n" not in str(error.value)
    assert not Path("attacked").exists()
    torch.load("hostile.pt", weights_only=False)  # the attack is real
    assert Path("attacked").exists()


# ----------------------------------------------------------------------------------------------------------- data.py

def plain_u(n=1):
    """Uniforms that leave an image as it is: no flip, jitter, grayscale or blur."""
    return torch.full((n, data.COLUMNS), 0.999)


def normalize(x):
    return TF.normalize(x, data.MEAN, data.STD)


def photo(h, w, seed=0):
    """A smooth random picture (3, h, w) uint8 away from black and white, so that nothing clips."""
    x = F.interpolate(rand(1, 3, 6, 6, seed=seed, dtype=torch.float32), (h, w), mode="bicubic", align_corners=False)[0]
    return (70 + 90 * x.clamp(0, 1)).round().byte()


def test_resampling_is_torchs_antialiased_crop():
    image = photo(50, 70)
    for top, left, h, w in ((0, 0, 50, 70), (3, 10, 40, 33), (20, 5, 9, 12), (49, 69, 1, 1)):
        box = torch.tensor([[top, left, h, w]], dtype=torch.float32)
        rows, columns = data.resampling(box[:, 0], box[:, 2], 50, 24), data.resampling(box[:, 1], box[:, 3], 70, 24)
        ours = rows @ image.float() @ columns.mT
        assert (ours - TF.resized_crop(image.float(), top, left, h, w, [24, 24], antialias=True)).abs().max() < 0.02
        flipped = rows @ image.float() @ data.resampling(box[:, 1], box[:, 3], 70, 24, flip=torch.tensor([True])).mT
        assert torch.allclose(flipped, ours.flip(-1), atol=1e-3)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_is_torchvisions(sigma):
    image, zero, side = photo(48, 48).float(), torch.zeros(1), torch.full((1,), 48.0)
    blur = data.resampling(zero, side, 48, 48, sigma=torch.tensor([sigma]))
    assert torch.allclose(blur.sum(2), torch.ones(1, 48))
    inside = slice(13, -13)  # torchvision reflects at the border
    difference = blur @ image @ blur.mT - TF.gaussian_blur(image, [25, 25], [sigma, sigma])
    assert difference[:, inside, inside].abs().max() < 0.01


def test_color_is_torchvisions():
    image = photo(32, 32)
    x, mean = image.float().flatten(1), image.float().mean((1, 2))[:, None]

    def ours(**factors):
        given = dict(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0) | factors
        on_pixel, on_mean = data.color_matrix(**{k: torch.tensor([v]) for k, v in given.items()})
        return (on_pixel[0] @ x + on_mean[0] @ mean).view(3, 32, 32) / 255

    reference = image.float() / 255
    for f in (0.6, 1.0, 1.3):
        assert torch.allclose(ours(brightness=f), TF.adjust_brightness(reference, f), atol=2e-3)
        assert torch.allclose(ours(contrast=f), TF.adjust_contrast(reference, f), atol=2e-3)
        assert torch.allclose(ours(saturation=f), TF.adjust_saturation(reference, f), atol=2e-3)
    assert torch.allclose(ours(saturation=0.0), TF.rgb_to_grayscale(reference, 3), atol=2e-3)
    all_four = ours(brightness=1.1, contrast=0.8, saturation=0.7)  # and in any order
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        y = reference
        for i in order:
            y = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[i](y, (1.1, 0.8, 0.7)[i])
        assert torch.allclose(all_four, y, atol=4e-3)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    turned = ours(hue=0.2)
    assert torch.allclose((turned * luma).sum(0), (reference * luma).sum(0), atol=1e-3) and not torch.allclose(turned, reference, atol=0.05)
    assert torch.allclose(ours(hue=1.0), reference, atol=1e-4)  # a whole turn is none


def test_augment_joins_its_parts():
    images = torch.stack([photo(40, 40, seed=i) for i in range(3)])
    still = data.augment(images, plain_u(3), 40, crop=None)
    assert torch.allclose(still, normalize(images / 255), atol=1e-4) and still.is_contiguous(memory_format=torch.channels_last)
    u = rand(3, data.COLUMNS, seed=1, dtype=torch.float32)
    u[:, 22], u[:, 23], u[:, 28], u[:, 29] = 0.1, 0.1, 0.99, 0.1  # flip, jitter, no grayscale, blur
    ours = data.augment(images, u, 24, crop=(0.2, 1), hue=0)
    for i, (top, left, h, w) in enumerate(data.crop_boxes(u, 40, 40, (0.2, 1)).int().tolist()):
        y = TF.hflip(TF.resized_crop(images[i] / 255, top, left, h, w, [24, 24], antialias=True))
        for adjust, v in zip((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation), u[i, 24:27].tolist()):
            y = adjust(y, 0.6 + 0.8 * v)
        sigma = (0.1 + 1.9 * u[i, 30].item()) * 24 / 224
        assert (ours[i] - normalize(TF.gaussian_blur(y, [9, 9], [sigma, sigma])))[:, 2:-2, 2:-2].abs().max() < 0.05
    gray = plain_u(3)
    gray[:, 28] = 0
    assert data.augment(images, gray, 40, crop=None).mul(torch.tensor(data.STD)[:, None, None]).add(
        torch.tensor(data.MEAN)[:, None, None]).std(1).max() < 1e-4


def test_crop_boxes_are_torchvisions():
    def one(u, height, width, scale):  # RandomResizedCrop.get_params, with the same uniforms
        for area, ratio in zip(u[:10], u[10:20]):
            target = height * width * (scale[0] + (scale[1] - scale[0]) * area)
            aspect = math.exp((2 * ratio - 1) * math.log(4 / 3))
            w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
        w, h = width, height
        if width / height < 3 / 4:
            h = round(width / (3 / 4))
        elif width / height > 4 / 3:
            w = round(height * (4 / 3))
        return (height - h) // 2, (width - w) // 2, h, w

    u = rand(200, data.COLUMNS, dtype=torch.float32)
    for height, width in ((32, 32), (100, 40), (10, 400), (1, 1)):
        expected = [one(row, height, width, (0.2, 1)) for row in u.tolist()]
        ours = data.crop_boxes(u, height, width, (0.2, 1)).int().tolist()
        assert sum(tuple(a) != b for a, b in zip(ours, expected)) <= 2  # rounding of a half may differ in float32


def test_hide_and_seek():
    x, cells = torch.ones(4, 3, 32, 32), rand(4, 16, 16, dtype=torch.float32)
    hidden = data.hide_and_seek(x, torch.tensor([0.1, 0.3, 0.6, 0.9]), cells)[:, 0] == 0
    for i, cell in enumerate((2, 4, 8)):
        blocks = hidden[i].unfold(0, cell, cell).unfold(1, cell, cell).float().mean((2, 3))
        assert set(blocks.unique().tolist()) == {0.0, 1.0}  # whole cells
        assert torch.equal(blocks.bool(), cells[i, :32 // cell, :32 // cell] < 0.5)
    assert not hidden[3].any()


def test_schedule_and_views_are_functions_of_the_seed():
    steps = [data.schedule(50, 8, 3, step) for step in range(6)]
    rows = torch.cat([s[0] for s in steps])
    assert len(set(rows.tolist())) == 48 and not torch.equal(rows[:8], data.schedule(50, 8, 4, 0)[0])
    assert all(torch.equal(s[2].sort()[0], torch.arange(8)) for s in steps)
    again = data.schedule(50, 8, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(steps[5], again)) and not torch.equal(steps[4][1], steps[5][1])
    images = torch.stack([photo(16, 16, seed=i) for i in range(8)])
    assert torch.equal(data.augment(images, again[1][0], 16), data.augment(images, steps[5][1][0], 16))


def test_fractals():
    (a, labels), (b, _), (c, _) = (data.fractals(128, seed) for seed in (0, 0, 1))
    assert a.shape == (128, 32, 32, 3) and a.dtype == np.uint8 and (a == b).all() and (a != c).any()
    assert np.bincount(labels).tolist() == [2] * 64 and a.std((1, 2, 3)).min() > 5


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    rgb = photo(24, 24).permute(1, 2, 0).numpy()
    picture, white = Image.fromarray(rgb), np.full((24, 24), 255, np.uint8)
    gray = np.asarray(picture.convert("L"))
    half = Image.fromarray(np.dstack([rgb, np.where(np.arange(24) < 12, 255, 0).astype(np.uint8) + 0 * white]))
    on_white = np.where(np.arange(24)[None, :, None] < 12, rgb, 255)
    kinds = {"rgb.png": (picture, rgb), "gray.png": (picture.convert("L"), gray[..., None]), "bits16.png": (Image.fromarray(gray.astype(np.uint16) * 257), gray[..., None]),
             "bits32.tif": (Image.fromarray(gray.astype(np.int32) * 257), gray[..., None]), "float.tif": (Image.fromarray(gray.astype(np.float32) / 255), gray[..., None]),
             "alpha.png": (half, on_white), "palette.png": (picture.quantize(256), rgb), "cmyk.tif": (picture.convert("CMYK"), rgb), "bilevel.png": (Image.fromarray(white).convert("1"), white[..., None])}
    for name, (image, expected) in kinds.items():
        image.save(tmp_path / name)
        found = data.decode(tmp_path / name, (24, None, None))[0][0].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - expected).mean() < 4, name
    for orientation, undo in {1: lambda x: x, 3: lambda x: x[::-1, ::-1], 6: lambda x: np.rot90(x, -1), 8: np.rot90, 2: lambda x: x[:, ::-1], 5: lambda x: x.transpose(1, 0, 2)}.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(tmp_path / "turned.png", exif=exif)
        found = data.decode(tmp_path / "turned.png", (24, None, None))[0][0].permute(1, 2, 0).numpy()
        assert (found == undo(rgb)).all(), orientation
    big = Image.fromarray(photo(400, 600).permute(1, 2, 0).numpy())
    big.save(tmp_path / "big.jpg", quality=95)
    u = rand(5, 22, seed=4, dtype=torch.float32)
    crops, boxes = data.decode(tmp_path / "big.jpg", (32, u, (0.2, 1)))[0], data.crop_boxes(u, 400, 600, (0.2, 1)).tolist()
    for crop, (y, x, h, w) in zip(crops, boxes):  # decoded at reduced scale, still the same crop
        expected = np.asarray(big.resize((32, 32), Image.BILINEAR, (x, y, x + w, y + h))).astype(int)
        assert np.abs(crop.permute(1, 2, 0).numpy() - expected).mean() < 3


def make_folder(folder, classes=("a", "b c", "ü"), per=8, side=32, seed=0):
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(per):
            Image.fromarray(photo(side, side + 4 * j, seed=seed + 100 * i + j).permute(1, 2, 0).numpy()).save(folder / name / f"{j} é.jpg")


def test_folders(tmp_path, capsys):
    make_folder(tmp_path / "split/train"), make_folder(tmp_path / "split/test", per=2, seed=50)
    make_folder(tmp_path / "classes", per=10), make_folder(tmp_path / "flat", classes=(".",))
    make_folder(tmp_path / "nested/deep/er", classes=("x",))
    bad = tmp_path / "split/train/a"
    (bad / "html.jpg").write_text("<html>"), (bad / "zero.png").touch(), (bad / "notes.txt").write_text("hello")
    (bad / "torn.jpg").write_bytes((bad / "7 é.jpg").read_bytes()[:300])
    for stream in ("off", "on"):
        def load(name):
            return data.load(str(tmp_path / name), stream=stream)
        train, test, size = load("split")
        assert size == 32 and len(test) == 6 and train.classes == ["a", "b c", "ü"] and len(train) == (24 if stream == "off" else 27)
        assert [len(part) for part in load("classes")[:2]] == [27, 3]
        for name in ("flat", "nested"):
            train, test, _ = load(name)
            assert len(train) == 8 and test is None and (train.labels == -1).all()
    assert capsys.readouterr().out.count("skipped 3 unreadable files") == 1
    (tmp_path / "none").mkdir(), (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("hello")
    for name in ("none", "text", "missing"):
        with pytest.raises(InputError, match=name):
            data.load(str(tmp_path / name))


def test_torchvisions_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)  # so few images have another checksum
    monkeypatch.setattr(torchvision.datasets.stl10, "check_integrity", lambda *_: True)
    pixels, names = (rand(4, 3, 32, 32) * 255).byte().numpy(), [f"kind {i}" for i in range(10)]
    parts = {f"cifar-10-batches-py/data_batch_{i}": ("labels", slice(i % 4, i % 4 + 1)) for i in range(1, 6)} | {
        "cifar-10-batches-py/test_batch": ("labels", slice(4)), "cifar-100-python/train": ("fine_labels", slice(1, 4)), "cifar-100-python/test": ("fine_labels", slice(4))}
    for file, (key, rows) in parts.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(pickle.dumps({"data": pixels[rows].reshape(-1, 3072), key: [3, 1, 4, 1][rows]}))
    (tmp_path / "cifar-10-batches-py/batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    (tmp_path / "cifar-100-python/meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    (tmp_path / "stl10_binary").mkdir()
    big = (rand(4, 3, 96, 96) * 255).byte().numpy()
    for part, rows in {"train": slice(1, 4), "unlabeled": slice(2), "test": slice(4)}.items():
        big[rows].transpose(0, 1, 3, 2).tofile(tmp_path / f"stl10_binary/{part}_X.bin")  # columns first, classes from one
        np.array([4, 2, 5, 2], np.uint8)[rows].tofile(tmp_path / f"stl10_binary/{part}_y.bin")
    (tmp_path / "stl10_binary/class_names.txt").write_text("\n".join(names))
    for name, source, rows, labels in (("cifar10", pixels, [1, 2, 3, 0, 1], [1, 4, 1, 3, 1]), ("cifar100", pixels, [1, 2, 3], [1, 4, 1]),
                                       ("stl10", big, [1, 2, 3, 0, 1], [1, 4, 1, -1, -1])):
        train, test, size = data.load(name, tmp_path)
        assert size == source.shape[-1] and train.classes == names and train.labels.tolist() == labels and test.labels.tolist() == [3, 1, 4, 1]
        assert torch.equal(train.pixels, torch.from_numpy(source[rows])) and torch.equal(test.pixels, torch.from_numpy(source))


def test_streamed_views_are_the_resident_ones(tmp_path):
    make_folder(tmp_path / "train", side=32, per=4)
    for file in (tmp_path / "train").rglob("*.jpg"):  # square and without loss: both ways cut the same pixels
        Image.open(file).crop((0, 0, 32, 32)).save(file.with_suffix(".png")), file.unlink()
    views = {}
    for stream in ("on", "off"):
        args = pretrain.parse(["--batch", "6", "--workers", "2", "--size", "32", "--symmetric", "--local-crops", "3", "--local-size", "16"])
        images = data.load(str(tmp_path), stream=stream, size=32)[0]
        views[stream] = list(pretrain.batches(images, args, range(3), torch.device("cpu"), 0, 1))
    for a, b in zip(views["on"], views["off"]):
        for x, y in zip((*a[:2], a[3]), (*b[:2], b[3])):
            assert (x - y).abs().mean() < 0.02  # bytes are rounded once more
        assert torch.equal(a[2], b[2])


# ------------------------------------------------------------------------------------------------------- pretrain.py

def plain_info_nce(q, k, queue, temperature):
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction="none"), logits.argmax(1) == 0


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.2, 1.0])
@pytest.mark.parametrize("N,C,K", [(1, 32, 1), (3, 128, 7), (64, 128, 4096), (300, 256, 1021), (37, 32, 70000), (256, 128, 5003)])
def test_info_nce_is_the_plain_formula(N, C, K, temperature):
    k, queue = unit(N, C, seed=1), unit(K, C, seed=2)
    q = F.normalize(k + unit(N, C, seed=3) * torch.linspace(0.2, 3, N, dtype=torch.float64)[:, None], dim=1)
    queue[:: max(1, K // 50)] = F.normalize(q[:1] + 0.5 * queue[:: max(1, K // 50)], dim=1)  # some hard negatives
    q, k, queue = q.float().double(), k.float().double(), queue.float().double()
    reference = q.clone().requires_grad_()
    expected, hits = plain_info_nce(reference, k, queue, temperature)
    expected.sum().backward()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        x, key, memory = (v.to(dtype).clone().requires_grad_() for v in (q, k, queue))
        loss, found = pretrain.info_nce(x, key, memory, temperature)
        loss.sum().backward()
        assert loss.shape == found.shape == (N,) and torch.equal(found, hits) and key.grad is None and memory.grad is None
        assert (loss - expected).abs().max() <= 10 * tolerance * (1 + expected.abs().max())
        assert (x.grad - reference.grad).norm() <= tolerance * reference.grad.norm()


def test_info_nce_gradcheck():
    q, k, queue = unit(5, 16, seed=1).requires_grad_(), unit(5, 16, seed=2), unit(33, 16, seed=3)
    assert torch.autograd.gradcheck(lambda q: pretrain.info_nce(q, k, queue, 0.2)[0], q, check_forward_ad=True)


def test_info_nce_never_holds_the_logits():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            Largest.size = max([Largest.size] + [t.numel() for t in torch.utils._pytree.tree_leaves(out)
                                                 if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != queue.untyped_storage().data_ptr()])
            return out

    q, k, queue = unit(256, 64, dtype=torch.float32).requires_grad_(), unit(256, 64, dtype=torch.float32), unit(65536, 64, dtype=torch.float32)
    with Largest():
        pretrain.info_nce(q, k, queue, 0.1)[0].sum().backward()
    assert 0 < Largest.size <= 256 * 65536 // 32


def test_training_with_the_plain_formula_is_the_same(tmp_path, monkeypatch):
    make_folder(tmp_path / "flat", classes=(".",), per=20)
    monkeypatch.setitem(models.ARCHS, "plain", NoBatchNorm)  # statistics of so small a batch would amplify rounding
    curves = []
    for name, formula in (("fused", pretrain.info_nce), ("plain", plain_info_nce)):
        seen = []

        def record(*args, formula=formula, seen=seen):
            loss, hits = formula(*args[:4])
            seen.append(loss.mean().item())
            return loss, hits

        monkeypatch.setattr(pretrain, "info_nce", record)
        run("--data", tmp_path / "flat", "--out", tmp_path / name, *SMALL, "--arch", "plain", "--steps", 50, "--lr", 0.05)
        curves.append(seen)
    assert len(set(curves[0])) == 50 and curves[0] == pytest.approx(curves[1], abs=1e-4)


def log_softmax_of(q, k, queue, temperature):
    """log p (N, 1 + K) of [k, queue] under the queries."""
    return (torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature).log_softmax(1)


def test_soft_targets_are_the_plain_cross_entropy():
    q, k, queue = unit(7, 16, seed=1), unit(7, 16, seed=2), unit(9000, 16, seed=3)  # more than two blocks of the top-k
    smooth = torch.zeros(7, 9001, dtype=torch.float64).scatter_(1, 1 + (q @ queue.T).topk(5).indices, 0.3 / 5)
    smooth[:, 0] = 0.7
    teacher = log_softmax_of(k, k, queue, 0.05).exp()
    for target, soft in ((pretrain.smooth_target(q, k, queue, 0.3, 5), smooth), (pretrain.teacher_target(k, queue, 0.05), teacher)):
        a, b = q.clone().requires_grad_(), q.clone().requires_grad_()
        loss = pretrain.info_nce(a, k, queue, 0.2, target)[0]
        plain = -(soft * log_softmax_of(b, k, queue, 0.2)).sum(1)
        loss.sum().backward(), plain.sum().backward()
        assert torch.allclose(loss, plain, rtol=1e-10) and torch.allclose(a.grad, b.grad, rtol=1e-8, atol=1e-12)
    assert torch.autograd.gradcheck(lambda q: pretrain.info_nce(q, k, queue[:50], 0.2, k.roll(1, 0))[0], q.clone().requires_grad_())


def techniques(tmp_path, monkeypatch, *flags, steps=1):
    """What a run of few steps gave: its networks and queue, and what info_nce was called with."""
    monkeypatch.setitem(models.ARCHS, "plain", NoBatchNorm)
    calls, formula = [], pretrain.info_nce

    def record(*args):
        calls.append([a.detach().clone() if torch.is_tensor(a) else a for a in args])
        return formula(*args)

    monkeypatch.setattr(pretrain, "info_nce", record)
    if not (tmp_path / "flat").is_dir():
        make_folder(tmp_path / "flat", classes=(".",), per=40)
    moco = run("--data", tmp_path / "flat", "--out", tmp_path / f"run{len(list(tmp_path.iterdir()))}", *SMALL, "--queue", 24, "--arch", "plain", "--head", "linear", "--steps", steps, "--lr", 0.1, *flags)
    monkeypatch.setattr(pretrain, "info_nce", formula)
    return moco, calls


def test_techniques_that_are_off_change_no_bit_and_on_change_the_formula(tmp_path, monkeypatch):
    plain, calls = techniques(tmp_path, monkeypatch)
    off, _ = techniques(tmp_path, monkeypatch, "--smooth", 0, "--local-crops", 0, "--momentum-end", 0.8, "--recipe", "moco-v2")
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), off.state_dict().values()))
    (q, k, queue, temperature, target), = calls
    assert len(q) == 8 and target is None and temperature == 0.2

    _, ((q2, k2, queue2, _, _),) = techniques(tmp_path, monkeypatch, "--symmetric")
    assert torch.equal(q2[:8], q) and torch.equal(k2[:8], k) and torch.equal(queue2, queue)
    # before the first update both encoders are one: the second eight queries are the first keys, and the other way round
    assert torch.allclose(q2[8:], k2[:8], atol=1e-6) and torch.allclose(k2[8:], q2[:8], atol=1e-6)

    _, ((q3, k3, _, _, _),) = techniques(tmp_path, monkeypatch, "--local-crops", 2, "--local-size", 32)
    assert torch.equal(q3[:8], q) and len(q3) == 24 and torch.equal(k3, k.repeat(3, 1)) and not torch.allclose(q3[8:16], q3[16:])

    _, ((_, _, _, _, target),) = techniques(tmp_path, monkeypatch, "--smooth", 0.3, "--smooth-k", 2)
    assert torch.equal(target, pretrain.smooth_target(q, k, queue, 0.3, 2))

    ema = techniques(tmp_path, monkeypatch, "--momentum", 0.5, "--momentum-end", 1, steps=2)[0]
    assert ema.momentum == pytest.approx(1 - 0.5 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_a_teacher_starts_the_run(tmp_path, monkeypatch, capsys):
    techniques(tmp_path, monkeypatch, "--out", tmp_path / "teacher", "--steps", 3)
    teacher = ["--teacher", tmp_path / "teacher", "--teacher-epochs", 1]
    _, calls = techniques(tmp_path, monkeypatch, *teacher, steps=7)  # five steps are an epoch
    net = pretrain.Encoder(*models.read_teacher(tmp_path / "teacher", "plain"))
    images = data.load(str(tmp_path / "flat"), size=32)[0]
    for step, (q, z, queue, temperature, target) in enumerate(calls):
        assert (target is None) == (step >= 5)
        if step < 5:
            rows, u, _ = data.schedule(40, 8, 0, step)
            assert torch.allclose(z, net(data.augment(images.pixels[rows], u[0], 32)), atol=1e-5)
            p = log_softmax_of(z.double(), z.double(), queue.double(), 0.01).exp()
            assert torch.allclose(target.double(), p[:, :1] * z + p[:, 1:] @ queue.double(), atol=1e-4)
    queue = calls[5][2]
    assert not torch.isclose(queue[:, None], calls[4][1][None], atol=1e-6).all(2).any()  # no teacher's embedding is left
    with pytest.raises(InputError, match="give --dim 128"):
        techniques(tmp_path, monkeypatch, *teacher, "--dim", 64)
    torch.save({"state_dict": {f"module.encoder_q.{k}": v for k, v in models.build("resnet18", "imagenet").state_dict().items()} | {
        "module.encoder_q.fc.0.weight": torch.ones(6, 512), "module.encoder_q.fc.0.bias": torch.ones(6),
        "module.encoder_q.fc.2.weight": torch.ones(4, 6), "module.encoder_q.fc.2.bias": torch.ones(4)}}, tmp_path / "moco.pt")
    backbone, head = models.read_teacher(tmp_path / "moco.pt")
    assert [tuple(p.shape) for p in head.parameters()] == [(6, 512), (6,), (4, 6), (4,)] and backbone.dim == 512


def test_recipes_are_flags(capsys):
    for name, flags in pretrain.RECIPES.items():
        args = pretrain.parse(["--recipe", name, "--temp", "0.3", "--size", "32"])
        assert all(getattr(args, key) == (0.3 if key == "temp" else value) for key, value in flags.items())
        pretrain.resolve(args, 1000)
        assert name == "moco-v2" or f"--recipe {name}: --" in capsys.readouterr().out


def tiny_moco(queue=10):
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return pretrain.MoCo(pretrain.Encoder(backbone, torch.nn.Linear(8, 4)), 4, queue, 0.9)


def test_momentum_update_and_queue():
    moco = tiny_moco(queue=10)
    old, buffers = copy.deepcopy(moco.encoder_k.state_dict()), [b.clone() for b in moco.encoder_k.buffers()]
    with torch.no_grad():
        [p.add_(1) for p in moco.encoder_q.parameters()], [b.add_(1) for b in moco.encoder_q.buffers()]
    moco.update_key_encoder()
    for name, p in moco.encoder_k.named_parameters():
        assert torch.allclose(p, 0.9 * old[name] + 0.1 * dict(moco.encoder_q.named_parameters())[name], atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(buffers, moco.encoder_k.buffers()))
    history = []
    for step in range(9):  # 10 is no multiple of 4: wraps around in the middle of a batch
        history += (new := unit(4, 4, seed=step, dtype=torch.float32))
        moco.enqueue(new, step)
        if len(history) >= 10:
            assert {tuple(r.tolist()) for r in moco.queue} == {tuple(r.tolist()) for r in history[-10:]}


def test_keys_are_normalized_in_shuffled_sub_batches_and_come_back_in_order():
    moco, x, perm = tiny_moco().train(), rand(8, 3, 9, 9, dtype=torch.float32), torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    expected = torch.empty(8, 4)
    for part in (perm[:4], perm[4:]):
        expected[part] = copy.deepcopy(moco.encoder_k)(x[part])
    assert torch.allclose(moco.keys(x[perm], perm, 2), expected, atol=1e-6)
    assert not torch.allclose(moco.keys(x[perm], perm, 1), expected, atol=1e-3)


def test_knn_and_ridge():
    x, y, t, z = unit(90, 5), torch.arange(90) % 3, unit(31, 5, seed=1), torch.arange(31) % 3
    x, t = x.float(), t.float()
    votes = [[sum(math.exp((t[i] @ x[j]).item() / 0.1) for j in sorted(range(90), key=lambda j: -(t[i] @ x[j]).item())[:7] if y[j] == c)
              for c in range(3)] for i in range(31)]
    expected = 100 * np.mean([int(np.argmax(v)) == c for v, c in zip(votes, z.tolist())])
    assert linear_eval.knn(3 * x, y, 2 * t, z, k=7) == pytest.approx(expected)
    centers = 4 * unit(3, 5, seed=5)
    near = [1e-10 * (c[y] + 3 * unit(len(y), 5, seed=6)) + 7e-10 for c, y in ((centers, y), (centers, z))]  # any scale
    ours = linear_eval.ridge(near[0].float(), y, near[1].float(), z)
    scaled = [(v - near[0].mean(0)) / near[0].std(0) for v in near]
    augmented = torch.cat([scaled[0], math.sqrt(0.1 * 90) * torch.eye(5, dtype=torch.float64)])  # the penalty as five more rows
    target = torch.cat([F.one_hot(y).double() - 1 / 3, torch.zeros(5, 3, dtype=torch.float64)])
    lstsq = (scaled[1] @ torch.linalg.lstsq(augmented, target).solution).argmax(1)
    assert abs(ours - 100 * (lstsq == z).double().mean().item()) <= 10 and ours > 60


def run(*argv):
    return pretrain.main([*map(str, argv)])


SMALL = ["--arch", "mobilenetv3_small", "--batch", 8, "--queue", 16, "--size", 32, "--workers", 2, "--stem", "imagenet"]


@pytest.mark.parametrize("stream", ["off", "on"])
def test_a_run_end_to_end(stream, tmp_path, capsys):
    make_folder(tmp_path / "images/train", per=9), make_folder(tmp_path / "images/test", per=2)
    common = ["--data", tmp_path / "images", "--stream", stream, "--epochs", 3, "--hide", "--head", "dropout", *SMALL]
    run(*common, "--out", tmp_path / "whole")
    printed = capsys.readouterr().out
    assert "The loss rises for the first 2 steps" in printed and "raw pixels" in printed and "picked for 27 images" in printed
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2, 3] and log[-1]["step"] == 9 and "knn" in log[-1]
    assert Image.open(tmp_path / "whole/views.png").size == (8 * 96, 3 * 96)
    state, info = models.read_backbone(tmp_path / "whole")
    assert (info["arch"], info["size"], info["stem"]) == ("mobilenetv3_small", 32, "imagenet")
    last = models.read_backbone(tmp_path / "whole/last.pt")[0]
    assert all(torch.equal(v, last[k]) for k, v in state.items())
    torchvision.models.mobilenet_v3_small().load_state_dict(torch.load(tmp_path / "whole/backbone.pt"), strict=False)
    with pytest.raises(InputError, match="--resume"):
        run(*common, "--out", tmp_path / "whole")


def test_runs_without_labels_and_from_a_checkpoint(tmp_path, capsys):
    make_folder(tmp_path / "flat", classes=(".",), per=20)
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "tv.pt")
    run("--data", tmp_path / "flat", "--init", tmp_path / "tv.pt", "--epochs", 1, "--out", tmp_path / "run", *SMALL)
    printed = capsys.readouterr().out
    assert "uniformity" in printed and "dropped 2 other" in printed and "uniformity" in json.loads((tmp_path / "run/log.jsonl").read_text())


def test_profile(tmp_path, capsys):
    make_folder(tmp_path / "flat", classes=(".",), per=20)
    run("--data", tmp_path / "flat", "--profile", 2, *SMALL)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"device", "arch", "size", "batch", "queue", "images_per_s", "peak_memory_mb", "data", "views", "keys",
            "query_forward", "loss", "backward", "update", "efficiency"} == found.keys()
    assert found["batch"] == 8 and found["images_per_s"] > 0 and 0.1 < found["efficiency"] < 2


@pytest.mark.parametrize("flags,message", [
    (["--arch", "vgg"], "--arch vgg"), (["--batch", 100], "--batch 100"), (["--batch", 0], "--batch 0"), (["--queue", 8], "--queue 8"), (["--queue", 500], "--queue 500"),
    (["--temp", 0], "--temp 0"), (["--bn-splits", 3], "--bn-splits 3"), (["--crop", 0.5, 0.2], "--crop"), (["--head", "tall"], "--head tall"),
    (["--init", "resnet.pt"], "resnet.pt"), (["--init", "hostile.pt"], "hostile.pt"), (["--init", "torn.pt"], "torn.pt"),
    (["--data", "empty"], "empty"), (["--data", "nowhere"], "nowhere"), (["--resume"], "--out"), (["--stem", "odd"], "--stem odd"),
    (["--smooth", 1], "--smooth 1"), (["--local-crops", -1], "--local-crops -1"), (["--local-scale", 0, 1], "--local-scale"), (["--teacher", "torn.pt"], "torn.pt")])
def test_bad_input_is_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images", per=10)
    Path("empty").mkdir()
    torch.save(models.build("resnet18").state_dict(), "resnet.pt"), torch.save({"state_dict": Attack()}, "hostile.pt")
    Path("torn.pt").write_bytes(Path("resnet.pt").read_bytes()[:5000])
    with pytest.raises(InputError, match=message.replace(".", r"\.")) as error:
        run("--data", "images", *SMALL, "--epochs", 1, *flags)
    assert "\n" not in str(error.value) and not Path("attacked").exists() and not Path("runs").exists()


def test_bad_input_ends_the_process_with_an_error(tmp_path):
    done = subprocess.run([sys.executable, HERE / "pretrain.py", "--data", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("pretrain.py: --data") and done.stderr.count("\n") == 1


def test_the_readme_names_what_is_there():
    text = (HERE / "README.md").read_text()
    links = re.findall(r"\[`(\w+\.)*(\w+)`\]\((\w+\.py)#L(\d+)\)", text)
    for _, name, file, line in links:
        assert re.match(rf"\s*(def|class) {name}\b", (HERE / file).read_text().splitlines()[int(line) - 1]), (file, name)
    source = "".join((HERE / file).read_text() for file in ("pretrain.py", "linear_eval.py", "analyze.py"))
    flags = set(re.findall(r"(--[a-z][a-z-]+)", text)) - {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts", "--help"}
    assert len(links) > 9 and len(flags) > 30 and not [flag for flag in flags if f'"{flag}"' not in source]
    assert all((HERE / picture).is_file() for picture in re.findall(r"\]\((assets/.*?)\)", text))


# ---------------------------------------------------------------------------------------------------- linear_eval.py

def evaluate(*argv):
    return linear_eval.main([*map(str, argv)])


def blobs(n, classes=5, width=12, spread=1.2, seed=0):
    """Features (n, width) around class centers, some columns large, small or constant, and labels."""
    y = torch.arange(n) % classes
    x = 3 * unit(classes, width, seed=99)[y] + spread * torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * torch.logspace(-3, 2, width, dtype=torch.float64) + 5 * torch.arange(width)).float(), y


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_fast_probe_is_the_converged_solution(penalty):
    x, y = blobs(400)
    scaled = F.pad(((x - x.mean(0)) / x.std(0, correction=0)).double(), (0, 1), value=1)
    W = torch.zeros(13, 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=2000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(scaled @ W, y) + penalty / 2 * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    features = linear_eval.Standardized(x, torch.device("cpu"))
    both = linear_eval.logistic(features, y, 5, [penalty, 10.0])  # together with another problem
    assert (both[0] - W).norm() < 2e-2 * W.norm() and both[1].norm() < 0.2 * W.norm()
    use = torch.arange(400) % 3 > 0
    part = linear_eval.logistic(linear_eval.Standardized(x, torch.device("cpu")), y, 5, [penalty], use=use)
    assert (part[0] - W).norm() > 1e-3 * W.norm()
    weight, bias = linear_eval.fast_probe(x, y, 5, torch.device("cpu"))  # for the features as they are
    right = (F.linear(*(v.double() for v in (x, weight, bias))).argmax(1) == y).double().mean()
    assert right >= ((scaled @ W).argmax(1) == y).double().mean() - 0.03


def test_held_out_part_and_label_subsets_are_balanced():
    y = torch.tensor([0] * 20 + [1] * 7 + [2] * 3 + [3])[torch.randperm(31, generator=torch.Generator().manual_seed(0))]
    assert y[linear_eval.held_out(y)].bincount(minlength=4).tolist() == [4, 1, 1, 0]
    labels = torch.cat([torch.arange(200) % 4, torch.full((9,), -1)])
    for wanted, per in (("0.1", 5), ("7", 7), ("0.001", 1)):
        rows = linear_eval.labelled_subset(labels, wanted, 0)
        assert labels[rows].bincount().tolist() == [per] * 4 and torch.equal(rows, linear_eval.labelled_subset(labels, wanted, 0))
    assert not torch.equal(linear_eval.labelled_subset(labels, "7", 1), linear_eval.labelled_subset(labels, "7", 0))
    for wanted in ("0", "1.5", "few", "-3"):
        with pytest.raises(InputError, match="--labels"):
            linear_eval.labelled_subset(labels, wanted, 0)


def test_measure_and_confusion():
    scores = torch.zeros(40, 7)
    y = torch.arange(40) % 4  # three classes have no image
    scores[torch.arange(40), y] = 1
    scores[:10, 6] = 2  # ten are wrong at first and right among the first five
    found = linear_eval.measure(scores, y)
    assert found["top1"] == 75 and found["top5"] == 100 and found["mean_per_class"] == pytest.approx(75, abs=1)
    assert (found["low"], found["high"]) == (pytest.approx(59.81, abs=0.02), pytest.approx(85.81, abs=0.02))  # Wilson's, from his formula
    table = linear_eval.confusion(scores, y)
    assert table.sum() == 40 and table[:, 6].tolist() == [3, 3, 2, 2, 0, 0, 0] and table.diag().sum() == 30


def test_features_in_a_file_are_the_features(tmp_path, capsys):
    make_folder(tmp_path / "train", per=20)
    images = data.load(str(tmp_path / "train"), stream="off")[0]
    net = models.build("mobilenetv3_small", "imagenet").eval()
    x, y = linear_eval.extract(net, images, 32, torch.device("cpu"))
    z, _ = linear_eval.extract(net, images, 32, torch.device("cpu"), memory=1e-6)
    assert z.dtype == torch.bfloat16 and torch.allclose(x, z.float(), rtol=1e-2, atol=0) and "kept in half precision" in capsys.readouterr().out
    assert torch.equal(y, images.labels) and len(x) == 54


def test_neighbours_are_the_nearest_also_in_blocks(monkeypatch):
    x, t = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)), torch.randn(1203, 6, generator=torch.Generator().manual_seed(1))
    distance, near = torch.cdist(t.double(), x.double()).square().topk(9, largest=False)
    split = torch.Tensor.split
    for block in (65536, 100, 7):
        monkeypatch.setattr(torch.Tensor, "split", lambda self, n, block=block: split(self, block if n == 65536 else n))
        ours = linear_eval.neighbours(x, t, 9)
        assert torch.equal(ours[1], near) and torch.allclose(ours[0].double(), distance, atol=1e-4)


def test_every_format_evaluates_the_same_and_the_classifier_is_torchvisions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images/train", per=12), make_folder(tmp_path / "images/test", per=5, seed=7)
    common = ["--data", "images", "--workers", 2, "--stem", "imagenet", "--size", 32]
    torch.manual_seed(0)
    weights = models.build("resnet18", "imagenet").state_dict()
    reference = torchvision.models.resnet18()
    reference.load_state_dict(weights, strict=False)
    Path("run").mkdir()
    torch.save(weights, "run/backbone.pt"), torch.save(reference.state_dict(), "tv.pt")
    torch.save({"model": {f"encoder_q.backbone.{k}": v for k, v in weights.items()}}, "last.pt")
    torch.save({"state_dict": {f"module.encoder_q.{k}": v for k, v in weights.items()} | {"module.encoder_q.fc.0.weight": torch.ones(2)}}, "moco.pt")
    torch.save({"state_dict": {f"module.student.{k}": v for k, v in weights.items()}}, "seed.pt")
    tables = [evaluate(name, *common, "--knn", "--out", f"out{i}") for i, name in enumerate(
        ["run", "run/backbone.pt", "tv.pt", "last.pt", "moco.pt", "seed.pt"])]
    tables.append(evaluate("random", "--arch", "resnet18", *common, "--knn", "--out", "random"))
    assert all(table == tables[0] for table in tables) and {"linear, fast", "kNN, k 20, T 0.1"} < tables[0].keys()
    result = json.loads(Path("out0/result.json").read_text())
    assert result["test_images"] == 15 and len(result["per_class"]) == 3 and len(result["most_confused"]) == 3
    assert result["table"]["linear, fast"]["top1"] == tables[0]["linear, fast"]["top1"]

    classifier = torchvision.models.resnet18(num_classes=3).eval()
    classifier.load_state_dict(torch.load("out0/classifier.pt"), strict=True)
    test = data.load("images")[1]
    guess = classifier(data.center(test.pixels, 32)).argmax(1)
    assert 100 * (guess == test.labels).float().mean().item() == pytest.approx(tables[0]["linear, fast"]["top1"])
    capsys.readouterr()
    evaluate("out0/classifier.pt", "--predict", *files_in(tmp_path / "images/test"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].rsplit(" ", 2)[0].split(",")[0].rsplit(" ", 2)[0] for line in lines] == [test.classes[i] for i in guess.tolist()]
    with pytest.raises(InputError, match="text.jpg"):
        Path("text.jpg").write_text("<html>")
        evaluate("out0/classifier.pt", "--predict", "text.jpg")
    with pytest.raises(InputError, match="no classifier"):
        evaluate("run/backbone.pt", "--predict", "text.jpg")


def files_in(folder):
    return [path for path, _ in data.scan(folder)]


@pytest.mark.parametrize("flags", [["--protocol", "moco", "--lr", 1], ["--finetune", "--lr", 0.01, "--labels", 12], ["--finetune", "--lr", 0.01, "--stream", "on"]])
def test_training_protocols_learn(flags, tmp_path):
    for i, name in enumerate(("dark", "light")):
        for part, n in (("train", 20), ("test", 6)):
            (tmp_path / part / name).mkdir(parents=True)
            for j in range(n):
                Image.fromarray((photo(32, 32, seed=100 * i + j + 50 * (part == "test")) // 2 + 90 * i).permute(1, 2, 0).numpy()).save(tmp_path / part / name / f"{j}.png")
    table = evaluate("random", "--arch", "resnet18", "--stem", "imagenet", "--data", tmp_path, "--workers", 2, "--batch", 8, "--epochs", 8, "--out", tmp_path / "out", *flags)
    assert next(reversed(table.values()))["top1"] > 80


@pytest.mark.parametrize("make,flags,message", [
    (dict(classes=(".",)), [], "no labels"), (dict(classes=("one",)), [], "two classes"), (dict(per=3), [], "no held-out image"),
    (dict(), ["--arch", "resnet18", "backbone.pt"], "--arch"), (dict(), ["missing.pt"], "missing.pt"), (dict(), ["--labels", "many"], "--labels"),
    (dict(), ["--stem", "small", "resnet.pt"], "--stem"), (dict(), ["--epochs", 0], "--epochs")])
def test_bad_input_to_an_evaluation_is_one_line(make, flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(Path("images"), **({"per": 10} | make))
    torch.save(models.build("mobilenetv3_small").state_dict(), "backbone.pt"), torch.save(models.build("resnet18", "imagenet").state_dict(), "resnet.pt")
    with pytest.raises(InputError, match=message) as error:
        evaluate(*([] if flags and str(flags[-1]).endswith(".pt") else ["random"]), "--data", "images", *flags)
    assert "\n" not in str(error.value) and not Path("runs").exists()


def test_classes_must_be_in_training(tmp_path):
    make_folder(tmp_path / "a/train"), make_folder(tmp_path / "a/test", classes=("a", "zebra"))
    make_folder(tmp_path / "b", classes=("a", "b"), per=20)
    (tmp_path / "b/only").mkdir()
    (tmp_path / "b/only/bad.jpg").write_text("<html>")
    for name, message in (("a", "zebra"), ("b", "class only has no training image")):
        with pytest.raises(InputError, match=message):
            evaluate("random", "--data", tmp_path / name)


def test_caltech101_split(tmp_path, monkeypatch):
    make_folder(tmp_path / "caltech101/101_ObjectCategories", classes=("BACKGROUND_Google", "ant", "bass"), per=35)
    monkeypatch.setattr(torchvision.datasets, "Caltech101", lambda root, download: None)
    train, test, _ = data.load("caltech101", root=tmp_path, size=32)
    assert train.classes == ["ant", "bass"] and train.labels.bincount().tolist() == [30, 30] and test.labels.bincount().tolist() == [5, 5]


# -------------------------------------------------------------------------------------------------------- analyze.py

def squared(a, b):
    return sum((u - v) ** 2 for u, v in zip(F.normalize(a, dim=0).tolist(), F.normalize(b, dim=0).tolist()))


def sample(n=23, width=6, classes=4):
    """Originals, two views and labels, with a duplicated image and a class of one image."""
    o = torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    o[5] = o[6]
    a, b = (o + 2 * unit(n, width, seed=s) for s in (1, 2))
    y = torch.arange(n) % classes
    y[-1] = classes
    return o, a, b, y


def test_instance_discrimination_is_a_search():
    o, a, b, _ = sample()
    for query, positive, others in ((o, a, o), (b, a, a)):
        hits = np.zeros(5)
        for i in range(len(o)):
            distances = [squared(query[i], others[j]) for j in range(len(o)) if j != i]
            better = sum(d <= squared(query[i], positive[i]) for d in distances)
            hits += [better < j for j in range(1, 6)]
        assert torch.allclose(analyze.instance_discrimination(query, positive, others), torch.from_numpy(100 * hits / len(o)))
    assert 0 < hits[0] < hits[4]
    same = torch.ones(1500, 3)
    assert analyze.instance_discrimination(same, same, same)[4] == 0 and analyze.instance_discrimination(o, o, a)[0] == 100


def test_distances_between_views_and_within_classes_are_means_over_pairs():
    o, a, b, y = sample()
    assert analyze.alignment(a, b).item() == pytest.approx(np.mean([squared(u, v) for u, v in zip(a, b)]))
    pairs = [(i, j) for i in range(len(o)) for j in range(i)]
    assert analyze.uniformity(o).item() == pytest.approx(math.log(np.mean([math.exp(-2 * squared(o[i], o[j])) for i, j in pairs])))
    each = [np.mean([squared(o[i], o[j]) for i, j in pairs if y[i] == y[j] == c]) for c in range(4)]
    apart = np.mean([squared(o[i], o[j]) for i, j in pairs if y[i] != y[j]])
    assert [v.item() for v in analyze.class_distances(o, y)] == pytest.approx([np.mean(each), apart])
    many = unit(2300, 5)  # several blocks
    assert analyze.uniformity(many).item() == pytest.approx(torch.pdist(many).square().mul(-2).exp().mean().log().item())
    assert analyze.uniformity(torch.ones(3, 4)).abs() < 1e-6


def test_the_length_of_features_does_not_matter():
    o, a, b, y = (v if v.dtype == torch.int64 else v.float() for v in sample())
    tiny = [v * 2.0 ** -50 for v in (o, a, b)]
    ours, theirs = analyze.instance_metrics(*tiny, y), analyze.instance_metrics(o, a, b, y)
    assert ours.pop("oa_top") == theirs.pop("oa_top") and ours.pop("ab_top") == theirs.pop("ab_top") and ours == pytest.approx(theirs)
    assert linear_eval.knn(tiny[0], y, tiny[1], y, k=5) == linear_eval.knn(o, y, a, y, k=5)
    assert analyze.best_nn(tiny[0], y, tiny[1], y) == analyze.best_nn(o, y, a, y)


def test_purity_and_best_nn_are_searches():
    o, _, b, y = sample()
    x, n = F.normalize(o, dim=1), len(o)
    shares = []
    for i in range(n):
        order = sorted((j for j in range(n) if j != i), key=lambda j: (x[i] - x[j]).norm().item())[:4]
        shares.append(np.mean([(y[j] == y[i]).item() for j in order]))
    assert analyze.purity(o, y, k=4).item() == pytest.approx(100 * np.mean(shares))

    train, mean = o[:15], o[:15].mean(0)
    for name, space in {"raw": lambda v: v, "normalized": lambda v: F.normalize(v, dim=1), "shifted": lambda v: F.normalize(v - mean, dim=1)}.items():
        scores = {}
        for k in range(1, 15, 2):  # with five classes, votes tie
            near = [sorted(range(15), key=lambda j: (v - space(train)[j]).norm().item())[:k] for v in space(b)]
            scores[k] = 100 * np.mean([np.bincount(y[row]).argmax() == label for row, label in zip(near, y.tolist())])
        accuracy, k = analyze.best_nn(train, y[:15], b, y, most=14)[name]
        assert accuracy == pytest.approx(max(scores.values())) and scores[k] == accuracy
    assert analyze.best_nn(torch.eye(3), torch.tensor([2, 0, 1]), torch.eye(3), torch.tensor([2, 0, 1]))["raw"] == (100, 1)


def test_effective_rank():
    x = sample()[0]
    s = np.linalg.svd((F.normalize(x, dim=1) - F.normalize(x, dim=1).mean(0)).numpy(), compute_uv=False)
    p = s / s.sum()
    assert analyze.effective_rank(x).item() == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    crosses = torch.eye(7).repeat(3, 1) * torch.tensor([1.0, -1, 1])[:, None].repeat_interleave(7, 0)
    assert analyze.effective_rank(torch.cat([torch.eye(7), -torch.eye(7)])).item() == pytest.approx(7) and 1 <= analyze.effective_rank(crosses) <= 7
    assert analyze.effective_rank(torch.cat([torch.eye(3, 9), -torch.eye(3, 9)])).item() == pytest.approx(3, abs=1e-4)


def test_clusters_and_what_they_tell():
    y = torch.arange(4000) % 8
    clusters = analyze.kmeans(unit(8, 20, seed=3)[y] + 0.05 * unit(4000, 20), 8)
    joint = torch.zeros(8, 8).index_put_((clusters, y), torch.ones(4000), accumulate=True)
    assert (joint > 0).sum() == 8 and analyze.cluster_information(clusters, y) == pytest.approx(100)
    assert analyze.cluster_information(y // 4, y).item() == pytest.approx(100 / 3, abs=0.1)  # one bit of three
    random_clusters = torch.randint(400, (4000,), generator=torch.Generator().manual_seed(0))
    assert abs(analyze.cluster_information(random_clusters, y)) < 2 and analyze.cluster_information(torch.zeros_like(y), y).abs() < 1e-6
    assert len(analyze.kmeans(torch.ones(5, 2), 3)) == 5  # nothing to tell apart


def test_a_rotation_of_the_space_changes_nothing():
    o, a, b, y = sample(60)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    before, after = (analyze.instance_metrics(o @ t, 2 * a @ t, b @ t, y) for t in (torch.eye(6, dtype=torch.float64), turn))
    assert before.pop("oa_top") == after.pop("oa_top") and before.pop("ab_top") == after.pop("ab_top")
    assert before == pytest.approx(after) and len(before) == 11
    assert analyze.best_nn(o.float(), y, b.float(), y) == analyze.best_nn((o @ turn).float(), y, (b @ turn).float(), y)
    assert torch.allclose(torch.pdist(analyze.pca(o)), torch.pdist(analyze.pca(o @ turn)), atol=1e-4)


def test_pca_and_tsne():
    y = torch.arange(300) % 6
    x = unit(6, 30, seed=3)[y] + 0.6 * unit(300, 30)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert torch.allclose(torch.pdist(analyze.pca(x)).double(), torch.pdist(u[:, :2] * s[:2]), atol=1e-4)
    wide = torch.cat([x, x + 0.01 * unit(300, 30, seed=1)]).repeat(1, 20)  # past where a full decomposition is cheap
    u, s, _ = torch.linalg.svd(wide - wide.mean(0), full_matrices=False)
    assert torch.allclose(torch.pdist(analyze.pca(wide)).double(), torch.pdist(u[:, :2] * s[:2]), atol=1e-2)
    flat = analyze.tsne(x, steps=500)
    rank = torch.cdist(x, x).argsort(1).argsort(1)  # trustworthiness (Venna & Kaski 2001): neighbours in the map are neighbours
    near = torch.cdist(flat, flat).fill_diagonal_(math.inf).topk(10, largest=False).indices
    trust = 1 - 2 / (300 * 10 * (600 - 31)) * (rank.gather(1, near) - 10).clamp(min=0).sum()
    assert flat.shape == (300, 2) and trust > 0.9
    assert (y[near] == y[:, None]).double().mean() > 0.95
    assert analyze.tsne(torch.ones(4, 3)).isfinite().all()


def look(*argv):
    return analyze.main([*map(str, argv)])


def test_an_analysis_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_folder(Path("images/train"), per=12), make_folder(Path("images/test"), per=5, seed=7)
    Path("run").mkdir()
    torch.save(models.build("mobilenetv3_small", "imagenet").state_dict(), "run/backbone.pt")
    Path("run/args.json").write_text(json.dumps(dict(arch="mobilenetv3_small", stem="imagenet", size=32, data="images")))
    Path("run/log.jsonl").write_text("".join(json.dumps(dict(epoch=e, loss=5 / e, instance_accuracy=9.0 * e, knn=20 + e)) + "\n" for e in (1, 2)))
    torch.save(models.build("resnet18", "imagenet").state_dict(), "other.pt")
    Path("args.json").write_text(json.dumps(dict(stem="imagenet", size=48)))  # beside other.pt: another size
    results = look("run", "other.pt", "random", "pixels", "--workers", 2)
    printed = capsys.readouterr().out
    assert list(results) == ["run", "other.pt", "random", "pixels"] and json.loads(Path("run/analysis/analysis.json").read_text()).keys() == results.keys()
    for name, r in results.items():
        assert r["images"] == 15 and {"linear", "nn_raw", "clusters", "ratio"} < r["held-out"].keys() and "linear" not in r["train"]
        assert f"- {name} {r['verdict']}" in printed and 0 <= r["held-out"]["ab"] <= 100
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(analyze.ROWS) and {line.count("|") for line in lines} == {6}
    assert "other.pt: resnet18 at 48 pixels" in printed and "pixels: pixels at 32 pixels" in printed
    for name, size in dict(space=(4, 3), similarity=(4, 1), neighbours=None, curves=(3, 1)).items():
        picture = Image.open(f"run/analysis/{name}.png")
        assert np.asarray(picture).std() > 5 and (size is None or (picture.width >= 400 * size[0], picture.height) == (True, 400 * size[1]))
    make_folder(Path("flat"), classes=(".",), per=15)
    free = look("run", "--data", "flat", "--out", "free", "--workers", 2)["run"]
    assert free.keys() == {"train", "images", "verdict"} and "linear" not in free["train"] and "uniformity" in free["train"]


def test_verdicts():
    def numbers(train_ab, ab, intra=0.5, spread=-2.0, ratio=0.6, nn=50.0, linear=60.0):
        part = dict(ab=ab, intra=intra, uniformity=spread, ratio=ratio, nn_normalized=nn, linear=linear)
        return {"train": part | dict(ab=train_ab), "held-out": part, "images": 500}

    both = {"tight": numbers(91, 90, intra=0.3, ratio=0.7, nn=40, linear=50), "good": numbers(93, 92)}
    assert "solves the pretext task" in analyze.verdict("tight", both) and "does not overfit" in analyze.verdict("tight", both)
    assert "over-clusters beside good (best-NN +10.0, linear +10.0" in analyze.verdict("tight", both)
    assert "no over-clustering" in analyze.verdict("good", both)
    early = {"tight": numbers(5, 5, intra=0.3, nn=40, linear=50), "good": numbers(6, 6)}
    assert "no over-clustering" in analyze.verdict("tight", early)  # neither has solved anything yet
    assert "overfits it (train - held-out +30" in analyze.verdict("a", {"a": numbers(90, 60)}) and "half solves" in analyze.verdict("a", {"a": numbers(90, 60)})
    assert "over-clusters: images" in analyze.verdict("a", {"a": numbers(90, 90, ratio=0.9)})
    assert "does not solve" in analyze.verdict("a", {"a": numbers(20, 20, ratio=0.9)}) and "no over-clustering" in analyze.verdict("a", {"a": numbers(20, 20, ratio=0.9)})


@pytest.mark.parametrize("flags,message", [
    (["missing.pt"], "missing.pt"), (["bad.pt"], "bad.pt"), (["random", "--per-class", 1], "--per-class 1"),
    (["random", "--data", "few"], "no held-out image"), (["random", "--arch", "vgg"], "--arch vgg"), (["random", "--data", "nowhere"], "nowhere")])
def test_bad_input_to_an_analysis_is_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.pt").write_text("<html>"), make_folder(Path("few"), per=3), make_folder(Path("images"), per=10)
    with pytest.raises(InputError, match=message) as error:
        look(*flags, *([] if "--data" in flags else ["--data", "images"]))
    assert "\n" not in str(error.value) and not Path("runs").exists()


# ------------------------------------------------------------------------------------------------------ two processes

class NoBatchNorm(torch.nn.Module):
    def __init__(self, small):
        super().__init__()
        self.dim, self.net = 8, torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 14 * 14, 8))

    def forward(self, x):
        return self.net(x)


def worker(folder, argv):
    """One process of a run: saves its network, its queue, and whether shuffled keys came back in order."""
    torch.set_num_threads(1)
    models.ARCHS["plain"] = NoBatchNorm
    destroy, order = torch.distributed.destroy_process_group, []

    def check():
        rank, x, perm = torch.distributed.get_rank(), rand(8, 3, 32, 32, dtype=torch.float32), torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
        moco = pretrain.MoCo(pretrain.Encoder(NoBatchNorm(False), torch.nn.Linear(8, 4)), 4, 16, 0.9)
        for p in moco.parameters():
            torch.distributed.broadcast(p.data, 0)
        share = x[perm[4 * rank:4 * rank + 4]]
        order.append(torch.allclose(moco.keys(share, perm, 1), moco.encoder_k(x), atol=1e-6))
        destroy()

    torch.distributed.destroy_process_group = check
    moco = pretrain.main(argv)
    torch.save({"model": moco.state_dict(), "order": order}, Path(folder) / f"rank{os.environ.get('RANK', 0)}.pt")


def processes(world, code, codes=(0,)):
    """Run `code` in `world` processes of one group, as torchrun starts them; each must end with one of `codes`."""
    port = str(random.randint(20000, 40000))
    jobs = [subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if 1 in codes else None, env=os.environ | dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
        for rank in range(world)]
    ended = [job.wait(240) for job in jobs]
    assert set(ended) <= set(codes), ended
    return ended


@pytest.mark.parametrize("arch,stream", [("plain", "off"), ("mobilenetv3_small", "on"), pytest.param("plain", "on", marks=LONG)])
def test_two_processes(arch, stream, tmp_path):
    make_folder(tmp_path / "images/train", per=9), make_folder(tmp_path / "images/test", per=3)
    common = [*map(str, SMALL), "--arch", arch, "--data", str(tmp_path / "images"), "--stream", stream, "--steps", "10", "--seed", "1", "--lr", "0.05"]
    result = {}
    for world in (1, 2):
        folder = tmp_path / f"world{world}"
        folder.mkdir()
        code = f"import test_smoke; test_smoke.worker({str(folder)!r}, {[*common, '--out', str(folder / 'run')]!r})"
        processes(world, code)
        result[world] = [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]
        result[f"log{world}"] = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    one, (a, b) = result[1][0]["model"], (r["model"] for r in result[2])
    assert result[2][0]["order"] == result[2][1]["order"] == [True]
    for name in a:
        if not ("running" in name and "encoder_k" in name):  # a key encoder's statistics are its process's own
            assert torch.equal(a[name], b[name]), name
    if arch == "plain":
        assert all(torch.allclose(one[name], a[name], atol=1e-5) for name in one)
        for x, y in zip(result["log1"], result["log2"]):
            assert x["loss"] == pytest.approx(y["loss"], abs=1e-4) and x["instance_accuracy"] == pytest.approx(y["instance_accuracy"], abs=1e-4)
    assert [x["knn"] for x in result["log2"] if "knn" in x]


@pytest.mark.parametrize("stream", ["off", pytest.param("on", marks=LONG)])
def test_two_processes_evaluate_and_analyze_as_one(stream, tmp_path):
    make_folder(tmp_path / "images/train", per=101), make_folder(tmp_path / "images/test", per=89, seed=7)  # 267 = 256 + 11 images
    common = ["--arch", "mobilenetv3_small", "--size", "32", "--stem", "imagenet", "--data", str(tmp_path / "images"), "--stream", stream, "--workers", "1"]
    moco = ["--protocol", "moco", "--epochs", "2", "--batch", "32", "--lr", "1"]
    runs = {"knn": ("linear_eval", ["--knn"]), "moco": ("linear_eval", moco), "analysis": ("analyze", [])} if stream == "off" else {"knn": ("linear_eval", ["--knn"])}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # exactly the same sums
    for name, (script, flags) in runs.items():
        globals()[script].main(["random", *common, *flags, "--out", str(tmp_path / f"{name}1")])
        processes(2, f"import torch, {script}; torch.set_num_threads(1); {script}.main({['random', *common, *flags, '--out', str(tmp_path / f'{name}2')]!r})")
    torch.set_num_threads(threads)
    for name in runs:
        one, two = (json.loads((tmp_path / f"{name}{world}/{'analysis' if name == 'analysis' else 'result'}.json").read_text()) for world in (1, 2))
        keys = one.keys() & {"table", "per_class", "confusion", "test_images", "random"}
        assert keys and all(one[key] == two[key] for key in keys), name
        assert name == "analysis" or one["test_images"] == 267


# -------------------------------------------------------------------------------------------------- nothing is lost

def doomed(argv, number=None, delay=0.0):
    """A run whose last process gets a signal `delay` seconds into its loop."""
    torch.set_num_threads(1)
    catch = pretrain.catch_signals

    def start_the_clock():
        if number and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            timer = threading.Timer(delay, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
        return catch()

    pretrain.catch_signals = start_the_clock
    pretrain.main(argv)


def content(run):
    """All tensors of a run's last checkpoint, and its log without the times."""
    last = torch.load(run / "last.pt")
    log = [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_s")} for line in (run / "log.jsonl").read_text().splitlines()]
    tensors = last["model"] | {f"{i} {k}": v for i, s in last["optimizer"]["state"].items() for k, v in s.items()}
    assert all(torch.equal(v, tensors[f"encoder_q.backbone.{k}"]) for k, v in torch.load(run / "backbone.pt").items())
    return tensors, log, last["step"]


@pytest.mark.parametrize("world,stream,steps,signals", [
    (1, "off", 12, [15]), (2, "on", 12, [9]),
    pytest.param(1, "off", 90, [9, 9, 15] * 10, marks=LONG), pytest.param(2, "on", 60, [9, 15] * 5, marks=LONG)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(world, stream, steps, signals, tmp_path):
    make_folder(tmp_path / "images/train", per=14), make_folder(tmp_path / "images/test", per=2)
    common = [*map(str, SMALL), "--data", str(tmp_path / "images"), "--stream", stream, "--steps", str(steps), "--head", "dropout", "--save-every", "0.001", "--workers", "1"]
    rng, killed = random.Random(0), 0
    processes(world, f"import test_smoke; test_smoke.doomed({[*common, '--out', str(tmp_path / 'whole')]!r})")
    span = json.loads((tmp_path / "whole/log.jsonl").read_text().splitlines()[-1])["seconds"]
    for number in [*signals, None]:
        delay = rng.uniform(0, (0.7 if len(signals) > 1 else 0.3) * span / len(signals))  # a single one must not miss a faster run
        ended = processes(world, f"import test_smoke; test_smoke.doomed({[*common, '--out', str(tmp_path / 'killed'), '--resume']!r}, {number}, {delay})",
                          (0, 1, -9, -15, 128 + 15, -6) if number else (0,))  # -15: past the loop already
        killed += ended[-1] != 0
    (a, log_a, step_a), (b, log_b, step_b) = content(tmp_path / "whole"), content(tmp_path / "killed")
    print(f"{killed} of {len(signals)} signals met the run, {world} processes, streamed {stream}")
    assert killed >= len(signals) / 4 and step_a == step_b == steps and log_a == log_b
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, monkeypatch):
    make_folder(tmp_path / "flat", classes=(".",), per=30)
    monkeypatch.setitem(models.ARCHS, "plain", NoBatchNorm)
    common = [*map(str, SMALL), "--arch", "plain", "--data", str(tmp_path / "flat"), "--lr", "0.05", "--steps", "9"]
    whole = run(*common, "--out", tmp_path / "whole")
    step = pretrain.MoCo.enqueue

    def stop(self, k, at):
        step(self, k, at)
        if at == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(pretrain.MoCo, "enqueue", stop)
    with pytest.raises(SystemExit) as ended:
        run(*common, "--out", tmp_path / "parts")
    assert ended.value.code == 143 and torch.load(tmp_path / "parts/last.pt")["step"] == 5
    processes(2, f"import test_smoke, models; models.ARCHS['plain'] = test_smoke.NoBatchNorm; test_smoke.doomed({['--out', str(tmp_path / 'parts'), '--resume']!r})")
    parts = torch.load(tmp_path / "parts/last.pt")["model"]
    assert all(torch.allclose(v, parts[k], atol=1e-5) for k, v in whole.state_dict().items())


def test_damaged_checkpoints_and_a_full_disk(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path / "flat", classes=(".",), per=20)
    common = ["--data", tmp_path / "flat", "--out", tmp_path / "run", *SMALL, "--epochs", 3]
    run(*common)
    first = content(tmp_path / "run")
    for damage in (lambda b: b[:len(b) // 2], lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1:], lambda b: b""):
        path = tmp_path / "run/last.pt"
        path.write_bytes(damage(path.read_bytes()))
        capsys.readouterr()
        run(*common, "--resume")
        assert "warning" in (printed := capsys.readouterr().out) and "previous.pt" in printed
        again = content(tmp_path / "run")
        assert again[1:] == first[1:] and all(torch.equal(first[0][k], again[0][k]) for k in first[0])
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "run" / name).write_bytes(b"torn")
    with pytest.raises(InputError, match="no checkpoint in .* can be read"):
        run(*common, "--resume")

    class Full:
        """A disk with room for `room` checkpoints."""
        def __init__(self, room):
            self.room = room

        def __call__(self, content, file):
            self.room -= isinstance(content, dict) and "model" in content
            if self.room < 0:
                file.write(b"half")
                raise OSError(28, "No space left on device")
            torch_save(content, file)

    torch_save = torch.save
    monkeypatch.setattr(torch, "save", Full(1))
    with pytest.raises(InputError, match="No space left.*make room"):
        run(*common, "--out", tmp_path / "full")
    assert "the next save tries again" in capsys.readouterr().out and content(tmp_path / "full")[2] == 2
    assert not list((tmp_path / "full").glob("*.tmp"))
    monkeypatch.undo()
    run(*common, "--out", tmp_path / "full", "--resume")  # room was made
    assert all(torch.equal(first[0][k], v) for k, v in content(tmp_path / "full")[0].items())


@pytest.mark.parametrize("value,message", [(float("nan"), "the loss is nan at step 24"), (None, "all queries are alike")])
def test_numbers_that_go_bad_end_the_run(value, message, tmp_path, monkeypatch):
    make_folder(tmp_path / "flat", classes=(".",), per=170)
    formula, calls = pretrain.info_nce, []

    def bad(q, k, queue, temperature, *rest):
        calls.append(0)
        if value is None:
            q = q * 0 + 1 / 128 ** 0.5
        loss, hits = formula(q, k, queue, temperature, *rest)
        return (loss * value if value is not None and len(calls) == 25 else loss), hits

    monkeypatch.setattr(pretrain, "info_nce", bad)
    if value is None:
        monkeypatch.setattr(pretrain.Encoder, "forward", lambda self, x, splits=1: F.normalize(torch.ones(len(x), 128) + 0 * self.head[0].weight.sum(), dim=1))
    with pytest.raises(InputError, match=message) as error:
        run("--data", tmp_path / "flat", "--out", tmp_path / "run", *SMALL, "--epochs", 20, "--steps", 60)
    assert "--lr" in str(error.value) and "\n" not in str(error.value)
    if value is not None:  # the last good checkpoint is still there
        assert torch.load(tmp_path / "run/last.pt")["step"] == 21


@pytest.mark.parametrize("stream", ["off", "on"])
def test_whatever_people_have_in_folders(stream, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "photos"
    make_folder(folder, classes=(".", "holiday 2019/März", "gone"), per=12)
    rgb = Image.open(folder / "0 é.jpg")
    (folder / "html.jpg").write_text("<html>"), (folder / "zero.png").touch(), (folder / "link.jpg").symlink_to("nowhere.jpg")
    (folder / "torn.jpg").write_bytes((folder / "1 é.jpg").read_bytes()[:300])
    Image.new("1", (30000, 30000)).save(folder / "bomb.png")  # 100 kB that would be 2.7 GB
    bad = {"html.jpg", "zero.png", "link.jpg", "torn.jpg", "bomb.png"} | {f"{i} not.jpg" for i in range(12)}
    for i in range(12):  # with these, 30 % of the folder
        (folder / f"{i} not.jpg").write_bytes(os.urandom(200 + 100 * i))
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png"), Image.new("RGB", (20000, 10)).save(folder / "strip.png"), rgb.convert("CMYK").save(folder / "print.jpg")
    rgb.save(folder / "moving.gif", save_all=True, append_images=[rgb.rotate(90)]), Image.fromarray(np.full((30, 40), 40000, np.uint16)).save(folder / "deep.png")
    (folder / "loop").symlink_to(folder, target_is_directory=True), (tmp_path / "more").mkdir(), rgb.save(tmp_path / "more/linked.png")
    (folder / "elsewhere").symlink_to(tmp_path / "more", target_is_directory=True)
    enqueue = pretrain.MoCo.enqueue

    def vanish(self, k, step):
        enqueue(self, k, step)
        if step == 3 and stream == "on":
            [path.unlink(missing_ok=True) for path in (folder / "gone").iterdir()]

    monkeypatch.setattr(pretrain.MoCo, "enqueue", vanish)
    run("--data", folder, "--stream", stream, "--out", tmp_path / "run", *SMALL, "--epochs", 3)
    printed = capfd.readouterr().out
    named = [name for line in printed.splitlines() if line.startswith("skipped") for name in line.split(": ")[1].split(", ")]
    assert len(named) == len(set(named)) and "unreadable file" in printed
    counted = sum(int(line.split()[1]) for line in printed.splitlines() if line.startswith("skipped"))
    assert counted == len(bad) if stream == "off" else len(bad) <= counted <= len(bad) + 12
    assert f"{42 if stream == 'off' else 59} images at" in printed and len(json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])) > 4


def weighed(argv, every=200):
    """A run that prints its memory in MB, workers included, and its open files every 200 steps, and must not grow."""
    seen, enqueue = [], pretrain.MoCo.enqueue

    def weigh(self, k, step):
        enqueue(self, k, step)
        if step % every == every - 1:
            children = [Path(f"/proc/self/task/{task}/children").read_text().split() for task in os.listdir("/proc/self/task")]
            pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in [os.getpid(), *sum(children, [])])
            seen.append((pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20, len(os.listdir("/proc/self/fd"))))
            print(f"step {step + 1}: {seen[-1][0]:.0f} MB, {seen[-1][1]} files", flush=True)

    pretrain.MoCo.enqueue = weigh
    pretrain.main(argv)
    half = len(seen) // 2
    assert max(m for m, _ in seen[half:]) < 1.03 * max(m for m, _ in seen[1:half]) and seen[-1][1] <= seen[1][1] + 2


@LONG
@pytest.mark.parametrize("stream", ["off", "on"])
def test_memory_stays_flat(stream, tmp_path):
    make_folder(tmp_path / "images", classes=(".",), per=64)
    argv = [*map(str, SMALL), "--data", str(tmp_path / "images"), "--stream", stream, "--steps", "2000", "--out", str(tmp_path / "run"), "--knn-every", "1000"]
    subprocess.run([sys.executable, "-c", f"import test_smoke; test_smoke.weighed({argv!r})"], cwd=HERE, check=True)


@LONG
def test_torchrun_restarts_a_run_whose_worker_is_killed(tmp_path):
    make_folder(tmp_path / "images/train", per=14), make_folder(tmp_path / "images/test", per=2)
    common = [*map(str, SMALL), "--data", str(tmp_path / "images"), "--steps", "150", "--save-every", "0.001", "--resume"]
    for name in ("whole", "killed"):
        job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3",
                                "pretrain.py", *common, "--out", str(tmp_path / name)], cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while name == "killed" and not (tmp_path / name / "previous.pt").exists():
            time.sleep(0.05)
        if name == "killed":
            workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            os.kill(int(workers[-1]), signal.SIGKILL)
            assert torch.load(tmp_path / name / "previous.pt")["step"] < 150
        assert job.wait(300) == 0
    (a, log_a, _), (b, log_b, _) = content(tmp_path / "whole"), content(tmp_path / "killed")
    assert log_a == log_b and all(torch.equal(a[k], b[k]) for k in a if not ("running" in k and "encoder_k" in k))
