"""Where SIGReg compares characteristic functions: knots, the target at the knots, and the weights of their integral."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Quadrature:
    """Knots t_start + j * t_step > 0 with the target characteristic function `phi` and the `weights` there.

    A knot at t = 0 adds nothing to the statistic (both characteristic functions are 1) and is left out; a grid that is
    symmetric about 0 is folded, since the integrand is even. Made once, on the host, in float64.
    """

    t_start: float
    t_step: float
    phi: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        if not self.phi or len(self.phi) != len(self.weights):
            raise ValueError(f"phi and weights must have the same length of at least 1, "
                             f"got {len(self.phi)} and {len(self.weights)}")
        if not (self.t_start > 0 and self.t_step > 0):
            raise ValueError(f"t_start and t_step must be positive, got {self.t_start} and {self.t_step}")

    @classmethod
    def half_line(cls, t_max: float, num_knots: int) -> "Quadrature":
        """num_knots from 0 to t_max, for the integral over [-t_max, t_max]: 2h, h at both ends, times exp(-t^2 / 2).

        The grid of the official LeJEPA package, of MINIMAL.md, LeWM and lightly.
        """
        _check(num_knots, t_max > 0, 0.0, t_max)
        return cls.trapezoid(-t_max, t_max, 2 * num_knots - 1)

    @classmethod
    def trapezoid(cls, t_min: float, t_max: float, num_knots: int) -> "Quadrature":
        """Trapezoid rule, num_knots on [t_min, t_max], times exp(-t^2 / 2); t_min = -t_max, or 0 < t_min < t_max."""
        symmetric = t_min == -t_max
        _check(num_knots, t_max > 0 and (symmetric or 0 < t_min < t_max), t_min, t_max)
        step = (t_max - t_min) / (num_knots - 1)
        # of a symmetric grid the left half is folded onto the right one, and the middle is t = 0 up to rounding
        knots = [t for t in (t_min + step * i for i in range(num_knots)) if t > 1e-9 * step]
        phi = tuple(math.exp(-t * t / 2) for t in knots)
        weights = [step * (2 if symmetric else 1) * f for f in phi]
        for end in [-1] if symmetric else [0, -1]:
            weights[end] /= 2
        return cls(knots[0], step, phi, tuple(weights))

    @classmethod
    def of_knots(cls, t: Sequence[float], phi: Sequence[float], weights: Sequence[float]) -> "Quadrature":
        """From values at evenly spaced knots t >= 0, rounded to float32 or finer, as code bases keep them in buffers.

        At t = 0 phi must be 1. Raises ValueError for any other grid.
        """
        step = (t[-1] - t[0]) / max(len(t) - 1, 1)
        is_even = all(abs(t[0] + j * step - knot) <= 1e-6 * t[-1] for j, knot in enumerate(t))
        is_grid = is_even and step > 0 and len(t) == len(phi)
        if is_grid and t[0] == 0 and abs(phi[0] - 1) <= 1e-6:
            return cls(step, step, tuple(phi[1:]), tuple(weights[1:]))
        if is_grid and t[0] > 0:
            return cls(t[0], step, tuple(phi), tuple(weights))
        raise ValueError(f"t must be evenly spaced, positive, or from 0 on where phi is 1; got t = {list(t)}, "
                         f"phi = {list(phi)}")

    @property
    def num_knots(self) -> int:
        """Knots evaluated, after folding."""
        return len(self.phi)

    @property
    def knots(self) -> tuple[float, ...]:
        return tuple(self.t_start + self.t_step * j for j in range(self.num_knots))


def _check(num_knots: int, has_range: bool, t_min: float, t_max: float) -> None:
    if num_knots < 2:
        raise ValueError(f"num_knots must be at least 2, got {num_knots}")
    if not has_range:
        raise ValueError(f"t_min must be -t_max or between 0 and t_max, got t_min {t_min} and t_max {t_max}")
