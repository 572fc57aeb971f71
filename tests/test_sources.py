"""Rows come out of every kind of place as they were put in, and a source is known by its content."""

import bz2
import csv
import gzip
import importlib.util
import itertools
import json
import lzma
import os
import re
import shutil
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny
from datasets import Dataset, DatasetDict

from pipeline.config import load as configs
from pipeline.config.schema import Data, Model, RunConfig
from pipeline.data import fingerprints, places, run_tokenizer, sources
from pipeline.system.errors import UserError

ROWS = [
    {"prompt": 'Say "yes", or no; ä 漢 🙂', "completion": "Yes.\nNo."},
    {"prompt": "A\ttab", "completion": " spaces "},
    {"prompt": "The last", "completion": "{}, [], 'quoted'"},
]
TEXTS = [{"text": "One line."}, {"text": "Another, ä 漢 🙂"}, {"text": '"quoted"'}]


def numbered(first, last):
    return [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(first, last)]


def write(path, rows, kind=None):
    """A file of the kind that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = kind or path.suffix
    if kind == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif kind == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table)
    else:
        path.write_text("".join(f"{row['text']}\n" for row in rows), encoding="utf-8")
    return path


def compress(path, suffix):
    """A compressed file instead of a file."""
    packed = path.with_name(path.name + suffix)
    if suffix == ".zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
            file.write(path, path.name)
    else:
        method = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix]
        packed.write_bytes(method.compress(path.read_bytes()))
    path.unlink()
    return packed


def find(folder, **spec):
    config = RunConfig(
        name="tiny", model=Model(path="base"), data={"rows": Data(**spec)}, stages={}, source=folder / "config.yaml"
    )
    (part,) = places.find("rows", config.data["rows"], config.folder)
    return part


def read(folder, streaming=False, **spec):
    return list(sources.load(find(folder, **spec), streaming))


def fingerprint(folder, **spec):
    return fingerprints.of_source(find(folder, **spec))


# Kinds of files


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt"])
def test_kinds_of_files(tmp_path, suffix):
    rows = TEXTS if suffix == ".txt" else ROWS
    write(tmp_path / f"rows{suffix}", rows)
    assert read(tmp_path, path=f"rows{suffix}") == rows


def test_arrow_file_with_a_footer(tmp_path):
    """Arrow's other container, as pyarrow and Feather write it."""
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as file:
        file.write_table(table)
    assert read(tmp_path, path="rows.arrow") == ROWS


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".txt"])
@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zip"])
def test_compressed_files(tmp_path, suffix, compression):
    rows = TEXTS if suffix == ".txt" else ROWS
    packed = compress(write(tmp_path / f"rows{suffix}", rows), compression)
    assert read(tmp_path, path=packed.name) == rows


@pytest.mark.parametrize(("suffix", "package"), [(".zst", "zstandard"), (".lz4", "lz4")])
@pytest.mark.parametrize("path", ["rows.jsonl{}", "*.jsonl{}", "."])
def test_compression_that_needs_a_package(tmp_path, monkeypatch, suffix, package, path):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else there(name, *more)
    )
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(b"compressed")
    with pytest.raises(UserError, match=f"rows.jsonl{suffix} needs another package: pip install {package}"):
        find(tmp_path, path=path.format(suffix))


# Globs and folders


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("parts/*.jsonl", [0, 1, 2, 3]),
        ("parts/b*.jsonl", [2, 3]),
        ("parts/**/*.jsonl", [0, 1, 2, 3, 4, 5]),
        ("*/*/c.jsonl", [4, 5]),
        ("parts/[ab].jsonl", [0, 1, 2, 3]),
    ],
)
def test_glob(tmp_path, path, expected):
    """The files of a glob are read in the order of their paths."""
    for i, name in enumerate(["a.jsonl", "b.jsonl", "below/c.jsonl"]):
        write(tmp_path / "parts" / name, numbered(2 * i, 2 * i + 2))
    write(tmp_path / "other.jsonl", numbered(90, 99))
    assert read(tmp_path, path=path) == [row for i in expected for row in numbered(i, i + 1)]


def test_absolute_glob_beside_the_config(tmp_path):
    write(tmp_path / "parts" / "a.jsonl", numbered(0, 2))
    write(tmp_path / "parts" / "b.jsonl", numbered(2, 4))
    assert read(tmp_path, path=f"{tmp_path}/parts/*.jsonl") == numbered(0, 4)


