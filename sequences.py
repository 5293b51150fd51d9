"""The networks that read whole scans: a classifier on every slice, and a BiLSTM from slice to slice.

All are called as `model(hu, mask)`: hu (B, S, slices, H, W) HU, for each of S slices of B scans the
neighbours that the classifier sees; mask (B, S) bool, True for the slices that there are, which come first,
at least one in each scan. What stands in the padding never reaches a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from batches import padded
from classifiers import CLASSIFIERS, Classifier
from weights import freeze

# Of the forget gates, at the start. With 0 a slice 16 from the end counts 0.5^16 in the final state, with 2
# 0.88^16. To find a mark on one of 32 slices, after 600 steps: loss 0.28 with 0, 0.13 with 1, 0.08 with 2
FORGET_BIAS = 2.0


class Reading(NamedTuple):
    """Logits, float32. scan: (B, classes). slices: (B, S, classes), 0 in the padding, to be masked."""

    scan: torch.Tensor
    slices: torch.Tensor


# ---------------------------------------------------------------- scans of different lengths


def lengths_of(mask: torch.Tensor) -> torch.Tensor:
    """Slices of each scan: (B, S) bool -> (B,) on the CPU.

    Raises ValueError if a scan has none, or padding in front of a slice."""
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype}: must be (scans, slices) of bool")
    mask = mask.cpu()
    lengths = mask.sum(dim=1)
    if not torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None]) or not lengths.all():
        raise ValueError("mask: must be True for the first slices of each scan, and for one at least")
    return lengths


def largest_of(slices: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The largest of each scan's slices, whatever the padding: (B, S, F), (B, S) bool -> (B, F)."""
    return slices.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)


def _begin_at_zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class BiLSTM(nn.Module):
    """A bidirectional LSTM over scans of different lengths.

    (B, S, features) and lengths (B,) -> outputs (B, longest, 2 hidden), 0 behind a scan's end, and the final
    states of both directions (B, 2 hidden). dropout: between layers. Forget gates that begin open are from
    Jozefowicz et al. 2015."""

    def __init__(self, features: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True, dropout=between, bidirectional=True)
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("bias_ih"):
                with torch.no_grad():
                    parameter[hidden : 2 * hidden] = FORGET_BIAS  # gates: input, forget, cell, output

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # small, and errors would add up over the slices
            packed = pack_padded_sequence(x.float(), lengths, batch_first=True, enforce_sorted=False)
            outputs, (states, _) = self.lstm(packed)
            return pad_packed_sequence(outputs, batch_first=True)[0], torch.cat([states[-2], states[-1]], 1)


class SequenceModel(nn.Module):
    """What every network for scans keeps: cnn, and its classes, slices and windows.

    cnn: {"name": one of CLASSIFIERS, "kwargs": its own}, as the checkpoint of a classifier has them.
    Raises ValueError for another name, or if its classes are not those of the scan."""

    def __init__(self, cnn: Mapping[str, Any], classes: Sequence[str]) -> None:
        super().__init__()
        name, kwargs = cnn["name"], dict(cnn["kwargs"])
        if name not in CLASSIFIERS:
            raise ValueError(f"cnn {name!r}: must be one of {', '.join(CLASSIFIERS)}")
        self.classes = tuple(classes)
        found = tuple(kwargs.pop("classes", self.classes))
        if found != self.classes:
            raise ValueError(f"cnn: its classes {found} must be those of the scan, {self.classes}")
        self.cnn: Classifier = CLASSIFIERS[name](classes=self.classes, **kwargs)
        self.slices, self.windows = self.cnn.slices, self.cnn.windows

    def on_slices(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        hu: torch.Tensor,
        mask: torch.Tensor,
        at_once: int | None,
    ) -> torch.Tensor:
        """function of the slices that there are, at_once of them at a time: (N, slices, H, W) -> (N, F).

        Raises ValueError if hu and mask do not fit, or batch norm would learn from parts of a batch."""
        if hu.ndim != 5 or hu.shape[:2] != mask.shape:
            raise ValueError(
                f"input {tuple(hu.shape)} with mask {tuple(mask.shape)}: must be "
                "(scans, slices, neighbours, rows, columns) and (scans, slices)"
            )
        if at_once is None:
            return function(hu[mask])
        if self.cnn.training:
            raise ValueError(f"slices_at_once {at_once}: only in eval mode")
        places = mask.flatten().nonzero()[:, 0]
        return torch.cat([function(hu.flatten(0, 1)[some]) for some in places.split(at_once)])


