"""The curve of a loss's policy term: its slope at every token at once, as a function of the pooled log-ratio."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..objectives.surrogates import Point, Surrogate
from .known import Known
from .numbers import edges
from .probe import Probe
from .weighing import measure

NEAR = torch.cat([torch.logspace(-5, 0, 26), torch.linspace(1.25, 8, 28)]).double()
FAR = torch.tensor([11.0, 15, 19, 22, 30, 45, 60], dtype=torch.float64)
GRID = torch.cat([-NEAR.flip(0), NEAR])


class Field:
    """The factor of -A·w in the slope of every token. Lanes are sequences, twice where a sign would be missing.

    Attributes:
        sign, live, log_prob: (L, T); live tokens have a weight and an advantage.
    """

    def __init__(self, probe: Probe, known: Known, scale: float = 1.0) -> None:
        self.probe, self.known = probe, known
        batch = probe.batch
        m = measure(probe, known, batch)
        both = len(known.effective(probe.signs(), batch)[m.live.any(-1)].sign().unique()) > 1
        runs = (1.0,) if both else (1.0, -1.0)
        self.advantages = [run * scale * probe.signs() for run in runs]
        effectives = [known.effective(A, batch)[:, None] for A in self.advantages]
        product = known.level == "sequence_product"
        self.shares = known.lengths(batch) if product else torch.ones(len(m.live), 1).double()
        """Over which a pooled log-ratio is spread among its sequence's tokens."""
        handed = self.shares if known.carries else 1.0
        self.sizes = [-m.weights * handed * e for e in effectives]
        self.sign = torch.cat([e.sign().expand(batch.shape) for e in effectives])
        self.live = torch.cat([m.live & (m.weights != 0) for _ in runs])
        self.log_prob = torch.cat([known.log_probs(batch) for _ in runs])
        self.pooled = known.level != "token"
        self.first = self.live.long().argmax(-1, keepdim=True)
        self.at = functools.cache(self.factor)
        """``factor`` at a number, measured once."""

    def factor(self, x: Tensor | float) -> Tensor:
        """Return (L, T) at pooled log-ratios, a number or (L, T); NaN where a token is not live, and where a KL to the
        old policy or the sampler is so steep that subtraction leaves nothing of what a ratio could give."""
        per_lane = torch.as_tensor(x, dtype=torch.float64).expand(self.sign.shape)
        factors = []
        for lane, A, size in zip(per_lane.split(len(self.shares)), self.advantages, self.sizes, strict=True):
            slopes, beside = self.probe.policy_beside(self.known, lane / self.shares, A)
            lost = 1e-15 * (beside / size).abs() > 1e-4 * torch.exp(lane.clamp(max=0))
            factors.append(torch.where(lost, torch.nan, slopes / size))
        return torch.where(self.live, torch.cat(factors), torch.nan)

    @functools.cached_property
    def grid(self) -> Tensor:
        """(n, L, T): the factors at GRID."""
        return torch.stack([self.at(float(x)) for x in GRID])

    def side(self, sign: int) -> Tensor:
        """Return the live tokens of one sign of the advantage, (L, T) bool."""
        return self.live & (self.sign == sign)

    def read(self, sign: int, *points: float) -> list[float]:
        """Return the factors at log-ratios, at one token of the sign."""
        i, t = self.side(sign).nonzero()[0].tolist()
        return [float(self.at(x)[i, t].nan_to_num()) for x in points]

    @functools.cached_property
    def up(self) -> Tensor:
        """(L, T): log-ratios at which slopes become 0 and stay so; inf: nowhere."""
        return self._edges(torch.cat([NEAR, FAR]))

    @functools.cached_property
    def down(self) -> Tensor:
        """The same for ratios that fall; where they get too small for a loss that rounds, nothing is looked for."""
        return self._edges(-torch.cat([NEAR, FAR[FAR <= 22] if self.known.precision.same < 1e-6 else FAR[:0]]))

    def down_to(self, reach: Tensor) -> Tensor:
        """The same where log-ratios may fall by ``reach`` (L, T) alone."""
        return self._edges(-NEAR / 8.0001, reach)

    def _edges(self, points: Tensor, reach: Tensor | None = None) -> Tensor:
        """Return where slopes stop, from points (n,) of the log-ratio or of its reach."""
        lanes = points[:, None, None] * (torch.ones_like(self.sign) if reach is None else reach)
        factors = [self.at(float(x)) for x in points] if reach is None else [self.factor(lane) for lane in lanes]
        beyond = torch.stack([self._is_zero(factor, lane) for factor, lane in zip(factors, lanes, strict=True)])
        for k, factor in enumerate(factors[1:], 1):  # what cannot be told is as nearer by
            beyond[k] = torch.where(self._of_first(factor.isnan()), beyond[k - 1], beyond[k])
        found = edges(lambda x: self._is_zero(self.factor(x), x), lanes, beyond)
        return torch.where(self.live, found, torch.inf)

    def _is_zero(self, factor: Tensor, x: Tensor) -> Tensor:
        """Whether factors at (L, T) are smaller than a ratio this side of the bounds can make them."""
        zero = factor.abs() <= 1e-3 * torch.exp(x.clamp(max=0))
        return self._of_first(zero)

    def _of_first(self, values: Tensor) -> Tensor:
        """Return (L, T) values, where ratios are pooled those of the first live token for all of a lane."""
        return values.gather(-1, self.first).expand_as(values) if self.pooled else values

    def misfit(self, surrogate: Surrogate, limit: float | None = None, scale: float = 1.0) -> float:
        """Return the largest relative distance of slopes from the surrogate's on the grid, away from its edges.

        ``scale``: what the surrogate is on-policy.
        """
        within = (limit or 8.1) - 1e-3 > GRID.abs()
        points, theirs = GRID[within], scale * self.grid[within]
        near = 1e-6 + 10 * self.known.precision.same
        # The old policy's probability is at most 1.
        possible = self.live & (points[:, None, None] >= self.log_prob if not self.pooled else True)
        ours, before, after = (self.of(surrogate, points + d * near) for d in (0, -1, 1))
        clear = possible & ((after - before).abs() <= 0.5 * torch.maximum(before.abs(), after.abs()))
        size = torch.maximum(theirs.abs(), ours.abs()).clamp(min=self.known.precision.floor)
        apart = ((theirs - ours).abs() / size)[clear]
        return float(apart.nan_to_num(nan=torch.inf).max()) if apart.numel() else 0.0

    def of(self, surrogate: Surrogate, points: Tensor) -> Tensor:
        """Return the surrogate's factors (n, L, T) at pooled log-ratios (n,)."""
        x = points[:, None, None].expand(-1, *self.sign.shape)
        log_prob = self.log_prob.expand_as(x)
        t = surrogate.terms(Point(log_prob, x, x.exp(), self.sign.expand_as(x), log_prob - x))
        return -t.own_slope / self.sign
