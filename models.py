"""The small networks, by hand: ResNet-18/34/50, MobileNetV3-Small/Large, EfficientNet-B0/B1.

    net = build("mobilenetv3", size=32)      # a torch.nn.Module, randomly initialized
    features = net(images)                   # (N, 3, H, W) -> (N, net.dim), the pre-logits feature

Each family is a table of rows and one block class. Parameter and buffer names, shapes and arithmetic are
torchvision's, so weights travel both ways; what is missing here is torchvision's last Linear, and what follows
in its place is a projection head (`make_head`). `read_backbone` takes the weights out of any checkpoint.
"""
import json
import math
import pickle
import re
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """Something the user gave is wrong: one line that names the flag or file and the mend."""


# ----------------------------------------------------------------------------------------------- building blocks

class SmallMapDepthwise(torch.autograd.Function):
    """A depthwise convolution of a map smaller than its kernel, "same" padding: x (N, C, h, h), weight (C, 1, k, k).

    Over the weight's gradient alone oneDNN takes 10 to 100 times as long as the sum of products below, more than all
    the rest of MobileNetV3's step on small images.
    """

    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = (t.to(grad.dtype) for t in ctx.saved_tensors)
        h, p, s = x.shape[-1], weight.shape[-1] // 2, ctx.stride
        taps = weight.new_zeros(len(weight), 1, 2 * h - 1, 2 * h - 1)  # a kernel that just covers the map from its corners
        for i in range(grad.shape[2]):
            for j in range(grad.shape[3]):  # output (i, j) lays the whole map on these taps
                patch = taps[:, 0, h - 1 - i * s:2 * h - 1 - i * s, h - 1 - j * s:2 * h - 1 - j * s]
                patch += (x * grad[:, :, i, j, None, None]).sum(0)
        dw = torch.empty_like(weight).copy_(F.pad(taps, [p - h + 1] * 4))  # cropped or padded, in the weight's memory format
        return torch.nn.grad.conv2d_input(x.shape, weight, grad, s, p, groups=len(weight)), dw, None