def test_glob_below_a_folder_whose_name_looks_like_one(tmp_path):
    folder = tmp_path / "run [1]"
    write(folder / "a.jsonl", numbered(0, 2))
    assert read(folder, path="*.jsonl") == numbered(0, 2)


def test_glob_of_compressed_and_plain_files(tmp_path):
    compress(write(tmp_path / "a.jsonl", numbered(0, 2)), ".gz")
    write(tmp_path / "b.jsonl", numbered(2, 4))
    compress(write(tmp_path / "c.jsonl", numbered(4, 6)), ".xz")
    assert read(tmp_path, path="*.jsonl*") == numbered(0, 6)


@pytest.mark.parametrize("path", ["parts", "./parts", "parts/"])
def test_folder(tmp_path, path):
    """All files with rows, also below; documentation, hidden files and metadata are no rows."""
    folder = tmp_path / "parts"
    write(folder / "a.jsonl", numbered(0, 2))
    write(folder / "b.jsonl", numbered(2, 4))
    write(folder / "below" / "c.jsonl", numbered(4, 6))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Rows\n")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".gitattributes").write_text("*.jsonl text\n")
    write(folder / ".hidden.jsonl", numbered(90, 92))
    write(folder / ".cache" / "old.jsonl", numbered(92, 94))
    assert sorted(row["prompt"] for row in read(tmp_path, path=path)) == [row["prompt"] for row in numbered(0, 6)]


def test_folder_with_splits(tmp_path):
    folder = tmp_path / "parts"
    write(folder / "train-0.jsonl", numbered(0, 2))
    write(folder / "train-1.jsonl", numbered(2, 4))
    write(folder / "test-0.jsonl", numbered(4, 6))
    assert read(tmp_path, path="parts") == numbered(0, 4)
    assert read(tmp_path, path="parts", split="test") == numbered(4, 6)
    with pytest.raises(UserError, match=r"data\.rows\.path: .*no split 'validation'.*train, test"):
        find(tmp_path, path="parts", split="validation")


def test_folders_for_splits(tmp_path):
    write(tmp_path / "parts" / "train" / "0.jsonl", numbered(0, 2))
    write(tmp_path / "parts" / "test" / "0.jsonl", numbered(2, 3))
    assert read(tmp_path, path="parts") == numbered(0, 2)
    assert read(tmp_path, path="parts", split="test") == numbered(2, 3)


def test_folder_with_a_file_of_no_split(tmp_path):
    """A file that the split's names do not tell would be left out without a word."""
    write(tmp_path / "parts" / "train.jsonl", numbered(0, 2))
    write(tmp_path / "parts" / "more.jsonl", numbered(2, 4))
    with pytest.raises(UserError, match=r"more\.jsonl belongs to no split"):
        find(tmp_path, path="parts")
    assert read(tmp_path, path="parts/*.jsonl") == numbered(2, 4) + numbered(0, 2)


@pytest.mark.parametrize("path", ["parts", "parts/*"])
def test_files_of_different_kinds(tmp_path, path):
    write(tmp_path / "parts" / "a.jsonl", ROWS)
    write(tmp_path / "parts" / "b.csv", ROWS)
    with pytest.raises(UserError, match=r"data\.rows\.path: files of different kinds \(csv, json\).*`sources`"):
        find(tmp_path, path=path)


@pytest.mark.parametrize(("path", "word"), [("parts", "no file in"), ("parts/*", "cannot read"), ("none", "hub")])
def test_nothing_that_can_be_read(tmp_path, path, word):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "notes.pdf").write_text("no rows")
    with pytest.raises(UserError, match=word):
        read(tmp_path, path=path)


# Datasets saved to disk


def test_saved_dataset(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read(tmp_path, path="saved") == ROWS


def test_saved_splits(tmp_path):
    splits = {"train": Dataset.from_list(numbered(0, 3)), "test": Dataset.from_list(numbered(3, 5))}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert read(tmp_path, path="saved") == numbered(0, 3)
    assert read(tmp_path, path="saved", split="test") == numbered(3, 5)
    with pytest.raises(UserError, match="no split 'validation', only train, test"):
        read(tmp_path, path="saved", split="validation")


# Columns and limits


def test_columns(tmp_path):
    """A column is renamed; one that has our name already makes room for it."""
    rows = [{"question": f"Q{i}", "prompt": "an id", "completion": f"A{i}", "source": "web"} for i in range(3)]
    write(tmp_path / "rows.jsonl", rows)
    got = read(tmp_path, path="rows.jsonl", columns={"question": "prompt"})
    assert got == [{"prompt": f"Q{i}", "completion": f"A{i}", "source": "web"} for i in range(3)]
    assert read(tmp_path, path="rows.jsonl", columns={"prompt": "prompt"}) == rows
    with pytest.raises(UserError, match=r"rows\.jsonl: `columns` maps 'questoin'.*did you mean 'question'"):
        read(tmp_path, path="rows.jsonl", columns={"questoin": "prompt"})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (5, 5), (6, 6), (100, 6), (None, 6)])
