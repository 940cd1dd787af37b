"""The prices of assumptions: how unlikely each thing is that names and shapes do not say.

A candidate costs the sum of the prices of its assumptions, and the cheapest is tried first. 0 is what most published
networks do, about 0.3 a common alternative, about 1 a rare one, 2 and more one that hardly anybody uses. The prices
were set by hand on the networks of tests/checkpoints/networks.py and the `develop` half of tests/checkpoints/corpus.py;
only their order and rough distances matter, since labelled images decide among all candidates that are tried.
"""

from __future__ import annotations

# How many candidates are kept

MAX_CANDIDATES = 200
"""candidates of one file, for a caller tries each of them on labelled images"""
MAX_CANDIDATES_LARGE = 6
"""the same for a network of more than LARGE_NETWORK parameters"""
LARGE_NETWORK = 20_000_000
MAX_EXTRA_COST = 5.0
"""how much more than the cheapest a candidate may cost"""
MAX_EXTRA_COST_NAMED = 1.5
"""the same, where names and shapes are those of a registered network, which is then almost certain"""

# Activations: ReLU unless something says otherwise. The order is the order in which they are tried.

ACTIVATIONS = {
    "ReLU": 0.0,
    "SiLU": 1.5, "GELU": 1.5, "tanh": 1.5,  # SiLU in robust WRNs, GELU since transformers, tanh in small old networks
    "LeakyReLU 0.01": 1.6, "LeakyReLU 0.1": 1.6, "LeakyReLU 0.2": 1.6,  # torch's default, darknet's, GANs'
    "ELU": 1.7, "sigmoid": 1.7,
    "softplus": 1.8,  # smooth ReLU of adversarial training
    "Mish": 1.9, "SELU": 1.9, "ReLU6": 1.9, "Hardswish": 1.9, "hardtanh": 1.9, "softsign": 1.9,
}  # fmt: skip

# Chains (sequential.py). Tables are {choice: price}, in the order in which the choices are tried.

CHAIN_STRIDES = {
    "1x1": {1: 0.0, 2: 1.5},  # outside of shortcuts, a 1x1 convolution only mixes channels
    "even": {2: 0.0, 1: 0.8},  # an even kernel is there to halve the image
    "large": {2: 0.2, 1: 0.2, 4: 0.4},  # 7x7 and more: a stem, as ResNet's or AlexNet's
    "odd": {1: 0.0, 2: 0.7},  # 3x3, 5x5: pools make the image smaller
}
CHAIN_STRIDE_OF_KERNEL = 0.4
"""an even kernel above 2 with a stride of its own size: patches that do not overlap"""
CHAIN_PADDINGS = {
    1: {0: 0.0}, 2: {0: 0.0},
    3: {1: 0.0, 0: 0.3},  # VGG keeps the side, small MNIST networks do not pad
    4: {1: 0.0, 0: 0.3, 2: 0.8},
    5: {0: 0.0, 2: 0.2, 1: 1.0},  # LeNet does not pad
}  # fmt: skip
CHAIN_PADDINGS_LARGE = {"half": 0.0, "none": 0.3, "two": 1.0}
"""kernels above 5: half of the kernel, which keeps the side; none; 2, as AlexNet"""
CHAIN_OTHER_PADDING = 0.8
"""another padding than that of the convolution before, of the same kernel"""
CHAIN_OTHER_STRIDE = 0.2
"""another stride than that one's"""
CHAIN_POOLS_UNNUMBERED = {"widening": 0.3, "not widening": 0.9, "strided": 0.7, "3x3": 1.2}
"""names do not say where pools are: a 2x2 pool behind a convolution after which channels grow, or do not; what is added
if the convolution strides already; what is added for a 3x3 pool"""
CHAIN_POOLS_NUMBERED = {0: 1.0, 2: 0.0, 3: 1.0}
"""the numbers of an nn.Sequential leave a gap for a pool: none in it, 2x2, 3x3 with stride 2"""
CHAIN_POOLS_LAST = {0: 0.0, 2: 0.0, 3: 1.0}
"""the same before the first linear layer, where the gap may also hold nn.Flatten, an average or dropout"""
CHAIN_GAP_UNUSED = 1.0
"""that last gap has room for more than is put into it"""
CHAIN_NO_LAST_POOL = 0.4
"""no pool behind the last convolution, though there are pools before"""
CHAIN_GLOBAL_AVERAGE = 0.4
"""an average over the whole image before the first linear layer; 1/8 more for each pixel of a side above
CHAIN_AVERAGED_SIDE, for a larger image would have been pooled before"""
CHAIN_AVERAGED_SIDE = {"with shortcuts": 4, "without": 8}
CHAIN_PARTIAL_AVERAGE = 2.0
"""an average to a side that divides the image's; 1/8 more for each unit of the ratio"""
CHAIN_ADAPTIVE_AVERAGE = 2.5
"""an image that grows to a side of CHAIN_ADAPTIVE_SIDES: torchvision's AlexNet and VGG on small images"""
CHAIN_ADAPTIVE_SIDES = (6, 7)
CHAIN_GLOBAL_MAXIMUM = {"with shortcuts": -0.1, "without": 1.2}
"""the maximum instead of the average over the whole image, of MAX_SIDE_FOR_MAXIMUM at most; ResNet-9 takes the
maximum"""
MAX_SIDE_FOR_MAXIMUM = 8
CHAIN_AVERAGE_POOLS = 1.2
"""average pools instead of max-pools"""

# Residual networks (residual.py)

RESIDUAL_LIKE_CHAIN = 3.0
"""no shortcut has layers and convolutions have numbers for names: rather the pieces of an nn.Sequential"""
RESIDUAL_PREACT_WITHOUT_NORM = 0.6
"""pre-activation without a BatchNorm behind the last block: rather post-activation, where nothing tells the two
apart"""
RESIDUAL_STEMS_LARGE = {(2, True): 0.0, (1, False): 1.2, (2, False): 1.5}
"""(stride, max-pool) of a stem of 7x7 or more, as for ImageNet"""
RESIDUAL_STEMS_SMALL = {(1, False): 0.0, (2, False): 1.0, (1, True): 2.0}
"""the same of a smaller stem, as for CIFAR"""
RESIDUAL_OTHER_STRIDE = 1.0
"""each block whose stride is not the usual one: 1 in the first that may have one, 2 in all others"""
RESIDUAL_AVERAGED_BEFORE_FLATTEN = 2.5
"""the image is averaged to the side at which it is flattened, though strides could have led there"""
RESIDUAL_ODD_SHORTCUT = 1.0
"""convolutions in the shortcuts of a pre-activation network take the raw input, though most take the activated one; in
networks with biases the other way round, for the much copied implementation that has biases takes the raw one"""
RESIDUAL_ZEROS_LAST = 1.0
"""zero channels of parameter-free shortcuts all behind the others; He et al.'s copies put half on either side"""
RESIDUAL_STRIDED_CONV_BOTTLENECK = {1: 0.0, 0: 1.1}
"""which convolution of a bottleneck strides: torchvision's second, or the first as in the paper"""
RESIDUAL_STRIDED_CONV_BIASED = {1: 0.0, 0: 0.7}
"""the same in pre-activation blocks with biases"""
RESIDUAL_STRIDED_CONV = {0: 0.0}
"""the same in all others"""
RESIDUAL_SAME_PADDING = {False: 0.0, True: 2.5}
"""whether a pre-activation network pads as TensorFlow's SAME"""
RESIDUAL_SAME_PADDING_HAIKU = {False: 0.3, True: 0.0}
"""the same where names are Haiku's, as in DeepMind's networks"""
