"""Text of any size: read in blocks, nothing lost or repeated, resumed at the exact piece, in constant memory."""

import itertools
import json
import time
from pathlib import Path

import psutil
import pytest
import tiny
import warm
from safetensors.torch import load_file

from pipeline import stage
from pipeline.config.load import load
from pipeline.data import run_tokenizer
from pipeline.data.bookmark import STATE, Bookmark
from pipeline.data.stream import Block, TextStream
from pipeline.records import manifest
from pipeline.system.errors import UserError

LENGTH = 16
NUM_DOCUMENTS = 45
BUFFER = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"))


def texts(prefix: str = "") -> list[str]:
    return [f"{prefix}{i} {tiny.TOPICS[i % len(tiny.TOPICS)]} " * (1 + i % 4) for i in range(NUM_DOCUMENTS)]


def make_stream(folder: Path, model: Path, corpus: dict, **top) -> TextStream:
    """The stream of dataset `corpus`, whose section is `corpus`."""
    pretrain = {"type": "pretrain", "data": "corpus", "training": {"max_steps": 4, "max_length": LENGTH}}
    sections = {"corpus": {"streaming": True, "shuffle_buffer": BUFFER} | corpus} | top.pop("data", {})
    path = tiny.make_run(folder, {"pretrain": pretrain} | top.pop("stages", {}), **top)
    tiny.edit(path, {"data": sections, "model": {"path": str(model)}})
    config = load(path)
    tokenizer = run_tokenizer.build(config)
    return TextStream(tiny.StageRows(config, tokenizer), "corpus", LENGTH, seed=3)


@pytest.fixture
def stream(tmp_path, model):
    """`stream(**data)`: a stream over one file with a blank document among them."""

    def make(**data) -> TextStream:
        rows = [{"text": text} for text in texts()]
        tiny.write_rows(tmp_path / "corpus.jsonl", [*rows[:7], {"text": " "}, *rows[7:]])
        return make_stream(tmp_path, model, {"path": "corpus.jsonl"} | data)

    return make


def epochs(stream: TextStream, number: int) -> list[list[list[int]]]:
    """The pieces of the first passes over the documents."""
    found: list[list[list[int]]] = [[] for _ in range(number)]
    for block, pieces in stream.blocks(Block()):
        if block.epoch == number:
            return found
        found[block.epoch] += pieces
    raise AssertionError("a stream has no end")


def documents(stream: TextStream, pieces: list[list[int]]) -> list[str]:
    ids = list(itertools.chain.from_iterable(pieces))
    text = stream.tokenizer.decode(ids)
    assert text.endswith(stream.tokenizer.eos_token)
    return text.split(stream.tokenizer.eos_token)[:-1]


def test_every_pass_has_every_document_once_in_another_order(stream):
    made = stream()
    first, second = (documents(made, pieces) for pieces in epochs(made, 2))
    assert sorted(first) == sorted(second) == sorted(texts())
    assert first != second
    assert set(first[: BUFFER - 1]) == set(texts()[: BUFFER - 1])  # a block is shuffled by itself


def test_pieces_are_full_but_the_last_of_a_block(stream):
    made = stream()
    for block, pieces in itertools.islice(made.blocks(Block()), 10):
        assert [len(piece) for piece in pieces[:-1]] == [LENGTH] * (len(pieces) - 1)
        assert 0 < len(pieces[-1]) <= LENGTH, block


def test_resumed_at_any_piece_it_goes_on_there(stream):
    whole = stream()
    number = 3 * sum(len(pieces) for pieces in epochs(whole, 1))
    pieces = [row["input_ids"] for row in itertools.islice(Bookmark(whole).pieces(), number)]
    assert len(set(map(tuple, pieces))) > number // 2
    for ahead in (0, 1, 5):  # a trainer reads ahead of what it has trained on
        reading, read = Bookmark(stream()), []
        iterator = reading.pieces()
        for place in range(0, number - 8, 1 + 3 * ahead):
            while len(read) < place + ahead:
                read.append(next(iterator)["input_ids"])
            state = json.loads(json.dumps(reading.state(place)))
            resumed = Bookmark(stream())
            resumed.resume(state)
            following = [row["input_ids"] for row in itertools.islice(resumed.pieces(), 8)]
            assert following == pieces[place : place + 8], (ahead, place)


