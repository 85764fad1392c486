"""Statistics of steps: read late, in order, and never waited for; the file of metrics that they become."""

import dataclasses
import functools
import math

import pytest
import torch

from jepa_fast import recipes
from jepa_fast.data import SyntheticData
from jepa_fast.eval.collapse import collapse_monitors, feature_moments, monitors_of_moments
from jepa_fast.train import run as run_module
from jepa_fast.train.distributed import World
from jepa_fast.train.loop import train
from jepa_fast.train.meters import describe
from jepa_fast.train.metrics_file import MetricsFile, read_metrics
from jepa_fast.train.statistics import LateCopy, NotFinite, Statistics

CPU = World(0, 1, torch.device("cpu"))


class Queue:
    """A device that runs behind: copies arrive in order, when `run` is called or when somebody waits."""

    def __init__(self):
        self.copies, self.num_waits = [], 0

    def run(self, until=None) -> None:
        for copy in list(self.copies):
            copy.host.copy_(copy.source)
            copy.has_passed = True
            self.copies.remove(copy)
            if copy is until:
                break

    def copy_type(queue) -> type:
        class SlowCopy:
            def __init__(self, tensor):
                # in stream order: what is written to the source later does not count
                self.source, self.host, self.has_passed = tensor.clone(), torch.full_like(tensor, math.nan), False
                queue.copies.append(self)

            def is_there(self):
                return self.has_passed

            def get(self):
                if not self.has_passed:
                    queue.num_waits += 1
                    queue.run(until=self)
                return self.host

        return SlowCopy


def losses(step: int) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(step / 3), "cosine": torch.tensor(1.0 / step)}


def expected(step: int) -> dict[str, float]:
    return {name: float(value) for name, value in losses(step).items()}


def test_on_a_cpu_rows_are_there_at_once():
    statistics = Statistics(CPU, 2)
    for step in (1, 2):
        statistics.record(step, losses(step))
    statistics.send("what the host knows")
    (row,) = statistics.arrived()
    assert (row.step, row.values, row.host) == (2, expected(2), "what the host knows")
    statistics.record(3, losses(3))
    with pytest.raises(NotFinite, match="^cosine is not finite at step 4; that was all$"):
        statistics.last_words = lambda: "that was all"
        statistics.record(4, losses(4) | {"cosine": torch.tensor(math.nan)})


def test_late_rows_come_in_order_and_only_the_one_before_last_is_waited_for():
    queue = Queue()
    statistics = Statistics(CPU, 3, copy=queue.copy_type())
    seen = []
    for step in range(1, 13):
        statistics.record(step, losses(step))
        if step % 3 == 0:
            statistics.send(step)
        if step == 5:
            queue.run()
        seen += [(step, row.step, row.values == expected(row.step)) for row in statistics.arrived()]
    # 3 had passed by step 5; 6 was waited for when 9 was sent, 9 when 12 was
    assert seen == [(5, 3, True), (9, 6, True), (12, 9, True)]
    assert queue.num_waits == 2
    assert [(row.step, row.values) for row in statistics.flush()] == [(12, expected(12))]
    assert list(statistics.flush()) == []


def test_the_first_step_that_is_not_finite_is_named_when_it_is_read():
    statistics = Statistics(CPU, 4, copy=Queue().copy_type())
    for step in range(1, 9):
        bad = {"cosine": torch.tensor(math.inf)} if step == 6 else {"loss": torch.tensor(math.nan)} if step > 6 else {}
        statistics.record(step, losses(step) | bad)
        if step % 4 == 0:
            statistics.send(step)
    rows = statistics.flush()
    assert next(rows).step == 4
    with pytest.raises(NotFinite, match="cosine is not finite at step 6"):
        next(rows)
    # steps after the last log step are looked at before a checkpoint too
    statistics = Statistics(CPU, 4, copy=Queue().copy_type())
    statistics.record(1, {"loss": torch.tensor(-math.inf)})
    with pytest.raises(NotFinite, match="loss is not finite at step 1"):
        list(statistics.flush())


def test_terms_may_come_and_go():
    statistics = Statistics(CPU, 4, copy=Queue().copy_type())
    for step in range(1, 9):
        statistics.record(step, losses(step) | ({"grad_norm": torch.tensor(2.0 * step)} if step > 2 else {}))
        if step % 4 == 0:
            statistics.send(step)
    assert [row.values["grad_norm"] for row in statistics.flush()] == [8.0, 16.0]


def test_monitors_are_those_of_the_features():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    direct, late = (Statistics(CPU, 1, copy=copy) for copy in (LateCopy, Queue().copy_type()))
    for statistics in (direct, late):
        statistics.record(1, losses(1))
        statistics.send(None, features.clone())
        (row,) = statistics.flush()
        assert row.values == expected(1) | {name: float(value) for name, value in collapse_monitors(features).items()}


def test_rows_are_means_over_ranks_by_one_reduction(monkeypatch):
    """The other rank's losses are three times ours, its features the same; nothing is reduced between log steps."""
    reduced = []

    def all_reduce(tensor):
        is_moments = len(reduced) == 0
        reduced.append(tuple(tensor.shape))
        tensor.mul_(2 if is_moments else 4)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    statistics = Statistics(World(0, 2, torch.device("cpu")), 3)
    for step in (1, 2, 3):
        statistics.record(step, losses(step))
        assert not reduced
    statistics.send(None, features)
    (row,) = statistics.arrived()
    assert reduced == [(7, 7), (3, 2)]
    both = monitors_of_moments(2 * feature_moments(features))
    assert row.values == {name: 2 * value for name, value in expected(3).items()} | {k: float(v) for k, v in both.items()}


