"""The eval room by value: probes against brute force and sklearn, effective ranks of known spectra."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jepa_fast import eval as room


@pytest.fixture(scope="module")
def digits():
    """1,797 real 8 x 8 digits: train_features, train_labels, test_features, test_labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order], torch.tensor(labels, dtype=torch.int64)[order]
    return x[:1300], y[:1300], x[1300:], y[1300:]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# kNN

def brute_force_knn(train, train_labels, test, test_labels, k, temperature):
    num_right = 0
    for row, label in zip(test.double(), test_labels.tolist(), strict=True):
        similarity = [float(row @ other / (row.norm() * other.norm())) for other in train.double()]
        nearest = sorted(range(len(train)), key=lambda i: -similarity[i])[:k]
        votes = {}
        for i in nearest:
            votes[int(train_labels[i])] = votes.get(int(train_labels[i]), 0.0) + np.exp(similarity[i] / temperature)
        num_right += max(votes, key=votes.get) == label
    return num_right / len(test)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.07), (150, 0.07), (150, 10.0)])
def test_knn_is_the_brute_force_vote(k, temperature):
    # noisy classes, so that k and temperature change the answer
    labels = torch.arange(230) % 5
    features = F.one_hot(labels, 8).float() + random(230, 8)
    split = features[:150], labels[:150], features[150:], labels[150:]
    expected = brute_force_knn(*split, k, temperature)
    assert 0.2 < expected < 0.9
    for chunk in (None, 1, 7, 1000):
        assert room.knn_accuracy(*split, k=k, temperature=temperature, chunk=chunk) == expected


def test_knn_weighs_votes_by_cosine():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([0, 1, 1])
    test, answer = torch.tensor([[50.0, 0.0]]), torch.tensor([0])
    # one vote of exp(1 / T) against two of exp(0.6 / T): they balance at T = 0.4 / ln 2 = 0.577
    assert room.knn_accuracy(train, labels, test, answer, k=3, temperature=0.57) == 1.0
    assert room.knn_accuracy(train, labels, test, answer, k=3, temperature=0.58) == 0.0
    assert room.knn_accuracy(train, labels, test, answer, k=3, temperature=1e-6) == 1.0   # exp(1e6) would overflow
    assert room.knn_accuracy(train, labels, test, torch.tensor([7]), k=1) == 0.0           # a class train never saw


# linear probe

@pytest.mark.parametrize("weight_decay", [1e-3, 1e-1])
def test_linear_probe_is_sklearns_optimum(digits, weight_decay):
    from sklearn.linear_model import LogisticRegression

    train, labels, test, answers = digits
    probe = room.linear_probe(*digits, weight_decay=weight_decay, tolerance=1e-7)
    mean, std = train.double().mean(0), train.double().std(0, correction=0)
    std[std == 0] = 1.0
    torch.testing.assert_close(probe.mean, mean)
    torch.testing.assert_close(probe.std, std)
    standard = [((x.double() - mean) / std).numpy() for x in (train, test)]
    theirs = LogisticRegression(C=1 / (len(train) * weight_decay), tol=1e-7, max_iter=5000).fit(standard[0], labels)
    scale = float(np.abs(theirs.coef_).max())
    torch.testing.assert_close(probe.weight, torch.tensor(theirs.coef_), rtol=0, atol=2e-4 * scale)
    # cross entropy does not see what all biases share
    intercept = torch.tensor(theirs.intercept_ - theirs.intercept_.mean())
    torch.testing.assert_close(probe.bias - probe.bias.mean(), intercept, rtol=0, atol=2e-4 * scale)
    # one row may sit on the boundary of two classes
    assert abs(probe.accuracy - theirs.score(standard[1], answers)) < 1.5 / len(test)
    assert abs(probe.train_accuracy - theirs.score(standard[0], labels)) < 1.5 / len(train)
    assert probe.accuracy == (probe.logits(test).argmax(1) == answers).double().mean().item() > 0.9
    assert probe.grad_max <= 1e-6


def test_linear_probe_chooses_its_decay_on_train_rows_only(digits):
    train, labels, test, answers = digits
    # few rows, many noise features: no decay overfits, so the choice matters
    x = torch.cat([train[:200], 3 * random(200, 300)], 1)
    y = torch.cat([test, 3 * random(len(test), 300, seed=1)], 1)
    decays = (1.0, 1e-2, 1e-5)
    chosen = room.linear_probe(x, labels[:200], y, answers, weight_decay=decays)
    kept = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    held, kept = kept[:40], kept[40:]
    by_hand = [room.linear_probe(x[kept], labels[kept], x[held], labels[held], weight_decay=d).accuracy for d in decays]
    assert len(set(by_hand)) > 1
    assert chosen.weight_decay == decays[int(np.argmax(by_hand))]
    again = room.linear_probe(x, labels[:200], y, answers, weight_decay=chosen.weight_decay)
    assert torch.equal(chosen.weight, again.weight) and chosen.accuracy == again.accuracy
    # the test rows choose nothing
    few = room.linear_probe(x, labels[:200], y[:9], answers[:9], weight_decay=decays)
    assert few.weight_decay == chosen.weight_decay and torch.equal(few.weight, chosen.weight)
    # all decays separate two far classes: at a tie the largest
    far = torch.tensor([[-9.0], [9.0]]).repeat(20, 1), torch.tensor([0, 1]).repeat(20)
    assert room.linear_probe(*far, *far, weight_decay=(1e-3, 1e-1, 1e-2)).weight_decay == 1e-1