# ---------------------------------------------------------------- end to end


class CNNBiLSTM(SequenceModel):
    """CNN, BiLSTM and two heads, trained together.

    The logits of a slice are those of the CNN's own head, the auxiliary one, so that `cnn` can begin as a
    trained classifier and ends as one. The logits of a scan come from the final states of both directions.
    embedding: what the BiLSTM sees of a slice, the CNN's features behind a linear layer and a layer norm,
    which unlike batch norm does the same for every scan of a batch, and keeps the gates of the LSTM from
    saturation whatever the CNN. hidden: states in each direction. dropout: before the scan's head, and
    between layers of the BiLSTM; that of the slices' head is the CNN's own. max_skip: add the largest logit
    of the slices to those of the scan, whose head begins at 0: the network begins as the max rule, and the
    BiLSTM learns what that rule lacks.
    Source: CNN-BiLSTM at patient level (PhysioNet CT-ICH); max_skip is ours."""

    def __init__(
        self,
        cnn: Mapping[str, Any],
        classes: Sequence[str] = ("stroke",),
        *,
        embedding: int = 512,
        hidden: int = 256,
        layers: int = 1,
        dropout: float = 0.0,
        max_skip: bool = False,
    ) -> None:
        super().__init__(cnn, classes)
        self.max_skip = max_skip
        self.project = nn.Sequential(
            nn.Linear(self.cnn.head.in_features, embedding), nn.LayerNorm(embedding), nn.ReLU()
        )
        self.bilstm = BiLSTM(embedding, hidden, layers, dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden, len(self.classes))
        if max_skip:
            _begin_at_zero(self.head)

    def forward(self, hu: torch.Tensor, mask: torch.Tensor, slices_at_once: int | None = None) -> Reading:
        """slices_at_once: of the CNN, against a lack of memory; in eval mode only."""
        lengths = lengths_of(mask)
        embedded = self.on_slices(self.cnn.embed, hu, mask, slices_at_once)
        slices = self.cnn.head(self.cnn.dropout(embedded)).float()
        _, final = self.bilstm(padded(self.project(embedded), mask), lengths)
        scan, slices = self.head(self.dropout(final)).float(), padded(slices, mask)
        return Reading(scan + largest_of(slices, mask) if self.max_skip else scan, slices)


# ---------------------------------------------------------------- in two stages


class FeatureReader(nn.Module):
    """The second stage: BiLSTM over features whose last columns are probabilities, which also skip it.

    The scan's head sees the largest and the mean value over the slices of what the slices' head sees."""

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        hidden: int,
        layers: int,
        dropout: float,
        head_dropout: float,
        max_skip: bool,
    ) -> None:
        super().__init__()
        self.features, self.classes, self.max_skip = features, classes, max_skip
        self.bilstm = BiLSTM(features, hidden, layers, dropout)
        self.dropout = nn.Dropout(head_dropout)
        self.slice_head = nn.Linear(2 * hidden + classes, classes)
        self.scan_head = nn.Linear(2 * (2 * hidden + classes), classes)
        if max_skip:
            _begin_at_zero(self.scan_head)

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> Reading:
        """features: (B, S, features). mask: (B, S) bool. Raises ValueError for other shapes."""
        if features.shape != (*mask.shape, self.features):
            raise ValueError(
                f"features {tuple(features.shape)} with mask {tuple(mask.shape)}: must be "
                f"(scans, slices, {self.features}) and (scans, slices)"
            )
        lengths = lengths_of(mask)
        # as long as the longest scan, for sums over more zeros would be other sums in their last bits
        longest = mask[:, : int(lengths.max())]
        features = features[:, : longest.shape[1]].float().where(longest[..., None], 0.0)
        outputs, _ = self.bilstm(features, lengths)
        seen = torch.cat([outputs, features[..., -self.classes :]], dim=2)
        mean = seen.sum(dim=1) / lengths.to(seen.device)[:, None]  # the padding is 0
        scan = self.scan_head(self.dropout(torch.cat([largest_of(seen, longest), mean], dim=1))).float()
        slices = padded(self.slice_head(self.dropout(seen[longest])).float(), mask)
        return Reading(scan + largest_of(slices, mask) if self.max_skip else scan, slices)


