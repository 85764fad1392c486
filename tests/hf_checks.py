"""What must hold for a patched Hugging Face model, for whichever transformers is imported: 5 by pytest, 4.57 as a script."""

import contextlib
import copy
import functools
import io
import itertools
import pathlib
import sys
import tempfile
import warnings

import torch

if __name__ == "__main__" and torch.version.cuda is None:  # as conftest.py does
    torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import transformers
from transformers import (
    IJepaConfig,
    IJepaModel,
    ViTConfig,
    ViTModel,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    VJEPA2Model,
)

from jepa_fast import patches
from jepa_fast.patches import _block, _hf, hf_ijepa, hf_vit, hf_vjepa2

IS_V4 = transformers.__version__.startswith("4.")
IMAGE = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80, image_size=24, patch_size=8,
             layer_norm_eps=1e-6)
VIDEO = dict(crop_size=32, frames_per_clip=4, hidden_size=48, num_attention_heads=3, num_hidden_layers=2, mlp_ratio=2.0,
             pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=2, pred_num_mask_tokens=3,
             num_pooler_layers=1, num_labels=5)
PATCHES = {"ijepa": hf_ijepa, "vit": hf_vit, "vjepa2": hf_vjepa2}
CASES = list(PATCHES)
BOTH_WAYS = list(itertools.product(CASES, ("model", "class")))


def build(case, **settings):
    """A model with weights large enough for positions and attention to matter, and a function of its inputs."""
    torch.manual_seed(0)
    if case == "vjepa2":
        model = VJEPA2Model(VJEPA2Config(**(VIDEO | settings)))
    else:
        config, cls = (IJepaConfig, IJepaModel) if case == "ijepa" else (ViTConfig, ViTModel)
        model = cls(config(**(IMAGE | settings)), add_pooling_layer=False, use_mask_token=True)
    return scatter(model.eval())


def scatter(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model


@functools.cache
def pixels(case, dtype=torch.float32):
    shape = (2, 4, 3, 32, 32) if case == "vjepa2" else (2, 3, 24, 24)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def masks():
    order = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    return dict(context_mask=[order[:, :5]], target_mask=[order[:, 5:].clone()])


def outputs(model, case, **options):
    x = pixels(case).to(next(model.parameters()).dtype)
    if case != "vjepa2":
        return [model(x, **options).last_hidden_state]
    out = model(x, **(masks() | options))
    return [out.last_hidden_state, out.masked_hidden_state, out.predictor_output.last_hidden_state,
            out.predictor_output.target_hidden_state]


def loss_of(outs):
    return sum((out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).mean() for out in outs)


def everything(model, case, context=contextlib.nullcontext, **options):
    """Outputs and gradients by name; a key's bias has a gradient of 0, whatever rounding makes of it."""
    model.zero_grad()
    with context():
        outs = outputs(model, case, **options)
    loss_of(outs).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()
             if parameter.grad is not None and not name.endswith(("key.bias", "k_proj.bias"))}
    return {f"output {i}": out.detach() for i, out in enumerate(outs)} | grads


def assert_as_exact(patched, original, exact, eps):
    assert patched.keys() == original.keys() == exact.keys()
    for name, value in exact.items():
        assert patched[name].dtype == original[name].dtype, name
        ours, theirs = ((values[name].double() - value.double()).abs().max() for values in (patched, original))
        floor = 8 * eps * value.double().abs().max()
        assert ours <= 2 * theirs + floor, f"{name}: {ours:.2e}, the original {theirs:.2e}"


def assert_close(a, b, tolerance=2e-5):
    for name in a:
        assert a[name].shape == b[name].shape, name
        assert (a[name] - b[name]).abs().max() <= tolerance * (1 + b[name].abs().max()), name


@contextlib.contextmanager
def counted():
    """How many layers were computed as ours."""
    count = []
    def run_block(*args):
        count.append(args[0].dtype)
        return original(*args)
    original = _hf.run_block
    _hf.run_block = hf_vjepa2.run_block = run_block
    try:
        yield count
    finally:
        _hf.run_block = hf_vjepa2.run_block = original


@contextlib.contextmanager
def for_any_size():
    """Layers are computed as ours also where they are too small to gain from it."""
    limits = [(module, name, value) for module in (_block, _hf) for name, value in vars(module).items()
              if name.startswith("MIN_")]
    for module, name, _ in limits:
        setattr(module, name, 0)
    try:
        yield
    finally:
        for module, name, value in limits:
            setattr(module, name, value)


