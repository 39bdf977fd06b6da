"""What `torch2trt-adder check` counts while it compares an engine's outputs with a reference."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..numerics import comparison


class Comparison:
    """Differences over all batches; `add` one batch after the other, then read `report`."""

    def __init__(self, source: str, plan: str) -> None:
        self._source, self._plan = source, plan
        self._difference, self._allowed, self._excess = 0.0, 0.0, -1.0  # of the output that comes closest to its limit
        self._agree, self._predictions, self._lost, self._compared = 0, 0, 0, 0
        self._first: dict[int, Tensor] = {}  # of each output, for the first sample
        self._changes: set[int] = set()  # outputs that are another for another input

    def add(
        self, outputs: Sequence[Tensor], expected: Sequence[Tensor], rtol: float, limits: Sequence[float] | None
    ) -> None:
        """One batch.

        Args:
            outputs: of the engine.
            expected: of the reference.
            rtol: the difference allowed, relative to the largest value of an output.
            limits: instead, the difference allowed for each output.

        Raises:
            RuntimeError: there are more or fewer outputs, or they have other shapes.
        """
        if len(expected) != len(outputs):
            raise RuntimeError(f"{self._source} has {len(expected)} outputs, {self._plan} {len(outputs)}.")
        for i, (y, y0) in enumerate(zip(outputs, expected)):
            y, y0 = y.double().cpu(), y0.double().cpu()
            mismatch = comparison.compare_form(y, y0)
            if mismatch is not None:
                raise RuntimeError(f"{mismatch.text(f'output {i}', self._plan, self._source)}.")
            self._add_output(i, y, y0, rtol, None if limits is None else limits[i])

    def _add_output(self, i: int, y: Tensor, y0: Tensor, rtol: float, limit: float | None) -> None:
        if y0.dim() > 0 and y0.numel() > 0:
            start = self._first.setdefault(i, y0[:1])
            if start.shape[1:] != y0.shape[1:] or not (start == y0).all():
                self._changes.add(i)
        limit = rtol * comparison.largest(y0) if limit is None else limit
        found = comparison.measure(y, y0, limit, nonfinite="ignore")
        self._compared += found.compared + found.lost
        self._lost += found.lost
        excess = found.difference / limit if limit else float("inf") if found.difference else 0.0
        if excess > self._excess:
            scale = max(found.largest, 1e-30)
            self._difference, self._allowed, self._excess = found.difference / scale, limit / scale, excess
        if i == 0 and y.dim() > 1 and y.shape[1] > 1:
            self._agree += int((y.argmax(1) == y0.argmax(1)).sum())
            self._predictions += y.argmax(1).numel()

    def report(self, several: bool) -> tuple[dict[str, Any], str | None]:
        """Prints what was found; its numbers, and the reason if the engine differs.

        Args:
            several: more than one sample was compared, so that constant outputs tell something.

        Raises:
            RuntimeError: nothing was compared.
        """
        if not self._compared:
            raise RuntimeError(
                f"nothing to compare: every output of {self._source} is empty, infinite or NaN on random inputs."
            )
        print(
            f"Largest difference, relative to the largest value: {self._difference:.2e}, allowed {self._allowed:.2e}."
        )
        if self._predictions:
            print(f"Predictions agree on {self._agree} of {self._predictions}.")
        constant = sorted(self._first.keys() - self._changes) if several else []
        for i in constant:
            print(
                f"Output {i} is the same for every input, and an engine of other weights might give it too: are "
                "BatchNorm's statistics trained?"
            )
        result = {
            "relative_difference": self._difference,
            "allowed": self._allowed,
            "agree": self._agree,
            "predictions": self._predictions,
            "constant_outputs": constant,
        }
        reasons = []
        if self._excess > 1:
            reasons.append(f"by {self._difference:.2e}, more than the {self._allowed:.2e} allowed")
        if self._lost:
            reasons.append(f"in {self._lost} values that are infinite or NaN only in the engine")
        return result, f"the engine differs from {self._source} {' and '.join(reasons)}." if reasons else None
