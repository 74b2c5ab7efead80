"""The small networks, by hand: ResNet-18/34/50, MobileNetV3-Small/Large, EfficientNet-B0/B1.

    net = build("mobilenetv3_small")         # a torch.nn.Module, randomly initialized
    features = net(images)                   # (N, 3, H, W) -> (N, net.dim), the pre-logits feature

A network is a table of layers, as in its paper, and a class that builds them. Tensors have
torchvision's names and shapes, and in evaluation mode the outputs are the same. So weights can be
loaded from torchvision and into it. Only the last Linear, the classifier, is missing. A projection
head (`make_head`) takes its place during pretraining, and a linear probe afterwards.

This file imports only torch, so it can be copied into another project. Read it from top to bottom:
blocks, networks, their tables. The last part makes small images fast on a CPU. On a GPU it is never
used.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# --------------------------------------------------------------------------------------- 1. blocks

def conv_bn(cin, cout, kernel, stride=1, groups=1, act=None, eps=1e-5):
    """Convolution, BatchNorm and, unless `act` is None, the activation `act`, with torchvision's
    names. A map (N, cin, H, W) becomes (N, cout, H / stride, W / stride), rounded up.

    BatchNorm keeps torch's momentum of 0.1. With torchvision's 0.01 for MobileNetV3, the running
    statistics lag hundreds of steps behind the weights, which is too slow for a short run.
    """
    layers = [nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
              nn.BatchNorm2d(cout, eps)]
    if act is not None:
        layers.append(act(inplace=True))
    return nn.Sequential(*layers)

def shortcut_conv(cin, cout, stride):
    """A ResNet's shortcut: nothing (Identity) if the block keeps the shape, else a 1x1 convolution
    that changes channels and size as the block does."""
    if stride == 1 and cin == cout:
        return nn.Identity()
    return conv_bn(cin, cout, 1, stride)

class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016): ResNet-18 and -34."""
    expansion = 1

    def __init__(self, cin, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut_conv(cin, width, stride)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y))
        return y.add_(self.downsample(x)).relu_()

class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut: ResNet-50, with its stride on the 3x3."""
    expansion = 4

    def __init__(self, cin, width, stride):
        super().__init__()
        cout = self.expansion * width
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, cout, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout)
        self.downsample = shortcut_conv(cin, cout, stride)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        y = self.bn3(self.conv3(y))
        return y.add_(self.downsample(x)).relu_()

class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from all channels' means (Hu et al. 2018)."""

    def __init__(self, channels, squeeze, act, gate):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.act = act()
        self.gate = gate()

    def forward(self, x):
        scale = x.mean((2, 3), keepdim=True)
        scale = self.fc2(self.act(self.fc1(scale)))
        return x * self.gate(scale)

class InvertedResidual(nn.Module):
    """A 1x1 convolution to `expanded` channels (none, if there are as many already), a depthwise
    one of `kernel` x `kernel`, squeeze-excitation, a 1x1 convolution to `cout` channels, and a
    shortcut if the shape stays.

    MobileNetV3's block and, with SiLU, EfficientNet's MBConv (without stochastic depth).
    `squeeze` is the number of channels inside the squeeze-excitation; 0 means that there is none.
    """

    def __init__(self, cin, expanded, cout, kernel, stride, squeeze, act, se_act, se_gate, eps):
        super().__init__()
        layers = []
        if expanded != cin:
            layers.append(conv_bn(cin, expanded, 1, act=act, eps=eps))
        depthwise = conv_bn(expanded, expanded, kernel, stride, groups=expanded, act=act, eps=eps)
        layers.append(depthwise)
        if squeeze > 0:
            layers.append(SqueezeExcitation(expanded, squeeze, se_act, se_gate))
        layers.append(conv_bn(expanded, cout, 1, eps=eps))
        self.block = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and cin == cout

    def forward(self, x):
        if self.has_shortcut:
            return x + self.block(x)
        return self.block(x)