def test_limit(tmp_path, limit, expected, streaming):
    write(tmp_path / "a.jsonl", numbered(0, 4))
    write(tmp_path / "b.jsonl", numbered(4, 6))
    assert read(tmp_path, streaming, path="*.jsonl", limit=limit) == numbered(0, expected)


# Streams


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("place", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.parquet", "saved", "splits"])
def test_stream_gives_the_same_rows(tmp_path, place, limit):
    if place == "saved":
        Dataset.from_list(ROWS).save_to_disk(tmp_path / place)
    elif place == "splits":
        DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / place)
    else:
        path = write(tmp_path / place.removesuffix(".gz"), ROWS)
        if place.endswith(".gz"):
            compress(path, ".gz")
    assert read(tmp_path, streaming=True, path=place, limit=limit) == ROWS[:limit]
    assert read(tmp_path, path=place, limit=limit) == ROWS[:limit]


def test_stream_maps_columns(tmp_path):
    write(tmp_path / "rows.jsonl", [{"body": "One.", "text": "an id"}])
    assert read(tmp_path, streaming=True, path="rows.jsonl", columns={"body": "text"}) == [{"text": "One."}]


# Several sources in one dataset


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def prepare(write_config, model, tmp_path):
    """`prepare(*sources)`: the texts that a stage sft gets of a dataset with these sources, and the audit."""

    def call(*entries):
        changes = {"model": {"path": str(model)}, "data": {"mixed": {"sources": list(entries)}}}
        config = configs.load(write_config(tmp_path, **changes, stages={"sft": {"data": "mixed"}}))
        tokenizer = run_tokenizer.build(config)
        prepared = tiny.StageRows(config, tokenizer).prepare("sft", "data")
        return [tokenizer.decode(ids) for ids in prepared.rows["input_ids"]], prepared.audit

    return call


def rendered(rows):
    return [f"<user>{row['prompt']}<assistant>{row['completion']}<eos>" for row in rows]