DTYPES = {"float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None), "float16": (torch.float16, None),
          "float64": (torch.float64, None), "autocast": (torch.float32, torch.bfloat16)}


def check_values(case, way, name):
    """Outputs and gradients, next to the original's own error against float64."""
    dtype, autocast = DTYPES[name]
    context = functools.partial(torch.autocast, "cpu", autocast) if autocast else contextlib.nullcontext
    model = build(case).to(dtype)
    exact = everything(copy.deepcopy(model).double(), case)
    original = everything(model, case, context)
    with PATCHES[case].apply(model if way == "model" else None), counted() as count:
        patched = everything(model, case, context)
    assert len(count) == (0 if dtype == torch.float16 else 4 if case == "vjepa2" else 2)
    assert_as_exact(patched, original, exact, torch.finfo(autocast or dtype).eps)


def check_training(case, way):
    """Three steps with stochastic depth and dropout of pixels' embeddings: identical losses."""
    settings = dict(drop_path_rate=0.5) if case == "vjepa2" else {}
    losses = []
    for patched in (False, True):
        before = patched and way == "class"
        with PATCHES[case].apply() if before else contextlib.nullcontext():
            model = build(case, **settings).train()
            with PATCHES[case].apply(model) if patched and not before else contextlib.nullcontext():
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
                torch.manual_seed(5)
                for _ in range(3):
                    optimizer.zero_grad()
                    loss = loss_of(outputs(model, case)) ** 2
                    loss.backward()
                    optimizer.step()
                    losses.append(loss.item())
    assert losses[0] != losses[1]
    torch.testing.assert_close(torch.tensor(losses[3:]), torch.tensor(losses[:3]), rtol=1e-5, atol=1e-7)


def check_dropout(case):
    """Dropout that drops is the original's, with its random numbers."""
    model = build(case, **{"attention_probs_dropout_prob" if case == "vjepa2" else "hidden_dropout_prob": 0.5}).train()
    found = []
    for report in (contextlib.nullcontext(), PATCHES[case].apply(model)):
        with report:
            torch.manual_seed(6)
            found.append(dict(enumerate(outputs(model, case))))
    assert_close(*found, tolerance=1e-6)


def check_recorded(case, way):
    """hidden_states and attention weights; a recorder that stays behind does not make layers slow."""
    untouched, model = build(case), build(case)
    for config in (untouched.config, model.config):
        config._attn_implementation = "eager"
    plain = untouched(pixels(case), output_hidden_states=True, output_attentions=True)
    with PATCHES[case].apply(model if way == "model" else None) as report, counted() as count:
        patched = model(pixels(case), output_hidden_states=True, output_attentions=True)
        assert not count
        again = model(pixels(case), output_hidden_states=True)
        assert len(count) == (4 if case == "vjepa2" else 2)
    assert way == "class" or "'eager' was chosen" in str(report)
    for name in ("hidden_states", "attentions"):
        assert len(plain[name]) == len(patched[name]) >= 2
        assert_close(dict(enumerate(patched[name])), dict(enumerate(plain[name])))
    assert_close(dict(enumerate(again.hidden_states)), dict(enumerate(plain.hidden_states)))


def check_hooks(case):
    """Hooks on a layer and inside one see what they saw."""
    model = build(case)
    layer = (model.encoder.layer if case == "vjepa2" or IS_V4 else model.layers)[1]
    inner = layer.norm2 if case == "vjepa2" else layer.layernorm_after
    seen = []
    for part in (layer, inner):
        part.register_forward_hook(lambda part, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    outputs(model, case)
    with PATCHES[case].apply(model), counted() as count:
        outputs(model, case)
    assert len(count) == (3 if case == "vjepa2" else 1)
    assert_close(dict(enumerate(seen[2:])), dict(enumerate(seen[:2])))


def check_checkpointing(case, way):
    """Gradient checkpointing still runs, once per layer, and gives the same gradients."""
    model = build(case).train()
    expected = everything(model, case)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    layers = [layer for layer in model.modules() if hasattr(layer, "_gradient_checkpointing_func")
              and "Layer" in type(layer).__name__]
    calls = []
    for layer in layers:
        function = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *args, function=function: calls.append(0) or function(*args)
    with PATCHES[case].apply(model if way == "model" else None), counted() as count:
        found = everything(model, case)
    assert len(calls) == len(layers) and len(count) == 2 * len(layers)
    assert_close(found, expected)


def check_image_options(case):
    """Masked patches, positions interpolated to another size, and masks of heads or tokens."""
    model, x = build(case), torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(2))
    options = [dict(pixel_values=x, interpolate_pos_encoding=True),
               dict(pixel_values=pixels(case), bool_masked_pos=torch.arange(18).view(2, 9) % 3 == 0)]
    if not IS_V4:
        num_tokens = 9 if case == "ijepa" else 10
        options.append(dict(pixel_values=pixels(case), attention_mask=(torch.arange(num_tokens) < 7).repeat(2, 1)))
    elif case == "ijepa":
        model.config._attn_implementation = "eager"
        options.append(dict(pixel_values=pixels(case), head_mask=torch.tensor([1.0, 0.0, 1.0])))
    plain = [model(**option).last_hidden_state for option in options]
    with PATCHES[case].apply(model):
        patched = [model(**option).last_hidden_state for option in options]
    assert_close(dict(enumerate(patched)), dict(enumerate(plain)))
    assert (plain[-1] - model(pixels(case)).last_hidden_state).abs().max() > 1e-3


