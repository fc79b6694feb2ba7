"""Text into token windows: the authors' draws, every kind of source, every complaint."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch

from lowmem_gblm.commands.calibration import (
    bos_of_windows,
    calibration_samples,
    evaluation_windows,
)
from lowmem_gblm.commands.texts import Documents, Text, calibration_text_bytes, open_source
from lowmem_gblm.errors import CheckpointError, RequestError
from lowmem_gblm.model.tokenizer import load_tokenizer
from support import reference
from support.tiny_models import sample_text, tiny_tokenizer

DOCUMENTS = [sample_text(length, seed=length) for length in (30, 90, 12, 400, 61, 60, 59)]
# A text of n characters gives n + 1 tokens: one per byte, and <s> before them.
TOKENIZER = tiny_tokenizer()


def tokenize(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def draw(source, nsamples=5, seqlen=60, seed=0):
    options = {"nsamples": nsamples, "seqlen": seqlen, "seed": seed}
    return calibration_samples(source, tokenize, **options).tokens_NT


def save_documents(path: Path, rows: list[dict]) -> Path:
    """Writes rows as the kind of file that the suffix names."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.mark.parametrize("seed", [0, 1, 2024])
def test_windows_of_a_text_are_the_reference_s(seed):
    text = sample_text(900)
    expected = reference.text_windows(torch.tensor(tokenize(text)), 5, 60, seed)
    assert draw(Text(text, "t"), seed=seed).equal(expected)


@pytest.mark.parametrize("seed", [0, 1, 2024])
def test_windows_of_documents_are_the_reference_s(seed):
    tokens = [tokenize(document) for document in DOCUMENTS]
    expected = reference.document_windows(tokens, 5, 60, seed)
    assert draw(Documents(DOCUMENTS, "d"), seed=seed).equal(expected)


def test_a_text_of_one_token_more_than_a_window_suffices():
    assert draw(Text(sample_text(60), "t"), nsamples=1).tolist() == [tokenize(sample_text(60))[:60]]


def test_a_text_of_just_one_window_is_too_short():
    message = "story has 60 tokens; samples of 60 tokens need at least 61. Give a longer text, or a"
    with pytest.raises(RequestError, match=f"{message} smaller --seqlen"):
        draw(Text(sample_text(59), "story"))


def test_documents_of_which_none_is_longer_than_a_window_are_refused():
    rows = [sample_text(length) for length in (12, 59, 30)]
    message = "none of the 3 documents of d is longer than 60 tokens; the longest has 60. Give"
    with pytest.raises(RequestError, match=message):
        draw(Documents(rows, "d"))


@pytest.mark.parametrize(("windows", "count"), [(None, 3), (2, 2), (3, 3), (99, 3)])
def test_evaluation_windows_lie_side_by_side_and_drop_the_tail(windows, count):
    source = Text(sample_text(200), "t")
    cut = evaluation_windows(source, tokenize, seqlen=60, windows=windows)
    assert cut.shape == (count, 60)
    assert cut.flatten().tolist() == tokenize(sample_text(200))[: count * 60]


def test_documents_are_evaluated_as_one_text_with_blank_lines_between():
    joined = evaluation_windows(Documents(["ab", "cd"], "d"), tokenize, seqlen=7, windows=None)
    assert joined.tolist() == [tokenize("ab\n\ncd")]


def test_a_text_shorter_than_one_evaluation_window_is_refused():
    message = "story has 59 tokens, fewer than one window of 60. Give a longer text, or a smaller"
    with pytest.raises(RequestError, match=message):
        evaluation_windows(Text(sample_text(58), "story"), tokenize, seqlen=60, windows=None)


def test_every_window_begins_with_bos_where_it_is_asked_for():
    """The text's own tokens follow each other without a gap, and its own <s> is not there twice."""
    source, bos = Text(sample_text(200), "t"), tokenize("")[0]
    cut = evaluation_windows(source, tokenize, seqlen=60, windows=None, bos=bos)
    assert cut[:, 0].tolist() == [bos] * 3
    assert cut[:, 1:].flatten().tolist() == tokenize(sample_text(200))[1 : 1 + 3 * 59]


@pytest.mark.parametrize("source", [Text(sample_text(900), "t"), Documents(DOCUMENTS, "d")])
def test_every_sample_begins_with_bos_and_lies_where_the_draws_say(source):
    bos = tokenize("")[0]
    options = {"nsamples": 5, "seqlen": 60, "seed": 3, "bos": bos}
    drawn = calibration_samples(source, tokenize, **options).tokens_NT
    if isinstance(source, Text):
        expected = reference.text_windows(torch.tensor(tokenize(source.text)[1:]), 5, 59, 3)
    else:
        tokens = [tokenize(document)[1:] for document in DOCUMENTS]
        expected = reference.document_windows(tokens, 5, 59, 3)
    assert drawn[:, 1:].equal(expected)
    assert (drawn == bos).nonzero()[:, 1].tolist() == [0] * 5


@pytest.mark.parametrize(
    ("asked", "model_type", "bos", "expected"),
    [
        ("auto", "gemma3_text", 2, 2),
        ("auto", "llama", 1, None),
        ("always", "llama", 1, 1),
        ("never", "gemma2", 2, None),
    ],
)
def test_bos_is_for_gemma_and_for_who_asks(asked, model_type, bos, expected):
    assert bos_of_windows(asked, model_type, bos) == expected


def test_bos_of_a_tokenizer_that_has_none_is_refused():
    with pytest.raises(RequestError, match="the tokenizer has no <bos> token: give --bos never"):
        bos_of_windows("always", "llama", None)


