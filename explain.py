"""Why a classifier said so: Grad-CAM on an absolute scale, also through a BiLSTM; its scores; its pictures.

Heat is never stretched to a slice's own range: what is dark in one picture and bright in another differs by
what the network made of it, so that a normal slice can stay dark and doses can be compared.

For each position p of a feature map A (C, h, w) and a score y with gradients g = dy/dA, the heat is

    heat[p] = max(0, h w sum_c G[c, p] A[c, p])     G: g, or its mean over the positions (METHODS)

in the unit of the score. Before it is cut off at 0, its mean over the positions is the part of the score that
grows with the slice's feature map (first order). Of a logit, behind the last convolution of a network that
averages and then applies a linear layer, it is exact: the logit less the bias; heat[p] is what that would be
if the whole slice looked as it does at p. In a scan each slice has its own part, and the parts add up."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, stats
from torch import nn

import stage
from dataset import BRAIN_WINDOW
from display import Note, annotate, draw_outlines, enlarge, radiological, to_grey

# Trained ResNet-18, 128 x 128 phantoms with a lesion of 5 ml: the maximum lay inside it in 52 % of slices
# from stride 8, 7 % from 4 (edges only), 42 % from 16 and 21 % from 32, where one position is a whole lobe
STRIDE = 8
FULL_HEAT = 20.0  # nats; there the median maximum was 19 in lesions that were found, 0.5 in true negatives
SLICES_AT_ONCE = 16  # of 256 x 256: under 1 GB of a ResNet-18's activations
OVERLAY_PX = 512  # side of a written picture, in which the notes can be read
PROBE_PX = 64  # side of the slice that shows where a feature map lies: a multiple of every stride

METHODS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "grad-cam": lambda gradients: gradients.mean((2, 3), keepdim=True),  # Selvaraju et al. 2017, eq. 1 and 2
    "hires-cam": lambda gradients: gradients,  # Draelos and Carin 2020, eq. 3
}

SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    # log(1 + exp(logit)), minus the log of the probability that there is none: 0 of what the network rules
    # out, the logit of what it is sure of, and so the logit's heat times the probability. Of logits alone
    # 9 % of the true negatives glowed above the lower quartile of the lesions found; of this none
    "evidence": F.softplus,
    "logit": lambda logits: logits,
}

# ---------------------------------------------------------------- heat


@torch.inference_mode(False)
def grad_cam(
    model: nn.Module,
    hu: torch.Tensor,
    target_class: str | int,
    *,
    stride: int = STRIDE,
    method: str = "grad-cam",
    score: str = "evidence",
    aligned: bool = True,
    batch_size: int = SLICES_AT_ONCE,
) -> np.ndarray:
    """Heat of one class in slices: (N, slices, H, W) HU -> (N, H, W) float32, in nats, 0 and above.

    model: a classifier; it stays as it is, whatever its mode, and is asked in eval mode and float32.
    target_class: its name or number. stride: of the feature map, one of model.cam_layers(). method: one of
    METHODS. score: of what, one of SCORES. aligned: each position lies where its receptive field is centred;
    False: the map is stretched over the slice, as other programs do, which shifts the heat by
    (stride - 1) / 2 pixels in most networks. Raises InputError for a class, stride, method or score that is
    not there. Source: Selvaraju et al. 2017."""
    target = _number_of(model, target_class)
    weigh, scored = _choice("method", method, METHODS), _choice("score", score, SCORES)
    heats = []
    with _watched(model, _layer(model, stride)) as maps:
        for some in hu.split(batch_size):
            maps.clear()
            logits = model(_own(some, model))[:, target]
            heats.append(_heat(scored(logits).sum(), maps, weigh))  # slices are independent in eval mode
    return _laid_out(torch.cat(heats), model, stride, hu.shape[2:], aligned)


@torch.inference_mode(False)
def scan_grad_cam(
    model: nn.Module,
    hu: torch.Tensor,
    target_class: str | int,
    *,
    of_slice: int | None = None,
    stride: int = STRIDE,
    method: str = "grad-cam",
    score: str = "evidence",
    aligned: bool = True,
    batch_size: int = SLICES_AT_ONCE,
) -> np.ndarray:
    """Heat of one class of a scan in its slices: (S, slices, H, W) HU -> (S, H, W) float32, in nats.

    model: one of SEQUENCE_MODELS. of_slice: ask for that slice's logit, which the others may have part in;
    None: for the scan's. batch_size: slices at once in the CNN; what lies behind the stride is kept of all.
    The rest as for grad_cam; InputError also for a slice that is not there."""
    if of_slice is not None and not 0 <= of_slice < len(hu):
        raise stage.InputError(f"slice {of_slice}: must be in 0 .. {len(hu) - 1}")
    target = _number_of(model, target_class)
    weigh, scored = _choice("method", method, METHODS), _choice("score", score, SCORES)
    # cuDNN has no gradients of an RNN in eval mode
    with _watched(model, _layer(model.cnn, stride)) as maps, torch.backends.cudnn.flags(enabled=False):
        scan = _own(hu, model)[None]
        mask = torch.ones(scan.shape[:2], dtype=torch.bool, device=scan.device)
        reading = model(scan, mask, slices_at_once=batch_size)
        logits = reading.scan[0] if of_slice is None else reading.slices[0, of_slice]
        heat = _heat(scored(logits[target]), maps, weigh)
    return _laid_out(heat, model.cnn, stride, hu.shape[2:], aligned)


def _number_of(model: nn.Module, target_class: str | int) -> int:
    if target_class in model.classes:
        return model.classes.index(target_class)
    if isinstance(target_class, int) and 0 <= target_class < len(model.classes):
        return target_class
    raise stage.InputError(
        f"class {target_class!r}: must be one of {', '.join(model.classes)}, or its number"
    )


def _choice(what: str, name: str, choices: dict[str, Callable]) -> Callable:
    if name not in choices:
        raise stage.InputError(f"{what} {name!r}: must be one of {', '.join(choices)}")
    return choices[name]


def _layer(cnn: nn.Module, stride: int) -> nn.Module:
    if not hasattr(cnn, "cam_layers"):
        raise stage.InputError(f"{type(cnn).__name__}: has no feature maps that Grad-CAM could show")
    layers = cnn.cam_layers()
    if stride not in layers:
        raise stage.InputError(f"stride {stride}: must be one of {', '.join(map(str, layers))}")
    return layers[stride]


def _own(hu: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """A copy on the model's device: a tensor made in inference mode cannot take part in gradients."""
    device = next(model.parameters(), torch.empty(0)).device
    return hu.to(device, torch.float32, copy=True)