def check_attention_function():
    """As "sdpa", for layouts and lengths that differ, with and without a mask, training and not."""
    sdpa = transformers.AttentionInterface()["sdpa"]
    module = torch.nn.Module()
    module.is_causal = False
    q = torch.randn(2, 5, 3, 8).transpose(1, 2)
    k, v = torch.randn(2, 3, 7, 8), torch.randn(2, 7, 3, 8).transpose(1, 2)
    for mask in (None, torch.arange(7).view(1, 1, 1, 7) < 4):
        results = []
        for function in (sdpa, _hf.attention_forward):
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out, weights = function(module, *inputs, mask, scaling=0.3)
            assert weights is None and out.is_contiguous()
            results.append(dict(enumerate([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])))
        assert_close(*results)
    causal = [function(module, q, k[:, :, :5], v[:, :, :5], None, is_causal=True)[0]
              for function in (sdpa, _hf.attention_forward)]
    assert torch.equal(*causal)


def check_video_inference():
    """The default masks, classification with its pooler, short clips, inference mode then training."""
    torch.manual_seed(0)
    model = scatter(VJEPA2ForVideoClassification(VJEPA2Config(**VIDEO)).eval())
    x = pixels("vjepa2")

    def run():
        with torch.inference_mode():
            out = model.vjepa2(x)
            found = [out.last_hidden_state, out.predictor_output.last_hidden_state]
            found.append(model.vjepa2(x[:, :1]).last_hidden_state)
            for _ in range(2):  # other masks of the same shape must not meet the last table
                found.append(model.vjepa2(x, **masks()).predictor_output.last_hidden_state)
                found.append(model.vjepa2(x, **{key: [ids.flip(0) for ids in value] for key, value in masks().items()})
                             .predictor_output.last_hidden_state)
        loss = model(x, labels=torch.tensor([1, 3])).loss
        loss.backward()
        return dict(enumerate([*found, loss.detach(), model.pooler.query_tokens.grad, model.classifier.weight.grad]))
    plain = run()
    model.zero_grad()
    with hf_vjepa2.apply(model) as report, counted() as count:
        patched = run()
    assert len(count) == 6 * 4 + 2 + 1
    assert "VJEPA2PoolerSelfAttentionLayer.forward" in report.replaced
    assert_close(patched, plain)


def check_strict_angles():
    """strict_numerics rounds rotary angles to bfloat16 as the original does: closer to it than float32 angles are."""
    model = build("vjepa2").bfloat16()
    with torch.no_grad():
        original = outputs(model, "vjepa2")
        distances = []
        for strict in (True, False):
            with hf_vjepa2.apply(model, strict_numerics=strict):
                distances.append(sum((a.float() - b.float()).square().mean() for a, b in
                                     zip(original, outputs(model, "vjepa2"), strict=True)))
    attention, x = model.encoder.layer[0].attention, torch.zeros(2, 8, 48, dtype=torch.bfloat16)
    table = hf_vjepa2._original_rotary(attention, x, None)
    q = torch.randn(2, 3, 8, 16, dtype=torch.bfloat16)
    turned = attention.apply_rotary_embeddings(q, attention.get_position_ids(x))[..., :table.shape[-1]].float()
    rows = q.transpose(1, 2).reshape(16, 3, 16)[..., :table.shape[-1]].float()
    swapped = rows.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    ours = (rows * table[:, :1] + swapped * table[:, 1:]).view(2, 8, 3, -1).transpose(1, 2)
    assert (ours - turned).abs().max() <= 2 ** -6 * turned.abs().max()
    assert distances[0] < distances[1]


