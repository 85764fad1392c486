"""The prefetcher on the CPU, and its GPU half on a simulated device whose streams run as late and as badly as they may."""

import contextlib
import gc
import threading
import time
import weakref
from typing import NamedTuple

import pytest
import torch

from jepa_fast.data import EvalClipTransform, MixedData, Prefetcher, SyntheticData, SyntheticVideoData, prefetch
from jepa_fast.data.prefetch import map_tensors
from jepa_fast.masking import MultiBlock


def source(n, log=None):
    for i in range(n):
        if log is not None:
            log.append(i)
        yield {"views": [torch.full((2, 3), i, dtype=torch.uint8)], "index": torch.tensor([i, i + 1])}


def masks(batch, step):
    return {"masks": torch.tensor([step, int(batch["index"][0])])}


def finish(batch, step):
    return {"images": batch["views"][0].float() + 100 * step, "index": batch["index"]}


# ---- on the CPU


def test_in_turn_on_the_cpu():
    log = []
    batches = Prefetcher(source(3, log), prepare=masks, finish=finish, start_step=5)
    assert log == []
    for i, batch in enumerate(batches):
        assert log == list(range(i + 1))
        assert batch["images"].unique().tolist() == [i + 100 * (i + 5)] and batch["masks"].tolist() == [i + 5, i]
    with pytest.raises(StopIteration):
        next(batches)


def test_prepare_is_added_to_the_batches_of_a_loader():
    data = SyntheticData(num_images=12, image_size=4)
    plain = data.batches(data.build(), global_batch_size=4, start_step=2, num_steps=5)
    again = Prefetcher(data.batches(data.build(), global_batch_size=4, start_step=2, num_steps=5), prepare=masks)
    for step, (ours, expected) in enumerate(zip(again, plain, strict=True), 2):
        assert torch.equal(ours["images"], expected["images"])
        assert ours["masks"].tolist() == [step, int(expected["index"][0])]
    for begun in (plain, Prefetcher(source(1), prepare=masks)):
        with pytest.raises(ValueError, match="^batches must be a Prefetcher that has not begun and has no `prepare`"):
            Prefetcher(begun)


