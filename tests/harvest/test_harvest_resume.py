"""A harvest that was stopped goes on to the bytes of one that was not."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config.row_filter import KEEP_ALL
from sae_kernels.data import JointRows, ShardDataset
from sae_kernels.data.shard_writer import ShardWriter
from sae_kernels.errors import DataError, NonFiniteError
from sae_kernels.harvest import collect, harvest
from sae_kernels.harvest.progress import HarvestProgress
from sae_kernels.io.files import publish
from sae_kernels.io.lock import locked
from tests.harvest.causal import CONTEXT, LAYER, documents, gpt2, sinking, tokenizer
from tests.threads import one_thread
from tests.training.same_runs import Stop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = documents(40)
LAYERS = ["h.0", "h.1"]


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_WINDOW_ROWS", 60)


def begin(folder: Path, text: Any = TEXT, layer: Any = LAYER, **options: Any) -> int:
    """A harvest of some 500 rows: a shard ends in every second window, and in its middle."""
    given = {"context_length": CONTEXT, "batch_size": 2, "rows_per_shard": 100, **options}
    return harvest(given.pop("model", None) or gpt2(), tokenizer(), text, layer, folder, **given)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stopping(n: int) -> Callable[[int], None]:
    """Stops the harvest once it has computed n rows."""
    seen = 0

    def progress(rows: int) -> None:
        nonlocal seen
        seen += rows
        if seen >= n:
            raise Stop

    return progress


def until(folder: Path, n: int, **options: Any) -> None:
    """A harvest that is stopped after n rows, with the document it was at left half-way."""
    with pytest.raises(Stop):
        begin(folder, progress=stopping(n), **options)


def counted(model: Any) -> list[int]:
    """The tokens of each of the model's forward passes, as they are made."""
    tokens: list[int] = []
    model.transformer.wte.register_forward_pre_hook(lambda _m, args: tokens.append(args[0].numel()))
    return tokens


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("straight")
    # As the tests are: fixtures of a module come before what sets the threads of a test.
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "_WINDOW_ROWS", 60)
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
        ({"model": gpt2().bfloat16()}, "model_dtype was 'float32' and is 'bfloat16'"),
        ({"model": gpt2(initializer_range=0.2)}, "weights was"),
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


# Rows that are not finite.