class Conv2d(nn.Conv2d):
    """nn.Conv2d with an odd kernel and `padding` half of it, either dense or one kernel a channel.

    The last maps of small images are 1x1 and 2x2, where most of a 3x3 kernel meets padding alone. There a dense
    convolution is a matrix product over the whole map with the taps that do meet it, which costs the CPU between three
    quarters and an eighth of its own convolution's time, forward and backward.
    """

    def forward(self, x):
        (h, w), k, s = x.shape[2:], self.kernel_size[0], self.stride[0]
        if x.device.type == "cpu" and self.groups > 1 and h == w < k and torch.is_grad_enabled():
            return SmallMapDepthwise.apply(x, self.weight, s)
        if x.device.type != "cpu" or self.groups > 1 or not (h == w == 1 or h == w == 2 and k == 3):
            return super().forward(x)
        p, outputs = k // 2, [(i, j) for i in range(0, h, s) for j in range(0, w, s)]
        taps = torch.stack([self.weight[:, :, p - i:p - i + h, p - j:p - j + w] for i, j in outputs])  # (outputs, C', C, h, w)
        y = F.linear(x.permute(0, 2, 3, 1).flatten(1), taps.permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1),
                     None if self.bias is None else self.bias.repeat(len(outputs)))
        return y.view(len(x), -(-h // s), -(-w // s), -1).permute(0, 3, 1, 2)  # channels_last


def conv_bn(cin, cout, kernel=3, stride=1, groups=1, act=nn.ReLU, eps=1e-5):
    """Convolution, BatchNorm, activation (`act=None`: none), in torchvision's order and names.

    BatchNorm keeps torch's momentum of 0.1 everywhere: with torchvision's 0.01 for MobileNetV3 the running
    statistics lag hundreds of steps behind the weights, and a short run is judged by networks that never were.
    """
    layers = [Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(cout, eps)]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from all channels' means (Hu et al. 2018)."""

    def __init__(self, channels, squeeze, act, gate):
        super().__init__()
        self.fc1, self.fc2 = Conv2d(channels, squeeze, 1), Conv2d(squeeze, channels, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """1x1 expand, depthwise k x k, squeeze-excitation (`squeeze` channels, 0: none), 1x1 project; shortcut if it fits.

    MobileNetV2/V3's block and, with SiLU, EfficientNet's MBConv (without stochastic depth).
    """

    def __init__(self, cin, expanded, cout, kernel, stride, squeeze, act, se_act, se_gate, eps):
        super().__init__()
        layers = [conv_bn(cin, expanded, 1, act=act, eps=eps)] if expanded != cin else []
        layers.append(conv_bn(expanded, expanded, kernel, stride, groups=expanded, act=act, eps=eps))
        if squeeze:
            layers.append(SqueezeExcitation(expanded, squeeze, se_act, se_gate))
        self.block = nn.Sequential(*layers, conv_bn(expanded, cout, 1, act=None, eps=eps))
        self.shortcut = stride == 1 and cin == cout

    def forward(self, x):
        return x + self.block(x) if self.shortcut else self.block(x)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or with `bottleneck` 1x1, 3x3, 1x1 (x4), around a shortcut (He et al. 2016).

    The stride of a bottleneck sits on its 3x3 ("v1.5"), as in torchvision.
    """

    def __init__(self, cin, width, stride, bottleneck):
        super().__init__()
        shapes = [(cin, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)] if bottleneck else \
                 [(cin, width, 3, stride), (width, width, 3, 1)]
        for i, (a, b, kernel, s) in enumerate(shapes, 1):
            setattr(self, f"conv{i}", Conv2d(a, b, kernel, s, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.depth, cout = len(shapes), shapes[-1][1]
        self.downsample = conv_bn(cin, cout, 1, stride, act=None) if stride > 1 or cin != cout else None

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu_() if i < self.depth else y
        return y.add_(x if self.downsample is None else self.downsample(x)).relu_()


# ------------------------------------------------------------------------------------------------- the networks

class ResNet(nn.Module):
    def __init__(self, layers, bottleneck, small):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False) if small else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        cin = 64
        for i, n in enumerate(layers):
            width, blocks = 64 << i, []
            for j in range(n):
                blocks.append(ResidualBlock(cin, width, 2 if i > 0 and j == 0 else 1, bottleneck))
                cin = 4 * width if bottleneck else width
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.dim = cin

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu_())
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


class MobileNetV3(nn.Module):
    def __init__(self, rows, dim, small):
        super().__init__()
        hs, relu, eps = nn.Hardswish, nn.ReLU, 0.001
        layers, cin = [conv_bn(3, 16, stride=1 if small else 2, act=hs, eps=eps)], 16
        for kernel, expanded, cout, se, act, stride in rows:
            squeeze = divisible(expanded / 4) if se else 0
            layers.append(InvertedResidual(cin, expanded, cout, kernel, stride, squeeze, hs if act == "HS" else relu,
                                           relu, nn.Hardsigmoid, eps))
            cin = cout
        self.features = nn.Sequential(*layers, conv_bn(cin, 6 * cin, 1, act=hs, eps=eps))
        self.classifier = nn.Sequential(nn.Linear(6 * cin, dim), hs(inplace=True))
        self.dim = dim

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class EfficientNet(nn.Module):
    def __init__(self, rows, depth, small):
        super().__init__()
        layers, cin = [conv_bn(3, 32, stride=1 if small else 2, act=nn.SiLU)], 32
        for expand, kernel, stride, cout, n in rows:
            stage = []
            for j in range(math.ceil(n * depth)):
                stage.append(InvertedResidual(cin, cin * expand, cout, kernel, stride if j == 0 else 1, cin // 4,
                                              nn.SiLU, nn.SiLU, nn.Sigmoid, 1e-5))
                cin = cout
            layers.append(nn.Sequential(*stage))
        self.features = nn.Sequential(*layers, conv_bn(cin, 4 * cin, 1, act=nn.SiLU))
        self.dim = 4 * cin

    def forward(self, x):
        return self.features(x).mean((2, 3))


def divisible(channels, by=8):
    """The multiple of `by` nearest to `channels`, never more than 10 % below it."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


# Howard et al. 2019, tables 1 and 2: kernel, expanded width, out, squeeze-excitation, activation, stride
MOBILENETV3_LARGE = [
    (3, 16, 16, False, "RE", 1),
    (3, 64, 24, False, "RE", 2), (3, 72, 24, False, "RE", 1),
    (5, 72, 40, True, "RE", 2), (5, 120, 40, True, "RE", 1), (5, 120, 40, True, "RE", 1),
    (3, 240, 80, False, "HS", 2), (3, 200, 80, False, "HS", 1), (3, 184, 80, False, "HS", 1), (3, 184, 80, False, "HS", 1),
    (3, 480, 112, True, "HS", 1), (3, 672, 112, True, "HS", 1),
    (5, 672, 160, True, "HS", 2), (5, 960, 160, True, "HS", 1), (5, 960, 160, True, "HS", 1)]
MOBILENETV3_SMALL = [
    (3, 16, 16, True, "RE", 2),
    (3, 72, 24, False, "RE", 2), (3, 88, 24, False, "RE", 1),
    (5, 96, 40, True, "HS", 2), (5, 240, 40, True, "HS", 1), (5, 240, 40, True, "HS", 1),
    (5, 120, 48, True, "HS", 1), (5, 144, 48, True, "HS", 1),
    (5, 288, 96, True, "HS", 2), (5, 576, 96, True, "HS", 1), (5, 576, 96, True, "HS", 1)]
# Tan & Le 2019, table 1: expansion, kernel, stride, out, layers
EFFICIENTNET = [(1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3),
                (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)]

ARCHS = {
    "resnet18": partial(ResNet, [2, 2, 2, 2], False),
    "resnet34": partial(ResNet, [3, 4, 6, 3], False),
    "resnet50": partial(ResNet, [3, 4, 6, 3], True),
    "mobilenetv3": partial(MobileNetV3, MOBILENETV3_LARGE, 1280),
    "mobilenetv3_large": partial(MobileNetV3, MOBILENETV3_LARGE, 1280),
    "mobilenetv3_small": partial(MobileNetV3, MOBILENETV3_SMALL, 1024),
    "efficientnet_b0": partial(EfficientNet, EFFICIENTNET, 1.0),
    "efficientnet_b1": partial(EfficientNet, EFFICIENTNET, 1.1),
}


def build(arch, stem="auto", size=224):
    """A randomly initialized network: (N, 3, H, W) -> (N, `net.dim`), its pre-logits feature.

    `stem="small"` keeps the resolution that small images need: the first convolution has stride 1, and in ResNets it
    is 3x3 (not 7x7) and the max-pool behind it is left out (He et al. 2016, section 4.2), so that 32 pixels end in a
    map of 4x4 (ResNets) or 2x2 instead of 1x1, at 16 or 4 times the arithmetic. `stem="auto"` takes it up to 64 pixels.
    Only the ResNets' `conv1` changes its shape. Raises InputError for an unknown name.
    """
    check_arch(arch)
    if stem not in ("auto", "imagenet", "small"):
        raise InputError(f"--stem {stem}: unknown; choose from auto, imagenet, small")
    net = ARCHS[arch](small=stem == "small" or (stem == "auto" and size <= 64))
    return initialize(net)


def check_arch(arch):
    if arch not in ARCHS:
        raise InputError(f"--arch {arch}: unknown; choose from {', '.join(ARCHS)}")


def initialize(module):
    """He et al. 2015 for convolutions (fan out, as all three papers' code) and Linears (fan in), zero biases, in place.

    MobileNetV3's paper draws its Linear from N(0, 0.01). Under a projection head with torch's default biases that
    feature is too small to be seen: all embeddings start alike, and it takes hundreds of steps to tell them apart.
    """
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, mode="fan_out" if isinstance(m, nn.Conv2d) else "fan_in")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return module


def last_linear(arch):
    """torchvision's name of the classifying Linear, which the networks here do without."""
    return {"r": "fc", "m": "classifier.3", "e": "classifier.1"}[arch[0]]


HEADS = ("linear", "simple", "wide", "deep", "dropout")


def make_head(kind, d, c=128):
    """Projection head (N, d) -> (N, c), thrown away after pretraining (Shi et al. 2022, section 4).

    linear d-c; simple d-d-c (MoCo v2); wide d-2d-c (the paper's choice for small networks); deep d-d-d-c;
    dropout d-d-c with p 0.5; a number h: d-h-c.
    """
    hidden = {"linear": [], "simple": [d], "wide": [2 * d], "deep": [d, d], "dropout": [d]}.get(kind)
    if hidden is None:
        if not str(kind).isdigit() or int(kind) == 0:
            raise InputError(f"--head {kind}: unknown; choose from {', '.join(HEADS)} or a hidden width")
        hidden = [int(kind)]
    widths, layers = [d, *hidden, c], []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b), nn.ReLU(inplace=True)]
    if kind == "dropout":
        layers.insert(2, nn.Dropout(0.5))
    head = initialize(nn.Sequential(*layers[:-1]))
    with torch.no_grad():  # a longer embedding turns more slowly: at equal rates the head runs ahead of the backbone
        head[-1].weight *= 4
    return head