def test_waiting_is_counted(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(prefetch.time, "perf_counter", lambda: clock[0])

    def slow():
        for batch in source(2):
            clock[0] += 3.0
            yield batch

    batches = Prefetcher(slow())
    for expected in (3.0, 6.0):
        next(batches)
        assert batches.waited_s == expected
        clock[0] += 50.0  # the trainer computes


def test_clips_and_images_together():
    data = MixedData(videos=SyntheticVideoData(num_videos=6, num_frames=2, image_size=8, transform=EvalClipTransform(
        image_size=8, resize_ratio=1.0)),
                     images=SyntheticData(num_images=6, image_size=4), images_per_clip=2)
    batches = data.batches(data.build(), global_batch_size=2, start_step=1, num_steps=3)
    assert isinstance(batches, Prefetcher)
    for step, batch in enumerate(Prefetcher(batches, prepare=lambda batch, step: {"masks": step}), 1):
        assert batch["clips"].shape == (2, 3, 2, 8, 8) and batch["images"].shape == (4, 3, 4, 4)
        assert batch["masks"] == step and len(batch["image_index"]) == 4
    assert step == 2


def test_tensors_are_found_wherever_they_are():
    class Pair(NamedTuple):
        a: torch.Tensor
        b: int

    packed = MultiBlock().sample((14, 14), 2, seed=0, step=0).pack()
    value = {"a": [torch.zeros(1), (torch.zeros(2), "x", torch.Size([3]))], "b": Pair(torch.zeros(3), 4), "c": packed,
             "index": torch.zeros(5), "d": None}
    seen = []
    out = map_tensors(lambda t: seen.append(len(t)) or t + 1, value)
    assert seen[:3] == [1, 2, 3] and out["b"] == Pair(out["b"].a, 4) and out["b"].a.tolist() == [1.0] * 3
    assert out["a"][1][1:] == ("x", (3,)) and not out["index"].any() and out["d"] is None
    assert torch.equal(out["c"].context_idx, packed.context_idx + 1) and out["c"].num_tokens == 196


# ---- on a simulated GPU


class Gpu:
    """Streams that run only when all is asked for, the main one first: what may be read too early or too late is."""

    def __init__(self):
        self.lock, self.local = threading.RLock(), threading.local()
        self.main = Stream(self)
        self.streams = [self.main]

    def current(self, device=None):
        return getattr(self.local, "stream", self.main)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.local.stream = self.current(), stream
        yield
        self.local.stream = before

    def new_stream(self, device):
        self.streams.append(Stream(self))
        return self.streams[-1]

    def synchronize(self):
        with self.lock:
            while any(stream.work for stream in self.streams):
                for stream in self.streams:  # the main one as far as it gets
                    ran = False
                    while stream.work and stream.work[0][0]():
                        stream.work.pop(0)[1]()
                        ran = True
                    if ran:
                        break
                else:
                    raise AssertionError("the streams wait for each other")


class Stream:
    def __init__(self, gpu):
        self.gpu, self.work = gpu, []  # (is it ready, what to do)

    def add(self, run, ready=lambda: True):
        with self.gpu.lock:
            self.work.append((ready, run))

    def record_event(self):
        event = []
        self.add(lambda: event.append(True))
        return event

    def wait_event(self, event):
        self.add(lambda: None, lambda: bool(event))


class Host(torch.Tensor):
    """Page-locked or not; the copy to the device is work of the current stream."""

    gpu = None

    def is_pinned(self):
        return getattr(self, "_pinned", False)

    def pin_memory(self):
        out = self.clone().as_subclass(Host)
        out._pinned = True
        return out

    def to(self, device, non_blocking=False):
        gpu = Host.gpu
        assert torch.device(device).type == "cuda" and non_blocking and self.is_pinned()
        assert gpu.current() is not gpu.main
        memory = torch.full_like(self.as_subclass(torch.Tensor), 251)   # what lay there before
        values, stream = self.as_subclass(torch.Tensor), gpu.current()
        stream.add(lambda: memory.copy_(values))
        out = memory.as_subclass(Device)
        users = out._users = []

        def free():
            # the copy stream may write there at once, other streams' work counts only where it was recorded
            waits = [user.record_event() for user in users]
            stream.add(lambda: memory.fill_(253), lambda: all(waits))

        weakref.finalize(out, free)
        return out


class Device(torch.Tensor):
    @property
    def device(self):
        return torch.device("cuda:0")

    def record_stream(self, stream):
        self._users.append(stream)


@pytest.fixture
def gpu(monkeypatch):
    Host.gpu = gpu = Gpu()
    for name, value in (("Stream", gpu.new_stream), ("stream", gpu.on), ("current_stream", gpu.current)):
        monkeypatch.setattr(torch.cuda, name, value)
    return gpu


def host_source(n, log=None):
    for batch in source(n, log):
        yield {"views": [batch["views"][0].as_subclass(Host)], "index": batch["index"]}


def host_masks(batch, step):
    return {"masks": torch.tensor([step, int(batch["index"][0])]).as_subclass(Host)}


def train(gpu, batches, steps):
    """What a trainer sees: kernels on the main stream read the memory of each batch."""
    seen, reads = [], []

    def kernel(tensor, name):
        memory = torch.Tensor.as_subclass(tensor, torch.Tensor)
        gpu.main.add(lambda: seen.append((name, memory.flatten().tolist())))

    def launch(batch, step):
        kernel(batch["views"][0], f"images {step}")
        return {"index": batch["index"]}

    batches.finish = launch
    for batch in batches:
        kernel(batch.pop("masks"), f"masks {len(reads)}")
        reads.append(batch["index"].tolist())
        del batch
        steps(len(reads))
    gpu.synchronize()
    return seen, reads


def test_copies_are_right_whatever_the_streams_do(gpu):
    batches = Prefetcher(host_source(5), "cuda", prepare=host_masks)
    # some steps finish before the next batch, some do not
    seen, indices = train(gpu, batches, lambda n: gpu.synchronize() if n % 3 == 0 else None)
    expected = [item for i in range(5) for item in ((f"images {i}", [i] * 6), (f"masks {i}", [i, i]))]
    assert seen == expected and indices == [[i, i + 1] for i in range(5)]
    batches.close()


@pytest.mark.parametrize("forgotten", ["wait_event", "record_stream"])
def test_the_simulation_notices_what_is_forgotten(gpu, monkeypatch, forgotten):
    monkeypatch.setattr(Stream if forgotten == "wait_event" else Device, forgotten, lambda *_: None)
    seen, _ = train(gpu, Prefetcher(host_source(5), "cuda", prepare=host_masks), lambda n: None)
    poison = 251 if forgotten == "wait_event" else 253
    assert any(set(values) == {poison} for _, values in seen)


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen in 5 s")


def test_one_batch_is_ready_and_one_on_its_way(gpu):
    log = []
    batches = Prefetcher(host_source(9, log), "cuda", prepare=host_masks)
    next(batches)
    until(lambda: log == [0, 1, 2])
    time.sleep(0.05)
    assert log == [0, 1, 2]
    next(batches)
    until(lambda: log == [0, 1, 2, 3])
    thread, source_of = batches._thread, batches.batches
    batches.close()
    assert not thread.is_alive() and source_of.gi_frame is None
    with pytest.raises(StopIteration):
        next(batches)


def test_the_thread_ends_with_its_prefetcher(gpu):
    batches = Prefetcher(host_source(9), "cuda")
    next(batches)
    thread = batches._thread
    assert thread.is_alive()
    del batches
    gc.collect()
    until(lambda: not thread.is_alive())


@pytest.mark.parametrize("after", [0, 2])
def test_errors_come_where_the_batch_is_asked_for(gpu, after):
    def broken():
        yield from host_source(after)
        raise ValueError("3 of 5 files seen are not readable images")

    batches = Prefetcher(broken(), "cuda")
    for _ in range(after):
        next(batches)
    with pytest.raises(ValueError, match="^3 of 5 files seen are not readable images$"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
