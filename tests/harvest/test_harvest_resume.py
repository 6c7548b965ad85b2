"""A harvest that was stopped goes on to the bytes of one that was not."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config.row_filter import KEEP_ALL
from sae_kernels.data import ShardDataset
from sae_kernels.data.shard_writer import ShardWriter
from sae_kernels.errors import DataError
from sae_kernels.harvest.progress import HarvestProgress
from sae_kernels.io.files import publish
from sae_kernels.io.lock import locked
from tests.harvest.causal import LAYER, gpt2
from tests.harvest.stopped import LAYERS, TEXT, begin, contents, counted, until
from tests.threads import one_thread
from tests.training.same_runs import Stop

if TYPE_CHECKING:
    from collections.abc import Callable

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("straight")
    with one_thread():  # fixtures of a module come before what sets the threads of a test
        begin(folder)
    return contents(folder)


@pytest.mark.parametrize("stops", [[1], [150], [480], [1, 130, 140, 141, 320, 460]])
def test_stopped_and_resumed_is_straight(
    tmp_path: Path, straight: dict[str, bytes], stops: list[int]
) -> None:
    for n in stops:
        until(tmp_path, n, resume=True)
        assert "index.json" not in contents(tmp_path)
    seen: list[int] = []
    n = begin(tmp_path, iter(TEXT), resume=True, progress=seen.append)
    assert contents(tmp_path) == straight
    assert n == sum(seen) == ShardDataset(tmp_path).n_tokens > 480


@pytest.mark.parametrize("rows", [7, 60, 100_000])
def test_shards_shorter_and_longer_than_a_window(tmp_path: Path, rows: int) -> None:
    n = begin(tmp_path / "straight", rows_per_shard=rows)
    for stop in (90, 300, n):
        until(tmp_path / "stopped", stop, rows_per_shard=rows, resume=True)
    begin(tmp_path / "stopped", rows_per_shard=rows, resume=True)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


@pytest.mark.parametrize("name", ["shard_00002", "progress.json", "index.json"])
def test_it_may_end_before_and_after_each_file(
    tmp_path: Path, straight: dict[str, bytes], name: str
) -> None:
    """Before the record of a shard, before the index, and before the record goes."""

    def once(path: Path, write: Any, after: bool) -> None:
        if path.name.startswith(name) and not after:
            raise Stop
        publish(path, write)
        if path.name.startswith(name):
            raise Stop

    for after in (False, True):
        folder = tmp_path / str(after)
        with pytest.MonkeyPatch.context() as patch:
            for module in ("data.shard_writer", "data.shard_index", "harvest.progress"):
                patch.setattr(
                    f"sae_kernels.{module}.publish",
                    lambda path, write, after=after: once(path, write, after),
                )
            with pytest.raises(Stop):
                begin(folder)
        begin(folder, resume=True)
        assert contents(folder) == straight


def test_the_model_runs_on_one_window_alone_again(tmp_path: Path) -> None:
    until(tmp_path, 470)
    model = gpt2()
    computed = counted(model)
    n = begin(tmp_path, model=model, resume=True)
    assert sum(computed) < n - 400 + 60 + 40  # padding included


def test_an_unfinished_harvest_is_not_replaced_unasked(
    tmp_path: Path, straight: dict[str, bytes]
) -> None:
    until(tmp_path, 370)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"its harvest is unfinished, .*--resume"):
        ShardDataset(tmp_path)
    assert HarvestProgress.read(tmp_path).stored == 300  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"one of 300 rows so far; .*--resume.*--overwrite"):
        begin(tmp_path)
    assert contents(tmp_path) == before
    begin(tmp_path, overwrite=True)
    assert contents(tmp_path) == straight


def test_what_is_finished_says_its_rows(tmp_path: Path, straight: dict[str, bytes]) -> None:
    n = begin(tmp_path, resume=True)  # a new folder starts afresh
    assert begin(tmp_path, resume=True) == n
    assert contents(tmp_path) == straight
    with pytest.raises(DataError, match="finished data set of others: context_length was 10 and"):
        begin(tmp_path, resume=True, context_length=9)
    with pytest.raises(DataError, match="holds a data set already"):
        begin(tmp_path)
    begin(tmp_path, resume=True, overwrite=True, context_length=9)
    assert ShardDataset(tmp_path).metadata["context_length"] == 9


def _reversed_shard(folder: Path) -> dict[str, Any]:
    path = folder / "shard_00001.safetensors"
    path.write_bytes(path.read_bytes()[::-1])
    return {}


def _without_shard(folder: Path) -> dict[str, Any]:
    (folder / "shard_00001.safetensors").unlink()
    return {}


def _damaged(folder: Path) -> dict[str, Any]:
    (folder / "progress.json").write_text("{}")
    return {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "h.0"}, r"layers was \['h.1'\] and is \['h.0'\]"),
        ({"context_length": 9}, "context_length was 10 and is 9"),
        ({"batch_size": 3}, "batch_size was 2 and is 3"),
        ({"dtype": torch.bfloat16}, "dtype was 'float32' and is 'bfloat16'"),
        ({"autocast": torch.bfloat16}, "autocast was None and is 'bfloat16'"),
        ({"row_filter": KEEP_ALL}, "drop_special_tokens was True and is False"),
        ({"rows_per_shard": 101}, "rows_per_shard was 100 and is 101"),
        ({"max_tokens": 400}, "max_tokens was None and is 400"),
        (lambda _: {"model": gpt2().bfloat16()}, "model_dtype was 'float32' and is 'bfloat16'"),
        (lambda _: {"model": gpt2(initializer_range=0.2)}, "weights was"),
        ({"text": ["a dog", *TEXT[1:]]}, "expected the text that its unfinished harvest read"),
        ({"text": ["", *TEXT]}, "expected the text that its unfinished harvest read"),
        ({"text": TEXT[:3]}, "expected the text that its unfinished harvest read"),
        (_reversed_shard, r"shard_00001\.safetensors changed since written"),
        (_without_shard, r"shard_00001\.safetensors is missing"),
        (_damaged, r"progress\.json: expected window, offset"),
    ],
)
def test_another_harvest_is_refused_by_what_differs(
    tmp_path: Path, changes: dict[str, Any] | Callable[[Path], dict[str, Any]], message: str
) -> None:
    until(tmp_path, 320)
    options = changes if isinstance(changes, dict) else changes(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=message):
        begin(tmp_path, resume=True, **options)
    assert contents(tmp_path) == before


def test_one_harvest_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(DataError, match="another process is writing to it"):
        begin(tmp_path)


def test_a_writer_goes_on_after_finished_shards(tmp_path: Path) -> None:
    x = torch.randn(25, 4)
    with ShardWriter(tmp_path, 4, rows_per_shard=10) as writer:
        writer.write(x)
    before = contents(tmp_path)
    first = ShardWriter(tmp_path, 4, rows_per_shard=10, overwrite=True)
    first.__enter__()  # and never left
    first.write(x[:23])
    assert (len(first.shards), first.pending) == (2, 3)
    with ShardWriter(tmp_path, 4, rows_per_shard=10, finished=first.shards) as again:
        again.write(x[20:])
    assert contents(tmp_path) == before


# What the process dies of.

FORKED = multiprocessing.get_context("forkserver")
# With the model's own module: imported in each process, it would take longer than the harvest.
FORKED.set_forkserver_preload(
    ["tests.harvest.test_harvest_resume", "transformers.models.gpt2.modeling_gpt2"]
)


def in_a_process(folder: str, layer: Any, rows: Any) -> None:
    """A harvest that tells how many rows it has come to, so slowly that one can follow."""

    def progress(n: int) -> None:
        rows.value += n
        time.sleep(0.01)

    torch.set_num_threads(1)
    begin(Path(folder), layer=layer, resume=True, progress=progress)


@pytest.mark.full
@pytest.mark.parametrize("layer", [LAYER, LAYERS], ids=["one", "several"])
def test_killed_at_ten_random_moments(tmp_path: Path, layer: Any) -> None:
    """Moments are rows and up to as long as a batch takes: they come however busy a machine is."""
    begin(tmp_path / "straight", layer=layer)
    drawn = random.Random(len(layer))
    folder = tmp_path / "killed"
    rows = FORKED.Value("q", lock=False)  # whoever is killed would keep a lock
    stored: list[int] = []
    while len(stored) < 10:
        rows.value = 0
        process = FORKED.Process(target=in_a_process, args=(str(folder), layer, rows))
        process.start()
        moment, end = drawn.randrange(480), time.monotonic() + 120
        while rows.value <= moment and process.is_alive():
            assert time.monotonic() < end, rows.value
            time.sleep(0.001)
        time.sleep(drawn.uniform(0, 0.012))
        process.kill()
        process.join()
        if process.exitcode == 0:  # done before its time: once more from the start
            assert contents(folder) == contents(tmp_path / "straight")
            shutil.rmtree(folder)
            continue
        assert process.exitcode == -signal.SIGKILL
        record = HarvestProgress.read(folder) if folder.exists() else None
        stored.append(record.stored if record else 0)
    process = FORKED.Process(target=in_a_process, args=(str(folder), layer, rows))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert contents(folder) == contents(tmp_path / "straight")
    assert max(stored) > 100, stored


@pytest.mark.parametrize("damage", [None, [], [1.0, 2.0], [-1.0], "x"])
def test_a_record_without_its_bounds_is_refused(tmp_path: Path, damage: object) -> None:
    until(tmp_path, 330)
    record = tmp_path / "progress.json"
    values = json.loads(record.read_text())
    assert values["window"] > 0
    record.write_text(json.dumps(values | {"max_norm": damage}))
    with pytest.raises(DataError, match=r"progress\.json: expected .* and max_norm; harvest again"):
        begin(tmp_path, resume=True)
