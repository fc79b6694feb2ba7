"""Calibration on one's own data: the Hub, conversations, packing, what Python code gives."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from torch import Tensor

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands import tables
from lowmem_gblm.commands.calibration import Samples, calibration_samples, evaluation_windows
from lowmem_gblm.commands.prune.resume import find_job
from lowmem_gblm.commands.request import PruneRequest
from lowmem_gblm.commands.texts import Documents, InMemory, Text, as_calibration, open_source
from lowmem_gblm.errors import JobError, RequestError
from lowmem_gblm.model.tokenizer import Tokenizer, load_tokenizer
from lowmem_gblm.storage.hub import offline_if_unreachable
from lowmem_gblm.storage.kept_samples import SAMPLES
from lowmem_gblm.sweeps.block_pruner import BlockPruner
from support.tiny_models import sample_text, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
SHORT = [sample_text(length, seed=length) for length in (12, 30, 7, 25, 41, 18)]
CHAT = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}\n{% endfor %}"
TALK = [{"role": "user", "content": "Where is the fox?"}, {"role": "assistant", "content": "Home."}]
SHOWN = "[user] Where is the fox?\n[assistant] Home.\n"


def tokenize(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def draw(source: Text | Documents, nsamples: int = 3, seqlen: int = 20, **options: Any) -> Samples:
    asked = {"nsamples": nsamples, "seqlen": seqlen, "seed": 0, "eos": EOS} | options
    return calibration_samples(source, tokenize, **asked)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class OnTheHub:
    """A Hub with one data set, by way of the library's own reader of local files."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.asked: list[Any] = []
        self.load = datasets.load_dataset

    def __call__(self, path: str, **options: Any) -> Any:
        self.asked.append((path, options.get("name"), options["split"]))
        return self.load("json", data_files=str(self.file), split="train", streaming=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnTheHub:
    rows = [{"text": f"{number} {sample_text(80, seed=number)}"} for number in range(20)]
    found = OnTheHub(write_rows(tmp_path / "rows.jsonl", rows))
    monkeypatch.setattr(datasets, "load_dataset", found)
    return found


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/data", ("owner/data", None, "train")),
        ("owner/data:en", ("owner/data", "en", "train")),
        ("owner/data:en:test", ("owner/data", "en", "test")),
        ("owner/data::test", ("owner/data", None, "test")),
    ],
)
def test_a_data_set_of_the_hub_is_named_with_its_config_and_split(
    name: str, asked: tuple[str, ...], hub: OnTheHub
) -> None:
    source = open_source(name, "calibration")
    assert hub.asked == [asked]
    assert isinstance(source, Documents)
    texts = [json.loads(line)["text"] for line in hub.file.read_text().splitlines()]
    assert (sorted(source.rows), source.origin) == (sorted(texts), name)
    # Rows that lie together, as those of one class do, do not stay together.
    assert list(source.rows) != texts