def test_blank_documents_are_counted(stream):
    made = stream()
    bookmark = Bookmark(made)
    list(itertools.islice(bookmark.pieces(), 200))
    record = bookmark.record()
    assert record["dropped"]["blank"] * (NUM_DOCUMENTS + 1) >= record["read"] - NUM_DOCUMENTS
    assert made.look().dropped["blank"].count == 1


def test_too_many_malformed_documents_stop_it(tmp_path, model):
    rows = [{"text": text} for text in texts()]
    tiny.write_rows(tmp_path / "corpus.jsonl", [*rows[:20], {"text": None}, *rows[20:]])
    made = make_stream(tmp_path, model, {"path": "corpus.jsonl"})
    with pytest.raises(UserError, match=r"corpus\.jsonl.*checks\.malformed.*text: expected text, got None"):
        epochs(made, 1)
    allowed = make_stream(tmp_path, model, {"path": "corpus.jsonl"}, checks={"malformed": 0.1})
    (pieces,) = epochs(allowed, 1)
    assert sorted(documents(allowed, pieces)) == sorted(texts())


@pytest.mark.parametrize("content", ["", '{"text": " "}\n'])
def test_no_documents(tmp_path, model, content):
    (tmp_path / "corpus.jsonl").write_text(content)
    made = make_stream(tmp_path, model, {"path": "corpus.jsonl"})
    with pytest.raises(UserError, match=r"corpus\.jsonl"):
        next(Bookmark(made).pieces())


def test_several_files_and_sources_one_after_the_other(tmp_path, model):
    tiny.write_rows(tmp_path / "a1.jsonl", [{"text": text} for text in texts("a")])
    tiny.write_rows(tmp_path / "a2.jsonl", [{"text": text} for text in texts("b")])
    (tmp_path / "c.txt").write_text("\n".join(texts("c")))
    made = make_stream(tmp_path, model, {"sources": [{"path": "a*.jsonl"}, {"path": "c.txt"}]})
    (pieces,) = epochs(made, 1)
    assert sorted(documents(made, pieces)) == sorted(texts("a") + texts("b") + texts("c"))


def test_weights_mix_sources(tmp_path, model):
    tiny.write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts("a")])
    tiny.write_rows(tmp_path / "b.jsonl", [{"text": text} for text in texts("b")])
    sources = [{"path": "a.jsonl", "weight": 3}, {"path": "b.jsonl", "weight": 1}]
    made = make_stream(tmp_path, model, {"sources": sources})
    (pieces,) = epochs(made, 1)
    found = documents(made, pieces)
    assert set(found) == set(texts("a") + texts("b"))  # the one that ends begins again until both were read through
    assert 2 < sum(text.startswith("a") for text in found) / sum(text.startswith("b") for text in found) < 4
    bookmark = Bookmark(made)
    (tail,) = [list(itertools.islice(bookmark.pieces(), 30, 60))]
    bookmark.resume(json.loads(json.dumps(bookmark.state(30))))
    assert list(itertools.islice(bookmark.pieces(), 30)) == tail


