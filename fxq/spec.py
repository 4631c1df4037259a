"""What to quantize a tensor to: format, symmetry, granularity, and how its range is found.

Plain frozen values. A granularity is a description of the *shape of the scale*: it names, for each
dimension of a tensor, how many neighbouring elements share one scale (its *block*). `ALL` means the
whole dimension. Everything that computes with a granularity does so through `block_of`, so
per-tensor, per-channel, per-group and per-token are one code path. Static or dynamic is a separate
question: both are legal with every granularity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxq.formats import Format, Integer
from fxq.rows import ByLength, ByPosition, Rows

ALL = -1  # block entry: the whole dimension shares one scale


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: `[B, T, C] -> [1, 1, 1]`."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of `axis`: a weight `[N, K]` with axis 0 `-> [N, 1]`."""

    axis: int = 0


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` neighbours of the last dimension and per index of the others: `[N, K] ->
    [N, K/size]`."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(
                f"PerGroup.size: expected a positive number of channels, found {self.size}"
            )


@dataclass(frozen=True)
class PerToken:
    """One scale per token. Dynamic: `[B, T, C] -> [B, T, 1]`. Static: `[1, T, 1]`, shared by the
    batch.

    The token axis is the second to last. A static scale needs it to have a fixed length (PTQ4ARVG,
    arXiv:2601.21238).
    """


@dataclass(frozen=True)
class PerAxes:
    """One scale per index of several axes: a cache `[B, H, T, D]` with axes (1, 3) `-> [1, H, 1,
    D]`."""

    axes: tuple[int, ...]


Granularity = PerTensor | PerChannel | PerGroup | PerToken | PerAxes


def block_of(granularity: Granularity, ndim: int, *, dynamic: bool = False) -> tuple[int, ...]:
    """Return how many neighbours along each of `ndim` dimensions share one scale (`ALL`: the whole
    dimension).

    Args:
        granularity: which elements share a scale.
        ndim: the tensor's number of dimensions.
        dynamic: only `PerToken` differs: a dynamic scale is also per batch element, a static one is
            shared by the batch.
    Raises:
        ValueError: the granularity needs a dimension that the tensor lacks.
    """
    match granularity:
        case PerTensor():
            return (ALL,) * ndim
        case PerChannel(axis):
            if not -ndim <= axis < ndim:
                raise ValueError(f"PerChannel(axis={axis}) needs more than {ndim} dimensions")
            return tuple(1 if i == axis % ndim else ALL for i in range(ndim))
        case PerAxes(axes):
            if any(not 0 <= axis < ndim for axis in axes):
                raise ValueError(f"PerAxes({axes}) needs axes from 0 on, below {ndim}")
            return tuple(1 if i in axes else ALL for i in range(ndim))
        case PerGroup(size):
            return (1,) * (ndim - 1) + (size,)
        case PerToken():
            if dynamic:
                return (1,) * (ndim - 1) + (ALL,)
            if ndim < 3:
                raise ValueError(
                    "static PerToken() needs [batch, token, channel], "
                    f"found {ndim} dimensions; use PerTensor()"
                )
            return (ALL,) * (ndim - 2) + (1, ALL)


def scale_shape(shape: Sequence[Any], block: Sequence[int]) -> list[Any]:
    """Return the shape of the scale of a tensor of `shape` quantized in blocks of `block`.

    Symbolic sizes (`torch.SymInt`) stay symbolic.

    Raises:
        ValueError: a block does not divide its dimension.
    """
    result = []
    for size, width in zip(shape, block, strict=True):
        if width not in (ALL, 1) and size % width:
            raise ValueError(
                f"PerGroup({width}) needs a dimension divisible by {width}, found {size}; "
                "use a smaller group or leave this layer out"
            )
        result.append(1 if width == ALL else size // width)
    return result


@dataclass(frozen=True)
class MinMax:
    """Range: the smallest and largest value seen."""


@dataclass(frozen=True)
class MovingAverage:
    """Range: an exponential moving average of each batch's minimum and maximum. Depends on the
    order of batches."""

    momentum: float = 0.1  # weight of the newest batch

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise ValueError(
                f"MovingAverage.momentum: expected a number in (0, 1], found {self.momentum}"
            )


@dataclass(frozen=True)
class Percentile:
    """Range: the central `percent` of the values seen, symmetric tails cut."""

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise ValueError(
                f"Percentile.percent: expected a number in (50, 100], found {self.percent}"
            )


@dataclass(frozen=True)
class MeanSquaredError:
    """Range: min-max cut to the [-t, t] with the smallest expected |x - q(x)|^p over the histogram
    of values seen."""

    p: float = 2.0
    steps: int = 100  # candidates for t, from the largest magnitude down to 1/steps of it

    def __post_init__(self) -> None:
        if not self.p > 0 or self.steps < 1:
            raise ValueError(f"MeanSquaredError: expected p > 0 and steps >= 1, found {self}")


@dataclass(frozen=True)
class Entropy:
    """Range: min-max cut to the [-t, t] with the smallest Kullback-Leibler divergence between the
    histogram of values seen and that of their quantized values."""

    steps: int = 100  # candidates for t, as in MeanSquaredError

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Entropy.steps: expected at least 1, found {self.steps}")


Observer = MinMax | MovingAverage | Percentile | MeanSquaredError | Entropy


@dataclass(frozen=True, init=False)
class QuantSpec:
    """How one tensor is quantized.

    Args:
        bits: shorthand for `format=Integer(bits)`.
        symmetric: zero-point 0 and codes in `[-(2^(bits-1) - 1), 2^(bits-1) - 1]`; otherwise affine
            on the whole range. Floating point is symmetric.
        granularity: which elements share a scale.
        dynamic: compute the range from each tensor at run time instead of from calibration data.
        observer: how a static range is found. Ignored where dynamic.
        pair_safe: enlarge a weight's scale until the codes of input channels 2j and 2j+1, in a
            convolution those at one position of the kernel, sum to at most 128 in magnitude. x86
            without VNNI multiplies unsigned activation codes with weight codes and adds such pairs
            in int16 with saturation: 255 * 128 = 32640 fits. Costs up to 2.5 dB of the weight's own
            SQNR (Gaussian), about 0.5 dB after quantized activations, and buys the plain int8
            kernel on every x86.
        format: of the codes; 8-bit integers unless given.
        rows: what chooses among several static ranges (`fxq.rows`); None where there is one.
    """

    format: Format
    symmetric: bool
    granularity: Granularity
    dynamic: bool
    observer: Observer
    pair_safe: bool
    rows: Rows | None

    def __init__(
        self,
        bits: int | None = None,
        symmetric: bool = True,
        granularity: Granularity | None = None,
        dynamic: bool = False,
        observer: Observer | None = None,
        pair_safe: bool = False,
        *,
        format: Format | None = None,
        rows: Rows | None = None,
    ) -> None:
        if not isinstance(format, Format | None):
            raise TypeError(
                f"QuantSpec.format: expected Integer or Float8 of fxq.formats, found {format!r}"
            )
        # `dataclasses.replace(spec, bits=4)` hands over all that the spec has, its format too.
        replaced = granularity is not None and observer is not None
        replaced = replaced and isinstance(format, Integer)
        if bits is not None and not replaced and format not in (None, Integer(bits)):
            raise ValueError(
                "QuantSpec: bits= is for integers, and short for format=Integer(bits), found "
                f"bits={bits} with {format!r}; give one of them"
            )
        values = {
            "format": format or Integer() if bits is None else Integer(bits),
            "symmetric": symmetric,
            "granularity": PerTensor() if granularity is None else granularity,
            "dynamic": dynamic,
            "observer": MinMax() if observer is None else observer,
            "pair_safe": pair_safe,
            "rows": rows,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        is_integer = isinstance(self.format, Integer)
        if self.pair_safe and not (
            is_integer and self.symmetric and self.granularity == PerChannel(0)
        ):
            raise ValueError(
                "QuantSpec.pair_safe needs integers, symmetric=True and PerChannel(0), found "
                f"{self.format}, symmetric={self.symmetric} and {self.granularity}"
            )
        if not is_integer and not self.symmetric:
            raise ValueError(f"QuantSpec: {self.format} has no zero-point; use symmetric=True")
        if not is_integer and isinstance(self.observer, MeanSquaredError | Entropy):
            raise ValueError(
                f"QuantSpec: {self.observer} searches a range for integers, found {self.format}; "
                "use MinMax() or Percentile()"
            )
        if self.rows is None:
            return
        if self.dynamic or self.pair_safe:
            raise ValueError(
                f"QuantSpec: rows {self.rows} choose among ranges that calibration finds; use "
                "dynamic=False and pair_safe=False, or no rows"
            )
        if isinstance(self.observer, MovingAverage):
            raise ValueError("QuantSpec: a moving average has one range; use MinMax() with rows")
        if isinstance(self.rows, ByPosition | ByLength) and self.granularity == PerToken():
            raise ValueError(
                f"QuantSpec: rows {self.rows} go along tokens, and PerToken() has a scale for each "
                "of them already; use PerTensor()"
            )

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.format.bits

    @property
    def quant_min(self) -> int:
        """Smallest code."""
        return self.format.grid(symmetric=self.symmetric)[0]

    @property
    def quant_max(self) -> int:
        """Largest code."""
        return self.format.grid(symmetric=self.symmetric)[1]

    @property
    def grid(self) -> tuple[Any, ...]:
        """What `quantize` needs to know of the codes: the smallest, the largest, and the dtype of
        those that are not int8."""
        low, high = self.format.grid(symmetric=self.symmetric)
        dtype = self.format.dtype
        return (low, high) if isinstance(self.format, Integer) else (low, high, dtype)


@dataclass(frozen=True)
class LayerSpec:
    """How one layer with a weight is quantized.

    Args:
        activation: its input; None keeps the input float (weight-only quantization).
        weight: its weight.
    """

    activation: QuantSpec | None
    weight: QuantSpec

    def __post_init__(self) -> None:
        if self.weight.dynamic or self.weight.rows is not None:
            raise ValueError(
                "LayerSpec.weight: a weight does not change at run time; use dynamic=False and no "
                "rows"
            )