def test_linear_probe_survives_constant_features_and_float32(digits):
    train, labels, test, answers = digits
    plain = room.linear_probe(train, labels, test, answers, weight_decay=1e-2)
    # constant up to the last bit of float32: scaled to unit spread it would be noise as large as the digits
    steps = [1e5 / 3 * (1 + 1e-7 * random(len(x), 3).sign()) for x in (train, test)]
    wide = [torch.cat([x, step], 1) for x, step in zip((train, test), steps, strict=True)]
    assert (wide[0][:, -3:].double().std(0) > 0).all()
    for dtype in (torch.float64, torch.float32):
        probe = room.linear_probe(wide[0], labels, wide[1], answers, weight_decay=1e-2, dtype=dtype)
        assert probe.std[-3:].tolist() == [1.0] * 3 and probe.weight.dtype == dtype
        assert abs(probe.accuracy - plain.accuracy) < 1.5 / len(test)
    assert room.linear_probe(train.bfloat16(), labels, test.requires_grad_(), answers, weight_decay=1e-2).accuracy > 0.9


# collapse monitors

def with_spectrum(singular_values, n, D, dtype=torch.float64):
    """[n, D] with these singular values."""
    r = len(singular_values)
    left, right = (torch.linalg.qr(random(size, r, seed=size, dtype=torch.float64))[0] for size in (n, D))
    return (left * torch.tensor(singular_values, dtype=torch.float64) @ right.T).to(dtype)