# ------------------------------------------------------------------------------------- 2. networks
# Each takes images (N, 3, H, W) and returns features (N, dim). `small` asks for the stem for small
# images: see `build`.

class ResNet(nn.Module):
    def __init__(self, block, layers, small):
        super().__init__()
        if small:
            self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.bn1 = nn.BatchNorm2d(64)
        self.dim = 64  # `stage` raises it to the channels of its result
        self.layer1 = self.stage(block, 64, layers[0], stride=1)
        self.layer2 = self.stage(block, 128, layers[1], stride=2)
        self.layer3 = self.stage(block, 256, layers[2], stride=2)
        self.layer4 = self.stage(block, 512, layers[3], stride=2)

    def stage(self, block, width, count, stride):
        blocks = []
        for _ in range(count):
            blocks.append(block(self.dim, width, stride))
            self.dim = width * block.expansion
            stride = 1  # after the first block
        return nn.Sequential(*blocks)

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu_())
        x = self.layer2(self.layer1(x))
        x = self.layer4(self.layer3(x))
        return x.mean((2, 3))

class MobileNetV3(nn.Module):
    def __init__(self, rows, dim, small):
        super().__init__()
        eps = 0.001
        cin = 16
        stride = 1 if small else 2
        layers = [conv_bn(3, cin, 3, stride, act=nn.Hardswish, eps=eps)]
        for kernel, expanded, cout, squeeze, act, stride in rows:
            layers.append(InvertedResidual(cin, expanded, cout, kernel, stride, squeeze, act,
                                           se_act=nn.ReLU, se_gate=nn.Hardsigmoid, eps=eps))
            cin = cout
        layers.append(conv_bn(cin, 6 * cin, 1, act=nn.Hardswish, eps=eps))
        self.features = nn.Sequential(*layers)
        # called as in torchvision, where the classifier proper, a last Linear, follows in it
        self.classifier = nn.Sequential(nn.Linear(6 * cin, dim), nn.Hardswish(inplace=True))
        self.dim = dim

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))

