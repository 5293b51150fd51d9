"""Training objectives. LOSSES holds those of denoisers, SEGMENTATION_LOSSES those of segmenters, by the names
used on the command line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import anatomy
import stage
from autoencoders import AUTOENCODER_WINDOW, Encoded
from dataset import window_hu
from lesions import UNKNOWN_KIND
from weights import freeze, load_weights, read_weights

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

LESION_WEIGHT = 10.0  # of the lesion mask's own MSE, as the paper on simulated low dose for stroke has it


def mse_loss(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    """Mean squared error in HU^2. output, target: (B, 1, H, W) HU."""
    return F.mse_loss(output, target)


def rmse_loss(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    """Root mean squared error of each slice in HU, then the mean over slices.

    Under MSE the few slices of the lowest dose own the gradient; here every dose counts for what it is."""
    return ((output - target).square().mean(dim=(1, 2, 3)) + 1e-6).sqrt().mean()


def lesion_mse_loss(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """MSE plus LESION_WEIGHT x the MSE over the lesion's own pixels, in HU^2; without lesion plain MSE.

    mask: (B, 1, H, W), above 0 inside a lesion. Raises ValueError where the data have no masks."""
    if mask is None:
        raise ValueError("--loss lesion-mse: these data have no lesion masks (choose mse or rmse)")
    squared = (output - target).square()
    inside = mask > 0
    if not inside.any():
        return squared.mean()
    return squared.mean() + LESION_WEIGHT * squared[inside].mean()


def l1_loss(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    """Mean absolute error in HU."""
    return F.l1_loss(output, target)


CHARBONNIER_HU = 1.0  # below the noise of any dose: from there on the error counts as it is, and not squared


def charbonnier_loss(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG001
    """sqrt(error^2 + CHARBONNIER_HU^2) - CHARBONNIER_HU in HU, the smooth absolute error.

    Source: Charbonnier et al. 1994."""
    smooth = ((output - target).square() + CHARBONNIER_HU**2).sqrt()
    return (smooth - CHARBONNIER_HU).mean()


def reconstruction_loss(
    output: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    error: Loss = l1_loss,
    alpha: float = 0.5,
    window: Sequence[float] = AUTOENCODER_WINDOW,
) -> torch.Tensor:
    """L1 + alpha (1 - SSIM), both over the window (centre, width in HU): the first in units of half its
    width, as the networks of the anatomy-aware system see it.

    It is the loss of the teacher, and a term of the student's; as an objective by name it has the window of
    2000 HU, whatever the network's. error: another loss in HU in place of L1."""
    similar = ssim(scaled(output, window), scaled(target, window))
    return error(output, target, mask) / (window[1] / 2) + alpha * (1 - similar)


# ---------------------------------------------------------------- anatomy in the loss

# A stroke is read in brain and CSF. Soft tissue outside the skull and bone only have to look right, and hold
# the largest errors, at their edges; air is most of the picture.
TISSUE_WEIGHTS = {"brain": 1.0, "csf": 1.0, "skin": 0.25, "bone": 0.25, "air": 0.05}


def tissue_weighted_loss(
    output: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    tissues: torch.Tensor | None = None,
    weights: Mapping[str, float] = TISSUE_WEIGHTS,
) -> torch.Tensor:
    """Root of the tissue-weighted mean squared error of each slice in HU, then the mean over slices.

    tissues: (B, 1, H, W) classes of anatomy.TISSUES; best those of anatomy.tissue_classes on the whole volume
    (or tissue_map), cropped as the slices were. Without them the target's HU decide alone (tissues_by_hu),
    which takes a muscle for brain. mask: (B, 1, H, W), above 0 inside a lesion, which counts LESION_WEIGHT
    times as much as the brain; None where the data have no masks."""
    tissues = tissues_by_hu(target) if tissues is None else tissues
    table = torch.tensor([weights[name] for name in sorted(anatomy.TISSUES, key=anatomy.TISSUES.get)])
    weight = table.to(target)[tissues.long()]
    if mask is not None:
        weight = torch.where(mask > 0, LESION_WEIGHT * weights["brain"], weight)
    squared = (weight * (output - target).square()).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))
    return (squared + 1e-6).sqrt().mean()


