"""What a float8 target encoder does to training: `python -m bench.fp8_target`, I-JEPA on digits with and without it.

On a CPU float8 is emulated: the same quantised numbers, multiplied in float32. Writes bench/results/fp8-target.json and
fp8-target.png beside it.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile

from jepa_fast.eval._style import drawing
from jepa_fast.eval.probe_suite import evaluate_features
from jepa_fast.eval.run import features_of, splits
from jepa_fast.recipes import Recipe, get_recipe, load
from jepa_fast.train import checkpoint
from jepa_fast.train.loop import train
from jepa_fast.train.run import read_metrics

from .command import RESULTS
from .measure import provenance

COLOURS = {"same": "#1f5fa8", "fp8": "#c4541c"}


def recipe(target_precision: str, seed: int, epochs: float, batch_size: int) -> Recipe:
    """ijepa_mnist, shortened; seeds change weights, masks and crops."""
    base = get_recipe("ijepa_mnist")
    lr = dataclasses.replace(base.optim.lr, warmup_epochs=epochs / 10)
    return dataclasses.replace(
        base, optim=dataclasses.replace(base.optim, lr=lr),
        train=dataclasses.replace(base.train, target_precision=target_precision, seed=seed, epochs=epochs,
                                  batch_size=batch_size, checkpoint_every=epochs))


def run(target_precision: str, seed: int, epochs: float, batch_size: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        train(recipe(target_precision, seed, epochs, batch_size), folder)
        probes, metrics = probe(folder), read_metrics(folder / "metrics.csv")
    return {"target_precision": target_precision, "seed": seed,
            "step": [int(row["step"]) for row in metrics], "loss": [float(row["loss"]) for row in metrics],
            "linear": probes["linear probe %"], "knn": probes["kNN (k=20) %"]}


def probe(folder: pathlib.Path) -> dict[str, str]:
    """Probes of the target encoder, as saved: in float32."""
    config = load(folder / "recipe.yaml")
    objective = config.objective.build()
    checkpoint.load_into(objective, checkpoint.load(folder / "checkpoints" / "last.pt")["objective"], str(folder))
    parts = splits(config)
    features = tuple(features_of(objective.evaluation_encoder(), part.normalised) for part in parts)
    table = evaluate_features({"trained": features}, *(part.labels for part in parts), title="")
    return dict(zip(table.header, table.rows[0], strict=True))


def draw(runs: list[dict], path: pathlib.Path) -> None:
    with drawing(path, 6.0, 3.0) as figure:
        axes = figure.subplots()
        for entry in runs:
            axes.plot(entry["step"], entry["loss"], color=COLOURS[entry["target_precision"]], lw=1.0,
                      ls="-" if entry["seed"] == runs[0]["seed"] else ":",
                      label=f"target {entry['target_precision']}, seed {entry['seed']}")
        axes.set(title="I-JEPA on digits, loss", xlabel="step", yscale="log")
        axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        runs += [run(precision, seed, options.epochs, options.batch_size) for precision in ("same", "fp8")]
        data = {"provenance": provenance(), "epochs": options.epochs, "batch_size": options.batch_size, "runs": runs}
        (RESULTS / "fp8-target.json").write_text(json.dumps(data, indent=1) + "\n")
        draw(runs, RESULTS / "fp8-target.png")
    print("| target | seed | loss, last 5 logged | linear probe % | kNN % |\n|---|---|---|---|---|")
    for entry in runs:
        last = sum(entry["loss"][-5:]) / len(entry["loss"][-5:])
        print(f"| {entry['target_precision']} | {entry['seed']} | {last:.4f} | {entry['linear']} | {entry['knn']} |")


if __name__ == "__main__":
    main()