@contextlib.contextmanager
def _watched(model: nn.Module, layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the layer's outputs as leaves of the graph, in eval mode and float32; leave no trace.

    The graph begins at the layer, so that frozen networks have gradients and no parameter gets any."""
    maps: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        # also where the network itself says no_grad, e.g. around a frozen part
        torch.set_grad_enabled(True)
        maps.append(output.detach().requires_grad_())
        return maps[-1].clone()  # which the network may change in place

    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters(), torch.empty(0)).device
    handle = layer.register_forward_hook(keep)
    try:
        model.eval()
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield maps
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _heat(score: torch.Tensor, maps: list[torch.Tensor], weigh: Callable) -> torch.Tensor:
    """The formula above: a score or a sum of independent ones, and N feature maps -> (N, h, w) on the CPU."""
    gradients = torch.autograd.grad(score, maps, allow_unused=True) if score.requires_grad else (None,)
    if any(gradient is None for gradient in gradients):
        raise ValueError("no gradient from the score to the feature map: the network detaches it on the way")
    values = torch.cat([one.detach() for one in maps])
    heat = (weigh(torch.cat(gradients)) * values).sum(dim=1) * math.prod(values.shape[2:])
    return heat.relu().cpu()


# ---------------------------------------------------------------- where a feature map lies


def _laid_out(
    heat: torch.Tensor, cnn: nn.Module, stride: int, shape: tuple[int, int], aligned: bool
) -> np.ndarray:
    """(N, h, w) -> (N, H, W), linear between the positions, constant outside of them."""
    if not aligned:
        return F.interpolate(heat[:, None], shape, mode="bilinear")[:, 0].numpy()
    first = first_centre_px(cnn, stride)
    axes = []
    for pixels, positions in zip(shape, heat.shape[1:], strict=True):
        place = (torch.arange(pixels) - first) / stride  # of each pixel, counted in positions
        axes.append((2 * place + 1) / positions - 1)  # as grid_sample counts
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([columns, rows], dim=-1).expand(len(heat), -1, -1, -1)
    return F.grid_sample(heat[:, None], grid, "bilinear", "border", align_corners=False)[:, 0].numpy()


def first_centre_px(cnn: nn.Module, stride: int) -> float:
    """Pixel row (and column) on which the first position of a feature map is centred: 0 in a ResNet, and
    (stride - 1) / 2 where patches are cut out, as in a ConvNeXt.

    Stacked layers have (L + 2P - K) // stride + 1 positions in L pixels, for a receptive field K and a
    padding P, and the first is centred on (K - 1) / 2 - P. The length at which one more fits in tells
    K - 2P. Exact where the paddings are alike on both sides."""

    def positions(length: int) -> int:
        with _watched(cnn, _layer(cnn, stride)) as maps:
            cnn(_own(torch.zeros(1, cnn.slices, length, PROBE_PX), cnn))
            return maps[0].shape[2]

    count = positions(PROBE_PX)
    low, high = 0, stride  # PROBE_PX + low pixels hold `count` positions, PROBE_PX + high one more
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if positions(PROBE_PX + middle) == count else (low, middle)
    return (PROBE_PX + high - stride * count - 1) / 2


# ---------------------------------------------------------------- is it right


def energy_in_mask(heat: np.ndarray, mask: np.ndarray) -> float:
    """Share of the heat that lies inside the lesion. heat, mask: (H, W). By chance: the mask's share.

    NaN without heat or without lesion. Source: Wang et al. 2020 (Score-CAM), section 4.3."""
    total = float(heat.sum(dtype=np.float64))
    if not mask.any() or total <= 0:
        return math.nan
    return float(heat[mask.astype(bool)].sum(dtype=np.float64)) / total


def pointing_game(heat: np.ndarray, mask: np.ndarray, tolerance_px: float = 0.0) -> float:
    """1 if the largest heat lies inside the lesion, or within tolerance_px of it, else 0. heat, mask: (H, W).

    Equal maxima count by their share; without heat it is a miss, without lesion NaN. By chance: the mask's
    share. Source: Zhang et al. 2018."""
    if not mask.any():
        return math.nan
    if heat.max() <= 0:
        return 0.0
    near = ndimage.distance_transform_edt(~mask.astype(bool)) <= tolerance_px
    return float(near[heat == heat.max()].mean())


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """A copy in which every layer is as before training: its heat must point at chance.

    Parameters of no layer of torch's, such as the scales of a ConvNeXt, are shuffled. Heat that looks the
    same as before shows the slice and not what was learnt. Source: Adebayo et al. 2018."""
    device = next(model.parameters()).device
    found = copy.deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(seed)
        for module in found.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
                continue
            for parameter in module.parameters(recurse=False):
                order = torch.randperm(parameter.numel())
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return found.to(device)


class Change(NamedTuple):
    """From one heat map to another of the same slice.

    correlation: Pearson's, 1 where they are alike. rank_correlation: Spearman's, blind to how bright.
    shift_px: from one centre of heat to the other. ratio: of the sums."""

    correlation: float
    rank_correlation: float
    shift_px: float
    ratio: float


def change(heat: np.ndarray, other: np.ndarray) -> Change:
    """What changes from heat to other, (H, W) both: at another dose, or with random weights.

    NaN where there is no heat, or where it is the same everywhere and so has no correlation."""
    first, second = (np.asarray(one, np.float64) for one in (heat, other))
    correlation = ranks = shift = ratio = math.nan
    if np.ptp(first) and np.ptp(second):
        correlation = float(np.corrcoef(first.ravel(), second.ravel())[0, 1])
        ranks = float(stats.spearmanr(first, second, axis=None).statistic)
    if first.any():
        ratio = float(second.sum() / first.sum())
    if first.any() and second.any():
        shift = math.dist(ndimage.center_of_mass(first), ndimage.center_of_mass(second))
    return Change(correlation, ranks, shift, ratio)


# ---------------------------------------------------------------- pictures


def heat_rgb(share: np.ndarray) -> np.ndarray:
    """Shares 0..1 of the full heat -> (..., 3) in 0..1, from black to light yellow: lighter is more."""
    from matplotlib import colormaps  # takes longer to import than a slice to explain

    return colormaps["inferno"](np.asarray(share, float))[..., :3]


def overlay(
    hu: np.ndarray,
    heat: np.ndarray,
    window: tuple[float, float] = BRAIN_WINDOW,
    opacity: float = 0.6,
    full_heat: float = FULL_HEAT,
) -> np.ndarray:
    """The slice in grey with its heat in colour: (H, W) HU and (H, W) heat -> (H, W, 3) uint8.

    The colour covers the more of the grey the hotter it is, `opacity` of it from full_heat on; without
    heat the grey shows as it is. Raises InputError for an opacity outside 0..1, or a full_heat of 0."""
    if not 0 <= opacity <= 1:
        raise stage.InputError(f"opacity {opacity}: must be in 0 .. 1")
    if not full_heat > 0:
        raise stage.InputError(f"full heat {full_heat}: must be above 0 nats")
    share = np.clip(heat / full_heat, 0, 1)
    cover = opacity * share[..., None]
    grey = to_grey(hu, *window)[..., None]
    return np.round((1 - cover) * grey + cover * 255 * heat_rgb(share)).astype(np.uint8)


def write_overlay(
    path: Path,
    hu: np.ndarray,
    heat: np.ndarray,
    affine: np.ndarray,
    title: str,
    *,
    lesions: np.ndarray | None = None,
    window: tuple[float, float] = BRAIN_WINDOW,
    opacity: float = 0.6,
    full_heat: float = FULL_HEAT,
) -> Path:
    """Write the overlay as a PNG in radiological view, with its scale and `title`. Returns path.

    hu, heat: (H, W). affine: (4, 4) as in metadata.json. lesions: (H, W) uint8 classes, outlined. The rest as
    for overlay."""
    rgb = overlay(hu, heat, window, opacity, full_heat)
    rgb = enlarge(_squared(radiological(rgb, affine)), OVERLAY_PX)
    if lesions is not None:
        rgb = draw_outlines(rgb, _squared(radiological(lesions, affine)))
    side = len(rgb)
    ramp = heat_rgb(np.linspace(0, 1, side // 3))
    rgb = rgb.copy()
    edge, height = side // 50, side // 40  # beside and above annotate's text
    rgb[-4 * height : -3 * height, -edge - len(ramp) : -edge] = np.round(255 * ramp)
    with stage.atomic_write(path, "wb") as file:
        file.write(annotate(rgb, Note(title, f"0 to {full_heat:g} nats")))
    return Path(path)


def _squared(image: np.ndarray) -> np.ndarray:
    """Black (0) around the shorter side: (H, W, ...) -> (N, N, ...), so that pixels stay as they are."""
    side = max(image.shape[:2])
    spare = [side - length for length in image.shape[:2]]
    around = [(space // 2, space - space // 2) for space in spare]
    return np.pad(image, [*around, *[(0, 0)] * (image.ndim - 2)])