def test_sources_of_different_kinds_and_formats(prepare, tmp_path):
    write(tmp_path / "a.jsonl", numbered(0, 3))
    write(tmp_path / "b.csv", numbered(3, 6))
    said = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in numbered(6, 9)]
    write(tmp_path / "c.json", [{"messages": [{"role": who, "content": what} for who, what in row]} for row in said])
    texts, audit = prepare({"path": "a.jsonl"}, {"path": "b.csv"}, {"path": "c.json", "limit": 2})
    assert texts == rendered(numbered(0, 8))
    assert (audit.read, audit.rows, audit.num_dropped) == (8, 8, 0)
    assert [audit.place(row) for row in (2, 3, 7)] == [
        f"{tmp_path / 'a.jsonl'}: row 2",
        f"{tmp_path / 'b.csv'}: row 0",
        f"{tmp_path / 'c.json'}: row 1",
    ]


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ((30, 40), (3, 1), (30, 10)),
        ((10, 40), (1, 2), (10, 20)),
        ((40, 10), (0.5, 0.25), (20, 10)),
        ((20, 20), (1, 1), (20, 20)),
        ((12, 50, 30), (0.2, 0.5, 0.3), (12, 30, 18)),
    ],
)
def test_weights(prepare, tmp_path, sizes, weights, expected):
    """Exact proportions, no row twice, in the order of the files; the rows left out are spread evenly and counted."""
    entries, sides = [], []
    for i, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        sides.append(rendered(numbered(100 * i, 100 * i + size)))
        write(tmp_path / f"{i}.jsonl", numbered(100 * i, 100 * i + size))
        entries.append({"path": f"{i}.jsonl", "weight": weight})
    texts, audit = prepare(*entries)
    assert tuple(sum(text in side for text in texts) for side in sides) == expected
    assert len(set(texts)) == len(texts)
    assert texts == [text for side in sides for text in side if text in texts]
    assert audit.dropped["weight"].count == sum(sizes) - sum(expected) == audit.num_dropped
    assert (audit.read, audit.rows) == (sum(sizes), sum(expected))
    for side, number in zip(sides, expected, strict=True):
        places = [i for i, text in enumerate(side) if text in texts]
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert max(gaps) - min(gaps) <= 1
        assert len(side) - places[-1] <= -(-len(side) // number)


def test_weights_count_rows_that_can_be_used(prepare, tmp_path):
    """Of 20 rows 8 have no completion: the other source gives as many as there are left, and not 20."""
    write(tmp_path / "a.jsonl", [row | ({"completion": ""} if i < 8 else {}) for i, row in enumerate(numbered(0, 20))])
    write(tmp_path / "b.jsonl", numbered(100, 150))
    texts, audit = prepare({"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "weight": 1})
    assert texts[:12] == rendered(numbered(8, 20))
    assert (len(texts), audit.read, audit.rows) == (24, 70, 24)
    assert (audit.dropped["empty"].count, audit.dropped["weight"].count) == (8, 38)


# Where a row is


@pytest.mark.parametrize("compression", [None, ".gz"])
def test_place_of_a_fault_in_the_second_file(cli, write_config, tmp_path, compression):
    pairs = [{"prompt": f"Question {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(5)]
    write(tmp_path / "parts" / "a.jsonl", pairs)
    second = write(tmp_path / "parts" / "b.jsonl", [*pairs[:2], pairs[2] | {"chosen": None}, *pairs[3:]])
    second = compress(second, compression) if compression else second
    config = write_config(tmp_path, **{"data.comparisons.path": "parts/*"})
    exit_code, _, stderr = cli("plan", config)
    assert exit_code == 2
    assert re.search(rf"First {re.escape(str(second))}: row 2: chosen: ", stderr)
    assert "1 of 10 rows (10.00%)" in stderr
    assert "a.jsonl" not in stderr


# Fingerprints


def move(path, target):
    target.parent.mkdir(parents=True)
    return shutil.move(path, target)


def test_fingerprint_is_of_content(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    before = fingerprint(tmp_path, path="rows.jsonl")
    os.utime(path, (1, 1))
    assert fingerprint(tmp_path, path="rows.jsonl") == before
    moved = move(path, tmp_path / "elsewhere" / "other.jsonl")
    assert fingerprint(tmp_path, path="elsewhere/other.jsonl") == before
    assert fingerprint(tmp_path, path=str(moved)) == before

    content = bytearray(moved.read_bytes())
    place = content.index(b"Yes.")
    content[place] = ord("y")
    moved.write_bytes(content)
    os.utime(moved, (2, 2))
    assert fingerprint(tmp_path, path="elsewhere/other.jsonl") != before


def test_fingerprint_of_several_files(tmp_path):
    """The order of files is the order of rows, so it counts; names do not."""
    for folder, names in {"one": ("a", "b"), "same": ("c", "d"), "turned": ("b", "a")}.items():
        for i, name in enumerate(names):
            write(tmp_path / folder / f"{name}.jsonl", numbered(i, i + 1))
    one, same, turned = (fingerprint(tmp_path, path=f"{folder}/*.jsonl") for folder in ("one", "same", "turned"))
    assert one == same != turned


def test_fingerprint_of_a_saved_dataset(tmp_path):
    splits = {"train": Dataset.from_list(numbered(0, 3)), "test": Dataset.from_list(numbered(3, 5))}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    before = fingerprint(tmp_path, path="saved")
    assert fingerprint(tmp_path, path="saved", split="test") != before
    move(tmp_path / "saved", tmp_path / "elsewhere" / "other")
    assert fingerprint(tmp_path, path="elsewhere/other") == before
    (file,) = (tmp_path / "elsewhere" / "other" / "train").glob("*.arrow")
    file.write_bytes(file.read_bytes().replace(b"Question 1", b"question 1"))
    os.utime(file, (2, 2))
    assert fingerprint(tmp_path, path="elsewhere/other") != before


def test_fingerprint_counts_how_rows_are_read(tmp_path):
    write(tmp_path / "rows.jsonl", ROWS)
    ways = [{}, {"limit": 2}, {"format": "prompt_completion"}, {"columns": {"prompt": "completion"}}]
    found = {fingerprint(tmp_path, path="rows.jsonl", **way) for way in ways}
    assert len(found) == len(ways)


@pytest.mark.parametrize("place", [0, 5, -1])
def test_fingerprint_of_a_large_file(tmp_path, monkeypatch, place):
    """A large file counts by its size and by samples, its beginning and its end among them."""
    monkeypatch.setattr(fingerprints, "_LARGE", 1 << 21)
    content = bytearray(os.urandom(1 << 20) * 3)
    (tmp_path / "a.txt").write_bytes(content)
    content[place] ^= 1
    (tmp_path / "b.txt").write_bytes(content)
    (tmp_path / "c.txt").write_bytes(content + b"\0")
    assert len({fingerprint(tmp_path, path=f"{name}.txt") for name in "abc"}) == 3


# What people's folders and tables are like


def test_columns_swap_their_names_and_replace_others(tmp_path):
    write(tmp_path / "rows.jsonl", [{"a": "1", "b": "2", "prompt": "3"}])
    assert read(tmp_path, path="rows.jsonl", columns={"a": "b", "b": "a"}) == [{"b": "1", "a": "2", "prompt": "3"}]
    chained = read(tmp_path, path="rows.jsonl", columns={"a": "b", "b": "prompt"})
    assert chained == [{"b": "1", "prompt": "2"}]
    assert read(tmp_path, path="rows.jsonl", columns={"a": "b", "b": "a"}, streaming=True) == [
        {"b": "1", "a": "2", "prompt": "3"}
    ]
    with pytest.raises(UserError, match="maps several columns to one: prompt, prompt"):
        read(tmp_path, path="rows.jsonl", columns={"a": "prompt", "b": "prompt"})


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_cells_of_tables_stay_text(tmp_path, suffix, streaming):
    rows = [
        {"prompt": "2", "completion": "None"},
        {"prompt": "N/A", "completion": ""},
        {"prompt": "3", "completion": "4.0"},
    ]
    write(tmp_path / f"rows{suffix}", rows)
    assert read(tmp_path, path=f"rows{suffix}", streaming=streaming) == rows


def test_glob_reads_no_file_twice(tmp_path):
    for place in ("g/a.jsonl", "g/one/b.jsonl", "g/one/two/c.jsonl"):
        write(tmp_path / place, numbered(0, 2))
    assert len(read(tmp_path, path="g/**")) == 6


def test_folder_with_files_that_hold_no_rows(tmp_path):
    write(tmp_path / "folder/train.jsonl", numbered(0, 3))
    for name in ("LICENSE", "notes.pdf", "train.py", "train-notes.md"):
        (tmp_path / "folder" / name).write_text("nothing to read")
    assert read(tmp_path, path="folder") == numbered(0, 3)


@pytest.mark.parametrize("path", ["links", "links/rows.jsonl", "links/*.jsonl"])
def test_links_are_followed(tmp_path, path):
    """As in the hub's cache: links with suffixes to files without."""
    blob = write(tmp_path / "blobs/abc", numbered(0, 3), ".jsonl")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "rows.jsonl").symlink_to(blob)
    assert read(tmp_path, path=path) == numbered(0, 3)


def test_brackets_in_paths(tmp_path):
    folder = tmp_path / "run[1]"
    write(folder / "a.jsonl", numbered(0, 2))
    write(folder / "b[1].jsonl", numbered(2, 3))
    assert read(folder, path="a.jsonl") == numbered(0, 2)
    assert read(folder, path="b[1].jsonl") == numbered(2, 3)
    assert read(folder, path="*.jsonl") == numbered(0, 3)
    assert read(tmp_path, path="run[1]") == numbered(0, 3)


def test_suffix_in_capitals(tmp_path):
    write(tmp_path / "ROWS.JSONL", numbered(0, 2), ".jsonl")
    assert read(tmp_path, path="ROWS.JSONL") == numbered(0, 2)


def test_compressed_parquet_is_refused(tmp_path):
    compress(write(tmp_path / "rows.parquet", numbered(0, 2)), ".gz")
    with pytest.raises(UserError, match=r"cannot read .*rows\.parquet\.gz"):
        find(tmp_path, path="rows.parquet.gz")


def test_fingerprint_counts_the_kind_of_file(tmp_path):
    line = json.dumps({"text": "One."}) + "\n"
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text(line)
    assert fingerprint(tmp_path, path="a.txt") != fingerprint(tmp_path, path="b.jsonl")
