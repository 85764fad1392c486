"""One transformer block, forward and backward: our ops against torch.compile, and what each keeps for the backward pass.

The widths are those of the official models. The faster of `ops` and `compile` belongs into jepa_fast/nn/block_table.json;
`write_table` does it for the device that was measured.
"""

import json
import pathlib

import torch
from torch import Tensor

from jepa_fast.nn import block_compiled
from jepa_fast.nn.block import Block, Sequences, use_copies_

from .measure import agree, interleaved

# width, heads, tokens of a sequence, sequences on a GPU
SHAPES = {"predictor-384": (384, 12, 600, 48), "vits-384": (384, 6, 196, 64), "vitb-768": (768, 12, 196, 64),
          "vitl-1024": (1024, 16, 312, 48), "vith-1280": (1280, 16, 70, 128), "vitg-1408": (1408, 22, 312, 48)}
MANNERS = {"ops": ("ops", "all"), "ops, lean": ("ops", "lean"), "ops, checkpoint": ("ops", "checkpoint"),
           "compile": ("compile", "all")}


def bench_blocks(device: str = "cpu", precision: str = "bf16", repeats: int = 7, only: str = "",
                 max_tokens: int | None = None, manners: dict[str, tuple[str, str]] = MANNERS) -> list[dict]:
    """Rows per shape and manner: ms of forward and backward, of forward alone without gradients, bytes kept per token."""
    rows = []
    for name, (dim, heads, length, count) in SHAPES.items():
        if only not in name:
            continue
        count = count if max_tokens is None else max(1, min(count, max_tokens // length))
        block = Block(dim, heads).to(device)
        if precision == "bf16":
            use_copies_(block, {p: p.detach().bfloat16() for p in block.parameters()})
        x = torch.randn(count * length, dim, device=device, requires_grad=True)
        sequences = Sequences.uniform(count, length, torch.device(device))
        calls = {manner: _Calls(block, x, sequences, precision, *how) for manner, how in manners.items()}
        agree({manner: call.train() for manner, call in calls.items()}, 1e-4 if precision == "fp32" else 2e-2)
        trained = interleaved({manner: call.train for manner, call in calls.items()}, repeats=repeats)
        forward = interleaved({manner: call.forward for manner, call in calls.items()}, repeats=repeats)
        for manner, call in calls.items():
            t = trained[manner]
            rows.append({"bench": "blocks", "case": f"{name}-{count * length}-{precision}", "provider": manner, "dim": dim,
                         "ms": t.median * 1e3, "p20_ms": t.p20 * 1e3, "p80_ms": t.p80 * 1e3,
                         "forward_ms": forward[manner].median * 1e3, "ratio": trained["ops"].median / t.median,
                         "kept_bytes_per_token": call.kept_bytes() / (count * length)})
    return rows


class _Calls:
    def __init__(self, block: Block, x: Tensor, sequences: Sequences, precision: str, fusion: str, activations: str):
        self.block, self.x, self.sequences, self.precision = block, x, sequences, precision
        self.fusion, self.activations = fusion, activations

    def _out(self) -> Tensor:
        self.block.fusion, self.block.activations = self.fusion, self.activations
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.block(self.x, self.sequences)

    def train(self) -> list[Tensor]:
        out = self._out()
        grads = torch.autograd.grad(out, [self.x, *self.block.parameters()], torch.ones_like(out))
        self._wait()
        return [out.detach(), *grads]

    @torch.no_grad()
    def forward(self) -> None:
        self._out()
        self._wait()

    def kept_bytes(self) -> int:
        weights = {t.data_ptr() for t in (*self.block.parameters(), *(self.block.copies or {}).values())}
        kept: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            if t.data_ptr() not in weights:
                kept[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            self._out()
        return sum(kept.values())

    def _wait(self) -> None:
        if self.x.is_cuda:
            torch.cuda.synchronize()


def write_table(rows: list[dict], architecture: str, path: pathlib.Path | None = None) -> None:
    """Put the faster of ops and compile for every width measured into the table that training reads."""
    path = path or pathlib.Path(block_compiled.__file__).with_name("block_table.json")
    table = json.loads(path.read_text()) if path.exists() else {}
    for dim in {row["dim"] for row in rows}:
        by_manner = {manner: [row["ms"] for row in rows if (row["dim"], row["provider"]) == (dim, manner)]
                     for manner in ("ops", "compile")}
        table.setdefault(architecture, {})[str(dim)] = min(by_manner, key=lambda manner: sum(by_manner[manner]))
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