# --------------------------------------------------------------------------------------- weights from elsewhere

# Where a backbone hides in the checkpoints that people have: ours, MoCo / ssl-small (the query encoder), SEED, and
# networks saved under DataParallel. The first prefix that fits wins; the bare names are torchvision's.
PREFIXES = ("encoder_q.backbone.", "module.encoder_q.", "encoder_q.", "module.student.", "student.", "module.", "")


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError:
        raise InputError(f"{path}: not readable as JSON; delete it, and give its flags") from None


@cache
def shapes(arch, stem):
    """{name: shape} of a network's state dict."""
    with torch.device("meta"):
        return {k: v.shape for k, v in ARCHS[arch](small=stem == "small").state_dict().items()}


def load_file(path):
    """torch.load that never runs code from the file and always lands on the CPU; InputError if it can't be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path}: not read, because it is no checkpoint or holds more than tensors and plain values, "
                         "which could run code; save its state_dict() alone") from None
    except Exception as error:
        raise InputError(f"{path}: not a readable checkpoint, perhaps torn or truncated "
                         f"({type(error).__name__})") from None


def read_backbone(path, arch=None):
    """The backbone in a checkpoint of any known format.

    `path`: a run folder, `last.pt`, `backbone.pt`, a torchvision state dict, or a file with a `state_dict` as MoCo,
    ssl-small and SEED write it. Returns (state dict with torchvision's names and without the last Linear; a dict with
    `arch`, `stem` (None where the weights don't show it), the names it `dropped`, and, where args.json beside the file
    says so, `size`, `data`, `root` and `classes`).
    Raises InputError if no network here, or not `arch`, has these weights. Never executes code from the file.
    """
    path = Path(path)
    path = path / "backbone.pt" if path.is_dir() else path
    state = load_file(path)
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path}: holds no state dict")
    known = {}  # ours says beside the weights what they are
    if (path.parent / "args.json").is_file():
        known = read_json(path.parent / "args.json")
    if arch:
        check_arch(arch)
    for prefix in PREFIXES:
        found = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix) and isinstance(v, torch.Tensor)}
        fits = {}  # ResNet-34 has all of ResNet-18's tensors and some more: the largest network that fits is meant
        for name in [n for n in ARCHS if n != "mobilenetv3"] if found else []:
            for stem in ("imagenet", "small") if name.startswith("resnet") else (None,):  # the others' shapes don't show it
                if all(k in found and found[k].shape == v for k, v in shapes(name, stem).items()):
                    fits[len(shapes(name, stem))] = name, stem
        if fits:
            name, stem = fits[max(fits)]
            if (arch or name) not in (name, name.removesuffix("_large")):
                raise InputError(f"{path}: its weights are those of {name}, not of {arch}; name the right --arch")
            wanted = shapes(name, stem)
            dropped = [k for k in state if not (k.startswith(prefix) and k[len(prefix):] in wanted)]
            return ({k: found[k] for k in wanted},
                    {k: known[k] for k in ("size", "data", "root", "classes") if k in known}
                    | {"arch": arch or name, "stem": stem or known.get("stem"), "dropped": dropped})
    raise InputError(f"{path}: its weights (such as {', '.join(list(state)[:2])}) are not those of "
                     f"{arch or 'any of ' + ', '.join(ARCHS)}; name the right --arch")


def read_teacher(path, arch=None, stem=None):
    """(backbone, projection head) of a run or of a MoCo checkpoint, with its weights; without a head in the file an Identity."""
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    state, info = read_backbone(path, arch)
    backbone = build(info["arch"], info["stem"] or stem or "imagenet")
    backbone.load_state_dict(state)
    content = load_file(path)
    content = content.get("model", content.get("state_dict", content))
    layers = {}
    for name, value in content.items():
        if found := re.fullmatch(r"(?:module\.)?encoder_q\.(?:head|fc)\.(\d+)\.(weight|bias)", name):
            layers.setdefault(int(found[1]), {})[found[2]] = value
    head = []
    for i in sorted(layers):
        head += [nn.Linear(*layers[i]["weight"].T.shape), nn.ReLU()]
        head[-2].load_state_dict(layers[i])
    return backbone, nn.Sequential(*head[:-1])