def test_a_txt_file_is_one_text_as_it_stands(tmp_path):
    path = tmp_path / "story.txt"
    path.write_bytes("Überall\n\nein Satz. ".encode())
    assert open_source(str(path), "calibration") == Text("Überall\n\nein Satz. ", str(path))


@pytest.mark.parametrize("column", ["text", "story"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.json.gz", "d.v1.jsonl.gz", "d.parquet"])
def test_files_of_documents_are_read_row_by_row(name, column, tmp_path):
    rows = [{"id": index, column: document} for index, document in enumerate(DOCUMENTS)]
    path = save_documents(tmp_path / name, rows)
    source = open_source(str(path), "calibration", column)
    assert isinstance(source, Documents)
    assert (list(source.rows), source.origin) == (DOCUMENTS, str(path))


def test_samples_of_a_file_are_those_of_its_documents(tmp_path):
    path = save_documents(tmp_path / "d.jsonl", [{"text": document} for document in DOCUMENTS])
    source = open_source(str(path), "calibration")
    assert draw(source).equal(draw(Documents(DOCUMENTS, "d")))


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_the_embedded_text_has_both_parts(split):
    source = open_source("demo", split)
    assert isinstance(source, Text)
    assert (source.origin, bool(source.text)) == (f"the embedded {split} text", True)


def test_the_embedded_parts_differ():
    assert open_source("demo", "calibration") != open_source("demo", "evaluation")


@pytest.mark.parametrize("name", ["nowhere.txt", "wikitext3"])
def test_a_text_that_is_not_there_is_refused_with_what_can_be_given(name):
    message = f"there is no text '{name}': give c4, wikitext2, demo, a data set of the Hub as"
    with pytest.raises(RequestError, match=message):
        open_source(name, "calibration")


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(RequestError, match="is a folder: give a"):
        open_source(str(tmp_path), "calibration")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.md"])
def test_an_empty_file_is_refused(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(RequestError, match=f"{name} is empty"):
        open_source(str(tmp_path / name), "calibration")


@pytest.mark.parametrize("name", ["a.md", "a", "a.txt.gz", "a.csv"])
def test_a_file_of_unknown_kind_is_refused(name, tmp_path):
    (tmp_path / name).write_text("text")
    with pytest.raises(RequestError, match=f"{name} is of no known kind: .txt for a text; .jsonl,"):
        open_source(str(tmp_path / name), "calibration")


def test_a_text_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("Überall".encode("latin-1"))
    with pytest.raises(RequestError, match=r"a\.txt is not UTF-8: .* position 0"):
        open_source(str(tmp_path / "a.txt"), "calibration")


def test_a_wrong_column_is_refused_with_those_there_are(tmp_path):
    path = save_documents(tmp_path / "a.jsonl", [{"id": 1, "story": "once"}])
    message = r"a\.jsonl has no column 'text', but id, story: name it with --text-column"
    with pytest.raises(RequestError, match=message):
        open_source(str(path), "calibration")


def test_a_column_of_numbers_is_refused(tmp_path):
    path = save_documents(tmp_path / "a.jsonl", [{"id": 1, "story": "once"}])
    with pytest.raises(RequestError, match=r"column 'id' of .*a\.jsonl holds no text"):
        open_source(str(path), "calibration", "id")


@pytest.fixture(params=[None, 3])
def gappy(request, tmp_path) -> Documents:
    """Documents whose first row is a text, and the second one is not."""
    rows = [{"text": sample_text(90)}, {"text": request.param}]
    return open_source(str(save_documents(tmp_path / "a.jsonl", rows)), "calibration")


def test_a_single_row_without_text_is_refused_when_it_is_drawn(gappy):
    with pytest.raises(RequestError, match=r"a\.jsonl .*no text"):
        draw(gappy, nsamples=20)


def test_a_single_row_without_text_is_refused_in_an_evaluation(gappy):
    with pytest.raises(RequestError, match=r"a\.jsonl .*no text"):
        evaluation_windows(gappy, tokenize, seqlen=10, windows=None)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_without_any_document_is_refused(name, tmp_path):
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["once"]}).slice(0, 0), path)
    else:
        path.write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"\n")
    with pytest.raises(RequestError, match=rf"{name} (has no documents|cannot be read)"):
        open_source(str(path), "calibration")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.parquet"])
def test_a_damaged_file_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"{this is neither\x00")
    with pytest.raises(RequestError, match=f"{name} cannot be read: "):
        open_source(str(tmp_path / name), "calibration")


@pytest.mark.parametrize("name", ["c4", "wikitext2", "owner/data:en"])
def test_what_the_hub_refuses_is_said(name, monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise ValueError("Config name is missing")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr("lowmem_gblm.storage.hub._answers", lambda address: True)
    for one in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(one, "HF_HUB_OFFLINE", False)
    message = "cannot be loaded from the Hub: Config name is missing. Without a network give a loc"
    with pytest.raises(RequestError, match=message):
        open_source(name, "calibration")


def test_the_tokenizer_of_a_folder_adds_its_special_tokens(llama):
    assert load_tokenizer(llama)("a river") == tokenize("a river")


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_folder_without_a_usable_tokenizer_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"has no (usable )?tokenizer: "):
        load_tokenizer(tmp_path)


def test_the_text_that_is_tokenized_in_one_piece_is_known_without_reading_it(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("Überall")
    assert calibration_text_bytes(str(path)) == len("Überall".encode())
    assert calibration_text_bytes("demo") == len(open_source("demo", "calibration").text.encode())
    assert calibration_text_bytes(str(save_documents(tmp_path / "d.jsonl", []))) == 0