class TwoStage(SequenceModel):
    """A trained CNN, kept as it is, and a BiLSTM over what it says of each slice.

    Of each slice the BiLSTM sees `components` principal components of the CNN's embedding (set_pca) and the
    CNN's probabilities. In training the latter have to come from a CNN that has not learnt that scan, so that
    `read` takes features that were worked out before; `reader` is the network behind it and holds all that
    learns. hidden: states in each direction. dropout: between layers; head_dropout: before the heads.
    max_skip: as for CNNBiLSTM.
    Raises ValueError if the embedding has fewer components. Source: Burduja et al. 2020; the scan's head is
    ours."""

    def __init__(
        self,
        cnn: Mapping[str, Any],
        classes: Sequence[str] = ("stroke",),
        *,
        components: int = 120,
        hidden: int = 256,
        layers: int = 3,
        dropout: float = 0.3,
        head_dropout: float = 0.5,
        max_skip: bool = False,
    ) -> None:
        super().__init__(cnn, classes)
        freeze(self.cnn)
        embedding = self.cnn.head.in_features
        if not 1 <= components <= embedding:
            raise ValueError(f"components {components}: must be in 1 .. {embedding}, the CNN's embedding")
        self.register_buffer("pca_mean", torch.zeros(embedding))
        self.register_buffer("pca_components", torch.zeros(components, embedding))
        self.reader = FeatureReader(
            components + len(self.classes),
            len(self.classes),
            hidden=hidden,
            layers=layers,
            dropout=dropout,
            head_dropout=head_dropout,
            max_skip=max_skip,
        )

    def set_pca(self, mean: torch.Tensor, components: torch.Tensor) -> None:
        """Keep the principal components of embeddings: mean (E,), components (components, E).

        They are (embedding - mean) @ components.T. Raises ValueError for other shapes."""
        for name, value in (("pca_mean", mean), ("pca_components", components)):
            own, value = getattr(self, name), torch.as_tensor(value)
            if value.shape != own.shape:
                raise ValueError(f"{name} {tuple(value.shape)}: must be {tuple(own.shape)}")
            own.copy_(value)

    def features_of(self, hu: torch.Tensor) -> torch.Tensor:
        """(N, slices, H, W) HU -> (N, components + classes): principal components, then sigmoid(logits).

        Raises ValueError before set_pca."""
        if not self.pca_components.any():
            raise ValueError("principal components: are not known yet (fit them on train, then set_pca)")
        embedded = self.cnn.embed(hu)
        probabilities = self.cnn.head(embedded).float().sigmoid()
        with torch.autocast(hu.device.type, enabled=False):  # the embeddings lie far from 0, side by side
            components = (embedded.float() - self.pca_mean) @ self.pca_components.T
        return torch.cat([components, probabilities], dim=1)

    def read(self, features: torch.Tensor, mask: torch.Tensor) -> Reading:
        """features: (B, S, components + classes), as features_of gives them. mask: (B, S) bool."""
        return self.reader(features, mask)

    def forward(self, hu: torch.Tensor, mask: torch.Tensor, slices_at_once: int | None = None) -> Reading:
        """hu: as for all, or (B, S, components + classes), features for read.

        slices_at_once: of the CNN, against a lack of memory."""
        if hu.ndim == 3:
            return self.read(hu, mask)
        lengths_of(mask)
        return self.read(padded(self.on_slices(self.features_of, hu, mask, slices_at_once), mask), mask)
