"""The command line: exit codes, sentences, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import lowmem_gblm
from lowmem_gblm.cli.main import main
from lowmem_gblm.commands.request import EvalRequest, PruneRequest
from lowmem_gblm.options import options
from lowmem_gblm.storage.locking import OwnedFolder
from support.crashes import ctrl_c
from support.tiny_models import sample_text, save_tiny

COMMANDS = ("prune", "plan", "eval", "compare", "verify", "report", "pack", "unpack", "demo")
QUERY = "model.layers.1.self_attn.q_proj.weight"


@dataclass
class Answer:
    """What one command left behind."""

    code: int | str | None
    out: str
    err: str


@pytest.fixture
def run(capsys, tmp_path, monkeypatch) -> Callable[..., Answer]:
    """Runs a command in an empty folder. Whatever happens, nobody sees a traceback."""
    monkeypatch.chdir(tmp_path)

    def answer(*argv: object) -> Answer:
        try:
            code = main([str(one) for one in argv])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Answer(code, captured.out, captured.err)

    return answer


@pytest.fixture
def small(text_file) -> list[str]:
    """Options that make a run short."""
    return ["--calibration", str(text_file), "--nsamples", "2", "--seqlen", "32"]


@pytest.fixture
def model(llama, tmp_path) -> Path:
    """A copy of the tiny Llama, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def refused(answer: Answer, code: int, *sentences: str) -> None:
    """The command failed with this code, said these things on stderr and nothing on stdout."""
    assert (answer.code, answer.out) == (code, "")
    for sentence in sentences:
        assert sentence in answer.err


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "obs"], "unknown method 'obs': choose one of gblm, gradient, magnitude"),
        (["--method", "wnda"], "unknown method 'wnda': choose one of gblm, gradient, magnitude, "),
        (["--method", "wnda"], "wanda; did you mean wanda?"),
        (["--sparsity", "0"], "the sparsity must lie between 0 and 1, both excluded; got 0"),
        (["--sparsity", "1"], "the sparsity must lie between 0 and 1, both excluded; got 1"),
        (["--sparsity", "-0.1"], "must lie between 0 and 1, both excluded; got -0.1"),
        (["--sparsity", "1.5"], "must lie between 0 and 1, both excluded; got 1.5"),
        (["--sparsity", "nan"], "the sparsity must"),
        (["--sparsity", "abc"], "the sparsity must be a number such as 0.5; got 'abc'"),
        (["--sparsity", "0.5", "--pattern", "1:4"], "0.5 contradicts --pattern 1:4, which is a"),
        (["--pattern", "4:2"], "a pattern N:M needs 0 < N < M"),
        (["--pattern", "x"], """the pattern must read "N:M", as in 2:4"""),
        (["--pattern", "2:5"], "has 144 inputs, which 5 does not divide: the pattern"),
        (["--seqlen", "129"], "--seqlen 129 is beyond the 128 positions of the model"),
        (["--seqlen", "1"], "--seqlen must be at least 2 tokens; got 1"),
        (["--nsamples", "0"], "--nsamples must be at least 1; got 0"),
        (["--nsamples", "two"], "argument --nsamples: invalid int value: 'two'"),
        (["--alpha", "-1"], "argument --alpha: must be auto or a number from 0 on; got -1"),
        (["--alpha", "nan"], "argument --alpha: must be auto or a number from 0 on; got nan"),
        (["--alpha", "best"], "argument --alpha: must be auto or a number from 0 on; got best"),
        (["--gradient-norm", "l3"], "--gradient-norm: invalid choice: 'l3'"),
        (["--cpu-memory", "lots"], "a size reads like 22GiB or 800MB; got 'lots'"),
        (["--gpu-memory", "22gx"], "a size reads like 22GiB or 800MB; got '22gx'"),
        (["--device", "mps"], "the device 'mps' is not supported: give --device cpu"),
        (["--cpu-memory", "24"], "a size needs a unit: 24GiB, 24MiB or 24B?"),
        (["--disk", "24 gigs"], "a size reads like 22GiB or 800MB; got '24 gigs'"),
        (["--device", "tpu"], "unknown device 'tpu': give auto, cpu, cuda, cuda:N or xpu"),
        (["--device", "cuda:99"], "there is no device 'cuda:99' here (cuda devices: "),
        (["--device", "cpu", "--dtype", "float16"], "a CPU multiplies float16 too slowly"),
        (["--include", "*.nothing"], "--include '*.nothing' matches no tensor that can be pruned"),
        (
            ["--include", "*norm*"],
            "--include '*norm*' matches no tensor that can be pruned, the nea",
        ),
        (["--exclude", "*"], "and the globs of --sparsity leave nothing to prune"),
        (["--calibration", "nowhere.txt"], "there is no text 'nowhere.txt': give c4, wikitext2"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_written(
    options, sentence, run, llama, small, tmp_path
):
    refused(run("prune", llama, "out", *small, *options), 2, sentence)
    assert not list(tmp_path.iterdir())


def test_a_ragged_width_may_keep_its_tail(run, llama, small):
    ragged = ("--pattern", "2:5", "--on-ragged", "keep")
    assert run("prune", llama, "out", *small, *ragged).code == 0


def test_a_text_that_is_too_short_is_refused(run, llama, tmp_path):
    (tmp_path / "short.txt").write_text(sample_text(31))
    short = ("--calibration", "short.txt", "--seqlen", 32)
    sentence = "short.txt has 32 tokens; samples of 32 tokens need at least 33. Give a longer text"
    refused(run("prune", llama, "out", *short), 2, sentence)
    short = ("--text", "short.txt", "--seqlen", 33)
    refused(run("eval", llama, *short), 2, "has 32 tokens, fewer than one window of 33")


def test_a_missing_model_is_refused(run, tmp_path):
    for path in (tmp_path / "nowhere", "./nowhere", "no/such/folder/here"):
        refused(run("plan", path), 3, f"lowmem-gblm: there is no model folder {path}\n")


def test_a_hub_id_without_a_network_is_refused(run):
    refused(run("plan", "nobody/nothing"), 3, "there is no model folder nobody/nothing, and the")


@pytest.mark.parametrize(
    "make",
    [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")],
    ids=["folder", "file", "dangling link"],
)
def test_an_output_that_exists_is_refused_and_left_alone(make, run, llama, small, tmp_path):
    make(tmp_path / "out")
    answer = run("prune", llama, "out", *small)
    refused(answer, 5, "out exists already: choose another OUTPUT, or move it away")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out.partial", "out.work"])
def test_somebody_else_s_folder_in_the_way_is_refused_and_left_alone(
    name, run, llama, small, tmp_path
):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years")
    sentence = f"{name} exists and was not made by lowmem-gblm: move it away"
    refused(run("prune", llama, "out", *small), 5, sentence)
    assert (tmp_path / name / "thesis.txt").read_text() == "years"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["out.partial", "out.work"])
def test_a_folder_in_use_by_another_run_is_refused(name, run, llama, small, tmp_path):
    other = OwnedFolder(tmp_path / name)
    refused(run("prune", llama, "out", *small), 5, f"another process is using {name}: wait for it")
    other.remove()
    assert run("prune", llama, "out", *small).code == 0


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("command", ["prune", "eval", "compare"])
def test_the_work_folder_may_exist_or_not(command, exists, run, llama, small, text_file, tmp_path):
    if exists:
        (tmp_path / "work").mkdir()
    argv = commands(llama, small, text_file)[command]
    answer = run(*argv, "--work-dir", "work")
    assert (answer.code, "lowmem-gblm:" in answer.err) == (0, False)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "nonsense"}, "can make nothing of"),
        (
            {"auto_map": {"AutoConfig": "code.Config"}},
            "asks for Python code that comes with the che",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized (gptq): prune the orig"),
        ({"quantization_config": "gptq"}, "is quantized"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "LlamaForCausalLM is said to have -1 decoder blocks"),
        ({"num_hidden_layers": 0}, "LlamaForCausalLM is said to have 0 decoder blocks"),
        (
            {"model_type": "lxmert", "num_hidden_layers": {"vision": 5}},
            "gives the model the num_hidden_layers {'vision': 5}, expected a number\n",
        ),
        ({"num_attention_heads": 0}, "model"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "gives the model the hidden_size 0, expected a number from 1"),
        ({"hidden_act": "nope"}, "nope"),
        ({"dtype": "float99"}, "float99"),
        ({"model_type": ["llama"]}, "llama"),
        ({"vocab_size": 10**30}, "model"),
        ({"hidden_size": 64}, "has the shape"),
        ({"num_hidden_layers": 4}, "has no tensor of decoder block 3"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(changes, sentence, run, model, small):
    edit_config(model, **changes)
    refused(run("prune", model, "out", *small), 3, sentence)


@pytest.mark.parametrize("content", [None, "{", "[]", ""])
def test_a_config_json_that_cannot_be_read_is_refused(content, run, model):
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(content)
    refused(run("plan", model), 3, "config.json")


def test_a_configuration_with_an_empty_quantization_is_not_quantized(run, model):
    edit_config(model, quantization_config=None)
    assert run("plan", model).code == 0


@pytest.mark.parametrize(
    ("model_type", "sentence"),
    [
        ("bert", "BertLMHeadModel is not built like a decoder-only language model"),
        ("t5", "'t5' is not a decoder-only language model that transformers can"),
    ],
)
def test_what_is_no_decoder_is_refused(model_type, sentence, run, tmp_path, small):
    config = AutoConfig.for_model(
        model_type, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, vocab_size=40, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    refused(run("prune", tmp_path / "model", "out", *small), 3, sentence)


def test_pickles_are_refused(run, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(run("plan", model), 3, "holds its weights as pickles (pytorch_model.bin)")


@pytest.mark.parametrize("name", [QUERY, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(name, run, model, small, tmp_path):
    edit_tensors(model, lambda tensors: tensors.pop(name))
    refused(run("prune", model, "out", *small), 3, "lacks", name)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", [QUERY, "model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_tensor_of_the_wrong_shape_is_named(name, run, model, small, tmp_path):
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[name][:-8].clone()}))
    refused(run("prune", model, "out", *small), 3, name, "has the shape", "expects")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}'])
def test_a_tokenizer_that_cannot_be_used_is_refused(content, run, model, small):
    (model / "tokenizer.json").write_text(content)
    refused(run("prune", model, "out", *small), 3, "has no usable tokenizer")


@pytest.mark.parametrize("command", ["prune", "plan"])
@pytest.mark.parametrize(
    ("budget", "what"),
    [(("--cpu-memory", "1MiB"), "of host memory in"), (("--disk", "9KiB"), "of disk space")],
)
def test_what_does_not_fit_is_refused(command, budget, what, run, llama, small, tmp_path):
    output = ["out"] if command == "prune" else []
    answer = run(command, llama, *output, *small, *budget)
    refused(answer, 4, "this run needs at least ", what, " may be used: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "gblm"])
def test_weights_that_are_not_numbers_are_refused(method, run, model, small, tmp_path):
    edit_tensors(model, lambda tensors: tensors[QUERY][0].__setitem__(0, float("nan")))
    refused(run("prune", model, "out", *small, "--method", method), 6, f"{QUERY} holds NaN")
    assert not (tmp_path / "out").exists()


def test_a_perplexity_that_is_no_number_is_refused(run, model, text_file):
    edit_tensors(model, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    answer = run("eval", model, "--text", text_file, "--seqlen", 32, "--windows", 2)
    refused(answer, 6, f"window 0 of {text_file} has the loss nan")


def test_a_good_output_passes_and_a_tampered_one_does_not(run, llama, small, tmp_path):
    run("prune", llama, "out", *small)
    answer = run("verify", "out", "--against", llama)
    assert answer.code == 0
    assert [line.split()[:2] for line in answer.err.splitlines()] == [
        ["hashes", "1/1"], ["tensors", "30/30"],
    ]  # fmt: skip
    assert answer.out.startswith(f"out keeps its promises, checked against {llama}: 30 tensors, 21")
    (tmp_path / "out" / "stray.safetensors").touch()
    refused(
        run("verify", "out"),
        7,
        "out does not keep its promises:\nstray.safetensors is not named in",
    )


def test_an_output_that_is_none_is_refused(run, llama, tmp_path):
    refused(run("verify", tmp_path / "nowhere"), 3, "there is no model folder")
    refused(run("verify", llama), 3, "has no pruning.json: it was not made by lowmem-gblm prune")


def test_an_interrupted_run_says_how_to_run_it_again(run, monkeypatch):
    monkeypatch.setattr("lowmem_gblm.commands.prune.pipeline.prune", ctrl_c)
    answer = run("prune", "my model", "out", "--sparsity", "0.6")
    refused(answer, 130, "interrupted.", "\nlowmem-gblm prune 'my model' out --sparsity 0.6\n")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (OSError(28, "No space left on device"), 4, "No space left on device"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "Permission denied: /root/x"),
        (FileExistsError("out exists already"), 2, "out exists already"),
    ],
)
def test_an_error_of_the_system_becomes_a_sentence(error, code, sentence, run, monkeypatch):
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("lowmem_gblm.commands.prune.pipeline.prune", fail)
    answer = run("prune", "model", "out")
    refused(answer, code, sentence)
    assert "None" not in answer.err


def commands(model: Path, small: list[str], text: Path) -> dict[str, list[object]]:
    evaluation = ["--text", text, "--windows", 2]
    return {
        "prune": ["prune", model, "out", *small],
        "plan": ["plan", model, *small],
        "eval": ["eval", model, "--seqlen", 32, *evaluation],
        "compare": ["compare", model, "--methods", "wanda,gradient", *small, *evaluation],
        "verify": ["verify", "done", "--against", model],
    }


@pytest.mark.parametrize("command", ["prune", "plan", "eval", "compare", "verify"])
def test_json_is_one_object_on_stdout_and_nothing_else(command, run, llama, small, text_file):
    run("prune", llama, "done", *small)
    answer = run(*commands(llama, small, text_file)[command], "--json")
    assert answer.code == 0
    assert isinstance(json.loads(answer.out), dict)
    assert answer.out.count("\n") == 1


@pytest.mark.parametrize("command", ["prune", "plan", "eval", "compare", "verify"])
def test_without_json_a_person_reads_it(command, run, llama, small, text_file):
    run("prune", llama, "done", *small)
    answer = run(*commands(llama, small, text_file)[command])
    assert answer.code == 0
    assert answer.out.strip()
    assert not answer.out.startswith("{")


def test_prune_s_json_is_pruning_json(run, llama, small, tmp_path):
    answer = run("prune", llama, "out", *small, "--json")
    assert json.loads(answer.out) == json.loads((tmp_path / "out" / "pruning.json").read_text())


def test_eval_s_json_has_the_perplexity_of_the_api(run, llama, text_file):
    answer = run("eval", llama, "--text", text_file, "--seqlen", 32, "--windows", 3, "--json")
    again = lowmem_gblm.evaluate(llama, text=str(text_file), seqlen=32, windows=3)
    assert json.loads(answer.out)["perplexity"] == again["perplexity"]


def test_progress_is_a_line_per_stage_on_stderr(run, llama, small):
    answer = run("prune", llama, "out", *small)
    stages = [line.split()[0] for line in answer.err.splitlines()]
    assert stages == ["embed", "dense", "head", "reverse", "prune", "finish"]
    assert "\r" not in answer.err
    assert "peak" not in answer.out.splitlines()[1]


def test_prune_says_what_it_did_and_where(run, llama, small):
    first, second = run("prune", llama, "out", *small).out.splitlines()
    assert first.startswith("pruned 21 tensors with gblm to 50.00% zeros in ")
    assert second == "the checkpoint is out"


def test_plan_writes_nothing(run, llama, small, tmp_path):
    answer = run("plan", llama, *small)
    assert answer.out.startswith("stages       embed → dense → head → reverse → prune\nhost memory")
    assert not list(tmp_path.iterdir())


def test_plan_promises_the_bytes_that_prune_reads(run, llama, small):
    made = json.loads(run("plan", llama, *small, "--json").out)
    record = json.loads(run("prune", llama, "out", *small, "--json").out)
    assert made["read_bytes"] == record["bytes"]["read"]
    assert made["flops"] == record["flops"]


def test_compare_has_a_row_for_the_dense_model_and_every_method(run, llama, small, text_file):
    argv = commands(llama, small, text_file)["compare"]
    rows = json.loads(run(*argv, "--json").out)["rows"]
    assert [row["method"] for row in rows] == ["dense", "wanda", "gradient"]
    assert [row["sparsity"] for row in rows] == [0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        ("wanda,obs", "unknown method 'obs': choose one of gblm"),
        ("wanda,gblm,wanda", "--methods names the method wanda twice"),
        ("", "unknown method '': choose one of gblm"),
    ],
)
def test_methods_that_cannot_be_compared_are_refused_before_any_work(
    methods, sentence, run, llama, small, text_file, tmp_path
):
    evaluation = ("--text", text_file, "--windows", 2)
    answer = run("compare", llama, "--methods", methods, *small, *evaluation)
    refused(answer, 2, sentence)
    assert not list(tmp_path.iterdir())


def test_every_option_of_a_request_is_in_its_help(run):
    for command, request in (
        ("prune", PruneRequest),
        ("plan", PruneRequest),
        ("eval", EvalRequest),
    ):
        answer = run(command, "--help")
        assert answer.code == 0
        words = answer.out.split()
        for one in options(request):
            assert f"--{one.name.replace('_', '-')}" in words
            assert one.metadata["help"].split()[0] in words or one.name == "method"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_help_and_has_its_own(command, run):
    assert f" {command} " in run("--help").out
    assert run(command, "--help").out.startswith(f"usage: lowmem-gblm {command}")


def test_the_version_is_the_package_s(run):
    answer = run("--version")
    assert (answer.code, answer.out) == (0, f"lowmem-gblm {lowmem_gblm.__version__}\n")


def test_without_a_command_the_usage_is_shown(run):
    refused(run(), 2, "usage: lowmem-gblm", "the following arguments are required: COMMAND")


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom lowmem_gblm.cli.main import main\n"
        "try: main(['prune', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') "
        "if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert answer.stdout.endswith("[]\n")


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "lowmem_gblm", "plan", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith("usage: lowmem-gblm plan")


def test_sharded_half_precision_goes_the_whole_way(run, small, tmp_path):
    source = save_tiny("llama", tmp_path / "model", dtype=torch.bfloat16, sharded=True)
    assert run("prune", source, "out", *small, "--pattern", "2:4").code == 0
    assert run("verify", "out", "--against", source).code == 0


def test_eval_obeys_its_budget(run, llama, text_file):
    size = ["--text", text_file, "--seqlen", 32, "--windows", 2]
    refused(
        run("eval", llama, *size, "--cpu-memory", "1MiB"), 4, "this run needs ", "of host memory"
    )


def test_eval_works_without_a_disk(run, llama, text_file):
    size = ["--text", text_file, "--seqlen", 32, "--windows", 2, "--json"]
    without, plain = run("eval", llama, *size, "--disk", "1B"), run("eval", llama, *size)
    assert json.loads(without.out)["perplexity"] == json.loads(plain.out)["perplexity"]


def test_a_column_goes_to_both_sides_of_a_comparison(run, llama, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": "a river and a stone " * 60}) + "\n")
    size = ["--nsamples", 1, "--seqlen", 32, "--windows", 2]
    texts = ["--calibration", path, "--text", path, "--text-column", "body"]
    assert run("compare", llama, "--methods", "wanda", *size, *texts).code == 0


@pytest.mark.parametrize("error", [MemoryError("6 GiB"), torch.OutOfMemoryError("6 GiB")])
def test_running_out_of_memory_is_a_sentence(error, run, llama, small, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("lowmem_gblm.commands.prune.pipeline.prune", fail)
    refused(run("prune", llama, "out", *small), 4, "out of memory: 6 GiB. Try a smaller --seqlen")


def test_an_interrupted_comparison_says_what_stays(run, llama, small, monkeypatch):
    monkeypatch.setattr("lowmem_gblm.commands.compare.pipeline.compare", ctrl_c)
    answer = run("compare", llama, "--methods", "wanda", *small)
    refused(answer, 130, "What is pruned is kept in comparison. To resume", "lowmem-gblm compare")
