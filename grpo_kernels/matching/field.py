"""The curve of a loss's policy term: its slope at every token at once, as a function of the pooled log-ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives.surrogates import Point, Surrogate
from .known import Known
from .numbers import bisect
from .probe import Probe
from .weighing import measure

NEAR = torch.cat([torch.logspace(-5, 0, 26), torch.linspace(1.25, 8, 28)]).double()
FAR = torch.tensor([11.0, 15, 19, 22, 30, 45, 60], dtype=torch.float64)
LARGEST = 60.0
GRID = torch.cat([-NEAR.flip(0), NEAR])
AT = {float(x): k for k, x in enumerate(GRID)}


class Field:
    """The factor of -A·w in the slope of every token. Lanes are sequences, twice where a sign would be missing.

    Attributes:
        sign, live, log_prob: (L, T); live tokens have a weight and an advantage.
    """

    def __init__(self, probe: Probe, known: Known, scale: float = 1.0) -> None:
        self.probe, self.known = probe, known
        batch = probe.batch
        m = measure(probe, known, batch)
        effective = known.effective(probe.signs(), batch)
        signs = effective[m.live.any(-1)].sign()
        runs = [1.0] if bool((signs > 0).any()) and bool((signs < 0).any()) else [1.0, -1.0]
        self.advantages = [run * scale * probe.signs() for run in runs]
        effectives = [known.effective(A, batch)[:, None] for A in self.advantages]
        lengths = known.counted(batch).sum(-1, keepdim=True).clamp(min=1).double()
        product = known.level == "sequence_product"
        self.shares = lengths if product else torch.ones_like(lengths)
        """Over which a pooled log-ratio is spread among its sequence's tokens."""
        handed = lengths if product and known.carries else torch.ones_like(lengths)
        self.sizes = [-m.weights * handed * e for e in effectives]
        self.sign = torch.cat([e.sign().expand(batch.shape) for e in effectives])
        self.live = torch.cat([m.live & (m.weights != 0) for _ in runs])
        self.log_prob = torch.cat([known.log_probs(batch) for _ in runs])
        self.pooled = known.level != "token"
        self.first = self.live.long().argmax(-1, keepdim=True)
        self._grid: Tensor | None = None
        self._edges: dict[int, Tensor] = {}

    def factor(self, x: Tensor | float) -> Tensor:
        """Return (L, T) at pooled log-ratios, a number or (L, T); NaN where a token is not live."""
        per_lane = torch.as_tensor(x, dtype=torch.float64).expand(self.sign.shape)
        parts = zip(per_lane.split(len(self.shares)), self.advantages, self.sizes, strict=True)
        slopes = [self.probe.policy(self.known, lane / self.shares, A) / size for lane, A, size in parts]
        return torch.where(self.live, torch.cat(slopes), torch.nan)

    def grid(self) -> Tensor:
        """Return (n, L, T): the factors at GRID, measured once."""
        if self._grid is None:
            self._grid = torch.stack([self.factor(float(x)) for x in GRID])
        return self._grid

    def side(self, sign: int) -> Tensor:
        """Return the live tokens of one sign of the advantage, (L, T) bool."""
        return self.live & (self.sign == sign)

    def curve(self, points: Tensor) -> dict[int, Tensor]:
        """Return (n,) factors by sign, at one token of each."""
        factors = torch.stack([self.factor(float(x)) for x in points])
        return {sign: self._of_one(factors, sign) for sign in (1, -1)}

    def on_grid(self, sign: int) -> Tensor:
        """Return (n,) factors at GRID, at one token of the sign."""
        return self._of_one(self.grid(), sign)

    def _of_one(self, factors: Tensor, sign: int) -> Tensor:
        i, t = self.side(sign).nonzero()[0].tolist()
        return factors[:, i, t].nan_to_num()

    def edges(self, direction: int, reach: Tensor | None = None) -> Tensor:
        """Return (L, T) log-ratios at which slopes become 0 and stay so, found on a grid, then halved; inf: nowhere.

        Args:
            direction: +1 or -1.
            reach: (L, T), how far log-ratios may go; None: as far as a slope can be told from rounding.
        """
        if reach is not None:
            lanes = (NEAR / 8.0001)[:, None, None] * reach
            return self._cut(direction, lanes, torch.stack([self._stopped(direction * x) for x in lanes]))
        if direction not in self._edges:
            # Downwards a ratio gets too small for a loss that rounds.
            far = FAR if direction > 0 else FAR[FAR <= 22] if self.known.precision.same < 1e-6 else FAR[:0]
            lanes = torch.cat([NEAR, far])[:, None, None].expand(-1, *self.sign.shape)
            near = self.grid()[len(NEAR) :] if direction > 0 else self.grid()[: len(NEAR)].flip(0)
            beyond = [self.factor(direction * x) for x in lanes[len(NEAR) :]]
            factors = torch.cat([near, torch.stack(beyond)]) if beyond else near
            self._edges[direction] = self._cut(direction, lanes, self._is_zero(factors, direction * lanes))
        return self._edges[direction]

    def _cut(self, direction: int, lanes: Tensor, zero: Tensor) -> Tensor:
        """Return where the last run of zeros begins, halved from the grid's lanes (n, L, T)."""
        run = zero.flip(0).long().cumprod(0).sum(0)
        first = (len(lanes) - run).clamp(max=len(lanes) - 1)
        outside = lanes.gather(0, first[None])[0]
        inside = torch.where(first > 0, lanes.gather(0, (first - 1).clamp(min=0)[None])[0], 0.0)
        found = bisect(lambda x: self._stopped(direction * x), inside, outside)
        return torch.where(self.live & (run > 0), direction * found, torch.inf)

    def _stopped(self, x: Tensor) -> Tensor:
        return self._is_zero(self.factor(x), x)

    def _is_zero(self, factors: Tensor, x: Tensor) -> Tensor:
        """Whether slopes (..., L, T) are smaller than a ratio this side of the bounds can make them."""
        zero = factors.abs() <= 1e-3 * torch.exp(x.clamp(max=0))
        return zero.gather(-1, self.first.expand(*zero.shape[:-1], 1)).expand_as(zero) if self.pooled else zero

    def misfit(self, surrogate: Surrogate, limit: float | None = None, scale: float = 1.0) -> float:
        """Return the largest relative distance of slopes from the surrogate's on the grid, away from its edges.

        ``scale``: what the surrogate is on-policy.
        """
        points = GRID[(limit or 8.1) - 1e-3 > GRID.abs()]
        theirs = scale * self.grid()[(limit or 8.1) - 1e-3 > GRID.abs()]
        near = 1e-6 + 10 * self.known.precision.same
        # The old policy's probability is at most 1.
        possible = self.live & (points[:, None, None] >= self.log_prob if not self.pooled else True)
        ours, before, after = (self.of(surrogate, points + d * near) for d in (0, -1, 1))
        clear = possible & ((after - before).abs() <= 0.5 * torch.maximum(before.abs(), after.abs()))
        size = torch.maximum(theirs.abs(), ours.abs()).clamp(min=1e-6)
        apart = ((theirs - ours).abs() / size)[clear]
        return float(apart.nan_to_num(nan=torch.inf).max()) if apart.numel() else 0.0

    def of(self, surrogate: Surrogate, points: Tensor) -> Tensor:
        """Return the surrogate's factors (n, L, T) at pooled log-ratios (n,)."""
        x = points[:, None, None].expand(-1, *self.sign.shape)
        log_prob = self.log_prob.expand_as(x)
        t = surrogate.terms(Point(log_prob, x, x.exp(), self.sign.expand_as(x), log_prob - x))
        return -(t.slope + t.direct) / self.sign