def test_of_a_large_data_set_only_the_first_rows_are_read(
    hub: OnTheHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_TAKEN_CHARACTERS", 250)
    assert len(open_source("owner/data", "calibration").rows) == 3


def test_a_column_of_the_hub_is_named(hub: OnTheHub) -> None:
    with pytest.raises(RequestError, match="owner/data has no column 'story', but text: name it"):
        open_source("owner/data", "calibration", "story")


@pytest.mark.parametrize(
    "name", ["folder/nowhere.jsonl", "folder/nowhere.txt", "/nowhere", "a b/c"]
)
def test_a_path_that_is_nowhere_is_no_data_set(name: str) -> None:
    with pytest.raises(RequestError, match=f"there is no text '{name}': give c4, wiki"):
        open_source(name, "calibration")


def test_a_data_set_of_the_hub_is_not_measured_on() -> None:
    with pytest.raises(RequestError, match="there is no text 'owner/data': give c4, wiki"):
        open_source("owner/data", "evaluation")


@pytest.mark.parametrize(
    ("name", "split", "option"),
    [
        ("c4", "calibration", "--calibration FILE"),
        ("owner/data", "calibration", "--calibration FILE"),
        ("wikitext2", "evaluation", "--text FILE"),
    ],
)
def test_without_a_network_the_sentence_comes_at_once(
    name: str, split: Any, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries that try again would take half a minute; nothing of them is replaced here."""
    settings = (huggingface_hub.constants, datasets.config)
    for one in settings:
        monkeypatch.setattr(one, "HF_HUB_OFFLINE", False)
    # An address that refuses at once, on any machine.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    begin = time.perf_counter()
    with pytest.raises(RequestError, match=f"the Hub: it does not answer, .*text: {option}"):
        open_source(name, split)
    assert time.perf_counter() - begin < 10
    assert [one.HF_HUB_OFFLINE for one in settings] == [False, False]


def test_what_is_imported_without_an_answer_is_not_offline_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("lowmem_gblm.storage.hub._answers", lambda address: False)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    imported = SimpleNamespace(config=ModuleType("config"))
    with offline_if_unreachable() as answers:
        monkeypatch.setitem(sys.modules, "datasets", imported)
        imported.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE
        assert (answers, imported.config.HF_HUB_OFFLINE) == (False, True)
    assert not imported.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def talking(folder: Path, template: str | None = CHAT) -> Tokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("column", ["text", "messages"])
def test_conversations_go_through_the_chat_template(column: str, tmp_path: Path) -> None:
    """Other messages of the file have a field more, which these must not have as None."""
    other = [{"role": "user", "content": "Hi", "name": "fox"}]
    file = write_rows(tmp_path / "talks.jsonl", [{"messages": TALK}, {"messages": other}])
    (first, second) = open_source(str(file), "calibration", column).rows
    assert (first, second) == (TALK, other)
    ids = talking(tmp_path / "tokenizer")(first)
    assert TOKENIZER.decode(ids) == SHOWN


def test_the_command_line_packs_conversations(small: Path, tmp_path: Path) -> None:
    """All are alike, so that their order is of no account."""
    model = Path(shutil.copytree(small, tmp_path / "model"))
    talking(model)
    file = write_rows(tmp_path / "talks.jsonl", [{"messages": TALK}] * 3)
    asked = ["--calibration", str(file), "--packing", "--nsamples", "4", "--seqlen", "50"]
    assert main(["prune", str(model), str(tmp_path / "out"), "--method", "wanda", *asked]) == 0
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    samples_NT = torch.tensor((tokenize(SHOWN)[1:] * 5)[:200]).view(4, 50)
    expected = hashlib.sha256(samples_NT.numpy().tobytes()).hexdigest()
    assert record["fingerprints"]["calibration_tokens"] == expected
    assert record["notes"] == [
        f"{file.name} has room for 2 distinct windows in 3 documents: the 4 calibration samples "
        f"repeat some of its text"
    ]


def test_a_conversation_does_not_depend_on_the_day(tmp_path: Path) -> None:
    ids = talking(tmp_path, "{{ strftime_now('%d %b %Y') }}")(TALK)
    assert TOKENIZER.decode(ids) == "26 Jul 2024"


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no chat template, which conversations need"):
        talking(tmp_path, None)(TALK)


def test_what_a_chat_template_refuses_is_said(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="does not take a conversation: roles must alternate"):
        talking(tmp_path, template)(TALK)


def test_perplexity_is_not_that_of_conversations() -> None:
    with pytest.raises(RequestError, match="holds conversations, and perplexity is that of a text"):
        evaluation_windows(Documents([TALK], "talks"), tokenize, seqlen=8, windows=None)


def test_packing_joins_short_documents_and_uses_each_once() -> None:
    """Samples follow each other in a text of all documents, an end of text after each."""
    tokens_NT, notes = draw(Documents(SHORT, "d"), nsamples=6, packing=True)
    assert (tokens_NT.shape, notes) == ((6, 20), [])
    joined = tokens_NT.flatten().tolist()
    pieces, piece = [], []
    for token in joined:
        piece.append(token)
        if token == EOS:
            pieces.append(piece)
            piece = []
    documents = [[*tokenize(text), EOS] for text in SHORT]
    assert len(pieces) >= 3
    assert all(piece in documents for piece in pieces)
    assert len({tuple(piece) for piece in pieces}) == len(pieces)
    assert any(document[: len(piece)] == piece for document in documents)


def test_packing_begins_every_sample_with_bos_where_it_is_asked_for() -> None:
    bos = tokenize("")[0]
    packed = draw(Documents(SHORT, "d"), nsamples=6, packing=True, bos=bos).tokens_NT
    assert (packed == bos).nonzero()[:, 1].tolist() == [0] * 6


def test_packed_documents_are_drawn_by_the_seed() -> None:
    drawn = [draw(Documents(SHORT, "d"), packing=True, seed=seed).tokens_NT for seed in (0, 0, 1)]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])


def test_documents_that_are_used_up_are_joined_once_more_and_that_is_noted() -> None:
    tokens_NT, notes = draw(Documents(SHORT, "shorts"), nsamples=20, packing=True)
    assert tokens_NT.shape == (20, 20)
    room = sum(len(tokenize(text)) + 1 for text in SHORT) // 20
    said = f"shorts has room for {room} distinct windows in 6 documents: the 20 calibration samples"
    assert notes == [f"{said} repeat some of its text"]


def test_too_little_for_one_packed_sample_is_refused() -> None:
    message = "the 2 documents of d have 6 tokens together, fewer than one sample of 20. Give"
    with pytest.raises(RequestError, match=message):
        draw(Documents(["a", "b"], "d"), packing=True)


def test_a_running_text_is_not_packed() -> None:
    with pytest.raises(RequestError, match="d is one running text: leave out --packing"):
        draw(Text(sample_text(90), "d"), packing=True)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (Text(sample_text(100), "story"), "story has room for 5 distinct windows: the 6 cal"),
        (Documents([sample_text(50)], "d"), "d has room for 2 distinct windows in 1 documents: "),
    ],
)
def test_scarce_text_is_noted(source: Text | Documents, said: str) -> None:
    (note,) = draw(source, nsamples=6).notes
    assert note.startswith(said)
    assert draw(source, nsamples=2).notes == []


SIZE = {"nsamples": 4, "seqlen": 24, "method": "wanda"}
LONG = [sample_text(60, seed=seed) for seed in range(5)]


@pytest.fixture
def prune_by(small: Path, tmp_path: Path) -> Any:
    def prune(name: str, given: Any, **options: Any) -> dict[str, Any]:
        return lowmem_gblm.prune(small, tmp_path / name, calibration=given, **SIZE | options)

    return prune


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def samples_of(tmp_path: Path, small: Path, seed: int = 0) -> Tensor:
    source = Documents(LONG, "d")
    options = {"nsamples": 4, "seqlen": 24, "seed": seed}
    return calibration_samples(source, load_tokenizer(small), **options).tokens_NT


def test_what_python_gives_prunes_as_the_same_text_in_a_file(
    prune_by: Any, small: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "d.jsonl", [{"story": text} for text in LONG])
    expected = prune_by("file", file, text_column="story")
    samples_NT = samples_of(tmp_path, small)
    given = {
        "list": LONG,
        "table": datasets.Dataset.from_dict({"story": LONG}),
        "tokens": samples_NT,
    }
    for name, value in given.items():
        record = prune_by(name, value, text_column="story")
        assert record["fingerprints"] == expected["fingerprints"], name
        assert record["calibration"] == "in memory"
        assert (record["nsamples"], record["seqlen"]) == (4, 24)
        assert bytes_of(tmp_path / name) == bytes_of(tmp_path / "file")


def test_samples_are_given_as_rows_as_well() -> None:
    samples_NT = torch.arange(12).view(3, 4)
    for given in (list(samples_NT), [row[None] for row in samples_NT], samples_NT.tolist()):
        assert PruneRequest(model="m", calibration=given).calibration.tokens_NT.equal(samples_NT)


def test_the_number_and_length_of_samples_are_those_of_the_samples() -> None:
    request = PruneRequest(model="m", calibration=torch.zeros(3, 16, dtype=torch.int32))
    assert (request.nsamples, request.seqlen) == (3, 16)
    with pytest.raises(RequestError, match="the samples that are given are 3 of 16 tokens: leave"):
        PruneRequest(model="m", calibration=[[1] * 16] * 3, nsamples=4)


def stop_in_block_1(patch: pytest.MonkeyPatch) -> None:
    decide, seen = BlockPruner.prune, []

    def prune(pruner: BlockPruner, block: object, *args: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(block)
        decide(pruner, block, *args)

    patch.setattr(BlockPruner, "prune", prune)


@pytest.fixture
def interrupted(prune_by: Any, tmp_path: Path) -> Path:
    """The work folder of a job whose calibration was in memory."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in_block_1(patch)
        with pytest.raises(KeyboardInterrupt):
            prune_by("out", LONG, packing=True)
    return tmp_path / "out.work"


def test_a_job_is_resumed_without_what_python_gave(
    prune_by: Any, interrupted: Path, tmp_path: Path
) -> None:
    prune_by("once", LONG, packing=True)
    record = lowmem_gblm.resume(interrupted)
    assert record["attempts"] == 2
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "once")
    assert not interrupted.exists()


def test_a_job_is_resumed_with_the_same_given_again(prune_by: Any, interrupted: Path) -> None:
    with pytest.raises(JobError, match="calibration_tokens"):
        prune_by("out", LONG[1:], packing=True)
    assert prune_by("out", LONG, packing=True)["attempts"] == 2


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{")])
def test_a_job_without_its_samples_says_what_to_give(damage: Any, interrupted: Path) -> None:
    damage(interrupted / SAMPLES)
    with pytest.raises(JobError, match=r"cannot be read .*: call prune once more with the calib"):
        find_job(interrupted)


def test_statistics_of_texts_in_memory_serve_the_same_texts(
    prune_by: Any, small: Path, tmp_path: Path
) -> None:
    """Whose text is nowhere, its samples cannot be drawn for what is measured again."""
    saved = tmp_path / "saved"
    taking = {"method": "gblm", "statistics": saved}
    prune_by("first", LONG, method="gblm", save_statistics=saved)
    assert prune_by("second", LONG, **taking)["statistics"]["taken"] == ["gradient_l1"]
    with pytest.raises(JobError, match="are of other calibration samples"):
        prune_by("third", LONG[1:], **taking)
    with pytest.raises(RequestError, match="calibration was given in memory: call prune with it"):
        lowmem_gblm.prune(small, tmp_path / "fourth", **taking)


def test_a_table_on_its_way_is_no_table() -> None:
    """Rows that can only be read once have no number."""
    stream = datasets.Dataset.from_dict({"text": LONG}).to_iterable_dataset()
    with pytest.raises(RequestError, match="the calibration must be a file, a name, a list"):
        as_calibration(stream)
    assert isinstance(as_calibration(LONG), InMemory)
