"""What the layers of a forward pass ask for is made once, and anew when what it was made of has changed."""

import torch

from jepa_fast.nn.last_made import LastMade


def asked(last, key, of, **options):
    """How often it is made in two calls with the same arguments, and what comes out of the second."""
    made = []

    def make():
        made.append(1)
        return torch.zeros(2) if of is None else 2 * of

    first, second = (last.get(key, of, make, **options) for _ in range(2))
    assert torch.equal(first, second) and not second.is_inference()
    return len(made), second


def test_made_once_and_again_after_a_change():
    last, ids = LastMade(), torch.arange(3)
    assert asked(last, ("a",), None)[0] == 1 and asked(last, ("a",), None)[0] == 0
    assert asked(last, ("a",), ids)[0] == 1 and asked(last, ("a",), ids)[0] == 0
    assert asked(last, ("b",), ids)[0] == 1
    assert asked(last, ("b",), ids.clone())[0] == 1
    asked(last, ("b",), ids)
    ids += 1
    count, made = asked(last, ("b",), ids)
    assert count == 1 and made.tolist() == [2, 4, 6]


def test_of_inference_mode_nothing_is_known_but_what_is_constant():
    last = LastMade()
    with torch.inference_mode():
        ids = torch.arange(3)
        assert asked(last, (), ids)[0] == 2
        ids += 1
        assert asked(last, (), ids)[1].tolist() == [2, 4, 6]
        assert asked(LastMade(), (), ids, is_constant=True)[0] == 1
    weights = torch.ones(3, requires_grad=True)  # what was made for inference serves training
    (weights * asked(last, (), None)[1].sum()).sum().backward()