@pytest.mark.parametrize("n, D", [(300, 40), (40, 300), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_effective_rank_of_known_spectra(n, D, dtype):
    for s in ([1.0], [2.0, 2.0, 2.0], [4.0, 2.0, 1.0, 1.0], [0.5**i for i in range(12)]):
        p = np.array(s) / sum(s)
        expected = float(np.exp(-(p * np.log(p)).sum()))
        rank = float(room.effective_rank(with_spectrum(s, n, D, dtype)))
        # rounding the entries to float32 puts a little weight on every direction
        assert rank == pytest.approx(expected, rel=1e-5 if dtype == torch.float64 else 1e-3)
        assert float(room.effective_rank(1e-6 * with_spectrum(s, n, D))) == pytest.approx(expected, rel=1e-5)
    assert float(room.effective_rank(torch.eye(32))) == pytest.approx(32)


def test_monitors_of_collapsed_features_are_exact():
    for constant in (random(1, 48), torch.full((1, 48), 1e4 / 3)):
        monitors = room.collapse_monitors(constant.expand(97, 48))
        assert [float(monitors[name]) for name in ("std_mean", "std_min", "effective_rank")] == [0.0, 0.0, 1.0]
    assert all(float(value) == 0.0 for value in room.collapse_monitors(torch.zeros(5, 3)).values())
    assert [float(v) for v in room.collapse_monitors(torch.ones(1, 4)).values()] == [0.0, 0.0, 1.0]
    broken = random(20, 4)
    for bad in (float("nan"), float("inf")):
        broken[3, 1] = bad
        for monitors in (room.collapse_monitors(broken), room.monitors_of_moments(room.feature_moments(broken))):
            assert np.isnan(float(monitors["effective_rank"])) and np.isnan(float(monitors["std_mean"]))


def test_monitors_by_value_and_by_moments():
    features = (random(1000, 24) * torch.linspace(0.1, 3, 24) + 5).requires_grad_()
    ours = room.collapse_monitors(features, max_rows=1000)
    std = features.detach().double().numpy().std(0)
    s = np.linalg.svd(features.detach().double().numpy(), compute_uv=False)
    p = s / s.sum()
    expected = {"std_mean": std.mean(), "std_min": std.min(), "effective_rank": np.exp(-(p * np.log(p)).sum())}
    # uneven parts, as processes with unequal batches would sum them
    summed = sum(room.feature_moments(part) for part in features.split([7, 600, 393]))
    for monitors in (ours, room.monitors_of_moments(summed)):
        assert monitors.keys() == expected.keys()
        for name, value in monitors.items():
            assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad
            assert float(value) == pytest.approx(expected[name], rel=1e-6), name
    # 1,000 rows at most 300 at a time: every fourth
    assert torch.equal(room.effective_rank(features, max_rows=300), room.effective_rank(features[::4]))


def test_cosine_by_value():
    a = torch.tensor([[[1.0, 0.0], [3.0, 4.0]], [[0.0, 0.0], [1e-9, 0.0]]])
    b = torch.tensor([[[2.0, 0.0], [4.0, 3.0]], [[1.0, 1.0], [-1.0, 0.0]]])
    assert float(room.cosine(a, b)) == pytest.approx((1 + 24 / 25 + 0 - 1) / 4)
    assert float(room.cosine(b.bfloat16(), b.bfloat16())) == pytest.approx(1.0)


# suite

def test_suite_gives_the_probes_numbers(digits):
    train, labels, test, answers = digits
    images = train.reshape(-1, 1, 8, 8), test.reshape(-1, 1, 8, 8)
    noise = random(1300, 4), random(497, 4, seed=1)
    table = room.evaluate_features({"raw pixels": images, "noise": noise}, labels, answers, k=5, weight_decay=1e-2)
    linear = room.linear_probe(*digits, weight_decay=1e-2).accuracy
    nearest = room.knn_accuracy(*digits, k=5)
    assert list(table.header) == ["features", "width", "linear probe %", "kNN (k=5) %"]
    assert list(table.rows[0]) == ["raw pixels", "64", f"{100 * linear:.1f}", f"{100 * nearest:.1f}"]
    assert table.rows[1][:2] == ("noise", "4") and float(table.rows[1][2]) < 25 < 90 < float(table.rows[0][2])


# errors

X, Y = torch.ones(6, 3), torch.arange(6)
BAD = [
    (lambda: room.knn_accuracy(X, Y, X, Y), ValueError, r"k must be in \[1, 6\].*got 20"),
    (lambda: room.knn_accuracy(X, None, X, Y, k=1), TypeError, "train_labels must be an int64 tensor.*NoneType"),
    (lambda: room.knn_accuracy(X, Y, X, Y[:4], k=1), ValueError, r"test_labels must be \[6\] int64.*got \[4\]"),
    (lambda: room.knn_accuracy(X, Y, X[:, :2], Y, k=1), ValueError, "test_features must have width 3.*got 2"),
    (lambda: room.knn_accuracy(X, Y - 1, X, Y, k=1), ValueError, "train_labels must be >= 0, got -1"),
    (lambda: room.knn_accuracy(X, Y, X / 0, Y, k=1), ValueError, "test_features must be finite.*6 of 6 rows"),
    (lambda: room.knn_accuracy(X, Y, X, Y, k=1, temperature=0), ValueError, "temperature must be > 0, got 0"),
    (lambda: room.knn_accuracy(X, Y, X, Y, k=1, chunk=0), ValueError, "chunk must be >= 1, got 0"),
    (lambda: room.linear_probe(X, Y.int(), X, Y), ValueError, r"train_labels must be \[6\] int64.*int32"),
    (lambda: room.linear_probe(X.int(), Y, X, Y), ValueError, r"train_features must be \[n, D\] floating.*int32"),
    (lambda: room.linear_probe(X[:0], Y[:0], X, Y), ValueError, r"train_features must be .*got \[0, 3\]"),
    (lambda: room.linear_probe(X, Y, X, Y, weight_decay=-1.0), ValueError, "weight_decay must be .*got -1.0"),
    (lambda: room.linear_probe(X, Y, X, Y, weight_decay=()), ValueError, r"weight_decay must be .*got \(\)"),
    (lambda: room.linear_probe(X, Y, X, Y, holdout=1.0), ValueError, "holdout must leave .*got 1.0 of 6 rows"),
    (lambda: room.linear_probe(X, Y, X, Y, dtype=torch.float16), ValueError, "dtype must be .*float16"),
    (lambda: room.evaluate_features({"x": (X, X)}, Y, None), TypeError, "test_labels must be .*NoneType"),
    (lambda: room.evaluate_features({}, Y, Y), ValueError, "named_features must name at least one"),
    (lambda: room.collapse_monitors(X[0]), ValueError, r"features must be \[n, D\].*got \[3\]"),
    (lambda: room.effective_rank(X, max_rows=0), ValueError, "max_rows must be >= 1, got 0"),
    (lambda: room.monitors_of_moments(X), ValueError, r"moments must be \[D \+ 1, D \+ 1\] float64, got \[6, 3\]"),
    (lambda: room.cosine(X, X[:2]), ValueError, r"prediction and target must .*got \[6, 3\] and \[2, 3\]"),
]


@pytest.mark.parametrize("call, kind, message", BAD, ids=[f"{i}-{case[2][:24]}" for i, case in enumerate(BAD)])
def test_bad_input_is_one_clear_line(call, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