class EfficientNet(nn.Module):
    def __init__(self, rows, depth, small):
        super().__init__()
        cin = 32
        stride = 1 if small else 2
        layers = [conv_bn(3, cin, 3, stride, act=nn.SiLU)]
        for expand, kernel, stride, cout, count in rows:
            blocks = []
            for _ in range(math.ceil(count * depth)):
                blocks.append(InvertedResidual(cin, cin * expand, cout, kernel, stride, cin // 4,
                                               act=nn.SiLU, se_act=nn.SiLU, se_gate=nn.Sigmoid,
                                               eps=1e-5))
                cin = cout
                stride = 1  # after the first block of a row
            layers.append(nn.Sequential(*blocks))
        layers.append(conv_bn(cin, 4 * cin, 1, act=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.dim = 4 * cin

    def forward(self, x):
        return self.features(x).mean((2, 3))

HS, RE = nn.Hardswish, nn.ReLU
# Howard et al. 2019, tables 1 and 2: kernel, expanded width, channels out, channels inside the
# squeeze-excitation (a quarter of the expanded width, as a multiple of 8; 0: none), activation,
# stride
MOBILENETV3_LARGE = [
    (3, 16, 16, 0, RE, 1),
    (3, 64, 24, 0, RE, 2), (3, 72, 24, 0, RE, 1),
    (5, 72, 40, 24, RE, 2), (5, 120, 40, 32, RE, 1), (5, 120, 40, 32, RE, 1),
    (3, 240, 80, 0, HS, 2), (3, 200, 80, 0, HS, 1),
    (3, 184, 80, 0, HS, 1), (3, 184, 80, 0, HS, 1),
    (3, 480, 112, 120, HS, 1), (3, 672, 112, 168, HS, 1),
    (5, 672, 160, 168, HS, 2), (5, 960, 160, 240, HS, 1), (5, 960, 160, 240, HS, 1)]
MOBILENETV3_SMALL = [
    (3, 16, 16, 8, RE, 2),
    (3, 72, 24, 0, RE, 2), (3, 88, 24, 0, RE, 1),
    (5, 96, 40, 24, HS, 2), (5, 240, 40, 64, HS, 1), (5, 240, 40, 64, HS, 1),
    (5, 120, 48, 32, HS, 1), (5, 144, 48, 40, HS, 1),
    (5, 288, 96, 72, HS, 2), (5, 576, 96, 144, HS, 1), (5, 576, 96, 144, HS, 1)]

# Tan & Le 2019, table 1: expansion, kernel, stride, channels out, blocks
EFFICIENTNET = [(1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3),
                (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)]

# What is still open in each is `small`, the stem. mobilenetv3 is the Large one. EfficientNet-B1 has
# 1.1 times as many blocks in a row as B0, rounded up.
ARCHS = {
    "resnet18": partial(ResNet, BasicBlock, [2, 2, 2, 2]),
    "resnet34": partial(ResNet, BasicBlock, [3, 4, 6, 3]),
    "resnet50": partial(ResNet, Bottleneck, [3, 4, 6, 3]),
    "mobilenetv3": partial(MobileNetV3, MOBILENETV3_LARGE, 1280),
    "mobilenetv3_small": partial(MobileNetV3, MOBILENETV3_SMALL, 1024),
    "efficientnet_b0": partial(EfficientNet, EFFICIENTNET, 1.0),
    "efficientnet_b1": partial(EfficientNet, EFFICIENTNET, 1.1),
}

STEMS = ("imagenet", "small")

def build(arch, stem="imagenet"):
    """A randomly initialized network: (N, 3, H, W) -> (N, net.dim), its pre-logits feature.

    `arch` is a name in ARCHS. The stem "small" is for small images (He et al. 2016, section 4.2):
    the first convolution has stride 1, and in ResNets it is 3x3 and no max-pool follows. An image
    of 32 pixels then ends in a map of 4x4 (ResNets) or 2x2 (the others) instead of 1x1, which takes
    16 or 4 times the arithmetic. Raises KeyError for an unknown name.
    """
    return initialize(ARCHS[arch](small=(stem == "small")))

def initialize(module):
    """Draw the weights of convolutions (fan out) and Linears (fan in) as He et al. 2015 propose,
    and set biases to zero, in place.

    torchvision draws the Linear of its MobileNetV3 with a deviation of 0.01. That makes the feature
    so small that all embeddings start alike, and hundreds of steps are needed to tell them apart.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            mode = "fan_out" if isinstance(layer, nn.Conv2d) else "fan_in"
            nn.init.kaiming_normal_(layer.weight, mode=mode)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module

def start_as_identity(net):
    """Zero the weight of the last BatchNorm in each block that has a shortcut, in place (Goyal et
    al. 2017, section 5.1). At first each such block is its shortcut alone, so a deep network starts
    as a shallow one."""
    for block in net.modules():
        if isinstance(block, BasicBlock):
            nn.init.zeros_(block.bn2.weight)
        elif isinstance(block, Bottleneck):
            nn.init.zeros_(block.bn3.weight)
        elif isinstance(block, InvertedResidual) and block.has_shortcut:
            nn.init.zeros_(block.block[-1][1].weight)

HEADS = dict(linear=[], simple=[1], wide=[2], deep=[1, 1])  # hidden widths, in units of net.dim

def make_head(kind, d, c=128):
    """Projection head (N, d) -> (N, c), thrown away after pretraining (Shi et al. 2022, section 4).

    The widths of its Linears, with a ReLU between each two: linear d-c; simple d-d-c (MoCo v2);
    wide d-2d-c (their choice for small networks); deep d-d-d-c.
    """
    layers = []
    width = d
    for factor in HEADS[kind]:
        layers += [nn.Linear(width, factor * d), nn.ReLU(inplace=True)]
        width = factor * d
    layers.append(nn.Linear(width, c))
    head = initialize(nn.Sequential(*layers))
    # The output will be normalized to length one, which divides the gradient of this Linear by the
    # length before. At four times the length it learns more slowly, about as the backbone does. The
    # backbone's own gradient stays the same: a quarter of it comes back through weights 4 times as
    # large.
    with torch.no_grad():
        head[-1].weight *= 4
    return head

def last_linear(arch):
    """torchvision's name of the classifier, the last Linear, which the networks here do without."""
    if arch.startswith("resnet"):
        return "fc"
    return "classifier.3" if arch.startswith("mobilenet") else "classifier.1"

# -------------------------------------------------------------------------- 3. small maps on a CPU
#
# The last maps of small images are 1x1 and 2x2. There most of a 3x3 kernel lies on the padding, and
# the CPU's convolutions, which are made for large maps, are slow. On a 2x2 map, the kernel of
# output (0, 0) meets the map with its four lower right taps, that of output (1, 1) with its four
# upper left ones:
#
#     . . .     . . .     . x x     x x .        x: a tap that meets the map
#     . x x     x x .     . x x     x x .        .: a tap that meets padding
#     . x x     x x .     . . .     . . .
#     (0, 0)    (0, 1)    (1, 0)    (1, 1)

def speed_up_small_maps(net):
    """Make the convolutions of a network of this file fast on small maps, in place: they get the
    forward passes of the classes below, whose results are the same up to rounding. These count on
    square odd kernels, "same" padding, and depthwise convolutions without a bias."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = DenseOfSmallMaps if layer.groups == 1 else DepthwiseOfSmallMaps

class DenseOfSmallMaps(nn.Conv2d):
    """On a 1x1 map, or a 2x2 map under a 3x3 kernel, the convolution is one matrix product. Its
    matrix holds, for each output, the taps that meet the map. Other maps take the usual way."""

    def forward(self, x):
        kernel = self.kernel_size[0]
        stride = self.stride[0]
        if kernel == 1 and max(x.shape[2:]) <= stride:
            x = x[:, :, :1, :1]  # a strided 1x1 kernel reads no other pixel
        h, w = x.shape[2:]
        if not (h == w == 1 or (h == w == 2 and kernel == 3)):
            return super().forward(x)
        outputs = range(0, h, stride)
        weight = self.weight.permute(0, 2, 3, 1)  # (C', k, k, C), as channels_last keeps it
        taps = []
        for i in outputs:
            for j in outputs:
                # row r of the map meets row top + r of the kernel
                top = kernel // 2 - i
                left = kernel // 2 - j
                taps.append(weight[:, top:top + h, left:left + w].flatten(1))
        bias = None if self.bias is None else self.bias.repeat(len(taps))
        y = F.linear(x.permute(0, 2, 3, 1).flatten(1), torch.cat(taps), bias)
        return y.view(len(x), len(outputs), len(outputs), -1).permute(0, 3, 1, 2)  # channels_last

class DepthwiseOfSmallMaps(nn.Conv2d):
    """A kernel for each channel. On maps smaller than the kernel, taps that meet only padding are
    cut off the kernel, and what is left of the padding is added to the map before the convolution.
    If the convolution added it, oneDNN (PyTorch's library on CPUs) would compute the gradient of
    the weights in a slow way. At 32 pixels, that took half of a step of MobileNetV3-Small. Larger
    maps take the usual way, which is fast for them."""

    def forward(self, x):
        kernel = self.kernel_size[0]
        side = max(x.shape[2:])
        if side >= kernel:
            return super().forward(x)
        pad = min(kernel // 2, side - 1)  # farther out, a tap meets no pixel of the map
        cut = kernel // 2 - pad
        weight = self.weight[:, :, cut:kernel - cut, cut:kernel - cut]
        if pad == 0:  # a 1x1 map meets one tap
            return x * weight.to(x.dtype).transpose(0, 1)
        return F.conv2d(F.pad(x, (pad, pad, pad, pad)), weight, stride=self.stride,
                        groups=self.groups)