def test_documents_that_are_evaluated_on_are_left_out(tmp_path, model):
    tiny.write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in texts()])
    held_out = [text.upper().replace(" ", "  ") for text in texts()[10:20]]
    tiny.write_rows(tmp_path / "heldout.jsonl", [{"text": text} for text in held_out])
    pretrain = {"type": "pretrain", "data": "corpus", "eval_data": "heldout"}
    pretrain["training"] = {"max_steps": 4, "max_length": LENGTH}
    stages, data = {"pretrain": pretrain}, {"heldout": {"path": "heldout.jsonl"}}
    made = make_stream(tmp_path, model, {"path": "corpus.jsonl"}, stages=stages, data=data)
    (pieces,) = epochs(made, 1)
    assert sorted(documents(made, pieces)) == sorted(texts()[:10] + texts()[20:])
    assert made.look().num_dropped == 0  # its first block has none of them


def test_resumed_after_its_last_step_it_makes_no_other(tmp_path, model, monkeypatch):
    tiny.write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in texts()])
    training = {"max_steps": 5, "max_length": LENGTH, "save_steps": 2, "save_strategy": "steps"}
    path = tiny.make_run(tmp_path, {"pretrain": {"data": "corpus", "training": training}})
    tiny.edit(path, {"data": {"corpus": {"path": "corpus.jsonl", "streaming": True}}, "model": {"path": str(model)}})
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.fit._save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.run(load(path), "pretrain")
    stage.run(load(path), "pretrain")
    record = manifest.read(tmp_path / "run").stages["pretrain"]
    assert (record.resumed_from_step, record.metrics["steps"]) == (5, 5)


@pytest.mark.slow
def test_killed_it_trains_on_as_if_it_had_not_been(tmp_path, model):
    """`kill -9` after a checkpoint: the resumed run ends with the weights of an uninterrupted one."""
    weights = {}
    for name in ("whole", "parts"):
        folder = tmp_path / name
        folder.mkdir()
        tiny.write_rows(folder / "corpus.jsonl", [{"text": text} for text in texts()])
        training = {"max_steps": 24, "max_length": LENGTH, "save_steps": 5, "save_strategy": "steps"}
        path = tiny.make_run(folder, {"pretrain": {"data": "corpus", "training": training}})
        data = {"corpus": {"path": "corpus.jsonl", "streaming": True, "shuffle_buffer": BUFFER}}
        tiny.edit(path, {"data": data, "model": {"path": str(model)}})
        checkpoint = folder / "run" / "pretrain" / "checkpoints" / "checkpoint-10"
        if name == "parts":
            process = warm.Started("run", path)
            while not (checkpoint / "complete.json").exists():
                assert process.is_alive(), "it ended before it could be killed"
                time.sleep(0.01)
            process.kill_all()
            assert (checkpoint / STATE).is_file()
        done = warm.rlhf("run", path)
        assert done.returncode == 0, done.stdout + done.stderr
        record = manifest.read(folder / "run").stages["pretrain"]
        assert (record.resumed_from_step is not None) == (name == "parts")
        assert record.datasets["data"]["streamed"]
        weights[name] = load_file(folder / "run" / "pretrain" / "output" / "adapter_model.safetensors")
    assert weights["whole"].keys() == weights["parts"].keys()
    assert all((weights["whole"][key] == weights["parts"][key]).all() for key in weights["whole"])


def test_memory_does_not_grow_with_the_corpus(tmp_path, model):
    """The second half of a corpus takes no more resident memory than the first, give or take a third of its size.

    Kept as text it would take all of its size, and as token ids several times as much. The process has other things in
    its memory, which may grow by some MiB meanwhile.
    """
    size = 60 << 20
    with (tmp_path / "corpus.jsonl").open("w") as file:
        i = 0
        while file.tell() < size:
            file.write(json.dumps({"text": f"document {i}: " + "the sea is salty. " * 100}) + "\n")
            i += 1
    made = make_stream(tmp_path, model, {"path": "corpus.jsonl", "shuffle_buffer": 200})
    resident = []
    for block, _ in made.blocks(Block()):
        if block.epoch:
            break
        resident.append(psutil.Process().memory_info().rss)
    half = len(resident) // 2
    assert half > 50
    assert max(resident[half:]) - max(resident[:half]) < size / 2 / 3
