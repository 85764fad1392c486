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
        """From values at evenly spaced knots t, rounded to float32 or finer, as code bases keep them in buffers.

        The grid may start at 0, where phi must be 1, be symmetric about it, where phi must be even, or be positive.
        Raises ValueError for any other one.
        """
        t, phi, weights = list(t), list(phi), list(weights)
        if not len(t) == len(phi) == len(weights) >= 2:
            raise ValueError(f"t, phi and weights must have the same length of at least 2, got {len(t)}, {len(phi)} and "
                             f"{len(weights)}")
        step, near = (t[-1] - t[0]) / (len(t) - 1), 1e-6 * max(abs(t[0]), abs(t[-1]))
        start = t[0]
        if abs(t[0] + t[-1]) <= near:  # the left half onto the right one
            half = len(t) // 2
            is_even = all(abs(a - b) <= 1e-6 for a, b in zip(phi, reversed(phi), strict=True))
            t, phi = t[half:], phi[half:]
            folded = [a + b for a, b in zip(weights, reversed(weights), strict=True)][half:]
            start, weights = (0.0, folded) if len(folded) > half else (step / 2, folded)
        else:
            is_even = True
        is_grid = step > 0 and all(abs(start + j * step - knot) <= near for j, knot in enumerate(t))
        if abs(start) <= near:  # t = 0
            is_even = is_even and abs(phi[0] - 1) <= 1e-6
            start, phi, weights = step, phi[1:], weights[1:]
        if not (is_grid and is_even and start > 0):
            raise ValueError(f"t must be evenly spaced and positive, from 0 on, or symmetric about 0, with an even phi that "
                             f"is 1 at 0; got t = {[round(knot, 4) for knot in t]}, phi = {[round(f, 4) for f in phi]}")
        return cls(start, step, tuple(phi), tuple(weights))

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