SHRINK_PX = 32  # a mean over a handful of pixels is mostly noise: it counts as if so many more had no error


def tissue_bias(output: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Sum over brain, CSF and each kind of lesion of the absolute mean error in a slice, in HU, then the mean
    over slices.

    What is nearest in the mean square draws thin sulci and thin bleeds towards what surrounds them, and the
    more so the less dose there is; this term asks for their mean HU. Tissues are those of the target's HU
    (tissues_by_hu): where these are noisy, noise decides at the limit of two tissues, and what it sorted out
    is no error of the output. mask: (B, 1, H, W) lesion classes, or None where the data have none."""
    tissues = tissues_by_hu(target)
    free = torch.ones_like(tissues, dtype=torch.bool) if mask is None else mask == 0
    places = [free & (tissues == anatomy.TISSUES[name]) for name in ("brain", "csf")]
    if mask is not None:
        places += [mask == kind for kind in (*range(1, len(anatomy.LESION_CLASSES) + 1), UNKNOWN_KIND)]
    place = torch.cat(places, dim=1)
    error = ((output - target).float() * place).sum(dim=(2, 3))
    return (error / (place.sum(dim=(2, 3)) + SHRINK_PX)).abs().sum(dim=1).mean()


def tissues_by_hu(hu: torch.Tensor) -> torch.Tensor:
    """anatomy.TISSUES from HU alone, on the device of hu and for crops as well: (B, 1, H, W) uint8.

    Means over 3 x 3 pixels decide, so that the noise of a routine scan does not. What is soft and leaner than
    fat counts as brain or CSF wherever it lies: only tissue_map knows the skull."""
    smooth = F.avg_pool2d(F.pad(hu, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    steps = (
        ("skin", anatomy.HEAD_HU),
        ("csf", anatomy.BRAIN_HU[0]),
        ("brain", anatomy.CSF_HU),
        ("bone", anatomy.BONE_HU),
    )
    classes = torch.full_like(hu, anatomy.TISSUES["air"], dtype=torch.uint8)
    for name, lowest_hu in steps:
        classes = classes.masked_fill(smooth > lowest_hu, anatomy.TISSUES[name])
    return classes


def tissue_map(hu: torch.Tensor, pixel_mm: float) -> torch.Tensor:
    """anatomy.tissue_classes of whole slices, each by itself: (B, 1, H, W) HU -> (B, 1, H, W) uint8.

    About 5 ms per slice of 128 x 128 on a CPU core. A crop has no closed skull, hence no brain for it."""
    spacing_mm = (1.0, pixel_mm, pixel_mm)  # the first does not matter for a single slice
    slices = hu.detach().cpu().numpy()
    classes = [anatomy.tissue_classes(image, spacing_mm) for image in slices]
    return torch.from_numpy(np.stack(classes)).to(hu.device)


# ---------------------------------------------------------------- terms of the anatomy-aware system


def scaled(hu: torch.Tensor, window: Sequence[float] = AUTOENCODER_WINDOW) -> torch.Tensor:
    """HU -> 0..1 over the window, -1000..1000 HU if none is given, going on above and below it."""
    return window_hu(hu, *window, clip=False)


SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # Wang et al. 2004, for a range of 1
SSIM_SIGMA_PX, SSIM_REACH_PX = 1.5, 5  # Wang et al. 2004: 11 x 11 pixels
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, from fine to coarse


def _gaussian_means(side: int, like: torch.Tensor) -> torch.Tensor:
    """(side, side) matrix of local means; at the border only pixels inside count.

    As matrices these sums are 40 times as fast on a CPU as a convolution of one channel."""
    place = torch.arange(side, device=like.device, dtype=like.dtype)
    distance = (place[:, None] - place).abs()
    weight = torch.exp(-0.5 * (distance / SSIM_SIGMA_PX) ** 2) * (distance <= SSIM_REACH_PX)
    return weight / weight.sum(dim=1, keepdim=True)


def ssim_maps(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SSIM and its contrast-structure part around each pixel, of images with a range of 1: (B, 1, H, W) each.

    Source: Wang et al. 2004, Gaussian windows; those at the border are cut off there."""
    with torch.autocast(output.device.type, enabled=False):  # variances are small differences
        output, target = output.float(), target.float()
        down, across = (_gaussian_means(side, output) for side in output.shape[-2:])
        maps = torch.stack([output, target, output * output, target * target, output * target])
        mean, mean_target, square, square_target, product = (down @ maps @ across.T).unbind()
        covariance = product - mean * mean_target
        variances = (square - mean**2) + (square_target - mean_target**2)
        contrast = (2 * covariance + SSIM_C2) / (variances + SSIM_C2)
        luminance = (2 * mean * mean_target + SSIM_C1) / (mean**2 + mean_target**2 + SSIM_C1)
        return luminance * contrast, contrast


def ssim(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean SSIM of images with a range of 1, differentiable. output, target: (B, 1, H, W) of any size."""
    return ssim_maps(output, target)[0].mean()


def ms_ssim(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean multi-scale SSIM of images with a range of 1, differentiable.

    Up to five scales, as many as leave 11 pixels a side, with weights that sum to 1. What is anticorrelated
    at a scale counts as almost 0, since a negative number has no such power. Source: Wang et al. 2003."""
    fits = min(output.shape[-2:]) // (2 * SSIM_REACH_PX + 1)  # halved once for each further scale
    exponents = MS_SSIM_WEIGHTS[: max(fits.bit_length(), 1)]
    product = 1.0
    for scale, exponent in enumerate(exponents):
        if scale:
            output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
        whole, contrast = ssim_maps(output, target)
        part = (whole if scale == len(exponents) - 1 else contrast).mean(dim=(1, 2, 3))
        product = product * part.clamp_min(1e-4) ** (exponent / sum(exponents))
    return product.mean()


def gradient_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the Sobel gradients, along rows and columns, per pixel of distance.

    The outermost pixels, whose gradient is unknown, do not count. Sides of 3 pixels at least."""
    sobel = torch.tensor([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]], device=output.device) / 8
    kernels = torch.stack([sobel, sobel.T])[:, None]
    return F.conv2d((output - target).float(), kernels).abs().mean()  # a gradient is linear


def distillation_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over feature maps of their mean squared difference; the teacher's are constants."""
    pairs = zip(student, teacher, strict=True)
    return sum(F.mse_loss(one.float(), other.detach().float()) for one, other in pairs)


def perceptual_loss(network: nn.Module, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum over a network's feature maps of their mean squared difference. output, target: (B, 1, H, W) HU."""
    with torch.no_grad():
        wanted = network(target)
    return distillation_loss(network(output), wanted)


class AnatomyAwareLoss(nn.Module):
    """What the student of the anatomy-aware system learns by:

        lam_lat MSE(z_s, z_t) + lam_rec [L1 + alpha (1 - SSIM)] + b1 Sobel-gradient L1 + b2 (1 - MS-SSIM)
        + g1 perceptual + w_d sum over four feature maps of MSE(f_s, f_t)

    all over the window (centre, width in HU) of the two networks as -1..1, save the perceptual term, whose
    network has its own. Beyond a narrow window the student passes on what comes, noise and all: that part of
    SSIM, MS-SSIM and gradients stays what it is. A term of weight 0 is not computed. perceptual: a network of
    PERCEPTUAL. error: a loss in HU that stands for L1.
    Raises ValueError if g1 is not 0 and there is none, or all weights are 0.
    Source: "Anatomy-Aware CT Scan Denoising"; it takes w_d 0.5 with RadImageNet, and alpha 0.2 for the
    Baseline AE."""

    def __init__(
        self,
        perceptual: nn.Module | None = None,
        window: Sequence[float] = AUTOENCODER_WINDOW,
        error: Loss = l1_loss,
        *,
        lam_lat: float = 1.0,
        lam_rec: float = 1.0,
        alpha: float = 0.5,
        b1: float = 0.1,
        b2: float = 0.1,
        g1: float = 0.1,
        w_d: float = 1.0,
    ) -> None:
        super().__init__()
        if g1 and perceptual is None:
            raise ValueError(f"g1 {g1:g}: the perceptual term needs a network (vgg19, radimagenet, or g1 0)")
        self.perceptual, self.window = perceptual, tuple(window)
        self.reconstruction = functools.partial(
            reconstruction_loss, error=error, alpha=alpha, window=self.window
        )
        self.weights = {
            "latent": lam_lat,
            "reconstruction": lam_rec,
            "gradient": b1,
            "ms_ssim": b2,
            "perceptual": g1,
            "features": w_d,
        }
        if not any(self.weights.values()):
            raise ValueError("all weights are 0: the student would learn nothing (give one another value)")

    def terms(
        self,
        student: Encoded,
        teacher: tuple[torch.Tensor, Sequence[torch.Tensor]],
        target: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The terms whose weight is not 0, before weighting. Arguments as for forward."""
        latent, features = teacher
        seen, wanted = scaled(student.output, self.window), scaled(target, self.window)
        compute = {
            "latent": lambda: distillation_loss([student.latent], [latent]),
            "reconstruction": lambda: self.reconstruction(student.output, target, mask),
            "gradient": lambda: gradient_loss(2 * seen, 2 * wanted),
            "ms_ssim": lambda: 1 - ms_ssim(seen, wanted),
            "perceptual": lambda: perceptual_loss(self.perceptual, student.output, target),
            "features": lambda: distillation_loss(student.features, features),
        }
        return {name: compute[name]() for name, weight in self.weights.items() if weight}

    def forward(
        self,
        student: Encoded,
        teacher: tuple[torch.Tensor, Sequence[torch.Tensor]],
        target: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """student: of its network on the low dose. teacher: (latent, features), encode() of the full dose.
        target: (B, 1, H, W) HU. mask: of its lesions, for an error that asks for them."""
        return self.total(self.terms(student, teacher, target, mask))

    def total(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of what `terms` gave."""
        return sum(self.weights[name] * term for name, term in terms.items())


# ---------------------------------------------------------------- perceptual networks

IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what torchvision's weights expect


class VGG19Features(nn.Module):
    """The last activation before VGG-19's fifth pooling. (B, 1, H, W) HU, sides of 16 at least -> one map.

    weights: a file with torchvision's keys `features.*` (None: torchvision's ImageNet weights, downloaded
    once and kept under TORCH_HOME). Raises InputError if they do not fit, or cannot be downloaded."""

    LAYERS = 36

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        from torchvision.models import VGG19_Weights, vgg

        if weights is None:
            try:
                state = VGG19_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
            except (OSError, RuntimeError) as error:  # no connection; a damaged download
                raise stage.InputError(
                    f"vgg19: its weights cannot be downloaded, {error} (give them as a file)"
                ) from None
        else:
            state = read_weights(weights)
        source = weights or "vgg19"
        state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
        layers = vgg.make_layers(vgg.cfgs["E"], batch_norm=False)
        load_weights(nn.ModuleDict({"features": layers}), state, source)
        self.layers = layers[: self.LAYERS]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("sd", torch.tensor(IMAGENET_SD)[:, None, None])
        freeze(self)

    def forward(self, hu: torch.Tensor) -> list[torch.Tensor]:
        return [self.layers((scaled(hu) - self.mean) / self.sd)]


# Where the public file has torchvision's modules: it was saved from a Sequential of ResNet-50's children
RADIMAGENET_NAMES = {
    "backbone.0": "conv1",
    "backbone.1": "bn1",
    "backbone.4": "layer1",
    "backbone.5": "layer2",
    "backbone.6": "layer3",
    "backbone.7": "layer4",
}


class RadImageNetFeatures(nn.Module):
    """Layers 1 to 3 of RadImageNet's ResNet-50. (B, 1, H, W) HU -> three maps.

    weights: the public file, with keys `backbone.*`. Raises InputError without it, or if they do not fit.
    Source: Mei et al. 2022."""

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        from torchvision.models import resnet50

        if weights is None:
            raise stage.InputError(
                "radimagenet: needs its weights as a file (ResNet50.pt from github.com/BMEII-AI/RadImageNet)"
            )
        state = {}
        for key, value in read_weights(weights).items():
            place = ".".join(key.split(".")[:2])
            state[RADIMAGENET_NAMES.get(place, place) + key[len(place) :]] = value
        network = resnet50(weights=None)
        network.fc = nn.Identity()
        for key, value in network.state_dict().items():
            if key.endswith("num_batches_tracked"):  # a counter that eval mode does not read
                state.setdefault(key, value)
        load_weights(network, state, weights)
        self.stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        self.layers = nn.ModuleList([network.layer1, network.layer2, network.layer3])
        freeze(self)

    def forward(self, hu: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(
            (scaled(hu) * 2 - 1).expand(-1, 3, -1, -1)
        )  # -1..1 in three channels, as it was trained
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps


PERCEPTUAL: dict[str, Callable[[Path | None], nn.Module]] = {
    "vgg19": VGG19Features,
    "radimagenet": RadImageNetFeatures,
}

# ---------------------------------------------------------------- classifiers


def masked_bce_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    pos_weight: torch.Tensor | None = None,
    *,
    weights: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Binary cross-entropy over the known targets. logits, targets: (B, classes), NaN where unknown.

    pos_weight: (classes,) of positives. weights: (classes,) of classes. smoothing: 1 and 0 become
    1 - smoothing / 2 and smoothing / 2. Returns 0, still attached to the network, if nothing is known."""
    known = (~targets.isnan()).float()
    if weights is not None:
        known = known * weights
    wanted = targets.nan_to_num() * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=pos_weight, reduction="none")
    return (losses * known).sum() / known.sum().clamp_min(1e-6)


def masked_cross_entropy_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    pos_weight: torch.Tensor | None = None,
    *,
    weights: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of classes of which one is true. logits, targets: (B, classes), 1 for it and NaN where
    unknown.

    Arguments as for masked_bce_loss; pos_weight weighs the slices of each class."""
    known = ~targets.isnan().any(1)
    wanted = targets.nan_to_num() * (1 - smoothing) + smoothing / targets.shape[1]
    share = known.float()
    for factor in (pos_weight, weights):
        if factor is not None:
            share = share * (targets.nan_to_num() @ factor)
    losses = -(wanted * logits.log_softmax(1)).sum(1)
    return (losses * share).sum() / share.sum().clamp_min(1e-6)


# ---------------------------------------------------------------- segmentation

SMOOTH_PX = 1.0  # Dice as if one pixel more were hit: steady where a lesion has a few pixels
FOCAL_GAMMA = 2.0  # Lin et al. 2017: the best on COCO
TVERSKY = (0.3, 0.7)  # weights of false and of missed pixels. Source: Salehi et al. 2017


class _Pixels(NamedTuple):
    """What a network says of each pixel, and what is true. N counts "no lesion" and the classes."""

    log_probabilities: torch.Tensor  # (B, N, H, W)
    wanted: torch.Tensor  # (B, N, H, W), 1 for what is true
    known: torch.Tensor  # (B, H, W), 0 where nothing is


def _pixels(logits: torch.Tensor, mask: torch.Tensor) -> _Pixels:
    """Of a binary network every lesion is lesion; of a network of classes UNKNOWN_KIND is not known."""
    logits, mask = logits.float(), mask[:, 0].long()
    if logits.shape[1] == 1:
        log_probabilities = torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=1)
        return _Pixels(log_probabilities, F.one_hot((mask > 0).long(), 2).movedim(-1, 1), mask >= 0)
    known = mask != UNKNOWN_KIND
    wanted = F.one_hot(mask * known, logits.shape[1]).movedim(-1, 1)
    return _Pixels(logits.log_softmax(1), wanted, known)


def _cross_entropy(pixels: _Pixels, gamma: float = 0.0) -> torch.Tensor:
    """(B,) means over the known pixels of -(1 - p)^gamma log p, p being that of what is true."""
    log_p = (pixels.log_probabilities * pixels.wanted).sum(1)
    if gamma:
        log_p = log_p * (1 - log_p.exp()).clamp_min(0) ** gamma
    return -(log_p * pixels.known).sum((1, 2)) / pixels.known.sum((1, 2)).clamp_min(1)


def _missed_overlap(pixels: _Pixels, false_share: float = 0.5, missed_share: float = 0.5) -> torch.Tensor:
    """(B,) 1 - overlap of each image, where overlap is hits / (hits + shares of false and missed pixels).

    It is the mean over the classes that an image has; with shares of 0.5 it is 1 - Dice. Of an image without
    lesion it is the share of its known pixels that is called lesion. (Smoothing Dice by a pixel would define
    it as well. But then a single pixel costs as much as a whole lesion missed, and networks begin by calling
    nothing lesion: after 350 steps on phantoms the Dice was 0, and 0.35 so.)"""
    known = pixels.known[:, None]
    p, wanted = pixels.log_probabilities.exp()[:, 1:] * known, pixels.wanted[:, 1:] * known
    hits, called, true = (values.sum((2, 3)) for values in (p * wanted, p, wanted))  # (B, classes)
    errors = false_share * (called - hits) + missed_share * (true - hits)
    missed = errors / (hits + errors + SMOOTH_PX / 2)  # half, as Dice's own formula counts hits twice
    there = true > 0
    of_classes = (missed * there).sum(1) / there.sum(1).clamp_min(1)
    of_nothing = called.sum(1) / known.sum((1, 2, 3)).clamp_min(1)
    return torch.where(there.any(1), of_classes, of_nothing)


def bce_dice_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Half the cross-entropy and half of 1 - Dice, both per image, then the mean over images.

    logits: (B, 1, H, W) of any lesion, or (B, 1 + classes, H, W) of none and of each class. mask:
    (B, 1, H, W) uint8, 0 no lesion, then the classes, UNKNOWN_KIND. A binary network learns that the last
    is lesion, a network of classes learns nothing there. Of an image without lesion 1 - Dice is the share of
    pixels called lesion, see _missed_overlap."""
    pixels = _pixels(logits, mask)
    return (0.5 * _cross_entropy(pixels) + 0.5 * _missed_overlap(pixels)).mean()


def focal_loss(logits: torch.Tensor, mask: torch.Tensor, gamma: float = FOCAL_GAMMA) -> torch.Tensor:
    """Cross-entropy in which a pixel counts by how wrong it still is, to the power gamma.

    Arguments as for bce_dice_loss. Source: Lin et al. 2017, eq. 4."""
    return _cross_entropy(_pixels(logits, mask), gamma).mean()


def tversky_loss(
    logits: torch.Tensor,
    mask: torch.Tensor,
    false_share: float = TVERSKY[0],
    missed_share: float = TVERSKY[1],
) -> torch.Tensor:
    """1 - Tversky index per image: Dice that minds missed pixels more than false ones.

    Arguments as for bce_dice_loss. Source: Salehi et al. 2017."""
    return _missed_overlap(_pixels(logits, mask), false_share, missed_share).mean()


# ---------------------------------------------------------------- registries

LOSSES: dict[str, Loss] = {
    "rmse": rmse_loss,
    "mse": mse_loss,
    "lesion-mse": lesion_mse_loss,
    "l1": l1_loss,
    "charbonnier": charbonnier_loss,
    "l1-ssim": reconstruction_loss,
    "tissue-weighted": tissue_weighted_loss,
}
SEGMENTATION_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "bce-dice": bce_dice_loss,
    "focal": focal_loss,
    "tversky": tversky_loss,
}