@contextmanager
def spoilt(model: Any, layer: int, word: str, value: float) -> Iterator[Any]:
    """A model whose block puts out a value at every token of a word."""
    seen: list[torch.Tensor] = []
    number = tokenizer().convert_tokens_to_ids(word)

    def note(_module: Any, arguments: Any) -> None:
        seen[:] = [arguments[0]]

    def spoil(_module: Any, _arguments: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        at = (seen[0] == number)[..., None] & (torch.arange(x.shape[-1]) == 3)
        x = x.masked_fill(at, value)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handles = [
        model.transformer.wte.register_forward_pre_hook(note),
        model.transformer.h[layer].register_forward_hook(spoil),
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


RARE = ["dog cat" if i == 31 else text.replace("dog", "cat") for i, text in enumerate(TEXT)]


def test_a_row_that_is_not_finite_stops_and_loses_nothing(tmp_path: Path) -> None:
    with spoilt(gpt2(), 1, "dog", torch.nan) as model:
        with pytest.raises(
            NonFiniteError, match=r"h\.1, document 31: .*got nan; look for"
        ) as caught:
            begin(tmp_path, RARE, model=model)
        assert "--resume" in str(caught.value)
        assert "--on-nonfinite skip" in str(caught.value)
        stood = HarvestProgress.read(tmp_path)
        assert stood is not None
        assert stood.stored >= 300
        n = begin(tmp_path, RARE, model=model, resume=True, on_nonfinite="skip")
        begin(tmp_path / "straight", RARE, model=model, on_nonfinite="skip")
    assert contents(tmp_path / "straight").items() <= contents(tmp_path).items()
    data = ShardDataset(tmp_path)
    assert data.metadata["nonfinite_rows"] == 1
    begin(tmp_path / "sound", RARE)
    sound = ShardDataset(tmp_path / "sound")
    rows, whole = data.rows(0, n), sound.rows(0, n + 1)
    dog = whole.tokens != tokenizer().convert_tokens_to_ids("dog")
    assert sound.metadata["nonfinite_rows"] == 0
    for name in ("activations", "tokens", "documents"):
        assert torch.equal(getattr(rows, name), getattr(whole, name)[dog])


def test_stopped_between_rows_that_are_left_out(tmp_path: Path) -> None:
    """The rows of a window that are left out are none of those in finished shards."""
    options = {"on_nonfinite": "skip", "resume": True}
    with spoilt(gpt2(), 1, "cat", torch.inf) as model:
        begin(tmp_path / "straight", model=model, **options)
        for n in (120, 240, 260, 400):
            until(tmp_path / "stopped", n, model=model, **options)
        begin(tmp_path / "stopped", model=model, **options)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")
    assert ShardDataset(tmp_path / "stopped").metadata["nonfinite_rows"] > 20


def test_an_overflow_is_named_as_one(tmp_path: Path) -> None:
    with spoilt(gpt2(), 1, "dog", 7e4) as model:
        options: dict[str, Any] = {"model": model, "dtype": torch.float16}
        with pytest.raises(NonFiniteError, match=r"got 70000.0; torch\.float16 ends at 65504"):
            begin(tmp_path / "16", RARE, **options)
        assert begin(tmp_path / "skip", RARE, on_nonfinite="skip", **options) > 400
        options = {"model": model, "dtype": torch.bfloat16, "row_filter": KEEP_ALL}
        n = begin(tmp_path / "b16", RARE, **options)
    assert ShardDataset(tmp_path / "b16").rows(0, n).activations.amax() == 70144  # 7e4 in bfloat16


def test_nothing_but_rows_that_are_left_out(tmp_path: Path) -> None:
    with (
        spoilt(gpt2(), 1, "dog", torch.nan) as model,
        pytest.raises(NonFiniteError, match="none of the 3 rows is finite"),
    ):
        begin(tmp_path, ["dog dog", "dog"], model=model, on_nonfinite="skip")
    with pytest.raises(ValueError, match="on_nonfinite: expected stop or skip, got 'ignore'"):
        begin(tmp_path, on_nonfinite="ignore")


# Several layers.


def test_several_layers_are_each_what_it_would_be_alone(tmp_path: Path) -> None:
    model = gpt2()
    computed = counted(model)
    n = begin(tmp_path / "all", layer=LAYERS, model=model)
    both = list(computed)
    computed.clear()
    for layer in LAYERS:
        begin(tmp_path / layer, layer=layer)
        assert contents(tmp_path / "all" / layer) == contents(tmp_path / layer)
    begin(tmp_path / "one", layer=LAYERS[:1], model=model)
    assert contents(tmp_path / "one" / "h.0") == contents(tmp_path / "h.0")
    assert computed == both  # the model ran as often for two layers as for one
    with pytest.raises(DataError, match=r"it holds data sets, name one of them: h\.0, h\.1"):
        ShardDataset(tmp_path / "all")
    joint = JointRows([ShardDataset(tmp_path / "all" / layer) for layer in LAYERS])
    assert joint.rows(0, n).activations.shape == (n, 32)


def test_several_layers_go_on_together(tmp_path: Path) -> None:
    begin(tmp_path / "straight", layer=LAYERS)
    for n in (130, 330):
        until(tmp_path / "stopped", n, layer=LAYERS, resume=True)
    stopped = tmp_path / "stopped"
    (stopped / "h.1" / ".shard_00004.safetensors.partial-elsewhere-1").touch()
    n = begin(stopped, layer=LAYERS, resume=True)
    (stopped / "h.1" / ".shard_00004.safetensors.partial-elsewhere-1").unlink()
    assert contents(stopped) == contents(tmp_path / "straight")
    assert begin(stopped, layer=LAYERS, resume=True) == n
    (stopped / "h.0" / "index.json").unlink()  # nothing says whose the other one is
    with pytest.raises(DataError, match="holds a data set already"):
        begin(stopped, layer=LAYERS, resume=True)
    with pytest.raises(ValueError, match="expected layers that differ"):
        begin(tmp_path / "new", layer=["h.0", "h.0"])


@pytest.mark.parametrize("rows", [100, 1000])
def test_several_may_end_between_their_indexes(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path / "straight", layer=LAYERS, rows_per_shard=rows)
    with monkeypatch.context() as patch:

        def once(path: Path, write: Any) -> None:
            publish(path, write)
            raise Stop

        patch.setattr("sae_kernels.data.shard_index.publish", once)
        with pytest.raises(Stop):
            begin(tmp_path / "stopped", layer=LAYERS, rows_per_shard=rows)
    assert len(list(tmp_path.glob("stopped/*/index.json"))) == 1
    begin(tmp_path / "stopped", layer=LAYERS, rows_per_shard=rows, resume=True)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


def test_what_one_layer_leaves_out_all_do(tmp_path: Path) -> None:
    with spoilt(gpt2(), 1, "dog", torch.inf) as model:
        with pytest.raises(NonFiniteError, match=r"h\.1, document 31"):
            begin(tmp_path, RARE, layer=LAYERS, model=model)
        n = begin(tmp_path, RARE, layer=LAYERS, model=model, on_nonfinite="skip", resume=True)
    rows = [ShardDataset(tmp_path / layer).rows(0, n) for layer in LAYERS]
    for name in ("tokens", "documents"):
        assert torch.equal(*(getattr(each, name) for each in rows))
    whole = begin(tmp_path / "sound", RARE, layer="h.0")
    assert whole == n + 1


# What the process dies of.

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.harvest.test_harvest_resume"])


def in_a_process(folder: str, layer: Any, running: Any) -> None:
    """A harvest at the pace of a larger model: 2 s in all, once it says that it runs."""
    torch.set_num_threads(1)
    collect._WINDOW_ROWS = 60
    running.set()
    begin(Path(folder), layer=layer, resume=True, progress=lambda _: time.sleep(0.05))


@pytest.mark.full
@pytest.mark.parametrize("layer", [LAYER, LAYERS], ids=["one", "several"])
def test_killed_at_ten_random_moments(tmp_path: Path, layer: Any) -> None:
    begin(tmp_path / "straight", layer=layer)
    drawn = random.Random(len(layer))
    folder = tmp_path / "killed"
    running = FORKED.Event()
    stored: list[int] = []
    while len(stored) < 10:
        running.clear()
        process = FORKED.Process(target=in_a_process, args=(str(folder), layer, running))
        process.start()
        assert running.wait(60)  # a busy machine takes its time to start one
        process.join(drawn.uniform(0.1, 2.0))
        process.kill()
        process.join()
        if process.exitcode == 0:  # done before its time: once more from the start
            assert contents(folder) == contents(tmp_path / "straight")
            shutil.rmtree(folder)
            continue
        assert process.exitcode == -signal.SIGKILL
        record = HarvestProgress.read(folder) if folder.exists() else None
        stored.append(record.stored if record else 0)
    process = FORKED.Process(target=in_a_process, args=(str(folder), layer, running))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert contents(folder) == contents(tmp_path / "straight")
    assert max(stored) > 100, stored


# Rows of enormous norm.


def test_sinks_are_left_out_alike_however_often_it_stops(tmp_path: Path) -> None:
    """Of two layers with a bound each: the same bytes, and a row goes from both or none."""
    model = sinking()
    n = begin(tmp_path / "straight", layer=LAYERS, model=model)
    for stop in (1, 130, 330):
        until(tmp_path / "stopped", stop, layer=LAYERS, model=model, resume=True)
    assert begin(tmp_path / "stopped", layer=LAYERS, model=model, resume=True) == n
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")
    every = begin(tmp_path / "every", layer=LAYERS, model=model, row_filter=KEEP_ALL)
    sets = [ShardDataset(tmp_path / "straight" / layer) for layer in LAYERS]
    whole = [ShardDataset(tmp_path / "every" / layer).rows(0, every) for layer in LAYERS]
    over = torch.zeros(every, dtype=torch.bool)
    for data, rows in zip(sets, whole, strict=True):
        over |= rows.activations.norm(dim=1) > data.metadata["max_norm"]
        assert data.metadata["rows_above_max_norm"] == every - n > 20
    for data, rows in zip(sets, whole, strict=True):
        assert torch.equal(data.rows(0, n).activations, rows.activations[~over])
        assert rows.tokens is not None
        assert torch.equal(data.rows(0, n).tokens, rows.tokens[~over])
    assert JointRows(sets).facts["max_norm"] == [data.metadata["max_norm"] for data in sets]


@pytest.mark.parametrize("damage", [None, [], [1.0, 2.0], [-1.0], "x"])
def test_a_record_without_its_bounds_is_refused(tmp_path: Path, damage: object) -> None:
    until(tmp_path, 330)
    record = tmp_path / "progress.json"
    values = json.loads(record.read_text())
    assert values["window"] > 0
    record.write_text(json.dumps(values | {"max_norm": damage}))
    with pytest.raises(DataError, match=r"progress\.json: expected .* and max_norm; harvest again"):
        begin(tmp_path, resume=True)
