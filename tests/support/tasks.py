"""Tasks for lm-evaluation-harness that need no network: made up, and of the real arrow files."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from support.tiny_models import sample_text

# Of the harness's own task files: what its name is, what it includes, its arrow file.
REAL = {
    "boolq": ("super_glue/boolq/default.yaml", "boolq_none"),
    "rte": ("glue/rte/default.yaml", "glue_rte"),
    "winogrande": ("winogrande/default.yaml", "winogrande_winogrande_xl"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "openbookqa_main"),
    "arc_easy": ("arc/arc_easy.yaml", "ai2_arc_ARC-Easy"),
    "arc_challenge": ("arc/arc_challenge.yaml", "ai2_arc_ARC-Challenge"),
}
METRICS = """metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def write_real_tasks(shared: Path, folder: Path) -> list[str]:
    """Writes task files of real data, and returns their names."""
    spec = find_spec("lm_eval")
    assert spec is not None
    (package,) = spec.submodule_search_locations
    for name, (included, arrow) in REAL.items():
        # The answers of BoolQ are booleans in this file.
        target = 'doc_to_target: "{{answer|int}}"\n' if name == "boolq" else ""
        _write(
            folder / f"{name}.yaml",
            f"include: {package}/tasks/{included}\ntask: {name}\n{target}"
            + _data("arrow", shared / "real" / "tasks" / f"{arrow}.arrow"),
        )
    return list(REAL)


def write_made_up_tasks(folder: Path, docs: int = 12) -> list[str]:
    """Writes a task of every type that has given answers, and returns their names.

    Endings are of one token and of several, texts and some questions are longer than a tiny
    model's positions, and two questions are the same.
    """
    rows = [
        {
            "text": sample_text(30 + 40 * number % 260, seed=number % (docs - 1)),
            "choices": ["a", "b", " an old house", " the river "],
            "gold": number % 4,
            "ending": " again",
        }
        for number in range(docs)
    ]
    data = folder / "rows.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    kinds = {
        "endings": "output_type: multiple_choice\ndoc_to_text: '{{text}}'\n"
        "doc_to_target: gold\ndoc_to_choice: '{{choices}}'\n" + METRICS,
        "last_words": "output_type: loglikelihood\ndoc_to_text: '{{text}}'\n"
        "doc_to_target: '{{ending}}'\nmetric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n",
        "stories": "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{text}}'\nmetric_list:\n  - {metric: bits_per_byte}\n",
        "writing": "output_type: generate_until\ndoc_to_text: '{{text}}'\n"
        "doc_to_target: '{{ending}}'\ngeneration_kwargs: {until: ['.']}\n",
    }
    for name, kind in kinds.items():
        _write(folder / f"{name}.yaml", f"task: {name}\n{kind}" + _data("json", data))
    return ["endings", "last_words", "stories"]


def _data(builder: str, file: Path) -> str:
    return (
        f"dataset_path: {builder}\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{validation: {file}}}}}\n"
        "training_split: null\ntest_split: null\nvalidation_split: validation\n"
        "fewshot_split: validation\ntag: null\n"
    )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