def check_saved(case, way):
    """save_pretrained, from_pretrained, AutoModel, state-dict keys, deepcopy and torch.save."""
    model = build(case)
    expected = dict(enumerate(outputs(model, case)))
    keys = list(model.state_dict())
    auto = transformers.AutoModel
    with tempfile.TemporaryDirectory() as folder, PATCHES[case].apply(model if way == "model" else None) as report:
        assert list(model.state_dict()) == keys
        model.save_pretrained(folder)
        assert "jepa_fast" not in (pathlib.Path(folder) / "config.json").read_text()
        options = {} if case == "vjepa2" else dict(use_mask_token=True, add_pooling_layer=False)
        again = auto.from_pretrained(folder, attn_implementation="jepa_fast", **options).eval()
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        for number, other in enumerate((again, copied, loaded)):
            with counted() as count:
                assert_close(dict(enumerate(outputs(other, case))), expected)
            assert bool(count) == (way == "class" or number == 1), number
    with PATCHES[case].apply(loaded), counted() as count:  # what pickle left on its instances is no obstacle
        assert_close(dict(enumerate(outputs(loaded, case))), expected)
    assert count and report is not None


def check_undo(case):
    """Every class, module and instance as it was, the very objects."""
    module = _hf.modeling(case)
    model = build(case)

    def state():
        return ({(name, key): value for name, owner in vars(module).items() if isinstance(owner, type)
                 for key, value in vars(owner).items()}, dict(vars(module)),
                [dict(vars(part)) for part in model.modules()], dict(vars(model.config)))

    def assert_same(a, b):
        for old, new in zip(a, b, strict=True):
            for x, y in zip(old, new, strict=True) if isinstance(old, list) else [(old, new)]:
                assert x.keys() == y.keys() and all(y[key] is x[key] for key in x)
    before = state()
    for target in (model, None):
        report = PATCHES[case].apply(target)
        assert report.replaced
        report.undo()
        assert_same(before, state())
    assert [name for name, patch in PATCHES.items() if patch.matches(model)] == [case]
    report = patches.auto(model)
    assert f"hf_{case}" in report.patch and report.replaced
    report.undo()


def check_refusal(case):
    """Another signature is refused in one line, and nothing stays replaced."""
    module = _hf.modeling(case)
    cls = {"ijepa": "IJepaLayer", "vit": "ViTLayer", "vjepa2": "VJEPA2Layer"}[case]
    cls = getattr(module, cls)
    original = cls.forward
    cls.forward = lambda self, hidden_states, rotary: hidden_states
    try:
        PATCHES[case].apply()
    except patches.PatchError as error:
        assert f"{cls.__name__}.forward must take" in str(error) and "\n" not in str(error)
    else:
        raise AssertionError("not refused")
    finally:
        cls.forward = original


def check_compile(case, way):
    """Under torch.compile the original runs, in as many graphs as before."""
    model = build(case)
    x = pixels(case)
    run = (lambda: model.encoder(x)) if case == "vjepa2" else (lambda: model(x))
    with torch.no_grad():
        expected = run().last_hidden_state
        with PATCHES[case].apply(model if way == "model" else None):
            torch._dynamo.reset()
            found = torch.compile(run, backend="eager", fullgraph=True)().last_hidden_state
    assert_close({0: found}, {0: expected})


ROWS = {
    # every dtype one way, one both ways
    "values": [(case, way, dtype) for case, way in BOTH_WAYS for dtype in DTYPES if way == "model" or dtype == "float32"],
    "training": BOTH_WAYS, "recorded": BOTH_WAYS, "checkpointing": BOTH_WAYS, "saved": BOTH_WAYS,
    "image_options": [("ijepa",), ("vit",)], "compile": [("ijepa", "model"), ("vjepa2", "class")],
    "attention_function": [()], "video_inference": [()], "strict_angles": [()],
}
ALL = {"-".join([name.removeprefix("check_"), *row]): functools.partial(check, *row)
       for name, check in list(globals().items()) if name.startswith("check_")
       for row in ROWS.get(name.removeprefix("check_"), [(case,) for case in CASES])}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    failed = 0
    for name, check in ALL.items():
        if name.startswith("compile"):  # torch.compile is tried with one version
            continue
        try:
            with for_any_size():
                check()
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"transformers {transformers.__version__}: {len(ALL)} checks, {failed} failed")
    sys.exit(failed > 0)