def test_recording_reads_nothing_from_the_device():
    """Tensors on the meta device have no values: any read on the host would raise."""
    meta = torch.device("meta")

    class Absent(LateCopy):
        def __init__(self, tensor):
            self._host, self._event = torch.zeros(tensor.shape, dtype=tensor.dtype), None
            assert tensor.device == meta

    statistics = Statistics(World(0, 1, meta), 2, copy=Absent)
    for step in range(1, 7):
        loss = torch.empty((), device=meta)
        statistics.record(step, {"loss": loss, "half": loss.half()})
        if step % 2 == 0:
            statistics.send(step, torch.empty(700, 5, device=meta))
    assert [row.step for row in statistics.flush()] == [2, 4, 6]


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for():
    device = torch.device("cuda")
    statistics = Statistics(World(0, 1, device), 8)
    values = [{name: value.to(device) for name, value in losses(step).items()} for step in range(1, 9)]
    features = torch.randn(300, 16, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 9):
            statistics.record(step, values[step - 1])
            if step == 4:
                statistics.send(step, features)
            list(statistics.arrived())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    statistics.send(8)
    rows = list(statistics.flush())
    assert rows[-1].values == expected(8)


def tiny(**train_changes) -> recipes.Recipe:
    recipe = recipes.get_recipe("lejepa_mnist")
    objective = dataclasses.replace(recipe.objective, encoder=dataclasses.replace(recipe.objective.encoder, width=4),
                                    projector=(8, 8), sigreg=dataclasses.replace(recipe.objective.sigreg, num_slices=8))
    settings = dict(batch_size=8, epochs=2.0, log_every=2, checkpoint_every=0.4, device="cpu", max_steps=7) | train_changes
    return dataclasses.replace(recipe, objective=objective, train=dataclasses.replace(recipe.train, **settings),
                               data=SyntheticData(num_images=40, image_size=28, in_chans=1, transform=recipe.data.transform))


def test_a_run_writes_the_same_rows_late(tmp_path, monkeypatch):
    train(tiny(), tmp_path / "direct")
    monkeypatch.setattr(run_module, "Statistics", functools.partial(Statistics, copy=Queue().copy_type()))
    train(tiny(), tmp_path / "late")
    # and a life that ends between two log steps is gone on with
    train(tiny(max_steps=5), tmp_path / "resumed")
    train(tiny(), tmp_path / "resumed", resume=True)
    columns = ("step", "epoch", "loss", "sigreg", "std_min", "effective_rank", "lr")
    rows = {name: [[row[column] for column in columns] for row in read_metrics(tmp_path / name / "metrics.csv")]
            for name in ("direct", "late", "resumed")}
    assert [row[0] for row in rows["direct"]] == ["2", "4", "6", "7"]
    assert rows["late"] == rows["direct"]
    # a life without a step left
    finished = train(tiny(), tmp_path / "resumed", resume=True)
    assert describe(finished.summary, tiny()) == ["lejepa_mnist: no step was left at 7"]
    # the first life logged its last step, 5
    assert [row for row in rows["resumed"] if row[0] != "5"] == rows["direct"]
    assert [row[0] for row in rows["resumed"]] == ["2", "4", "5", "6", "7"]


def test_a_step_that_was_not_finite_never_reaches_a_checkpoint(tmp_path, monkeypatch):
    """Read late, the bad step 3 is found before step 4, a multiple of the checkpoints' 2, is saved."""
    from jepa_fast.objectives.lejepa import LeJEPA
    original, calls = LeJEPA.forward, []

    def poisoned(self, batch):
        calls.append(1)
        return original(self, batch) | ({"invariance": torch.tensor(math.nan)} if len(calls) == 3 else {})

    monkeypatch.setattr(LeJEPA, "forward", poisoned)
    monkeypatch.setattr(run_module, "Statistics", functools.partial(Statistics, copy=Queue().copy_type()))
    with pytest.raises(NotFinite, match=r"invariance is not finite at step 3; the last good checkpoint is .*last\.pt"):
        train(tiny(), tmp_path)
    assert len(calls) == 4
    assert torch.load(tmp_path / "checkpoints/last.pt", weights_only=True)["step"] == 2


def test_metrics_file_grows_by_rows_and_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    file.start(0)
    file.append({"step": 1, "loss": 0.5})
    file.append({"step": 2, "loss": 0.25})
    file.append({"step": 3, "loss": 0.125, "grad_norm": 7.0})
    file.append({"step": 4, "loss": 0.0625})
    assert path.read_text().splitlines() == ["step,loss,grad_norm", "1,0.5,", "2,0.25,", "3,0.125,7.0", "4,0.0625,"]
    with open(path, "a") as cut:
        cut.write("5,0.0")  # by a kill
    file = MetricsFile(path)
    file.start(3)
    file.append({"step": 4, "loss": 1.0, "grad_norm": 8.0})
    assert path.read_text().splitlines() == ["step,loss,grad_norm", "1,0.5,", "2,0.25,", "3,0.125,7.0", "4,1.0,8.0"]
    file.start(0)
    assert not path.exists()


def test_a_log_step_must_exist(tmp_path):
    with pytest.raises(ValueError, match="train.log_every must be at least 1, got 0"):
        train(tiny(log_every=0), tmp_path)
