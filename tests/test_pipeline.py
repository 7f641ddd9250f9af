"""The pipeline: every image in its place, each loaded once, and no thread left whatever happens."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_engine import SIZE, FakeEngine

from featcache import pipeline
from featcache.backbones import load_backbone
from featcache.engines import make_engine
from featcache.images.decode import LoadedPictures, load_pictures
from featcache.images.identity import ImageFailure
from featcache.lanes import EmbeddedBatch, EmbeddedImage, Lane, Stages
from featcache.pipeline import Load, embed_files, embed_lanes, load_in_time
from featcache.records import NO_FILE, RowStatus
from featcache.spec import Picture, Preprocessing

PLAIN = Picture(preprocessing=Preprocessing(resize_size=SIZE, crop_size=SIZE))
TWO_VIEWS = (PLAIN, Picture(preprocessing=PLAIN.preprocessing, view=1))


class Loader:
    """Makes the pictures of "7.png" of sevens, its first view of sevens and a hundred, and counts."""

    def __init__(self, special: dict[int, Callable[[], object]] | None = None) -> None:
        self.loads: Counter[int] = Counter()
        self.asked: dict[int, Sequence[Picture]] = {}
        self._special = special or {}
        self._lock = threading.Lock()

    def __call__(self, path: Path, pictures: Sequence[Picture]) -> LoadedPictures | ImageFailure:
        number = int(path.stem)
        with self._lock:
            self.loads[number] += 1
            self.asked[number] = pictures
        if number in self._special:
            self._special[number]()
        shape = (SIZE, SIZE, 3)
        pixels = tuple(np.full(shape, number + 100 * picture.view, np.uint8) for picture in pictures)
        return LoadedPictures(pixels=pixels, sha256=bytes([number]) * 32, stat=NO_FILE)


def files(count: int) -> list[Path]:
    return [Path(f"{number}.png") for number in range(count)]


def lane(engine: FakeEngine, rows: Sequence[int], pictures: tuple[Picture, ...] = (PLAIN,)) -> Lane:
    return Lane(engine=engine, pictures=pictures, rows=rows)


def run(
    lanes: Sequence[Lane], load: Load, *, count: int = 100, workers: int = 2
) -> list[list[EmbeddedBatch]]:
    """The batches of each lane."""
    found: list[list[EmbeddedBatch]] = [[] for _ in lanes]
    for index, batch in embed_lanes(files(count), lanes, load=load, workers=workers):
        found[index].append(batch)
    return found


def numbers(batches: Sequence[EmbeddedBatch], key: str = "penultimate") -> list[float]:
    """What the first value of each vector says of the image it is of."""
    return [float(vector[0]) for batch in batches for vector in batch.features[key]]


def statuses(batches: Sequence[EmbeddedBatch]) -> dict[int, RowStatus]:
    outcomes = [outcome for batch in batches for outcome in batch.outcomes]
    return {i: outcome.status for i, outcome in enumerate(outcomes) if isinstance(outcome, ImageFailure)}


def count_images(batches: Sequence[EmbeddedBatch]) -> int:
    return sum(len(batch.outcomes) for batch in batches)


def wait_until(reached: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.005)
    return reached()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert wait_until(lambda: set(threading.enumerate()) <= before, 5)


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """As many as there were, here and in a thread to come, whatever the pass sets them to."""
    before, after = torch.get_num_threads(), []
    torch.set_num_threads(3)
    yield
    later = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
    later.start()
    later.join()
    after.append(torch.get_num_threads())
    torch.set_num_threads(before)
    assert after == [3, 3]


@pytest.mark.parametrize("callers", [0, 2])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("count", [1, 4, 23])
def test_images_come_in_order_with_their_own_features(count: int, workers: int, callers: int) -> None:
    def dawdle() -> None:
        time.sleep(0.02)

    load = Loader(special=dict.fromkeys(range(0, 23, 5), dawdle))
    (batches,) = run([lane(FakeEngine(batch_size=4, callers=callers), range(count))], load, workers=workers)
    assert numbers(batches) == list(range(count))
    for batch in batches:
        assert {len(batch.outcomes)} == {len(vectors) for vectors in batch.features.values()}
    outcomes = [outcome for batch in batches for outcome in batch.outcomes]
    assert [outcome.sha256[0] for outcome in outcomes if outcome.sha256] == list(range(count))
    assert all(isinstance(outcome, EmbeddedImage) for outcome in outcomes)


def test_lanes_of_other_rows_batches_and_pictures_share_one_decoding() -> None:
    load = Loader()
    lanes = [
        lane(FakeEngine(batch_size=4), range(0, 50, 2)),
        lane(FakeEngine(batch_size=3, callers=1), range(10, 60), TWO_VIEWS),
        lane(FakeEngine(batch_size=16), []),
    ]
    found = run(lanes, load)
    assert numbers(found[0]) == list(range(0, 50, 2))
    assert numbers(found[1]) == list(range(10, 60))
    assert numbers(found[1], "penultimate@1") == list(range(110, 160))
    assert found[2] == []
    assert load.loads == Counter({*range(0, 50, 2), *range(10, 60)})
    assert list(load.asked[2]) == [PLAIN]
    assert list(load.asked[12]) == list(TWO_VIEWS), "the picture that both want is made once"


def test_a_slow_taker_holds_up_the_work_so_that_memory_is_bounded() -> None:
    """Batches of 4 and two workers: twelve batches, 48 pictures, are ahead of what was taken."""
    load, engine = Loader(), FakeEngine(batch_size=4)
    batches = embed_lanes(files(100), [lane(engine, range(100))], load=load, workers=2)
    with closing(batches):
        next(batches)
        assert wait_until(lambda: load.loads.total() == 48)
        time.sleep(0.05)
        assert load.loads.total() == 48
        taken = sum(len(batch.outcomes) for _, batch in batches)
    assert 52 <= taken < 100, "but for what was taken first"
    assert engine.allocated <= 12, "what batches are made in is used again"


def test_what_was_computed_while_nobody_looked_comes_as_one() -> None:
    taken = threading.Event()
    load, engine = Loader(special={4: lambda: taken.wait(20)}), FakeEngine(batch_size=4)
    batches = embed_lanes(files(100), [lane(engine, range(100))], load=load, workers=2)
    with closing(batches):
        _, first = next(batches)
        taken.set()
        assert wait_until(lambda: engine.calls == 12)
        time.sleep(0.05)
        _, second = next(batches)
    assert numbers([first]) == list(range(4))
    assert numbers([second]) == list(range(4, 48))


def test_small_batches_are_worked_ahead_far_enough_to_feed_all_workers() -> None:
    load = Loader()
    batches = embed_lanes(files(100), [lane(FakeEngine(batch_size=1), range(100))], load=load, workers=2)
    with closing(batches):
        next(batches)
        assert wait_until(lambda: load.loads.total() >= 48)


@pytest.mark.parametrize(("batch_size", "turn"), [(1, 16), (4, 16), (8, 16), (32, 32)])
def test_a_thread_decodes_for_several_batches_before_it_computes_them(batch_size: int, turn: int) -> None:
    loaded, order = Loader(), []

    def load(path: Path, pictures: Sequence[Picture]) -> LoadedPictures | ImageFailure:
        order.append("decode")
        return loaded(path, pictures)

    def note(vectors: np.ndarray) -> np.ndarray:
        order.append("compute")
        return vectors

    run([lane(FakeEngine(batch_size=batch_size, spoil=note), range(96))], load, workers=1)
    turns = [(what, len(list(same))) for what, same in itertools.groupby(order)]
    assert turns[:2] == [("decode", turn), ("compute", turn // batch_size)]
    assert {count for what, count in turns if what == "decode"} == {turn}


def fail() -> None:
    raise ZeroDivisionError("a fault of ours")


def test_an_error_while_loading_is_raised_to_the_taker() -> None:
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        run([lane(FakeEngine(batch_size=4), range(100))], Loader(special={50: fail}))


@pytest.mark.parametrize("callers", [0, 2])
def test_an_error_in_the_forward_pass_is_raised_to_the_taker(callers: int) -> None:
    def spoil(vectors: np.ndarray) -> np.ndarray:
        if vectors[0, 0] >= 40:
            fail()
        return vectors

    load = Loader()
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        run([lane(FakeEngine(batch_size=4, callers=callers, spoil=spoil), range(100))], load)
    assert load.loads.total() < 100


def test_what_was_computed_before_an_error_is_handed_over() -> None:
    """With one worker, and the error in the eleventh batch, that is ten of them."""

    def spoil(vectors: np.ndarray) -> np.ndarray:
        if vectors[0, 0] >= 40:
            fail()
        return vectors

    found = []

    def take() -> None:
        lanes = [lane(FakeEngine(batch_size=4, spoil=spoil), range(100))]
        for _, batch in embed_lanes(files(100), lanes, load=Loader(), workers=1):
            found.append(batch)
            time.sleep(0.01)

    with pytest.raises(ZeroDivisionError):
        take()
    assert numbers(found) == list(range(40))


def test_whoever_stops_taking_ends_the_threads_without_the_rest_being_computed() -> None:
    engine, load = FakeEngine(batch_size=4, seconds=0.1), Loader()
    batches = embed_lanes(files(100), [lane(engine, range(100))], load=load, workers=2)
    next(batches)
    batches.close()
    # Those in the forward pass, of two workers, when it was closed; and what was computed until then.
    assert engine.calls <= 4
    assert not [thread for thread in threading.enumerate() if thread.name in ("decode", "forward")]


def test_closing_does_not_wait_for_ever_for_an_image_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "IMAGE_SECONDS", 0.2)
    released = threading.Event()
    load = Loader(special={6: lambda: released.wait(20)})
    batches = embed_lanes(files(100), [lane(FakeEngine(batch_size=4), range(100))], load=load, workers=2)
    next(batches)
    assert wait_until(lambda: load.loads[6] == 1)
    begun = time.monotonic()
    batches.close()
    assert time.monotonic() - begun < 10
    released.set()


def test_memory_that_is_lacking_costs_the_image() -> None:
    def lack() -> None:
        raise MemoryError

    (batches,) = run([lane(FakeEngine(batch_size=4), range(10))], Loader(special={5: lack}))
    assert statuses(batches) == {5: RowStatus.TOO_LARGE}
    assert [number for i, number in enumerate(numbers(batches)) if i != 5] == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_an_image_that_takes_too_long_costs_its_row_and_its_late_pixels_go_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "IMAGE_SECONDS", 0.3)
    monkeypatch.setattr(pipeline, "_LOOK_SECONDS", 0.1)
    released, hung = threading.Event(), []

    def hang() -> None:
        hung.append(threading.current_thread())
        released.wait(20)

    load = Loader(special={5: hang, 6: hang})
    lanes = [lane(FakeEngine(batch_size=4), range(40)), lane(FakeEngine(batch_size=2), range(5, 40))]
    found: list[list[EmbeddedBatch]] = [[], []]
    for index, batch in embed_lanes(files(40), lanes, load=load, workers=2):
        found[index].append(batch)
        if index == 0 and count_images(found[0]) >= 8 and hung and not released.is_set():
            released.set()  # while the batches that had places for them are used again
            for thread in hung:
                thread.join(20)
            assert not any(thread.is_alive() for thread in hung), "they were left behind"
    assert statuses(found[0]) == {5: RowStatus.TOO_SLOW, 6: RowStatus.TOO_SLOW}
    assert statuses(found[1]) == {0: RowStatus.TOO_SLOW, 1: RowStatus.TOO_SLOW}
    good = [i for i in range(40) if i not in (5, 6)]
    assert [numbers(found[0])[i] for i in good] == good
    assert numbers(found[1])[2:] == list(range(7, 40))
    (reason,) = {
        outcome.reason for batch in found[0] for outcome in batch.outcomes if hasattr(outcome, "reason")
    }
    assert reason == "took more than 0.3 s to read and decode"


def load_one(special: Callable[[], object]) -> LoadedPictures | ImageFailure:
    return load_in_time(Loader(special={5: special}), Path("5.png"), [PLAIN])


def test_one_image_is_waited_for_as_long_as_it_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "IMAGE_SECONDS", 0.2)
    found, released = load_one(lambda: None), threading.Event()
    assert isinstance(found, LoadedPictures)
    assert (found.pixels[0] == 5).all()
    slow = load_one(lambda: released.wait(20))
    released.set()
    assert isinstance(slow, ImageFailure)
    assert slow.status is RowStatus.TOO_SLOW


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), TimeoutError("of its own"), SystemExit(2)])
def test_what_loading_one_image_raises_is_not_taken_for_slowness(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        load_one(fail)
    assert raised.value is error


def test_memory_that_one_image_lacks_is_its_failure() -> None:
    def lack() -> None:
        raise MemoryError

    found = load_one(lack)
    assert isinstance(found, ImageFailure)
    assert found.status is RowStatus.TOO_LARGE


def test_images_are_not_slow_where_the_taker_or_the_whole_process_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "IMAGE_SECONDS", 0.5)
    monkeypatch.setattr(pipeline, "_LOOK_SECONDS", 0.1)
    begun, late = threading.Event(), threading.Event()

    def dawdle() -> None:
        begun.set()
        late.wait(20)

    load = Loader(special={6: dawdle})
    found = []
    for _, batch in embed_lanes(files(12), [lane(FakeEngine(), range(12))], load=load, workers=2):
        found.append(batch)
        if count_images(found) == 6:
            assert begun.wait(20)
            time.sleep(1.0)  # the taker's
            threading.Timer(0.15, late.set).start()
    assert statuses(found) == {}
    assert numbers(found) == list(range(12))


def test_who_computes_is_as_the_engine_says() -> None:
    own, shared = FakeEngine(callers=2, seconds=0.01), FakeEngine(seconds=0.01)
    stages = Stages()
    lanes = [lane(own, range(30)), lane(shared, range(30))]
    for _ in embed_lanes(files(30), lanes, load=Loader(), workers=2, stages=stages):
        pass
    assert own.threads == {"forward"}
    assert shared.threads == {"decode"}
    assert stages.forward >= 30 * 0.01


def test_no_more_calls_at_once_than_the_engine_asks_for() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def watch(vectors: np.ndarray) -> np.ndarray:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        with lock:
            inside -= 1
        return vectors

    run([lane(FakeEngine(callers=2, spoil=watch), range(30))], Loader(), workers=4)
    assert most == 2


@pytest.fixture
def photos(tmp_path: Path, save_image: Callable[..., Path]) -> list[Path]:
    paths = [save_image(tmp_path / f"{i}.png", seed=i, size=(40, 40)) for i in range(13)]
    paths[4].write_bytes(b"no image")
    return paths


def test_features_are_the_same_whatever_the_workers_and_the_lanes_beside(photos: list[Path]) -> None:
    backbone = load_backbone("killed_backbone:backbone")
    engine = make_engine(backbone, device="cpu", batch_size=4)
    pictures = (Picture(preprocessing=backbone.preprocessing),)

    def rows(batches: Sequence[EmbeddedBatch]) -> np.ndarray:
        vectors = np.concatenate([batch.features["penultimate"] for batch in batches])
        return np.delete(vectors, 4, axis=0)

    alone = [
        list(embed_files(photos, engine=engine, pictures=pictures, decoder="exact", workers=workers))
        for workers in (1, 3)
    ]
    assert statuses(alone[0]) == statuses(alone[1]) == {4: RowStatus.UNDECODABLE}
    np.testing.assert_array_equal(rows(alone[0]), rows(alone[1]))
    whole = [load_pictures(path, pictures) for path in photos]
    pixels = np.stack([one.pixels[0] for one in whole if isinstance(one, LoadedPictures)])
    direct = np.concatenate([engine.embed(pixels[i : i + 4])["penultimate"] for i in range(0, 12, 4)])
    np.testing.assert_array_equal(rows(alone[0]), direct)

    def load(path: Path, wanted: Sequence[Picture]) -> LoadedPictures | ImageFailure:
        return load_pictures(path, wanted)

    other = FakeEngine(size=16, batch_size=5)
    lanes = [lane(other, range(1, 9), pictures), Lane(engine=engine, pictures=pictures, rows=range(13))]
    beside = [batch for index, batch in embed_lanes(photos, lanes, load=load, workers=2) if index == 1]
    np.testing.assert_array_equal(rows(beside), rows(alone[0]))
