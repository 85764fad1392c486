"""Cases for `varlen_attention` and `varlen_attention_qkv`."""

from itertools import accumulate

import torch

from .. import ops
from ._spec import Case, OpSpec


def _ends(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _numbers(g, lengths, *shape):
    """Whole where no query has two keys: its softmax is flat, and its zero gradient then comes out exactly."""
    x = torch.randn(*shape, generator=g)
    return x.round() if max(lengths, default=0) < 2 else x


def _rotary(g, P, R):
    """Any two numbers in [-1, 1] per column: wider than rotary positions (equal angles or not, a sign per column)."""
    return 2 * torch.rand(P, 2, R, generator=g) - 1


def _attend(name, H, d, lengths, lengths_k=None, *, logits=1.0, scale=None, longer=0, R=0, frame_size=0,
            is_large=False):
    """`logits`: how large; `longer`: what max_seqlen promises too much; `R`: columns with rotary positions."""
    def make(g):
        k_lengths = lengths if lengths_k is None else lengths_k
        P_q, P_k = sum(lengths), sum(k_lengths)
        arguments = {"q": _numbers(g, k_lengths, P_q, H, d) * logits, "k": _numbers(g, k_lengths, P_k, H, d),
                     "v": _numbers(g, k_lengths, P_k, H, d), "cu_seqlens_q": _ends(lengths),
                     "max_seqlen_q": max(lengths, default=0) + longer, "scale": scale, "frame_size": frame_size}
        if lengths_k is not None:
            arguments |= {"cu_seqlens_k": _ends(lengths_k), "max_seqlen_k": max(lengths_k, default=0) + longer}
        if R:
            arguments |= {"rotary_q": _rotary(g, P_q, R), "rotary_k": _rotary(g, P_k, R)}
        return arguments

    return Case(name, make, is_large)


def _attend_qkv(name, H, d, lengths, *, logits=1.0, scale=None, R=0, frame_size=0, is_large=False):
    def make(g):
        qkv = _numbers(g, lengths, sum(lengths), 3, H, d)
        qkv[:, 0] *= logits
        return {"qkv": qkv, "cu_seqlens": _ends(lengths), "max_seqlen": max(lengths, default=0), "scale": scale,
                "rotary": _rotary(g, len(qkv), R) if R else None, "frame_size": frame_size}

    return Case(name, make, is_large)


def _random_lengths(draw, S):
    """None or a few and more: the gradient through the softmax of one key, or nearly one, is all rounding."""
    longest = [5, 20, 70][draw(0, 2)]
    return [n and n + 3 for n in (draw(0, longest) for _ in range(S))]


def _random(draw):
    S, H, d = draw(0, 3), draw(1, 2), draw(4, 70)  # of a few numbers plain hits some by luck
    lengths, is_cross = _random_lengths(draw, S), draw(0, 1) == 1
    lengths_k = _random_lengths(draw, S) if is_cross else None
    R, frame_size = draw(0, 1) * 2 * draw(0, d // 2), draw(0, 1) * draw(1, 12)
    return _attend(f"fuzz-{H}-{d}-{lengths}-{lengths_k}-{R}-{frame_size}", H, d, lengths, lengths_k,
                   logits=[0.5, 1.0][draw(0, 1)], longer=draw(0, 5), R=R, frame_size=frame_size)


def _random_qkv(draw):
    S, H, d = draw(0, 3), draw(1, 2), draw(4, 70)  # of a few numbers plain hits some by luck
    lengths = _random_lengths(draw, S)
    R, frame_size = draw(0, 1) * 2 * draw(0, d // 2), draw(0, 1) * draw(1, 12)
    return _attend_qkv(f"fuzz-{H}-{d}-{lengths}-{R}-{frame_size}", H, d, lengths, logits=[0.5, 1.0][draw(0, 1)], R=R,
                       frame_size=frame_size)


_RAGGED = [5, 0, 33, 1, 17, 0]

ATTENTION = OpSpec(
    function=ops.varlen_attention,
    ops=("varlen_attention", "varlen_attention_backward"),
    gradients=("q", "k", "v"),
    keep_dtype=("rotary_q", "rotary_k"),
    cases=[
        _attend("no-sequences", 2, 8, []),
        _attend("empty-sequences", 2, 8, [0, 0]),
        _attend("one-token", 1, 1, [1]),
        _attend("one-key", 2, 20, [7, 3], [1, 1]),
        _attend("no-keys", 2, 16, [7, 3, 4], [5, 0, 2]),
        _attend("no-queries", 2, 16, [7, 0, 4], [5, 6, 2]),
        _attend("one-query", 2, 24, [1, 1], [50, 83]),
        _attend("cross", 2, 64, [40, 3, 66], [20, 130, 9], longer=10),
        *[_attend(f"ragged-d{d}", 2, d, _RAGGED) for d in (1, 7, 16, 20, 24, 32, 64)],
        *[_attend(f"ragged-d{d}", 2, d, [5, 0, 20, 1]) for d in (48, 80, 88, 96, 104, 128, 160, 256)],
        _attend("scale", 2, 32, _RAGGED, scale=0.5),
        *[_attend(f"rotary-d{d}", 2, d, _RAGGED, R=R) for d, R in ((7, 6), (24, 24), (64, 60), (80, 78))],
        _attend("rotary-cross", 2, 64, [40, 3, 66], [20, 130, 9], R=60),
        _attend("rotary-turned-once", 1, 24, [270, 3], R=24),
        _attend("frames", 2, 32, [40, 12, 0, 7], frame_size=10),
        _attend("frames-of-a-cache", 2, 32, [20, 5, 30], [50, 5, 12], frame_size=10),
        _attend("frames-rotary", 1, 64, [135], [270], R=60, frame_size=90, is_large=True),
        _attend("large-logits", 1, 64, [40, 70], logits=30.0),
        _attend("blocks", 1, 24, [150], [140]),
        _attend("frames-blocks", 1, 24, [150, 12], [210, 9], frame_size=50),
        _attend("blocks-frames", 1, 64, [150], [190], R=60, frame_size=45),
        *[_attend(f"long-d{d}", 1, d, [9, 2], [140, 30], R=R, frame_size=40) for d, R in ((32, 30), (80, 78), (128, 0))],
        _attend("two-tiles", 1, 24, [300], [290], is_large=True),
        _attend("tiles", 1, 16, [530, 20], [600, 20], is_large=True),
        _attend("ijepa-predictor", 16, 24, [114] * 2, is_large=True),
        _attend("vits16-224-predictor", 6, 64, [83] * 16, is_large=True),
        _attend("vits16-224", 6, 64, [196] * 4, is_large=True),
    ],
    random_case=_random,
    floor=2.0,  # g v^T - rowsum(g * out) is a small difference: by chance ours is not always where that of plain is
    bench=[_attend("vits16-224-b16-context-untrimmed", 6, 64, [60 + 7 * i % 40 for i in range(16)])],
    gate={torch.bfloat16: [_attend("cross", 2, 64, [150], [120])], torch.float32: [_attend("cross", 2, 64, [40], [20])]},
)

ATTENTION_QKV = OpSpec(
    function=ops.varlen_attention_qkv,
    ops=("varlen_attention_qkv", "varlen_attention_qkv_backward"),
    gradients=("qkv",),
    keep_dtype=("rotary",),
    cases=[
        _attend_qkv("no-sequences", 2, 8, []),
        _attend_qkv("one-token", 1, 1, [1]),
        _attend_qkv("ragged-d24", 3, 24, _RAGGED),
        _attend_qkv("ragged-d64", 2, 64, _RAGGED, scale=0.3),
        _attend_qkv("large-logits", 1, 80, [20, 40], logits=30.0),
        _attend_qkv("rotary-frames", 2, 80, [15, 40], R=78, frame_size=10),
        _attend_qkv("vits16-224", 6, 64, [196] * 4, is_large=True),
    ],
    random_case=_random_qkv,
    floor=2.0,
    bench=[_attend_qkv("vits16-224-b16", 6, 64, [196] * 16)],
    gate={torch.bfloat16: [_attend_qkv(f"d{d}-{n}", 2, d, [n], R=R, frame_size=30) for d, n, R in (
              (24, 114, 24), (32, 200, 30), (64, 83, 60), (64, 200, 60), (80, 70, 78), (80, 256, 78), (88, 196, 0),
              (104, 256, 0), (128, 200, 126))]
          + [_attend_qkv("d64-256-plain", 2, 64, [256])],
          torch.float32: [_attend_qkv("d64-30", 2, 64, [30], R=60), _attend_qkv("d64-200", 2, 64, [200], R=60)]},
)

SPECS = [ATTENTION, ATTENTION_QKV]
